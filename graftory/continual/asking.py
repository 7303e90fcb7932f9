"""Ask a run: texts of unknown tasks are answered by what it has learnt so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graftory.adapter import TaskInfo
from graftory.continual.readout import OTHER, hidden_of
from graftory.continual.restoring import committed_state, untrained_adapters
from graftory.continual.router import ABSTAIN, Choice, Router
from graftory.continual.router_file import load_router
from graftory.continual.router_fit import router_features
from graftory.continual.sequence import TaskSequence
from graftory.continual.state import RunFolder
from graftory.continual.strategies import Answer, Context, Strategy, strategy_of
from graftory.data import Text
from graftory.errors import ConfigError, DataError
from graftory.hub import Hub
from graftory.training import LoadedBase, Prediction, Query, load_base, predict


@dataclass(frozen=True, slots=True)
class Asked:
    """What a run says of a text.

    Attributes:
        task: The task that answered; None where the router abstained.
        certainty: The router's probability of that task if the text is of one of the run's; None if the task was given
            or the run knows of no other.
        prediction: The answer; None where the router abstained.
    """

    task: str | None
    certainty: float | None
    prediction: Prediction | None


@dataclass(frozen=True, slots=True)
class LearntRun:
    """A run as it is now, finished or not: its strategy, the accepted steps, and the router over them."""

    sequence: TaskSequence
    strategy: Strategy
    context: Context
    loaded: LoadedBase
    router: Router | None

    @classmethod
    def open(cls, folder: str | Path, hub: Hub) -> LearntRun:
        """Read a run's folder and load its base.

        Args:
            folder: Of one run; a study has one for each of its runs.
            hub: The hub that it was run with.

        Raises:
            DataError: If there is no run, or it has learnt no task yet.
            CorruptAdapterError: If the hub's adapters are not the run's.
        """
        state = RunFolder(Path(folder))
        sequence = state.sequence()
        steps, kept = committed_state(state, hub)
        if not steps:
            raise DataError(f"{folder}: the run has learnt no task yet; go on with hub continual run")
        infos = {step.task: step.adapter.spec.task for step in steps}
        known = {name: info for name, info in infos.items() if info is not None}
        loaded = load_base(sequence.base, next(iter(known.values())).kind)
        untrained = untrained_adapters(sequence, loaded, known)
        context = Context(sequence.name, tuple(infos), untrained, steps, sequence.scenario, kept)
        strategy = strategy_of(sequence.strategy, sequence.parameters)
        router = load_router(state.router) if strategy.routable else None
        return cls(sequence, strategy, context, loaded, router)

    def ask(self, texts: Sequence[Text], *, task: str | None = None) -> tuple[Asked, ...]:
        """Answer texts, each by the task that the router finds it to be of.

        Args:
            texts: The texts, or pairs of texts.
            task: The task that all of them are of, if that is known.

        Raises:
            ConfigError: If the run has not learnt the task, or cannot tell tasks apart and none is given.
        """
        if task is not None:
            self._check(task)
            return self._answered(texts, [task] * len(texts), [None] * len(texts))
        if self.router is not None:
            return self._routed(texts, self.router)
        if self._answer(self.context.tasks[-1]).readout is not None and self.context.scenario != "task":
            return self._read(texts)
        if self.context.scenario == "domain" or len(self.context.tasks) == 1:
            # one head goes through all tasks
            return self._answered(texts, [self.context.tasks[-1]] * len(texts), [None] * len(texts))
        raise ConfigError(
            f"{self.sequence.strategy} has no router to tell {', '.join(self.context.tasks)} apart; say which task the "
            "texts are of (--task)"
        )

    def _check(self, task: str) -> None:
        if task not in self.context.tasks:
            raise ConfigError(f"the run has not learnt task {task!r}; it knows {', '.join(self.context.tasks)}")

    def _answer(self, task: str) -> Answer:
        return self.strategy.answer(self.context, task)

    def _info(self, task: str) -> TaskInfo:
        info = self.context.untrained[task].spec.task
        assert info is not None
        return info

    def _routed(self, texts: Sequence[Text], router: Router) -> tuple[Asked, ...]:
        features = router_features(self.loaded, router, texts, self.sequence.eval_batch_size)
        choice = router.route(features)
        names = [None if i == ABSTAIN else router.names[i] for i in choice.task.tolist()]
        certain = [
            None if name is None else float(row.max()) for name, row in zip(names, choice.posterior, strict=True)
        ]
        if router.settings.answer == "mixture":
            return self._mixed(texts, names, certain, choice)
        return self._answered(texts, names, certain)

    def _mixed(
        self, texts: Sequence[Text], names: Sequence[str | None], certain: Sequence[float | None], choice: Choice
    ) -> tuple[Asked, ...]:
        """argmax_y Σ_t p(t | x) p_t(y | x) over the tasks t that have the labels of the chosen one."""
        groups = {name: self._alike(name) for name in dict.fromkeys(names) if name is not None}
        several = [i for i, name in enumerate(names) if name is not None and len(groups[name]) > 1]
        found = list(self._answered(texts, [None if i in several else name for i, name in enumerate(names)], certain))
        answers = {name: self._answer(name) for group in groups.values() for name in group}
        asked = [(i, name) for i in several for name in groups[str(names[i])]]
        queries = [self._query(texts[i], name, answers[name]) for i, name in asked]
        made = predict(self.loaded, queries, batch_size=self.sequence.eval_batch_size) if queries else ()
        parts: dict[int, list[Prediction]] = {}
        for (i, _), prediction in zip(asked, made, strict=True):
            parts.setdefault(i, []).append(prediction)
        for i, predictions in parts.items():
            columns = [self.context.tasks.index(name) for name in groups[str(names[i])]]
            weights = choice.scores[i, columns].softmax(0).tolist()
            found[i] = Asked(names[i], certain[i], weighted(predictions, weights))
        return tuple(found)

    def _alike(self, name: str) -> tuple[str, ...]:
        """The tasks with the labels of a classification."""
        own = self._info(name)
        same = (each for each in self.context.tasks if self._info(each).labels == own.labels)
        return tuple(same) if own.kind == "classification" else (name,)

    def _answered(
        self, texts: Sequence[Text], names: Sequence[str | None], certain: Sequence[float | None]
    ) -> tuple[Asked, ...]:
        answers = {name: self._answer(name) for name in dict.fromkeys(names) if name is not None}
        found: dict[int, Prediction] = {}
        for name, answer in answers.items():
            if answer.readout is not None:
                rows = [i for i, own in enumerate(names) if own == name]
                outputs = answer.readout.outputs(
                    self.loaded, answer.body, [texts[i] for i in rows], self.sequence.eval_batch_size
                )
                found |= {i: self._label(name, output) for i, output in zip(rows, outputs, strict=True)}
        rows = [i for i, name in enumerate(names) if name is not None and i not in found]
        queries = [self._query(texts[i], str(names[i]), answers[str(names[i])]) for i in rows]
        if queries:
            made = predict(self.loaded, queries, batch_size=self.sequence.eval_batch_size)
            found |= dict(zip(rows, made, strict=True))
        return tuple(Asked(name, certain[i], found.get(i)) for i, name in enumerate(names))

    def _query(self, text: Text, name: str, answer: Answer) -> Query:
        return Query(text, answer.body, answer.head, self._info(name), mixture=answer.mixture)

    def _read(self, texts: Sequence[Text]) -> tuple[Asked, ...]:
        """By a head over the classes of all tasks: the best class says which task it is."""
        answers = {name: self._answer(name) for name in self.context.tasks}
        first = next(iter(answers.values()))
        readout = first.readout
        assert readout is not None
        size = self.sequence.eval_batch_size
        hidden = hidden_of(self.loaded, first.body, texts, readout.layer, readout.projection, size)
        best = (hidden.to(readout.weights.dtype) @ readout.weights).argmax(1).tolist()
        owners = {name: answer.readout.labels for name, answer in answers.items() if answer.readout is not None}
        found = [next(name for name, labels in owners.items() if labels[column] != OTHER) for column in best]
        return tuple(
            Asked(name, None, self._label(name, owners[name][column])) for name, column in zip(found, best, strict=True)
        )

    def _label(self, name: str, output: int) -> Prediction:
        return Prediction(label=self._info(name).labels[output])


def weighted(predictions: Sequence[Prediction], weights: Sequence[float]) -> Prediction:
    """One answer out of several tasks' to the same question: Σ_t w_t p_t(y)."""
    mixed: dict[str, float] = {}
    for prediction, weight in zip(predictions, weights, strict=True):
        for label, probability in (prediction.probabilities or {}).items():
            mixed[label] = mixed.get(label, 0.0) + weight * probability
    return Prediction(max(mixed, key=mixed.__getitem__), mixed)
