"""Adapters as other programs want them in a folder: `<folder>/<name>/...`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from graftory.config import LoraConfig
from graftory.errors import ConfigError, UnsupportedAdapterError
from graftory.hub.codecs.packed import unpacked
from graftory.hub.codecs.peft import CONFIG, WEIGHTS, WRITES
from graftory.hub.folders import place
from graftory.hub.records import Record
from graftory.hub.safetensors_header import Bytes
from graftory.schema import pretty

_BASE = "base_model_name_or_path"


def write_layout(
    record: Record, files: Mapping[str, Bytes], target: Path, *, layout: str, served_base: str | None
) -> Path:
    """Write an adapter below a folder as another program wants it, in full or not at all.

    Args:
        record: The version.
        files: Its files.
        target: Where its own folder, of its name, is made.
        layout: A row of `LAYOUTS`.
        served_base: The name under which the base is served; the recorded one by default.

    Returns:
        The adapter's own folder.

    Raises:
        ConfigError: If there is no such layout.
        UnsupportedAdapterError: If the program cannot take the adapter; the text says why.
        VersionConflictError: If the folder holds other files.
    """
    make = LAYOUTS.get(layout)
    if make is None:
        raise ConfigError(f"no layout {layout!r:.40}; there are {', '.join(LAYOUTS)}")
    spec, whole = unpacked(record.spec, files)
    return place(target.joinpath(*record.name.split("/")), make(replace(record, spec=spec), whole, served_base))


def _peft(record: Record, files: Mapping[str, Bytes], served_base: str | None) -> dict[str, Bytes]:
    """PEFT's two files; byte for byte unless the base is called something else."""
    if type(record.spec.config) not in WRITES:
        raise UnsupportedAdapterError(
            f"{record.ref}: PEFT has no {record.spec.method} adapters; use it with graftory.attach"
        )
    return {**files, CONFIG: files[CONFIG] if served_base is None else _renamed(files[CONFIG], served_base)}


def check_vllm(record: Record) -> None:
    """Check that vLLM's loader takes an adapter: LoRA on linear layers, of one rank and one scale, without a head.

    A server has a largest rank of its own (`--max-lora-rank`).

    Raises:
        UnsupportedAdapterError: If it does not; the text says why.
    """
    config = record.spec.config
    if not isinstance(config, LoraConfig):
        raise UnsupportedAdapterError(
            f"{record.ref}: vLLM serves LoRA, this is a {record.spec.method} adapter; use it with graftory.attach"
        )
    if record.spec.task is not None and record.spec.task.head:
        heads = ", ".join(record.spec.task.head)
        raise UnsupportedAdapterError(
            f"{record.ref}: has a head of its own ({heads}), vLLM takes no modules_to_save; fold it into one model: "
            f"hub export {record.ref} DIR"
        )
    kinds = {(config.rank_of(path), config.scale_of(path)) for path in config.targets}
    if len(kinds) > 1:
        found = ", ".join(f"rank {rank} x {scale:g}" for rank, scale in sorted(kinds))
        raise UnsupportedAdapterError(
            f"{record.ref}: its modules have several ranks or scales ({found}), vLLM wants one; make one rank of them: "
            f"hub merge {record.ref} --rank {max(rank for rank, _ in kinds)} --name NAME"
        )


def _vllm(record: Record, files: Mapping[str, Bytes], served_base: str | None) -> dict[str, Bytes]:
    """PEFT's two files; the configuration names the base as it is served."""
    check_vllm(record)
    return {CONFIG: _renamed(files[CONFIG], served_base or record.spec.base.id), WEIGHTS: files[WEIGHTS]}


def _renamed(config: Bytes, base: str) -> bytes:
    return pretty({**json.loads(bytes(config)), _BASE: base})


LAYOUTS: Mapping[str, Callable[[Record, Mapping[str, Bytes], str | None], dict[str, Bytes]]] = {
    "peft": _peft,
    "vllm": _vllm,
}
"""How the files of an adapter become those of another program, by its name."""
