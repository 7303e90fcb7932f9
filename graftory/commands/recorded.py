"""What commands look up about stored adapters: the task and the base they were trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftory.adapter import TASK_SOURCE, Adapter, AdapterSpec
from graftory.config import HyperformerConfig
from graftory.data import TaskFile, load_task
from graftory.errors import ConfigError

if TYPE_CHECKING:
    from graftory.hub import Hub


@dataclass(frozen=True, slots=True)
class Subject:
    """A stored adapter, the task to hold it against, and its base."""

    ref: str
    spec: AdapterSpec
    source: str
    """Where the task came from: a file or `wheel:...`."""
    task: TaskFile
    base: str


def subject(hub: Hub, ref: str, source: str | None, base: str | None) -> Subject:
    """Look an adapter up; `source` and `base` go before what it recorded.

    Raises:
        ConfigError: If no task is given and none was recorded.
    """
    record = hub.record(ref)
    chosen = source or record.spec.lineage.parameters.get(TASK_SOURCE)
    name = str(record.ref)
    if not isinstance(chosen, str):
        raise ConfigError(f"{name} does not say which task it was trained on; pass --task FILE or --task wheel:NAME")
    return Subject(name, record.spec, chosen, load_task(chosen), base or record.spec.base.id)


def runnable(adapter: Adapter, task: str | None) -> Adapter:
    """An adapter as it runs: of a hyperformer, which makes the adapters of several tasks, that of one task.

    Raises:
        ConfigError: If it has several tasks and none is named.
    """
    config = adapter.spec.config
    if not isinstance(config, HyperformerConfig):
        return adapter
    from graftory.compose.hyperformer import task_adapter

    names = [one.name for one in config.tasks]
    if task is None and len(names) != 1:
        raise ConfigError(f"a hyperformer of several tasks; pass --task with one of {', '.join(names)}")
    return task_adapter(adapter, task or names[0])


def by_model(subjects: Iterable[Subject]) -> dict[tuple[str, str], list[Subject]]:
    """Subjects that one loaded model can serve together, by base and kind of task."""
    groups: dict[tuple[str, str], list[Subject]] = {}
    for item in subjects:
        groups.setdefault((item.base, item.task.kind), []).append(item)
    return groups
