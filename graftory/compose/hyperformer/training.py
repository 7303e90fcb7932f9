"""Training a hyperformer on several tasks, and teaching it one more."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter, Lineage, Parent
from graftory.adapters import AdaptedModel, new_adapter
from graftory.compose.hyperformer.module import (
    config_of,
    generate,
    info_of,
    live_tensors,
    new_hyperformer,
    plain_config,
)
from graftory.compose.hyperformer.retriever import Contrast, similarities, task_features
from graftory.compose.hyperformer.sampler import TaskSampler
from graftory.config import HyperformerConfig, HyperTask, PhaConfig
from graftory.data import Rows, TaskFile
from graftory.errors import ConfigError
from graftory.schema import Json
from graftory.schema import encode as to_json
from graftory.settings import HyperformerSettings
from graftory.training import LoadedBase
from graftory.training.company import encoded
from graftory.training.encode import TASK_NUMBER, Collator, Example
from graftory.training.head_start import start_head
from graftory.training.learning import claim, training_arguments
from graftory.training.progress import TrainingProgress
from graftory.training.trainer import AdapterTrainer, Hooks, LossTerm
from graftory.versions import library_versions

if TYPE_CHECKING:
    from transformers import TrainerCallback


def hyperformer(
    loaded: LoadedBase,
    tasks: Sequence[tuple[TaskFile, Rows]],
    config: HyperformerConfig | None = None,
    settings: HyperformerSettings | None = None,
    *,
    name: str = "hyperformer",
    sources: Sequence[str] = (),
    output_dir: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Adapter:
    """Train a generator of adapters on several tasks at once, a hyperformer or PHA; the base does not change.

    Each batch is of one task, drawn with p ∝ rows^(1/T). The generator, the embeddings and each task's head learn. The
    paper also trains the base's own layer norms; here the base is frozen, so that adapters of one base mix.

    Args:
        loaded: The base model.
        tasks: The tasks, all of one kind, with their training rows.
        config: The generator.
        settings: How to train.
        name: What the progress bar calls it.
        sources: Where each task came from, noted for those who evaluate it later.
        output_dir: Folder for checkpoints; a training that was cut off goes on from the last one in it.
        callbacks: Callbacks of transformers' `Trainer`.

    Raises:
        ConfigError: If there is no task, two have one name or different kinds, or `output_dir` is another training's.
        UnsupportedAdapterError: If there are no places for it on this architecture.
    """
    settings = settings or HyperformerSettings()
    kinds = {task.kind for task, _ in tasks}
    if len(kinds) != 1:
        raise ConfigError(f"tasks: got the kinds {', '.join(sorted(kinds)) or 'none'}, wanted tasks of one kind")
    config = replace(config or HyperformerConfig(), init_seed=settings.seed)
    described = [
        _describe(loaded, task, rows, source, settings) for (task, rows), source in _with_sources(tasks, sources)
    ]
    start = new_hyperformer(
        loaded.model, [task for task, _ in described], config, base=loaded.base, heads=[head for _, head in described]
    )
    run = _Run(loaded, start, tuple(tasks), 0, settings, name)
    trained = run.train(output_dir, callbacks, frozen=False)
    return _with_lineage(trained, [rows for _, rows in tasks], settings, sources, ())


def add_task(
    loaded: LoadedBase,
    hyper: Adapter,
    task: TaskFile,
    rows: Rows,
    settings: HyperformerSettings | None = None,
    *,
    name: str = "hyperformer",
    source: str = "",
    parent: Parent | None = None,
    output_dir: str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Adapter:
    """Teach a hyperformer one more task: only its embedding and its head learn, all else stays bit for bit.

    The embedding starts at random, or, for PHA, as the prototype that the retriever finds nearest to the rows.

    Raises:
        ConfigError: If it knows the task already, or it is of another kind.
        UnsupportedAdapterError: If `hyper` is no hyperformer.
        BaseMismatchError: If it was trained on another base.
    """
    settings = settings or HyperformerSettings()
    config = config_of(hyper)
    if config.tasks and config.tasks[0].kind != task.kind:
        raise ConfigError(
            f"{task.name}: a {task.kind} task; this hyperformer has tasks of the kind {config.tasks[0].kind}"
        )
    described, head = _describe(loaded, task, rows, source, settings)
    number = len(config.tasks)
    grown = replace(config, tasks=(*config.tasks, described))
    embedding, notes = _first_embedding(loaded, hyper, rows, settings)
    more = {f"tasks.{number}.embedding": embedding}
    more |= {f"tasks.{number}.head.{key}": value for key, value in head.items()}
    start = Adapter(replace(hyper.spec, config=grown), {**hyper.tensors, **more})
    run = _Run(loaded, start, ((task, rows),), number, settings, name)
    trained = run.train(output_dir, callbacks, frozen=True)
    parents = (replace(parent, relation="continued"),) if parent else ()
    return _with_lineage(trained, [rows], settings, [source], parents, notes)


def _first_embedding(
    loaded: LoadedBase, hyper: Adapter, rows: Rows, settings: HyperformerSettings
) -> tuple[Tensor, Mapping[str, Json]]:
    """What the embedding of a task more starts from, and what to note of it."""
    config = config_of(hyper)
    if not isinstance(config, PhaConfig) or not config.tasks:
        return torch.randn(config.embedding, generator=torch.Generator().manual_seed(settings.seed)), {}
    found = similarities(config, hyper.tensors, task_features(loaded, rows, settings.seed))
    best = found.index(max(found))
    listed = {task.name: round(value, 6) for task, value in zip(config.tasks, found, strict=True)}
    notes: dict[str, Json] = {"nearest": config.tasks[best].name, "similarities": listed}
    return hyper.tensors[f"tasks.{best}.embedding"].clone(), notes


def _with_sources(
    tasks: Sequence[tuple[TaskFile, Rows]], sources: Sequence[str]
) -> list[tuple[tuple[TaskFile, Rows], str]]:
    return list(zip(tasks, sources or [""] * len(tasks), strict=True))


def _describe(
    loaded: LoadedBase, task: TaskFile, rows: Rows, source: str, settings: HyperformerSettings
) -> tuple[HyperTask, Mapping[str, Tensor]]:
    """A task, and a fresh head for it, as `hub train` would start it."""
    from graftory.config import LoraConfig

    info = rows.info(task)
    fresh = new_adapter(loaded.model, LoraConfig(rank=1, init_seed=settings.seed), task=info, base=loaded.base)
    head = fresh.head_tensors()
    described = HyperTask(
        name=task.name,
        kind=task.kind,
        source=source,
        labels=info.labels,
        max_length=info.max_length,
        template=info.template,
        head={key: tuple(value.shape) for key, value in head.items()},
    )
    return described, head


@dataclass(frozen=True, slots=True)
class _Run:
    """One training: some tasks of a hyperformer, from the number `first` on."""

    loaded: LoadedBase
    start: Adapter
    tasks: tuple[tuple[TaskFile, Rows], ...]
    first: int
    settings: HyperformerSettings
    name: str

    def train(self, output_dir: str | Path | None, callbacks: Sequence[TrainerCallback], *, frozen: bool) -> Adapter:
        """The hyperformer afterwards; with `frozen` only embeddings and heads of the tasks have learnt."""
        config, loaded = config_of(self.start), self.loaded
        terms = self._terms()
        examples = [
            {**example, TASK_NUMBER: number}
            for number, (task, rows) in enumerate(self.tasks, self.first)
            for example in encoded(loaded, task, rows)
        ]
        adapted = AdaptedModel(loaded.model, loaded.base)
        with ExitStack() as stack:
            stack.callback(loaded.model.eval)
            stack.callback(adapted.detach)
            names = [f"task{self.first + number}" for number in range(len(self.tasks))]
            for number, attached in enumerate(names):
                adapted.add(attached, self._holder(self.first + number))
            adapted.generator = _parameters(self.start, self.first, frozen=frozen)
            _freeze_bodies(adapted, names)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if output_dir is None else output_dir)
            together = hashlib.sha256("".join(rows.hash for _, rows in self.tasks).encode()).hexdigest()
            resume = None if output_dir is None else claim(folder, self.start, together, self.settings)
            progress = TrainingProgress(self.name)
            stack.callback(progress.stop)
            trainer = HyperTrainer(
                adapted,
                config,
                self.first,
                [len(rows) for _, rows in self.tasks],
                self.settings,
                self.tasks[0][0].kind,
                training_arguments(self.settings, folder, keep=output_dir is not None),
                examples,
                Collator(loaded.tokenizer.pad_token_id),
                (*callbacks, progress),
                terms,
            )
            if self.settings.head_start == "probe" and resume is None:
                for number, attached in enumerate(names, self.first):
                    own = [example for example in examples if example[TASK_NUMBER] == number]
                    start_head(trainer, attached, trainer.kind, own)
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            tensors = {key: value.detach().cpu().clone() for key, value in live_tensors(adapted).items()}
            for number, attached in enumerate(names):
                head = adapted.extract(attached).head_tensors()
                tensors |= {f"tasks.{self.first + number}.head.{key}": value for key, value in head.items()}
            return Adapter(self.start.spec, {**self.start.tensors, **tensors})

    def _terms(self) -> tuple[LossTerm, ...]:
        """What PHA adds to the loss; the features of its rows are those of the bare base."""
        config, seed = config_of(self.start), self.settings.seed
        if not isinstance(config, PhaConfig):
            return ()
        return (Contrast(config, tuple(task_features(self.loaded, rows, seed) for _, rows in self.tasks), seed),)

    def _holder(self, number: int) -> Adapter:
        """An adapter that gives a task its places and head; its body is never used."""
        config = config_of(self.start)
        task = config.tasks[number]
        body = {
            f"{place.path}.{part}": torch.zeros(shape)
            for place in config.places
            for part, shape in config.made_at(place).items()
        }
        head = {key: self.start.tensors[f"tasks.{number}.head.{key}"] for key in task.head}
        spec = replace(self.start.spec, config=plain_config(config), task=info_of(task))
        return Adapter(spec, {**body, **head})


def _parameters(start: Adapter, first: int, *, frozen: bool) -> nn.ParameterDict:
    """The tensors of the generator and the embeddings, as parameters; heads are where the model has them."""
    found = nn.ParameterDict()
    for name, value in start.tensors.items():
        if ".head." not in name:
            parts = name.split(".")
            own = parts[0] == "tasks" and int(parts[1]) >= first
            learns = own or not frozen
            found[name.replace(".", "/")] = nn.Parameter(value.detach().clone(), requires_grad=learns)
    return found


def _freeze_bodies(adapted: AdaptedModel, names: Sequence[str]) -> None:
    adapted.train_only(*names)
    for name in names:
        for weight in adapted.weights(name).values():
            weight.requires_grad_(False)


class HyperTrainer(AdapterTrainer):
    """Generates the adapter of each batch's task, with gradients to the generator."""

    def __init__(
        self,
        adapted: AdaptedModel,
        config: HyperformerConfig,
        first: int,
        sizes: Sequence[int],
        settings: HyperformerSettings,
        kind: Any,
        arguments: Any,
        examples: Sequence[Example],
        collator: Collator,
        callbacks: Sequence[TrainerCallback],
        terms: tuple[LossTerm, ...] = (),
    ) -> None:
        own = settings.embedding_learning_rate
        rates = (("heads.", settings.head_learning_rate), ("/embedding", own), ("generator.retriever/", own))
        hooks = Hooks(loss_terms=terms, rates=rates)
        super().__init__(adapted, f"task{first}", kind, arguments, examples, collator, hooks, callbacks)
        self.hyper, self.sizes, self.settings = config, list(sizes), settings

    def _get_train_sampler(self, train_dataset: Any = None) -> TaskSampler:  # type: ignore[override]  # noqa: ARG002
        batch = self.args.per_device_train_batch_size
        return TaskSampler(self.sizes, batch, self.settings.temperature, self.args.seed)

    @contextmanager
    def _in_force(self, inputs: dict[str, Any]) -> Iterator[None]:
        """The adapter that is generated for the batch's task."""
        task = int(inputs.pop(TASK_NUMBER)[0])
        self.name = f"task{task}"
        made = generate(self.hyper, live_tensors(self.adapted), task)
        with self.adapted.made(self.name, made), super()._in_force(inputs):
            yield


def _with_lineage(
    adapter: Adapter,
    rows: Sequence[Rows],
    settings: HyperformerSettings,
    sources: Sequence[str],
    parents: tuple[Parent, ...],
    notes: Mapping[str, Json] | None = None,
) -> Adapter:
    config = config_of(adapter)
    lineage = Lineage(
        process="compose",
        parents=parents,
        parameters={"method": config.method, **to_json(settings), "tasks": list(sources), **(notes or {})},
        data_hash=f"sha256:{hashlib.sha256(''.join(one.hash for one in rows).encode()).hexdigest()}",
        seed=settings.seed,
        libraries=library_versions(),
    )
    return replace(adapter, spec=replace(adapter.spec, lineage=lineage))
