"""Which prompt takes which rows: shares by label, as data and as a picture."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.adapters import AdaptedModel
from graftory.adapters.smop import reading, routing_watched
from graftory.compose.smop import smop_config_of
from graftory.data import Rows, TaskFile
from graftory.training import LoadedBase
from graftory.training.encode import Collator, by_length, encode, in_order
from graftory.training.losses import model_inputs, readable_tokens


@dataclass(frozen=True, slots=True)
class LabelRouting:
    """Where the rows of one label went."""

    label: str
    rows: int
    shares: tuple[float, ...]
    """The share of them that each prompt took; they sum to 1."""


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """Where the rows of a task went."""

    task: str
    rows: int
    prompts: int
    labels: tuple[LabelRouting, ...]
    """One entry for each label that occurs; one for all rows if the task has no labels."""
    shares: tuple[float, ...]
    """The share of all rows that each prompt took."""
    confidence: float
    """The mean of the chosen prompt's weight, w_i: 1 / prompts says that the router has no preference."""


def routing(loaded: LoadedBase, adapter: Adapter, task: TaskFile, rows: Rows, *, batch_size: int = 32) -> RoutingTable:
    """Route the rows of a task and count.

    Args:
        loaded: The base model.
        adapter: A smop adapter.
        task: The task.
        rows: Rows of it.
        batch_size: Rows a batch.

    Raises:
        UnsupportedAdapterError: If it is another kind of adapter.
        BaseMismatchError: If it belongs to another base.
    """
    config, weights = smop_config_of(adapter), _weights(loaded, adapter, task, rows, batch_size)
    taken = torch.nn.functional.one_hot(weights.argmax(1), config.prompts).double()
    found = []
    for number, label in enumerate(rows.labels or ("all rows",)):
        mine = [row for row, target in enumerate(rows.targets) if not rows.labels or target == number]
        if mine:
            found.append(LabelRouting(label, len(mine), tuple(taken[mine].mean(0).tolist())))
    confidence = float(weights.max(1).values.mean())
    return RoutingTable(task.name, len(rows), config.prompts, tuple(found), tuple(taken.mean(0).tolist()), confidence)


def _weights(loaded: LoadedBase, adapter: Adapter, task: TaskFile, rows: Rows, batch_size: int) -> Tensor:
    """w of every row, [rows, k], in the order of the rows."""
    info = rows.info(task)
    examples = [encode(loaded.tokenizer, info, text, y) for text, y in zip(rows.texts, rows.targets, strict=True)]
    groups = by_length(examples, batch_size)
    collator = Collator(loaded.tokenizer.pad_token_id)
    seen: list[Tensor] = []

    def keep(owner: int, slot: str, batch_rows: Tensor, weights: Tensor) -> None:
        del owner, slot, batch_rows  # one adapter, all rows
        seen.append(weights.float().cpu())

    adapted = AdaptedModel(loaded.model, loaded.base)
    try:
        adapted.add("smop", adapter)
        adapted.eval()
        with adapted.route("smop"), torch.no_grad(), routing_watched(keep):
            for group in groups:
                batch = collator([examples[row] for row in group])
                moved = {key: value.to(loaded.model.device) for key, value in batch.items()}
                with reading(readable_tokens(task.kind, moved)):
                    adapted(**model_inputs(task.kind, moved))
    finally:
        adapted.detach()
    return in_order(torch.cat(seen), groups)


def draw_routing(table: RoutingTable) -> bytes:
    """Draw where the rows went: a row for each label, a column for each prompt.

    Returns:
        A PNG image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (3.2 + 0.7 * table.prompts, 1.8 + 0.34 * len(table.labels))
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = [label.shares for label in table.labels]
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(table.prompts), labels=[str(number + 1) for number in range(table.prompts)])
    axes.set_yticks(range(len(table.labels)), labels=[f"{label.label} ({label.rows})" for label in table.labels])
    axes.set_xlabel("prompt")
    axes.set_title(f"{table.task}, {table.rows} rows", fontsize=10)
    for i, shares in enumerate(values):
        for j, share in enumerate(shares):
            colour = "white" if share < 0.6 else "black"
            axes.text(j, i, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, label="share of the rows")
    buffer = io.BytesIO()
    # no time and no version in the file: the same table gives the same bytes
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
