"""Selection of adapters of one track: those that were trained for the labels of a task."""

from __future__ import annotations

from collections.abc import Mapping

from graftory.adapter import Adapter, TaskInfo
from graftory.compose.select.base import Choice, Selection
from graftory.errors import MergeError


def same_track(adapters: Mapping[str, Adapter], task: TaskInfo) -> Selection:
    """Take the adapters whose task is of the kind of another and has its labels, in any order.

    MerA merges adapters of the target's track, such as sentiment or inference. Records do not say tracks; what
    they say, and what makes tasks of one track exchangeable, is the labels. For tasks without labels the kind decides.

    Raises:
        MergeError: If there is none.
    """
    choices = []
    for name, adapter in adapters.items():
        own = adapter.spec.task
        fits = own is not None and own.kind == task.kind and set(own.labels) == set(task.labels)
        said = "no task is recorded" if own is None else f"{own.kind}, {', '.join(own.labels) or 'no labels'}"
        choices.append(Choice(name, float(fits), fits, said if len(said) < 80 else f"{said[:79]}…"))
    if not any(choice.chosen for choice in choices):
        wanted = ", ".join(task.labels) or "no labels"
        raise MergeError(
            f"same-track: no adapter was trained for {task.kind}, {wanted}; name the adapters without --select"
        )
    return Selection("same-track", tuple(sorted(choices, key=lambda choice: not choice.chosen)))
