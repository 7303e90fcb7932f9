"""The model card of a version: `README.md` of its repository, complete and from the record alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import yaml

from graftory.adapter import Metric, TaskInfo, TaskKind
from graftory.config import LoraConfig, config_to_json
from graftory.hub.completeness import gaps
from graftory.hub.records import Record
from graftory.schema import Json

_PIPELINES: Mapping[TaskKind, str] = {
    "classification": "text-classification",
    "regression": "text-classification",
    "causal_lm": "text-generation",
    "seq2seq": "text2text-generation",
}
_IMAGES = "image-classification"
_AUTO: Mapping[TaskKind, str] = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""What the hub takes as the id of a model; `wheel:minilm` and folders are none."""
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LONGEST = 300


def card(record: Record, *, repo: str) -> bytes:
    """The card of a version.

    Everything in it comes from the record, and whatever a person typed there is data: it cannot end the
    header, open a tag or a code block.

    Args:
        record: The version.
        repo: The repository, such as `org/trec`.
    """
    header = yaml.safe_dump(_header(record), sort_keys=False, allow_unicode=True, width=1000)
    parts = [f"---\n{header}---", f"# {_plain(record.name)}", *_body(record, repo)]
    return ("\n\n".join(part for part in parts if part) + "\n").encode()


def _header(record: Record) -> dict[str, Json]:
    spec, task = record.spec, record.spec.task
    images = spec.base.architecture == "vit"
    peft = isinstance(spec.config, LoraConfig)
    fields: dict[str, Json | None] = {
        "license": spec.licence if spec.licence and _LICENCE.fullmatch(spec.licence) else None,
        "base_model": spec.base.id if _MODEL_ID.fullmatch(spec.base.id) else None,
        "base_model_relation": "adapter" if _MODEL_ID.fullmatch(spec.base.id) else None,
        "library_name": "peft" if peft else "graftory",
        "pipeline_tag": (_IMAGES if images else _PIPELINES[task.kind]) if task else None,
        "tags": ["graftory", spec.method, spec.lineage.process],
        "datasets": sorted({row.data for row in spec.metrics if _MODEL_ID.fullmatch(row.data)}) or None,
        "metrics": sorted({row.name for row in spec.metrics}) or None,
        "model-index": _results(record) or None,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _results(record: Record) -> list[Json]:
    """The measured numbers in the hub's form."""
    task = record.spec.task
    kind = _PIPELINES[task.kind] if task else "other"
    results: list[Json] = [
        {
            "task": {"type": kind, **({"name": task.name} if task else {})},
            "dataset": {"type": row.data, "name": row.data, "split": row.split},
            "metrics": [{"type": row.name, "name": row.name, "value": row.value, "args": {"rows": row.n}}],
        }
        for row in record.spec.metrics
    ]
    return [{"name": record.name, "results": results}] if results else []


def _body(record: Record, repo: str) -> Iterator[str]:
    spec = record.spec
    kind = f"A {spec.method} adapter of {_code(spec.base.id)}"
    about = f" for the task {_code(spec.task.name)} ({spec.task.kind})" if spec.task else ""
    yield f"{kind}{about}: version {record.version}, made by {_code(spec.lineage.process)} at {_code(record.created)}."
    yield _usage(record, repo)
    if spec.task:
        yield from _task(spec.task)
    if spec.metrics:
        yield "## What was measured"
        yield _metrics(spec.metrics)
    yield "## How it was made"
    yield _table(("", ""), _making(record))
    yield from _parents(record)
    missing = gaps(record)
    if missing:
        yield "## What is not recorded"
        yield "\n".join(f"- {_plain(gap.field)}" for gap in missing)


def _usage(record: Record, repo: str) -> str:
    lines = ["```sh", f"hub pull hf://{repo}@{record.version}", "```"]
    task = record.spec.task
    if isinstance(record.spec.config, LoraConfig):
        auto = _AUTO[task.kind] if task else "AutoModel"
        labels = f", num_labels={task.outputs}" if task and task.outputs else ""
        base = record.spec.base.id.replace("\\", "").replace('"', "").replace("`", "")
        lines += [
            "",
            "```python",
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f'base = {auto}.from_pretrained("{_plain(base)}"{labels})',
            f'model = PeftModel.from_pretrained(base, "{repo}", revision="v{record.version}")',
            "```",
        ]
    return "\n".join(lines)


def _task(task: TaskInfo) -> Iterator[str]:
    if task.labels:
        yield "## Labels"
        yield _table(("output", "label"), [(str(number), _code(label)) for number, label in enumerate(task.labels)])
    if task.template != "{text}":
        yield "## Prompt"
        yield _code(task.template)


def _metrics(rows: Sequence[Metric]) -> str:
    return _table(
        ("metric", "value", "data", "split", "rows"),
        [(_code(row.name), f"{row.value:.4f}", _code(row.data), _code(row.split), str(row.n)) for row in rows],
    )


def _making(record: Record) -> Iterator[tuple[str, str]]:
    spec = record.spec
    yield "digest", _code(record.digest)
    config = config_to_json(spec.config)
    for key, value in config.items() if isinstance(config, dict) else ():
        if value not in (None, {}, []):
            yield (
                key,
                f"{len(value)}: {_code(', '.join(map(str, value)))}" if isinstance(value, list) else _code(str(value)),
            )
    facts = {
        "base revision": spec.base.revision,
        "base weights": spec.base.weights_hash,
        "tokenizer": spec.base.tokenizer_hash,
        "training rows": spec.lineage.data_hash,
        "seed": spec.lineage.seed,
    }
    for key, value in {**facts, **spec.lineage.parameters, **spec.lineage.libraries}.items():
        if value is not None:
            yield _plain(key), _code(str(value))


def _parents(record: Record) -> Iterator[str]:
    parents = record.spec.lineage.parents
    if parents:
        yield "## What it was made from"
        rows = [
            (_code(p.ref), p.relation, "" if p.weight is None else f"{p.weight:g}", _code(p.digest)) for p in parents
        ]
        yield _table(("adapter", "how", "weight", "digest"), rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _code(text: str) -> str:
    """Text as it stands, as code in a line of a table."""
    return f"`{_short(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _plain(text: str) -> str:
    """Text without what Markdown or HTML would make something of."""
    return re.sub(r"[<>\[\]`*_|\\#]", " ", _short(text))


def _short(text: str) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
