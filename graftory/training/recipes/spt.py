"""SPT: the most sensitive weights learn, or a LoRA where a module has many of them (He et al. 2023, arXiv:2303.08566).

The sensitivity of a weight w_n is how much one step on it alone would lower the loss, to first order g_n² (times the
rate of the step): s_n = Σ g_n² over rows, g the gradient of each row's loss with the fresh head. Of all targets
together the τ largest are sensitive. A module with σ = `structured` · r (d_in + d_out) of them or more gets a LoRA of
rank r; in the others the sensitive weights learn, each a number of its own, from 0. τ is the largest with which that is
at most `budget` of all weights.

The authors' code (github.com/ziplab/SPT) squares the gradients of 8 batches rather than of rows, tries τ in steps of
20 000 and takes the total nearest to the budget, above it too; it has σ at a fifth of the LoRA's numbers, as here, and
can also tune biases and norms, as a whole where many of their numbers are sensitive. It is made for images; its variant
with bottlenecks in place of LoRA is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.adapters.architectures import is_linear, linear_widths, module_at
from graftory.adapters.lora import LORA
from graftory.config import LoraConfig, SparsePlace, SparseUpdateConfig, SptConfig
from graftory.errors import ConfigError, UnsupportedAdapterError
from graftory.training.encode import Collator
from graftory.training.losses import model_inputs, row_losses
from graftory.training.recipes.base import Recipe, Scene, plain

INDEX, VALUE = SparseUpdateConfig.parts[:2]


def spt(scene: Scene) -> Recipe:
    """The recipe.

    Raises:
        ConfigError: If the budget is too small for anything.
        UnsupportedAdapterError: If weights of the base are quantised.
    """
    config = scene.config
    assert isinstance(config, SptConfig)
    if not (config.sparse or config.low_rank):
        scene.exchange(_split(scene, config, split(sensitivities(scene, config), config)))
    return Recipe(finish=_kept)


@dataclass(frozen=True, slots=True)
class Split:
    """What learns.

    Attributes:
        entries: Positions of single weights, rising, int32 [n], by module.
        structured: The modules with a LoRA.
    """

    entries: Mapping[str, Tensor]
    structured: tuple[str, ...]


def sensitivities(scene: Scene, config: SptConfig) -> dict[str, Tensor]:
    """Σ g² over rows of every weight of the targets, [d_out, d_in] by module.

    Raises:
        UnsupportedAdapterError: If a weight is quantised.
    """
    model = scene.model
    modules = {path: module_at(model.model, path)[1] for path in config.targets}
    weights = {path: _weight(module, path) for path, module in modules.items()}
    sums = {path: torch.zeros_like(weight, dtype=torch.float32) for path, weight in weights.items()}
    collator, device = Collator(scene.pad_id), next(iter(weights.values())).device
    rows = [{key: value for key, value in row.items() if key != "task_number"} for row in scene.examples]
    model.eval()
    with _learning(weights):
        for row in rows[: config.sensitivity_rows]:
            batch = {key: value.to(device) for key, value in collator([row]).items()}
            with model.route(scene.name):
                logits = model(**model_inputs(scene.kind, batch)).logits
                loss = row_losses(scene.kind, logits, batch["labels"]).mean()
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for path, grad in zip(weights, grads, strict=True):
                if grad is not None:
                    sums[path] += grad.float().square()
    return {path: found if isinstance(modules[path], torch.nn.Linear) else found.T for path, found in sums.items()}


def split(found: Mapping[str, Tensor], config: SptConfig) -> Split:
    """What learns, of sensitivities [d_out, d_in] by module.

    Raises:
        ConfigError: If the budget is too small for anything.
    """
    sizes = [each.numel() for each in found.values()]
    order = torch.cat([each.flatten() for each in found.values()]).argsort(descending=True, stable=True)
    # places in the order of all, of each module's own weights
    owner = torch.repeat_interleave(torch.arange(len(sizes), device=order.device), torch.tensor(sizes).to(order.device))
    ranked = owner[order].cpu()
    lora = torch.tensor([config.rank * sum(each.shape) for each in found.values()])
    low, high = 0, len(order)
    while low < high:
        tau = (low + high + 1) // 2
        if _cost(ranked[:tau], lora, config) <= config.budget * len(order):
            low = tau
        else:
            high = tau - 1
    if low == 0:
        raise ConfigError(
            f"budget: {config.budget} of {len(order)} weights is too little for the most sensitive one of them; raise "
            "it, or lower the rank"
        )
    sensitive, owners = order[:low].cpu(), ranked[:low]
    whole = _is_structured(owners.bincount(minlength=len(sizes)), lora, config)
    starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    entries: dict[str, Tensor] = {}
    for number, path in enumerate(found):
        own = sensitive[owners == number] - starts[number]
        if len(own) and not whole[number]:
            entries[path] = own.sort().values.to(torch.int32)
    return Split(entries, tuple(path for path, is_whole in zip(found, whole.tolist(), strict=True) if is_whole))


def _is_structured(counts: Tensor, lora: Tensor, config: SptConfig) -> Tensor:
    """Which modules get a LoRA, by how many of their weights are sensitive and how many numbers their LoRA has."""
    return counts >= (config.structured * lora).clamp(min=1)


def _cost(ranked: Tensor, lora: Tensor, config: SptConfig) -> int:
    """How many numbers learn if weights of these modules are sensitive; it never falls as they become more."""
    counts = ranked.bincount(minlength=len(lora))
    return int(torch.where(_is_structured(counts, lora, config), lora, counts).sum())


def _weight(module: torch.nn.Module, path: str) -> Tensor:
    weight = module.weight
    if not (is_linear(module) and isinstance(weight, Tensor) and weight.is_floating_point()):
        raise UnsupportedAdapterError(f"{path} is quantised, and spt needs its gradient; load the base unquantised")
    return weight


@contextmanager
def _learning(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets the base's own weights have gradients."""
    before = {path: weight.requires_grad for path, weight in weights.items()}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        yield
    finally:
        for path, weight in weights.items():
            weight.requires_grad_(before[path])


def _split(scene: Scene, config: SptConfig, found: Split) -> Adapter:
    """The fresh adapter with what learns: values 0, LoRAs as they start."""
    adapter, model = scene.model.extract(scene.name), scene.model.model
    generator = torch.Generator().manual_seed(config.init_seed or 0)
    lora = LoraConfig(
        targets=found.structured,
        init_seed=config.init_seed,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
    )
    places: list[SparsePlace] = []
    tensors: dict[str, Tensor] = {}
    for path, index in found.entries.items():
        inputs, outputs = linear_widths(module_at(model, path)[1])
        places.append(SparsePlace(path=path, count=len(index), inputs=inputs, outputs=outputs))
        tensors |= {f"{path}.{INDEX}": index, f"{path}.{VALUE}": torch.zeros(len(index))}
    for path in found.structured:
        fresh = LORA.initial(model, path, lora, generator)
        tensors |= {f"{path}.{part}": tensor for part, tensor in fresh.items()}
    grown = replace(
        config,
        targets=tuple(path for path in config.targets if path in found.entries or path in found.structured),
        sparse=tuple(places),
        low_rank=lora if found.structured else None,
    )
    return Adapter(replace(adapter.spec, config=grown), {**tensors, **adapter.head_tensors()})


def _kept(adapter: Adapter) -> Adapter:
    made = plain(adapter, SparseUpdateConfig, adapter.body_tensors())
    return replace(made, spec=replace(made.spec, config=replace(made.spec.config, init_seed=None)))
