"""An adapter's files as vLLM's LoRA loader reads them: one rank that a server can have, one scale, nothing else.

The loader (vLLM 0.33, `vllm/lora/peft_helper.py` and `lora_model.py`) takes r, lora_alpha and use_rslora of
`adapter_config.json` for all modules; patterns it does not know, and it refuses DoRA and `modules_to_save`. So every
pair is brought to one rank R: A gets rows of zeros, B columns of zeros, and B takes what its scale s is more than the
common one, s₀: s B A = s₀ ([s/s₀ B, 0] [A; 0]), with lora_alpha = s₀ R.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.config import AdapterConfig, BitfitConfig, DoraConfig, LoraConfig, UpdateConfig
from graftory.errors import UnsupportedAdapterError
from graftory.hub.codecs.peft import CONFIG, PREFIX, WEIGHTS
from graftory.hub.folders import place
from graftory.schema import pretty

if TYPE_CHECKING:
    from graftory.schema import Json

RANKS = (8, 16, 32, 64, 128, 256)
"""Ranks that every release lets a server have (`--max-lora-rank`)."""
_START = "model.layers."
_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SERVED: Mapping[str, tuple[str, tuple[str, ...]]] = dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3"), (_START, _MODULES)
)
"""Architectures whose model in vLLM takes LoRA: what paths begin with, and the modules that it knows."""
_FOLD = "fold it into one model, which vLLM serves as any other: hub export {ref} DIR"
_HINTS: Mapping[type[AdapterConfig], str] = {
    DoraConfig: "vLLM does not do DoRA (use_dora)",
    BitfitConfig: "vLLM does not do biases of adapters",
    UpdateConfig: "it scales the base's weights or adds to biases, vLLM adds products of two factors alone",
}


def vllm_files(adapter: Adapter, *, ref: str, base: str | None = None) -> dict[str, bytes]:
    """PEFT's two files for vLLM; the update is the adapter's own.

    Args:
        adapter: A LoRA adapter without a head.
        ref: What it is called, for error texts.
        base: The name under which the base is served; the recorded one by default.

    Raises:
        UnsupportedAdapterError: If vLLM cannot take it; the text says why and what to do.
    """
    from safetensors.torch import save

    check(adapter, ref)
    config = adapter.spec.config
    assert isinstance(config, LoraConfig)
    rank = served_rank(config, ref)
    scale = config.scale_of(config.targets[0])
    tensors: dict[str, Tensor] = {}
    for path in config.targets:
        a, b = _padded(adapter.tensors, path, rank, config.scale_of(path) / scale)
        tensors |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
    return {CONFIG: pretty(_config(adapter, rank, scale * rank, base)), WEIGHTS: save(tensors, {"format": "pt"})}


def export_vllm(adapter: Adapter, folder: str | Path, *, ref: str = "the adapter", base: str | None = None) -> Path:
    """Write `vllm_files` as a folder, in full or not at all.

    Raises:
        UnsupportedAdapterError: If vLLM cannot take the adapter.
        VersionConflictError: If the folder holds other files.
    """
    return place(Path(folder).absolute(), vllm_files(adapter, ref=ref, base=base))


def served_rank(config: LoraConfig, ref: str) -> int:
    """The least rank that a server can have and that holds every module's.

    Raises:
        UnsupportedAdapterError: If there is none.
    """
    most = max(config.rank_of(path) for path in config.targets)
    found = next((rank for rank in RANKS if rank >= most), None)
    if found is None:
        raise UnsupportedAdapterError(
            f"{ref}: has rank {most}, vLLM {RANKS[-1]} at the most; make it smaller, hub merge {ref} --rank "
            f"{RANKS[-1]} --name NAME, or {_FOLD.format(ref=ref)}"
        )
    return found


def check(adapter: Adapter, ref: str) -> None:
    """Check that vLLM's loader takes an adapter once its ranks and scales are made one.

    Raises:
        UnsupportedAdapterError: If not.
    """
    spec = adapter.spec
    config = spec.config
    remedy = _FOLD.format(ref=ref)
    if not isinstance(config, LoraConfig):
        why = _HINTS.get(type(config), f"vLLM serves LoRA, this is a {spec.method} adapter")
        raise UnsupportedAdapterError(f"{ref}: {why}; {remedy}")
    if spec.task is not None and spec.task.head:
        raise UnsupportedAdapterError(
            f"{ref}: has a head of its own ({', '.join(spec.task.head)}), vLLM takes no modules_to_save; {remedy}"
        )
    if spec.base.architecture is None:
        return
    row = _SERVED.get(spec.base.architecture)
    if row is None:
        raise UnsupportedAdapterError(
            f"{ref}: is for {spec.base.architecture}, in which vLLM takes no LoRA (it does in "
            f"{', '.join(_SERVED)}); {remedy}"
        )
    start, modules = row
    for path in config.targets:
        if not path.startswith(start) or path.rpartition(".")[2] not in modules:
            raise UnsupportedAdapterError(
                f"{ref}: changes {path}, vLLM takes {start}N.* with {', '.join(modules)}; train without it, or {remedy}"
            )


def _padded(tensors: Mapping[str, Tensor], path: str, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """[A; 0] and [factor B, 0] in the adapter's type; a factor of 1 leaves every number as it is."""
    a, b = (tensors[f"{path}.lora_{side}.weight"] for side in "AB")
    wide_a, wide_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    wide_a[: a.shape[0]] = a
    wide_b[:, : b.shape[1]] = b if factor == 1 else (factor * b.double()).to(b.dtype)
    return wide_a, wide_b


def _config(adapter: Adapter, rank: int, alpha: float, base: str | None) -> dict[str, Json]:
    spec = adapter.spec
    whole = round(alpha)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if spec.task is not None and spec.task.kind == "causal_lm" else None,
        "base_model_name_or_path": base or spec.base.id,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": whole if abs(alpha - whole) <= 1e-9 * abs(alpha) else alpha,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "target_modules": list(spec.config.targets),
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def loaded_deltas(folder: Path) -> dict[str, Tensor]:
    """ΔW of every module as vLLM makes it of a folder's files: lora_alpha / r B A, in fp64."""
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    paths = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        path.removeprefix(PREFIX): scale
        * (tensors[f"{path}.lora_B.weight"].double() @ tensors[f"{path}.lora_A.weight"].double())
        for path in paths
    }


def largest_difference(adapter: Adapter, folder: Path) -> float:
    """Largest difference of an entry of ΔW between the adapter and what a folder's files say."""
    config = adapter.spec.config
    assert isinstance(config, LoraConfig)
    found = loaded_deltas(folder)
    worst = 0.0
    for path in config.targets:
        a, b = (adapter.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
        worst = max(worst, float((config.scale_of(path) * (b @ a) - found[path]).abs().max()))
    return worst if set(found) == set(config.targets) else torch.inf
