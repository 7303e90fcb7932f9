"""What AdapterHub calls files, modules and values, beside what we call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graftory.config import Activation, Placement
from graftory.errors import UnsupportedAdapterError
from graftory.schema import Json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter.safetensors"
HEAD_CONFIG = "head_config.json"
HEAD_WEIGHTS = "model_head.safetensors"

MODEL_CLASSES: Mapping[str, str] = {
    "bert": "BertAdapterModel",
    "roberta": "RobertaAdapterModel",
    "xlm-roberta": "XLMRobertaAdapterModel",
}
"""The architectures, and the class that `adapters` has for each."""

ACTIVATIONS: Mapping[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "swish": "silu",
    "silu": "silu",
    "tanh": "tanh",
}
RENAMED: Mapping[str, str] = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What files without a version mean, as `adapters` itself reads them."""

BOTTLENECK_PARTS: Mapping[str, str] = {
    "adapter_down.0.weight": "adapter_down.weight",
    "adapter_down.0.bias": "adapter_down.bias",
    "adapter_up.weight": "adapter_up.weight",
    "adapter_up.bias": "adapter_up.bias",
}
LORA_PARTS: Mapping[str, str] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
"""Ends of tensors, theirs and ours."""


@dataclass(frozen=True, slots=True)
class BottleneckKind:
    """How one kind of bottleneck is told apart, and where we say that it sits."""

    name: str
    says: Mapping[str, Json]
    """Values of its configuration."""
    placement: Placement
    end: str
    """What we put behind the path of the block that holds the adapter."""


KINDS = (
    BottleneckKind("par_bn", {"is_parallel": True, "original_ln_before": False}, "parallel", "dense"),
    BottleneckKind("seq_bn", {"is_parallel": False, "original_ln_before": True}, "pfeiffer", "LayerNorm"),
    BottleneckKind("double_seq_bn", {"is_parallel": False, "original_ln_before": False}, "houlsby", "dense"),
)


@dataclass(frozen=True, slots=True)
class HeadKind:
    """One kind of classification head: its layers, and what they are in transformers' own model."""

    model_types: tuple[str, ...]
    pooled: bool
    """Whether it reads what the base's pooler makes, or the first token itself."""
    layers: Mapping[str, str]
    """Number of each linear layer in their head, and the module that it is in ours."""
    head: tuple[str, ...]
    """Paths of ours that hold all of them."""


HEADS = (
    # linear, tanh, linear on the first token: the pooler that transformers' model has, and its classifier
    HeadKind(("bert",), False, {"1": "bert.pooler.dense", "4": "classifier"}, ("bert.pooler.dense", "classifier")),
    HeadKind(("bert",), True, {"1": "classifier"}, ("classifier",)),
    HeadKind(("roberta", "xlm-roberta"), False, {"1": "classifier.dense", "4": "classifier.out_proj"}, ("classifier",)),
)


def check_architecture(kind: object, where: str) -> str:
    """The architecture, if it is one of the table's.

    Raises:
        UnsupportedAdapterError: If it is not.
    """
    if not isinstance(kind, str) or kind not in MODEL_CLASSES:
        raise UnsupportedAdapterError(
            f"{where}: AdapterHub's files are read and written for {', '.join(MODEL_CLASSES)}, this is {kind!r:.80}"
        )
    return kind
