"""The Triton kernels compile for GPUs that are not here: no spills, and shared memory that these GPUs have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that a block may use."""
KERNELS = {
    "kernels": ("shrink", "expand", "outer"),
    "bottleneck": ("shrink", "inner", "expand", "outer"),
    "small": ("decode.shrink", "decode.expand", "scale.scale", "scale.reduce", "head.finish"),
}


@cache
def compiled(module: str) -> subprocess.CompletedProcess[str]:
    """All kernels of a module in one process: to import torch and Triton takes longer than to compile one."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", f"tests.compile_{module}", *KERNELS[module]]
    return subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("module", "kernel"), [(module, name) for module, names in KERNELS.items() for name in names])
def test_it_fits_the_registers_and_the_shared_memory_of_every_target(module: str, kernel: str) -> None:
    done = compiled(module)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)[kernel]
    assert {each["target"] for each in found} == set(SHARED)
    assert [each for each in found if each.get("spills") or each.get("registers", 0) >= 255] == []
    least = 0 if module == "small" else 1  # `tl.dot` needs some
    assert [each for each in found if not least <= each["shared"] <= SHARED[each["target"]]] == []
    assert all(each["registers"] > 0 if each["target"].startswith("sm") else each["bytes"] > 0 for each in found)
