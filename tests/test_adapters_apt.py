"""Adaptive prefix tuning against prefix tuning, whose keys and values are gated here, row by row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftory import Adapter, AdapterConfig, Hub, LoraConfig, attach, export, new_adapter
from graftory.config import AptConfig, PrefixConfig
from graftory.errors import CorruptAdapterError, MergeError, UnsupportedAdapterError
from graftory.hub.codecs import codec_of
from tests.adapter_samples import logits, make, mixed_as_single
from tests.conftest import tiny_batch, tiny_model

CONFIG = AptConfig(length=4)
ENCODERS = ("bert", "roberta", "distilbert", "vit")


def doubled(adapter: Adapter) -> Adapter:
    return replace(adapter, tensors={key: value.double() for key, value in adapter.tensors.items()})


def gated_by_hand(adapter: Adapter, read: dict[str, Tensor], row: int) -> Adapter:
    """The prefixes that one row has, by the paper's formula: λ σ(W h_1) ⊙ P, as an adapter of prefix tuning."""
    tensors = dict(adapter.head_tensors())
    for path in adapter.spec.config.targets:
        own = {part: adapter.tensors[f"{path}.{part}"] for part in CONFIG.parts}
        alpha = torch.sigmoid(own["apt_token.weight"] @ read[path][row, 0])
        for part in ("prefix_keys", "prefix_values"):
            tensors[f"{path}.{part}"] = own["apt_layer"] * alpha[:, None] * own[part]
    plain = PrefixConfig(length=CONFIG.length, targets=adapter.spec.config.targets)
    return Adapter(replace(adapter.spec, config=plain), tensors)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_each_row_has_the_prefixes_of_its_first_token(kind: str) -> None:
    """What the attentions read is recorded in a run with the adapter, and the row is run again with plain prefixes."""
    model, batch = tiny_model(kind).double(), tiny_batch(kind, rows=4)
    adapter = doubled(make(model, CONFIG, labels=2))
    adapted = attach(model, {"it": adapter}, check_base=False)
    read: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: read.__setitem__(path, (*args, *kwargs.values())[0]), with_kwargs=True
        )
        for path in adapter.spec.config.targets
    ]
    with adapted.route("it"), torch.no_grad():
        found = logits(adapted, batch)
    for hook in hooks:
        hook.remove()
    for row in range(4):
        adapted.add(f"row {row}", gated_by_hand(adapter, read, row), check_base=False)
        with adapted.route(f"row {row}"), torch.no_grad():
            one = logits(adapted, {key: value[row : row + 1] for key, value in batch.items()})
        torch.testing.assert_close(found[row], one[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ENCODERS)
def test_mixed_batch_beside_others_equals_single_runs_with_gradients(kind: str) -> None:
    model, batch = tiny_model(kind).double(), tiny_batch(kind, rows=6)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    configs: dict[str, AdapterConfig] = {
        "one": CONFIG,
        "two": AptConfig(length=6),
        "prefix": PrefixConfig(length=3),
        "lora": LoraConfig(rank=2),
    }
    made = {name: doubled(make(model, config, seed=seed)) for seed, (name, config) in enumerate(configs.items())}
    adapted = attach(model, made, check_base=False)
    adapted.train_only(*adapted.names)
    mixed_as_single(adapted, [*made, None, {"one": 1.0, "lora": 0.5}], batch, 1e-9)


@pytest.mark.parametrize("kind", ENCODERS)
def test_it_comes_back_bit_for_bit_and_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    bare, stored, hub = logits(model, batch), make(model, CONFIG, labels=2), Hub.create(tmp_path)
    back = hub.get(hub.put("one", stored))
    adapted = attach(model, {"stored": back})
    out = adapted.extract("stored")
    assert out.spec == back.spec == stored.spec
    assert out.tensors.keys() == stored.tensors.keys()
    assert all(torch.equal(out.tensors[key], value) for key, value in stored.tensors.items())
    adapted.detach()
    assert torch.equal(logits(model, batch), bare)


def test_what_is_refused() -> None:
    for kind in ("gpt2", "t5", "llama"):
        with pytest.raises(UnsupportedAdapterError, match="gates of apt"):
            new_adapter(tiny_model(kind), CONFIG)
    model = tiny_model("bert")
    adapter = make(model, CONFIG)
    with pytest.raises(MergeError, match="keys and values"):
        export(model, adapter)
    codec = codec_of(adapter.spec)
    for part in ("apt_layer", "apt_token.weight", "prefix_values"):
        key = next(key for key in adapter.tensors if key.endswith(part))
        lacking = {other: value for other, value in adapter.tensors.items() if other != key}
        with pytest.raises(CorruptAdapterError, match="shapes"):
            codec.check(codec.encode(replace(adapter, tensors=lacking)), adapter.spec)
