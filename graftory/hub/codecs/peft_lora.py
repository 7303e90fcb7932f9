"""LoRA, with biases or without, and DoRA in PEFT's files: tensors, ranks and scales, checked against each other."""

from __future__ import annotations

from typing import Any

from graftory.config import DoraConfig, LoraBiasConfig, LoraConfig
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub.codecs import tensors as shared
from graftory.hub.codecs.peft_config import PeftLora, read_config, write_config
from graftory.hub.codecs.peft_kind import CONFIG, WEIGHTS, PeftKind, Stored

_DOWN, _UP, _MAGNITUDE = DoraConfig.parts
_UP_BIAS, _OWN, _BIAS = LoraBiasConfig.parts[2:]
Config = LoraConfig | LoraBiasConfig | DoraConfig


def _kind(file: PeftLora) -> type[Config]:
    """The configuration that files need: the plainest one."""
    if not file.lora_bias and file.bias == "none":
        return DoraConfig if file.dora else LoraConfig
    if file.dora:
        raise UnsupportedAdapterError(f"{CONFIG}: bias or lora_bias with use_dora is something graftory does not do")
    return LoraBiasConfig


def _config(file: PeftLora, body: Stored) -> Config:
    kind = _kind(file)
    linears = _linears(file, body, kind)
    ranks = {path: body[f"{path}.{_DOWN}"].shape[0] for path in linears}
    alphas = {path: file.alpha_of(path) for path in linears}
    more = _biases(file, body, linears) if kind is LoraBiasConfig else {"targets": linears}
    return kind(
        init_seed=None,
        rank=file.rank,
        alpha=file.alpha,
        rslora=file.rslora,
        dropout=file.dropout,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != file.rank},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != file.alpha},
        **more,
    )


def _linears(file: PeftLora, body: Stored, kind: type[Config]) -> tuple[str, ...]:
    """Module paths of the LoRA pairs; refuses every tensor that the method does not explain, by name."""
    # what may stand behind a path, the longer ones first
    parts = sorted(kind.parts, key=len, reverse=True)
    known = ", ".join(part.removesuffix(".weight") for part in kind.parts)
    refusal = f"{WEIGHTS}: tensor %r is not understood; graftory reads {known} and modules_to_save"
    paths = tuple(
        path
        for path in shared.paths_of(body, parts, refusal)
        if any(f"{path}.{part}" in body for part in (_DOWN, _UP, _UP_BIAS, _OWN, _MAGNITUDE))
    )
    if not paths:
        raise CorruptAdapterError(f"{WEIGHTS}: no LoRA tensor in the file; wanted <module>.lora_A.weight and lora_B")
    for path in paths:
        _check_pair(path, body)
        if file.dora:
            _check_vector(path, _MAGNITUDE, body)
        if file.lora_bias:
            _check_vector(path, _UP_BIAS, body)
        elif f"{path}.{_UP_BIAS}" in body:
            raise CorruptAdapterError(f"{WEIGHTS}: {path!r} has {_UP_BIAS}, {CONFIG} no lora_bias; save both again")
        if f"{path}.{_OWN}" in body:
            _check_vector(path, _OWN, body)
    return paths


def _biases(file: PeftLora, body: Stored, linears: tuple[str, ...]) -> dict[str, Any]:
    """What a configuration with biases says beside LoRA's part."""
    alone = sorted(key.removesuffix(f".{_BIAS}") for key in body if _is_alone(key))
    own = [path for path in linears if f"{path}.{_OWN}" in body]
    for path in alone:
        if len(body[f"{path}.{_BIAS}"].shape) != 1:
            raise CorruptAdapterError(f"{WEIGHTS}: {path}.{_BIAS} is no vector; save the adapter again")
    if (own and file.bias == "none") or (alone and file.bias != "all"):
        raise CorruptAdapterError(
            f"{WEIGHTS}: the bias of {(alone or own)[0]!r} is there, {CONFIG} says bias = {file.bias!r}; save both"
        )
    return {
        "targets": (*linears, *alone),
        "lora_bias": file.lora_bias,
        "bias": file.bias,
        "biases": (*own, *alone),
        "bias_only": tuple(alone),
    }


def _is_alone(key: str) -> bool:
    return key.endswith(f".{_BIAS}") and not key.endswith((f".{_OWN}", f".{_UP_BIAS}"))


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


def _check_vector(path: str, part: str, body: Stored) -> None:
    tensor, wanted = body.get(f"{path}.{part}"), (body[f"{path}.{_UP}"].shape[0],)
    if tensor is None or tensor.shape != wanted:
        got = "none" if tensor is None else tensor.shape
        raise CorruptAdapterError(f"{WEIGHTS}: {path!r} has the {part} {got}, wanted {wanted}; save it again")


def _check(file: PeftLora, body: Stored, config: Config) -> None:
    if isinstance(config, LoraBiasConfig):
        found = _biases(file, body, config.linears)
        said = {name: getattr(config, name) for name in found}
        odd = [name for name in found if _as_set(found[name]) != _as_set(said[name])]
        if odd:
            raise CorruptAdapterError(f"{CONFIG}: {odd[0]} is not what the specification says; save both again")
    for path in config.linears if isinstance(config, LoraBiasConfig) else config.targets:
        rank = body[f"{path}.{_DOWN}"].shape[0]
        for source, said_rank in ((CONFIG, file.rank_of(path)), ("the specification", config.rank_of(path))):
            if said_rank != rank:
                raise CorruptAdapterError(
                    f"{WEIGHTS}: {path!r} has rank {rank}, {source} says {said_rank}; save both again"
                )
        scales = (file.scale_of(path), config.scale_of(path))
        if scales[0] != scales[1]:
            raise CorruptAdapterError(
                f"{CONFIG}: {path!r} is scaled by {scales[0]}, by the specification {scales[1]}; save both again"
            )


def _as_set(value: Any) -> Any:
    return set(value) if isinstance(value, tuple) else value


LORA = PeftKind("LORA", read_config, _config, _check, write_config)
