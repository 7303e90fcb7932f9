"""What runs in the processes that benchmarks/registry.py measures.

    python benchmarks/registry_work.py push HUB REF REMOTE

The standard library alone is imported at the top, so that each imports what it needs and nothing more.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NAMES = 500


def make_adapter(seed: int, parents: tuple[Any, ...] = (), width: int = 16, modules: int = 2) -> Any:
    """A LoRA with random weights."""
    import torch

    from graftory import Adapter, AdapterSpec, BaseModel, Lineage, LoraConfig, Metric, TaskInfo

    paths = tuple(f"encoder.layer.{number}.query" for number in range(modules))
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"{path}.lora_{part}.weight": part for path in paths for part in "AB"}
    tensors = {
        key: torch.randn((4, width) if part == "A" else (width, 4), generator=generator) for key, part in shapes.items()
    }
    spec = AdapterSpec(
        BaseModel("org/base", revision="main", architecture="bert"),
        LoraConfig(rank=4, targets=paths),
        TaskInfo("trec", "causal_lm"),
        Lineage("train", parents, {"learning_rate": 1e-3, "epochs": 3}, "d" * 64, seed),
        (Metric("accuracy", 0.9, "trec", "test", 500),),
        "apache-2.0",
    )
    return Adapter(spec, tensors)


def build(root: Path, count: int, first: int = 0) -> None:
    """A hub with `count` versions, the last one a merge of two."""
    from graftory import Hub, Parent

    hub = Hub.create(root)
    names = min(NAMES, max(count - 1, 1))
    for number in range(count - 1):
        hub.put(f"adapter-{number % names:03d}", make_adapter(first + number))
    if count > 2:
        records = [hub.record(f"adapter-{number:03d}@1") for number in range(2)]
        parents = tuple(Parent(str(record.ref), record.digest, "merged", 0.5) for record in records)
        hub.put("both", make_adapter(first + count, parents))


def build_source(root: Path, count: int, megabytes: int) -> None:
    """A hub with versions to push, and one large one."""
    from graftory import Hub

    hub = Hub.create(root)
    for number in range(count):
        hub.put("new", make_adapter(10_000_000 + number))
    modules = 24
    hub.put("large", make_adapter(1, width=megabytes * 1_000_000 // (modules * 2 * 4 * 4), modules=modules))


def build_empty(root: Path) -> None:
    """An empty hub."""
    from graftory import Hub

    Hub.create(root)


def build_json(root: Path, target: Path) -> None:
    """All records of a hub in one file."""
    records = [json.loads(path.read_bytes()) for path in sorted((root / ".hub" / "records").rglob("*.json"))]
    target.write_text(json.dumps(records))


def build_cache(root: Path, count: int) -> None:
    """A cache of the Hugging Face Hub with `count` snapshots of two files in 500 repositories."""
    names = min(NAMES, count)
    for number in range(count):
        folder = root / f"models--org--adapter-{number % names:03d}"
        commit = hashlib.sha1(str(number).encode()).hexdigest()
        snapshot = folder / "snapshots" / commit
        for part in (snapshot, folder / "blobs", folder / "refs"):
            part.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            blob = folder / "blobs" / hashlib.sha256(f"{number} {name}".encode()).hexdigest()
            blob.write_bytes(bytes(1000))
            (snapshot / name).symlink_to(blob)
        (folder / "refs" / "main").write_text(commit)


def load_what_moving_needs() -> None:
    """Import what the first push or pull of a process imports: it is the process's time, and would hide growth."""
    import filelock  # noqa: F401
    import numpy  # noqa: F401

    import graftory.hub.codecs.peft
    import graftory.hub.remotes.directory  # noqa: F401


def push(root: Path, ref: str, remote: Path) -> float:
    """Seconds of Hub.push."""
    from graftory.hub import Hub

    load_what_moving_needs()
    hub = Hub.open(root)
    return timed(lambda: hub.push(ref, remote.as_uri()))


def pull(root: Path, remote: Path, ref: str) -> float:
    """Seconds of Hub.pull."""
    from graftory.hub import Hub

    load_what_moving_needs()
    hub = Hub.open(root)
    return timed(lambda: hub.pull(f"{remote.as_uri()}/{ref}"))


def put(root: Path, seed: int) -> float:
    """Seconds of Hub.put, of a process that has put something elsewhere before."""
    from graftory.hub import Hub

    with tempfile.TemporaryDirectory() as elsewhere:
        Hub.create(elsewhere).put("first", make_adapter(0))
    adapter = make_adapter(20_000_000 + seed)
    hub = Hub.open(root)
    return timed(lambda: hub.put("put", adapter))


def rebuild(root: Path) -> float:
    """Seconds of making registry.json anew."""
    from graftory.hub import Hub

    hub = Hub.open(root)
    return timed(hub.rebuild_index)


def list_json(path: Path) -> None:
    """List from one file: the newest version of each name."""
    newest: dict[str, Any] = {}
    for record in json.loads(path.read_bytes()):
        if record["version"] > newest.get(record["name"], {"version": 0})["version"]:
            newest[record["name"]] = record
    print(*(f"{name} {record['version']}" for name, record in sorted(newest.items())), sep="\n")


def push_json(path: Path) -> float:
    """Add a record to one file, as safely as the hub does."""

    def add() -> None:
        records = json.loads(path.read_bytes())
        records.append({**records[-1], "version": records[-1]["version"] + 1})
        fresh = path.with_suffix(".new")
        with fresh.open("w") as file:
            json.dump(records, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)

    return timed(add)


def list_cache(root: Path) -> None:
    """List a cache of huggingface_hub."""
    from huggingface_hub import scan_cache_dir

    for repo in sorted(scan_cache_dir(root).repos, key=lambda repo: repo.repo_id):
        print(repo.repo_id, len(repo.revisions))


def copy(source: Path, target: Path, sync: int) -> float:
    """Seconds of copying a file and hashing the copy."""

    def work() -> None:
        shutil.copyfile(source, target)
        if sync:
            with target.open("rb") as file:
                os.fsync(file.fileno())
        digest = hashlib.sha256()
        with target.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)

    return timed(work)


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


WORKERS: Mapping[str, tuple[Callable[..., float | None], tuple[type, ...]]] = {
    "build": (build, (Path, int, int)),
    "build-source": (build_source, (Path, int, int)),
    "build-empty": (build_empty, (Path,)),
    "build-json": (build_json, (Path, Path)),
    "build-cache": (build_cache, (Path, int)),
    "push": (push, (Path, str, Path)),
    "pull": (pull, (Path, Path, str)),
    "put": (put, (Path, int)),
    "rebuild": (rebuild, (Path,)),
    "list-json": (list_json, (Path,)),
    "push-json": (push_json, (Path,)),
    "list-cache": (list_cache, (Path,)),
    "copy": (copy, (Path, Path, int)),
}
"""What a process may be told to do, with the types of its arguments."""


def main() -> None:
    """Do it, and say how long the call took."""
    work, kinds = WORKERS[sys.argv[1]]
    seconds = work(*(kind(value) for kind, value in zip(kinds, sys.argv[2:], strict=True)))
    if seconds is not None:
        print(f"seconds {seconds!r}")


if __name__ == "__main__":
    main()
