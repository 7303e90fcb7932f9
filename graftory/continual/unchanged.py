"""What answers as it did at the step before need not be measured again.

The rows of a test and the base never change in a run. So a cell is that of the step before if the adapter and the head
are the same to the last bit and, where rows are routed, each row goes where it went. Then the matrix costs one new cell
a task and not one for each pair of tasks: with frozen adapters T tasks take T measurements in place of T(T + 1)/2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from graftory.adapter import Adapter
from graftory.continual.freeze import hash_tensors
from graftory.continual.state import Cell
from graftory.continual.strategies import Answer
from graftory.schema import encode


def mark(answer: Answer) -> str:
    """sha256 over all that an answer depends on besides the base; empty if it is more than a body and a head."""
    if answer.mixture is not None or answer.readout is not None:
        return ""
    body, head = answer.body, answer.head
    return _hash("bare" if body is None else _body(body), "none" if head is None else _head(head))


def routed_mark(chosen: Sequence[str], marks: Mapping[str, str]) -> str:
    """sha256 over where each row goes and what answers it there; empty if the mark of one of these answers is.

    Args:
        chosen: The name of each row's route.
        marks: The mark of the answer behind each route.
    """
    taken = {route: marks[route] for route in sorted(set(chosen))}
    return _hash(*chosen, *taken.values()) if all(taken.values()) else ""


def unchanged(before: Cell | None, own: str, step: int) -> Cell | None:
    """The cell of the step before as that of this step, if what answers has this mark and had it then."""
    if not own or before is None or before.mark != own:
        return None
    return replace(before, step=step, copied=True)


def _body(adapter: Adapter) -> str:
    return _hash(json.dumps(encode(adapter.spec.config), sort_keys=True), hash_tensors(adapter.body_tensors()))


def _head(adapter: Adapter) -> str:
    return _hash(json.dumps(encode(adapter.spec.task), sort_keys=True), hash_tensors(adapter.head_tensors()))


def _hash(*parts: str) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"
