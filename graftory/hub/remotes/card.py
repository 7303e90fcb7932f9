"""The model card of a version: `README.md` of its repository, complete and from the record alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

import yaml

from graftory.adapter import AdapterSpec, TaskInfo, TaskKind
from graftory.config import ComposedConfig, config_to_json
from graftory.hub.codecs.peft import WRITES
from graftory.hub.completeness import completeness
from graftory.hub.records import Record
from graftory.hub.remotes.card_text import code, is_hub_id, line, table
from graftory.schema import Json

_PIPELINES: Mapping[TaskKind, str] = {
    "classification": "text-classification",
    "regression": "text-classification",
    "causal_lm": "text-generation",
    "seq2seq": "text2text-generation",
}
_IMAGES = "image-classification"
_AUTO: Mapping[str, str] = {
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    _IMAGES: "AutoModelForImageClassification",
}
_KINDS: Mapping[TaskKind, str] = {
    "classification": "classification",
    "regression": "regression",
    "causal_lm": "text generation",
    "seq2seq": "text to text",
}
_LICENCES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
lgpl-lr deepfloyd-if-license llama2 gemma unknown other
"""
"""What the hub takes for a licence; it refuses a card with another one, unless it is called `other`."""
_WORD = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_MARK = "<!-- Made by graftory from graftory-record.json; a card that was changed by hand is kept. sha256:{} -->\n"
_END = re.compile(rb"<!-- Made by graftory [^<>]*sha256:([0-9a-f]{64}) -->\n\Z")


def card(record: Record, *, repo: str) -> bytes:
    """The card of a version.

    Everything in it comes from the record, and whatever a person typed there is data: it cannot end the
    header, open a tag or a code block. Folders of the maker's machine and what looks like a secret are left out.

    Args:
        record: The version.
        repo: The repository, such as `org/trec`.
    """
    header = yaml.safe_dump(_header(record), sort_keys=False, allow_unicode=True, width=1000)
    parts = [f"---\n{header}---", f"# {record.name}", *_body(record, repo)]
    text = "\n\n".join(parts) + "\n\n"
    return (text + _MARK.format(hashlib.sha256(text.encode()).hexdigest())).encode()


def is_untouched(data: bytes) -> bool:
    """Whether a card is as `card` made it, of this version of graftory or another one; else a person wrote in it."""
    end = _END.search(data)
    return end is not None and hashlib.sha256(data[: end.start()]).hexdigest() == end[1].decode()


def _header(record: Record) -> dict[str, Json]:
    spec = record.spec
    linked = is_hub_id(spec.base.id, with_owner=spec.base.revision is None)
    fields: dict[str, Json | None] = {
        **_licence(spec.licence),
        "base_model": spec.base.id if linked else None,
        "base_model_relation": "adapter" if linked else None,
        "library_name": "peft" if type(spec.config) in WRITES else "graftory",
        "pipeline_tag": _pipeline(spec),
        "tags": [word for word in ("graftory", "adapter", spec.method, spec.lineage.process) if _WORD.fullmatch(word)],
        "datasets": sorted({row.data for row in spec.metrics if is_hub_id(row.data)}) or None,
        "metrics": sorted({row.name for row in spec.metrics if _WORD.fullmatch(row.name)}) or None,
        "model-index": _results(record) or None,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _licence(name: str | None) -> dict[str, Json | None]:
    """The licence as the hub spells it (SPDX in small letters), else `other` and its name."""
    if not name:
        return {}
    plain = re.sub(r"-(?:only|or-later)$", "", name.lower())
    return {"license": plain} if plain in _LICENCES.split() else {"license": "other", "license_name": line(name)}


def _pipeline(spec: AdapterSpec) -> str | None:
    if spec.task is None:
        return None
    return _IMAGES if spec.base.architecture == "vit" else _PIPELINES[spec.task.kind]


def _results(record: Record) -> list[Json]:
    """The measured numbers in the hub's form."""
    spec = record.spec
    task = {"type": _pipeline(spec) or "other", **({"name": line(spec.task.name)} if spec.task else {})}
    results: list[Json] = [
        {
            "task": dict(task),
            "dataset": {
                "type": line(row.data) or "unknown",
                "name": line(row.data) or "unknown",
                "split": line(row.split),
                "args": {"split": line(row.split), "rows": row.n},
            },
            "metrics": [{"type": line(row.name) or "unknown", "name": line(row.name), "value": row.value}],
        }
        for row in spec.metrics
    ]
    return [{"name": record.name, "results": results}] if results else []


def _body(record: Record, repo: str) -> Iterator[str]:
    spec = record.spec
    about = f" for the task {code(spec.task.name)} ({_KINDS[spec.task.kind]})" if spec.task else ""
    yield (
        f"An adapter ({spec.method}) of the frozen base model {code(spec.base.id)}{about}. This is version "
        f"{record.version}, made by {code(spec.lineage.process)}, kept with graftory."
    )
    yield from _usage(record, repo)
    if spec.task:
        yield from _task(spec.task)
    if spec.metrics:
        yield "## What was measured"
        yield table(
            ("metric", "value", "data", "split", "rows"),
            [(code(r.name), f"{r.value:.4f}", code(r.data), code(r.split), str(r.n)) for r in spec.metrics],
        )
    yield "## The adapter"
    yield table(("", ""), _method(record))
    yield "## How it was made"
    yield table(("", ""), _making(record))
    yield from _parents(record)
    yield from _missing(record)


def _usage(record: Record, repo: str) -> Iterator[str]:
    spec = record.spec
    yield "## How to use it"
    with_parents = ", with the adapters that it is composed of" if isinstance(spec.config, ComposedConfig) else ""
    yield f"With graftory, which checks every byte and that the base is the right one{with_parents}:"
    answers = spec.task is not None and spec.base.architecture != "vit"
    use = f'predict {record.name}@{record.version} "…"' if answers else f"show {record.name}@{record.version}"
    yield f"```sh\nhub pull hf://{repo}@{record.version}\nhub {use}\n```"
    if type(spec.config) in WRITES:
        yield "With PEFT:"
        yield "\n".join(_with_peft(record, repo))
    else:
        yield f"PEFT does not load it: it has no {spec.method} adapters of this kind."


def _with_peft(record: Record, repo: str) -> Iterator[str]:
    spec = record.spec
    auto = _AUTO.get(_pipeline(spec) or "", "AutoModel")
    known = is_hub_id(spec.base.id, with_owner=spec.base.revision is None)
    commit = spec.base.revision or ""
    revision = f', revision="{commit}"' if known and re.fullmatch(r"[\w.-]+", commit, re.ASCII) else ""
    labels = f", num_labels={spec.task.outputs}" if spec.task and spec.task.outputs else ""
    yield "```python"
    yield "from peft import PeftModel"
    yield f"from transformers import {auto}"
    yield ""
    yield f'base = {auto}.from_pretrained("{spec.base.id if known else "folder of the base model"}"{revision}{labels})'
    yield f'model = PeftModel.from_pretrained(base, "{repo}", revision="v{record.version}")'
    yield "```"


def _task(task: TaskInfo) -> Iterator[str]:
    if task.labels:
        yield "## Labels"
        yield table(("output", "label"), [(str(number), code(label)) for number, label in enumerate(task.labels)])
    if task.template != "{text}":
        yield "## Prompt"
        yield code(task.template)


def _method(record: Record) -> Iterator[tuple[str, str]]:
    config = config_to_json(record.spec.config)
    assert isinstance(config, dict)
    for key, value in config.items():
        if isinstance(value, list | dict):
            if value:
                yield code(key), f"{len(value)}: {code(', '.join(map(_said, value)))}"
        elif value is not None:
            yield code(key), code(str(value))
    if record.spec.task and record.spec.task.head:
        yield "its own head", code(", ".join(record.spec.task.head))
    if record.spec.task:
        yield "longest input, in tokens", str(record.spec.task.max_length)


def _said(value: Json) -> str:
    return str(value.get("path", "")) if isinstance(value, dict) else str(value)


def _making(record: Record) -> Iterator[tuple[str, str]]:
    spec = record.spec
    facts = {
        "digest": record.digest,
        "recorded": record.created,
        "base revision": spec.base.revision,
        "base config fingerprint": spec.base.config_hash,
        "base weights fingerprint": spec.base.weights_hash,
        "tokenizer": spec.base.tokenizer_hash,
        "licence": spec.licence,
        "training data": spec.lineage.data_hash,
        "training seed": spec.lineage.seed,
    }
    yield from ((key, code(str(value))) for key, value in facts.items() if value is not None)
    for row in (spec.lineage.parameters, spec.lineage.libraries):
        yield from ((code(key), code(str(value))) for key, value in sorted(row.items()) if value is not None)


def _parents(record: Record) -> Iterator[str]:
    parents = record.spec.lineage.parents
    if parents:
        yield "## What it was made from"
        rows = [(code(p.ref), p.relation, "" if p.weight is None else f"{p.weight:g}", code(p.digest)) for p in parents]
        yield table(("adapter", "how", "weight", "digest"), rows)


def _missing(record: Record) -> Iterator[str]:
    """What nobody wrote down, and why one would want to know."""
    found = completeness(record)
    if found.gaps:
        yield "## What is not recorded"
        yield f"The record tells {found} facts that are wanted of an adapter made this way. Missing:"
        yield "\n".join(f"- {gap.field}: {gap.remedy.partition(';')[0]}" for gap in found.gaps)
