"""Every kind of linear adapter as updates: identity merges, sums of unlike kinds, and what they are stored as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.adapters import attach, base_of, new_adapter
from graftory.compose import METHODS, export, merge, needs_base
from graftory.compose.merge.kinds import KINDS
from graftory.config import (
    AdapterConfig,
    BitfitConfig,
    DoraConfig,
    Ia3Config,
    LoraConfig,
    SparseUpdateConfig,
    UpdateConfig,
)
from graftory.config.peft import PeftConfig
from graftory.errors import BaseMismatchError, MergeError
from graftory.hub import Hub
from tests.merge_oracles import ties
from tests.test_adapters_sparse_update import sparse
from tests.test_compose_export import IDS, bert, gpt2, llama, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MODELS: Mapping[str, Callable[[], Any]] = {"bert": bert, "gpt2": gpt2, "llama": lambda: llama(False)}
SETTINGS: Mapping[type[AdapterConfig], Mapping[str, Any]] = {
    LoraConfig: {"rank": 3, "alpha": 7.0, "rslora": True},
    DoraConfig: {"rank": 3, "alpha": 7.0},
    UpdateConfig: {"rank": 2, "rows": True, "columns": True},
}
"""What is asked for beside a kind's defaults."""


def of_kind(model: Any, kind: type[AdapterConfig], seed: int = 0, **fields: Any) -> Adapter:
    """An adapter of a kind on every linear layer (BitFit: on norms too) whose tensors have all been moved."""
    if kind is SparseUpdateConfig:
        return sparse(model, (9, 0, 40), seed, labels=0, lora=("qv",))
    settings = {"targets": () if kind is BitfitConfig else ("all",), **SETTINGS.get(kind, {}), **fields}
    fresh = new_adapter(model, kind(**settings))
    generator = torch.Generator().manual_seed(seed)
    moved = {
        key: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for key, tensor in fresh.tensors.items()
    }
    if model.config.model_type == "llama":  # which has no biases that could hold one
        moved = {key: torch.zeros_like(one) if key.endswith("bias_delta") else one for key, one in moved.items()}
    return replace(fresh, tensors=moved)


CASES = [
    (name, kind)
    for name in MODELS
    for kind in KINDS
    if not (kind is BitfitConfig and name == "llama") and not issubclass(kind, PeftConfig)
]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind.method}" for name, kind in CASES])
def test_one_adapter_at_weight_one_keeps_the_logits(name: str, kind: type[AdapterConfig]) -> None:
    model = MODELS[name]()
    adapter = of_kind(model, kind)
    plain = logits_of(model)
    merged = merge([adapter], weights=[1.0], base=model)
    exported = logits_of(export(model, merged))
    adapted = attach(model, {"given": adapter, "merged": merged})
    with torch.no_grad(), adapted.route(["given", "merged"]):
        wanted, got = adapted(input_ids=IDS[:1].repeat(2, 1)).logits
    assert float((wanted - plain[0]).abs().max()) > 1e-2, "the adapter does something"
    assert float((got - wanted).abs().max()) < 1e-5
    assert float((exported[0] - wanted).abs().max()) < 1e-5


def weights_of(model: Any, adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter adds to every weight, by folding it in: code that knows nothing of factors."""
    plain, folded = model.state_dict(), export(model, adapter).state_dict()
    return {key: folded[key].double() - plain[key].double() for key in plain}


FOUR = (LoraConfig, DoraConfig, Ia3Config, BitfitConfig)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_unlike_kinds_add_up_exactly_and_are_an_update(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    adapters = [of_kind(model, kind, seed) for seed, kind in enumerate(FOUR)]
    weights = [0.5, -1.25, 2.0, 0.75]
    merged = merge(adapters, weights=weights, base=model)
    assert isinstance(merged.spec.config, UpdateConfig)
    each = [weights_of(model, adapter) for adapter in adapters]
    got = weights_of(model, merged)
    for key, found in got.items():
        wanted = sum(weight * one[key] for weight, one in zip(weights, each, strict=True))
        assert isinstance(wanted, Tensor)
        assert float((found - wanted).abs().max()) < 3e-6
    matrices = [tensor for tensor in merged.tensors.values() if tensor.dim() == 2]
    assert all(min(tensor.shape) <= 6 for tensor in matrices), "factors of rank 3 + 3"
    hub = Hub.create(tmp_path / "hub")
    again = hub.get(hub.put("merged", merged))
    assert again.spec == merged.spec
    assert all(torch.equal(tensor, again.tensors[key]) for key, tensor in merged.tensors.items())
    twice = merge([again, adapters[1]], weights=[1.0, 1.25], base=model)
    for key, found in weights_of(model, twice).items():
        assert float((found - got[key] - 1.25 * each[1][key]).abs().max()) < 3e-6


def test_rows_of_a_mixed_batch_have_each_their_own_update() -> None:
    model = bert()
    parts = [of_kind(model, UpdateConfig, seed) for seed in (1, 2)]
    lora = of_kind(model, LoraConfig, 3)
    adapted = attach(model, {"one": parts[0], "two": parts[1], "lora": lora})
    rows = ["two", None, "one", "lora", {"one": 0.5, "two": 2.0}]
    with torch.no_grad():
        with adapted.route(rows):
            together = adapted(input_ids=IDS[:1].repeat(5, 1)).logits
        for number, row in enumerate(rows):
            with adapted.route([row]):
                assert float((adapted(input_ids=IDS[:1]).logits[0] - together[number]).abs().max()) < 1e-5
    mixed = merge(parts, weights=[0.5, 2.0], base=adapted.detach())
    adapted = attach(model, {"mixed": mixed})
    with torch.no_grad(), adapted.route("mixed"):
        assert float((adapted(input_ids=IDS[:1]).logits[0] - together[4]).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ((Ia3Config, Ia3Config), Ia3Config),
        ((BitfitConfig, BitfitConfig), BitfitConfig),
        ((LoraConfig, LoraConfig), LoraConfig),
        ((DoraConfig, DoraConfig), UpdateConfig),
        ((LoraConfig, BitfitConfig), UpdateConfig),
    ],
)
def test_the_result_is_of_the_plainest_kind(kinds: tuple[type[AdapterConfig], ...], wanted: Any) -> None:
    model = bert()
    adapters = [of_kind(model, kind, seed) for seed, kind in enumerate(kinds)]
    merged = merge(adapters, weights=[0.5, 2.0], base=model if needs_base(adapters) else None)
    assert type(merged.spec.config) is wanted
    assert needs_base(adapters) == bool({Ia3Config, DoraConfig} & set(kinds))


def test_the_rank_of_a_sum_that_scales_the_base_is_cut_to_the_best() -> None:
    model = bert()
    adapters = [of_kind(model, kind, seed) for seed, kind in enumerate(FOUR)]
    exact, short = (weights_of(model, merge(adapters, rank=rank, base=model)) for rank in (None, 4))
    for key, wanted in exact.items():
        best = best_of_rank(wanted, 4) if wanted.dim() == 2 else wanted
        assert float((short[key] - best).abs().max()) < 1e-5


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    best: Tensor = u[:, :rank] * s[:rank] @ vt[:rank]
    return best


@pytest.mark.parametrize("method", sorted(name for name, row in METHODS.items() if row.params().reads == "nothing"))
def test_every_merge_in_delta_space_takes_unlike_kinds_or_says_no(method: str) -> None:
    model = bert()
    adapters = [of_kind(model, kind, seed) for seed, kind in enumerate(FOUR)]
    if METHODS[method].space != "delta":
        with pytest.raises(MergeError, match=r"different methods.*merge each kind alone"):
            merge(adapters, method, base=model)
        return
    moved = weights_of(model, merge(adapters, method, base=model))
    each = [weights_of(model, adapter) for adapter in adapters]
    for key, found in moved.items():
        assert bool(torch.isfinite(found).all())
        assert bool(found.any()) == any(bool(one[key].any()) for one in each), (
            f"{key} changes as it does in one of them"
        )


@pytest.mark.parametrize("kind", [DoraConfig, Ia3Config])
def test_ties_of_what_scales_the_base_is_ties_of_the_weights(kind: type[AdapterConfig]) -> None:
    model = bert()
    adapters = [of_kind(model, kind, seed) for seed in (1, 2, 3)]
    got = weights_of(model, merge(adapters, "ties", base=model))
    each = [weights_of(model, adapter) for adapter in adapters]
    for key, found in got.items():
        changes = [one[key] for one in each if bool(one[key].any())]
        if changes:
            assert float((found - ties(changes, [1.0] * 3, 0.2)).abs().max()) < 1e-5


@pytest.mark.parametrize(("method", "factor"), [("linear", 1.0), ("svd", 1.0), ("tsv", 1 / 1.75), ("knots", 1 / 1.75)])
def test_biases_are_added_or_averaged(method: str, factor: float) -> None:
    model = bert()
    adapters = [of_kind(model, BitfitConfig, seed) for seed in (1, 2)]
    merged = merge(adapters, method, weights=[1.5, -0.25])
    for key, tensor in merged.tensors.items():
        wanted = 1.5 * adapters[0].tensors[key] - 0.25 * adapters[1].tensors[key]
        assert float((tensor - factor * wanted).abs().max()) < 1e-6


def test_pefts_merge_of_one_adapter_is_not_that_adapter() -> None:
    """What the tests above are about: at weight 1 PEFT 0.21 changes rsLoRA, DoRA and LoRA with a bias by far."""
    kinds: tuple[dict[str, Any], ...] = ({"use_rslora": True}, {"use_dora": True}, {"lora_bias": True})
    for fields in kinds:
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value", "dense"], **fields)
        model: Any = peft.get_peft_model(bert(), config, "given").eval()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        wanted = logits_of(model)
        model.add_weighted_adapter(["given"], [1.0], "merged", combination_type="linear")
        model.set_adapter("merged")
        assert float((logits_of(model) - wanted).abs().max()) > 0.01


def test_what_is_missing_is_said() -> None:
    model = bert()
    dora = of_kind(model, DoraConfig)
    with pytest.raises(MergeError, match=r"scales the base's own weights.*merge\(\.\.\., base=model\)"):
        merge([dora])
    other = bert()
    with torch.no_grad():
        other.get_parameter("bert.embeddings.word_embeddings.weight").add_(1.0)
    with pytest.raises(BaseMismatchError, match="pass the right base"):
        merge([dora], base=other)
    adapted = attach(model, {"dora": dora})
    with pytest.raises(MergeError, match=r"call detach\(\) first"):
        merge([dora], base=model)
    adapted.detach()
    small = replace(dora, spec=replace(dora.spec, base=replace(base_of(model), config_hash=None, weights_hash=None)))
    with pytest.raises(MergeError, match="are they of one base model"):
        merge([small], base=narrower())


def narrower() -> Any:
    """A BERT of another width, with modules of the same names."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    )
