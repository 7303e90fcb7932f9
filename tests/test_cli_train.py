"""The commands that load a model, on a tiny random BERT and the committed example task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, PreTrainedTokenizerFast

from graftory import Hub, LoraConfig
from graftory.cli import cli

EXAMPLES = Path(__file__).parent.parent / "examples"
TASK = EXAMPLES / "tickets.yaml"
WORDS = ("my", "the", "a", "is", "not", "card", "charged", "parcel", "app", "refund", "delivery", "order", "phone")
Run = Callable[..., Result]


def make_base(folder: Path, seed: int) -> Path:
    """A tiny random BERT with a word-level tokenizer, saved as transformers saves any model."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), seed=0)


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with `tickets@1` (LoRA) and `bottle@1` (bottleneck)."""
    root = tmp_path_factory.mktemp("trained")
    Hub.create(root)
    common = ("train", TASK, "--base", base, "--max-steps", "6", "--batch-size", "8", "--learning-rate", "0.01")
    for extra in (("--rank", "4"), ("--method", "bottleneck", "--size", "3", "--name", "bottle")):
        result = call(root, *common, *extra)
        assert result.exit_code == 0, result.output
    return root


def call(root: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(root), *map(str, arguments)])


def as_json(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def assert_error(result: Result, *words: str) -> None:
    """One line on the standard error with these words, and exit code 1."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1:] == lines
    for word in words:
        assert word in lines[0]


def test_train_keeps_a_version_with_its_lineage_and_metrics(trained: Path, base: Path) -> None:
    record = Hub.open(trained).record("tickets@1")
    config = record.spec.config
    assert isinstance(config, LoraConfig)
    assert (config.rank, len(config.targets)) == (4, 4)
    assert record.spec.base.id == str(base)
    assert record.spec.lineage.parameters["task_source"] == str(TASK)
    assert record.spec.task is not None
    assert record.spec.task.labels == ("billing", "shipping", "technical")
    (accuracy,) = (metric for metric in record.spec.metrics if metric.name == "accuracy")
    assert accuracy.split == "test"
    assert 0 < accuracy.n < 36
    assert Hub.open(trained).record("bottle@1").spec.method == "bottleneck"


def test_eval_gives_what_training_recorded_and_mixes_adapters(trained: Path) -> None:
    hub = Hub.open(trained)
    measured = as_json(call(trained, "eval", "tickets", "bottle@1", "--json"))
    for row in measured:
        recorded = {metric.name: metric.value for metric in hub.record(row["ref"]).spec.metrics}
        assert row["metric"]["value"] == pytest.approx(recorded[row["metric"]["name"]], abs=1e-5)
    assert {row["ref"] for row in measured} == {"tickets@1", "bottle@1"}
    text = call(trained, "eval", "tickets", "--task", TASK, "--split", "train", "--rows", "5").output
    assert text.splitlines()[0].split() == ["adapter", "metric", "value", "data", "split", "rows"]
    assert text.splitlines()[1].split()[-2:] == ["train", "5"]


def test_predict_gives_labels_that_are_sure_of_themselves(trained: Path, tmp_path: Path) -> None:
    texts = ["my card is charged", "the parcel is not"]
    rows = as_json(call(trained, "predict", "tickets", *texts, "--json"))
    assert [row["text"] for row in rows] == texts
    for row in rows:
        assert row["label"] in ("billing", "shipping", "technical")
        assert 1 / 3 <= row["probability"] <= 1
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts))
    assert as_json(call(trained, "predict", "tickets", "--file", file, "--json")) == rows
    head, line = call(trained, "predict", "tickets", texts[0]).output.splitlines()
    assert head.split() == ["label", "probability", "text"]
    assert line.split()[:2] == [rows[0]["label"], f"{rows[0]['probability']:.3f}"]
    assert line.endswith(texts[0])


def test_continue_starts_from_the_parent(trained: Path, tmp_path: Path) -> None:
    remote = tmp_path.as_uri() + "/hub"
    assert call(trained, "push", "tickets@1", remote).exit_code == 0
    root = tmp_path / "hub"
    arguments = ("train", TASK, "--continue", "tickets@1", "--max-steps", "1", "--learning-rate", "1e-9")
    assert as_json(call(root, *arguments, "--json"))["ref"] == "tickets@2"
    hub = Hub.open(root)
    old, new = hub.get("tickets@1"), hub.get("tickets@2")
    for key, tensor in old.tensors.items():
        torch.testing.assert_close(new.tensors[key], tensor, atol=1e-6, rtol=0)
    (parent,) = new.spec.lineage.parents
    assert (parent.ref, parent.relation, parent.digest) == ("tickets@1", "continued", hub.record("tickets@1").digest)
    assert_error(call(root, *arguments, "--rank", "2"), "--continue")
    assert hub.versions("tickets") == (1, 2)


def test_export_loads_with_plain_transformers(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    result = as_json(call(trained, "export", "tickets@1", folder, "--json"))
    assert result["max_difference"] <= 1e-4
    assert result["rows"] > 0
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert list(model.config.id2label.values()) == ["billing", "shipping", "technical"]
    assert_error(call(trained, "export", "tickets@1", folder), "empty folder")


def test_export_compares_on_a_file(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("my card\nthe parcel\n\nthe app")
    output = call(trained, "export", "tickets@1", tmp_path / "plain", "--input", file).output
    assert "on 3 inputs" in output


def test_export_of_a_bottleneck_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    assert_error(call(trained, "export", "bottle", tmp_path / "plain"), "bottleneck")
    assert list(tmp_path.iterdir()) == []


def test_wrong_base_is_one_line(trained: Path, base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", seed=1)
    for arguments in (("eval", "tickets"), ("predict", "tickets", "text"), ("export", "tickets", tmp_path / "plain")):
        assert_error(call(trained, *arguments, "--base", other), "base")
    assert not (tmp_path / "plain").exists()


def task_file(folder: Path, text: str, rows: bytes = b"message,queue\nhello,billing\n") -> Path:
    """A task beside its data."""
    (folder / "rows.csv").write_bytes(rows)
    path = folder / "task.yaml"
    path.write_text(text)
    return path


GOOD = "name: t\nkind: classification\ndata: {train: rows.csv}\ntext: message\nlabel: queue\n"


@pytest.mark.parametrize(
    ("text", "rows", "words"),
    [
        (GOOD.replace("label: queue", "label: class"), b"message,queue\nhello,billing\n", ("'class'", "queue")),
        (GOOD.replace("rows.csv", "missing.csv"), b"", ("missing.csv",)),
        (GOOD, b"\xff\xfe\x00\x81\x00", ("rows.csv",)),
        (GOOD.replace("kind: classification\n", ""), b"", ("kind",)),
        (GOOD + "lable: queue\n", b"", ("lable",)),
        ("name: [", b"", ("task.yaml",)),
    ],
    ids=["label column", "data file", "unreadable data", "no kind", "unknown key", "no YAML"],
)
def test_a_bad_task_is_one_line_and_leaves_nothing(
    base: Path, tmp_path: Path, text: str, rows: bytes, words: tuple[str, ...]
) -> None:
    Hub.create(tmp_path / "hub")
    path = task_file(tmp_path, text, rows)
    assert_error(call(tmp_path / "hub", "train", path, "--base", base), *words)
    assert Hub.open(tmp_path / "hub").index() == ()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("missing.yaml", "--base", "x"), "missing.yaml"),
        ((TASK,), "--base"),
        ((TASK, "--base", "no/such-model"), "no/such-model"),
        ((TASK, "--base", "./no-such-folder"), "no-such-folder"),
        ((TASK, "--base", "x", "--size", "3"), "--size"),
        ((TASK, "--base", "x", "--rank", "0"), "rank"),
        ((TASK, "--base", "x", "--name", "Not A Name"), "Not A Name"),
        ((TASK, "--continue", "nothing"), "nothing"),
    ],
)
def test_wrong_arguments_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str | Path, ...], word: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Hub.create(tmp_path)
    assert_error(call(tmp_path, "train", *arguments), word)
    assert Hub.open(tmp_path).index() == ()


def test_predict_needs_texts(trained: Path, tmp_path: Path) -> None:
    assert_error(call(trained, "predict", "tickets"), "TEXT")
    assert_error(call(trained, "predict", "tickets", "--file", tmp_path / "missing.txt"), "missing.txt")
