"""`hub export --format`: what is written, a function a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftory.adapter import TASK_SOURCE
from graftory.commands.output import progress_bar, working
from graftory.commands.texts import texts_of
from graftory.data import Text, load_rows, load_task
from graftory.errors import ConfigError, UnsupportedAdapterError
from graftory.schema import Json

if TYPE_CHECKING:
    from torch import Tensor

    from graftory.adapter import TaskInfo
    from graftory.compose import Source
    from graftory.hub import Hub, Record

Input = tuple[Text, int | float | str]
"""A text and its target."""
ROWS = {"classification": 64, "regression": 64}
"""Texts that are compared on, by kind of task; of others `WRITTEN_ROWS`."""
WRITTEN_ROWS = 16
"""The same where every token has logits over a vocabulary."""
BATCH_SIZE = 4
"""Small: what a batch needs comes on top of the model."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for."""

    hub: Hub
    record: Record
    folder: Path
    base: str
    head: Record | None
    file: Path | None
    rows: int | None
    check: bool
    dtype: str | None
    max_shard_size: str
    dequantize: bool

    @property
    def meaning(self) -> Record:
        """The adapter whose task and head are meant."""
        return self.head or self.record


@dataclass(frozen=True, slots=True)
class Result:
    """What was written, for people and for scripts."""

    lines: tuple[str, ...]
    facts: Json


def model(request: Request) -> Result:
    """One plain model, written tensor by tensor."""
    from graftory.compose import export_folder

    task = task_of(request)
    inputs = inputs_to_compare(request) if request.check else []
    with progress_bar("exporting") as progress:
        done = export_folder(
            request.base,
            source_of(request.hub, request.record),
            request.folder,
            kind=task.kind,
            head=source_of(request.hub, request.head) if request.head else None,
            batches=(lambda tokenizer: batches_of(tokenizer, task, inputs)) if request.check else None,
            max_shard_size=request.max_shard_size,
            dtype=request.dtype,
            dequantize=request.dequantize,
            progress=progress,
        )
    check = done.check
    facts: dict[str, Json] = {
        "folder": str(done.folder),
        "format": "model",
        "files": list(done.files),
        "bytes": done.size,
        "dtype": done.dtype,
        "max_difference": check.max_difference if check else None,
        "largest_logit": check.largest if check else None,
        "rows": check.n if check else 0,
    }
    said = f"largest difference of logits on {check.n} inputs: {check.max_difference:.2e}" if check else "not compared"
    return Result((f"exported {request.record.ref} to {done.folder}", said), facts)


def pt2(request: Request) -> Result:
    """Base and adapter as one graph, for what no weight can hold."""
    from graftory.compose.exports.graph import export_graph

    task = task_of(request)
    inputs = inputs_to_compare(request)
    with working("tracing base and adapter"):
        done = export_graph(
            request.base,
            source_of(request.hub, request.record),
            request.folder,
            kind=task.kind,
            head=source_of(request.hub, request.head) if request.head else None,
            batches=lambda tokenizer: batches_of(tokenizer, task, inputs),
        )
    check = done.check
    assert check is not None
    facts: dict[str, Json] = {
        "folder": str(done.folder),
        "format": "pt2",
        "files": list(done.files),
        "bytes": done.size,
        "max_difference": check.max_difference,
        "largest_logit": check.largest,
        "rows": check.n,
    }
    said = f"largest difference of logits on {check.n} inputs: {check.max_difference:.2e}"
    return Result((f"wrote the graph of {request.record.ref} to {done.folder}", said), facts)


def peft(request: Request) -> Result:
    """PEFT's two files, as they are kept, and graftory.json beside them."""
    from graftory.hub.codecs.peft import WRITES

    record = request.record
    if type(record.spec.config) not in WRITES:
        methods = ", ".join(kind.method for kind in WRITES)
        raise UnsupportedAdapterError(
            f"{record.ref}: PEFT has no {record.spec.method} adapters; its files can hold {methods}"
        )
    if record.spec.storage != "full":
        from graftory.hub.codecs import codec_of
        from graftory.hub.folders import write_folder

        spec = replace(record.spec, storage="full")
        files = codec_of(spec).encode(replace(request.hub.get(record.ref), spec=spec))
        return _written(request, "peft", write_folder(request.folder.absolute(), spec, files))
    return _written(request, "peft", request.hub.materialize(record.ref, request.folder))


def adapterhub(request: Request) -> Result:
    """AdapterHub's files; of the base its configuration is read, for the number of its layers."""
    from graftory.hub.adapterhub import write
    from graftory.hub.folders import place
    from graftory.training.base import layers_of

    adapter = request.hub.get(request.record.ref)
    files = write(adapter, request.record.name, layers=layers_of(request.base))
    return _written(request, "adapterhub", place(request.folder.absolute(), files))


def vllm(request: Request) -> Result:
    """PEFT's files with one rank that a server can have and one scale."""
    from graftory.compose.exports.vllm import export_vllm, largest_difference, served_rank
    from graftory.config import LoraConfig

    record, adapter = request.record, request.hub.get(request.record.ref)
    folder = export_vllm(adapter, request.folder, ref=str(record.ref), base=request.base)
    config = adapter.spec.config
    assert isinstance(config, LoraConfig)
    rank, difference = served_rank(config, str(record.ref)), largest_difference(adapter, folder)
    facts: dict[str, Json] = {"folder": str(folder), "format": "vllm", "rank": rank, "max_difference": difference}
    lines = (
        f"wrote {record.ref} to {folder}, for vllm: --enable-lora --max-lora-rank {rank}",
        f"largest difference of an update's entry: {difference:.2e}",
    )
    return Result(lines, facts)


FORMATS: Mapping[str, Callable[[Request], Result]] = {
    "model": model,
    "pt2": pt2,
    "vllm": vllm,
    "peft": peft,
    "adapterhub": adapterhub,
}
"""What can be written."""
NOT_WRITTEN: Mapping[str, str] = {
    "onnx": "ONNX is not written; --format pt2 writes base + adapter as one graph for torch, --format model one plain "
    "model of transformers, which exporters to ONNX take",
}
"""What people ask for all the same, and what is there instead."""
_COMPARED = frozenset({"head", "file", "rows"})
TAKES: Mapping[str, frozenset[str]] = {
    "model": _COMPARED | {"base", "no_check", "dtype", "max_shard_size", "dequantize"},
    "pt2": _COMPARED | {"base"},
    "vllm": frozenset({"base"}),
    "peft": frozenset(),
    "adapterhub": frozenset({"base"}),
}
"""Parameters of the command that go with each format, beside those that go with all."""


def task_of(request: Request) -> TaskInfo:
    """The task that the exported model is for.

    Raises:
        ConfigError: If the adapter has none.
    """
    task = request.meaning.spec.task
    if task is None:
        raise ConfigError(
            f"{request.meaning.ref} has no task of its own; pass --head with the adapter whose task is meant"
        )
    return task


def source_of(hub: Hub, record: Record) -> Source:
    """An adapter and its names."""
    from graftory.compose import Source

    return Source(hub.get(record.ref), str(record.ref), record.digest)


def inputs_to_compare(request: Request) -> list[Input]:
    """Real inputs: lines of a file, or test rows of the task the adapter was trained on.

    Raises:
        DataError: If the file cannot be read or is empty.
        ConfigError: If there is no file and the task is not recorded.
    """
    record = request.meaning
    rows = request.rows or ROWS.get(task_of(request).kind, WRITTEN_ROWS)
    if request.file is not None:
        return [(text, "") for text in texts_of(request.file)[:rows]]
    source = record.spec.lineage.parameters.get(TASK_SOURCE)
    if not isinstance(source, str):
        raise ConfigError(f"{record.ref} does not say which task it was trained on; pass --input with a file of texts")
    chosen = load_rows(load_task(source), "test", limit=rows)
    return list(zip(chosen.texts, chosen.targets, strict=True))


def batches_of(tokenizer: Any, task: TaskInfo, inputs: Sequence[Input]) -> list[dict[str, Tensor]]:
    """Inputs as the model takes them; a sequence-to-sequence model also needs what its decoder reads."""
    from graftory.training.encode import Collator, encode

    collator = Collator(tokenizer.pad_token_id)
    size = BATCH_SIZE if task.kind in ROWS else 1
    batches = []
    for start in range(0, len(inputs), size):
        part = inputs[start : start + size]
        batches.append(
            collator([encode(tokenizer, task, text, y if task.kind == "seq2seq" else None) for text, y in part])
        )
    return batches


def _written(request: Request, form: str, folder: Path) -> Result:
    return Result((f"wrote {request.record.ref} to {folder}, for {form}",), {"folder": str(folder), "format": form})
