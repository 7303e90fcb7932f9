"""LoRA and DoRA in PEFT's files: tensors, ranks and scales, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping

from graftory.config import DoraConfig, LoraConfig
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub.codecs import tensors as shared
from graftory.hub.codecs.peft_config import PeftLora, read_config, write_config
from graftory.hub.codecs.peft_kind import CONFIG, WEIGHTS, PeftKind, Stored

_DOWN, _UP, _MAGNITUDE = DoraConfig.parts
_KINDS: Mapping[bool, type[LoraConfig | DoraConfig]] = {False: LoraConfig, True: DoraConfig}
"""The configuration, by `use_dora`."""


def _config(file: PeftLora, body: Stored) -> LoraConfig | DoraConfig:
    targets = _targets(file, body)
    ranks = {path: body[f"{path}.{_DOWN}"].shape[0] for path in targets}
    alphas = {path: file.alpha_of(path) for path in targets}
    return _KINDS[file.dora](
        targets=targets,
        init_seed=None,
        rank=file.rank,
        alpha=file.alpha,
        rslora=file.rslora,
        dropout=file.dropout,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != file.rank},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != file.alpha},
    )


def _targets(file: PeftLora, body: Stored) -> tuple[str, ...]:
    """Module paths of the LoRA pairs; refuses every other tensor by name."""
    parts = _KINDS[file.dora].parts
    known = "lora_A, lora_B" if not file.dora else "lora_A, lora_B, lora_magnitude_vector"
    refusal = f"{WEIGHTS}: tensor %r is not understood; graftory reads {known} and modules_to_save"
    paths = shared.paths_of(body, parts, refusal)
    if not paths:
        raise CorruptAdapterError(f"{WEIGHTS}: no LoRA tensor in the file; wanted <module>.lora_A.weight and lora_B")
    for path in paths:
        _check_pair(path, body)
        if file.dora:
            _check_magnitude(path, body)
    return paths


def _check_pair(path: str, body: Stored) -> None:
    shapes = [body[f"{path}.{part}"].shape if f"{path}.{part}" in body else None for part in (_DOWN, _UP)]
    down, up = shapes
    if down is None or up is None:
        raise CorruptAdapterError(f"{WEIGHTS}: {path!r} has only one of lora_A and lora_B; save the adapter again")
    if len(down) != 2 or len(up) != 2:
        raise UnsupportedAdapterError(
            f"{WEIGHTS}: {path!r} has the shapes {shapes}; graftory does LoRA on linear layers"
        )
    if down[0] != up[1] or 0 in (*down, *up):
        raise CorruptAdapterError(f"{WEIGHTS}: {path!r} has the shapes {shapes}, wanted [r, in] and [out, r]")


def _check_magnitude(path: str, body: Stored) -> None:
    tensor, wanted = body.get(f"{path}.{_MAGNITUDE}"), (body[f"{path}.{_UP}"].shape[0],)
    if tensor is None or tensor.shape != wanted:
        got = "none" if tensor is None else tensor.shape
        raise CorruptAdapterError(f"{WEIGHTS}: {path!r} has the {_MAGNITUDE} {got}, wanted {wanted}; save it again")


def _check(file: PeftLora, body: Stored, config: LoraConfig | DoraConfig) -> None:
    for path in config.targets:
        rank = body[f"{path}.{_DOWN}"].shape[0]
        for source, said in ((CONFIG, file.rank_of(path)), ("the specification", config.rank_of(path))):
            if said != rank:
                raise CorruptAdapterError(f"{WEIGHTS}: {path!r} has rank {rank}, {source} says {said}; save both again")
        scales = (file.scale_of(path), config.scale_of(path))
        if scales[0] != scales[1]:
            raise CorruptAdapterError(
                f"{CONFIG}: {path!r} is scaled by {scales[0]}, by the specification {scales[1]}; save both again"
            )


LORA = PeftKind("LORA", read_config, _config, _check, write_config)
