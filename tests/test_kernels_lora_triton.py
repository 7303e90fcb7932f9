"""The Triton kernels of `batched_lora` under Triton's interpreter: the same sweep, and broken on purpose."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from graftory.kernels import batched_lora
from graftory.kernels.tiles import Tiles, cut
from tests import interpreted
from tests.interpreted import Meter, poisoned, worst
from tests.kernel_samples import Batch, batch, error, expected
from tests.test_kernels_lora import CASES

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not interpreted in this process: set TRITON_INTERPRET=1",
)


@pytest.fixture
def launch() -> ModuleType:
    """The module that launches the kernels."""
    module = importlib.import_module("graftory.kernels.batched_lora.launch")
    assert module.INTERPRETED
    return module


def padded_with_nan(given: Batch) -> Batch:
    """Behind each adapter's own rank, and behind each row."""
    hurt = given.nan_behind_ranks()
    return replace(hurt, a=poisoned(hurt.a), b=poisoned(hurt.b))


def run(given: Batch, onto: Tensor | None = None) -> Tensor:
    return batched_lora(
        *(given.x, given.a, given.b, given.scale, given.index, given.weight),
        ranks=given.ranks, onto=onto, backend="triton",
    )  # fmt: skip


def errors(given: Batch, dtype: torch.dtype, *, poison: bool = True, beside: torch.dtype | None = None) -> list[float]:
    """Relative errors of the update and of each gradient; `beside` a layer's output of that dtype, of the sum."""
    rounded = given.to(dtype)
    leaves = rounded.learning()
    layer, onto = outputs_of(given, beside) if beside else (None, None)
    update = run(padded_with_nan(leaves) if poison else leaves, onto)
    grad = torch.randn(update.shape, generator=torch.Generator().manual_seed(7)).to(update.dtype)
    found = [update.detach(), *torch.autograd.grad(update, leaves.leaves(), grad)]
    wanted = expected(rounded, grad)
    if layer is not None:
        wanted[0] = wanted[0] + layer.double()
    return [error(got, want) for got, want in zip(found, wanted, strict=True)]


def outputs_of(given: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a layer returned, twice: one to be written to, with much room behind it for kernels that are broken."""
    shape = (*given.x.shape[:2], given.b.shape[1])
    made = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    roomy = torch.zeros(made.numel() + 100_000, dtype=dtype)[: made.numel()]
    return made, roomy.view(shape).copy_(made)


def saved(call: Callable[[], Tensor]) -> set[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of all that is kept for a backward."""
    found = set()

    def note(tensor: Tensor) -> Tensor:
        found.add((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    return found


MORE: dict[str, Batch] = {
    "a block and one": batch([[0]] * 17 + [[1]] * 15, (16, 8), tokens=1),
    "large": batch([[k % 3] for k in range(13)], (1, 64, 128), tokens=10, inputs=130, outputs=70),
    "wide": batch([[0], [-1], [1]], (8, 3), tokens=2, inputs=600, outputs=16),
    "dozens": batch([[k] for k in range(0, 40, 3)], [1 + k % 5 for k in range(40)], tokens=1, inputs=8, outputs=8),
    "long": batch([[0], [1]], (4, 8), tokens=129, inputs=16, outputs=33),
    "alone": batch([[2, 0], [-1, 3], [-1, -1]], (3, 17, 1, 8, 64, 2), tokens=1, inputs=40, weighted=True),
    "alone and wide": batch([[1], [-1], [0]], (8, 16, 3), tokens=1, inputs=1100, outputs=600),
}


SLOW = "many"
SWEEP = {name: each for name, each in {**CASES, **MORE}.items() if each.x.numel() and name != SLOW}


@pytest.mark.parametrize("name", SWEEP)
@pytest.mark.usefixtures("guarded")
def test_update_and_gradients_are_the_formula_s(name: str) -> None:
    assert worst(errors(SWEEP[name], torch.float32)) < 1e-6


@pytest.mark.parametrize("name", ["no rows", "no tokens"])
@pytest.mark.usefixtures("launch")
def test_nothing_gives_nothing(name: str) -> None:
    given = CASES[name].to(torch.float32).learning()
    update = run(given)
    assert update.shape == (*given.x.shape[:2], 20)
    assert not any(each.any() for each in torch.autograd.grad(update.sum(), given.leaves()))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
@pytest.mark.usefixtures("guarded")
def test_half_precision(dtype: torch.dtype, most: float) -> None:
    """Within the rounding of what is stored: 2^-11 and 2^-8, a few times."""
    assert worst(errors(CASES["mixtures"], dtype)) < most
    assert worst(errors(MORE["large"], dtype)) < most


@pytest.mark.parametrize("name", SWEEP)
@pytest.mark.usefixtures("launch")
def test_added_to_what_a_layer_returned(name: str) -> None:
    assert worst(errors(SWEEP[name], torch.float32, beside=torch.float32)) < 1e-6


@pytest.mark.parametrize("name", ["some none", "alone and wide", "mixtures"])
@pytest.mark.usefixtures("launch")
def test_what_it_is_added_to_may_have_another_precision(name: str) -> None:
    """Its own rounding, 2^-9, is all that is lost; in the gradients, that of the gradient that comes."""
    given = SWEEP[name].to(torch.float32)
    layer, onto = outputs_of(given, torch.bfloat16)
    total = run(given, onto)
    assert (total.dtype, total.data_ptr()) == (torch.bfloat16, onto.data_ptr())
    assert error(total, layer.double() + run(given).double()) < 2**-8
    assert worst(errors(SWEEP[name], torch.float32, beside=torch.bfloat16)) < 2**-8


@pytest.mark.parametrize("name", ["some none", "alone and wide", "mixtures", "large"])
@pytest.mark.parametrize(("read", "factors"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.usefixtures("launch")
def test_the_input_is_read_as_it_is(name: str, read: torch.dtype, factors: torch.dtype) -> None:
    """As if x had been brought to the factors' precision first, but no copy of it is made or kept.

    To the bit, but where something is rounded to bfloat16: Triton's interpreter cuts its digits off.
    """
    given = SWEEP[name].to(factors)
    given = replace(given, x=SWEEP[name].x.to(read))
    leaves, brought = given.learning(), replace(given, x=given.x.to(factors)).learning()
    update, wanted = run(leaves), run(brought)
    assert update.dtype == factors
    exact = factors == torch.float32
    assert torch.equal(update, wanted) if exact else error(update.detach(), wanted.detach()) < 2**-6
    assert not saved(lambda: run(leaves)) & {(tuple(leaves.x.shape), factors)}
    grad = torch.randn(update.shape, generator=torch.Generator().manual_seed(7)).to(factors)
    found = torch.autograd.grad(update, leaves.leaves(), grad)
    for leaf, got, want in zip(
        leaves.leaves(), found, torch.autograd.grad(wanted, brought.leaves(), grad), strict=True
    ):
        assert got.dtype == leaf.dtype
        assert torch.equal(got, want) if exact and leaf is not leaves.x else error(got, want) < 2**-6


@pytest.mark.parametrize("name", ["some none", "alone and wide"])
@pytest.mark.usefixtures("launch")
def test_a_gradient_is_read_as_it_is_too(name: str) -> None:
    """Of a 16-bit layer's output that fp32 adapters are added to: as if it had been widened first."""
    given = SWEEP[name].to(torch.float32)
    leaves = given.learning()
    _, onto = outputs_of(given, torch.bfloat16)
    total = run(leaves, onto)
    grad = torch.randn(total.shape, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    found = torch.autograd.grad(total, leaves.leaves(), grad)
    beside = given.learning()
    wanted = torch.autograd.grad(run(beside), beside.leaves(), grad.float())
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["some none", "alone and wide"])
@pytest.mark.usefixtures("launch")
def test_rows_without_an_adapter_keep_the_bits_that_they_are_added_to(name: str) -> None:
    given = SWEEP[name].to(torch.float32)
    _, onto = outputs_of(given, torch.float32)
    unused = (given.index < 0).all(1)
    onto[unused] = -0.0
    assert bool(torch.signbit(run(given, onto)[unused]).all())


@pytest.mark.usefixtures("launch")
def test_a_row_depends_on_no_other_row() -> None:
    """In small whole numbers, which fp32 adds exactly: the interpreter's products round by the place in a block."""
    drawn = MORE["large"].to(torch.float32)
    given = replace(drawn, x=drawn.x.round(), a=drawn.a.round(), b=drawn.b.round(), scale=drawn.scale.sign())
    together = run(given)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(replace(given, x=given.x[order], index=given.index[order])), together[order])
    renamed = [2, 0, 1]
    back = torch.tensor([renamed.index(k) for k in range(3)])
    moved = replace(
        given, a=given.a[renamed], b=given.b[renamed], scale=given.scale[renamed], ranks=given.ranks[renamed],
        index=back[given.index],
    )  # fmt: skip
    assert torch.equal(run(moved), together)
    a = given.a.clone()
    a[1] = float("nan")
    fine = (given.index != 1).all(1)
    assert torch.equal(run(replace(given, a=a))[fine], together[fine])


@pytest.mark.parametrize("size", [16, 64])
def test_tiles_hold_each_entry_once_with_its_adapter(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for entries, adapters in ((0, 3), (1, 1), (15, 2), (16, 1), (17, 4), (127, 3), (129, 300)):
        index = torch.randint(-1, adapters, (entries,), generator=generator)
        tiles = cut(index, adapters, size)
        seen = []
        for adapter, start, end in zip(tiles.adapter.tolist(), tiles.start.tolist(), tiles.end.tolist(), strict=True):
            assert 0 <= end - start <= size
            held = tiles.order[start:end].tolist()
            assert all(index[entry] == adapter for entry in held)
            seen += held
        assert sorted(seen) == list(range(entries))
        counts = [int((index == k).sum()) for k in range(adapters)]
        assert tiles.offsets.diff().tolist() == [*counts, entries - sum(counts)]


@pytest.fixture
def load(launch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts other kernels in place, with room for what they break."""

    def put(name: str, text: str) -> None:
        interpreted.give_room(launch, monkeypatch)
        monkeypatch.setattr(launch, name, interpreted.load(text, tmp_path))

    return put


def tile_sizes(tiles: Tiles) -> list[tuple[int, int]]:
    """Adapter and number of entries of each tile."""
    return list(zip(tiles.adapter.tolist(), (tiles.end - tiles.start).tolist(), strict=True))


@pytest.fixture
def meter(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Meter:
    """Counts the lanes of every load and store, beside a closed form of what is needed.

    Each tile reads three numbers; a used one a rank, its entries, their factors, their rows and its matrix once. An
    entry that is taken alone reads its adapter, then the same without a place in an order.
    """
    found = interpreted.metered(monkeypatch)
    monkeypatch.setattr(launch, "MAX_PARTS", 1)
    shrink, expand, outer = launch.shrink, launch.expand, launch.outer

    def used_by(batch: Any) -> tuple[list[tuple[int, int]], int]:
        """Rank and number of entries of each program with an adapter; and what all read before they know it."""
        ranks = batch.ranks[0].tolist()
        if batch.single:
            used = [(ranks[k], 1) for k in batch.adapter.tolist() if k >= 0]
            return used, len(batch.adapter) - len(used)  # so that an adapter, or a place in the order, is one number
        sizes = tile_sizes(batch.tiles)
        return [(ranks[k], n) for k, n in sizes if k >= 0 and n], 3 * len(sizes)

    def metered_shrink(x: Tensor, matrix: Tensor, batch: Any, *, split: bool) -> Any:
        used, before = used_by(batch)
        reads = before + sum(1 + n + (n + rank) * x.shape[1] for rank, n in used)
        with found.call(reads, sum(n * matrix.shape[2] for _, n in used)):
            return shrink(x, matrix, batch, split=split)

    def metered_expand(
        hidden: Tensor, matrix: Tensor, batch: Any, *, onto: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        width, entries = matrix.shape[3], len(batch.adapter)
        used, before = used_by(batch)
        # a tile without an adapter reads its entries, as it writes zeros there; or it has nothing to add
        unused = int((batch.adapter < 0).sum())
        free = 0 if batch.single or onto is not None else unused
        each = 1 + (batch.weight is not None)
        reads = before + free + sum(2 + each * n + (n + width) * rank for rank, n in used)
        written = (entries if onto is None else entries - unused) * width
        assert width <= batch.blocks.expand.d
        with found.call(reads if onto is None else reads + written, written):
            return expand(hidden, matrix, batch, onto=onto, dtype=dtype)

    def metered_outer(hidden: Tensor, x: Tensor, out: Tensor, batch: Any) -> None:
        ranks, counts = batch.ranks[0].tolist(), batch.tiles.offsets.diff().tolist()[:-1]
        each = 1 + (batch.weight is not None)
        rows = sum(n * (each + rank + x.shape[1]) for rank, n in zip(ranks, counts, strict=True))
        with found.call(4 * len(counts) + rows, out.numel()):
            outer(hidden, x, out, batch)

    for name, wrapped in (("shrink", metered_shrink), ("expand", metered_expand), ("outer", metered_outer)):
        monkeypatch.setattr(launch, name, wrapped)
    return found


WITNESS = batch([[0, 2], [1, -1], [-1, -1]], (17, 1, 3), tokens=2, inputs=20, outputs=20, weighted=True)
ALONE = batch([[0, 2], [1, -1]], (17, 1, 3, 8), tokens=1, inputs=20, outputs=20, weighted=True)
"""With no more entries than adapters."""
BESIDE = batch([[0], [2], [1], [-1]], (17, 1, 3), tokens=2, inputs=20, outputs=20, weighted=True)
ALONE_BESIDE = batch([[0], [2], [-1]], (17, 1, 3, 8), tokens=1, inputs=20, outputs=20, weighted=True)
"""Added to what a layer returned, which is done where a row has one adapter."""
SOURCES = {"kernel": (WITNESS, BESIDE), "decode": (ALONE, ALONE_BESIDE)}
FOLDER = Path(batched_lora.__code__.co_filename).parent
MASKS = (
    *("inside[:, None]", "inside[None, :]", "mask=inside"),
    *("(d < width)[None, :]", "(d < width)[:, None]", "(r < rank)[None, :]", "(r < rank)[:, None]"),
    *("(r < rank_stride)[None, :]", "(r < rank_stride)[:, None]"),
    *("mask=(d < width)", "mask=(r < rank)", "mask=(r < rank_stride)"),
)


def alone(mask: str, text: str, number: int) -> bool:
    """Whether the n-th occurrence is all of a mask, where the pattern is the beginning of a longer one too."""
    return not mask.startswith("mask=(") or text.split(mask)[number + 1][:1] in (",", "\n")


def witnessed(name: str) -> float:
    """The largest error of a source's kernels, by themselves and beside a layer."""
    plain, beside = SOURCES[name]
    return worst([*errors(plain, torch.float32), *errors(beside, torch.float32, beside=torch.float32)])


def mutations() -> list[tuple[str, str, int]]:
    found = []
    for name in SOURCES:
        text = (FOLDER / f"{name}.py").read_text()
        found += [
            (name, *each)
            for each in interpreted.mutations(FOLDER / f"{name}.py", MASKS)
            if alone(each[0], text, each[1])
        ]
    return found


@pytest.mark.parametrize("name", ["some none", "mixtures", "a block and one", "dozens", "alone"])
def test_nothing_is_read_or_written_but_what_has_to_be(name: str, meter: Meter) -> None:
    assert worst(errors(SWEEP[name], torch.float32)) < 1e-6
    assert meter.seen == meter.due


@pytest.mark.parametrize(("name", "mask", "number"), mutations())
def test_every_mask_is_needed(
    name: str, mask: str, number: int, load: Callable[[str, str], None], meter: Meter
) -> None:
    """With any one mask always true, a number is wrong, or something is read or written that need not be."""
    from triton.runtime.errors import InterpreterError

    load(name, interpreted.broken((FOLDER / f"{name}.py").read_text(), mask, number))
    try:
        wrong = not witnessed(name) < 1e-6
    except InterpreterError:  # what lies beyond a tensor overflows
        wrong = True
    assert wrong or meter.seen != meter.due


@pytest.mark.parametrize("name", SOURCES)
def test_the_source_from_a_file_passes_as_it_is(name: str, load: Callable[[str, str], None], meter: Meter) -> None:
    load(name, (FOLDER / f"{name}.py").read_text())
    assert witnessed(name) < 1e-6
    assert meter.seen == meter.due
