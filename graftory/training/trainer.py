"""transformers' `Trainer` for adapters: it trains through a route and stores only what learns."""

# ruff: noqa: ARG002 - the signatures are those of transformers

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftory.adapter import TaskKind
from graftory.adapters import AdaptedModel
from graftory.adapters.site import shown
from graftory.adapters.smop import reading
from graftory.errors import ConfigError, CorruptAdapterError
from graftory.training import processes
from graftory.training.encode import COUNTED, TASK_NUMBER, Collator, Example
from graftory.training.losses import RowLosses, mixed_losses, model_inputs, readable_tokens
from graftory.training.sampler import LengthSampler

CHECKPOINT_FILE = "adapter.safetensors"
_STATE_FILE = "trainer_state.json"


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a loss term sees of one training step, inside the route."""

    model: AdaptedModel
    batch: Mapping[str, Tensor]
    outputs: Any
    """What the model returned."""
    step: int
    """Optimizer steps done so far."""
    name: str = ""
    """The adapter that learns."""
    counted: Tensor | None = None
    """Where several processes train: 0 for rows that only fill the batch, [rows]."""


LossTerm = Callable[[StepContext], Mapping[str, Tensor]]
"""Named scalar losses that are added to the task's."""

StepRoute = Callable[[AdaptedModel, str], AbstractContextManager[None]]
"""Puts the route of a training step in force, for the adapter of the given name and whatever is attached beside it."""

RowsRoute = Callable[[AdaptedModel, str, Mapping[str, Tensor]], AbstractContextManager[None]]
"""The same, shown the batch, which may not be where the model is yet."""

GradientHook = Callable[[AdaptedModel, int], None]
"""Called with the model and the number of steps done, when the gradients are complete and clipped and the
optimizer has not used them yet; it may change them in place."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """How a strategy plugs in to training."""

    loss_terms: tuple[LossTerm, ...] = ()
    on_gradients: tuple[GradientHook, ...] = ()
    undecayed: tuple[str, ...] = ()
    """Ends of the names of weights that get no weight decay."""
    rates: tuple[tuple[str, float], ...] = ()
    """Weights with a highest learning rate of their own: the beginning or end of their names, and the rate."""
    frozen: tuple[str, ...] = ()
    """Ends of the names, in `Adapter.tensors`, of weights of the adapter's body that do not learn."""
    route: StepRoute | None = None
    """What a training step runs through; None: the adapter alone."""
    route_rows: RowsRoute | None = None
    """The same where it depends on the rows; `route` is then what a forward runs through that is done again in the
    backward, to save memory."""
    observers: tuple[Callable[[str, Tensor], None], ...] = ()
    """Shown the path and the inputs of the adapter at each of its sites, in every forward for the task's loss."""
    extra: torch.nn.Module | None = None
    """More weights that learn and are in the checkpoints."""
    stand_ins: StepRoute | None = None
    """What a training step runs through beside its route: puts tensors in the place of weights, with
    `AdaptedModel.made`."""


NO_HOOKS = Hooks()


class _Gradients(TrainerCallback):
    """Calls the gradient hooks."""

    def __init__(self, adapted: AdaptedModel, hooks: Sequence[GradientHook]) -> None:
        self.adapted, self.hooks = adapted, hooks

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for hook in self.hooks:
            hook(self.adapted, state.global_step)


class AdapterTrainer(Trainer):
    """Trains one attached adapter.

    The route covers forward and backward, because gradient checkpointing runs the forward again within the
    backward. Checkpoints hold the trainable tensors in place of the whole model.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        name: str,
        kind: TaskKind,
        arguments: TrainingArguments,
        examples: Sequence[Example],
        collator: Collator,
        hooks: Hooks,
        callbacks: Sequence[TrainerCallback],
        others: Sequence[tuple[str | None, TaskKind]] = (),
    ) -> None:
        super().__init__(
            model=adapted,
            args=arguments,
            data_collator=collator,
            train_dataset=_with_filling(examples, arguments.world_size),
            callbacks=[*callbacks, _Gradients(adapted, hooks.on_gradients)],
        )
        self.examples, self.lengths = examples, [len(example["input_ids"]) for example in examples]
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is ours: a mean over each batch
        self.adapted, self.name, self.kind, self.hooks = adapted, name, kind, hooks
        self.heads, self.kinds = (None, *(head for head, _ in others)), (kind, *(other for _, other in others))
        if arguments.world_size > 1:
            # gradients are summed by `mean_gradients`: DDP cannot do with weights that only a loss term uses
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self._sums: dict[str, Tensor | float] = {}
        self._batches = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthSampler:
        several = self.args.world_size > 1
        rows = self.args.per_device_train_batch_size * self.args.world_size
        return LengthSampler(self.lengths, rows, self.args.seed, filled=several)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """The weights that decay: transformers' choice, without those of the hooks."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(self.hooks.undecayed or "\n")]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the settings; weights with rates of their own are in groups of their own."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        for text, rate in self.hooks.rates:
            named = self._learning().items()
            own = {weight for name, weight in named if name.startswith(text) or name.endswith(text)}
            for group in list(optimizer.param_groups):
                apart = [weight for weight in group["params"] if weight in own]
                group["params"] = [weight for weight in group["params"] if weight not in own]
                if apart:
                    optimizer.add_param_group({**group, "params": apart, "lr": rate})
        return optimizer

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward, both inside the route."""
        with self._in_force(inputs):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            processes.mean_gradients(list(self._learning().values()))
        return loss

    def through(self, head: str | None) -> tuple[TaskKind, list[Example]]:
        """The kind and the rows of what goes through one of the heads, None being that of the adapter that learns."""
        numbers = [number for number, own in enumerate(self.heads) if own == head]
        return self.kinds[numbers[0]], [row for row in self.examples if row.get(TASK_NUMBER, 0) in numbers]

    def logits(self, examples: Sequence[Example]) -> Tensor:
        """What the model says of rows, run as in a training step but without dropout."""
        device = self.adapted.model.device
        inputs = {name: value.to(device) for name, value in self.data_collator(list(examples)).items()}
        was_training = self.adapted.training
        self.adapted.eval()
        try:
            with torch.no_grad(), self._in_force(inputs), reading(readable_tokens(self.kind, inputs)):
                inputs.pop(TASK_NUMBER, None)
                logits: Tensor = self.adapted(**model_inputs(self.kind, inputs)).logits
        finally:
            self.adapted.train(was_training)
        return logits

    @contextmanager
    def _in_force(self, inputs: dict[str, Any]) -> Iterator[None]:
        """What a forward of these rows runs through."""
        stand_ins = self.hooks.stand_ins
        with nullcontext() if stand_ins is None else stand_ins(self.adapted, self.name), self._route(inputs):
            yield

    def _route(self, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """The hooks' route, or the adapter for all rows; where tasks are mixed, each row with its own task's head."""
        if self.hooks.route_rows is not None:
            return self.hooks.route_rows(self.adapted, self.name, inputs)
        if self.hooks.route is not None:
            return self.hooks.route(self.adapted, self.name)
        numbers = inputs.get(TASK_NUMBER)
        if numbers is None:
            return self.adapted.route(self.name)
        return self.adapted.route([self.name] * len(numbers), [self.heads[number] for number in numbers.tolist()])

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss plus every named loss term."""
        numbers, counted = inputs.pop(TASK_NUMBER, None), inputs.pop(COUNTED, None)
        with ExitStack() as stack:
            stack.enter_context(reading(readable_tokens(self.kind, inputs)))
            for observer in self.hooks.observers:
                stack.enter_context(shown(observer))
            outputs = model(**model_inputs(self.kind, inputs))
        kinds = [self.kind] if numbers is None else [self.kinds[number] for number in numbers.tolist()]
        losses = mixed_losses(kinds, outputs.logits, inputs["labels"])
        terms = {"task": losses.mean() if counted is None else _part_of_mean(losses, counted)}
        context = StepContext(self.adapted, inputs, outputs, self.state.global_step, self.name, counted)
        for term in self.hooks.loss_terms:
            more = term(context)
            if terms.keys() & more.keys():
                raise ConfigError(f"two loss terms are called {sorted(terms.keys() & more.keys())[0]!r}; rename one")
            terms |= more
        for name, value in terms.items() if len(terms) > 1 else ():
            # a tensor, so that no step waits for the device
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._batches += 1
        loss = torch.stack([value.float().reshape(()) for value in terms.values()]).sum()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean of every loss term beside the total."""
        if self._sums and "loss" in logs:
            means = {name: torch.as_tensor(total) / self._batches for name, total in self._sums.items()}
            processes.add_up(list(means.values()))
            logs = {**logs, **{f"loss_{name}": float(mean) / processes.size() for name, mean in means.items()}}
        if "loss" in logs:
            self._sums.clear()
            self._batches = 0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: weight.detach().cpu().contiguous() for name, weight in self._learning().items()}
            save_file(tensors, folder / CHECKPOINT_FILE, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        tensors = load_file(Path(resume_from_checkpoint) / CHECKPOINT_FILE)
        weights = self._learning()
        if {name: tensor.shape for name, tensor in tensors.items()} != {n: w.shape for n, w in weights.items()}:
            raise CorruptAdapterError(
                f"{resume_from_checkpoint} holds another adapter's tensors; delete it or use another folder"
            )
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(tensors[name])

    def _learning(self) -> dict[str, torch.nn.Parameter]:
        return {name: weight for name, weight in self.adapted.named_parameters() if weight.requires_grad}


def _with_filling(examples: Sequence[Example], processes: int) -> list[Example]:
    """The rows; where several processes train, one more that does not count, for a last batch that is short."""
    if processes < 2:
        return list(examples)
    short = min(examples, key=lambda example: len(example["input_ids"]))
    return [*({**example, COUNTED: 1} for example in examples), {**short, COUNTED: 0}]


def _part_of_mean(losses: RowLosses, counted: Tensor) -> Tensor:
    """This process' part of the mean over the targets of all processes, times their number: they average."""
    count = (losses.count * counted).sum().float()
    processes.add_up([count])
    return (losses.total * counted).sum() * processes.size() / count.clamp(min=1)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder: the state is written last, so one that has it is complete."""
    numbered = {
        int(path.name[11:]): path for path in folder.glob("checkpoint-*") if re.fullmatch(r"\d+", path.name[11:])
    }
    for step in sorted(numbered, reverse=True):
        try:
            state = json.loads((numbered[step] / _STATE_FILE).read_text())
        except (OSError, ValueError):
            continue
        if state.get("global_step") == step:
            return numbered[step]
    return None
