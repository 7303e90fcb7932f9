"""Compiles kernels for GPUs that are not here, and says what they need: `python -m tests.compile_kernels KERNEL...`.

Run as a program, as Triton decides once in a process whether it interprets. Prints JSON: a list of objects by kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graftory.kernels.batched_lora import kernel
from graftory.kernels.batched_lora.launch import PRODUCT, Blocks, blocks_for, expand_block

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
INTEGERS = ("order", "tile_adapter", "tile_start", "tile_end", "ranks", "offsets", "columns")
UNIT = {
    "shrink": (("x_column", "m_column"), ("x_column", "m_rank")),
    "expand": (("m_rank",), ("m_column",)),
    "outer": (("x_column", "out_column"), ("x_column", "out_rank")),
}
"""Strides that are 1, in the forward and in the backward (dA and dB for `outer`); Triton makes them constants."""
FP32 = {"shrink": ("out",), "expand": ("hidden", "scale", "weight"), "outer": ("hidden", "scale", "weight")}


def signature_of(name: str, fn: Any, dtype: str, given: Mapping[str, Any], read: str = "") -> dict[str, str]:
    """The types of a kernel's arguments, by their names; those of `given` are constants. With `read`, x's is that."""
    types = {}
    for each in fn.params:
        if each.name in given:
            types[each.name] = "constexpr"
        elif each.name in INTEGERS:
            types[each.name] = "*i32"
        elif each.name in FP32[name]:
            types[each.name] = "*fp32"
        elif each.name in ("x", "factor_matrix", "out"):
            types[each.name] = f"*{dtype}"
        else:
            types[each.name] = "i32"
    if read and "x" in types:
        types["x"] = f"*{read}"
    return types


@dataclass(frozen=True)
class Case:
    """What is compiled; with `slices`, what differs for several of them: their columns, or a sum over them."""

    target: str
    dtype: str
    blocks: Blocks
    layout: int
    slices: int = 1
    read: str = ""
    """What x is, where it is not what the factors are."""


TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DECODING, PREFILL = (64, 64), (8192, 8)
"""Entries and adapters."""


def cases(
    target: str, dtype: str, batch: tuple[int, int], ranks: Sequence[int], layouts: Sequence[int], slices: int = 1
) -> list[Case]:
    """Blocks as `launch` chooses them."""
    blocks = [blocks_for(*batch, rank, TYPES[dtype]) for rank in ranks]
    return [Case(target, dtype, each, layout, slices) for each in blocks for layout in layouts]


CASES = (
    *cases("sm_90", "bf16", PREFILL, (8, 64, 128), (0, 1)),
    *cases("sm_90", "bf16", DECODING, (8, 128, 256), (0,)),
    *cases("sm_90", "fp32", PREFILL, (128,), (0,)),
    *cases("sm_80", "bf16", PREFILL, (128,), (0, 1)),
    *cases("sm_80", "fp32", PREFILL, (64, 128), (0,)),
    *cases("gfx942", "bf16", PREFILL, (8, 128), (0,)),
    *cases("sm_90", "bf16", PREFILL, (8, 64, 128), (0, 1), 3),
    *cases("sm_90", "bf16", DECODING, (256,), (0, 1), 3),
    *cases("sm_90", "fp32", PREFILL, (128,), (0, 1), 3),
    *cases("sm_80", "bf16", PREFILL, (128,), (0, 1), 3),
    *cases("gfx942", "bf16", PREFILL, (16,), (0, 1), 3),
    *(replace(case, read="bf16") for case in cases("sm_90", "fp32", PREFILL, (8, 128), (0, 1))),
    *(replace(case, read="bf16") for case in cases("sm_80", "fp32", PREFILL, (128,), (0,))),
)


def summed(name: str, case: Case) -> bool:
    """Whether a kernel sums over slices: dX does."""
    return case.slices > 1 and name == "expand" and case.layout == 1


def apart(name: str, case: Case) -> bool:
    """Whether slices have columns of their own; where they only share x, a kernel is the same without them."""
    return case.slices > 1 and case.layout == (0 if name == "expand" else 1)


def compiled(name: str, case: Case) -> dict[str, Any]:
    """One kernel for one target, as `launch` asks for it: pointers, widths and strides are multiples of 16, or 1."""
    fn: Any = getattr(kernel, name)
    blocks = case.blocks
    slices = case.slices if summed(name, case) else 1
    block = expand_block(blocks, slices) if name == "expand" else getattr(blocks, name)
    given: Mapping[str, Any] = {
        "places": 1, "parts": 1, "unit": 16, "slices": slices, "adding": case.layout == 0 and case.slices == 1,
        "block_m": block.m, "block_r": blocks.r, "block_d": block.d,
        "product": PRODUCT[TYPES[case.dtype]], "precision": "ieee", "upcast": False,
        **dict.fromkeys(UNIT[name][case.layout], 1),
        **({} if apart(name, case) else {"columns": None}),
    }  # fmt: skip
    options = {"num_warps": block.warps, **({} if name == "shrink" else {"num_stages": 1})}
    made = build(fn, signature_of(name, fn, case.dtype, given, case.read), given, case.target, options)
    return {**asdict(case), **made}


def build(
    fn: Any, signature: Mapping[str, str], given: Mapping[str, Any], target: str, options: Mapping[str, int]
) -> dict[str, Any]:
    """What a kernel needs; numbers but for those of `given` are multiples of 16."""
    constexprs = {(fn.arg_names.index(key),): value for key, value in given.items() if key in signature}
    even = {
        (i,): [["tt.divisibility", 16]]
        for i, each in enumerate(signature.values())
        if each not in ("constexpr", "fp32")
    }
    made = triton.compile(ASTSource(fn, signature, constexprs, even), target=TARGETS[target], options=options)
    needs = resources(made.asm["cubin"]) if "cubin" in made.asm else {"bytes": len(made.asm["hsaco"])}
    return {"target": target, "shared": made.metadata.shared, **needs}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of local memory: where registers are spilled to, the kernels have no other use for it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: re.findall(rf"\b{key}:(\d+)", done.stdout) for key in ("REG", "STACK", "LOCAL")}
    assert {len(each) for each in found.values()} == {1}, done.stdout
    (registers,), (stack,), (local,) = found.values()
    return {"registers": int(registers), "spills": int(stack) + int(local)}


def cases_of(name: str) -> list[Case]:
    """All that are a kernel of their own."""
    return [case for case in CASES if case.slices == 1 or summed(name, case) or apart(name, case)]


def main(names: Sequence[str]) -> None:
    """All cases of each."""
    print(json.dumps({name: [compiled(name, case) for case in cases_of(name)] for name in names}))


if __name__ == "__main__":
    main(sys.argv[1:])
