"""Compiles the kernels of `batched_bottleneck`, as `tests.compile_kernels` does those of `batched_lora`.

`python -m tests.compile_bottleneck KERNEL...` prints JSON: a list of objects by kernel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from graftory.kernels.batched_bottleneck import kernel
from graftory.kernels.batched_bottleneck.launch import Blocks, blocks_for
from tests.compile_kernels import DECODING, PREFILL, TYPES, build

INTEGERS = ("order", "tile_adapter", "tile_start", "tile_end", "sizes", "offsets")
FP32 = {
    "shrink": ("out",),
    "inner": ("before", "out", "products"),
    "expand": ("hidden", "factor"),
    "outer": ("hidden", "factor"),
}
NUMBERS = ("x", "grad", "matrix", "bias", "keep", "out", "sums")
"""Pointers of the model's type, but for those in `FP32`."""
UNIT = {
    "shrink": (("x_column", "m_column"),),
    "inner": (("grad_column", "m_unit"),),
    "expand": (("m_unit",), ("m_column",)),
    "outer": (("x_column", "out_unit"), ("x_column", "out_column")),
}
"""Strides that are 1, by what is computed (y and dX for `expand`, dU and dD for `outer`): constants for Triton."""


@dataclass(frozen=True)
class Case:
    """What is compiled; `layout` 1 is dX and dD, which have no activation."""

    target: str
    dtype: str
    blocks: Blocks
    activation: str = "gelu"
    kept: bool = True
    layout: int = 0


def case(target: str, dtype: str, batch: tuple[int, int], size: int, activation: str = "gelu") -> Case:
    """Blocks as `launch` chooses them."""
    return Case(target, dtype, blocks_for(*batch, size, TYPES[dtype]), activation)


CASES = (
    *(case("sm_90", "bf16", PREFILL, 64, name) for name in ("relu", "gelu", "gelu_new", "silu", "tanh")),
    case("sm_90", "bf16", PREFILL, 16),
    case("sm_90", "bf16", PREFILL, 128),
    case("sm_90", "bf16", DECODING, 64),
    case("sm_90", "bf16", DECODING, 256),
    case("sm_90", "fp32", PREFILL, 128),
    case("sm_80", "bf16", PREFILL, 128),
    case("sm_80", "fp32", PREFILL, 64),
    case("sm_80", "fp32", PREFILL, 64, "gelu_new"),
    case("gfx942", "bf16", PREFILL, 64),
    case("gfx942", "bf16", PREFILL, 128),
)


def cases_of(name: str) -> list[Case]:
    """Each with an activation and a mask; and where a kernel serves two products, the other one too."""
    plain = [each for each in CASES if each.activation == "gelu"]
    other = [replace(each, activation="", kept=False, layout=1) for each in plain]
    return [*(plain if name == "shrink" else CASES), *(other if len(UNIT[name]) > 1 else [])]


def type_of(name: str, argument: str, dtype: str) -> str:
    """Of a kernel's argument."""
    if argument in INTEGERS:
        return "*i32"
    if argument in FP32[name]:
        return "*fp32"
    return f"*{dtype}" if argument in NUMBERS else "i32"


def compiled(name: str, case: Case) -> dict[str, Any]:
    """One kernel for one target, as `launch` asks for it: pointers, widths and strides are multiples of 16, or 1."""
    fn: Any = getattr(kernel, name)
    blocks, plain = case.blocks, case.layout == 1
    absent = [*(["keep"] if plain else []), *(["bias"] if plain and name == "expand" else [])]
    given: Mapping[str, Any] = {
        "activation": case.activation, "kept": case.kept, "weighted": True, "biased": not plain, "by_column": not plain,
        "places": 1, "parts": 1, "block_m": blocks.e if name == "outer" else blocks.m,
        "block_r": blocks.r, "block_k": blocks.k, "block_d": blocks.d,
        "precision": "ieee", "upcast": False, **dict.fromkeys(UNIT[name][case.layout], 1), **dict.fromkeys(absent),
    }  # fmt: skip
    signature = {each: "constexpr" if each in given else type_of(name, each, case.dtype) for each in fn.arg_names}
    options = {"num_warps": blocks.warps, **({} if name in ("shrink", "inner") else {"num_stages": 1})}
    return {**asdict(case), **build(fn, signature, given, case.target, options)}


def main(names: Sequence[str]) -> None:
    """All cases of each."""
    print(json.dumps({name: [compiled(name, case) for case in cases_of(name)] for name in names}))


if __name__ == "__main__":
    main(sys.argv[1:])
