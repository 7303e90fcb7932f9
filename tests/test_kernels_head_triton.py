"""`batched_head` by Triton kernels, under its interpreter: the same sweep, and its own kernel broken on purpose."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from graftory.kernels import Routing, batched_head
from tests import interpreted
from tests.interpreted import Meter, poisoned, worst
from tests.kernel_samples import error
from tests.test_kernels_head import CASES, Heads, expected, heads, results, run

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not interpreted in this process: set TRITON_INTERPRET=1",
)
SWEEP: dict[str, Heads] = {
    **{name: given for name, given in CASES.items() if given.x.numel() and name != "many"},
    "alone": heads([3, -1, 0], (4, 17, 2, 9), tokens=1),
    "dozens": heads(list(range(0, 40, 3)), [1 + k % 5 for k in range(40)], tokens=1, width=8),
    "long": heads([0, -1, 1], (4, 8), tokens=70, width=16),
    "split": heads([0, 1], (4, 8), tokens=3, width=600),
}
LARGE = heads([0, -1, 1, 2], (150, 3, 128), tokens=2, width=20)
"""More outputs than a kernel takes at a time."""


@pytest.fixture
def launch() -> ModuleType:
    """The module that launches most of the kernels, and makes what they write."""
    module = importlib.import_module("graftory.kernels.batched_lora.launch")
    assert module.INTERPRETED
    return module


def errors(given: Heads, dtype: torch.dtype) -> list[float]:
    """Relative errors of the logits and of each gradient, with NaN behind everything that is read."""
    rounded = given.to(dtype)
    x, weight, grad = (poisoned(each) for each in (rounded.x, rounded.weight, rounded.grad))
    bias = None if rounded.bias is None else poisoned(rounded.bias)
    got, want = results(replace(rounded, x=x, weight=weight, bias=bias, grad=grad), "triton"), expected(rounded)
    padding = given.padding()
    assert bool((got[0][padding] == float("-inf")).all())
    got[0], want[0] = got[0][~padding], want[0][~padding]
    return [error(mine, exact) for mine, exact in zip(got, want, strict=True)]


@pytest.mark.parametrize("name", SWEEP)
@pytest.mark.usefixtures("guarded")
def test_logits_and_gradients_are_the_formula_s(name: str) -> None:
    assert worst(errors(SWEEP[name], torch.float32)) < 1e-6


@pytest.mark.usefixtures("guarded")
def test_heads_larger_than_a_block() -> None:
    assert worst(errors(LARGE, torch.float32)) < 1e-6
    assert worst(errors(LARGE, torch.float16)) < 2e-3


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
@pytest.mark.usefixtures("guarded")
def test_half_precision(dtype: torch.dtype, most: float) -> None:
    """Within the rounding of what is stored: 2^-11 and 2^-8, a few times."""
    for name in ("some none", "alone"):
        assert worst(errors(SWEEP[name], dtype)) < most


@pytest.mark.parametrize("name", ["no rows", "no tokens"])
@pytest.mark.usefixtures("launch")
def test_nothing_gives_nothing(name: str) -> None:
    given = CASES[name].to(torch.float32)
    logits, grad_x, *rest = results(given, "triton")
    assert logits.shape == (*given.x.shape[:2], 3)
    assert grad_x.shape == given.x.shape
    assert not any(each.any() for each in rest)


@pytest.mark.usefixtures("launch")
def test_padding_holds_the_fill() -> None:
    given = CASES["some none"].to(torch.float32)
    logits, padding = run(given, "triton", fill=-7.5), given.padding()
    assert bool((logits[padding] == -7.5).all())
    assert not bool((logits[~padding] == -7.5).any())


@pytest.mark.parametrize("name", ["some none", "alone"])
@pytest.mark.usefixtures("launch")
def test_a_row_depends_on_no_other_row(name: str) -> None:
    """In small whole numbers, which fp32 adds exactly: the interpreter's products round by the place in a block."""
    drawn = SWEEP[name].to(torch.float32)
    assert drawn.bias is not None
    given = replace(drawn, x=drawn.x.round(), weight=drawn.weight.round(), grad=drawn.grad.round())
    together, order = results(given, "triton"), torch.arange(len(given.x)).flip(0)
    moved = replace(given, x=given.x[order], index=given.index[order], grad=given.grad[order])
    for one, other in zip(results(moved, "triton")[:2], together[:2], strict=True):
        assert torch.equal(one, other[order])
    weight, bias = given.weight.clone(), drawn.bias.clone()
    weight[0] = bias[0] = float("nan")
    fine = given.index != 0
    hurt = results(replace(given, weight=weight, bias=bias), "triton")
    assert hurt[0][~fine].isnan().any()
    for one, other in zip(hurt[:2], together[:2], strict=True):
        assert torch.equal(one[fine], other[fine])
    for one, other in zip(hurt[2:], together[2:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("launch")
def test_run_to_run_the_bits_are_the_same() -> None:
    for name in ("some none", "alone"):
        given = SWEEP[name].to(torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(results(given, "triton"), results(given, "triton"), strict=True))


@pytest.fixture
def meter(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Meter:
    """Beside what `finish` reads and writes, a closed form: for an entry its head, with one a size, sums and biases."""
    found = interpreted.metered(monkeypatch)
    own = importlib.import_module("graftory.kernels.batched_head.launch")
    finish, entries = own._finish, Routing.entries

    def metered_finish(hidden: Tensor, bias: Tensor | None, batch: Any, fill: float, out: Tensor) -> None:
        sizes = [int(batch.ranks[0, k]) for k in batch.adapter.tolist() if k >= 0]
        reads = len(batch.adapter) + len(sizes) + sum(sizes) * (len(hidden) + (bias is not None))
        with found.call(reads, out.numel()):
            finish(hidden, bias, batch, fill, out)

    def roomy(self: Routing, tokens: int) -> Tensor:
        """No head behind the last entry, so that a broken mask reads nothing that is nowhere."""
        each = entries(self, tokens)
        return torch.cat([each, each.new_full((1024,), -1)])[: len(each)]

    monkeypatch.setattr(own, "_finish", metered_finish)
    monkeypatch.setattr(Routing, "entries", roomy)
    return found


@pytest.mark.parametrize("name", ["some none", "no bias", "room", "alone", "split"])
def test_nothing_is_read_or_written_but_what_has_to_be(name: str, meter: Meter) -> None:
    assert worst(errors(SWEEP[name], torch.float32)) < 1e-6
    assert len(meter.seen) == 1
    assert meter.seen == meter.due


SOURCE = Path(batched_head.__code__.co_filename).parent / "kernel.py"
MASKS = ("mask=inside", "mask=(head >= 0)", "mask=known", "inside[:, None]", "(o < width)[None, :]")


def wrong(name: str, text: str, tmp_path: Path, launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a kernel of that source gives a wrong number."""
    from triton.runtime.errors import InterpreterError

    interpreted.give_room(launch, monkeypatch)
    own = importlib.import_module("graftory.kernels.batched_head.launch")
    monkeypatch.setattr(own, "kernel", interpreted.load(text, tmp_path))
    try:
        return not worst(errors(SWEEP[name], torch.float32)) < 1e-6
    except (InterpreterError, AssertionError):  # what lies beyond a tensor overflows, or the padding is not the fill
        return True


@pytest.mark.parametrize("name", ["some none", "room"])
def test_the_source_from_a_file_passes_as_it_is(
    name: str, tmp_path: Path, launch: ModuleType, monkeypatch: pytest.MonkeyPatch, meter: Meter
) -> None:
    assert not wrong(name, SOURCE.read_text(), tmp_path, launch, monkeypatch)
    assert meter.seen == meter.due


@pytest.mark.parametrize(("mask", "number"), interpreted.mutations(SOURCE, MASKS))
def test_every_mask_is_needed(
    mask: str, number: int, tmp_path: Path, launch: ModuleType, monkeypatch: pytest.MonkeyPatch, meter: Meter
) -> None:
    """With any one mask always true, a number is wrong, or something is read or written that need not be."""
    text = interpreted.broken(SOURCE.read_text(), mask, number)
    assert wrong("some none", text, tmp_path, launch, monkeypatch) or meter.seen != meter.due
