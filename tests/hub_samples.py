"""Small adapters made by hand, for the tests of the hub."""

from __future__ import annotations

from pathlib import Path

import torch

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Lineage, Metric, Parent, TaskInfo
from graftory.config import BottleneckConfig, LoraConfig

BASE = BaseModel("org/base", revision="r1", architecture="bert", config_hash="c", weights_hash="w")


def lora(seed: int = 0, parents: tuple[Parent, ...] = ()) -> Adapter:
    """A LoRA on two modules of different ranks, with a head of three labels."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "m.0.q.lora_A.weight": (2, 4),
        "m.0.q.lora_B.weight": (5, 2),
        "m.1.q.lora_A.weight": (3, 4),
        "m.1.q.lora_B.weight": (5, 3),
        "classifier.weight": (3, 4),
        "classifier.bias": (3,),
    }
    spec = AdapterSpec(
        BASE,
        LoraConfig(targets=("m.0.q", "m.1.q"), rank=2, rank_pattern={"m.1.q": 3}, alpha_pattern={"m.0.q": 1.5}),
        TaskInfo("trec", "classification", labels=("a", "b", "c"), head=("classifier",)),
        Lineage("train", parents, {"learning_rate": 0.1}, "d" * 64, seed, {"torch": "2"}),
        (Metric("accuracy", 0.9, "trec", "test", 100),),
        "mit",
    )
    return Adapter(spec, {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()})


def bottleneck(seed: int = 0) -> Adapter:
    """A bottleneck adapter at two sites of different sizes, in bfloat16, without a head."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site, size in (("m.0", 2), ("m.1", 3)):
        tensors[f"{site}.adapter_down.weight"] = torch.randn(size, 4, generator=generator).bfloat16()
        tensors[f"{site}.adapter_down.bias"] = torch.randn(size, generator=generator).bfloat16()
        tensors[f"{site}.adapter_up.weight"] = torch.randn(4, size, generator=generator).bfloat16()
        tensors[f"{site}.adapter_up.bias"] = torch.randn(4, generator=generator).bfloat16()
    config = BottleneckConfig(targets=("m.0", "m.1"), size=2, size_pattern={"m.1": 3}, activation="gelu")
    return Adapter(AdapterSpec(BASE, config), tensors)


def same(left: Adapter, right: Adapter) -> bool:
    """Whether two adapters are equal bit for bit."""
    return (
        left.spec == right.spec
        and set(left.tensors) == set(right.tensors)
        and all(
            value.dtype == right.tensors[key].dtype and torch.equal(value, right.tensors[key])
            for key, value in left.tensors.items()
        )
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a hub but lock and blobs: what an error must leave unchanged."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock" and "blobs" not in path.parts
    }
