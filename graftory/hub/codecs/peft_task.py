"""What PEFT's files tell of the task: its kind, and how many labels the saved head gives out."""

from __future__ import annotations

from collections.abc import Mapping

from graftory.adapter import TaskInfo, TaskKind
from graftory.hub.codecs.tensors import head_outputs
from graftory.hub.safetensors_header import StoredTensor

_GENERATORS: Mapping[str, TaskKind] = {"CAUSAL_LM": "causal_lm", "SEQ_2_SEQ_LM": "seq2seq"}


def imported_task(
    task_type: str | None, heads: tuple[str, ...], stored: Mapping[str, StoredTensor], name: str
) -> TaskInfo | None:
    """The task of an adapter whose files say no more than PEFT's.

    Args:
        task_type: PEFT's, or None.
        heads: Module paths of the saved heads.
        stored: Every tensor, without PEFT's prefix.
        name: Name for the task: the adapter's.

    Returns:
        The task; None if neither a task type nor a head tells of one.

    Raises:
        UnsupportedAdapterError: If no linear layer is found in the head.
    """
    short = name.rpartition("/")[2]
    if task_type is not None and task_type in _GENERATORS:
        return TaskInfo(short, _GENERATORS[task_type], head=heads)
    if not heads:
        return TaskInfo(short, "classification") if task_type == "SEQ_CLS" else None
    outputs = head_outputs(heads, stored)
    if outputs == 1:
        return TaskInfo(short, "regression", head=heads)
    return TaskInfo(short, "classification", labels=tuple(f"LABEL_{i}" for i in range(outputs)), head=heads)
