"""QLoRA and LoftQ on a base that bitsandbytes has quantised to 4 bits, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import transformers
from torch import Tensor

from graftory import Adapter, Hub, LoraConfig, attach, base_of
from graftory.errors import BaseMismatchError, ConfigError, UnsupportedAdapterError
from graftory.training import Job, LoadedBase, TrainSettings, evaluate, load_base, train
from graftory.training.quantised import is_quantised, loftq, weight_in_force
from tests.test_cli_train import assert_error, call
from tests.training_samples import save_base, tiny_rows, tiny_task, tokenizer_of

TASK, ROWS = tiny_task("classification"), tiny_rows("classification")
CONFIG = LoraConfig(targets=("all",), rank=4, init_seed=0)
SETTINGS = TrainSettings(epochs=12, batch_size=8, learning_rate=0.02, warmup=0)
QUERY = "bert.encoder.layer.0.attention.self.query"
IDS = torch.arange(4, 16)[None]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny base, and the same in 4 bits."""
    whole, four = (str(tmp_path_factory.mktemp(name)) for name in ("whole", "four"))
    save_base("bert", Path(whole))
    config = transformers.AutoConfig.from_pretrained(whole)
    config.hidden_size, config.intermediate_size = 64, 128  # bitsandbytes' CPU code takes blocks of 64
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(whole)
    tokenizer_of("bert").save_pretrained(four)
    quantised(whole).save_pretrained(four)
    return whole, four


def quantised(folder: str) -> Any:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier"],
    )  # fmt: skip
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, quantization_config=config, num_labels=3).eval()
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # else it would answer in bfloat16
    return model


@pytest.fixture
def loaded(places: tuple[str, str]) -> LoadedBase:
    return load_base(places[1], "classification")


def loss_of(loaded: LoadedBase, adapter: Adapter) -> float:
    ((_, loss),) = evaluate(loaded, [Job("it", adapter, None, TASK, ROWS)])
    return loss.value


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def test_lora_learns_beside_four_bits_and_plain_peft_reads_it(
    loaded: LoadedBase, places: tuple[str, str], tmp_path: Path
) -> None:
    assert is_quantised(loaded.model)
    assert not is_quantised(load_base(places[0], "classification").model)
    first = train(loaded, TASK, ROWS, CONFIG, TrainSettings(max_steps=1, learning_rate=1e-9), name="first")
    before = loss_of(loaded, first)
    adapter = train(
        loaded, TASK, ROWS, CONFIG, SETTINGS, name="more"
    )  # after the base was asked, as packed as it may be
    assert loss_of(loaded, adapter) < 0.6 * before
    hub = Hub.create(tmp_path / "hub")
    folder = hub.materialize(hub.put("q", adapter), tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(quantised(places[0]), str(folder)).eval()
    adapted = attach(loaded.model, {"q": adapter})
    with adapted.route("q"):
        torch.testing.assert_close(logits(adapted), logits(theirs), atol=1e-5, rtol=1e-5)


def test_a_base_that_was_asked_is_the_base_that_was_loaded(loaded: LoadedBase) -> None:
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    first = logits(loaded.model)
    after = loaded.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert torch.equal(logits(loaded.model), first)
    assert base_of(loaded.model).weights_hash == loaded.base.weights_hash


def test_the_weight_in_force_is_what_the_library_makes_of_it(loaded: LoadedBase, places: tuple[str, str]) -> None:
    module: Any = loaded.model.get_submodule(QUERY)
    kept = module.weight
    expected = bitsandbytes.functional.dequantize_4bit(kept.data, kept.quant_state).float()
    torch.testing.assert_close(weight_in_force(module), expected, atol=1e-6, rtol=1e-6)
    whole: Any = load_base(places[0], "classification").model.get_submodule(QUERY)
    torch.testing.assert_close(weight_in_force(whole), whole.weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rank", [4, 16])
def test_loftq_starts_from_the_best_of_its_rank(loaded: LoadedBase, places: tuple[str, str], rank: int) -> None:
    """What it leaves of W − Q are the singular values behind its rank, and the logits come back to the base's."""
    original: Any = load_base(places[0], "classification").model
    config = LoraConfig(targets=("all",), rank=rank, alpha=3.0)
    start = loftq(loaded, original, config)
    resolved = start.spec.config
    assert isinstance(resolved, LoraConfig)
    for path in resolved.targets:
        whole, left = (model.get_submodule(path) for model in (original, loaded.model))
        lost = (weight_in_force(whole) - weight_in_force(left)).double()
        a, b = (start.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
        behind = torch.linalg.svdvals(lost)[rank:].square().sum()
        rest = (lost - resolved.scale_of(path) * b @ a).square().sum()
        torch.testing.assert_close(rest, behind, atol=1e-9, rtol=1e-4)
    adapted = attach(loaded.model, {"start": start})
    apart, body = {}, loaded.model.get_submodule("bert")
    for route in ("start", None):
        with adapted.route(route), torch.no_grad():
            hidden = body(input_ids=IDS).last_hidden_state
            apart[route] = float((hidden - original.bert(input_ids=IDS).last_hidden_state).norm())
    assert apart["start"] < 0.9 * apart[None]


def test_loftq_says_what_does_not_fit(loaded: LoadedBase, places: tuple[str, str], tmp_path: Path) -> None:
    whole = load_base(places[0], "classification")
    with pytest.raises(ConfigError, match="is not quantised"):
        loftq(whole, whole.model, CONFIG)
    other = load_base(save_base("gpt2", tmp_path), "classification").model
    with pytest.raises(BaseMismatchError, match="the original is another model than what was quantised"):
        loftq(loaded, other, CONFIG)


@pytest.mark.parametrize("method", ["adalora", "lokr", "loha", "hra", "dora", "spt"])
def test_methods_that_need_the_base_s_own_weights_are_refused(method: str, loaded: LoadedBase) -> None:
    from graftory.config import CONFIGS

    learning = [weight.requires_grad for weight in loaded.model.parameters()]
    with pytest.raises((ConfigError, UnsupportedAdapterError), match="load the base unquantised"):
        train(loaded, TASK, ROWS, CONFIGS[method](), SETTINGS, name="never")
    assert [weight.requires_grad for weight in loaded.model.parameters()] == learning


def test_from_the_command_line(places: tuple[str, str], tmp_path: Path) -> None:
    whole, four = places
    Hub.create(tmp_path)
    pairs = zip(ROWS.texts, ROWS.targets, strict=True)
    lines = [json.dumps({"text": text, "label": ROWS.labels[int(label)]}) for text, label in pairs]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "task.yaml").write_text(
        "name: tiny\nkind: classification\ndata: {train: rows.jsonl, test: rows.jsonl}\ntext: text\nlabel: label\n"
    )
    common = ("train", str(tmp_path / "task.yaml"), "--base", four, "--max-steps", "2", "--target", "all")
    assert call(tmp_path, *common, "--loftq", whole, "--name", "q").exit_code == 0
    record = Hub.open(tmp_path).record("q")
    assert record.spec.lineage.parameters["loftq"] == whole
    refused = call(tmp_path, *common, "--loftq", whole, "--method", "bottleneck", "--name", "no")
    assert_error(refused, "--loftq is where a fresh lora starts")
    assert call(tmp_path, "export", "q", str(tmp_path / "out"), "--dequantize").exit_code == 0
    adapted = attach(load_base(four, "classification").model, {"q": Hub.open(tmp_path).get("q")})
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with adapted.route("q"):
        torch.testing.assert_close(logits(plain), logits(adapted), atol=1e-4, rtol=1e-4)
