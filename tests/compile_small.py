"""Compiles the kernels that multiply number by number, as `tests.compile_kernels` does those with `tl.dot`.

`python -m tests.compile_small KERNEL...` prints JSON: a list of objects by kernel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftory.kernels.batched_head import kernel as head
from graftory.kernels.batched_lora import decode
from graftory.kernels.batched_lora.launch import single_blocks_for
from graftory.kernels.batched_scale import kernel as scale
from graftory.kernels.batched_scale.launch import blocks_for, sum_blocks_for
from tests.compile_kernels import build


@dataclass(frozen=True)
class Small:
    """A kernel.

    Attributes:
        fn: Triton's.
        types: Of the arguments that are not numbers of 32 bits; `{}` is what varies.
        sizes: Constants that vary together, with the warps.
        variants: In each, arguments that are constants too: strides that are 1, and pointers that are not given.
    """

    fn: Any
    types: Mapping[str, str]
    sizes: Sequence[Mapping[str, int]]
    variants: Sequence[Mapping[str, int | None]]


def decoding(name: str) -> list[dict[str, int]]:
    """The blocks of ranks that differ."""
    more = {"places": 1, "unit": 16, "slices": 1}
    found = []
    for rank, parts in ((1, 1), (16, 16), (64, 32), (256, 8)):
        blocks = single_blocks_for(rank)
        block = getattr(blocks, name)
        found.append({"block_r": blocks.r, "block_d": block.d, "num_warps": block.warps, "parts": parts, **more})
    return found


def blocks(*made: tuple[int, int]) -> list[dict[str, int]]:
    return [{"block_t": t, "block_d": d, "num_warps": 4, "parts": 4} for t, d in made]


LORA = {"x": "*{}", "factor_matrix": "*{}", "adapter_of": "*i64", "ranks": "*i32", "columns": "*i32"}
KERNELS = {
    "decode.shrink": Small(
        decode.shrink,
        {**LORA, "out": "*fp32"},
        decoding("shrink"),
        (
            {"x_column": 1, "m_column": 1, "columns": None},
            {"x_column": 1, "m_rank": 1, "columns": None},
            {"x_column": 1, "m_rank": 1},
        ),
    ),
    "decode.expand": Small(
        decode.expand,
        {**LORA, "hidden": "*fp32", "scale": "*fp32", "weight": "*fp32", "out": "*{}"},
        decoding("expand"),
        (
            {"m_rank": 1, "columns": None, "weight": None, "adding": True},
            {"m_rank": 1, "adding": False},
            {"m_column": 1, "slices": 3, "columns": None, "weight": None, "adding": False},
        ),
    ),
    "scale.scale": Small(
        scale.scale,
        {"x": "*{}", "vectors": "*fp32", "out": "*{}", "index": "*i64"},
        blocks(blocks_for(1, 4096), blocks_for(128, 4096), blocks_for(128, 64)),
        ({"x_column": 1, "v_column": 1},),
    ),
    "scale.reduce": Small(
        scale.reduce,
        {"grad": "*{}", "x": "*{}", "out": "*fp32", "order": "*i32", "offsets": "*i32"},
        blocks(sum_blocks_for(8192, 16), sum_blocks_for(8192, 4096)),
        ({"g_column": 1, "x_column": 1},),
    ),
    "head.finish": Small(
        head.finish,
        {"hidden": "*fp32", "bias": "*{}", "out": "*{}", "head_of": "*i64", "sizes": "*i32", "fill": "fp32"},
        [{"block_m": 1024 // r, "block_r": r, "num_warps": 4, "parts": 8} for r in (16, 128)],
        ({"b_output": 1}, {"bias": None}),
    ),
}
TARGETS = (("sm_90", "bf16"), ("sm_90", "fp32"), ("sm_80", "bf16"), ("gfx942", "bf16"))


def compiled(
    small: Small, target: str, dtype: str, sizes: Mapping[str, int], variant: Mapping[str, Any]
) -> dict[str, Any]:
    """One kernel for one target, as it is launched: pointers, widths and strides are multiples of 16, or 1."""
    names = small.fn.arg_names
    given = {key: value for key, value in {**sizes, **variant}.items() if key in names}
    types = {name: "constexpr" if name in given else small.types.get(name, "i32").format(dtype) for name in names}
    made = build(small.fn, types, given, target, {"num_warps": sizes["num_warps"]})
    return {**made, "dtype": dtype, "given": given}


def all_of(small: Small) -> list[dict[str, Any]]:
    """All variants for every target; all sizes for the first, elsewhere the last, which is the largest."""
    return [
        compiled(small, target, dtype, sizes, variant)
        for number, (target, dtype) in enumerate(TARGETS)
        for sizes in (small.sizes if number == 0 else small.sizes[-1:])
        for variant in small.variants
    ]


def main(names: Sequence[str]) -> None:
    """Each of them."""
    print(json.dumps({name: all_of(KERNELS[name]) for name in names}))


if __name__ == "__main__":
    main(sys.argv[1:])
