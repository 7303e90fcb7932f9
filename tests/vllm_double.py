"""What vLLM 0.33's `vllm.lora.request` and `vllm.lora.resolver` promise to a plugin, and nothing more."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Set
from dataclasses import dataclass
from types import ModuleType

import pytest


@dataclass(eq=False)
class LoRARequest:
    """As a server takes it: the number is positive, the path is given, and two of one name are equal."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"lora_int_id: {self.lora_int_id}")
        assert self.lora_path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and other.lora_name == self.lora_name

    def __hash__(self) -> int:
        return hash(self.lora_name)


class LoRAResolver(ABC):
    """A plugin's base class."""

    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request for a name, or None."""


class Registry:
    """Where plugins put their resolvers; each putting is kept, to be counted."""

    def __init__(self) -> None:
        self.put: list[tuple[str, LoRAResolver]] = []

    def get_supported_resolvers(self) -> Set[str]:
        return dict(self.put).keys()

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.put.append((resolver_name, resolver))

    def get_resolver(self, resolver_name: str) -> LoRAResolver:
        return dict(self.put)[resolver_name]


def install(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Let `import vllm.lora...` find the double; returns its registry."""
    registry = Registry()
    contents: dict[str, dict[str, object]] = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": registry},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "graftory.serving.resolver", raising=False)
    return registry
