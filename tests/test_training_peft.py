"""Training the methods that PEFT runs: they learn, keep the base, are measured together; AdaLoRA takes ranks away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from transformers.quantizers import quantizer_bnb_4bit

from graftory import Adapter, Hub, attach
from graftory.cli import cli
from graftory.config import LoraConfig
from graftory.config.peft import PEFT_CONFIGS, AdaloraConfig
from graftory.errors import ConfigError
from graftory.settings import TrainSettings
from graftory.training import Job, LoadedBase, evaluate, load_base, train
from graftory.training.recipes.adalora import steps_of
from tests.test_adapters_peft_trained import fresh_config
from tests.test_cli_train import TASK, as_json, assert_error, call, make_base
from tests.training_samples import save_base, tiny_base, tiny_rows, tiny_task

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    # of its own AdaLoRA's
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
METHODS = [config.method for config in PEFT_CONFIGS]
RATES = {"oft": 0.03, "fourierft": 0.3, "vera": 0.1, "vblora": 0.1}
SETTINGS = TrainSettings(epochs=12, batch_size=8, learning_rate=0.02, warmup=0)
TASK_OF, ROWS = tiny_task("classification"), tiny_rows("classification")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    return tiny_base("classification", tmp_path_factory.mktemp("base"))


def trained(loaded: LoadedBase, method: str, settings: TrainSettings = SETTINGS, **more: Any) -> Adapter:
    return train(loaded, TASK_OF, ROWS, fresh_config(method, **more), settings, name=method)


def loss_of(loaded: LoadedBase, *adapters: Adapter) -> list[float]:
    jobs = [Job(str(number), adapter, None, TASK_OF, ROWS) for number, adapter in enumerate(adapters)]
    return [next(m.value for m in metrics if m.name == "loss") for metrics in evaluate(loaded, jobs)]


@pytest.fixture(scope="module")
def adalora(loaded: LoadedBase) -> Adapter:
    return trained(loaded, "adalora")


@pytest.fixture(scope="module")
def each(loaded: LoadedBase, adalora: Adapter) -> dict[str, Adapter]:
    made = {"adalora": adalora}
    for method in METHODS[1:]:
        rate = RATES.get(method, SETTINGS.learning_rate)
        settings = TrainSettings(epochs=12, batch_size=8, learning_rate=rate, warmup=0)
        made[method] = trained(loaded, method, settings)
    return made


def test_all_learn_and_the_base_stays(loaded: LoadedBase, each: dict[str, Adapter], tmp_path: Path) -> None:
    assert all(weight.requires_grad for weight in loaded.model.parameters())  # all of them have been trained on it
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    head_alone = train(loaded, TASK_OF, ROWS, LoraConfig(targets=("layer.0.attention.self.key",), rank=1),
                       TrainSettings(max_steps=1, learning_rate=1e-9), name="fresh")  # fmt: skip
    (start,) = loss_of(loaded, head_alone)
    alone = [loss_of(loaded, adapter)[0] for adapter in each.values()]
    together = loss_of(loaded, *each.values())
    assert together == pytest.approx(alone, abs=1e-5)
    assert all(loss < 0.5 * start for loss in together), dict(zip(each, together, strict=True))
    after = loaded.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    hub = Hub.create(tmp_path / "hub")
    for method, adapter in each.items():
        kept = hub.get(hub.put(method, adapter))
        assert kept.spec.config == adapter.spec.config
        assert all(torch.equal(value, adapter.tensors[key]) for key, value in kept.tensors.items())


def test_training_again_gives_the_same_bits(loaded: LoadedBase, each: dict[str, Adapter]) -> None:
    again = trained(loaded, "lokr")
    assert all(torch.equal(value, each["lokr"].tensors[key]) for key, value in again.tensors.items())


def test_adalora_takes_ranks_away_and_plain_peft_loads_what_is_left(adalora: Adapter, tmp_path: Path) -> None:
    config = adalora.spec.config
    assert isinstance(config, AdaloraConfig)
    assert config.rank_pattern is not None
    assert config.total_step == steps_of(SETTINGS, len(ROWS)) == 36
    left = {path: len(adalora.tensors[f"{path}.lora_E"]) for path in config.targets}
    assert left == {key.removesuffix(".lora_E"): sum(kept) for key, kept in config.rank_pattern.items()}
    assert sum(left.values()) == config.rank * len(left) < config.start_rank * len(left)
    assert len(set(left.values())) > 1
    hub = Hub.create(tmp_path / "hub")
    folder = hub.materialize(hub.put("adalora", adalora), tmp_path / "peft")
    base = tiny_base("classification", tmp_path / "base")
    three = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    theirs = peft.PeftModel.from_pretrained(three, str(folder)).eval()
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    adapted = attach(base.model, {"ours": adalora})
    with torch.no_grad(), adapted.route("ours"):
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_continued_adalora_keeps_its_ranks(loaded: LoadedBase, adalora: Adapter) -> None:
    first = adalora
    settings = TrainSettings(max_steps=3, batch_size=8, learning_rate=0.01)
    second = train(loaded, TASK_OF, ROWS, first.spec.config, settings, name="more", init=first)
    assert second.spec.config == first.spec.config
    assert {k: v.shape for k, v in second.tensors.items()} == {k: v.shape for k, v in first.tensors.items()}
    assert any(not torch.equal(value, first.tensors[key]) for key, value in second.tensors.items())


def test_adalora_says_what_it_cannot_do(loaded: LoadedBase, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leaves none to shrink ranks in"):
        trained(loaded, "adalora", tinit=20, tfinal=20)
    with pytest.raises(ConfigError, match="train without --checkpoints"):
        train(loaded, TASK_OF, ROWS, fresh_config("adalora"), SETTINGS, name="x", output_dir=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_quantised_base_without_its_library_is_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(save_base("bert", tmp_path))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Using `bitsandbytes` requires bitsandbytes: `pip install -U bitsandbytes`")

    monkeypatch.setattr(quantizer_bnb_4bit.Bnb4BitHfQuantizer, "validate_environment", missing)
    with pytest.raises(ConfigError, match=r"requires bitsandbytes.*or give the unquantised model"):
        load_base(str(folder), "classification")


def test_from_the_command_line(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", seed=0)
    Hub.create(tmp_path)
    common = ("train", TASK, "--base", base, "--max-steps", "4", "--batch-size", "8", "--learning-rate", "0.01")
    options = ("--rank", "3", "--alpha", "6", "--decompose-both", "--decompose-factor", "8")
    assert call(tmp_path, *common, "--method", "lokr", "--name", "lokr", *options).exit_code == 0
    assert call(tmp_path, *common, "--method", "hra", "--name", "hra", "--rank", "2").exit_code == 0
    assert call(tmp_path, *common, "--method", "lora", "--name", "lora").exit_code == 0
    rows = as_json(call(tmp_path, "eval", "lokr", "hra", "lora", "--json"))
    hub = Hub.open(tmp_path)
    for row in rows:
        recorded = {metric.name: metric.value for metric in hub.record(row["ref"]).spec.metrics}
        assert row["metric"]["value"] == pytest.approx(recorded[row["metric"]["name"]], abs=1e-5)
    assert as_json(call(tmp_path, "predict", "lokr", "How far is the moon?", "--json"))
    out = tmp_path / "out"
    assert call(tmp_path, "export", "lokr", out, "--format", "peft").exit_code == 0
    said = json.loads((out / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["alpha"], said["decompose_both"]) == ("LOKR", 3, 6, True)
    assert call(tmp_path, "add", out, "--name", "back").exit_code == 0
    assert hub.record("back").files == hub.record("lokr").files
    made = as_json(call(tmp_path, "convert", "lokr", "--name", "plain", "--json"))
    assert made["error"] < 1e-6
    assert hub.record("plain").spec.lineage.parents[0].ref == "lokr@1"
    result = call(tmp_path, "convert", "hra", "--name", "low", "--rank", "1")
    assert result.exit_code == 0, result.output
    assert "relative error" in result.output
    score = {row["ref"]: row["metric"]["value"] for row in rows if row["metric"]["name"] == "loss"}
    again = as_json(call(tmp_path, "eval", "plain", "--task", TASK, "--json"))
    assert next(r["metric"]["value"] for r in again if r["metric"]["name"] == "loss") == pytest.approx(
        score["lokr@1"], abs=1e-4
    )
    assert_error(call(tmp_path, *common, "--method", "hra", "--alpha", "3"), "--alpha", "not to hra")
    assert "lokr, loha" in CliRunner().invoke(cli, ["train", "--help"]).output.replace("\n", " ")
