"""Prompt transfer: start a task's prompt from that of the most similar task (SPoT, Vu et al. 2022, arXiv:2110.07904).

A prompt that has been trained for a little while tells its task: the mean of its soft tokens is the task's embedding,
and two tasks are as similar as the cosine of theirs. The target's prompt is trained for a few steps from scratch,
compared with prompts of the same base, and then trained from the nearest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn import functional

from graftory.adapter import Adapter
from graftory.adapters.smop import PROMPTS
from graftory.config import PromptConfig
from graftory.data import Rows, TaskFile
from graftory.errors import BaseMismatchError, UnsupportedAdapterError
from graftory.settings import TrainSettings
from graftory.training.base import LoadedBase
from graftory.training.learning import train


def task_embedding(adapter: Adapter) -> Tensor:
    """The mean of a prompt's soft tokens, [d].

    Raises:
        UnsupportedAdapterError: If the adapter is no prompt.
    """
    config = adapter.spec.config
    if not isinstance(config, PromptConfig):
        raise UnsupportedAdapterError(
            f"a {config.method} adapter is no prompt, and a prompt cannot start from it; give one that hub train "
            "--method prompt made"
        )
    return adapter.tensors[f"{config.targets[0]}.{PROMPTS}"].double().flatten(0, 1).mean(0)


def similarities(target: Adapter, sources: Mapping[str, Adapter]) -> list[tuple[str, float]]:
    """Sources with the cosine of their task's embedding and the target's, the nearest first; equals by name.

    Raises:
        UnsupportedAdapterError: If one is no prompt.
        BaseMismatchError: If one is as wide as another base.
    """
    own, found = task_embedding(target), []
    for name in sorted(sources):
        other = task_embedding(sources[name])
        if other.shape != own.shape:
            raise BaseMismatchError(
                f"{name}: a prompt {len(other)} wide, this base's are {len(own)}; give one of the same base"
            )
        found.append((name, float(functional.cosine_similarity(own, other, dim=0))))
    return sorted(found, key=lambda each: -each[1])


def probe(
    loaded: LoadedBase,
    task: TaskFile,
    rows: Rows,
    config: PromptConfig,
    settings: TrainSettings,
    *,
    steps: int,
    name: str,
) -> Adapter:
    """The target's prompt after a few steps from scratch, to be compared; the arguments are those of `train`."""
    return train(loaded, task, rows, config, replace(settings, max_steps=steps), name=name)


def as_start(source: Adapter) -> Adapter:
    """What `train` takes as `init`: the prompt without its task, so that the head starts fresh."""
    task_embedding(source)
    return Adapter(replace(source.spec, task=None, metrics=()), source.body_tensors())
