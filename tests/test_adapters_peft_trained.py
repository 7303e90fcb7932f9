"""Methods that PEFT runs against plain PEFT, both ways, over architectures; updates, mixed batches, merges."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftory import Adapter, Hub, attach, new_adapter
from graftory.compose import export, merge, to_lora
from graftory.compose.merge.base import body_of
from graftory.compose.merge.kinds import check_linear, delta_at
from graftory.compose.merge.originals import originals_of
from graftory.compose.merge.peft_kinds import PEFT_DELTAS
from graftory.config import CONFIGS, BottleneckConfig, LoraConfig
from graftory.config.peft import PEFT_CONFIGS, PeftConfig
from graftory.errors import ConfigError, CorruptAdapterError, MergeError, ShapeError, UnsupportedAdapterError
from tests.adapter_samples import shaken, task
from tests.conftest import tiny_batch, tiny_model
from tests.test_peft_agreement import HEAD, TARGETS, logits

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"start_rank": 4, "rank": 2, "alpha": 6.0},
    "lokr": {"rank": 3, "alpha": 7.0, "decompose_both": True, "decompose_factor": 8},
    "loha": {"rank": 3, "alpha": 5.0},
    "vera": {"rank": 6},
    "vblora": {"vectors": 8, "vector_length": 8, "rank": 3},
    "fourierft": {"frequencies": 12},
    "oft": {"block_size": 8},
    "hra": {"rank": 4},
    "ln_tuning": {},
}
"""Sizes for tiny models."""
THEIRS: dict[str, Any] = {
    "adalora": lambda **more: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, **more),
    "lokr": lambda **more: peft.LoKrConfig(r=3, alpha=7, decompose_both=True, **more),
    "loha": lambda **more: peft.LoHaConfig(r=3, alpha=5, **more),
    "vera": lambda **more: peft.VeraConfig(r=6, **more),
    "vblora": lambda **more: peft.VBLoRAConfig(num_vectors=8, vector_length=8, r=3, **more),
    "fourierft": lambda **more: peft.FourierFTConfig(n_frequency=12, **more),
    "oft": lambda **more: peft.OFTConfig(oft_block_size=8, **more),
    "hra": lambda **more: peft.HRAConfig(r=4, **more),
    "ln_tuning": peft.LNTuningConfig,
}
NORMS = {
    "bert": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_f"],
    "llama": ["input_layernorm", "norm"],
    "t5": ["layer_norm"],
    "vit": ["layernorm_before"],
}
METHODS = [config.method for config in PEFT_CONFIGS]
PAIRS = [(method, kind) for method in METHODS for kind in TARGETS]


def fresh_config(method: str, **more: Any) -> PeftConfig:
    config = CONFIGS[method](**OPTIONS[method] | more)
    assert isinstance(config, PeftConfig)
    return config


def does(method: str, kind: str) -> bool:
    """PEFT does some methods on `Linear` alone, and GPT-2 has none."""
    config = CONFIGS[method]
    assert issubclass(config, PeftConfig)
    return kind != "gpt2" or config.transposes or method == "ln_tuning"


def theirs(method: str, kind: str, **more: Any) -> Any:
    """A model with an adapter that PEFT made, far from fresh."""
    targets = NORMS[kind] if method == "ln_tuning" else TARGETS[kind]
    values: dict[str, Any] = {"target_modules": targets, "modules_to_save": [HEAD[kind]]}
    config = CONFIGS[method]
    assert issubclass(config, PeftConfig)
    if config.transposes and kind == "gpt2":
        values["fan_in_fan_out"] = True
    if method in ("loha", "lokr"):
        values |= {"rank_pattern": {targets[0]: 2}, "alpha_pattern": {targets[-1]: 4}}
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(kind), THEIRS[method](**values | more)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize(("method", "kind"), [pair for pair in PAIRS if does(*pair)])
def test_made_by_peft_gives_equal_logits_here(method: str, kind: str, tmp_path: Path) -> None:
    model = theirs(method, kind)
    model.save_pretrained(str(tmp_path / "peft"))
    expected = logits(model, kind)
    hub = Hub.create(tmp_path / "hub")
    ref = hub.add(tmp_path / "peft", name="theirs")
    adapter = hub.get(ref)
    assert adapter.spec.method == method
    base = tiny_model(kind)
    bare = logits(base, kind)
    adapted = attach(base, {"theirs": adapter})
    with adapted.route("theirs"):
        torch.testing.assert_close(logits(adapted, kind), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(adapted, kind), bare)
    assert (expected - bare).abs().max() > 1e-2
    out, again = hub.materialize(ref, tmp_path / "out"), hub.materialize(hub.put("again", adapter), tmp_path / "again")
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    for name in (weights, config):
        assert (out / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    # what we write ourselves is what PEFT writes: tensors byte for byte, the configuration key for key
    assert (again / weights).read_bytes() == (tmp_path / "peft" / weights).read_bytes()
    one, two = (json.loads((each / config).read_text()) for each in (tmp_path / "peft", again))
    elsewhere = {"target_modules", "base_model_name_or_path", "auto_mapping", "task_type", "rank_pattern"}
    elsewhere |= {"fan_in_fan_out", "peft_version", "alpha_pattern", "init_weights"}
    assert set(one) == set(two)
    assert {key: one[key] for key in set(one) - elsewhere} == {key: two[key] for key in set(two) - elsewhere}


def ours(method: str, kind: str, seed: int = 4, **more: Any) -> Adapter:
    """A fresh adapter whose tensors have been moved."""
    fresh = new_adapter(tiny_model(kind), fresh_config(method, **more), task=task(2))
    generator = torch.Generator().manual_seed(seed)
    moved = {key: value + 0.3 * torch.randn(value.shape, generator=generator) for key, value in fresh.tensors.items()}
    return replace(fresh, tensors=moved)


SOME = [(method, list(TARGETS)[(number + step) % 5]) for number, method in enumerate(METHODS) for step in (0, 1, 3)]
"""Three architectures for each method, each in its turn."""


@pytest.mark.parametrize(("method", "kind"), [pair for pair in SOME if does(*pair)])
def test_made_here_loads_in_plain_peft(method: str, kind: str, tmp_path: Path) -> None:
    adapter = ours(method, kind)
    hub = Hub.create(tmp_path / "hub")
    folder = hub.materialize(hub.put("ours", adapter), tmp_path / "peft")
    adapted = attach(tiny_model(kind), {"ours": adapter})
    assert adapted.extract("ours").tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(value, adapter.tensors[key]) for key, value in adapted.extract("ours").tensors.items())
    with adapted.route("ours"):
        here = logits(adapted, kind)
    loaded = peft.PeftModel.from_pretrained(tiny_model(kind), str(folder)).eval()
    torch.testing.assert_close(here, logits(loaded, kind), atol=1e-5, rtol=1e-5)
    assert (here - logits(tiny_model(kind), kind)).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone(method: str) -> None:
    base = tiny_model("bert")
    first, second = (new_adapter(base, fresh_config(method)) for _ in range(2))
    assert all(torch.equal(value, second.tensors[key]) for key, value in first.tensors.items())
    bare = batched(base)
    adapted = attach(base, {"fresh": first})
    with adapted.route("fresh"):
        torch.testing.assert_close(batched(adapted), bare, atol=1e-5, rtol=1e-5)


def batched(model: Any, kind: str = "bert") -> Tensor:
    output: Tensor = model(**tiny_batch(kind)).logits
    return output


def test_rows_of_a_mixed_batch_are_what_they_are_alone_with_gradients() -> None:
    """All methods, LoRA, a bottleneck and the bare base in one batch."""
    adapters = {method: ours(method, "bert") for method in METHODS}
    adapters |= {
        kind.method: shaken(new_adapter(tiny_model("bert"), kind(), task=task(2)), seed=5)
        for kind in (LoraConfig, BottleneckConfig)
    }
    base = tiny_model("bert").double()
    adapted = attach(base, adapters, check_base=False).double()
    batch = tiny_batch("bert", rows=len(adapters) + 1)
    rows = [*adapters, None]
    adapted.train_only(*adapters)
    with adapted.route(rows):
        mixed = adapted(**batch).logits
    mixed.square().sum().backward()
    gradients = {
        name: {key: w.grad.clone() for key, w in adapted.weights(name).items() if w.grad is not None}
        for name in adapters
    }
    adapted.zero_grad()
    for number, name in enumerate(rows):
        one = {key: value[number : number + 1] for key, value in batch.items()}
        with adapted.route(name):
            alone = adapted(**one).logits
        torch.testing.assert_close(mixed[number : number + 1], alone, atol=1e-8, rtol=1e-8)
        if name is None:
            continue
        alone.square().sum().backward()
        for key, weight in adapted.weights(name).items():
            torch.testing.assert_close(gradients[name][key], weight.grad, atol=1e-8, rtol=1e-6)
    with torch.no_grad(), adapted.route([{"lokr": 0.5, "vera": 2.0}] * len(rows), heads="lokr"):
        both = adapted(**batch).logits
    layer = "bert.encoder.layer.0.attention.self.query"
    assert both.isfinite().all()
    assert layer in adapters["lokr"].spec.config.targets


def test_a_mixture_adds_up_what_each_does_at_a_module() -> None:
    adapters = {method: ours(method, "bert", targets=("layer.0.attention.self.query",)) for method in ("lokr", "oft")}
    base = tiny_model("bert").double()
    adapted = attach(base, adapters, check_base=False).double()
    module = base.bert.encoder.layer[0].attention.self.query
    x = torch.randn(3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def through(row: Any) -> Tensor:
        with torch.no_grad(), adapted.route([row] * 3, heads="lokr" if isinstance(row, dict) else None):
            output: Tensor = module(x)
        return output

    bare = through(None)
    expected = bare + 0.5 * (through("lokr") - bare) - 2.0 * (through("oft") - bare)
    torch.testing.assert_close(through({"lokr": 0.5, "oft": -2.0}), expected, atol=1e-10, rtol=1e-10)
    adapted.remove("lokr")
    adapted.remove("oft")
    assert not module._forward_hooks


LINEAR = [config.method for config in PEFT_DELTAS]
WITH_BASE = [(method, kind) for method in LINEAR for kind in ("bert", "gpt2", "llama") if does(method, kind)]


@pytest.mark.parametrize(("method", "kind"), WITH_BASE)
def test_updates_are_peft_s_own(method: str, kind: str, tmp_path: Path) -> None:
    """What PEFT adds to the weights when it merges, in fp64, against the factors."""
    model = theirs(method, kind)
    model.save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    adapter = hub.get(hub.add(tmp_path / "peft", name="theirs"))
    base = tiny_model(kind)
    body = body_of(adapter, 0, originals=originals_of(base, adapter.spec.base))
    check_linear(body)
    model.double()
    for path in adapter.spec.config.targets:
        layer = model.base_model.model.get_submodule(path)
        before = layer.base_layer.weight.detach().clone()
        if method == "fourierft" and kind == "gpt2":
            wanted = layer.get_delta_weight("default").detach()  # PEFT's merge adds it the wrong way round there
        else:
            layer.merge()
            wanted = layer.base_layer.weight.detach() - before
            wanted = wanted.T if kind == "gpt2" else wanted
        got = delta_at(body, path).double().dense()
        assert float((got - wanted).abs().max()) <= 1e-6 * max(1.0, float(wanted.abs().max()))
        assert float(wanted.abs().max()) > 1e-4


OFTS: list[dict[str, Any]] = [
    {"block_share": True},
    {"use_cayley_neumann": False},
    {"coft": True, "eps": 0.9},
    *({"num_cayley_neumann_terms": terms} for terms in (1, 2, 3, 4, 7)),
]


@pytest.mark.parametrize("changes", OFTS)
def test_every_kind_of_oft_is_peft_s_own(changes: dict[str, Any], tmp_path: Path) -> None:
    changes = {"target_modules": ["query"], **changes}
    model = theirs("oft", "bert", **changes)
    model.save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    adapter = hub.get(hub.add(tmp_path / "peft", name="theirs"))
    base = tiny_model("bert")
    merged = merge([adapter], weights=[1.0], base=base)
    expected = logits(model, "bert")
    adapted = attach(base, {"merged": merged})
    with adapted.route("merged"):
        torch.testing.assert_close(logits(adapted, "bert"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_identity_merge_conversion_and_export_keep_the_logits(method: str) -> None:
    base = tiny_model("bert")
    adapter = ours(method, "bert")
    exported = batched(export(base, adapter).eval())
    adapted = attach(base, {"ours": adapter})
    with torch.no_grad(), adapted.route("ours"):
        expected = batched(adapted)
    adapted.detach()
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)
    if method not in LINEAR:
        with pytest.raises(MergeError, match="ln_tuning"):
            merge([adapter], base=base)
        return
    merged = merge([adapter], weights=[1.0], base=base)
    made = to_lora(adapter, base=base)
    assert made.error < 1e-6
    adapted = attach(base, {"merged": merged, "lora": made.adapter})
    for name in ("merged", "lora"):
        assert adapted.spec(name).method == "lora"
        with torch.no_grad(), adapted.route(name):
            torch.testing.assert_close(batched(adapted), expected, atol=1e-5, rtol=1e-5)


def test_conversion_to_a_rank_is_the_best_one_and_says_how_far_it_is() -> None:
    base = tiny_model("bert")
    adapter = ours("lokr", "bert")
    body = body_of(adapter, 0)
    made = to_lora(adapter, rank=3)
    missed = whole = 0.0
    for path in adapter.spec.config.targets:
        values = torch.linalg.svdvals(delta_at(body, path).double().dense())
        assert made.errors[path] == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-4)
        missed, whole = missed + float(values[3:].square().sum()), whole + float(values.square().sum())
    assert made.error == pytest.approx((missed / whole) ** 0.5, rel=1e-4)
    assert 0.01 < made.error < 1
    config = made.adapter.spec.config
    assert isinstance(config, LoraConfig)
    assert config.rank == 3
    with pytest.raises(MergeError, match="needs them"):
        to_lora(ours("hra", "bert"))
    assert to_lora(ours("hra", "bert"), base=base).error < 1e-6


def edited(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor | None]) -> Path:
    """The folder, with keys of its configuration and tensors changed; None takes one out."""
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    held: dict[str, Any] = load_file(weights) | tensors
    save_file({key: value for key, value in held.items() if value is not None}, weights)
    return folder


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
BROKEN: list[tuple[str, dict[str, Any], dict[str, Tensor | None], type[Exception], str]] = [
    ("vera", {}, {"base_model.vera_A": None}, UnsupportedAdapterError, "save_projection=True"),
    ("vera", {"r": 0}, {}, CorruptAdapterError, "rank: got 0"),
    (
        "lokr",
        {},
        {f"{QUERY}.lokr_w2": None, f"{QUERY}.lokr_w2_a": None},
        CorruptAdapterError,
        "wanted lokr_w1, lokr_w2",
    ),
    ("lokr", {}, {f"{QUERY}.lokr_t2": torch.ones(2, 2)}, UnsupportedAdapterError, "lokr_t2"),
    ("lokr", {"use_effective_conv2d": True}, {}, UnsupportedAdapterError, "use_effective_conv2d"),
    ("lokr", {"rank_pattern": {"(a+)+$": 3}}, {}, UnsupportedAdapterError, "rank_pattern"),
    ("hra", {"bias": "all"}, {}, UnsupportedAdapterError, "bias"),
    ("hra", {"r": "four"}, {}, CorruptAdapterError, "rank"),
    ("oft", {"a_feature_of_next_year": 1}, {}, UnsupportedAdapterError, "a_feature_of_next_year"),
    ("vblora", {"save_only_topk_weights": True}, {}, UnsupportedAdapterError, "save_only_topk_weights"),
    ("adalora", {"peft_type": "XLORA"}, {}, UnsupportedAdapterError, "peft_type is 'XLORA', graftory reads LORA, IA3"),
]


@pytest.mark.parametrize(("method", "config", "tensors", "error", "text"), BROKEN, ids=[row[4] for row in BROKEN])
def test_broken_files_are_refused(
    method: str,
    config: dict[str, Any],
    tensors: dict[str, Tensor | None],
    error: type[Exception],
    text: str,
    tmp_path: Path,
) -> None:
    theirs(method, "bert").save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    with pytest.raises(error, match=text):
        hub.add(edited(tmp_path / "peft", config, tensors), name="broken")
    assert hub.index() == ()


def test_a_specification_that_says_something_else_is_refused(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    out = hub.materialize(hub.put("a", ours("loha", "bert")), tmp_path / "out")
    sidecar = json.loads((out / "graftory.json").read_text())
    sidecar["spec"]["config"]["alpha"] = 9.0
    (out / "graftory.json").write_text(json.dumps(sidecar))
    with pytest.raises(CorruptAdapterError, match="alpha is 5, alpha of the spec"):
        hub.add(out, name="b")


def test_two_versions_are_compared_with_what_their_modules_share(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    for name, seed in (("one", 1), ("two", 2)):
        hub.put(name, ours("vera", "bert", seed))
    found = {change.name for change in hub.diff("one", "two").tensors}
    assert {"vera_A", "vera_B"} < found


@pytest.mark.parametrize(
    "where",
    [
        {"target_modules": r".*layer\.1\.attention\.self\.(key|value)"},
        {"target_modules": ["key", "value"], "layers_to_transform": [1]},
        {"target_modules": ["key", "value"], "exclude_modules": r".*layer\.0.*"},
    ],
    ids=["expression", "layers", "excluded"],
)
def test_whatever_says_where_becomes_explicit_paths(where: dict[str, Any], tmp_path: Path) -> None:
    theirs("hra", "bert", **where).save_pretrained(str(tmp_path / "peft"))
    hub = Hub.create(tmp_path / "hub")
    targets = hub.record(hub.add(tmp_path / "peft", name="theirs")).spec.config.targets
    assert targets == tuple(f"bert.encoder.layer.1.attention.self.{part}" for part in ("key", "value"))


def test_tensors_that_peft_cannot_load_are_refused_and_nothing_stays() -> None:
    adapter = ours("hra", "bert")
    path = f"{adapter.spec.config.targets[0]}.hra_u"
    base = tiny_model("bert")
    wrong = {**adapter.tensors, path: torch.ones(31, 4)}, {k: v for k, v in adapter.tensors.items() if k != path}
    for tensors in wrong:
        with pytest.raises(ShapeError):
            attach(base, {"wrong": replace(adapter, tensors=tensors)})
        assert not any(module._forward_hooks for module in base.modules())


def test_what_a_method_cannot_do_is_said_before_anything_is_made() -> None:
    with pytest.raises(UnsupportedAdapterError, match="PEFT does lokr on Linear alone; take lora, adalora"):
        new_adapter(tiny_model("gpt2"), fresh_config("lokr"))
    with pytest.raises(ConfigError, match="must be divisible by `vector_length` 64"):
        new_adapter(tiny_model("bert"), fresh_config("vblora", vector_length=64))
    with pytest.raises(UnsupportedAdapterError, match="fits no norm"):
        new_adapter(tiny_model("bert"), fresh_config("ln_tuning", targets=("query",)))
    with pytest.raises(ConfigError, match="leaves none to shrink ranks in"):
        fresh_config("adalora", tinit=5, tfinal=5, total_step=10)
