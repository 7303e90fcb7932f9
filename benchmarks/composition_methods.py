"""The methods that `composition.py` compares: each makes something that answers a target task from few rows."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import transformers
from sklearn.linear_model import LogisticRegression

from graftory import Adapter, BottleneckConfig
from graftory.compose import merge, record_inputs
from graftory.compose.fusion import fuse
from graftory.compose.hyperformer import add_task, task_adapter
from graftory.compose.merge.mera import MeraParameters
from graftory.compose.select import Domain, example_texts, same_track, select
from graftory.compose.smop import smop
from graftory.config import FusionConfig, SmopConfig
from graftory.data import Rows, TaskFile
from graftory.errors import MergeError
from graftory.settings import FusionSettings, HyperformerSettings, SelectSettings, SmopSettings, TrainSettings
from graftory.training import Job, LoadedBase, evaluate, train
from graftory.training.encode import Collator, encode
from graftory.training.features import features_of

STEPS, BATCH = 60, 8
CONFIG = BottleneckConfig(placement="pfeiffer", size=48, init_seed=0)


@dataclass(frozen=True, slots=True)
class Given:
    """What a method gets.

    Attributes:
        loaded: The base.
        sources: Adapters of other tasks, by name, all from one initialisation.
        hyper: Gives a hyperformer of the same tasks.
        domains: Features of a hundred examples of what each was trained on.
        examples: Features of a hundred unlabelled examples of the target.
        task: The target.
        rows: Its few training rows.
        test: The rows to answer.
        seed: The seed of everything.
    """

    loaded: LoadedBase
    sources: Mapping[str, Adapter]
    hyper: Callable[[], Adapter]
    domains: Sequence[Domain]
    examples: torch.Tensor
    task: TaskFile
    rows: Rows
    test: Rows
    seed: int


@dataclass(frozen=True, slots=True)
class Found:
    """What came of it.

    Attributes:
        accuracy: On the test rows.
        parameters: How many numbers were trained.
        seconds: CPU time of the training for the target. CPU time, as a clock also shows what else the machine does.
        answering: CPU time of answering the test rows, if graftory's evaluation answered them.
        note: Which adapters were taken, where that was chosen.
    """

    accuracy: float
    parameters: int
    seconds: float
    answering: float | None
    note: str = ""


def settings(given: Given, learning_rate: float, kind: type[TrainSettings] = TrainSettings) -> Any:
    """The same number of steps for all, whatever the rows."""
    return kind(
        max_steps=STEPS,
        epochs=1000.0,
        batch_size=min(BATCH, len(given.rows)),
        learning_rate=learning_rate,
        seed=given.seed,
    )


def found(given: Given, adapter: Adapter, parameters: int, seconds: float, note: str = "") -> Found:
    """What an adapter with its head answers on the test rows."""
    begin = time.process_time()
    ((metric, *_),) = evaluate(given.loaded, [Job("x", adapter, None, given.task, given.test)])
    return Found(metric.value, parameters, seconds, time.process_time() - begin, note)


def tuned(given: Given, start: Adapter | None, note: str = "") -> Found:
    """Train an adapter and a new head on the rows; a fresh adapter if there is no start."""
    begin = time.process_time()
    config = BottleneckConfig(placement=CONFIG.placement, size=CONFIG.size, init_seed=given.seed)
    adapter = train(given.loaded, given.task, given.rows, config, settings(given, 3e-3), name="target", init=start)
    seconds = time.process_time() - begin
    return found(given, adapter, count(adapter), seconds, note)


def count(adapter: Adapter) -> int:
    """Numbers in an adapter and its head."""
    return sum(value.numel() for value in adapter.tensors.values())


def fresh(given: Given) -> Found:
    """A new adapter."""
    return tuned(given, None)


def single(given: Given) -> Found:
    """The adapter that most of the target's examples are like, trained on."""
    best = chosen(given, "clustering")[0]
    return tuned(given, given.sources[best], best)


def chosen(given: Given, how: str) -> tuple[str, ...]:
    """The adapters that a selector takes; the best one where none is good enough."""
    try:
        return select(given.domains, given.examples, how, seed=given.seed).chosen
    except MergeError:
        return select(given.domains, given.examples, how, SelectSettings(threshold=-1, min_share=0, most=1)).chosen


def merged(how: str | None, method: str = "soup", **parameters: Any) -> Callable[[Given], Found]:
    """Adapters merged and then trained on; all of them, or those that a selector takes."""

    def run(given: Given) -> Found:
        names = tuple(given.sources) if how is None else chosen(given, how)
        bodies = [headless(given.sources[name]) for name in names]
        return tuned(given, merge(bodies, method, **parameters), " ".join(names))

    return run


def headless(adapter: Adapter) -> Adapter:
    """Without its head: a merge of different tasks has none."""
    return Adapter(replace(adapter.spec, task=None), adapter.body_tensors())


def unaligned(given: Given) -> Found:
    """The mean of all tensors whatever they started from: what MerA's alignment is there to improve on."""
    bodies = [headless(source) for source in given.sources.values()]
    same = [replace(b, spec=replace(b.spec, config=replace(b.spec.config, init_seed=0))) for b in bodies]
    return tuned(given, merge(same, "soup"))


def fusion(given: Given) -> Found:
    """AdapterFusion of all sources."""
    begin = time.process_time()
    fused = fuse(
        given.loaded,
        given.task,
        given.rows,
        list(given.sources.values()),
        FusionConfig(init_seed=given.seed),
        settings(given, 1e-3, FusionSettings),
    )
    seconds = time.process_time() - begin
    return found(given, fused, count(fused), seconds)


def probe(given: Given) -> Found:
    """A logistic regression on the mean-pooled last states of the frozen base."""
    begin = time.process_time()
    x, y = features_of(given.loaded, given.rows.texts).numpy(), np.array(given.rows.targets)
    model = LogisticRegression(max_iter=2000).fit(x, y)
    seconds = time.process_time() - begin
    right = model.predict(features_of(given.loaded, given.test.texts).numpy()) == np.array(given.test.targets)
    parameters = int(model.coef_.size + model.intercept_.size)
    return Found(float(right.mean()), parameters, seconds, None)


def full(given: Given) -> Found:
    """Every weight of the base and a new head, by transformers alone."""
    torch.manual_seed(given.seed)
    info = given.rows.info(given.task)
    model: Any = copy.deepcopy(given.loaded.model)
    model.num_labels = model.config.num_labels = len(info.labels)
    model.classifier = torch.nn.Linear(model.config.hidden_size, len(info.labels))
    torch.nn.init.normal_(model.classifier.weight, std=0.02)
    torch.nn.init.zeros_(model.classifier.bias)
    tokenizer: Any = given.loaded.tokenizer

    def examples(rows: Rows, *, labelled: bool) -> list[Any]:
        return [
            encode(tokenizer, info, text, target if labelled else None)
            for text, target in zip(rows.texts, rows.targets, strict=True)
        ]

    arguments = transformers.TrainingArguments(
        output_dir="unused",
        max_steps=STEPS,
        per_device_train_batch_size=min(BATCH, len(given.rows)),
        learning_rate=1e-4,
        warmup_steps=4,
        seed=given.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        logging_strategy="no",
        use_cpu=True,
    )
    collator = Collator(tokenizer.pad_token_id)
    begin = time.process_time()
    transformers.Trainer(
        model, arguments, data_collator=collator, train_dataset=examples(given.rows, labelled=True)
    ).train()
    seconds = time.process_time() - begin
    model.eval()
    batches = examples(given.test, labelled=False)
    with torch.inference_mode():
        answers = [
            int(answer)
            for start in range(0, len(batches), 32)
            for answer in model(**collator(batches[start : start + 32])).logits.argmax(-1)
        ]
    right = [answer == target for answer, target in zip(answers, given.test.targets, strict=True)]
    parameters = sum(p.numel() for p in model.parameters())
    return Found(sum(right) / len(right), parameters, seconds, None)


def aligned(by: Literal["weights", "activations"]) -> Callable[[Given], Found]:
    """MerA of all sources, trained on."""

    def run(given: Given) -> Found:
        inputs: Sequence[Mapping[str, torch.Tensor]] = ()
        if by == "activations":
            texts = example_texts(f"wheel:{given.task.name}", 100, seed=given.seed)
            inputs = [record_inputs(given.loaded, source, texts) for source in given.sources.values()]
        bodies = [headless(source) for source in given.sources.values()]
        return tuned(given, merge(bodies, "mera", parameters=MeraParameters(by=by), inputs=inputs))

    return run


def same_track_mera(given: Given) -> Found:
    """MerA of the sources that have the target's labels, trained on."""
    names = same_track(given.sources, given.rows.info(given.task)).chosen
    bodies = [headless(given.sources[name]) for name in names]
    return tuned(given, merge(bodies, "mera"), " ".join(names))


def hyper(given: Given) -> Found:
    """The hyperformer of the sources learns the target's embedding and head."""
    before = given.hyper()
    begin = time.process_time()
    both = replace(settings(given, 1e-2, HyperformerSettings), head_learning_rate=1e-2, embedding_learning_rate=1e-2)
    grown = add_task(given.loaded, before, given.task, given.rows, both)
    seconds = time.process_time() - begin
    learnt = sum(value.numel() for key, value in grown.tensors.items() if key not in before.tensors)
    return found(given, task_adapter(grown, given.task.name), learnt, seconds)


def prompts(given: Given) -> Found:
    """SMoP: four prompts of five tokens and their router, from nothing."""
    begin = time.process_time()
    made = smop(given.loaded, given.task, given.rows, SmopConfig(), settings(given, 0.5, SmopSettings))
    seconds = time.process_time() - begin
    return found(given, made, count(made), seconds)


METHODS: dict[str, Callable[[Given], Found]] = {
    "linear probe": probe,
    "full fine-tuning": full,
    "fresh adapter": fresh,
    "single adapter, by clustering": single,
    "AdapterFusion": fusion,
    "soup, uniform": merged(None),
    "soup, similarity": merged("similarity"),
    "soup, clustering": merged("clustering"),
    "MerA, weights": aligned("weights"),
    "MerA, activations": aligned("activations"),
    "MerA, same track": same_track_mera,
    "Hyperformer++": hyper,
    "SMoP": prompts,
    "mean, not aligned": unaligned,
    "linear mean, as wide as all": merged(None, "linear"),
}
"""In the order of the tables."""

FAMILY_ONLY = ("mean, not aligned", "linear mean, as wide as all")
"""Adapters of one initialisation have a soup in their place."""

FAMILY = (
    "linear probe",
    "fresh adapter",
    "single adapter, by clustering",
    "AdapterFusion",
    *FAMILY_ONLY,
    "MerA, weights",
    "MerA, activations",
)
"""What is compared where the sources are of the target's own family, each from its own initialisation."""
