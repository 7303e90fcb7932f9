"""Four LoRAs of SmolLM2-135M merged into one plain model: `hub merge` and `hub export`, beside mergekit's command.

    python -m venv mk && mk/bin/pip install mergekit==0.1.5        # of its own: it pins other versions
    OMP_NUM_THREADS=1 python benchmarks/merging.py --parts mergekit --mergekit mk/bin/mergekit-yaml

LoRAs of rank 16 on all linears, random weights, fp32. mergekit is given PEFT's folders (`base+lora`), folds each of
them into a model of its own, and merges the models; we merge the factors and write one model, uncompared.
`task_arithmetic` is our `linear`. The difference is that of the merged updates, as a share of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

WEIGHTS = (0.4, 0.3, 0.2, 0.1)
NAMES = tuple(f"part{number}" for number in range(len(WEIGHTS)))
RANK, DENSITY = 16, 0.2
METHODS: Mapping[str, tuple[str, Sequence[str], Mapping[str, bool]]] = {
    "linear": ("task_arithmetic", (), {"normalize": False}),
    "ties": ("ties", ("--density", str(DENSITY)), {"normalize": True}),
}
"""Ours by its name; theirs, and what each is told."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of commands that run one after another."""

    seconds: float
    processor_seconds: float
    peak_mb: float

    def __add__(self, other: Cost) -> Cost:
        seconds, processor = self.seconds + other.seconds, self.processor_seconds + other.processor_seconds
        return Cost(seconds, processor, max(self.peak_mb, other.peak_mb))


def measured(command: Path | None) -> dict[str, dict[str, float]]:
    """A row for every method."""
    if command is None or not command.exists():
        raise SystemExit(
            f"--mergekit: got {command}, wanted the path of mergekit-yaml; see benchmarks/merging_mergekit.py"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = prepared(folder)
        return {method: compared(method, command, base, folder) for method in METHODS}


def prepared(folder: Path) -> Path:
    """A hub with the LoRAs, and PEFT's folders of them; returns where the base is."""
    from graftory import Hub, LoraConfig, TaskInfo, new_adapter
    from graftory.data.models import sample_model
    from graftory.training.base import load_base

    base = Path(sample_model("wheel:smollm2"))
    loaded, hub = load_base(str(base), "causal_lm"), Hub.create(folder / "hub")
    for number, name in enumerate(NAMES):
        config, task = LoraConfig(rank=RANK, targets=("all",), init_seed=number), TaskInfo(name, "causal_lm")
        made = new_adapter(loaded.model, config, task=task, base=loaded.base)
        generator = torch.Generator().manual_seed(number)
        tensors = {
            key: 0.02 * torch.randn(value.shape, generator=generator) if ".lora_B" in key else value
            for key, value in made.tensors.items()
        }
        hub.put(name, replace(made, tensors=tensors))
        hub_command(folder, "export", name, folder / name, "--format", "peft")
    return base


def compared(method: str, command: Path, base: Path, folder: Path) -> dict[str, float]:
    """One method, both ways."""
    theirs_name, options, parameters = METHODS[method]
    given = ["--method", method, "--weights", ",".join(map(str, WEIGHTS)), *options, "--name", f"by-{method}"]
    ours = hub_command(folder, "merge", *NAMES, *given)
    ours += hub_command(folder, "export", f"by-{method}", folder / f"our-{method}", "--no-check")
    file = folder / f"{method}.yaml"
    models = [
        {"model": f"{base}+{folder / name}", "parameters": {"weight": weight, "density": DENSITY}}
        for name, weight in zip(NAMES, WEIGHTS, strict=True)
    ]
    told = {"models": models, "merge_method": theirs_name, "base_model": str(base), "dtype": "float32"}
    file.write_text(yaml.safe_dump({**told, "parameters": dict(parameters)}))
    folded = ["--lora-merge-cache", str(folder / f"folded-{method}")]
    theirs = timed([str(command), str(file), str(folder / f"their-{method}"), "--quiet", *folded])
    return {
        "our_seconds": ours.seconds,
        "our_processor_seconds": ours.processor_seconds,
        "our_peak_mb": ours.peak_mb,
        "mergekit_seconds": theirs.seconds,
        "mergekit_processor_seconds": theirs.processor_seconds,
        "mergekit_peak_mb": theirs.peak_mb,
        "times_faster_on_the_processor": theirs.processor_seconds / ours.processor_seconds,
        "relative_difference": difference(folder / f"our-{method}", folder / f"their-{method}", base),
    }


def hub_command(folder: Path, *arguments: object) -> Cost:
    """A command of ours."""
    return timed([sys.executable, "-m", "graftory", "--registry", str(folder / "hub"), *map(str, arguments)])


def timed(command: Sequence[str]) -> Cost:
    """Run it in a process of its own."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    text = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)}\n{text.decode()[-2000:]}")
    return Cost(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def difference(ours: Path, theirs: Path, base: Path) -> float:
    """‖W − W'‖ / ‖W' − W_base‖ over all weights that both files have."""
    plain, one, other = (tensors_of(folder) for folder in (base, ours, theirs))
    apart = sum(float((one[key].double() - other[key].double()).square().sum()) for key in other if key in one)
    update = sum(float((other[key].double() - plain[key].double()).square().sum()) for key in other if key in plain)
    return float((apart / update) ** 0.5)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model."""
    index = folder / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    return {key: tensor for name in names for key, tensor in load_file(folder / name).items()}
