"""What a row of the table of PEFT's methods says, and what the rows share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graftory.adapter import AdapterSpec
from graftory.config import AdapterConfig
from graftory.hub.safetensors_header import StoredTensor
from graftory.schema import Json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

Stored = Mapping[str, StoredTensor]
"""Tensors by their names without PEFT's prefix, heads left out."""


@dataclass(frozen=True, slots=True)
class PeftKind:
    """One of PEFT's methods. `Any` below stands for what its own `read` returns, a `PeftFile`."""

    peft_type: str
    read: Callable[[Json, str], Any]
    """Reads `adapter_config.json`; refuses by name what graftory does not do."""
    config: Callable[[Any, Stored], AdapterConfig]
    """The configuration as the files tell it; refuses every tensor that it does not explain."""
    check: Callable[[Any, Stored, Any], None]
    """Checks that a specification's configuration, of the class that `config` makes, says what the files say."""
    write: Callable[[AdapterSpec], bytes]
    """Makes `adapter_config.json`."""
    shared: tuple[str, ...] = ()
    """Names of tensors that stand above all modules: `base_model.<name>` in the file."""
    may_be_empty: bool = False
    """Whether a tensor may hold no number."""
