"""A T5 out of its int8 ONNX graphs: w = scale (q - zero_point), in the names of transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LAYERS, _HEADS, _HEAD_SIZE = 8, 6, 64
_PREFIX = re.compile(r"^(?:enc|m\.decoder|m)\.")
_PRODUCTS = ("MatMul", "MatMulInteger")


def convert_t5(source: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a flan-t5-small to a folder.

    The output layer is a matrix of its own, so `tie_word_embeddings` is off and both matrices are written.

    Args:
        source: Folder with encoder.onnx, decoder.onnx and tokenizer.json.
        folder: Folder to fill.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import PreTrainedTokenizerFast, T5Config

    weights = {f"encoder.{name}": value for name, value in _weights(source / "encoder.onnx").items()}
    weights["shared.weight"] = weights.pop("encoder.embed_tokens.weight")
    for name, value in _weights(source / "decoder.onnx").items():
        if name not in ("shared.weight", "embed_tokens.weight"):
            weights[name if name.startswith("lm_head.") else f"decoder.{name}"] = value
    vocabulary, hidden = weights["shared.weight"].shape
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "d_model": hidden,
        "d_kv": _HEAD_SIZE,
        "d_ff": weights["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1],
        "num_layers": _LAYERS,
        "num_decoder_layers": _LAYERS,
        "num_heads": _HEADS,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "architectures": ["T5ForConditionalGeneration"],
    }
    tensors = {name: torch.from_numpy(value).contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    T5Config(**settings).save_pretrained(folder)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), **special)
    tokenizer.save_pretrained(folder)


def _weights(path: Path) -> dict[str, Any]:
    """Weights of one graph in fp32, named as in transformers but for the leading `encoder.` or `decoder.`.

    Norms, embeddings and the position biases keep their names in the graph. A linear layer's matrix, stored
    transposed, has a number; its name is that of the node that multiplies by it.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    stored = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}

    def restore(name: str) -> Any:
        if name in stored:
            return stored[name].astype("float32")
        offset = stored[f"{name}_quantized"].astype("float32") - stored[f"{name}_zero_point"].astype("float32")
        return (offset * stored[f"{name}_scale"]).astype("float32")

    named = {name.removesuffix("_quantized") for name in stored if name.endswith((".weight", ".weight_quantized"))}
    weights = {_PREFIX.sub("", name): restore(name) for name in named}
    for node in graph.node:
        matrix = next((name for name in node.input if name in stored and stored[name].ndim == 2), None)
        if node.op_type in _PRODUCTS and matrix is not None:
            path_in_model = ".".join(node.name.strip("/").split("/")[:-1])
            weights[f"{_PREFIX.sub('', path_in_model)}.weight"] = restore(matrix.removesuffix("_quantized")).T
    return weights
