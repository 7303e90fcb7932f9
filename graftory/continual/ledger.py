"""What a run has to store after a step, in bytes, to answer all tasks and to go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from graftory.continual.strategies import Context, Kept, Strategy
from graftory.schema import canonical


def stored_bytes(strategy: Strategy, context: Context, router: Path | None) -> dict[str, int]:
    """Bytes by what they are: `adapters` and `heads` that answer the tasks learnt so far, each counted once, the
    `router`, and what the strategy keeps by its own names. The base model is not counted.

    Args:
        strategy: Says what answers a task.
        context: After the step.
        router: The router's file, if there is one.
    """
    answers = [strategy.answer(context, step.task) for step in context.done]
    used = [each for answer in answers for each in answer.bodies()]
    bodies = {id(body): body.body_tensors() for body in used}
    heads = {id(answer.head): answer.head.head_tensors() for answer in answers if answer.head is not None}
    found = Counter(adapters=_sum(bodies.values()), heads=_sum(heads.values()))
    if router is not None:
        found["router"] = router.stat().st_size
    found.update(_kept(context.kept))
    return {name: count for name, count in sorted(found.items()) if count}


def _sum(parts: Iterable[Mapping[str, Tensor]]) -> int:
    return sum(tensor.nbytes for part in parts for tensor in part.values())


def _kept(kept: Kept) -> Counter[str]:
    """By the first part of the names; heads kept anew take the place of those that were learnt."""
    found: Counter[str] = Counter()
    for name, tensor in kept.tensors.items():
        found[name.split("/")[0]] += tensor.nbytes
    for name, value in kept.values.items():
        found[name.split("/")[0]] += len(canonical(value))
    # Context.head answers with them: they are in the heads already
    del found["heads"]
    return found
