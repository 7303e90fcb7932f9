"""`batched_lora_slices` by Triton kernels, under its interpreter: the same sweep, launches and numbers counted."""

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

from graftory.kernels import batched_lora, routing
from tests import interpreted
from tests.interpreted import Meter, poisoned, worst
from tests.kernel_samples import error
from tests.test_kernels_slices import CASES, SOME, Sliced, expected, results, run, sliced

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not interpreted in this process: set TRITON_INTERPRET=1",
)
SWEEP: dict[str, Sliced] = {
    **{name: given for name, given in CASES.items() if given.x.numel()},
    "long": sliced([[0], [1]], ((4, 8), (8, 3)), tokens=129, inputs=16, widths=(33, 7)),
    "wide": sliced([[1], [-1], [0]], ((8, 3), (5, 8)), tokens=2, inputs=600, widths=(160, 16)),
    "uneven": sliced([[2], [-1], [0]], SOME, tokens=2, widths=(130, 9, 40)),
    "alone and uneven": sliced([[2], [-1], [0]], SOME, tokens=1, widths=(300, 9, 40)),
    "alone": sliced([[2], [-1], [0]], SOME, tokens=1),
    "alone in mixtures": sliced(
        [[1, 3], [-1, 0]], ((3, 17, 1, 2), (1, 2, 0, 5)), tokens=1, widths=(16, 8), weighted=True
    ),
    "alone and wide": sliced([[1], [-1], [0]], ((8, 16, 3),) * 3, tokens=1, inputs=1100, widths=(600, 40, 40)),
}


@pytest.fixture
def launch() -> ModuleType:
    """The module that launches the kernels."""
    module = importlib.import_module("graftory.kernels.batched_lora.launch")
    assert module.INTERPRETED
    return module


def hurt(given: Sliced) -> Sliced:
    """NaN behind everything that is read, each adapter's own rank in each slice too."""
    a, b = given.a.clone(), given.b.clone()
    for up, down, ranks in zip(b.split(list(given.widths), 1), a, given.ranks.tolist(), strict=True):
        for k, rank in enumerate(ranks):
            down[k, rank:] = up[k, :, rank:] = float("nan")
    x, a, b, grad = (poisoned(each) for each in (given.x, a, b, given.grad))
    return replace(given, x=x, a=a, b=b, grad=grad)


def errors(given: Sliced, dtype: torch.dtype) -> list[float]:
    """Relative errors of the updates and of each gradient."""
    rounded = given.to(dtype)
    return [error(got, want) for got, want in zip(results(hurt(rounded), "triton"), expected(rounded), strict=True)]


@pytest.mark.parametrize("name", SWEEP)
@pytest.mark.usefixtures("guarded")
def test_updates_and_gradients_are_the_formula_s(name: str) -> None:
    assert worst(errors(SWEEP[name], torch.float32)) < 1e-6


@pytest.mark.parametrize("name", SWEEP)
@pytest.mark.usefixtures("guarded")
def test_updates_alone_are_the_formula_s(name: str) -> None:
    """Without gradients, where sums are split."""
    given = SWEEP[name].to(torch.float32)
    assert error(torch.cat(run(hurt(given), "triton"), -1), expected(given)[0]) < 1e-6


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
@pytest.mark.usefixtures("guarded")
def test_half_precision(dtype: torch.dtype, most: float) -> None:
    """Within the rounding of what is stored: 2^-11 and 2^-8, a few times."""
    for name in ("mixtures", "alone in mixtures"):
        assert worst(errors(SWEEP[name], dtype)) < most


@pytest.mark.usefixtures("launch")
def test_nothing_gives_nothing() -> None:
    given = CASES["no tokens"].to(torch.float32)
    update, *grads = results(given, "triton")
    assert update.shape == (2, 0, 12)
    assert not any(each.any() for each in grads)


@pytest.mark.usefixtures("launch")
def test_run_to_run_the_bits_are_the_same() -> None:
    for name in ("mixtures", "alone in mixtures"):
        given = SWEEP[name].to(torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(results(given, "triton"), results(given, "triton"), strict=True))


@pytest.mark.parametrize("name", ["some none", "alone", "alone and wide"])
@pytest.mark.usefixtures("launch")
def test_a_row_depends_on_no_other_row(name: str) -> None:
    """In small whole numbers, which fp32 adds exactly: the interpreter's products round by the place in a block."""
    drawn = SWEEP[name].to(torch.float32)
    given = replace(drawn, x=drawn.x.round(), a=drawn.a.round(), b=drawn.b.round(), scale=drawn.scale.sign().float())
    together = torch.cat(run(given, "triton"), -1)
    order = torch.randperm(len(given.x), generator=torch.Generator().manual_seed(1))
    moved = replace(given, x=given.x[order], index=given.index[order])
    assert torch.equal(torch.cat(run(moved, "triton"), -1), together[order])
    a, b = given.a.clone(), given.b.clone()
    a[:, 0] = b[0] = float("nan")
    fine = given.index[:, 0] != 0
    broken = torch.cat(run(replace(given, a=a, b=b), "triton"), -1)
    assert torch.equal(broken[fine], together[fine])
    assert broken[~fine].isnan().any()
    assert not together[given.index[:, 0] < 0].any()


@pytest.fixture
def meter(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Meter:
    """Beside what is counted, a closed form: of each slice what `batched_lora` needs, and two ends of its columns."""
    found = interpreted.metered(monkeypatch)
    monkeypatch.setattr(launch, "MAX_PARTS", 1)
    shrink, expand, outer = launch.shrink, launch.expand, launch.outer

    def programs(batch: Any) -> tuple[list[tuple[int, int]], int, int]:
        """Adapter and entries of each tile or entry that has some; how many there are; numbers read to know it."""
        if batch.single:
            return [(k, 1) for k in batch.adapter.tolist()], len(batch.adapter), 1
        tiles = batch.tiles
        counts = (tiles.end - tiles.start).tolist()
        return [(k, n) for k, n in zip(tiles.adapter.tolist(), counts, strict=True) if n], len(counts), 3

    def ends(widths: Any) -> list[int]:
        return [int(width) for width in widths.starts.diff() * widths.unit]

    def metered_shrink(x: Tensor, matrix: Tensor, batch: Any, *, split: bool, columns: Any = None) -> Any:
        held, number, known = programs(batch)
        reads = writes = 0
        for ranks, width in zip(batch.ranks.tolist(), ends(columns) if columns else [x.shape[1]] * 9, strict=False):
            reads += number * (known + 2 * bool(columns))
            reads += sum(1 + n * (not batch.single) + (n + ranks[k]) * width for k, n in held if k >= 0)
            writes += sum(n * matrix.shape[2] for k, n in held if k >= 0)
        with found.call(reads, writes):
            return shrink(x, matrix, batch, split=split, columns=columns)

    def metered_expand(hidden: Tensor, matrix: Tensor, batch: Any, *, columns: Any = None) -> Any:
        held, number, known = programs(batch)
        used, entries = [(k, n) for k, n in held if k >= 0], sum(n for _, n in held)
        widths = ends(columns) if columns else [matrix.shape[3]]
        blocks = launch.single_blocks_for(matrix.shape[2]) if batch.single else batch.blocks
        down = [-(-width // blocks.expand.d) for width in widths]
        reads = len(widths) * max(down) * number * (known + 2 * bool(columns))
        weights = sum(n for _, n in used) * (batch.weight is not None)
        reads += sum(down) * (entries * (not batch.single) + len(used) + weights)
        for number, ranks in enumerate(batch.ranks.tolist()):
            s = number if columns else 0
            reads += sum(down[s] * (1 + n * ranks[k]) + widths[s] * ranks[k] for k, n in used)
        with found.call(reads, entries * matrix.shape[3]):
            return expand(hidden, matrix, batch, columns=columns)

    def metered_outer(hidden: Tensor, x: Tensor, out: Tensor, batch: Any, *, columns: Any = None) -> None:
        counts = batch.tiles.offsets.diff().tolist()[:-1]
        widths = ends(columns) if columns else [x.shape[1]] * len(hidden)
        down = [-(-width // batch.blocks.outer.d) for width in widths]
        reads = len(hidden) * max(down) * len(counts) * (4 + 2 * bool(columns))
        for ranks, width, blocks in zip(batch.ranks.tolist(), widths, down, strict=True):
            each = 1 + (batch.weight is not None)
            reads += sum(n * (blocks * (each + rank) + width) for rank, n in zip(ranks, counts, strict=True))
        with found.call(reads, out.numel()):
            outer(hidden, x, out, batch, columns=columns)

    for name, wrapped in (("shrink", metered_shrink), ("expand", metered_expand), ("outer", metered_outer)):
        monkeypatch.setattr(launch, name, wrapped)
    return found


@pytest.mark.parametrize(
    "name", ["some none", "mixtures", "one for all", "uneven", "alone", "alone in mixtures", "alone and uneven"]
)
def test_nothing_is_read_or_written_but_what_has_to_be(name: str, meter: Meter) -> None:
    assert worst(errors(SWEEP[name], torch.float32)) < 1e-6
    assert len(meter.seen) == 6
    assert meter.seen == meter.due


@pytest.fixture
def launches(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels, each time one is launched."""
    found: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            found.append(self.name)
            return self.kernel[grid]

    for module in ("kernel", "decode"):
        held = getattr(launch, module)
        names = [name for name in ("shrink", "expand", "outer") if hasattr(held, name)]
        counted = {name: Counted(f"{module}.{name}", getattr(held, name)) for name in names}
        monkeypatch.setattr(launch, module, type("Counted", (), counted))
    return found


def test_slices_are_one_launch(launches: list[str]) -> None:
    run(SWEEP["some none"].to(torch.float32), "triton")
    assert launches == ["kernel.shrink", "kernel.expand"]
    results(SWEEP["some none"].to(torch.float32), "triton")
    assert launches[4:] == ["kernel.shrink", "kernel.expand", "kernel.outer", "kernel.outer"]


def test_where_an_adapter_has_about_one_entry_nothing_is_sorted(
    launches: list[str], launch: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many entries as adapters and more; whatever the index says."""

    def unused(*arguments: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(routing, "cut", unused)
    given = SWEEP["alone"].to(torch.float32)
    for index in ([2, -1, 0], [1, 1, 1], [-1, -1, -1]):
        run(replace(given, index=torch.tensor(index)[:, None]), "triton")
    one = given.x, given.a[0], given.b[:, :20], given.scale, given.index[:, 0]
    batched_lora(*one, backend="triton")
    assert launches == ["decode.shrink", "decode.expand"] * 4
    with pytest.raises(AssertionError, match="3, 16"):
        batched_lora(given.x.expand(3, 2, 24), *one[1:], backend="triton")


def test_both_ways_agree(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    given = SWEEP["alone"].to(torch.float32)
    alone = results(given, "triton")
    monkeypatch.setattr(launch.Batch, "single", False)
    assert max(error(one, other) for one, other in zip(results(given, "triton"), alone, strict=True)) < 1e-6


IDLE = "tl.program_id(1) * block_d < width"
SHIFTS = {
    **{
        shift: f"0 * ({shift})"
        for shift in (
            *("slice_ * m_slice", "slice_ * out_slice", "slice_ * adapters", "(slice_ + each) * adapters"),
            *(
                "(slice_ + each) * hidden_slice",
                "(slice_ + each) * m_slice",
                "first_column * m_column",
                "first_column * x_column",
            ),
            *("slice_.to(tl.int64) * hidden_slice", "slice_.to(tl.int64) * out_slice", "first_column * out_column"),
        )
    },
    "out += first_column\n": "out += 0 * first_column\n",
    "* unit - first_column": "* unit",
    "tl.load(columns + slice_ + 1)": "tl.load(columns + slice_)",
    f"({IDLE})": "(width > 0)",
    f"tl.where({IDLE}, end, start)": "end",
}
"""What moves a program to its slice, and what it would be without; and what stops those behind a narrower slice."""
FOLDER = Path(batched_lora.__code__.co_filename).parent
SOURCES = {"kernel": "uneven", "decode": "alone and uneven"}


def mutations() -> list[tuple[str, str, int]]:
    return [(name, *each) for name in SOURCES for each in interpreted.mutations(FOLDER / f"{name}.py", list(SHIFTS))]


def test_each_shift_is_there() -> None:
    assert {shift for _, shift, _ in mutations()} == set(SHIFTS)


@pytest.mark.parametrize(("name", "shift", "number"), mutations())
def test_every_shift_is_needed(
    name: str,
    shift: str,
    number: int,
    launch: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    meter: Meter,
) -> None:
    """Without any one of them, a number is wrong, or something is read or written that need not be."""
    from triton.runtime.errors import InterpreterError

    parts = (FOLDER / f"{name}.py").read_text().split(shift)
    text = shift.join(parts[: number + 1]) + SHIFTS[shift] + shift.join(parts[number + 1 :])
    interpreted.give_room(launch, monkeypatch)
    monkeypatch.setattr(launch, name, interpreted.load(text, tmp_path))
    try:
        wrong = not worst(errors(SWEEP[SOURCES[name]], torch.float32)) < 1e-6
    except InterpreterError:
        wrong = True
    assert wrong or meter.seen != meter.due
