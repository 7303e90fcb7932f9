"""The table of adapter methods."""

from __future__ import annotations

from collections.abc import Mapping

from graftory.adapters.bottleneck import BOTTLENECK, NORMED_BOTTLENECK
from graftory.adapters.fusion import FUSION
from graftory.adapters.lora import LORA
from graftory.adapters.method import Method
from graftory.adapters.smop import SMOP
from graftory.config import AdapterConfig
from graftory.errors import UnsupportedAdapterError

METHODS: Mapping[str, Method] = {method.name: method for method in (LORA, BOTTLENECK, NORMED_BOTTLENECK, FUSION, SMOP)}
"""Every method that can be attached, by name."""


def method_of(config: AdapterConfig) -> Method:
    """The row of a configuration's method.

    Raises:
        UnsupportedAdapterError: If it cannot be attached.
    """
    method = METHODS.get(config.method)
    if method is None:
        raise UnsupportedAdapterError(
            f"a {config.method} makes adapters and is none itself: take one task's, with hub compose export-task or "
            "graftory.compose.hyperformer.task_adapter"
        )
    return method
