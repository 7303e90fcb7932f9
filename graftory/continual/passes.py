"""Passes over rows that are no training: gradients, logits, and what adapters read at their sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.adapters import AdaptedModel
from graftory.adapters.head import HeadSite
from graftory.adapters.site import shown
from graftory.data import Rows, TaskFile
from graftory.training import LoadedBase, processes, row_losses
from graftory.training.company import encoded
from graftory.training.encode import Collator, Example, by_length
from graftory.training.losses import model_inputs

_NAME = "measured"


def learning(adapted: AdaptedModel, name: str, *, head: bool) -> dict[str, Tensor]:
    """The live weights of an attached adapter, by their names in `Adapter.tensors`, with those of its head or without.

    Only those that learn.
    """
    weights = adapted.weights(name)
    if head:
        slot = adapted.slot_of(name)
        for site in adapted.heads.values():
            assert isinstance(site, HeadSite)
            named = site.weights[slot].named_parameters()
            weights |= {f"{site.path}.{key}": weight for key, weight in named}
    return {key: weight for key, weight in weights.items() if weight.requires_grad}


@contextmanager
def attached(loaded: LoadedBase, adapter: Adapter, *, learns: bool = False) -> Iterator[AdaptedModel]:
    """The base with one adapter in force for all rows, in evaluation; it comes out as it went in."""
    adapted = AdaptedModel(loaded.model, loaded.base)
    was_training = loaded.model.training
    try:
        adapted.add(_NAME, adapter)
        if learns:
            adapted.train_only(_NAME)
        adapted.eval()
        with adapted.route(_NAME):
            yield adapted
    finally:
        adapted.detach()
        loaded.model.train(was_training)


def squared_gradients(
    loaded: LoadedBase, adapter: Adapter, task: TaskFile, rows: Rows, *, head: bool
) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information: (1/N) Σ_n (∂ -log p(y_n | x_n) / ∂θ)².

    Args:
        loaded: The base model.
        adapter: The adapter whose weights are θ.
        task: The task.
        rows: The rows (x_n, y_n).
        head: Whether θ includes the head.

    Returns:
        Shapes of the weights, fp32, by name.
    """
    with attached(loaded, adapter, learns=True) as adapted:
        weights = learning(adapted, _NAME, head=head)
        sums = {key: torch.zeros_like(weight, dtype=torch.float32) for key, weight in weights.items()}
        for number, batch in enumerate(batches(loaded, task, rows, 1)):
            if number % processes.size() != processes.number():
                continue
            logits = adapted(**model_inputs(task.kind, batch)).logits
            loss = row_losses(task.kind, logits, batch["labels"]).total.sum()
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient.float().square())
    processes.add_up(list(sums.values()))
    return {key: (total / len(rows)).cpu() for key, total in sums.items()}


def second_moments(
    loaded: LoadedBase, adapter: Adapter, task: TaskFile, rows: Rows, batch_size: int
) -> dict[str, Tensor]:
    """C = Σ x xᵀ over the tokens x, padding left out, that an adapter reads at each of its sites.

    A batch is summed in fp32, batches in fp64; sites that read the same tensor (query, key, value) share its sum.

    Returns:
        [d_in, d_in] fp64 by path.
    """
    found: dict[str, Tensor] = {}
    mask: list[Tensor] = []
    own = True
    last: list[Tensor] = []

    def observe(path: str, x: Tensor) -> None:
        if not last or last[0] is not x:
            flat = (x[mask[0]] if mask[0].shape == x.shape[:2] else x.flatten(0, -2)).float()
            last[:] = [x, (flat.T @ flat).cpu()]
        if path not in found:
            found[path] = torch.zeros(last[1].shape, dtype=torch.float64)
        if own:
            found[path] += last[1]

    with attached(loaded, adapter) as adapted, torch.no_grad(), shown(observe):
        for number, batch in enumerate(batches(loaded, task, rows, batch_size, alike=True)):
            own = number % processes.size() == processes.number()
            if number and not own:
                continue  # the first is run by all, so that all have a sum to add
            mask[:] = [batch["attention_mask"].bool()]
            adapted(**model_inputs(task.kind, batch))
    processes.add_up(list(found.values()))
    return found


def batches(
    loaded: LoadedBase, task: TaskFile, rows: Rows, size: int, *, alike: bool = False
) -> Iterator[Mapping[str, Tensor]]:
    """Rows with their labels where the base is, in order; or, if `alike`, rows of like length together."""
    examples: Sequence[Example] = encoded(loaded, task, rows)
    numbers = range(len(examples))
    groups = by_length(examples, size) if alike else [numbers[start : start + size] for start in numbers[::size]]
    collator = Collator(loaded.tokenizer.pad_token_id)
    for group in groups:
        batch = collator([examples[row] for row in group])
        yield {name: value.to(loaded.model.device) for name, value in batch.items()}
