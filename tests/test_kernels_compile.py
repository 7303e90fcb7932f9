"""The Triton kernels compile for GPUs that are not here: no spills, and shared memory that these GPUs have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that a block may use."""


SMALL = ("decode.shrink", "decode.expand", "scale.scale", "scale.reduce", "head.finish")


@pytest.mark.parametrize(
    ("module", "kernel"),
    [
        *(("kernels", name) for name in ("shrink", "expand", "outer")),
        *(("bottleneck", name) for name in ("shrink", "inner", "expand", "outer")),
        *(("small", name) for name in SMALL),
    ],
)
def test_it_fits_the_registers_and_the_shared_memory_of_every_target(module: str, kernel: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", f"tests.compile_{module}", kernel]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert {each["target"] for each in found} == set(SHARED)
    assert [each for each in found if each.get("spills") or each.get("registers", 0) >= 255] == []
    least = 0 if module == "small" else 1  # `tl.dot` needs some
    assert [each for each in found if not least <= each["shared"] <= SHARED[each["target"]]] == []
    assert all(each["registers"] > 0 if each["target"].startswith("sm") else each["bytes"] > 0 for each in found)
