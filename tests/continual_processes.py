"""Runs sequences in one process or, started with RANK and WORLD_SIZE set as launchers do, as one of several.

`python -m tests.continual_processes PLACE FOLDER STRATEGY...` prints JSON by strategy: the losses that are logged in
training, and the files that this process wrote, but for the trainer's checkpoints.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from graftory.continual import Limits, load_sequence, run_sequence
from graftory.hub import Hub
from graftory.training import processes
from graftory.training.trainer import AdapterTrainer
from tests.continual_crash import WRITING
from tests.continual_samples import sequence_file

SETTINGS = {"max_steps": 30, "learning_rate": 0.01, "batch_size": 8, "save_steps": 20}
OWN: Mapping[str, Mapping[str, Any]] = {"isolated": {"head_start": "probe", "learning_rate": 1e-3}}
"""What strategies have beside it or in its place."""
ROWS = 45
"""The last of six batches has five rows."""


def main(place: Path, folder: Path, strategies: list[str]) -> None:
    """Run all of them."""
    torch.set_num_threads(1)
    losses: list[float] = []
    written: set[str] = set()
    log = AdapterTrainer.log

    def listen(trainer: AdapterTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
        losses.extend(float(value) for key, value in sorted(logs.items()) if key.startswith("loss"))
        log(trainer, logs, start_time)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            path = Path(str(arguments[0]))
            # a run's scratch folder is everybody's
            if path.is_relative_to(folder) and "work" not in path.relative_to(folder).parts:
                written.add(str(path.relative_to(folder)))

    sys.addaudithook(audit)
    # pictures take longer than all else
    patch("graftory.continual.runner.write_report").start()
    patch.object(AdapterTrainer, "log", listen).start()
    base = load_sequence(sequence_file(place, "isolated", ["colours", "animals"], name=f"run{os.getpid()}"))
    base = replace(base, name="run", train=SETTINGS, limits=Limits(train=ROWS, test=30))
    if processes.is_first():
        for strategy in strategies:
            Hub.create(folder / strategy / "hub")
    processes.wait()
    found = {}
    for strategy in strategies:
        losses.clear()
        written.clear()
        hub = Hub.open(folder / strategy / "hub")
        own = replace(base, strategy=strategy, train={**SETTINGS, **OWN.get(strategy, {})})
        report = run_sequence(own, hub, folder / strategy / "run")
        found[strategy] = {"losses": list(losses), "written": sorted(written), "matrix": report.matrix}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
