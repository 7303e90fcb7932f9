"""Train an adapter for a task."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from graftory.adapter import TASK_SOURCE, Adapter, BaseModel, Lineage
from graftory.adapters import AdaptedModel, new_adapter
from graftory.config import AdapterConfig, config_to_json
from graftory.data import Rows, TaskFile
from graftory.errors import ConfigError
from graftory.schema import Json, canonical
from graftory.schema import encode as to_json
from graftory.settings import Optimizer, TrainSettings
from graftory.training import processes
from graftory.training.base import LoadedBase
from graftory.training.company import ALONE, Company, Learnt, encoded
from graftory.training.encode import Collator
from graftory.training.head_start import start_head
from graftory.training.progress import TrainingProgress
from graftory.training.recipes import Scene, recipe_of
from graftory.training.reporting import NOWHERE, Reporting
from graftory.training.trainer import NO_HOOKS, AdapterTrainer, Hooks, last_checkpoint
from graftory.versions import library_versions

_RUN_FILE = "run.json"
_OPTIMIZERS: Mapping[Optimizer, str] = {"adamw": "adamw_torch_fused", "adafactor": "adafactor"}
"""What transformers calls them."""


def train(
    loaded: LoadedBase,
    task: TaskFile,
    rows: Rows,
    config: AdapterConfig,
    settings: TrainSettings,
    *,
    name: str,
    output_dir: str | Path | None = None,
    init: Adapter | None = None,
    hooks: Hooks = NO_HOOKS,
    callbacks: Sequence[TrainerCallback] = (),
) -> Adapter:
    """Train a fresh adapter, or go on with `init`, on the rows of a task: `train_in_company` without company.

    The arguments and errors are described there.
    """
    return train_in_company(
        loaded, task, rows, config, settings,
        name=name, output_dir=output_dir, init=init, hooks=hooks, callbacks=callbacks,
    ).adapter  # fmt: skip


def train_in_company(
    loaded: LoadedBase,
    task: TaskFile,
    rows: Rows,
    config: AdapterConfig,
    settings: TrainSettings,
    *,
    name: str,
    output_dir: str | Path | None = None,
    init: Adapter | None = None,
    hooks: Hooks = NO_HOOKS,
    callbacks: Sequence[TrainerCallback] = (),
    company: Company = ALONE,
    reporting: Reporting = NOWHERE,
    fresh_head: bool | None = None,
) -> Learnt:
    """Train a fresh adapter, or go on with `init`, on the rows of a task. The base comes out as it went in.

    Args:
        loaded: The base model.
        task: The task.
        rows: Its training rows.
        config: The adapter's configuration; ignored if `init` is given, which has its own.
        settings: How to train.
        name: What the progress bar calls it.
        output_dir: Folder for checkpoints; a training that was cut off goes on from the last one in it.
        init: Adapter to go on from. Its head is kept if it was trained for the same labels, else it starts fresh.
        hooks: Loss terms and gradient hooks of a strategy.
        callbacks: Callbacks of transformers' `Trainer`.
        company: What is attached beside it, and rows of other tasks that are mixed in.
        reporting: Who is told of the losses.
        fresh_head: Whether the adapter's head has learnt nothing yet; None: unless `init` brings it.

    Returns:
        The adapter with its lineage; parents are for the caller to add. And the heads that learnt with it.

    Raises:
        ConfigError: If `output_dir` holds the checkpoints of another training, the method cannot go on from any, or a
            head is spoken of in the settings and there is none.
        BaseMismatchError: If `init` belongs to another base.
        CorruptAdapterError: If an adapter of the company changed, though it is frozen.
    """
    adapter = _start(loaded, task, rows, config, init)
    _check_head(settings, adapter)
    examples = company.examples(loaded, encoded(loaded, task, rows))
    way = adapter.spec.config
    adapted = AdaptedModel(loaded.model, loaded.base)
    with ExitStack() as stack:
        stack.callback(loaded.model.eval)
        stack.callback(adapted.detach)
        adapted.add(name, adapter)
        company.join(adapted)
        adapted.train_only(name, *company.heads)
        recipe = recipe_of(Scene(adapted, name, task.kind, examples, loaded.tokenizer.pad_token_id, settings))
        # a recipe may have put another adapter in the place of the fresh one
        adapted.train_only(name, *company.heads)
        hooks = _with_head_rate(recipe.joined(hooks), settings)
        if output_dir is not None and not recipe.resumes:
            raise ConfigError(
                f"{way.method} keeps between steps what no checkpoint holds; train without --checkpoints (output_dir)"
            )
        _freeze(adapted, name, hooks)
        if hooks.extra is not None:
            adapted.add_module("extra", hooks.extra)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if output_dir is None else output_dir)
        resume = None
        if output_dir is not None:
            known = company.hash_with(rows.hash)
            own = claim(folder, adapter, known, settings) if processes.is_first() else None
            resume = processes.from_first(own)
        if settings.gradient_checkpointing:
            _save_memory(loaded.model, adapted, name, hooks, stack)
        progress = TrainingProgress(name)
        stack.callback(progress.stop)
        arguments = training_arguments(settings, folder, keep=output_dir is not None, reporting=reporting)
        stack.enter_context(reporting.at_its_place())
        collator = Collator(loaded.tokenizer.pad_token_id)
        callbacks = (*recipe.callbacks, *callbacks, progress)
        trainer = AdapterTrainer(
            adapted, name, task.kind, arguments, examples, collator, hooks, callbacks, company.kinds()
        )
        if settings.head_start == "probe" and resume is None:
            fresh = not _brings_head(init, adapter) if fresh_head is None else fresh_head
            for head in (*([None] if fresh else []), *company.fresh):
                start_head(trainer, head or name, *trainer.through(head))
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        processes.wait()  # the others may still be writing their part of a checkpoint
        company.check(adapted)
        made = _with_lineage(recipe.finish(adapted.extract(name)), loaded.base, task, rows, settings, way)
        extra = {} if hooks.extra is None else hooks.extra.state_dict()
        heads = {head: adapted.extract(head) for head in company.heads}
        return Learnt(made, heads, {key: tensor.detach().cpu().clone() for key, tensor in extra.items()})


def _check_head(settings: TrainSettings, adapter: Adapter) -> None:
    """Refuse settings of a head where there is none."""
    asked = {"head_learning_rate": settings.head_learning_rate, "head_start": settings.head_start}
    for name, value in asked.items() if not adapter.head_tensors() else ():
        if value not in (None, "random"):
            raise ConfigError(f"{name}: got {value}, but the task is answered in words and has no head; leave it out")


def _with_head_rate(hooks: Hooks, settings: TrainSettings) -> Hooks:
    rate = settings.head_learning_rate
    return hooks if rate is None else replace(hooks, rates=(("heads.", rate), *hooks.rates))


def _freeze(adapted: AdaptedModel, name: str, hooks: Hooks) -> None:
    for key, weight in adapted.weights(name).items() if hooks.frozen else ():
        if key.endswith(hooks.frozen):
            weight.requires_grad_(False)


def _start(loaded: LoadedBase, task: TaskFile, rows: Rows, config: AdapterConfig, init: Adapter | None) -> Adapter:
    """The fresh adapter; with `init`, its body and, if the labels are the same, its head."""
    start = config if init is None else init.spec.config
    fresh = new_adapter(loaded.model, start, task=rows.info(task), base=loaded.base)
    if init is None:
        return fresh
    kept = init.tensors if _brings_head(init, fresh) else init.body_tensors()
    # the base is init's, so that attaching it notices a wrong one
    spec = replace(fresh.spec, base=init.spec.base, config=init.spec.config, licence=init.spec.licence)
    return Adapter(spec, {**fresh.tensors, **kept}, init.sources)


def _brings_head(init: Adapter | None, wanted: Adapter) -> bool:
    """Whether an adapter has a head for the labels of another."""
    if init is None or not init.head_tensors():
        return False
    before, now = init.spec.task, wanted.spec.task
    return before is not None and now is not None and (before.kind, before.labels) == (now.kind, now.labels)


def training_arguments(
    settings: TrainSettings, folder: Path, *, keep: bool, reporting: Reporting = NOWHERE
) -> TrainingArguments:
    """Our settings in transformers' words; checkpoints are written only if they are kept.

    Raises:
        ConfigError: If the rows of a batch cannot be shared evenly among the processes.
    """
    if settings.batch_size % processes.size():
        raise ConfigError(
            f"batch_size: got {settings.batch_size} for {processes.size()} processes, wanted a multiple of their number"
        )
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size // processes.size(),
        gradient_accumulation_steps=settings.accumulation,
        optim=_OPTIMIZERS[settings.optimizer],
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.gradient_clip,
        bf16=settings.bf16,
        use_cpu=processes.size() > 1 and processes.on_cpu(),
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="steps" if keep else "no",
        save_steps=settings.save_steps,
        save_total_limit=1,
        logging_steps=10,
        disable_tqdm=True,
        report_to=list(reporting.to) or "none",
        run_name=reporting.run or None,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )


def _save_memory(model: PreTrainedModel, adapted: AdaptedModel, name: str, hooks: Hooks, stack: ExitStack) -> None:
    """Turn on gradient checkpointing until the stack unwinds.

    The second forward runs within the backward, on a GPU in a thread that knows no route: it brings its own.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), adapted.route(name) if hooks.route is None else hooks.route(adapted, name)

    # transformers renamed both within version 5
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False, "context_fn": contexts})
    stack.callback(getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable))


def claim(folder: Path, adapter: Adapter, rows_hash: str, settings: TrainSettings) -> Path | None:
    """Mark the folder as this training's, and return the checkpoint to go on from.

    Raises:
        ConfigError: If it is another training's.
    """
    tensors = hashlib.sha256()
    for each in (adapter, *adapter.sources):
        for key in sorted(each.tensors):
            tensors.update(each.tensors[key].float().numpy().tobytes())
    run: Json = {
        "base": adapter.spec.base.weights_hash,
        "config": config_to_json(adapter.spec.config),
        "start": tensors.hexdigest(),
        "rows": rows_hash,
        "settings": to_json(settings),
    }
    path = folder / _RUN_FILE
    if path.exists():
        if json.loads(path.read_text()) != json.loads(canonical(run)):
            raise ConfigError(f"{folder} holds the checkpoints of another training; delete it or use another folder")
        return last_checkpoint(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_bytes(canonical(run))
    scratch.replace(path)
    return None


def _with_lineage(
    adapter: Adapter, base: BaseModel, task: TaskFile, rows: Rows, settings: TrainSettings, trained: AdapterConfig
) -> Adapter:
    parameters = {**to_json(settings), "rows": len(rows)}
    if trained.stored_as is not None:
        options = {key: value for key, value in config_to_json(trained).items() if key != "targets"}
        parameters["trained_as"] = options
    if task.data.sample is not None:
        parameters[TASK_SOURCE] = task.data.sample
    lineage = Lineage("train", (), parameters, rows.hash, settings.seed, library_versions())
    # attaching it has shown that the base is this one, and this one's tokenizer made the numbers
    made_on = replace(adapter.spec.base, tokenizer_hash=base.tokenizer_hash)
    return replace(adapter, spec=replace(adapter.spec, base=made_on, lineage=lineage, metrics=()))
