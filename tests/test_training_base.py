"""Loading bases from folders, and the errors for those that are not there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from tokenizers import normalizers

from graftory import LoraConfig, attach
from graftory.adapter import TaskKind
from graftory.adapters.fingerprint import tokenizer_hash
from graftory.compose.exports.stream import export_folder
from graftory.errors import ConfigError, DownloadError
from graftory.training import TrainSettings, load_base, train
from tests.training_samples import FAMILY_OF_KIND, save_base, tiny_rows, tiny_task, tokenizer_of


@pytest.mark.parametrize(("kind", "family"), FAMILY_OF_KIND.items())
def test_every_kind_loads_quietly_and_keeps_its_id(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: TaskKind, family: str
) -> None:
    folder = save_base(family, tmp_path)
    capfd.readouterr()
    loaded = load_base(folder, kind)
    assert capfd.readouterr() == ("", "")
    assert (loaded.base.id, loaded.base.architecture) == (folder, family)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.tokenizer.pad_token_id is not None
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id


def test_the_random_head_is_always_the_same_and_the_callers_seed_is_left_alone(tmp_path: Path) -> None:
    folder = save_base("bert", tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_base(folder, "classification")
    assert torch.rand(3).equal(expected)
    second = load_base(folder, "regression")
    for name, weight in first.model.state_dict().items():
        assert weight.equal(second.model.state_dict()[name]), name
    assert first.base == second.base


def test_missing_and_unsuitable_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no folder '\./nowhere'.*give a folder, a model id"):
        load_base("./nowhere", "classification")
    with pytest.raises(DownloadError, match=r"cannot load 'graftory-tests/none' .*wheel:minilm") as caught:
        load_base("graftory-tests/none", "classification")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be a base for seq2seq"):
        load_base(save_base("bert", tmp_path), "seq2seq")
    with pytest.raises(ConfigError, match="no sample model 'nope'"):
        load_base("wheel:nope", "classification")


def test_the_tokenizer_has_a_hash_that_calls_leave_alone(tmp_path: Path) -> None:
    loaded = load_base(save_base("bert", tmp_path), "classification")
    assert loaded.base.tokenizer_hash == tokenizer_hash(loaded.tokenizer)
    loaded.tokenizer(["w1 w2 w3", "w4"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(loaded.tokenizer) == loaded.base.tokenizer_hash
    assert load_base(str(tmp_path), "regression").base.tokenizer_hash == loaded.base.tokenizer_hash
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", tokenizer_hash(loaded.tokenizer))


def test_the_pad_token_that_is_set_for_padding_is_not_in_the_hash(tmp_path: Path) -> None:
    loaded = load_base(save_base("gpt2", tmp_path), "causal_lm")
    assert loaded.tokenizer.pad_token == "</s>"
    assert loaded.base.tokenizer_hash == tokenizer_hash(tokenizer_of("gpt2"))


@pytest.mark.parametrize("part", ["vocabulary", "pipeline"])
def test_another_vocabulary_or_pipeline_has_another_hash(part: str) -> None:
    tokenizer, other = tokenizer_of("bert"), tokenizer_of("bert")
    assert tokenizer_hash(tokenizer) == tokenizer_hash(other)
    if part == "vocabulary":
        other.add_tokens(["w40"])
    else:
        other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer_hash(tokenizer) != tokenizer_hash(other)


class SlowTokenizer:
    """As much of a slow tokenizer as counts."""

    def __init__(self, *words: str, end: str = "</s>") -> None:
        self.words, self.special_tokens_map = words, {"eos_token": end}

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}


def test_a_slow_tokenizer_has_a_hash_of_class_vocabulary_and_special_tokens() -> None:
    class Another(SlowTokenizer):
        pass

    first = tokenizer_hash(SlowTokenizer("a", "b"))
    assert first == tokenizer_hash(SlowTokenizer("a", "b"))
    others = [SlowTokenizer("b", "a"), SlowTokenizer("a", "b", end="<end>"), Another("a", "b")]
    assert len({first, *map(tokenizer_hash, others)}) == 4


def test_a_base_of_the_hub_is_recorded_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers notes of a download is kept, not the branch that was asked for."""
    folder, load = save_base("bert", tmp_path), transformers.AutoModelForSequenceClassification.from_pretrained

    def downloaded(source: str, **arguments: Any) -> Any:
        model, found = load(source, **arguments)
        model.config._commit_hash = "c" * 40
        return model, found

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", downloaded)
    assert load_base(folder, "classification", revision="main").base.revision == "c" * 40
    monkeypatch.undo()
    assert load_base(folder, "classification").base.revision is None


def classifier_of(labels: int, folder: Path) -> str:
    """A tiny base that has been somebody's classifier."""
    save_base("bert", folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_labels = labels
    torch.manual_seed(1)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_base_may_have_been_a_classifier_of_any_number_of_labels(
    kind: TaskKind, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = classifier_of(5, tmp_path / "five")
    capfd.readouterr()
    loaded = load_base(folder, kind)
    assert capfd.readouterr() == ("", "")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    body = {name: weight for name, weight in loaded.model.state_dict().items() if not name.startswith("classifier")}
    assert all(torch.equal(weight, theirs[name]) for name, weight in body.items())
    assert loaded.model.state_dict()["classifier.weight"].shape[0] == 2
    assert loaded.base.weights_hash == load_base(classifier_of(2, tmp_path / "two"), kind).base.weights_hash


def test_other_weights_of_a_shape_that_the_configuration_denies_are_refused(tmp_path: Path) -> None:
    folder = save_base("bert", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] * 2}))
    with pytest.raises(ConfigError, match=r"layer\.0\.intermediate\.dense\.bias has another shape than the conf"):
        load_base(folder, "classification")


def test_an_adapter_of_such_a_base_is_exported(tmp_path: Path) -> None:
    loaded = load_base(classifier_of(5, tmp_path / "base"), "classification")
    task, rows = tiny_task("classification"), tiny_rows("classification")
    adapter = train(loaded, task, rows, LoraConfig(), TrainSettings(max_steps=2), name="a")
    ids = torch.arange(4, 16)[None]
    told = export_folder(loaded.base.id, adapter, tmp_path / "out", batches=[{"input_ids": ids}])
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    adapted = attach(loaded.model, {"a": adapter})
    with torch.no_grad(), adapted.route("a"):
        expected = adapted(input_ids=ids).logits
        torch.testing.assert_close(plain.eval()(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert told.check is not None
    assert expected.shape == (1, 3)
