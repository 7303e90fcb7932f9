"""Run rows through a base, each with its own adapter and head, in mixed batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftory.adapter import Adapter, TaskInfo, TaskKind
from graftory.adapters import AdaptedModel
from graftory.adapters.route import Row
from graftory.adapters.smop import reading
from graftory.data import Text
from graftory.errors import ConfigError
from graftory.training.base import LoadedBase, quiet
from graftory.training.encode import Collator, Example, by_length, encode
from graftory.training.losses import model_inputs, readable_tokens, row_losses
from graftory.training.mixture import Mixture, embedded

HEADED = ("classification", "regression")
"""The kinds of tasks that have a head and one answer for a row, read off a single forward pass."""


@dataclass(frozen=True, slots=True)
class Query:
    """One row: its text, the adapter it uses (None: the bare base) and the one whose head it uses."""

    text: Text
    adapter: Adapter | None
    head: Adapter | None = None
    """None: the adapter's own."""
    task: TaskInfo | None = None
    """None: that of the head's adapter, or of the adapter."""
    target: int | float | str | None = None
    mixture: Mixture | None = None
    """Adapters that the row is run through in place of one, with the weights that it asks for."""

    @property
    def info(self) -> TaskInfo:
        """The task that the row is read as.

        Raises:
            ConfigError: If neither the query nor an adapter says, or nothing brings the head it needs.
        """
        owner = self.head or self.adapter
        info = self.task or (owner.spec.task if owner else None)
        if info is None:
            raise ConfigError("the adapter does not say what task it is for; give the task")
        if info.kind in HEADED and not (owner and owner.head_tensors()):
            raise ConfigError(f"task {info.name!r}: no adapter with a head for {info.kind} was given; name one as head")
        return info


@dataclass(frozen=True, slots=True)
class Prediction:
    """What came out for one row; the fields that its kind of task has."""

    label: str | None = None
    probabilities: Mapping[str, float] | None = None
    value: float | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """Logits of a row, cut to its own head (None for language models), and its loss if it has a target."""

    logits: Tensor | None
    loss: float = 0.0
    targets: int = 0


def predict(
    loaded: LoadedBase, queries: Sequence[Query], *, batch_size: int = 32, max_new_tokens: int = 64
) -> tuple[Prediction, ...]:
    """Predict labels with probabilities, numbers or texts, in the order of the queries.

    Raises:
        ConfigError: If a row lacks a task or a head.
        BaseMismatchError: If an adapter belongs to another base.
    """
    kinds = {query.info.kind for query in queries}
    if kinds & {"causal_lm", "seq2seq"}:
        texts = generate(loaded, queries, batch_size=batch_size, max_new_tokens=max_new_tokens)
        return tuple(Prediction(text=text) for text in texts)
    scored = score(loaded, queries, batch_size=batch_size)
    return tuple(_prediction(query.info, row.logits) for query, row in zip(queries, scored, strict=True))


def score(loaded: LoadedBase, queries: Sequence[Query], *, batch_size: int = 32) -> list[Scored]:
    """Run every row forward; rows with a target get their loss.

    Raises:
        ConfigError: If a row lacks a task or a head.
        BaseMismatchError: If an adapter belongs to another base.
    """
    collator = Collator(loaded.tokenizer.pad_token_id)

    def run(adapted: AdaptedModel, batch: Mapping[str, Tensor], part: Sequence[Query]) -> list[Scored]:
        kind = part[0].info.kind
        with torch.no_grad(), reading(readable_tokens(kind, batch)):
            logits = adapted(**model_inputs(kind, batch)).logits
        if kind not in HEADED:
            losses = row_losses(kind, logits, batch["labels"])
            return [Scored(None, float(a), int(b)) for a, b in zip(losses.total, losses.count, strict=True)]
        return [_scored(query, row) for query, row in zip(part, logits.float().cpu(), strict=True)]

    def prepare(query: Query) -> Example:
        target = None if query.info.kind in HEADED else query.target
        return encode(loaded.tokenizer, query.info, query.text, target)

    return _batched(loaded, queries, batch_size, collator, prepare, run)


def read(
    loaded: LoadedBase,
    texts: Sequence[str],
    adapters: Sequence[Adapter | None],
    *,
    max_length: int = 128,
    batch_size: int = 32,
) -> list[Scored]:
    """The loss of a causal language model on plain texts, -log p(x_t | x_<t) summed over all tokens but the first.

    Args:
        loaded: The base model.
        texts: Texts; they are cut to `max_length` tokens.
        adapters: Which adapter each text is read with; None: the bare base.
        max_length: Tokens a text.
        batch_size: Texts at a time.

    Raises:
        ConfigError: If the base is no causal language model.
        BaseMismatchError: If an adapter belongs to another base.
    """
    if loaded.model.config.is_encoder_decoder or not loaded.model.can_generate():
        raise ConfigError(f"{loaded.base.id!r} does not read text token by token; wanted a causal language model")
    info = TaskInfo("text", "causal_lm", max_length=max_length)
    queries = [Query(text, adapter, None, info) for text, adapter in zip(texts, adapters, strict=True)]

    def run(adapted: AdaptedModel, batch: Mapping[str, Tensor], _: Sequence[Query]) -> list[Scored]:
        with torch.no_grad():
            logits = adapted(**model_inputs(info.kind, batch)).logits
        losses = row_losses(info.kind, logits, batch["labels"])
        return [Scored(None, float(a), int(b)) for a, b in zip(losses.total, losses.count, strict=True)]

    def prepare(query: Query) -> Example:
        encoded = loaded.tokenizer(query.text, truncation=True, max_length=max_length)
        ids = list(encoded["input_ids"])
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}

    return _batched(loaded, queries, batch_size, Collator(loaded.tokenizer.pad_token_id), prepare, run)


def generate(
    loaded: LoadedBase, queries: Sequence[Query], *, batch_size: int = 32, max_new_tokens: int = 64
) -> list[str]:
    """Let a language model write, greedily, after every prompt.

    Raises:
        ConfigError: If a row lacks a task.
        BaseMismatchError: If an adapter belongs to another base.
    """
    tokenizer = loaded.tokenizer
    decoder_only = not loaded.model.config.is_encoder_decoder
    collator = Collator(tokenizer.pad_token_id, "left" if decoder_only else "right")

    def run(adapted: AdaptedModel, batch: Mapping[str, Tensor], _: Sequence[Query]) -> list[str]:
        with quiet():
            written = adapted.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=collator.pad_id
            )
        new = written[:, batch["input_ids"].shape[1] :] if decoder_only else written
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    def prepare(query: Query) -> Example:
        return encode(tokenizer, query.info, query.text)

    return _batched(loaded, queries, batch_size, collator, prepare, run)


def _batched(
    loaded: LoadedBase,
    queries: Sequence[Query],
    batch_size: int,
    collator: Collator,
    prepare: Callable[[Query], Example],
    run: Callable[[AdaptedModel, Mapping[str, Tensor], Sequence[Query]], list[Any]],
) -> list[Any]:
    """Batches of rows of like length, whatever their adapters; results in the order of the queries."""
    examples = [prepare(query) for query in queries]
    results: list[Any] = [None] * len(queries)
    device = loaded.model.device
    with _attached(loaded, queries) as (adapted, names):
        for rows in by_length(examples, batch_size):
            part = [queries[row] for row in rows]
            batch = {name: value.to(device) for name, value in collator([examples[row] for row in rows]).items()}
            heads = [names[id(query.head)] if query.head else None for query in part]
            with adapted.route(_routes(adapted, batch, part, names), heads):
                for row, result in zip(rows, run(adapted, batch, part), strict=True):
                    results[row] = result
    return results


def _routes(
    adapted: AdaptedModel, batch: Mapping[str, Tensor], part: Sequence[Query], names: Mapping[int, str]
) -> list[Row]:
    """What each row uses: its adapter, or its mixture with the weights that it asks for."""
    routes: list[Row] = [names[id(query.adapter)] if query.adapter else None for query in part]
    mixtures = {id(query.mixture): query.mixture for query in part if query.mixture is not None}
    for key, mixture in mixtures.items():
        with torch.no_grad():
            weights = mixture.weigh(embedded(adapted.model, part[0].info.kind, batch)).tolist()
        own = [names[id(adapter)] for adapter in mixture.adapters]
        for row, query in enumerate(part):
            if id(query.mixture) == key:
                routes[row] = dict(zip(own, weights[row], strict=True))
    return routes


@contextmanager
def _attached(loaded: LoadedBase, queries: Iterable[Query]) -> Iterator[tuple[AdaptedModel, Mapping[int, str]]]:
    """The base with all adapters of the queries in it, each once; names, which errors show, by the identity of
    the adapter.
    """
    used = (
        each
        for query in queries
        for each in (query.adapter, query.head, *(query.mixture.adapters if query.mixture else ()))
    )
    unique = {id(each): each for each in used if each is not None}
    names: dict[int, str] = {}
    for key, adapter in unique.items():
        name = adapter.spec.task.name if adapter.spec.task else adapter.spec.method
        names[key] = name if name not in names.values() else f"{name} ({len(names) + 1})"
    adapted = AdaptedModel(loaded.model, loaded.base)
    was_training = loaded.model.training
    loaded.model.eval()
    try:
        for key, adapter in unique.items():
            adapted.add(names[key], adapter)
        adapted.eval()
        yield adapted, names
    finally:
        adapted.detach()
        loaded.model.train(was_training)


def _scored(query: Query, logits: Tensor) -> Scored:
    own = logits[: query.info.outputs]
    if query.target is None:
        return Scored(own)
    loss = row_losses(query.info.kind, own[None], torch.tensor([query.target])).total
    return Scored(own, float(loss), 1)


def _prediction(info: TaskInfo, logits: Tensor | None) -> Prediction:
    assert logits is not None
    return _PREDICTIONS[info.kind](info, logits)


def _label(info: TaskInfo, logits: Tensor) -> Prediction:
    probabilities = logits.softmax(0).tolist()
    return Prediction(info.labels[int(logits.argmax())], dict(zip(info.labels, probabilities, strict=True)))


_PREDICTIONS: Mapping[TaskKind, Callable[[TaskInfo, Tensor], Prediction]] = {
    "classification": _label,
    "regression": lambda _, logits: Prediction(value=float(logits[0])),
}
