"""What a run has learnt, out of its folder and the hub."""

from __future__ import annotations

from collections.abc import Mapping

from graftory.adapter import Adapter, TaskInfo
from graftory.adapters import new_adapter
from graftory.adapters.smop import smop_config
from graftory.config import SmopConfig
from graftory.continual.sequence import TaskSequence
from graftory.continual.state import Commit, RunFolder
from graftory.continual.strategies import NOTHING, Kept, Step
from graftory.errors import CorruptAdapterError
from graftory.hub import Hub
from graftory.training import LoadedBase


def committed_state(folder: RunFolder, hub: Hub) -> tuple[tuple[Step, ...], Kept]:
    """The accepted steps of a run in order, and what its strategy kept at the last of them.

    Raises:
        CorruptAdapterError: If an adapter, or what was kept, is not what the run made.
    """
    accepted = [commit for commit in folder.commits() if commit.accepted]
    steps = tuple(restored(hub, commit) for commit in accepted)
    return steps, folder.kept(accepted[-1]) if accepted else NOTHING


def restored(hub: Hub, commit: Commit) -> Step:
    """A committed step with its adapter.

    Raises:
        CorruptAdapterError: If the hub holds another one under its name.
    """
    record = hub.record(commit.ref)
    if record.digest != commit.digest:
        raise CorruptAdapterError(
            f"{commit.ref} is not what step {commit.step} of this run made; give the hub it was run with"
        )
    return Step(commit.task, commit.ref, commit.digest, hub.get(commit.ref))


def untrained_adapters(sequence: TaskSequence, loaded: LoadedBase, infos: Mapping[str, TaskInfo]) -> dict[str, Adapter]:
    """A fresh adapter with a fresh head for every task; the same at every start of a run."""
    config = sequence.config()
    if isinstance(config, SmopConfig):
        config = smop_config(loaded.model, config)
    return {name: new_adapter(loaded.model, config, task=info, base=loaded.base) for name, info in infos.items()}
