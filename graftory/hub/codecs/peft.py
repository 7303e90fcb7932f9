"""PEFT's two files, for LoRA: `adapter_config.json` and `adapter_model.safetensors`.

Reading follows PEFT 0.21 to the letter where it changes numbers (scales, ranks, patterns, heads) and
refuses by name what graftory does not do. Where the adapter sits comes from the tensor keys alone:
`target_modules` may be any regular expression and is never evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Lineage
from graftory.config import LoraConfig
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub import strict_json
from graftory.hub.codecs import tensors as shared
from graftory.hub.codecs.peft_config import PeftLora, read_config, write_config
from graftory.hub.codecs.peft_task import imported_task
from graftory.hub.records import TensorEntry
from graftory.hub.safetensors_header import Bytes, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_PARTS = LoraConfig.parts


class PeftCodec:
    """LoRA adapters as PEFT writes and reads them."""

    file_names: tuple[str, ...] = (CONFIG, WEIGHTS)

    def encode(self, adapter: Adapter) -> dict[str, bytes]:
        """See `Codec`."""
        config = write_config(adapter.spec)
        weights = shared.dump({PREFIX + key: value for key, value in adapter.tensors.items()})
        return {CONFIG: config, WEIGHTS: weights}

    def imported_spec(self, files: Mapping[str, Bytes], name: str) -> AdapterSpec:
        """See `Codec`."""
        return _spec(*_read(files), name)

    def check(self, files: Mapping[str, Bytes], spec: AdapterSpec) -> tuple[TensorEntry, ...]:
        """See `Codec`."""
        config, stored = _read(files)
        lora = spec.config
        if not isinstance(lora, LoraConfig):
            raise CorruptAdapterError(f"{CONFIG}: the specification is of method {spec.method!r}; wanted lora")
        targets = _targets({key: tensor for key, tensor in stored.items() if not shared.is_head(key, spec)})
        shared.check_targets(lora.targets, WEIGHTS)
        if set(targets) != set(lora.targets):
            odd = sorted(set(targets) ^ set(lora.targets))[0]
            raise CorruptAdapterError(
                f"{WEIGHTS}: module {odd!r} is only in one of the tensors and the targets; save both"
            )
        for path in targets:
            _check_module(path, stored, config, lora)
        heads = spec.task.head if spec.task else ()
        if set(heads) != set(config.heads_in(tuple(stored))):
            raise CorruptAdapterError(
                f"{CONFIG}: modules_to_save disagree with the heads {sorted(heads)}; save both again"
            )
        shared.check_heads(stored, spec, WEIGHTS)
        return shared.entries(stored, files[WEIGHTS])

    def decode(self, files: Mapping[str, Bytes]) -> dict[str, Tensor]:
        """See `Codec`."""
        return {key.removeprefix(PREFIX): value for key, value in shared.load(files[WEIGHTS]).items()}


def outlined_spec(
    config: bytes, stored: Sequence[StoredTensor], name: str
) -> tuple[AdapterSpec, tuple[TensorEntry, ...]]:
    """The specification and the shapes of the tensors, from the configuration and the header of the weights
    alone. The tensors have no hash.

    Raises:
        CorruptAdapterError: If a file breaks its format.
        UnsupportedAdapterError: If it uses something graftory does not do.
    """
    named = _without_prefix(stored)
    spec = _spec(read_config(strict_json.loads(config, CONFIG), CONFIG), named, name)
    return spec, tuple(TensorEntry(key, named[key].shape, named[key].dtype, "") for key in sorted(named))


def _read(files: Mapping[str, Bytes]) -> tuple[PeftLora, dict[str, StoredTensor]]:
    config = read_config(strict_json.loads(bytes(files[CONFIG]), CONFIG), CONFIG)
    return config, _without_prefix(shared.read_floats(files[WEIGHTS], WEIGHTS))


def _without_prefix(tensors: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    stored = {}
    for tensor in tensors:
        if not tensor.name.startswith(PREFIX):
            raise UnsupportedAdapterError(
                f"{WEIGHTS}: tensor {tensor.name!r} lacks PEFT's prefix {PREFIX!r}; save with PEFT"
            )
        stored[tensor.name.removeprefix(PREFIX)] = tensor
    return stored


def _spec(config: PeftLora, stored: Mapping[str, StoredTensor], name: str) -> AdapterSpec:
    heads = config.heads_in(tuple(stored))
    targets = _targets({key: tensor for key, tensor in stored.items() if not _under(key, heads)})
    ranks = {path: stored[f"{path}.{_PARTS[0]}"].shape[0] for path in targets}
    alphas = {path: config.alpha_of(path) for path in targets}
    return AdapterSpec(
        base=BaseModel(config.base or "unknown", revision=config.revision),
        config=LoraConfig(
            targets=targets,
            init_seed=None,
            rank=config.rank,
            alpha=config.alpha,
            rslora=config.rslora,
            dropout=config.dropout,
            rank_pattern={path: rank for path, rank in ranks.items() if rank != config.rank},
            alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != config.alpha},
        ),
        task=imported_task(config.task_type, heads, stored, name),
        lineage=Lineage(process="import", libraries={"peft": config.peft_version} if config.peft_version else {}),
    )


def _targets(body: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Module paths of the LoRA pairs; refuses every other tensor by name."""
    refusal = f"{WEIGHTS}: tensor %r is not understood; graftory reads lora_A, lora_B and modules_to_save"
    paths = shared.paths_of(body, _PARTS, refusal)
    if not paths:
        raise CorruptAdapterError(f"{WEIGHTS}: no LoRA tensor in the file; wanted <module>.lora_A.weight and lora_B")
    for path in paths:
        _check_pair(path, body)
    return paths


def _check_pair(path: str, body: Mapping[str, StoredTensor]) -> None:
    shapes = [body[f"{path}.{part}"].shape if f"{path}.{part}" in body else None for part in _PARTS]
    down, up = shapes
    if down is None or up is None:
        raise CorruptAdapterError(f"{WEIGHTS}: {path!r} has only one of lora_A and lora_B; save the adapter again")
    if len(down) != 2 or len(up) != 2:
        raise UnsupportedAdapterError(
            f"{WEIGHTS}: {path!r} has the shapes {shapes}; graftory does LoRA on linear layers"
        )
    if down[0] != up[1] or 0 in (*down, *up):
        raise CorruptAdapterError(f"{WEIGHTS}: {path!r} has the shapes {shapes}, wanted [r, in] and [out, r]")


def _check_module(path: str, stored: Mapping[str, StoredTensor], config: PeftLora, lora: LoraConfig) -> None:
    rank = stored[f"{path}.{_PARTS[0]}"].shape[0]
    for source, said in ((CONFIG, config.rank_of(path)), ("the specification", lora.rank_of(path))):
        if said != rank:
            raise CorruptAdapterError(f"{WEIGHTS}: {path!r} has rank {rank}, {source} says {said}; save both again")
    scales = (config.scale_of(path), lora.scale_of(path))
    if scales[0] != scales[1]:
        raise CorruptAdapterError(
            f"{CONFIG}: {path!r} is scaled by {scales[0]}, by the specification {scales[1]}; save both again"
        )


def _under(key: str, heads: tuple[str, ...]) -> bool:
    return any(key.startswith(f"{head}.") for head in heads)
