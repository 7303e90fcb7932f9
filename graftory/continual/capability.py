"""Whether a strategy can do what a sequence asks of it; looked at before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from graftory.adapter import TaskInfo
from graftory.continual.sequence import TaskSequence
from graftory.continual.strategies import PLUGINS, STRATEGIES, Needs, Scenario, strategy_of
from graftory.data import TEXT_KINDS, TaskFile
from graftory.errors import ConfigError

_MEANS: Mapping[Scenario, str] = {
    "task": "the task of a row is given at test",
    "domain": "the task of a row is not given, and all have the same labels",
    "class": "the task of a row is not given, and each has labels of its own",
}


def check_capability(sequence: TaskSequence, needs: Needs) -> None:
    """Hold a strategy against the scenario, the data that may be stored, and the adapter method.

    Raises:
        ConfigError: If it cannot; the text names those that can.
    """
    checks: tuple[tuple[bool, str, Callable[[Needs], bool]], ...] = (
        (
            sequence.scenario in needs.scenarios,
            f"cannot do scenario {sequence.scenario!r} ({_MEANS[sequence.scenario]})",
            lambda other: sequence.scenario in other.scenarios,
        ),
        (
            sequence.store_data or not needs.stored_data,
            "keeps rows of earlier tasks, and the sequence says 'store_data: false'",
            lambda other: not other.stored_data,
        ),
        (
            sequence.method in needs.methods,
            f"does not work on {sequence.method} adapters, only on {', '.join(needs.methods)}",
            lambda other: sequence.method in other.methods,
        ),
        (
            sequence.probe is None or needs.reads,
            "takes the weights of its adapters from a prompt, and the probe's texts have none",
            lambda other: other.reads,
        ),
    )
    for holds, reason, can in checks:
        if not holds:
            able = [name for name in (*STRATEGIES, *PLUGINS) if can(strategy_of(name).needs)]
            raise ConfigError(f"strategy {sequence.strategy!r} {reason}; those that can: {', '.join(able)}")


def check_kinds(sequence: TaskSequence, needs: Needs, tasks: Sequence[TaskFile]) -> None:
    """Hold the strategy and the probe against the kinds of the tasks.

    Raises:
        ConfigError: If the strategy is about heads and a task has none, or the probe has no language model to read it.
    """
    for task in tasks:
        if task.kind in TEXT_KINDS and needs.heads:
            able = [name for name in (*STRATEGIES, *PLUGINS) if not strategy_of(name).needs.heads]
            raise ConfigError(
                f"strategy {sequence.strategy!r} {needs.heads}, and the {task.kind} task {task.name!r} has no head; "
                f"those that can: {', '.join(able)}"
            )
        if task.kind != "causal_lm" and sequence.probe is not None:
            raise ConfigError(
                f"probe: wanted causal_lm tasks, whose model reads text; {task.name!r} is a {task.kind} task; leave "
                "'probe' out"
            )


def check_labels(scenario: Scenario, tasks: Sequence[TaskInfo]) -> None:
    """Hold the tasks' labels against the scenario.

    Raises:
        ConfigError: If they do not fit.
    """
    first = tasks[0]
    for task in tasks[1:]:
        if scenario == "domain" and (task.kind, task.labels) != (first.kind, first.labels):
            raise ConfigError(
                f"scenario 'domain': {task.name!r} has {_labels(task)}, {first.name!r} has {_labels(first)}; "
                "wanted the same kind and labels in all tasks, or scenario 'task'"
            )
    seen: dict[str, str] = {}
    for task in tasks if scenario == "class" else ():
        twice = [label for label in task.labels if label in seen]
        if twice or task.kind != "classification":
            what = f"label {twice[0]!r} is in {seen[twice[0]]!r} too" if twice else f"it is a {task.kind} task"
            raise ConfigError(f"scenario 'class': {task.name!r}: {what}; wanted classes that are in one task each")
        seen |= dict.fromkeys(task.labels, task.name)


def _labels(task: TaskInfo) -> str:
    return f"kind {task.kind} with labels {', '.join(task.labels)}" if task.labels else f"kind {task.kind}"
