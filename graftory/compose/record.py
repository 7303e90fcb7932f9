"""What adapters read: the inputs at each of their sites, for the same texts. Some merges look at them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graftory.adapter import TASK_SOURCE, Adapter, TaskInfo, TaskKind
from graftory.adapters import AdaptedModel
from graftory.adapters.site import shown
from graftory.compose.gradients import record_gradients
from graftory.compose.select.domains import example_texts
from graftory.data import Text
from graftory.errors import ConfigError
from graftory.training import LoadedBase, load_base
from graftory.training.encode import Collator, Example, encode
from graftory.training.losses import model_inputs

MAX_TOKENS = 2048
"""Most tokens that are kept, spread evenly over all."""


def record_inputs(
    loaded: LoadedBase, adapter: Adapter, texts: Sequence[Text], *, batch_size: int = 32, max_length: int = 128
) -> dict[str, Tensor]:
    """Run a model with an adapter, and keep what the adapter reads at each of its sites.

    Args:
        loaded: The base model.
        adapter: The adapter.
        texts: The same for all adapters that are to be compared.
        batch_size: Rows at a time.
        max_length: Tokens a text is cut to. Not the adapter's own, nor is its template used: what is compared must be
            the same tokens for all.

    Returns:
        [tokens, d_in] by path, tokens that are no padding, at most `MAX_TOKENS` of them.

    Raises:
        BaseMismatchError: If it belongs to another base.
    """
    recorder = _Recorder()
    kind = adapter.spec.task.kind if adapter.spec.task else "classification"
    examples = [_encoded(loaded, kind, text, max_length) for text in texts]
    collator = Collator(loaded.tokenizer.pad_token_id)
    adapted = AdaptedModel(loaded.model, loaded.base)
    try:
        adapted.add("recorded", adapter)
        adapted.eval()
        with adapted.route("recorded"), torch.no_grad(), shown(recorder):
            for start in range(0, len(examples), batch_size):
                batch = collator(examples[start : start + batch_size])
                recorder.mask = batch["attention_mask"].bool().to(loaded.model.device)
                adapted(**model_inputs(kind, {key: value.to(loaded.model.device) for key, value in batch.items()}))
    finally:
        adapted.detach()
    return {path: _spread(torch.cat(parts)) for path, parts in recorder.parts.items()}


def record_examples(
    adapters: Sequence[Adapter], examples: str | None, *, limit: int = 100, seed: int = 0, gradients: bool = False
) -> list[dict[str, Tensor]]:
    """What each adapter reads at its sites, for the same examples or each for its own; it loads their base.

    Args:
        adapters: All of one base.
        examples: A `.txt` with one a line, or a task; None for training texts of the task that each record names.
        limit: At most so many of each.
        seed: Which.
        gradients: Of each example the gradients too, for `fisher`; see `record_gradients`.

    Raises:
        DataError: If they cannot be read.
        ConfigError: If none are given and a record names no task.
    """
    sources = [examples or _own_task(adapter, number) for number, adapter in enumerate(adapters)]
    texts = {source: example_texts(source, limit, seed=seed) for source in sources}
    first = adapters[0].spec
    loaded = load_base(first.base.id, first.task.kind if first.task else "classification")
    pairs = [(adapter, texts[source]) for adapter, source in zip(adapters, sources, strict=True)]
    if gradients:
        return [record_gradients(loaded, adapter, own, seed=seed) for adapter, own in pairs]
    return [record_inputs(loaded, adapter, own) for adapter, own in pairs]


def _own_task(adapter: Adapter, number: int) -> str:
    source = adapter.spec.lineage.parameters.get(TASK_SOURCE)
    if not isinstance(source, str):
        raise ConfigError(f"adapter {number + 1}: its record names no task to take examples of; give --examples")
    return source


def _encoded(loaded: LoadedBase, kind: TaskKind, text: Text, max_length: int) -> Example:
    template = "{text}" if isinstance(text, str) else "{text} {pair}"
    info = TaskInfo("texts", kind, max_length=max_length, template=template)
    return encode(loaded.tokenizer, info, text, "" if kind == "seq2seq" else None)


class _Recorder:
    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.parts: dict[str, list[Tensor]] = {}

    def __call__(self, path: str, x: Tensor) -> None:
        mask = self.mask
        flat = x[mask] if mask is not None and mask.shape == x.shape[:2] else x.flatten(0, -2)
        self.parts.setdefault(path, []).append(flat.float().cpu())


def _spread(x: Tensor) -> Tensor:
    if len(x) <= MAX_TOKENS:
        return x
    return x[torch.linspace(0, len(x) - 1, MAX_TOKENS).long()]
