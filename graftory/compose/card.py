"""Saving an exported model: a folder that appears whole or not at all, with a card that says what it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from graftory.adapter import Adapter
from graftory.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; give a new one")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(model, adapter), encoding="utf-8")
        staging.chmod(0o777 & ~_umask())
        if target.exists():
            target.rmdir()
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target


def model_card(model: PreTrainedModel, adapter: Adapter | None) -> str:
    """A short README.md: what it is, how to load it, what was measured."""
    header = ["---", "library_name: transformers"]
    lines = [f"A plain `{type(model).__name__}` exported by graftory."]
    if adapter is not None:
        spec = adapter.spec
        header.append(f"base_model: {spec.base.id}")
        header += [f"license: {spec.licence}"] if spec.licence else []
        lines.append(f"An adapter ({spec.method}, made by: {spec.lineage.process}) of `{spec.base.id}` is folded in.")
        if spec.task is not None:
            lines.append(f"Task: {spec.task.name} ({spec.task.kind}).")
        lines += [f"- {row.name} {row.value:.4f} on {row.data}, {row.split}, {row.n} rows" for row in spec.metrics]
    auto = _auto_class(type(model).__name__)
    code = ["```python", f"from transformers import {auto}", f'model = {auto}.from_pretrained("this folder")', "```"]
    return "\n".join([*header, "---", "", "# Exported model", "", *lines, "", *code, ""])


def _auto_class(name: str) -> str:
    heads = {
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForImageClassification": "AutoModelForImageClassification",
        "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
        "ForCausalLM": "AutoModelForCausalLM",
        "LMHeadModel": "AutoModelForCausalLM",
    }
    return next((auto for ending, auto in heads.items() if name.endswith(ending)), "AutoModel")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
