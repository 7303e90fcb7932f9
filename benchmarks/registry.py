"""What a hub costs as it grows: 10, 1,000 and 10,000 versions in 500 names (10 in 10), and one adapter of 50 MB.

    python benchmarks/registry.py
    python benchmarks/registry.py --sizes 10,100 --repeats 2 --megabytes 5 --no-write   # a quick look

Every measurement is a process of its own: `hub list`, `hub show`, `hub log` (a merge of two; with `--children` every
record is read), `hub verify` of everything; and push, pull, put and making the index anew through the API, where the
call is also timed within the process, after the imports. Medians of interleaved repeats after a warm-up, and the peak
of resident memory. Each adapter is a LoRA with weights of its own, 2 KB in two files. Pushes and pulls are over
`file://`. fsync is on everywhere. "0" is an empty hub.

Peers in the same run: all records in one JSON file, as simple registries do; `scan_cache_dir` of huggingface_hub over
a cache with as many snapshots of two files; copying the file of 50 MB and hashing the copy.

The results go to benchmarks/results/registry.json and .md. It takes about five minutes, on Linux or macOS.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from registry_report import Row, markdown, print_report, report_of

RESULTS = Path(__file__).parent / "results"
WORK = Path(__file__).with_name("registry_work.py")
SIZES = (10, 1_000, 10_000)
WARM_UP = 1
CLI = "from graftory.cli import main; main()"


@dataclass(frozen=True, slots=True)
class Sample:
    """One process: all of its time, the time of the call in it, its peak memory."""

    process: float
    call: float | None
    megabytes: float


def worker(name: str, *arguments: object) -> list[str]:
    """The command line of a worker."""
    return [sys.executable, str(WORK), name, *map(str, arguments)]


def command(root: Path, *arguments: str) -> list[str]:
    """The command line of `hub`."""
    return [sys.executable, "-c", CLI, "--registry", str(root), *arguments]


def run(line: Sequence[str]) -> Sample:
    """Run a process to its end.

    Raises:
        RuntimeError: If it fails.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)}: {text[-2000:]}")
    peak = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
    call = float(text.rsplit("seconds ", 1)[1]) if str(WORK) in line and "seconds " in text else None
    return Sample(seconds, call, peak)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where everything lies."""

    folder: Path

    def hub(self, size: int) -> Path:
        """A hub with so many versions."""
        return self.folder / f"hub-{size}"

    def target(self, size: int) -> Path:
        """The same, to write to; an empty one is made anew each time."""
        return self.hub(size) if size else self.scratch

    @property
    def source(self) -> Path:
        """The hub with what is pushed."""
        return self.folder / "source"

    @property
    def scratch(self) -> Path:
        """A hub that is empty before every measurement."""
        return self.folder / "scratch"

    def clear(self) -> None:
        """Make the scratch hub empty, and let the disk finish what it has begun."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.copytree(self.folder / "empty", self.scratch)
        os.sync()

    def large_file(self) -> Path:
        """The weights of the large adapter."""
        blobs = (path for path in (self.source / ".hub" / "blobs").rglob("*") if path.is_file())
        return max(blobs, key=lambda path: path.stat().st_size)


Make = Callable[[Bench, int, int], list[str]]
_IN_AN_EMPTY_HUB = ("hub list", "push", "put")
_LONG = "hub verify"
"""Takes half of the time and has nothing to warm up: what was just written is in the page cache."""
SCALE: Mapping[str, Make] = {
    "hub list": lambda bench, size, _: command(bench.hub(size), "list"),
    "hub show": lambda bench, size, _: command(bench.hub(size), "show", "adapter-003@1"),
    "hub log": lambda bench, size, _: command(bench.hub(size), "log", "both@1"),
    "hub log --children": lambda bench, size, _: command(bench.hub(size), "log", "adapter-000@1", "--children"),
    "push": lambda bench, size, turn: worker("push", bench.source, f"new@{turn + 1}", bench.target(size)),
    "put": lambda bench, size, turn: worker("put", bench.target(size), turn),
    "pull": lambda bench, size, _: worker("pull", bench.scratch, bench.hub(size), "adapter-003@1"),
    "hub verify": lambda bench, size, _: command(bench.hub(size), "verify"),
    "rebuild of the index": lambda bench, size, _: worker("rebuild", bench.hub(size)),
    "one JSON: list": lambda bench, size, _: worker("list-json", bench.folder / f"{size}.json"),
    "one JSON: push": lambda bench, size, _: worker("push-json", bench.folder / f"{size}.json"),
    "scan_cache_dir: list": lambda bench, size, _: worker("list-cache", bench.folder / f"cache-{size}"),
}
"""What is measured at every size."""
LARGE: Mapping[str, Make] = {
    "copy + sha256": lambda bench, *_: worker("copy", bench.large_file(), bench.scratch / "copy", 0),
    "copy + fsync + sha256": lambda bench, *_: worker("copy", bench.large_file(), bench.scratch / "copy", 1),
    "push": lambda bench, *_: worker("push", bench.source, "large@1", bench.scratch),
    "pull": lambda bench, *_: worker("pull", bench.scratch, bench.source, "large@1"),
}
"""What is measured with the large adapter."""


def prepare(bench: Bench, sizes: Sequence[int], pushes: int, megabytes: int) -> None:
    """Make everything that is measured."""
    say("making an empty hub, one to push from")
    run(worker("build-empty", bench.folder / "empty"))
    run(worker("build-empty", bench.hub(0)))
    run(worker("build-source", bench.source, pushes, megabytes))
    for number, size in enumerate(sizes):
        say(f"making {size:,} versions")
        run(worker("build", bench.hub(size), size, 100_000 * number))
        run(worker("build-json", bench.hub(size), bench.folder / f"{size}.json"))
        run(worker("build-cache", bench.folder / f"cache-{size}", size))


def measure(table: Mapping[str, Make], bench: Bench, sizes: Sequence[int], repeats: int) -> list[Row]:
    """Medians, all operations and sizes by turns, so that noise hits all alike."""
    samples: dict[tuple[str, int], list[Sample]] = {
        (name, size): [] for name in table for size in sizes if size or name in _IN_AN_EMPTY_HUB
    }
    for turn in range(repeats + WARM_UP):
        say(f"measuring, turn {turn + 1} of {repeats + WARM_UP}")
        for (name, size), found in samples.items():
            if turn < WARM_UP and name == _LONG:
                continue
            bench.clear()
            sample = run(table[name](bench, size, turn))
            if turn >= WARM_UP:
                found.append(sample)
    return [summary(name, size, found) for (name, size), found in samples.items()]


def summary(name: str, size: int, samples: Sequence[Sample]) -> Row:
    """The medians of one operation."""
    calls = [sample.call for sample in samples if sample.call is not None]
    times = calls or [sample.process for sample in samples]
    return Row(
        operation=name,
        versions=size,
        process_seconds=statistics.median(sample.process for sample in samples),
        call_seconds=statistics.median(calls) if calls else None,
        peak_megabytes=statistics.median(sample.megabytes for sample in samples),
        spread=max(times) / min(times),
        repeats=len(samples),
    )


def say(text: str) -> None:
    """Tell what is going on."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="versions, smallest first")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=50, help="of the large adapter")
    parser.add_argument("--folder", type=Path, help="where the hubs are made, on the disk that is meant")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results as it is")
    options = parser.parse_args()
    sizes = tuple(int(size) for size in options.sizes.split(","))
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        bench = Bench(Path(name).resolve())
        started = time.perf_counter()
        prepare(bench, sizes, options.repeats + WARM_UP, options.megabytes)
        built = time.perf_counter() - started
        scale = measure(SCALE, bench, (0, *sizes), options.repeats)
        large = measure(LARGE, bench, (1,), 2 * options.repeats + 1)
        size = bench.large_file().stat().st_size
    report = report_of(scale, large, size, {"build_seconds": round(built, 1)})
    print_report(report)
    if not options.no_write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "registry.json").write_text(json.dumps(report, indent=2) + "\n")
        (RESULTS / "registry.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
