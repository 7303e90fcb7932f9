"""How large merges get: the largest tensor that each makes, on shapes of Llama-3-8B."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graftory.adapter import Adapter
from graftory.compose import METHODS, merge
from graftory.compose.merge import dense
from graftory.compose.merge.dense import BLOCK
from tests import test_compose_merge
from tests.test_compose_merge import lora

RANK, TASKS = 16, 3
UP, KEYS = (14336, 4096), (256, 4096)
"""The FFN's first layer, and two of the eight heads of the keys."""
BY_ENTRY = ("ties", "magnitude", "dare", "dare_ties", "della", "fisher")
"""What needs ΔW itself: the merged one as a whole, of the others a block at a time."""
FROM_FACTORS = tuple(
    name
    for name, row in METHODS.items()
    if row.space == "delta" and name not in BY_ENTRY and row.params().reads == "nothing"
)


class Largest(TorchDispatchMode):
    """Counts the numbers in the memory of every tensor that an operation makes; views are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: Counter[int] = Counter()

    @property
    def numbers(self) -> int:
        """The most."""
        return max(self.made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        before = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in before:
                self.made[each.untyped_storage().nbytes() // each.element_size()] += 1
        return result


def adapters(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> list[Adapter]:
    monkeypatch.setattr(test_compose_merge, "WIDTHS", {"layers.0.linear": shape})
    return [lora(seed, rank=RANK, targets=("layers.0.linear",)) for seed in range(TASKS)]


def gradients(shape: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(4).repeat_interleave(3)
    x, g = (torch.randn(12, size, generator=generator) for size in reversed(shape))
    return {"layers.0.linear": x, "layers.0.linear.gradients": g, "layers.0.linear.rows": rows}


@pytest.mark.parametrize("method", FROM_FACTORS)
def test_what_works_on_factors_makes_nothing_as_large_as_a_weight(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = adapters(UP, monkeypatch)
    with Largest() as seen:
        merged = merge(given, method, rank=RANK)
    assert merged.tensors["layers.0.linear.lora_A.weight"].shape[0] <= RANK
    factors = RANK * TASKS * max(UP)
    assert factors <= seen.numbers <= TASKS * factors, "a stack of all factors at most"
    assert TASKS * factors < UP[0] * UP[1] / 25


@pytest.mark.parametrize("method", BY_ENTRY)
def test_what_works_on_entries_makes_one_weight_and_blocks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = adapters(KEYS, monkeypatch)
    block = BLOCK // 64
    monkeypatch.setattr(dense, "BLOCK", block)
    whole = KEYS[0] * KEYS[1]
    inputs = [gradients(KEYS)] * TASKS if method == "fisher" else []
    with Largest() as seen:
        merge(given, method, inputs=inputs, rank=RANK)
    assert seen.numbers == whole
    assert seen.made[whole] == 1, "the merged matrix, once"
    assert max(number for number in seen.made if number < whole) <= whole // 4, "blocks, and counts of ties"
