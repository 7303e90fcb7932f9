"""What lies beside an exported model: a card for people and the same for scripts; saving a model that is in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from graftory.adapter import Adapter, TaskInfo
from graftory.compose.exports.check import ExportCheck
from graftory.compose.exports.staging import staged
from graftory.schema import Json, encode, pretty
from graftory.versions import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT = "graftory_export.json"
"""The card for scripts."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an exported model."""

    model_class: str
    adapter: Adapter | None = None
    ref: str | None = None
    """What the adapter is called in its hub."""
    digest: str | None = None
    head_ref: str | None = None
    head_digest: str | None = None
    task: TaskInfo | None = None
    dtype: str | None = None
    files: tuple[str, ...] = ()
    size: int | None = None
    settings: dict[str, int] = field(default_factory=dict)
    """Values of the configuration that differ from the base's."""
    check: ExportCheck | None = None
    tolerance: float | None = None
    dequantised: bool = False
    graph_inputs: tuple[str, ...] = ()
    """What a graph takes, in order; empty if it is a model of transformers."""


def save_export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    adapter: Adapter | None = None,
) -> Path:
    """Write model, tokenizer and model card so that `AutoModel….from_pretrained(folder)` is all it takes.

    Everything is written beside the folder first and renamed at the end.

    Args:
        model: What `export` returned.
        tokenizer: The base's tokenizer; None to leave it out.
        folder: A folder that does not exist or is empty.
        adapter: What was folded in, for the card.

    Raises:
        ConfigError: If the folder has something in it.
    """
    with staged(folder) as staging:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        dtype = str(model.dtype).removeprefix("torch.")
        task = adapter.spec.task if adapter else None
        write_card(staging, Facts(type(model).__name__, adapter, task=task, dtype=dtype))
    return Path(folder)


def write_card(folder: Path, facts: Facts) -> None:
    """Write the card for people, README.md, and the one for scripts."""
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
    (folder / REPORT).write_bytes(pretty(report(facts)))


def report(facts: Facts) -> dict[str, Json]:
    """Everything about an export, as plain JSON values."""
    spec = facts.adapter.spec if facts.adapter else None
    check = facts.check
    return {
        "format": "graftory-export",
        "schema": 1,
        "class": facts.model_class,
        "base": None if spec is None else encode(spec.base),
        "adapter": {"ref": facts.ref, "digest": facts.digest, "method": spec.method if spec else None},
        "head": {"ref": facts.head_ref, "digest": facts.head_digest},
        "task": encode(facts.task),
        "lineage": None if spec is None else encode(spec.lineage),
        "metrics": [] if spec is None else encode(spec.metrics),
        "licence": None if spec is None else spec.licence,
        "dtype": facts.dtype,
        "files": list(facts.files),
        "bytes": facts.size,
        "settings": encode(facts.settings),
        "dequantised": facts.dequantised,
        "graph_inputs": list(facts.graph_inputs),
        "check": None
        if check is None
        else {
            "max_difference": check.max_difference,
            "rows": check.n,
            "largest_logit": check.largest,
            "tolerance": facts.tolerance,
        },
        "libraries": encode(library_versions()),
    }


def model_card(facts: Facts) -> str:
    """A short README.md: what it is, where it comes from, how to load it, what was measured."""
    adapter = facts.adapter
    header = ["---", "library_name: transformers"]
    lines = [f"{_what(facts)} exported by graftory; it needs neither graftory nor PEFT."]
    if adapter is not None:
        spec = adapter.spec
        header.append(f"base_model: {spec.base.id}")
        header += [f"license: {spec.licence}"] if spec.licence else []
        lines += ["", f"An adapter ({spec.method}) of `{spec.base.id}` is folded in.", ""]
        lines += [f"- {name}: {value}" for name, value in _lineage(facts, adapter)]
        if facts.task is not None:
            lines.append(f"- task: {facts.task.name} ({facts.task.kind})")
        lines += [f"- {row.name} {row.value:.4f} on {row.data}, {row.split}, {row.n} rows" for row in spec.metrics]
    lines += [
        f"- `{name}` of the configuration is {value}: the FFNs are wider" for name, value in facts.settings.items()
    ]
    if facts.dequantised:
        lines.append("- the base was quantised; its weights here are floating-point numbers again")
    lines += ["", *_checked(facts)]
    code = ["```python", *_loading(facts), "```"]
    return "\n".join([*header, "---", "", "# Exported model", "", *lines, "", *code, ""])


def _what(facts: Facts) -> str:
    return f"The graph of a `{facts.model_class}`" if facts.graph_inputs else f"A plain `{facts.model_class}`"


def _loading(facts: Facts) -> list[str]:
    if facts.graph_inputs:
        call = f"logits = model({', '.join(facts.graph_inputs)})"
        return ["import torch", 'model = torch.export.load("model.pt2").module()', call]
    auto = _auto_class(facts.model_class)
    return [f"from transformers import {auto}", f'model = {auto}.from_pretrained("this folder")']


def _lineage(facts: Facts, adapter: Adapter) -> list[tuple[str, str]]:
    lineage = adapter.spec.lineage
    rows = [
        ("adapter", facts.ref and f"{facts.ref}, {facts.digest}"),
        ("head", facts.head_ref and f"{facts.head_ref}, {facts.head_digest}"),
        ("made by", lineage.process),
        *(
            ("parent", f"{parent.ref}, {parent.digest} ({parent.relation}{_weight(parent.weight)})")
            for parent in lineage.parents
        ),
        ("seed", None if lineage.seed is None else str(lineage.seed)),
        ("training data", lineage.data_hash),
        ("base weights", adapter.spec.base.weights_hash),
        ("weights", facts.dtype),
    ]
    return [(name, value) for name, value in rows if value]


def _weight(weight: float | None) -> str:
    return "" if weight is None else f", weight {weight:g}"


def _checked(facts: Facts) -> list[str]:
    check = facts.check
    if check is None:
        return ["It was not compared with base + adapter."]
    return [
        f"On {check.n} real inputs its logits differ from those of base + adapter in fp32 by at most "
        f"{check.max_difference:.2e} (the largest logit is {check.largest:.3g})."
    ]


def _auto_class(name: str) -> str:
    heads = {
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForImageClassification": "AutoModelForImageClassification",
        "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
        "ForCausalLM": "AutoModelForCausalLM",
        "LMHeadModel": "AutoModelForCausalLM",
    }
    return next((auto for ending, auto in heads.items() if name.endswith(ending)), "AutoModel")
