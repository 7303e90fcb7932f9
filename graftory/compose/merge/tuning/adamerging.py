"""Weights of `adamerging`: unlabelled inputs, and how sure the merged model is of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter, TaskInfo
from graftory.adapters import AdaptedModel
from graftory.compose.merge import merge
from graftory.compose.merge.adamerging import AdamergingParameters
from graftory.config import LoraConfig
from graftory.data import Text
from graftory.errors import ConfigError, MergeError
from graftory.training import LoadedBase
from graftory.training.encode import Collator, Example, encode
from graftory.training.losses import model_inputs


@dataclass(frozen=True, slots=True)
class TunedLayers:
    """What was found.

    Attributes:
        weights: As `merge` takes them: a pattern for each layer, one weight for each adapter.
        before: Mean entropy of the inputs' predictions at the start, in nats.
        after: The same with these weights.
    """

    weights: Mapping[str, tuple[float, ...]]
    before: float
    after: float


def layer_of(path: str) -> str:
    """The layer that a module is in: its path up to the first number, `bert.encoder.layer.3`; or all of it."""
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else path


def tune_layers(
    loaded: LoadedBase,
    adapters: Sequence[Adapter],
    inputs: Sequence[Sequence[Text]],
    parameters: AdamergingParameters | None = None,
    *,
    seed: int = 0,
) -> TunedLayers:
    """min over w_t^l of the mean entropy −Σ_c p_c log p_c of the merged model's predictions (arXiv:2310.02575).

    Each task's inputs are read with its own head. No merged model is made: an adapter is attached layer by layer, and
    every row uses the mixture of all of them, whose weights have gradients. Adam, from `start` on, 0 ≤ w ≤ 1 as in the
    released code. The paper takes 500 steps of 0.001 over the test inputs; here it is fewer and longer ones, over
    whatever inputs are given.

    Args:
        loaded: The base model, for classification.
        adapters: What is merged, each with a task and a head.
        inputs: Unlabelled inputs of each adapter's task.
        parameters: How to search.
        seed: Of the order of the inputs.

    Raises:
        ConfigError: If an adapter is no classifier, or has no inputs.
        MergeError: If one changes more than a product of factors can say (`merge` with weights by hand can merge it).
        BaseMismatchError: If an adapter belongs to another base.
    """
    chosen = parameters or AdamergingParameters()
    tasks = [_classifier(adapter, number) for number, adapter in enumerate(adapters)]
    if len(inputs) != len(adapters) or not all(inputs):
        raise ConfigError("adamerging: wanted inputs of every adapter's task, at least one each; give --tune")
    parts = [_by_layer(adapter, number) for number, adapter in enumerate(adapters)]
    layers = tuple(dict.fromkeys(layer for one in parts for layer in one))
    sets = [[encode(loaded.tokenizer, task, text) for text in texts] for task, texts in zip(tasks, inputs, strict=True)]
    batches = _Batches(sets, chosen.step_rows, seed)
    weights = nn.Parameter(torch.full((len(layers), len(adapters)), chosen.start, device=loaded.model.device))
    with _attached(loaded, adapters, parts) as adapted:
        reader = _Reader(adapted, loaded, tasks, layers, parts, weights)
        before = reader.over(sets)
        optimizer = torch.optim.Adam([weights], lr=chosen.step_size)
        for _ in range(chosen.steps):
            optimizer.zero_grad()
            reader.entropy(next(batches)).backward()
            optimizer.step()
            with torch.no_grad():
                weights.clamp_(0, 1)
        after = reader.over(sets)
    found = weights.detach().cpu().double().tolist()
    return TunedLayers({pattern_of(layer): tuple(row) for layer, row in zip(layers, found, strict=True)}, before, after)


def pattern_of(layer: str) -> str:
    """The pattern of a layer's modules, as `merge` takes it."""
    return f"{layer}.*" if layer.rpartition(".")[2].isdigit() else layer


def _classifier(adapter: Adapter, number: int) -> TaskInfo:
    task = adapter.spec.task
    if task is None or task.kind != "classification" or not adapter.head_tensors():
        raise ConfigError(
            f"adamerging: adapter {number + 1} is no classifier with a head, so its predictions have no entropy; "
            "give weights by hand, or use another method"
        )
    return task


def _by_layer(adapter: Adapter, number: int) -> dict[str, Adapter]:
    """The adapter in pieces, one a layer, as plain LoRA of scale 1 without a head."""
    plain = merge([adapter], "linear", weights=[1.0])
    config = plain.spec.config
    if not isinstance(config, LoraConfig):
        raise MergeError(
            f"adamerging: adapter {number + 1} ({adapter.spec.method}) is no product of factors alone, so it cannot be "
            "tuned; give --weights by hand"
        )
    paths: dict[str, list[str]] = {}
    for path in config.targets:
        paths.setdefault(layer_of(path), []).append(path)
    return {layer: _only(plain, config, here) for layer, here in paths.items()}


def _only(adapter: Adapter, config: LoraConfig, paths: Sequence[str]) -> Adapter:
    own = replace(
        config,
        targets=tuple(paths),
        rank_pattern={path: rank for path, rank in config.rank_pattern.items() if path in paths},
        alpha_pattern={path: alpha for path, alpha in config.alpha_pattern.items() if path in paths},
    )
    names = [f"{path}.{part}" for path in paths for part in config.parts]
    spec = replace(adapter.spec, config=own, task=None)
    return Adapter(spec, {name: adapter.tensors[name] for name in names})


def _slot(number: int, layer: str) -> str:
    return f"{number} {layer}"


def _head(number: int) -> str:
    return f"head {number}"


@contextmanager
def _attached(
    loaded: LoadedBase, adapters: Sequence[Adapter], parts: Sequence[Mapping[str, Adapter]]
) -> Iterator[AdaptedModel]:
    """The base with all pieces, and with each adapter for its head."""
    adapted = AdaptedModel(loaded.model, loaded.base)
    was_training = loaded.model.training
    try:
        for number, adapter in enumerate(adapters):
            adapted.add(_head(number), adapter)
            for layer, piece in parts[number].items():
                adapted.add(_slot(number, layer), piece)
        adapted.eval()
        yield adapted
    finally:
        adapted.detach()
        loaded.model.train(was_training)


class _Batches:
    """Rows of every task at a time, over and over, in an order drawn by the seed."""

    def __init__(self, sets: Sequence[Sequence[Example]], size: int, seed: int) -> None:
        self._sets = sets
        self._size = size
        self._draw = torch.Generator().manual_seed(seed)
        self._left: list[list[int]] = [[] for _ in sets]

    def __next__(self) -> list[list[Example]]:
        return [self._some(number) for number in range(len(self._sets))]

    def _some(self, number: int) -> list[Example]:
        rows = self._sets[number]
        if not self._left[number]:
            self._left[number] = torch.randperm(len(rows), generator=self._draw).tolist()
        taken, self._left[number] = self._left[number][: self._size], self._left[number][self._size :]
        return [rows[row] for row in taken]


class _Reader:
    """Runs rows of all tasks through the mixture."""

    def __init__(
        self,
        adapted: AdaptedModel,
        loaded: LoadedBase,
        tasks: Sequence[TaskInfo],
        layers: Sequence[str],
        parts: Sequence[Mapping[str, Adapter]],
        weights: Tensor,
    ) -> None:
        self._adapted = adapted
        self._collator = Collator(loaded.tokenizer.pad_token_id)
        self._device = loaded.model.device
        self._tasks = tasks
        self._places = [
            (_slot(number, layer), place, number)
            for place, layer in enumerate(layers)
            for number in range(len(tasks))
            if layer in parts[number]
        ]
        self._weights = weights

    def entropy(self, rows: Sequence[Sequence[Example]]) -> Tensor:
        """The sum over tasks of the mean entropy of their rows."""
        flat = [(number, row) for number, some in enumerate(rows) for row in some]
        mixture = {slot: self._weights[place, number] for slot, place, number in self._places}
        batch = {name: value.to(self._device) for name, value in self._collator([row for _, row in flat]).items()}
        with self._adapted.route([mixture] * len(flat), [_head(number) for number, _ in flat]):
            logits = self._adapted(**model_inputs("classification", batch)).logits.float()
        parts = []
        for number, task in enumerate(self._tasks):
            own = [place for place, (other, _) in enumerate(flat) if other == number]
            if own:
                parts.append(entropy_of(logits[own][:, : task.outputs]).mean())
        return torch.stack(parts).sum()

    def over(self, sets: Sequence[Sequence[Example]], size: int = 32) -> float:
        """The mean over tasks of the mean entropy of all their rows."""
        found = []
        with torch.no_grad():
            for number, rows in enumerate(sets):
                total = 0.0
                for start in range(0, len(rows), size):
                    some = rows[start : start + size]
                    only = [list(some) if other == number else [] for other in range(len(sets))]
                    total += float(self.entropy(only)) * len(some)
                found.append(total / len(rows))
        return sum(found) / len(found)


def entropy_of(logits: Tensor) -> Tensor:
    """−Σ_c p_c log p_c of every row, p = softmax(logits), in nats."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1)
