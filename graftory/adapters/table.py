"""The table of adapter methods."""

from __future__ import annotations

from collections.abc import Mapping

from graftory.adapters.bottleneck import BOTTLENECK
from graftory.adapters.fusion import FUSION
from graftory.adapters.lora import LORA
from graftory.adapters.method import Method
from graftory.adapters.smop import SMOP

METHODS: Mapping[str, Method] = {method.name: method for method in (LORA, BOTTLENECK, FUSION, SMOP)}
"""Every method that can be attached, by name."""
