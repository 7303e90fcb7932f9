"""Where adapters sit, per architecture: a table of rows, matched by module path.

A pattern such as `layer.*.output.dense` matches the end of a module's path, part by part; `*` stands
for a layer number. So one row serves the bare backbone and every task model built on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from graftory.errors import BaseMismatchError, UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS = ("pre_classifier", "classifier", "score", "classification_head")
"""Names that task heads have in transformers; the last one present makes the logits."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "qv": ("q", "v", "qkv"),
    "attention": ("q", "k", "v", "qkv", "o"),
    "ffn": ("up", "gate", "down"),
    "all": ("q", "k", "v", "qkv", "o", "up", "gate", "down"),
}
"""Groups of linear layers that a user may name, as roles of the rows below."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sites of one family of models."""

    model_types: tuple[str, ...]
    """`config.model_type` of the models this row is for."""
    linears: Mapping[str, tuple[str, ...]]
    """Role (q, k, v, o, qkv, up, gate, down) to patterns of linear layers."""
    sublayer_ends: tuple[str, ...]
    """Modules whose output h is added to the residual stream next (Houlsby)."""
    last_norms: tuple[str, ...] = ()
    """Post-norm models: the LayerNorm behind the FFN's sum (Pfeiffer)."""
    blocks: tuple[str, ...] = ()
    """Pre-norm models: the block, whose output is the FFN's sum (Pfeiffer)."""
    attentions: tuple[str, ...] = ()
    """Modules whose keys and values are the text's own (prefixes)."""
    ffns: tuple[tuple[str, str], ...] = ()
    """Module whose input is the FFN's residual input x, module whose output is h (parallel)."""


_BERT = Architecture(
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    linears={
        "q": ("layer.*.attention.self.query",),
        "k": ("layer.*.attention.self.key",),
        "v": ("layer.*.attention.self.value",),
        "o": ("layer.*.attention.output.dense",),
        "up": ("layer.*.intermediate.dense",),
        "down": ("layer.*.output.dense",),
    },
    sublayer_ends=("layer.*.attention.output.dense", "layer.*.output.dense"),
    last_norms=("layer.*.output.LayerNorm",),
    attentions=("layer.*.attention.self",),
    ffns=(("layer.*.intermediate", "layer.*.output.dense"),),
)

_DISTILBERT = Architecture(
    model_types=("distilbert",),
    linears={
        "q": ("layer.*.attention.q_lin",),
        "k": ("layer.*.attention.k_lin",),
        "v": ("layer.*.attention.v_lin",),
        "o": ("layer.*.attention.out_lin",),
        "up": ("layer.*.ffn.lin1",),
        "down": ("layer.*.ffn.lin2",),
    },
    sublayer_ends=("layer.*.attention.out_lin", "layer.*.ffn.lin2"),
    last_norms=("layer.*.output_layer_norm",),
    attentions=("layer.*.attention",),
    ffns=(("layer.*.ffn", "layer.*.ffn.lin2"),),
)

_GPT2 = Architecture(
    model_types=("gpt2",),
    linears={
        "qkv": ("h.*.attn.c_attn",),
        "o": ("h.*.attn.c_proj",),
        "up": ("h.*.mlp.c_fc",),
        "down": ("h.*.mlp.c_proj",),
    },
    sublayer_ends=("h.*.attn.c_proj", "h.*.mlp.c_proj"),
    blocks=("h.*",),
    attentions=("h.*.attn",),
    ffns=(("h.*.ln_2", "h.*.mlp.c_proj"),),
)

_LLAMA = Architecture(
    model_types=("llama", "qwen2", "qwen3", "mistral"),
    linears={
        "q": ("layers.*.self_attn.q_proj",),
        "k": ("layers.*.self_attn.k_proj",),
        "v": ("layers.*.self_attn.v_proj",),
        "o": ("layers.*.self_attn.o_proj",),
        "gate": ("layers.*.mlp.gate_proj",),
        "up": ("layers.*.mlp.up_proj",),
        "down": ("layers.*.mlp.down_proj",),
    },
    sublayer_ends=("layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"),
    blocks=("layers.*",),
    attentions=("layers.*.self_attn",),
    ffns=(("layers.*.post_attention_layernorm", "layers.*.mlp.down_proj"),),
)

_T5 = Architecture(
    model_types=("t5",),
    linears={
        "q": ("layer.*.SelfAttention.q", "layer.*.EncDecAttention.q"),
        "k": ("layer.*.SelfAttention.k", "layer.*.EncDecAttention.k"),
        "v": ("layer.*.SelfAttention.v", "layer.*.EncDecAttention.v"),
        "o": ("layer.*.SelfAttention.o", "layer.*.EncDecAttention.o"),
        "gate": ("layer.*.DenseReluDense.wi_0",),
        "up": ("layer.*.DenseReluDense.wi", "layer.*.DenseReluDense.wi_1"),
        "down": ("layer.*.DenseReluDense.wo",),
    },
    sublayer_ends=("layer.*.SelfAttention.o", "layer.*.EncDecAttention.o", "layer.*.DenseReluDense.wo"),
    blocks=("block.*",),
    attentions=("layer.*.SelfAttention",),
    ffns=(("block.*.layer.*.layer_norm", "block.*.layer.*.DenseReluDense.wo"),),
)

_VIT = Architecture(
    model_types=("vit",),
    linears={
        # transformers renamed the modules within version 5: both spellings
        "q": ("layers.*.attention.q_proj", "layer.*.attention.attention.query"),
        "k": ("layers.*.attention.k_proj", "layer.*.attention.attention.key"),
        "v": ("layers.*.attention.v_proj", "layer.*.attention.attention.value"),
        "o": ("layers.*.attention.o_proj", "layer.*.attention.output.dense"),
        "up": ("layers.*.mlp.fc1", "layer.*.intermediate.dense"),
        "down": ("layers.*.mlp.fc2", "layer.*.output.dense"),
    },
    sublayer_ends=(
        "layers.*.attention.o_proj",
        "layers.*.mlp.fc2",
        "layer.*.attention.output.dense",
        "layer.*.output.dense",
    ),
    blocks=("layers.*", "encoder.layer.*"),
    attentions=("layers.*.attention", "layer.*.attention.attention"),
    ffns=(
        ("layers.*.layernorm_after", "layers.*.mlp.fc2"),
        ("layer.*.layernorm_after", "layer.*.output.dense"),
    ),
)

ARCHITECTURES = (_BERT, _DISTILBERT, _GPT2, _LLAMA, _T5, _VIT)


def architecture_of(model: PreTrainedModel) -> Architecture | None:
    """The row for a model, or None if its architecture has none."""
    kind = model.config.model_type
    return next((row for row in ARCHITECTURES if kind in row.model_types), None)


def need_architecture(model: PreTrainedModel) -> Architecture:
    """The row for a model.

    Raises:
        UnsupportedAdapterError: If there is none.
    """
    row = architecture_of(model)
    if row is None:
        known = sorted(kind for each in ARCHITECTURES for kind in each.model_types)
        raise UnsupportedAdapterError(
            f"no table of adapter sites for architecture {model.config.model_type!r}; known: {', '.join(known)}; "
            "LoRA works on any architecture if you name the module paths as targets"
        )
    return row


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA can sit on a module: `Linear`, or GPT-2's `Conv1D` (a transposed linear layer)."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_widths(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, Conv1D)
    return int(module.nx), int(module.nf)


def head_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """The model's own task heads, the one that makes the logits last."""
    return tuple(name for name in HEADS if isinstance(getattr(model, name, None), nn.Module))


def matching(paths: Iterable[str], patterns: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The paths that end in a pattern, each with the layer numbers that its stars stand for."""
    split = [pattern.split(".") for pattern in patterns]
    for path in paths:
        parts = path.split(".")
        for pattern in split:
            if len(pattern) <= len(parts) and _fits(parts[-len(pattern) :], pattern):
                ends = zip(parts[-len(pattern) :], pattern, strict=True)
                # what precedes the pattern counts too: encoder and decoder both have a block 0
                yield path, (*parts[: -len(pattern)], *(part for part, want in ends if want == "*"))
                break


def _fits(parts: list[str], pattern: list[str]) -> bool:
    return all(part.isdigit() if want == "*" else part == want for part, want in zip(parts, pattern, strict=True))


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def module_at(model: PreTrainedModel, path: str) -> tuple[str, nn.Module]:
    """Find a module by an adapter's path, with or without the backbone's prefix.

    An adapter trained on `BertForSequenceClassification` (`bert.encoder...`) so fits a bare `BertModel`
    (`encoder...`) and the other way round.

    Raises:
        BaseMismatchError: If the model has no such module.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (path, prefix + path, path.removeprefix(prefix)):
        module = _submodule(model, candidate)
        if module is not None:
            return candidate, module
    raise BaseMismatchError(
        f"the adapter has weights for module {path!r}, which {type(model).__name__} lacks; pass the base it was "
        "trained on"
    )
