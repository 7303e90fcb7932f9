"""The model card: read back by the hub's own library, and by hostile hands."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Metric, Parent, TaskInfo
from graftory.config import FusionConfig, FusionPlace, LoraConfig
from graftory.hub import Hub
from graftory.hub.codecs import codec_of
from graftory.hub.records import FileEntry, Record, file_entries
from graftory.hub.remotes.card import card, is_untouched
from tests.adapter_samples import make
from tests.conftest import tiny_model
from tests.hub_samples import bottleneck, lora

HOSTILE = "---\nlicense: mit\n# big `code` | <script>alert(1)</script> [x](javascript:1) \"' \\ \x1b[31m"
TOKEN = "hf_CANARYcanaryCANARYcanary0123456789"


def record_of(adapter: Adapter, name: str = "org/trec") -> Record:
    codec = codec_of(adapter.spec)
    files = codec.encode(adapter)
    return Record.new(name, 3, adapter.spec, file_entries(files), codec.check(files, adapter.spec))


def with_spec(adapter: Adapter, **changes: object) -> Record:
    """A record that says something else than the files do: the card is made from the record alone."""
    record = record_of(adapter)
    spec: AdapterSpec = replace(record.spec, **changes)  # type: ignore[arg-type]
    return Record.new(record.name, record.version, spec, record.files, record.tensors)


def written(record: Record) -> str:
    return card(record, repo="me/trec").decode()


def header(record: Record) -> dict[str, Any]:
    data: Any = ModelCard(written(record), ignore_metadata_errors=False).data
    fields: dict[str, Any] = data.to_dict()
    return fields


def test_the_hubs_own_library_reads_it() -> None:
    parent = Parent("base@1", "sha256:" + "1" * 64, "merged", 0.5)
    metrics = (
        Metric("accuracy", 0.925, "org/trec-data", "test", 500),
        Metric("f1", 0.5, "org/trec-data", "test", 500),
    )
    text = written(with_spec(lora(parents=(parent,)), metrics=metrics))
    data: Any = ModelCard(text, ignore_metadata_errors=False).data
    fields: Any = data.to_dict()
    assert (fields["base_model"], fields["base_model_relation"]) == ("org/base", "adapter")
    assert (data.library_name, data.license, data.pipeline_tag) == ("peft", "mit", "text-classification")
    assert (data.datasets, data.metrics) == (["org/trec-data"], ["accuracy", "f1"])
    assert {"graftory", "lora", "train"} <= set(data.tags or ())
    first, second = data.eval_results
    assert (first.metric_type, first.metric_value, first.dataset_split) == ("accuracy", 0.925, "test")
    assert (first.task_type, first.task_name, first.dataset_args) == (
        "text-classification",
        "trec",
        {"split": "test", "rows": 500},
    )
    assert (second.metric_type, second.metric_value) == ("f1", 0.5)
    for said in (
        "hub pull hf://me/trec@3",
        'PeftModel.from_pretrained(base, "me/trec", revision="v3")',
        'from_pretrained("org/base", revision="r1", num_labels=3)',
        "| 0 | `a` |",
        "| `base@1` | merged | 0.5 | `sha256:" + "1" * 64,
        "| `accuracy` | 0.9250 | `org/trec-data` | `test` | 500 |",
        "| training data | `" + "d" * 64,
        "| `learning_rate` | `0.1` |",
        "| `torch` | `2` |",
        "| `rank` | `2` |",
    ):
        assert said in text
    assert "- tokenizer hash: other token numbers" in text.split("## What is not recorded")[1]


@pytest.mark.parametrize(
    ("kind", "architecture", "pipeline", "auto"),
    [
        ("classification", "bert", "text-classification", "AutoModelForSequenceClassification"),
        ("classification", "vit", "image-classification", "AutoModelForImageClassification"),
        ("regression", "bert", "text-classification", "AutoModelForSequenceClassification"),
        ("causal_lm", "llama", "text-generation", "AutoModelForCausalLM"),
        ("seq2seq", "t5", "text2text-generation", "AutoModelForSeq2SeqLM"),
    ],
)
def test_kinds_of_tasks(kind: Any, architecture: str, pipeline: str, auto: str) -> None:
    labels = ("a", "b") if kind == "classification" else ()
    record = with_spec(
        lora(), task=TaskInfo("t", kind, labels=labels), base=BaseModel("org/base", architecture=architecture)
    )
    assert header(record)["pipeline_tag"] == pipeline
    assert f"base = {auto}.from_pretrained(" in written(record)
    assert ("hub predict" in written(record)) == (architecture != "vit")


def test_no_task() -> None:
    record = with_spec(lora(), task=None, metrics=(Metric("loss", 1.0, "x", "test", 1),))
    assert "pipeline_tag" not in header(record)
    assert header(record)["model-index"][0]["results"][0]["task"] == {"type": "other"}
    assert "AutoModel.from_pretrained" in written(record)


def test_what_peft_cannot_load_is_not_called_peft() -> None:
    place = FusionPlace(path="m", track="lora", inputs=4, outputs=4, sources=(0,))
    fusion = with_spec(bottleneck(), config=FusionConfig(targets=("m",), places=(place,), sources=1))
    for record in (record_of(bottleneck()), fusion):
        assert header(record)["library_name"] == "graftory"
        assert "PeftModel" not in written(record)
    assert "adapters that it is composed of" in written(fusion)


@pytest.mark.parametrize(
    ("base", "linked"),
    [
        (BaseModel("org/base"), True),
        (BaseModel("gpt2", revision="e7da7f2"), True),
        (BaseModel("gpt2"), False),
        (BaseModel("wheel:minilm"), False),
        (BaseModel("unknown"), False),
        (BaseModel("/home/alice/models/minilm"), False),
        (BaseModel("../minilm"), False),
        (BaseModel("a/b/c"), False),
        (BaseModel("org/base--x"), False),
    ],
)
def test_only_a_model_of_the_hub_is_linked(base: BaseModel, linked: bool) -> None:
    record = with_spec(lora(), base=base)
    assert ("base_model" in header(record)) == linked
    assert ("base_model_relation" in header(record)) == linked
    assert (f'from_pretrained("{base.id}"' in written(record)) == linked


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        (None, {}),
        ("mit", {"license": "mit"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("GPL-3.0-only", {"license": "gpl-3.0"}),
        ("see the file LICENSE", {"license": "other", "license_name": "see the file LICENSE"}),
    ],
)
def test_the_licence_is_one_that_the_hub_takes(licence: str | None, fields: dict[str, str]) -> None:
    found = header(with_spec(lora(), licence=licence))
    assert {key: value for key, value in found.items() if key.startswith("license")} == fields
    assert ("nobody knows what is allowed" in written(with_spec(lora(), licence=licence))) == (licence is None)


def test_no_secrets_and_no_folders_of_the_maker() -> None:
    lineage = replace(lora().spec.lineage, parameters={"task_source": "/home/alice/tasks/task.yaml", "token": TOKEN})
    record = with_spec(
        lora(),
        lineage=lineage,
        base=BaseModel("C:\\Users\\alice\\models\\minilm"),
        metrics=(Metric("accuracy", 1.0, "~/alice/rows.csv", "test", 3),),
    )
    text = written(record)
    assert "alice" not in text
    assert TOKEN not in text
    for kept in ("…/task.yaml", "…/minilm", "…/rows.csv"):
        assert kept in text


def test_it_depends_on_the_record_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever pushes the next version must recognise the card, with other secrets around."""
    before = written(record_of(lora()))
    monkeypatch.setenv("HF_TOKEN", "accuracy")
    assert written(record_of(lora())) == before


def test_a_changed_card_is_recognised() -> None:
    data = card(record_of(lora()), repo="me/a")
    assert is_untouched(data)
    for other in (
        data.replace(b"accuracy", b"precision"),
        data + b"mine\n",
        b"mine\n" + data,
        b"# mine",
        b"",
        data[:-2],
    ):
        assert not is_untouched(other)


def test_the_given_lines_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's Python, run on folders instead of the hub."""
    model = tiny_model("bert")
    model.base_model.save_pretrained(tmp_path / "base")
    adapter = make(model, LoraConfig(rank=2), labels=3)
    adapter = replace(adapter, spec=replace(adapter.spec, base=replace(adapter.spec.base, id="org/base")))
    hub = Hub.create(tmp_path / "hub")
    hub.put("a", adapter)
    hub.materialize("a", tmp_path / "adapter")
    text = card(hub.record("a"), repo="me/a").decode()
    (lines,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    lines = lines.replace('"org/base"', repr(str(tmp_path / "base"))).replace('"me/a"', repr(str(tmp_path / "adapter")))
    names: dict[str, Any] = {}
    exec(lines, names)
    loaded: Any = names["model"]
    assert isinstance(loaded, PeftModel)
    assert loaded.config.num_labels == 3


def hostile(text: str) -> Record:
    task = TaskInfo(text, "classification", labels=(text, "b", "c"), head=(text,), template=f"{{text}} {text}")
    lineage = replace(
        lora(parents=(Parent(text, text, "merged", 1.0),)).spec.lineage,
        process=text,
        data_hash=text,
        parameters={text: text},
        libraries={text: text},
    )
    record = with_spec(
        lora(),
        base=BaseModel(text, text, text, text, text, text),
        config=LoraConfig(targets=(text,), rank_pattern={text: 3}),
        task=task,
        lineage=lineage,
        metrics=(Metric(text, 0.5, text, text, 3),),
        licence=text,
    )
    return replace(record, files=(FileEntry(text, "0" * 64, 1),))


def check(text: str) -> None:
    whole = written(hostile(text))
    assert is_untouched(whole.encode())
    _, head, body = re.split(r"^---$", whole, maxsplit=2, flags=re.MULTILINE)
    fields = yaml.safe_load(head)
    assert set(fields) <= {
        *("license", "license_name", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags"),
        *("datasets", "metrics", "model-index"),
    }
    assert fields["library_name"] == "peft"
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", tag) for tag in fields["tags"])
    ModelCard(whole, ignore_metadata_errors=False)
    assert not [char for char in body if not char.isprintable() and char != "\n"]
    assert body.count("```") == 4, "the code blocks are ours"
    prose = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    for row in prose.splitlines():
        left = re.sub(r"`[^`<>|\[\]\\]*`|<code>(?:[\w -]|&#[0-9]+;)*</code>|<!-- Made by graftory.*-->", "", row)
        assert not set(left) & set("`<>[]\\&"), "what was typed stands in code"
        assert row.count("|") in (0, 3, 4, 5, 6)
    columns = [row.count("|") for row in prose.split("## What was measured")[1].strip().splitlines()[:3]]
    assert len(set(columns)) == 1, "the cells of a row stay its cells"


def test_typed_text_stays_text() -> None:
    check(HOSTILE)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.one_of(
        st.text(min_size=1, max_size=60),
        st.lists(st.sampled_from([*"`|<>[]()\\\"'#*_-&;:{}~\n\t ", "```", "---", "a"]), min_size=1).map("".join),
    )
)
def test_any_text_stays_text(text: str) -> None:
    check(text)
