"""The Triton kernels of `batched_lora` under Triton's interpreter: the same sweep, and broken on purpose."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from graftory.kernels import batched_lora
from graftory.kernels.tiles import Tiles, cut
from tests.kernel_samples import Batch, batch, error, expected
from tests.test_kernels_lora import CASES

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not interpreted in this process: set TRITON_INTERPRET=1",
)
GUARD = 64
"""Numbers behind every output that no kernel may touch."""


@pytest.fixture
def launch() -> ModuleType:
    """The module that launches the kernels."""
    module = importlib.import_module("graftory.kernels.batched_lora.launch")
    assert module.INTERPRETED
    return module


@pytest.fixture
def guarded(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs start as NaN, so what is not written shows, and what lies behind them is looked at in the end."""
    made: list[tuple[Tensor, int]] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = int(torch.Size(shape).numel())
        memory = torch.full((count + GUARD,), float("nan"), dtype=dtype, device=device)
        made.append((memory, count))
        return memory[:count].view(shape)

    monkeypatch.setattr(launch, "empty", empty)
    yield
    assert made
    assert all(memory[count:].isnan().all() for memory, count in made)


def poisoned(tensor: Tensor) -> Tensor:
    """The same numbers, with NaN behind each row and behind the last."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"), dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def padded_with_nan(given: Batch) -> Batch:
    """NaN behind each adapter's own rank too: true ranks are all that may be read."""
    a, b = given.a.clone(), given.b.clone()
    for k, rank in enumerate(given.ranks.tolist()):
        a[k, rank:] = float("nan")
        b[k, :, rank:] = float("nan")
    return replace(given, a=poisoned(a), b=poisoned(b))


def run(given: Batch) -> Tensor:
    return batched_lora(
        given.x, given.a, given.b, given.scale, given.index, given.weight, ranks=given.ranks, backend="triton"
    )


def errors(given: Batch, dtype: torch.dtype, *, poison: bool = True) -> list[float]:
    """Relative errors of the update and of each gradient."""
    rounded = given.to(dtype)
    leaves = rounded.learning()
    update = run(padded_with_nan(leaves) if poison else leaves)
    grad = torch.randn(update.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    found = [update.detach(), *torch.autograd.grad(update, leaves.leaves(), grad)]
    return [error(got, want) for got, want in zip(found, expected(rounded, grad), strict=True)]


MORE: dict[str, Batch] = {
    "a block and one": batch([[0]] * 17 + [[1]] * 15, (16, 8), tokens=1),
    "large": batch([[k % 3] for k in range(13)], (1, 64, 128), tokens=10, inputs=130, outputs=70),
    "wide": batch([[0], [-1], [1]], (8, 3), tokens=2, inputs=600, outputs=16),
    "dozens": batch([[k] for k in range(0, 40, 3)], [1 + k % 5 for k in range(40)], tokens=1, inputs=8, outputs=8),
    "long": batch([[0], [1]], (4, 8), tokens=129, inputs=16, outputs=33),
}


SLOW = "many"
SWEEP = {name: each for name, each in {**CASES, **MORE}.items() if each.x.numel() and name != SLOW}


@pytest.mark.parametrize("name", SWEEP)
@pytest.mark.usefixtures("guarded")
def test_update_and_gradients_are_the_formula_s(name: str) -> None:
    assert max(errors(SWEEP[name], torch.float32)) < 1e-6


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
    assert max(errors(CASES["mixtures"], dtype)) < most
    assert max(errors(MORE["large"], dtype)) < most


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


SOURCE = Path(batched_lora.__code__.co_filename).parent / "kernel.py"
MASKS = (
    *("inside[:, None]", "inside[None, :]", "mask=inside"),
    *("(d < width)[None, :]", "(d < width)[:, None]", "(r < rank)[None, :]", "(r < rank)[:, None]"),
    *("(r < rank_stride)[None, :]", "(r < rank_stride)[:, None]"),
)


def broken(text: str, mask: str, number: int) -> str:
    """The source with the n-th occurrence of a mask always true."""
    parts = text.split(mask)
    head, tail = mask.join(parts[: number + 1]), mask.join(parts[number + 1 :])
    condition = "inside" if "inside" in mask else mask.split("[")[0]
    true = mask.replace(condition, f"({condition} | True)")
    return head + true + tail


def mutations() -> list[tuple[str, int]]:
    text = SOURCE.read_text()
    return [(mask, number) for mask in MASKS for number in range(text.count(mask))]


@pytest.fixture
def load(launch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts other kernels in place."""

    def put(text: str) -> None:
        path = tmp_path / "mutant.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("mutant", path)
        assert spec is not None
        assert spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(launch, "kernel", module)

    return put


@dataclass
class Meter:
    """What kernels read and write, number by number, and what they have to."""

    seen: list[tuple[int, int]] = field(default_factory=list)
    due: list[tuple[int, int]] = field(default_factory=list)
    reads: int = 0
    writes: int = 0

    @contextmanager
    def call(self, reads: int, writes: int) -> Iterator[None]:
        """One launch, and what it may read and write."""
        self.reads = self.writes = 0
        yield
        self.seen.append((self.reads, self.writes))
        self.due.append((reads, writes))


def tile_sizes(tiles: Tiles) -> list[tuple[int, int]]:
    """Adapter and number of entries of each tile."""
    return list(zip(tiles.adapter.tolist(), (tiles.end - tiles.start).tolist(), strict=True))


@pytest.fixture
def meter(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Meter:
    """Counts the lanes of every load and store, beside a closed form of what is needed.

    Each tile reads three numbers; a used one a rank, its entries, their factors, their rows and its matrix once.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    found = Meter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    shrink, expand, outer = launch._shrink, launch._expand, launch._outer

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found.reads += int(mask.data.sum())
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found.writes += int(mask.data.sum())
        return store(self, pointers, value, mask, *rest)

    def metered_shrink(x: Tensor, matrix: Tensor, batch: Any, places: int, *, split: bool) -> Any:
        assert x.shape[1] < 256  # one part
        tiles, ranks = batch.tiles, batch.ranks
        used = [(int(ranks[k]), n) for k, n in tile_sizes(tiles) if k >= 0 and n]
        reads = 3 * len(tiles.adapter) + sum(1 + n + (n + rank) * x.shape[1] for rank, n in used)
        with found.call(reads, sum(n * matrix.shape[1] for _, n in used)):
            return shrink(x, matrix, batch, places, split=split)

    def metered_expand(hidden: Tensor, matrix: Tensor, batch: Any) -> Any:
        tiles, ranks = batch.tiles, batch.ranks
        width, sizes = matrix.shape[2], tile_sizes(tiles)
        used = [(int(ranks[k]), n) for k, n in sizes if k >= 0 and n]
        reads = 3 * len(sizes) + sum(n for _, n in sizes) + sum(1 + n + (n + width) * rank for rank, n in used)
        assert width <= batch.blocks.d
        with found.call(reads, len(tiles.order) * width):
            return expand(hidden, matrix, batch)

    def metered_outer(hidden: Tensor, x: Tensor, out: Tensor, batch: Any, places: int) -> None:
        tiles, ranks = batch.tiles, batch.ranks
        counts = tiles.offsets.diff().tolist()[:-1]
        rows = sum(n * (2 + rank + x.shape[1]) for rank, n in zip(ranks.tolist(), counts, strict=True))
        with found.call(3 * len(counts) + rows, out.numel()):
            outer(hidden, x, out, batch, places)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    for name, wrapped in (("_shrink", metered_shrink), ("_expand", metered_expand), ("_outer", metered_outer)):
        monkeypatch.setattr(launch, name, wrapped)
    return found


WITNESS = batch([[0, 2], [1, -1], [-1, -1]], (17, 1, 3), tokens=2, inputs=20, outputs=20, weighted=True)


@pytest.mark.parametrize("name", ["some none", "mixtures", "a block and one", "dozens"])
def test_nothing_is_read_or_written_but_what_has_to_be(name: str, meter: Meter) -> None:
    assert max(errors(SWEEP[name], torch.float32)) < 1e-6
    assert meter.seen == meter.due


@pytest.mark.parametrize(("mask", "number"), mutations())
@pytest.mark.usefixtures("roomy")
def test_every_mask_is_needed(mask: str, number: int, load: Callable[[str], None], meter: Meter) -> None:
    """With any one mask always true, a number is wrong, or something is read or written that need not be."""
    from triton.runtime.errors import InterpreterError

    load(broken(SOURCE.read_text(), mask, number))
    try:
        wrong = not max(errors(WITNESS, torch.float32)) < 1e-6
    except InterpreterError:  # what lies beyond a tensor overflows
        wrong = True
    assert wrong or meter.seen != meter.due


def test_the_source_from_a_file_passes_as_it_is(load: Callable[[str], None], meter: Meter) -> None:
    load(SOURCE.read_text())
    assert max(errors(WITNESS, torch.float32)) < 1e-6
    assert meter.seen == meter.due


@pytest.fixture
def roomy(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Much room behind every output, so that a broken kernel damages nothing."""

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = int(torch.Size(shape).numel())
        return torch.zeros(2 * count + 100_000, dtype=dtype, device=device)[:count].view(shape)

    monkeypatch.setattr(launch, "empty", empty)
