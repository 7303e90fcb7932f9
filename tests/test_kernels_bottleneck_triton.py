"""The Triton kernels of `batched_bottleneck` under Triton's interpreter: the same sweep, and broken on purpose."""

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

from graftory.kernels import batched_bottleneck
from graftory.kernels.activations import ACTIVATIONS, Activation
from graftory.kernels.tiles import Tiles
from tests import interpreted
from tests.bottleneck_samples import CASES, Neck, expected, neck, results
from tests.interpreted import Meter, poisoned
from tests.kernel_samples import error

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not interpreted in this process: set TRITON_INTERPRET=1",
)
NAN = float("nan")
MOST = 2e-6
SWEEP: dict[str, Neck] = {
    **{name: given for name, given in CASES.items() if given.x.numel() and name != "many"},
    "a block and one": neck([[0]] * 17 + [[1]] * 15, (16, 8), "silu", tokens=1, dropped=True),
    "large": neck([[k % 3] for k in range(13)], (1, 64, 128), "gelu", tokens=10, width=130, dropped=True),
    "steps": neck([[0, 1], [1, 2]], (33, 70, 64), "tanh", width=33, weighted=True, dropped=True),
    "dozens": neck([[k] for k in range(0, 40, 3)], [1 + k % 5 for k in range(40)], "relu", tokens=1, width=8),
    "long": neck([[0], [1]], (4, 8), "gelu_new", tokens=129, width=33),
    "split": neck([[0], [0]], (70,), "gelu", tokens=150, width=16, dropped=True, weighted=True),
}
WIDE = neck([[0], [-1], [1]], (33, 5), "silu", tokens=1, width=300, dropped=True)
"""Without gradients Z is made in two parts."""


@pytest.fixture
def launch() -> ModuleType:
    """The module that launches the kernels."""
    module = importlib.import_module("graftory.kernels.batched_bottleneck.launch")
    assert module.INTERPRETED
    return module


def padded_with_nan(given: Neck) -> Neck:
    """NaN behind each adapter's size, and behind each row in memory: true sizes are all that may be read."""
    down, down_bias, up = given.down.clone(), given.down_bias.clone(), given.up.clone()
    for k, size in enumerate(given.sizes.tolist()):
        down[k, size:] = down_bias[k, size:] = up[k, :, size:] = NAN
    keep = given.keep
    if keep is not None:
        keep = keep.clone().unflatten(2, given.index.shape[1:] + down.shape[1:2])
        for (row, place), k in zip(torch.ones_like(given.index).nonzero().tolist(), given.index.flatten(), strict=True):
            keep[row, :, place, 0 if k < 0 else int(given.sizes[k]) :] = NAN
        keep = poisoned(keep.flatten(2))
    return replace(
        given, x=poisoned(given.x), down=poisoned(down), down_bias=poisoned(down_bias), up=poisoned(up),
        up_bias=poisoned(given.up_bias), keep=keep,
    )  # fmt: skip


def worst(given: Neck, dtype: torch.dtype = torch.float32) -> float:
    """Largest relative error among the update and each gradient, NaN if one is; NaN lies behind everything read."""
    rounded = given.to(dtype)
    leaves = rounded.learning()
    update = padded_with_nan(leaves).run("triton")
    found = [update.detach(), *torch.autograd.grad(update, leaves.leaves(), poisoned(rounded.grad))]
    # not Python's `max`, which steps over NaN
    return float(torch.tensor([error(got, want) for got, want in zip(found, expected(rounded), strict=True)]).max())


def served_error(given: Neck) -> float:
    """Relative error of the update where no gradient is asked for."""
    rounded = given.to(torch.float32)
    return error(padded_with_nan(rounded).run("triton"), expected(rounded)[0])


@pytest.mark.parametrize("name", SWEEP)
@pytest.mark.usefixtures("guarded")
def test_update_and_gradients_are_the_formula_s(name: str) -> None:
    assert worst(SWEEP[name]) < MOST


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["mixtures", "some none"])
@pytest.mark.usefixtures("guarded")
def test_every_activation_is_torch_s(name: str, activation: Activation) -> None:
    assert worst(replace(SWEEP[name], activation=activation)) < MOST


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("launch")
def test_activations_hold_far_from_zero_near_it_and_for_nan(activation: Activation) -> None:
    """One hidden unit that reads what it is given, and hands it on."""
    z = torch.cat([torch.linspace(-30, 30, 61), torch.logspace(-6, 0, 13), -torch.logspace(-6, 0, 13)]).double()
    one, zero = torch.ones(1, 1, 1).double(), torch.zeros(1, 1).double()
    given = replace(
        neck([[0]] * len(z), (1,), activation, tokens=1, width=1), x=z.view(-1, 1, 1), down=one, down_bias=zero, up=one,
        up_bias=zero, scale=torch.ones(1), grad=torch.ones(len(z), 1, 1).double(),
    ).to(torch.float32)  # fmt: skip
    got, want = results(given, "triton"), expected(given)
    torch.testing.assert_close(got[0].double(), want[0], rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=3e-6, atol=1e-6)
    near = z.abs() < 1e-3
    torch.testing.assert_close(got[0][near].double(), want[0][near], rtol=1e-6, atol=0.0)
    lost = replace(given, x=torch.full_like(given.x, NAN))
    assert lost.run("triton").isnan().all()


@pytest.mark.parametrize("name", ["mixtures", "large", "a block and one", "none at all"])
@pytest.mark.usefixtures("guarded")
def test_without_gradients_the_update_is_the_formula_s(name: str) -> None:
    assert served_error(SWEEP[name]) < MOST
    assert served_error(WIDE) < MOST


@pytest.mark.parametrize("name", ["no rows", "no tokens"])
@pytest.mark.usefixtures("launch")
def test_nothing_gives_nothing(name: str) -> None:
    given = CASES[name].to(torch.float32)
    update, *grads = results(given, "triton")
    assert update.shape == given.x.shape
    assert not any(each.any() for each in grads)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
@pytest.mark.usefixtures("guarded")
def test_half_precision(dtype: torch.dtype, most: float) -> None:
    """Within the rounding of what is stored: 2^-11 and 2^-8, a few times."""
    assert worst(SWEEP["mixtures"], dtype) < most
    assert worst(SWEEP["large"], dtype) < most


@pytest.mark.usefixtures("launch")
def test_a_row_depends_on_no_other_row() -> None:
    """In small whole numbers, which fp32 adds exactly: the interpreter's products round by the place in a block."""
    given = SWEEP["large"].to(torch.float32).whole()
    together = given.run("triton")
    assert together.unique().numel() > 20
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    assert torch.equal(given.picked(order).run("triton"), together[order])
    assert torch.equal(given.renamed([2, 0, 1]).run("triton"), together)
    down = given.down.clone()
    down[1] = NAN
    fine = (given.index != 1).all(1)
    assert torch.equal(replace(given, down=down).run("triton")[fine], together[fine])


@pytest.mark.parametrize("name", ["some none", "mixtures"])
@pytest.mark.usefixtures("launch")
def test_rows_without_an_adapter_get_zeros_and_give_none(name: str) -> None:
    """Whatever they hold; and an adapter that is NaN reaches no gradient of others."""
    given = SWEEP[name].to(torch.float32)
    free = (given.index < 0).all(1)
    x, grad, up = given.x.clone(), given.grad.clone(), given.up.clone()
    x[free] = grad[free] = NAN
    up[1] = NAN
    update, grad_x, *grads = results(replace(given, x=x, grad=grad, up=up), "triton")
    whole, whole_x, *wholes = results(given, "triton")
    assert torch.equal(update[free], torch.zeros_like(update[free]))
    assert torch.equal(grad_x[free], torch.zeros_like(update[free]))
    fine = (given.index != 1).all(1)
    assert torch.equal(update[fine], whole[fine])
    assert torch.equal(grad_x[fine], whole_x[fine])
    for one, other in zip(grads[:4], wholes[:4], strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])


@pytest.mark.usefixtures("launch")
def test_the_compilers_operation_is_the_same() -> None:
    given = SWEEP["mixtures"].to(torch.float32).learning()
    arguments = (
        given.x, given.down, given.down_bias, given.up, given.up_bias, given.scale, given.index, given.weight,
        given.keep, given.sizes, given.activation, "triton",
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.graftory.batched_bottleneck.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    update, _ = torch.ops.graftory.batched_bottleneck(*arguments)
    found = [update.detach(), *torch.autograd.grad(update, given.leaves(), given.grad)]
    assert all(torch.equal(one, other) for one, other in zip(found, results(given, "triton"), strict=True))


SOURCE = Path(batched_bottleneck.__code__.co_filename).parent / "kernel.py"
MASKS = (
    *("inside[:, None]", "inside[None, :]", "mask=inside"),
    *("(d < width)[None, :]", "(d < width)[:, None]", "mask=(d < width)"),
    *("(r < size)[None, :]", "(r < size)[:, None]", "mask=(r < size)", "(part == 0)"),
    *("(r < size_stride)[None, :]", "(r < size_stride)[:, None]", "mask=(r < size_stride)"),
)


def tile_sizes(tiles: Tiles) -> list[tuple[int, int]]:
    """Adapter and number of entries of each tile."""
    return list(zip(tiles.adapter.tolist(), (tiles.end - tiles.start).tolist(), strict=True))


def used_tiles(batch: Any) -> list[tuple[int, int]]:
    """Size and number of entries of each tile that has an adapter."""
    return [(int(batch.sizes[k]), n) for k, n in tile_sizes(batch.tiles) if k >= 0 and n]


@pytest.fixture
def meter(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Meter:
    """Beside what is counted, a closed form of what is needed.

    A program reads three numbers of its tile, or of its adapter; a used one a size, its entries, and what it computes
    with once. What does not depend on a column is read for each block of columns.
    """
    found = interpreted.metered(monkeypatch)
    shrink, inner, expand, outer = launch._shrink, launch._inner, launch._expand, launch._outer

    def metered_shrink(matrix: Tensor, bias: Tensor, batch: Any, *, split: bool) -> Any:
        used, width, blocks = used_tiles(batch), matrix.shape[2], batch.blocks
        parts = 2 if split and width >= 4 * blocks.d else 1
        assert width < 6 * blocks.d
        reads = parts * 3 * len(batch.tiles.adapter)
        reads += sum(parts * (1 + n) + (n + size) * width + size for size, n in used)
        with found.call(reads, parts * sum(n * matrix.shape[1] for _, n in used)):
            return shrink(matrix, bias, batch, split=split)

    def metered_inner(grad: Tensor, before: Tensor, inputs: Any, batch: Any, *, weighted: bool) -> Any:
        used, width, kept = used_tiles(batch), grad.shape[1], batch.keep is not None
        reads = 3 * len(batch.tiles.adapter) + sum(1 + n + (n + size) * width for size, n in used)
        reads += sum(n * size * (1 + kept) + weighted * width for size, n in used)
        with found.call(reads, sum(n * (before.shape[1] + weighted) for _, n in used)):
            return inner(grad, before, inputs, batch, weighted=weighted)

    def metered_expand(hidden: Tensor, matrix: Tensor, bias: Tensor | None, batch: Any) -> Any:
        used, width = used_tiles(batch), matrix.shape[2]
        columns, biased = -(-width // batch.blocks.d), bias is not None
        again = len(hidden) + (biased and batch.keep is not None)
        reads = columns * sum(3 + n for _, n in tile_sizes(batch.tiles))
        reads += sum(columns * (1 + n + n * size * again) + (biased + size) * width for size, n in used)
        with found.call(reads, len(batch.tiles.order) * width):
            return expand(hidden, matrix, bias, batch)

    def metered_outer(hidden: Tensor, x: Tensor, like: Tensor, batch: Any, *, by_column: bool) -> Any:
        (adapters, size_stride, width), blocks = like.shape, batch.blocks
        counts, columns = batch.tiles.offsets.diff().tolist()[:-1], -(-width // batch.blocks.d)
        parts = 2 if len(batch.tiles.order) >= 16 * adapters * blocks.e else 1
        assert len(batch.tiles.order) < 24 * adapters * blocks.e
        again = 1 + (by_column and batch.keep is not None)
        reads = columns * parts * 3 * adapters
        for size, n in zip(batch.sizes.tolist(), counts, strict=True):
            reads += n * (columns * (2 + size * again) + width)
        writes = parts * adapters * (size_stride * width + (width if by_column else size_stride))
        with found.call(reads, writes):
            return outer(hidden, x, like, batch, by_column=by_column)

    wrapped = {"_shrink": metered_shrink, "_inner": metered_inner, "_expand": metered_expand, "_outer": metered_outer}
    for name, each in wrapped.items():
        monkeypatch.setattr(launch, name, each)
    return found


WITNESS = neck(
    [[0, 2], [1, -1], [-1, -1]], (17, 1, 3), "gelu", tokens=2, width=20, weighted=True, dropped=True
)  # fmt: skip


@pytest.mark.parametrize("name", ["some none", "mixtures", "a block and one", "dozens", "steps", "large", "split"])
def test_nothing_is_read_or_written_but_what_has_to_be(name: str, meter: Meter) -> None:
    assert worst(SWEEP[name]) < MOST
    assert len(meter.seen) == 6
    assert served_error(WIDE) < MOST
    assert meter.seen == meter.due


def wrong(text: str, tmp_path: Path, launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether kernels of that source give a wrong number."""
    from triton.runtime.errors import InterpreterError

    interpreted.give_room(launch, monkeypatch)
    monkeypatch.setattr(launch, "kernel", interpreted.load(text, tmp_path))
    try:
        return not (worst(WITNESS) < MOST and served_error(WIDE) < MOST)
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
