"""The generator: from embeddings of task, layer and position to the weights of an adapter.

Hyperformer++ (Karimi Mahabadi et al. 2021, arXiv:2106.04489), `shared`: for the task τ, the layer l and the position p,

    I = LN(W₂ ReLU(W₁ [z_τ; l_l; p_p] + b₁) + b₂),    each tensor = reshape(W I + b)

with a W and b for each tensor of an adapter, shared by all places of a stack. Hyperformer, not `shared`: I is made
of z_τ alone, and there is a W and b for each tensor of each place. What is made is

    bottleneck   h becomes h + LN_{γ,β}(U act(D h + c) + e), behind attention and the FFN, before the residual sum
    lora         y becomes y + B A x

All W are drawn from N(0, 0.01²), embeddings from N(0, 1), biases are 0; but the W of γ and β, and of B, start at 0, so
that the model starts as the base exactly. The released code draws these as well, which moves every output at first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftory.adapter import Adapter, AdapterSpec, BaseModel, Lineage, Parent, TaskInfo
from graftory.adapters import AdaptedModel, base_of
from graftory.adapters.architectures import linear_widths
from graftory.adapters.bottleneck import NORMED_BOTTLENECK, residual_width
from graftory.adapters.lora import LORA
from graftory.config import HyperformerConfig, HyperPlace, HyperTask, LoraConfig, NormedBottleneckConfig
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPREAD = 0.01
_EMPTY = ("adapter_norm.weight", "adapter_norm.bias", "lora_B.weight")
"""What is generated as zero at first."""


def hyper_config(model: PreTrainedModel, config: HyperformerConfig) -> HyperformerConfig:
    """The configuration with its explicit places on a model.

    Raises:
        UnsupportedAdapterError: If there are none on this architecture, or a target fits none.
    """
    lora = config.generates == "lora"
    if lora:
        paths = LORA.resolve(model, LoraConfig(targets=config.targets))
    else:
        paths = NORMED_BOTTLENECK.resolve(model, NormedBottleneckConfig(targets=config.targets, placement="houlsby"))
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    paths = tuple(sorted(paths, key=lambda path: order[path]))
    layers: dict[str, list[tuple[str, ...]]] = {}
    seen: dict[tuple[str, tuple[str, ...]], int] = {}
    places = []
    for path in paths:
        stack, layer = _where(path)
        known = layers.setdefault(stack, [])
        if layer not in known:
            known.append(layer)
        position = seen.get((stack, layer), 0)
        seen[stack, layer] = position + 1
        inputs, outputs = linear_widths(model.get_submodule(path)) if lora else (residual_width(model, path),) * 2
        places.append(
            HyperPlace(
                path=path, stack=stack, layer=known.index(layer), position=position, inputs=inputs, outputs=outputs
            )
        )
    return replace(config, targets=paths, places=tuple(places)).reading(int(model.config.hidden_size))


def _where(path: str) -> tuple[str, tuple[str, ...]]:
    """The stack that a module is in, and the parts of its path up to the number of its layer.

    Raises:
        UnsupportedAdapterError: If it is in no numbered layer.
    """
    parts = path.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        raise UnsupportedAdapterError(f"{path!r} is in no numbered layer, so a hyperformer has no embedding for it")
    return ("decoder" if "decoder" in parts else "encoder"), tuple(parts[: number + 1])


def new_hyperformer(
    model: PreTrainedModel,
    tasks: Sequence[HyperTask],
    config: HyperformerConfig | None = None,
    *,
    base: BaseModel | None = None,
    heads: Sequence[Mapping[str, Tensor]] = (),
) -> Adapter:
    """An untrained hyperformer: whatever it makes changes nothing yet.

    Args:
        model: The base model, with no adapter attached.
        tasks: Its tasks, whose `head` lists the shapes of `heads`.
        config: The generator; places and tasks are filled in.
        base: The description of `model`; taken from it if not given.
        heads: The tensors of each task's head, by their names in the model.

    Raises:
        UnsupportedAdapterError: If there are no places for it on this architecture.
    """
    config = replace(hyper_config(model, config or HyperformerConfig()), tasks=tuple(tasks))
    generator = torch.Generator().manual_seed(config.init_seed or 0)
    silent = {
        f"{config.maker(place, part)}.weight"
        for place in config.places
        for part in config.made_at(place)
        if part in _EMPTY
    }
    tensors = {
        name: torch.zeros(shape) if name in silent else _initial(name, shape, generator)
        for name, shape in config.tensor_shapes().items()
        if ".head." not in name
    }
    for number, head in enumerate(heads):
        tensors |= {f"tasks.{number}.head.{name}": value for name, value in head.items()}
    return Adapter(AdapterSpec(base=base or base_of(model), config=config, lineage=Lineage("compose")), tensors)


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    last = name.rpartition(".")[2]
    if name.startswith("retriever.") and last == "weight":
        return nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5, generator=generator)
    if last in ("embedding", "layers", "positions"):
        return torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    return torch.zeros(shape) if last == "bias" else _SPREAD * torch.randn(shape, generator=generator)


def generate(config: HyperformerConfig, tensors: Mapping[str, Tensor], task: int) -> dict[str, Tensor]:
    """The adapter of one task: its tensors by path and part, with gradients to those of the generator.

    Args:
        config: The configuration.
        tensors: Those of the hyperformer, by their names in `Adapter.tensors`.
        task: Number of the task.
    """
    made: dict[str, Tensor] = {}
    embedding = tensors[f"tasks.{task}.embedding"]
    for place in config.places:
        stack, given = place.stack, embedding
        if config.shared:
            layer, position = tensors[f"{stack}.layers"][place.layer], tensors[f"{stack}.positions"][place.position]
            given = torch.cat([embedding, layer, position])
        hidden = functional.linear(given, tensors[f"{stack}.project_in.weight"], tensors[f"{stack}.project_in.bias"])
        out = functional.linear(
            functional.relu(hidden), tensors[f"{stack}.project_out.weight"], tensors[f"{stack}.project_out.bias"]
        )
        source = functional.layer_norm(
            out, (config.embedding,), tensors[f"{stack}.norm.weight"], tensors[f"{stack}.norm.bias"]
        )
        for part, shape in config.made_at(place).items():
            name = config.maker(place, part)
            flat = functional.linear(source, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
            made[f"{place.path}.{part}"] = flat.view(shape)
    return made


def live_tensors(adapted: AdaptedModel) -> dict[str, Tensor]:
    """The tensors of a hyperformer that learns in a model, but its heads', by their names in `Adapter.tensors`."""
    generator = adapted.generator
    assert isinstance(generator, nn.ParameterDict)
    return {name.replace("/", "."): value for name, value in generator.items()}


def plain_config(config: HyperformerConfig) -> NormedBottleneckConfig | LoraConfig:
    """The configuration of what is made, as an adapter of its own."""
    targets = tuple(place.path for place in config.places)
    if config.generates == "lora":
        return LoraConfig(targets=targets, rank=config.size, alpha=float(config.size))
    return NormedBottleneckConfig(targets=targets, placement="houlsby", size=config.size, activation=config.activation)


def task_adapter(hyper: Adapter, name: str, *, parent: Parent | None = None) -> Adapter:
    """One task's adapter as a plain one, with its head. It runs, mixes and travels without the generator.

    Args:
        hyper: The hyperformer.
        name: The task.
        parent: Where the hyperformer is kept; noted in the lineage.

    Raises:
        UnsupportedAdapterError: If it is no hyperformer, or does not know the task.
    """
    config = config_of(hyper)
    names = [task.name for task in config.tasks]
    if name not in names:
        raise UnsupportedAdapterError(f"no task {name!r} in this hyperformer; it has {', '.join(names) or 'none'}")
    number, task = names.index(name), config.tasks[names.index(name)]
    with torch.no_grad():
        made = {key: value.clone() for key, value in generate(config, hyper.tensors, number).items()}
    head = {key: hyper.tensors[f"tasks.{number}.head.{key}"] for key in task.head}
    lineage = Lineage(
        process="generated",
        parents=(replace(parent, relation="generated"),) if parent else (),
        parameters={"method": config.method, "task": name, **({"task_source": task.source} if task.source else {})},
        libraries=hyper.spec.lineage.libraries,
    )
    metrics = tuple(metric for metric in hyper.spec.metrics if metric.data == name)
    spec = AdapterSpec(hyper.spec.base, plain_config(config), info_of(task), lineage, metrics, hyper.spec.licence)
    return Adapter(spec, {**made, **head})


def info_of(task: HyperTask) -> TaskInfo:
    """A task as adapters tell it."""
    heads = tuple(sorted({name.rpartition(".")[0] for name in task.head}))
    kind: TaskInfo = TaskInfo(task.name, task.kind, task.labels, heads, task.max_length, task.template)  # type: ignore[arg-type]
    return kind


def config_of(adapter: Adapter) -> HyperformerConfig:
    """The configuration of a hyperformer.

    Raises:
        UnsupportedAdapterError: If it is none.
    """
    config = adapter.spec.config
    if not isinstance(config, HyperformerConfig):
        raise UnsupportedAdapterError(f"got a {config.method} adapter, wanted a hyperformer")
    return config
