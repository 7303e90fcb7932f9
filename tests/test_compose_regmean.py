"""RegMean against least squares on the inputs themselves, and as a command on a tiny base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from graftory.adapter import Adapter
from graftory.cli import cli
from graftory.compose import merge, merge_again, merge_without
from graftory.compose.merge.regmean import RegmeanParameters
from graftory.errors import MergeError
from graftory.hub import Hub
from tests.hub_samples import lora as without_task
from tests.merge_oracles import deltas, regauged
from tests.test_compose_merge import SITES, WIDTHS, delta, lora, relative
from tests.training_samples import save_base

THREE = (lora(1), lora(2, rank=4), lora(3, rank=2, targets=SITES[:1]))


def read(adapters: tuple[Adapter, ...], tokens: tuple[int, ...] = (40, 60, 50)) -> list[dict[str, Tensor]]:
    """Inputs whose directions differ in size, other ones for each adapter."""
    found = []
    for seed, (adapter, count) in enumerate(zip(adapters, tokens, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.rand(10, generator=generator) + 0.1
        found.append(
            {
                path: torch.randn(count, WIDTHS[path][1], generator=generator) * scale
                for path in adapter.spec.config.targets
            }
        )
    return found


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 3.0]])
def test_it_is_least_squares_on_the_inputs(weights: list[float] | None) -> None:
    """min Σ w/n ‖X Δᵀ − X Δ_tᵀ‖² solved on the rows of all X, by an SVD of them."""
    inputs = read(THREE)
    merged = merge(THREE, "regmean", weights=weights, inputs=inputs, parameters=RegmeanParameters(shrink=1.0))
    for path in SITES:
        rows, targets = [], []
        here = [number for number, one in enumerate(THREE) if path in one.spec.config.targets]
        for number, wanted in zip(here, deltas(THREE, path), strict=True):
            x = inputs[number][path].double() * ((weights or [1.0] * 3)[number] / len(inputs[number][path])) ** 0.5
            rows.append(x)
            targets.append(x @ wanted.T)
        solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets), driver="gelsd").solution.T
        assert relative(delta(merged, path), solution) < 1e-5


def test_without_what_is_off_the_diagonal_it_is_a_mean_by_column() -> None:
    inputs = read(THREE[:2], (40, 60))
    merged = merge(THREE[:2], "regmean", inputs=inputs, parameters=RegmeanParameters(shrink=0.0, scaling=2.0))
    for path in SITES:
        sizes = [one[path].double().square().mean(0) for one in inputs]
        parts = [size * one for size, one in zip(sizes, deltas(THREE[:2], path), strict=True)]
        assert relative(delta(merged, path), 2 * torch.stack(parts).sum(0) / torch.stack(sizes).sum(0)) < 1e-5


def test_the_same_inputs_give_the_mean_and_few_inputs_no_infinity() -> None:
    same = read((THREE[0],), (40,)) * 2
    merged = merge(THREE[:2], "regmean", inputs=same)
    for path in SITES:
        mean = torch.stack(deltas(THREE[:2], path)).mean(0)
        assert relative(delta(merged, path), mean) < 1e-5
    few = merge(THREE[:2], "regmean", inputs=read(THREE[:2], (2, 3)), parameters=RegmeanParameters(shrink=1.0))
    assert float(delta(few, SITES[0]).norm()) < 10 * max(float(one.norm()) for one in deltas(THREE[:2], SITES[0]))


def test_how_an_update_is_written_down_does_not_matter_and_rank_cuts() -> None:
    inputs = read(THREE)
    merged = merge(THREE, "regmean", inputs=inputs)
    other = merge([regauged(adapter) for adapter in THREE], "regmean", inputs=inputs)
    short = merge(THREE, "regmean", inputs=inputs, rank=2)
    for path in SITES:
        assert relative(delta(other, path), delta(merged, path)) < 1e-4
        u, s, vt = torch.linalg.svd(delta(merged, path), full_matrices=False)
        assert relative(delta(short, path), u[:, :2] * s[:2] @ vt[:2]) < 1e-5


def test_what_is_missing_is_said() -> None:
    with pytest.raises(MergeError, match=r"needs the inputs that adapter 1 reads at layer\.0\.query"):
        merge(THREE, "regmean")
    with pytest.raises(MergeError, match="wanted none below 0"):
        merge(THREE, "regmean", weights=[1.0, -1.0, 1.0], inputs=read(THREE))
    with pytest.raises(MergeError, match="shrink: got 1"):
        RegmeanParameters(shrink=1.5)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with three adapters of a tiny BERT, each of its own words."""
    folder = tmp_path_factory.mktemp("regmean")
    base = save_base("bert", folder / "base")
    Hub.create(folder / "hub")
    for number, name in enumerate(("low", "middle", "high")):
        words = [f"w{10 * number + digit}" for digit in range(10)]
        rows = [f"{' '.join(words[row % 5 : row % 5 + 5])},{'even' if row % 2 else 'odd'}" for row in range(12)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        files = f"{{train: {name}.csv, test: {name}.csv}}"
        (folder / f"{name}.yaml").write_text(f"name: {name}\nkind: classification\ndata: {files}\nlabel: label\n")
        command = ["train", folder / f"{name}.yaml", "--base", base, "--name", name, "--epochs", "1"]
        run(folder, *command, "--learning-rate", "0.05", "--rank", "2")
    (folder / "new.txt").write_text("w1 w2 w3\nw11 w12 w13\n")
    return folder


def run(home: Path, *arguments: object) -> str:
    result = CliRunner().invoke(cli, ["--registry", str(home / "hub"), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_reads_each_adapters_own_task_and_the_ledger_again(home: Path) -> None:
    hub = Hub.open(home / "hub")
    run(home, "merge", "low", "middle", "high", "--method", "regmean", "--shrink", "0.8", "--name", "own")
    run(home, "merge", "low", "middle", "high", "--method", "regmean", "--examples", home / "new.txt", "--name", "same")
    assert hub.record("own").spec.lineage.parameters["shrink"] == 0.8
    assert "examples" not in hub.record("own").spec.lineage.parameters
    assert hub.record("same").spec.lineage.parameters["examples"] == str(home / "new.txt")
    assert merge_again(hub, "own").same
    assert "bit for bit" in run(home, "merge", "same", "--again")
    run(home, "merge", "low", "high", "--method", "regmean", "--shrink", "0.8", "--name", "never")
    assert hub.record(hub.put("left", merge_without(hub, "own", ["middle"]))).digest == hub.record("never").digest


def test_an_adapter_without_a_task_needs_examples(home: Path) -> None:
    Hub.open(home / "hub").put("foreign", without_task())
    result = CliRunner().invoke(
        cli, ["--registry", str(home / "hub"), "merge", "foreign", "--method", "regmean", "--name", "x"]
    )
    assert result.exit_code == 1
    assert "adapter 1: its record names no task to take examples of; give --examples" in result.stderr
