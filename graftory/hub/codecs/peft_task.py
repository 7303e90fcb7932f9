"""What PEFT's files tell of the task: its kind, and how many labels the saved head gives out."""

from __future__ import annotations

from collections.abc import Mapping

from graftory.adapter import TaskInfo, TaskKind
from graftory.errors import UnsupportedAdapterError
from graftory.hub.safetensors_header import StoredTensor

_GENERATORS: Mapping[str, TaskKind] = {"CAUSAL_LM": "causal_lm", "SEQ_2_SEQ_LM": "seq2seq"}
_OUTPUT_LAYERS = ("out_proj", "classifier", "score")
"""Names of a head's last layer, where it has several."""


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
    outputs = _outputs(heads, stored)
    if outputs == 1:
        return TaskInfo(short, "regression", head=heads)
    return TaskInfo(short, "classification", labels=tuple(f"LABEL_{i}" for i in range(outputs)), head=heads)


def _outputs(heads: tuple[str, ...], stored: Mapping[str, StoredTensor]) -> int:
    rows = {
        key.removesuffix(".weight"): tensor.shape[0]
        for key, tensor in stored.items()
        if any(key.startswith(f"{head}.") for head in heads) and key.endswith(".weight") and len(tensor.shape) == 2
    }
    if not rows:
        raise UnsupportedAdapterError(f"modules_to_save: no linear layer in {heads[0]!r}; graftory keeps linear heads")
    for last in _OUTPUT_LAYERS:
        found = [count for path, count in rows.items() if path.rpartition(".")[2] == last]
        if found:
            return min(found)
    return min(rows.values())
