"""The Triton kernels of `batched_scale` under Triton's interpreter: the same sweep, and broken on purpose."""

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

from graftory.kernels import batched_scale
from tests import interpreted
from tests.interpreted import Meter, poisoned, worst
from tests.kernel_samples import error
from tests.test_kernels_scale import CASES, NAN, Scaling, expected, results, scaling

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not interpreted in this process: set TRITON_INTERPRET=1",
)
SWEEP: dict[str, Scaling] = {
    **{name: given for name, given in CASES.items() if given.x.numel() and name != "many"},
    "dozens": scaling(list(range(0, 40, 3)), 40, middle=(1,), width=8),
    "split": scaling([0, 0, 1], 2, middle=(150,), width=16),
}


@pytest.fixture
def launch() -> ModuleType:
    """The module that launches the kernels."""
    module = importlib.import_module("graftory.kernels.batched_scale.launch")
    assert module.INTERPRETED
    return module


def errors(given: Scaling, dtype: torch.dtype) -> list[float]:
    """Relative errors of the rows and of both gradients, with NaN behind everything that is read."""
    rounded = given.to(dtype)
    hurt = Scaling(poisoned(rounded.x), poisoned(rounded.vectors), rounded.index, poisoned(rounded.grad))
    return [error(got, want) for got, want in zip(results(hurt, "triton"), expected(rounded), strict=True)]


@pytest.mark.parametrize("name", SWEEP)
@pytest.mark.usefixtures("guarded")
def test_rows_and_gradients_are_the_formula_s(name: str) -> None:
    assert worst(errors(SWEEP[name], torch.float32)) < 2e-7


@pytest.mark.parametrize("name", ["no rows", "no tokens"])
@pytest.mark.usefixtures("launch")
def test_nothing_gives_nothing(name: str) -> None:
    given = CASES[name].to(torch.float32)
    scaled, grad_x, grad_vectors = results(given, "triton")
    assert scaled.shape == grad_x.shape == given.x.shape
    assert torch.equal(grad_vectors, torch.zeros(2, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("guarded")
def test_rows_and_their_gradients_are_torch_s_to_the_bit(dtype: torch.dtype) -> None:
    """One product rounded once, whatever the types; to bfloat16 the interpreter cuts off instead."""
    most = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    for name in ("some none", "long"):
        given = CASES[name].to(dtype)
        for each in (given, replace(given, vectors=CASES[name].vectors.float())):
            mine, torch_s = results(each, "triton"), results(each)
            for one, other in zip(mine[:2], torch_s[:2], strict=True):
                torch.testing.assert_close(one, other, atol=0.0, rtol=most)
            assert mine[2].dtype == each.vectors.dtype
            assert error(mine[2], torch_s[2]) < 2 * torch.finfo(each.vectors.dtype).eps


@pytest.mark.usefixtures("guarded")
def test_rows_without_an_adapter_pass_bit_for_bit() -> None:
    given = CASES["some none"].to(torch.bfloat16)
    x, grad, vectors = given.x.clone(), given.grad.clone(), given.vectors.clone()
    x[1, 0, :5], grad[1, 1, :5], vectors[1] = NAN, NAN, float("nan")
    scaled, grad_x, grad_vectors = results(replace(given, x=x, grad=grad, vectors=vectors), "triton")
    free, fine = given.index < 0, (given.index >= 0) & (given.index != 1)
    assert torch.equal(scaled[free].view(torch.int16), x[free].view(torch.int16))
    assert torch.equal(grad_x[free].view(torch.int16), grad[free].view(torch.int16))
    whole = results(given, "triton")
    assert torch.equal(scaled[fine], whole[0][fine])
    assert torch.equal(grad_x[fine], whole[1][fine])
    assert torch.equal(grad_vectors, whole[2])
    assert not grad_vectors[3].any()


@pytest.mark.usefixtures("launch")
def test_a_sum_depends_on_no_row_of_others() -> None:
    """Gradients of an adapter alone, and beside others that hold NaN, are the same bits."""
    given = SWEEP["split"].to(torch.float32)
    for k in range(2):
        x = torch.where((given.index == k)[:, None, None], given.x, float("nan"))
        assert torch.equal(results(replace(given, x=x), "triton")[2][k], results(given, "triton")[2][k])


SOURCE = Path(batched_scale.__code__.co_filename).parent / "kernel.py"
MASKS = (
    *("inside[:, None]", "mask=inside"),
    *("(d < width)[None, :]", "mask=(d < width)", "(t < tokens)[:, None]"),
)


@pytest.fixture
def meter(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Meter:
    """Beside what is counted, a closed form of what is needed.

    A program of `scale` reads its adapter, its numbers and, with an adapter, a piece of its vector; one of `reduce`
    reads two ends, and for each position its row and two numbers a column.
    """
    found = interpreted.metered(monkeypatch)
    scaled, grad_vectors = launch.scaled, launch._grad_vectors

    def metered_scaled(x: Tensor, vectors: Tensor, index: Tensor) -> Any:
        (rows, tokens, width), blocks = x.shape, launch.blocks_for(*x.shape[1:])
        down, across = -(-tokens // blocks.t), -(-width // blocks.d)
        with found.call(x.numel() + rows * down * across + int((index >= 0).sum()) * down * width, x.numel()):
            return scaled(x, vectors, index)

    def metered_grad_vectors(grad: Tensor, inputs: Any) -> Any:
        (rows, tokens, width), adapters = inputs.x.shape, len(inputs.vectors)
        blocks = launch.sum_blocks_for(rows * tokens, width)
        across, used = -(-width // blocks.d), int((inputs.adapter >= 0).sum())
        with found.call(across * (2 * adapters + used * tokens) + 2 * used * tokens * width, adapters * width):
            return grad_vectors(grad, inputs)

    monkeypatch.setattr(launch, "scaled", metered_scaled)
    monkeypatch.setattr(launch, "_grad_vectors", metered_grad_vectors)
    return found


WITNESS = scaling([1, -1, 0, 1], 3, middle=(5,), width=20)


def check_meter(name: str, meter: Meter) -> None:
    assert worst(errors(SWEEP[name], torch.float32)) < 2e-7
    assert len(meter.seen) == 3
    assert meter.seen == meter.due


@pytest.mark.parametrize("name", ["some none", "images", "long", "dozens", "no positions"])
def test_nothing_is_read_or_written_but_what_has_to_be(name: str, meter: Meter) -> None:
    check_meter(name, meter)


def wrong(text: str, tmp_path: Path, launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether kernels of that source give a wrong number."""
    from triton.runtime.errors import InterpreterError

    interpreted.give_room(launch, monkeypatch)
    monkeypatch.setattr(launch, "kernel", interpreted.load(text, tmp_path))
    try:
        return not worst(errors(WITNESS, torch.float32)) < 2e-7
    except InterpreterError:  # what lies beyond a tensor overflows
        return True


@pytest.mark.parametrize(("mask", "number"), interpreted.mutations(SOURCE, MASKS))
def test_every_mask_is_needed(
    mask: str, number: int, tmp_path: Path, launch: ModuleType, monkeypatch: pytest.MonkeyPatch, meter: Meter
) -> None:
    """With any one mask always true, a number is wrong, or something is read or written that need not be."""
    text = interpreted.broken(SOURCE.read_text(), mask, number)
    assert wrong(text, tmp_path, launch, monkeypatch) or meter.seen != meter.due


def test_the_source_from_a_file_passes_as_it_is(
    tmp_path: Path, launch: ModuleType, monkeypatch: pytest.MonkeyPatch, meter: Meter
) -> None:
    assert not wrong(SOURCE.read_text(), tmp_path, launch, monkeypatch)
    assert meter.seen == meter.due
