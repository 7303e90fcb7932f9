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


@pytest.mark.parametrize("kernel", ["shrink", "expand", "outer"])
def test_it_fits_the_registers_and_the_shared_memory_of_every_target(kernel: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.compile_kernels", kernel]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert {each["target"] for each in found} == set(SHARED)
    assert [each for each in found if each.get("spills") or each.get("registers", 0) >= 255] == []
    assert [each for each in found if not 0 < each["shared"] <= SHARED[each["target"]]] == []
    assert all(each["registers"] > 0 if each["target"].startswith("sm") else each["bytes"] > 0 for each in found)
