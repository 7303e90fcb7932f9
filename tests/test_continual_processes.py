"""Two processes learn what one learns: see `tests/continual_processes.py`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graftory.continual.state import RunFolder
from graftory.errors import ConfigError
from graftory.hub import Hub
from graftory.settings import TrainSettings
from graftory.training import processes
from graftory.training.learning import training_arguments
from graftory.training.sampler import LengthSampler
from tests.continual_samples import make_place

STRATEGIES = ("ewc", "inflora", "migu", "isolated")
"""Importances, covariances and the loudness of units are sums over rows, each process having some of them; the heads of
`isolated` start at a probe that one process fits."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """What the single process, the first and the second of two print, and the folder with `one` and `two`."""
    root = make_place(tmp_path_factory.mktemp("place"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for folder, own in (("one", {}), ("two", {"RANK": "0", **group}), ("two", {"RANK": "1", **group})):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **own, "LOCAL_RANK": own.get("RANK", "-1")}
        command = [sys.executable, "-m", "tests.continual_processes", str(root), str(root / folder), *STRATEGIES]
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                cwd=Path(__file__).parent.parent,
            )
        )  # fmt: skip
    outputs = [each.communicate() for each in started]
    for each, (_, errors) in zip(started, outputs, strict=True):
        assert each.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs], root


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_have_the_losses_of_one(found: tuple[list[dict[str, Any]], Path], strategy: str) -> None:
    (one, first, second), root = found
    expected = one[strategy]["losses"]
    assert len(expected) >= 6
    assert len({round(loss, 3) for loss in expected}) > 3
    for several in (first, second):
        assert several[strategy]["losses"] == pytest.approx(expected, abs=1e-4)
    hubs = [Hub.open(root / folder / strategy / "hub") for folder in ("one", "two")]
    refs = [[commit.ref for commit in RunFolder(root / each / strategy / "run").commits()] for each in ("one", "two")]
    assert refs[0] == refs[1]
    for ref in refs[0]:
        alone, together = (hub.get(ref).tensors for hub in hubs)
        assert all(torch.allclose(tensor, together[key], atol=1e-3) for key, tensor in alone.items())


def test_only_the_first_writes(found: tuple[list[dict[str, Any]], Path]) -> None:
    (one, first, second), _ = found
    for strategy in STRATEGIES:
        assert second[strategy]["written"] == []
        names = [
            {path for path in each[strategy]["written"] if ".tmp" not in path and "/.hub/" not in path}
            for each in (one, first)
        ]
        assert names[0] == names[1]
        assert f"{strategy}/run/events.jsonl" in names[0]
        assert second[strategy]["matrix"] == first[strategy]["matrix"]


def test_a_short_batch_is_filled_with_what_does_not_count() -> None:
    plain, filled = LengthSampler([3] * 13, 8, 0), LengthSampler([3] * 13, 8, 0, filled=True)
    assert list(filled) == [*plain, 13, 13, 13]
    assert (len(plain), len(filled)) == (13, 16)
    assert list(LengthSampler([3] * 16, 8, 0, filled=True)) == list(LengthSampler([3] * 16, 8, 0))


def test_a_batch_must_be_shared_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "size", lambda: 3)
    with pytest.raises(ConfigError, match="batch_size: got 16 for 3 processes"):
        training_arguments(TrainSettings(batch_size=16), tmp_path, keep=False)
