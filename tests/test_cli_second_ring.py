"""`hub train --method M` for the methods of the second ring and the ways to train, and what comes of what they make."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
from click.testing import CliRunner

from graftory import Hub
from graftory.cli import cli
from tests.test_cli_train import TASK, as_json, assert_error, call, make_base

METHODS = {
    "compacter": ("--size", "8"),
    "propetl": ("--size", "8", "--kept", "0.4"),
    "krona": ("--factor", "4"),
    "apt": ("--length", "3"),
    "unipelt": ("--rank", "2", "--length", "3", "--size", "4"),
    "coda": ("--share", "0.5", "--attention", "k_to_all", "--softness", "0.5", "--size", "4"),
    "dylora": ("--rank", "4"),
    "sora": ("--rank", "4", "--sparsity", "5"),
    "adapterdrop": ("--size", "4", "--most", "1"),
    "sparse": ("--size", "12", "--pruned", "0.75"),
    "adamix": ("--size", "4", "--experts", "3"),
    "p_tuning": ("--length", "3", "--encoder", "lstm", "--hidden", "5"),
    "diff": ("--keep", "0.02", "--no-grouped"),
    "spt": ("--rank", "1", "--budget", "0.05", "--sensitivity-rows", "8"),
}
STORED = {
    "compacter": "compacter",
    "propetl": "propetl",
    "krona": "krona",
    "unipelt": "unipelt",
    "coda": "coda",
    "apt": "apt",
    "dylora": "lora",
    "sora": "lora",
    "p_tuning": "prompt",
    "diff": "sparse_update",
    "spt": "sparse_update",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with an adapter of each method, named after it."""
    root, base = tmp_path_factory.mktemp("trained"), make_base(tmp_path_factory.mktemp("base"), seed=0)
    Hub.create(root)
    common = ("train", TASK, "--base", base, "--max-steps", "6", "--batch-size", "8", "--learning-rate", "0.01")
    for method, options in METHODS.items():
        result = call(root, *common, "--method", method, "--name", method, *options)
        assert result.exit_code == 0, result.output
    return root


def test_each_is_kept_as_what_it_is(trained: Path) -> None:
    hub = Hub.open(trained)
    for method in METHODS:
        spec = hub.record(method).spec
        assert spec.method == STORED.get(method, "bottleneck")
        assert spec.metrics
        assert ("trained_as" in spec.lineage.parameters) is (
            method not in ("compacter", "propetl", "krona", "unipelt", "apt", "coda")
        )
    assert not hub.verify().problems
    spt = next(line for line in call(trained, "show", "spt").output.splitlines() if line.startswith("method"))
    assert "sparse=" in spt
    assert "bert.encoder" not in spt


def test_they_are_measured_in_one_mixed_batch(trained: Path) -> None:
    hub = Hub.open(trained)
    # a batch with soft prompts has no rows of those that read its mask
    together = [name for name in METHODS if name != "p_tuning"]
    rows = [as_json(call(trained, "eval", *names, "--json")) for names in (together, ["p_tuning", "krona"])]
    for row in chain(*rows):
        recorded = {metric.name: metric.value for metric in hub.record(row["ref"]).spec.metrics}
        assert row["metric"]["value"] == pytest.approx(recorded[row["metric"]["name"]], abs=1e-5)


@pytest.mark.parametrize("method", ["krona", "dylora", "sora", "diff", "spt"])
def test_the_linear_ones_fold_into_one_plain_model(method: str, trained: Path, tmp_path: Path) -> None:
    result = as_json(call(trained, "export", method, tmp_path / "plain", "--json"))
    assert result["max_difference"] <= 1e-4


def test_they_merge_as_what_they_are(trained: Path) -> None:
    assert call(trained, "merge", "dylora", "sora", "--name", "low").exit_code == 0
    assert call(trained, "merge", "compacter", "propetl", "adamix", "--name", "necks").exit_code == 0
    assert Hub.open(trained).record("necks").spec.method == "bottleneck"
    assert call(trained, "merge", "diff", "spt", "krona", "--name", "unlike").exit_code == 0
    assert call(trained, "merge", "diff", "--name", "same").exit_code == 0
    assert Hub.open(trained).record("same").spec.method == "sparse_update"


def test_a_sparse_update_goes_on_learning_what_it_has(trained: Path) -> None:
    more = ("--continue", "spt", "--name", "longer", "--max-steps", "2", "--learning-rate", "0.01")
    assert call(trained, "train", TASK, *more).exit_code == 0
    hub = Hub.open(trained)
    before, after = hub.get("spt"), hub.get("longer")
    assert before.spec.config == after.spec.config
    changed = {
        key.rpartition(".sparse_")[2] for key, value in after.tensors.items() if not value.equal(before.tensors[key])
    }
    assert "value" in changed
    assert "index" not in changed


def test_options_of_other_methods_are_refused(trained: Path) -> None:
    assert_error(call(trained, "train", TASK, "--base", "x", "--method", "krona", "--rank", "4"), "not to krona")
    assert_error(call(trained, "train", TASK, "--base", "x", "--method", "compacter", "--size", "6"), "multiple of")
    assert_error(call(trained, "train", TASK, "--base", "x", "--method", "coda", "--share", "0"), "share: got 0.0")


def test_help_names_the_methods() -> None:
    result = CliRunner().invoke(cli, ["train", "--help"])
    assert all(method in result.output for method in METHODS)
