"""The model card: read back by the hub's own library, and by hostile hands."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Metric, Parent, TaskInfo
from graftory.hub.codecs import codec_of
from graftory.hub.records import Record, file_entries
from graftory.hub.remotes.card import card
from tests.hub_samples import bottleneck, lora

HOSTILE = "---\nlicense: mit\n# big `code` | <script>alert(1)</script> [x](javascript:1) \"' \\ \x1b[31m"


def record_of(adapter: Adapter, name: str = "org/trec") -> Record:
    codec = codec_of(adapter.spec)
    files = codec.encode(adapter)
    return Record.new(name, 3, adapter.spec, file_entries(files), codec.check(files, adapter.spec))


def with_spec(adapter: Adapter, **changes: object) -> Adapter:
    spec: AdapterSpec = replace(adapter.spec, **changes)  # type: ignore[arg-type]
    return replace(adapter, spec=spec)


def test_the_hubs_own_library_reads_it() -> None:
    parent = Parent("base@1", "sha256:" + "1" * 64, "merged", 0.5)
    adapter = lora(parents=(parent,))
    adapter = with_spec(adapter, metrics=(Metric("accuracy", 0.925, "org/trec-data", "test", 500),))
    text = card(record_of(adapter), repo="me/trec").decode()
    data: Any = ModelCard(text, ignore_metadata_errors=False).data
    assert data.base_model == "org/base"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert (data.library_name, data.license, data.pipeline_tag) == ("peft", "mit", "text-classification")
    assert data.datasets == ["org/trec-data"]
    assert {"graftory", "lora", "train"} <= set(data.tags or ())
    (result,) = data.eval_results or ()
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.925, "test")
    for said in ("hub pull hf://me/trec@3", "PeftModel", 'revision="v3"', "num_labels=3", "`a`", "base@1", "merged"):
        assert said in text
    assert "0.9250" in text
    assert "tokenizer hash" in text.split("## What is not recorded")[1]


def test_what_peft_cannot_load_is_not_called_peft() -> None:
    text = card(record_of(bottleneck()), repo="me/neck").decode()
    data: Any = ModelCard(text).data
    assert data.library_name == "graftory"
    assert "PeftModel" not in text


def test_a_base_that_is_no_model_id_is_not_linked() -> None:
    adapter = with_spec(lora(), base=BaseModel("wheel:minilm"), licence="see the file LICENSE")
    card_data: Any = ModelCard(card(record_of(adapter), repo="me/a").decode()).data
    data = card_data.to_dict()
    assert "base_model" not in data
    assert "license" not in data


def hostile(text: str) -> Adapter:
    task = TaskInfo(text, "classification", labels=(text, "b", "c"), head=("classifier",), template=f"{{text}} {text}")
    changes = {
        "base": BaseModel(text, revision=text),
        "task": task,
        "metrics": (Metric(text, 0.5, text, text, 3),),
        "licence": text,
    }
    lineage = replace(lora().spec.lineage, process=text, parameters={text: text}, libraries={text: text})
    return with_spec(lora(), lineage=lineage, **changes)


def check(text: str) -> None:
    written = card(record_of(hostile(text)), repo="me/a").decode()
    _, header, body = re.split(r"^---$", written, maxsplit=2, flags=re.MULTILINE)
    fields = yaml.safe_load(header)
    assert fields["tags"] == ["graftory", "lora", text]
    assert "<script" not in re.sub(r"`[^`\n]*`", "", body.replace("```", ""))
    assert not [char for char in body if not char.isprintable() and char != "\n"]
    assert body.count("```") == 4, "the code blocks are ours"


def test_typed_text_stays_text() -> None:
    check(HOSTILE)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.text(min_size=1, max_size=60))
def test_any_text_stays_text(text: str) -> None:
    check(text)
