"""Being written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftory.adapter import AdapterSpec
from graftory.hub.records import TensorEntry


def base_shapes(folder: Path) -> Any:  # noqa: D103
    raise NotImplementedError


def check_fits(spec: AdapterSpec, tensors: Sequence[TensorEntry], shapes: Any) -> None:  # noqa: D103
    raise NotImplementedError
