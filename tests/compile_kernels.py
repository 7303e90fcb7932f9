"""Compiles kernels for GPUs that are not here, and says what they need: `python -m tests.compile_kernels KERNEL`.

Run as a program, as Triton decides once in a process whether it interprets. Prints a list of JSON objects.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graftory.kernels.batched_lora import kernel
from graftory.kernels.batched_lora.launch import Blocks, blocks_for

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
INTEGERS = ("order", "tile_adapter", "tile_start", "tile_end", "ranks", "offsets")
UNIT = {
    "shrink": (("x_column", "m_column"), ("x_column", "m_rank")),
    "expand": (("m_rank",), ("m_column",)),
    "outer": (("x_column", "out_column"), ("x_column", "out_rank")),
}
"""Strides that are 1, in the forward and in the backward (dA and dB for `outer`); Triton makes them constants."""
FP32 = {"shrink": ("out",), "expand": ("hidden", "factor"), "outer": ("hidden", "factor")}


def signature_of(name: str, fn: Any, dtype: str, unit: tuple[str, ...]) -> dict[str, str]:
    """The types of a kernel's arguments, by their names."""
    types = {}
    for each in fn.params:
        if each.is_constexpr or each.name in unit:
            types[each.name] = "constexpr"
        elif each.name in INTEGERS:
            types[each.name] = "*i32"
        elif each.name in FP32[name]:
            types[each.name] = "*fp32"
        elif each.name in ("x", "factor_matrix", "out"):
            types[each.name] = f"*{dtype}"
        else:
            types[each.name] = "i32"
    return types


@dataclass(frozen=True)
class Case:
    """What is compiled."""

    target: str
    dtype: str
    blocks: Blocks
    layout: int


TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DECODING, PREFILL = (64, 64), (8192, 8)
"""Entries and adapters."""


def cases(target: str, dtype: str, batch: tuple[int, int], ranks: Sequence[int], layouts: Sequence[int]) -> list[Case]:
    """Blocks as `launch` chooses them."""
    blocks = [blocks_for(*batch, rank, TYPES[dtype]) for rank in ranks]
    return [Case(target, dtype, each, layout) for each in blocks for layout in layouts]


CASES = (
    *cases("sm_90", "bf16", PREFILL, (8, 64, 128), (0, 1)),
    *cases("sm_90", "bf16", DECODING, (8, 128, 256), (0,)),
    *cases("sm_90", "fp32", PREFILL, (128,), (0,)),
    *cases("sm_80", "bf16", PREFILL, (128,), (0, 1)),
    *cases("sm_80", "fp32", PREFILL, (64, 128), (0,)),
    *cases("gfx942", "bf16", PREFILL, (8, 128), (0,)),
)


def compiled(name: str, case: Case) -> dict[str, Any]:
    """One kernel for one target, as `launch` asks for it: pointers, widths and strides are multiples of 16, or 1."""
    fn: Any = getattr(kernel, name)
    unit, blocks = UNIT[name][case.layout], case.blocks
    signature = signature_of(name, fn, case.dtype, unit)
    given: Mapping[str, Any] = {
        "places": 1, "parts": 1, "block_m": blocks.m, "block_r": blocks.r, "block_d": blocks.d,
        "precision": "ieee", "upcast": False, **dict.fromkeys(unit, 1),
    }  # fmt: skip
    constexprs = {(fn.arg_names.index(key),): value for key, value in given.items() if key in signature}
    even = {(i,): [["tt.divisibility", 16]] for i, each in enumerate(signature.values()) if each != "constexpr"}
    source = ASTSource(fn, signature, constexprs, even)
    options = {"num_warps": blocks.warps, **({} if name == "shrink" else {"num_stages": 1})}
    made = triton.compile(source, target=TARGETS[case.target], options=options)
    found = {**asdict(case), "shared": made.metadata.shared}
    return {**found, **(resources(made.asm["cubin"]) if "cubin" in made.asm else {"bytes": len(made.asm["hsaco"])})}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and instructions that spill to local memory, from the disassembly."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used, text = (
            subprocess.run([tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", used)
    assert registers is not None
    local = len(re.findall(r"\b(?:LDL|STL)\b", text))
    return {"registers": int(registers[1]), "spills": local, "wgmma": text.count("HGMMA")}


def main(name: str) -> None:
    """All cases."""
    print(json.dumps([compiled(name, case) for case in CASES]))


if __name__ == "__main__":
    main(sys.argv[1])
