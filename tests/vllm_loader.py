"""How vLLM 0.33 reads an adapter's folder, and nothing more: what it refuses, and the update that it computes."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
EXPECTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""The modules of Llama in vLLM, before it packs them."""


@dataclass
class PeftHelper:
    """The fields that are read; every other one of the file is dropped without a word."""

    r: int
    lora_alpha: int
    target_modules: list[str] | str
    bias: str = "none"
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    @classmethod
    def read(cls, folder: Path, max_lora_rank: int) -> PeftHelper:
        data = json.loads((folder / "adapter_config.json").read_text())
        required = {each.name for each in fields(cls) if each.default is MISSING}
        if required - set(data):
            raise ValueError(f"missing {required - set(data)}")
        made = cls(**{key: value for key, value in data.items() if key in {each.name for each in fields(cls)}})
        if made.modules_to_save:
            raise ValueError("vLLM only supports modules_to_save being None.")
        if made.use_dora:
            raise ValueError("vLLM does not yet support DoRA.")
        if made.bias != "none":
            raise ValueError("Adapter bias is not supported.")
        if made.r > max_lora_rank:
            raise ValueError(f"LoRA rank {made.r} is greater than max_lora_rank {max_lora_rank}.")
        return made

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def load(folder: Path, max_lora_rank: int, model: Any) -> dict[str, Tensor]:
    """ΔW by module, as the server would add it to a model; a module that the model lacks is an error here."""
    assert max_lora_rank in MAX_LORA_RANKS
    helper = PeftHelper.read(folder, max_lora_rank)
    pairs: dict[str, dict[str, Tensor]] = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - a handle, not a mapping
            parts = key.split(".")
            assert parts[:2] == ["base_model", "model"]
            assert parts[-1] == "weight"
            assert parts[-2] in ("lora_A", "lora_B")
            path = ".".join(parts[2:-2])
            if path.rpartition(".")[2] not in EXPECTED:
                raise ValueError(f"expected target modules in {EXPECTED} but received {path}")
            pairs.setdefault(path, {})[parts[-2]] = file.get_tensor(key)
    for path, pair in pairs.items():
        weight = model.get_submodule(path).weight  # where the server would put it
        # the server's buffers have max_lora_rank rows; one module has the helper's rank
        assert pair["lora_A"].shape == (helper.r, weight.shape[1])
        assert pair["lora_B"].shape == (weight.shape[0], helper.r)
    return {path: helper.scaling * (pair["lora_B"].double() @ pair["lora_A"].double()) for path, pair in pairs.items()}
