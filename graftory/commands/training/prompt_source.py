"""`hub train --init-from`: which prompt of the hub a prompt starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftory.adapter import Adapter
from graftory.commands.output import working
from graftory.config import AdapterConfig, PromptConfig
from graftory.errors import AdapterNotFoundError, BaseMismatchError, ConfigError
from graftory.schema import Json

if TYPE_CHECKING:
    from graftory.data import Rows, TaskFile
    from graftory.hub import Hub, Record
    from graftory.settings import TrainSettings
    from graftory.training import LoadedBase

NEAREST = "nearest"


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Where a prompt starts.

    Attributes:
        init: What `train` goes on from.
        record: The prompt's version.
        similarities: The cosine of every candidate, by its reference, if there was a choice.
    """

    init: Adapter
    record: Record
    similarities: Mapping[str, float]

    def notes(self) -> dict[str, Json]:
        """What the lineage tells of it."""
        return {"init_from": str(self.record.ref), **({"similarities": self.similarities} if self.similarities else {})}


def check(init_from: str | None, method: str, continued: str | None) -> None:
    """Refuse a source for what is no fresh prompt.

    Raises:
        ConfigError: If it is none.
    """
    if init_from is not None and (method != PromptConfig.method or continued is not None):
        raise ConfigError(
            "--init-from starts a fresh prompt from another one: give --method prompt, and no --continue; any other "
            "adapter goes on with --continue REF"
        )


def prompt_source(
    hub: Hub,
    init_from: str,
    loaded: LoadedBase,
    task: TaskFile,
    rows: Rows,
    config: AdapterConfig,
    settings: TrainSettings,
    steps: int,
    name: str,
) -> PromptSource:
    """The prompt that is named, or of all prompts of the base the one nearest to the task.

    Raises:
        AdapterNotFoundError: If there is none.
        BaseMismatchError: If it is of another base.
        UnsupportedAdapterError: If it is no prompt.
    """
    from graftory.training.transfer import as_start, probe, similarities

    assert isinstance(config, PromptConfig)
    if init_from != NEAREST:
        record = hub.record(init_from)
        if not of_base(record, loaded):
            raise BaseMismatchError(
                f"{record.ref} was trained on {record.spec.base.id}; give a prompt of {loaded.base.id}"
            )
        return PromptSource(as_start(hub.get(record.ref)), record, {})
    records = {str(record.ref): record for record in candidates(hub, loaded, name)}
    if not records:
        raise AdapterNotFoundError(
            f"no prompt of {loaded.base.id} but {name}'s own is in {hub.root}; train one on another task, or leave "
            "--init-from out"
        )
    with working(f"comparing with {len(records)} prompts"):
        target = probe(loaded, task, rows, config, settings, steps=steps, name=name)
        found = similarities(target, {ref: hub.get(ref) for ref in records})
    nearest = found[0][0]
    return PromptSource(as_start(hub.get(nearest)), records[nearest], dict(found))


def candidates(hub: Hub, loaded: LoadedBase, name: str) -> list[Record]:
    """The newest version of every prompt of the base, but of the name itself."""
    records = [hub.record(row.name) for row in hub.index() if row.name != name]
    return [record for record in records if isinstance(record.spec.config, PromptConfig) and of_base(record, loaded)]


def of_base(record: Record, loaded: LoadedBase) -> bool:
    """Whether an adapter is of a base, by fingerprint, or by name where it has none."""
    known = record.spec.base
    return known.weights_hash == loaded.base.weights_hash if known.weights_hash else known.id == loaded.base.id
