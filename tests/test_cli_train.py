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
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from graftory import Hub, LoraConfig
from graftory.cli import cli

EXAMPLES = Path(__file__).parent.parent / "examples"
TASK = EXAMPLES / "tickets.yaml"
WORDS = ("my", "the", "a", "is", "not", "card", "charged", "parcel", "app", "refund", "delivery", "order", "phone")
Run = Callable[..., Result]


def save_tokenizer(folder: Path) -> int:
    """A word-level tokenizer of a few words, saved; returns the size of its vocabulary."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, eos_token="[SEP]", **names)
    fast.save_pretrained(folder)
    return len(special) + len(WORDS)


def make_base(folder: Path, seed: int) -> Path:
    """A tiny random BERT with its tokenizer, saved as transformers saves any model."""
    words = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=words,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def make_writer(folder: Path, kind: str) -> Path:
    """A tiny random model that writes: a Llama or a T5."""
    words = save_tokenizer(folder)
    torch.manual_seed(0)
    if kind == "causal_lm":
        llama = LlamaConfig(
            vocab_size=words,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
        LlamaForCausalLM(llama).save_pretrained(folder)
    else:
        t5 = T5Config(
            vocab_size=words,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=3,
        )
        t5.decoder_start_token_id = 0
        T5ForConditionalGeneration(t5).save_pretrained(folder)
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


def test_heads_can_start_where_they_fit(base: Path, tmp_path: Path) -> None:
    Hub.create(tmp_path)
    arguments = ("train", TASK, "--base", base, "--max-steps", "1", "--learning-rate", "1e-9", "--name", "a")
    assert as_json(call(tmp_path, *arguments, "--json"))["ref"] == "a@1"
    assert as_json(call(tmp_path, *arguments, "--head-start", "probe", "--json"))["ref"] == "a@2"
    random, probed = (Hub.open(tmp_path).get(ref) for ref in ("a@1", "a@2"))
    assert all(torch.allclose(tensor, random.tensors[key]) for key, tensor in probed.body_tensors().items())
    assert all(not torch.allclose(tensor, random.tensors[key]) for key, tensor in probed.head_tensors().items())
    assert Hub.open(tmp_path).record("a@2").spec.lineage.parameters["head_start"] == "probe"
    assert "is not one of 'random', 'probe'" in call(tmp_path, *arguments, "--head-start", "best").output


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


@pytest.mark.parametrize(
    ("kind", "target"),
    [("causal_lm", "target: queue"), ("seq2seq", "target: queue"), ("regression", "label: weight")],
)
def test_every_kind_of_task_goes_all_the_way(base: Path, tmp_path: Path, kind: str, target: str) -> None:
    model = base if kind == "regression" else make_writer(tmp_path / "writer", kind)
    rows = "message,queue,weight\n" + "my card,refund,1.5\nthe parcel,order,2.5\nthe app,phone,0\n" * 3
    text = f"name: t\nkind: {kind}\ndata: {{train: rows.csv, test: rows.csv}}\ntext: message\n{target}\n"
    root = tmp_path / "hub"
    Hub.create(root)
    task = task_file(tmp_path, text, rows.encode())
    trained = as_json(call(root, "train", task, "--base", model, "--max-steps", "2", "--json"))
    assert trained["ref"] == "t@1"
    measured = {row["metric"]["name"]: row["metric"]["value"] for row in as_json(call(root, "eval", "t", "--json"))}
    assert measured == pytest.approx({metric["name"]: metric["value"] for metric in trained["metrics"]}, abs=1e-5)
    (answer,) = as_json(call(root, "predict", "t", "my card", "--json"))
    assert isinstance(answer.get("value", answer.get("written")), float if kind == "regression" else str)
    file = tmp_path / "texts.txt"
    file.write_text("the card\nmy parcel is not")
    for number, extra in enumerate(((), ("--input", str(file)))):
        result = as_json(call(root, "export", "t", tmp_path / f"plain{number}", "--json", *extra))
        assert result["max_difference"] <= 1e-4
        assert result["rows"] == (2 if extra else 9)


def test_checkpoints_belong_to_one_training(base: Path, tmp_path: Path) -> None:
    Hub.create(tmp_path / "hub")
    common = ("train", TASK, "--base", base, "--max-steps", "2", "--save-steps", "1", "--checkpoints", tmp_path / "run")
    first = as_json(call(tmp_path / "hub", *common, "--json"))
    assert list((tmp_path / "run").iterdir())
    again = as_json(call(tmp_path / "hub", *common, "--json"))
    assert again == first
    assert_error(call(tmp_path / "hub", *common, "--rank", "2"), "another training")


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
        result = call(trained, *arguments, "--base", other)
        assert_error(result, "pass the right base" if arguments[0] == "export" else "adapter 'tickets' was trained on")
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
