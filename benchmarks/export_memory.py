"""What `hub export` needs of memory: the command itself in a process of its own, with its comparison and without.

    OMP_NUM_THREADS=1 python benchmarks/merging.py --parts export

Each model of the catalogue gets a LoRA of rank 8 with random weights, which is exported as one plain model and compared
on real texts with base + adapter. All is told as a share of the bytes that are written, above what the process had
after its imports:

peak: the most resident memory, which the system keeps count of (`VmHWM`); pages of mapped files are in it.
anonymous: the most of the memory that has no file behind it (`RssAnon`), looked at every millisecond from outside.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

KINDS: Mapping[str, Any] = {"minilm": "classification", "smollm2": "causal_lm", "t5": "seq2seq"}
"""Models of the catalogue, and the kind of task each is exported for."""
CLEAR = Path("/proc/self/clear_refs")
RANK = 8


def measured() -> dict[str, dict[str, float]]:
    """A row for every model, compared and not."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = folder / "texts.txt"
        for model in KINDS:
            subprocess.run([sys.executable, __file__, "adapter", model, str(folder)], check=True)
            for what, options in (("compared", ["--input", str(texts)]), ("not compared", ["--no-check"])):
                out = folder / f"{model}-{len(options)}"
                found[f"{model}, {what}"] = exported([f"{model}@1", str(out), *options], folder)
    return found


def exported(arguments: Sequence[str], folder: Path) -> dict[str, float]:
    """One export, watched from outside."""
    command = [sys.executable, __file__, "export", str(folder / "hub"), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        before = json.loads(process.stdout.readline())
        watch = Watch(process.pid)
        watch.start()
        process.stdin.write("go\n")
        process.stdin.flush()
        lines = process.stdout.readlines()
        watch.done.set()
    if process.returncode != 0:
        raise SystemExit(f"hub export {' '.join(arguments)}: exit {process.returncode}")
    after, facts = json.loads(lines[-1]), json.loads("".join(lines[:-1]))
    size = facts["bytes"]
    return {
        "size_mb": size / 1e6,
        "peak": (after["VmHWM"] - before["VmRSS"]) / size,
        "anonymous": (watch.most - before["RssAnon"]) / size,
        "rows": facts["rows"],
        "largest_difference": facts["max_difference"],
    }


class Watch(threading.Thread):
    """The most anonymous memory of a process."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.done = threading.Event()
        self._process = process

    def run(self) -> None:
        """Look until the process is gone."""
        with contextlib.suppress(OSError, KeyError):  # it has ended
            while not self.done.wait(0.001):
                self.most = max(self.most, memory(self._process)["RssAnon"])


def memory(process: int | str = "self") -> dict[str, int]:
    """Bytes of each kind of memory of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    rows = (line.split() for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon")))
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows}


def make_adapter(model: str, folder: Path) -> None:
    """A hub with a LoRA of a model, and texts."""
    import torch

    from graftory import Hub, LoraConfig, TaskInfo, new_adapter
    from graftory.data import load_rows, load_task
    from graftory.training.base import load_base

    kind = KINDS[model]
    rows = load_rows(load_task("wheel:trec"), "test", limit=64)
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in rows.texts), encoding="utf-8")
    labels = ("a", "b", "c", "d", "e", "f") if kind == "classification" else ()
    loaded = load_base(f"wheel:{model}", kind)
    adapter = new_adapter(loaded.model, LoraConfig(rank=RANK), task=TaskInfo("memory", kind, labels), base=loaded.base)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: 0.02 * torch.randn(tensor.shape, generator=generator) if ".lora_B" in key else tensor
        for key, tensor in adapter.tensors.items()
    }
    Hub.create(folder / "hub").put(model, replace(adapter, tensors=tensors))


def run_export(hub: str, arguments: Sequence[str]) -> None:
    """`hub export` after its imports; what the process has before, its answer, what it has had at most."""
    # transformers imports a model's code, and with it torch's compiler, where its class is first named
    from transformers import BertModel, LlamaModel, T5Model

    from graftory.cli import cli
    from graftory.commands import export
    from graftory.compose import exporting, exports
    from graftory.training import encode

    assert all((BertModel, LlamaModel, T5Model, export, exporting, exports, encode))
    CLEAR.write_text("5")  # the system's count of the most begins anew
    print(json.dumps(memory()), flush=True)
    sys.stdin.readline()
    cli(["--registry", hub, "export", *arguments, "--json"], standalone_mode=False)
    print(json.dumps(memory()), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "adapter":
        make_adapter(sys.argv[2], Path(sys.argv[3]))
    else:
        run_export(sys.argv[2], sys.argv[3:])
