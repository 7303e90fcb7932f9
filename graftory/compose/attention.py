"""Which adapters a fusion attends to: mean weights by place and source, as data and as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.adapters import AdaptedModel
from graftory.adapters.fusion_site import watched
from graftory.config import FusionConfig, FusionPlace
from graftory.data import Rows, TaskFile
from graftory.errors import UnsupportedAdapterError
from graftory.training import LoadedBase
from graftory.training.encode import IGNORED, Collator, by_length, encode
from graftory.training.losses import model_inputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


@dataclass(frozen=True, slots=True)
class PlaceAttention:
    """The mean attention at one place."""

    path: str
    track: str
    weights: tuple[float | None, ...]
    """For each source, in order; None where it does not sit. They sum to 1."""


@dataclass(frozen=True, slots=True)
class AttentionTable:
    """What a fusion attends to on the rows of one task: means over all tokens that are no padding."""

    task: str
    rows: int
    sources: tuple[str, ...]
    places: tuple[PlaceAttention, ...]

    def mean(self) -> tuple[float | None, ...]:
        """The mean over the places where a source meets others, for each source; None if it is alone everywhere."""
        met = [place.weights for place in self.places if sum(weight is not None for weight in place.weights) > 1]
        columns = [[weights[n] for weights in met] for n in range(len(self.sources))]
        present = [[weight for weight in column if weight is not None] for column in columns]
        return tuple(sum(weights) / len(weights) if weights else None for weights in present)

    def labels(self) -> tuple[str, ...]:
        """Short names of the places: their paths without what all have in front, and LoRA's or parallel's word."""
        split = [place.path.split(".") for place in self.places]
        shared = 0
        while all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
            shared += 1
        words = {"lora": "", "serial": " (adapter)", "parallel": " (parallel)"}
        return tuple(
            ".".join(parts[shared:]) + words[place.track] for parts, place in zip(split, self.places, strict=True)
        )


class AttentionRecorder:
    """Sums up the attention of fusions; use it with `watched(recorder)` around forward passes.

    Attributes:
        mask: 1 for the tokens to count, [rows, length]; None counts all.
        decoder_mask: The same for what the decoder of an encoder-decoder model reads.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.decoder_mask: Tensor | None = None
        self._sums: dict[tuple[int, str, str, str], Tensor] = {}
        self._counts: dict[tuple[int, str, str, str], float] = {}

    def __call__(self, owner: int, slot: str, place: FusionPlace, rows: Tensor | None, weights: Tensor) -> None:
        """See `Watcher`."""
        flat = weights.reshape(-1, weights.shape[-1]).double()
        counted = torch.ones(len(flat), dtype=torch.float64, device=flat.device)
        mask = self.decoder_mask if _reads_decoder(place.path) and self.decoder_mask is not None else self.mask
        if mask is not None:
            mask = mask if rows is None else mask.index_select(0, rows)
            counted = mask.reshape(-1).double()
        key = (owner, slot, place.path, place.track)
        self._sums[key] = self._sums.get(key, torch.zeros(())) + counted @ flat
        self._counts[key] = self._counts.get(key, 0.0) + float(counted.sum())

    def mean(self, adapted: AdaptedModel, name: str) -> tuple[PlaceAttention, ...]:
        """The mean attention of an attached fusion, at every place that has run."""
        config = adapted.spec(name).config
        if not isinstance(config, FusionConfig):
            raise UnsupportedAdapterError(f"{name!r} is a {config.method} adapter, wanted a fusion")
        slot = adapted.slot_of(name)
        found = []
        for place in config.places:
            key = (id(adapted), slot, place.path, place.track)
            if self._counts.get(key):
                weights = dict(zip(place.sources, (self._sums[key] / self._counts[key]).tolist(), strict=True))
                found.append(
                    PlaceAttention(place.path, place.track, tuple(weights.get(n) for n in range(config.sources)))
                )
        return tuple(found)


def attention(
    loaded: LoadedBase, fusion: Adapter, task: TaskFile, rows: Rows, *, names: Sequence[str] = (), batch_size: int = 32
) -> AttentionTable:
    """Measure what a fusion attends to on the rows of a task.

    Args:
        loaded: The base model.
        fusion: The fusion, with its sources.
        task: The task.
        rows: Rows of it; language models read the targets too.
        names: What to call the sources; by default as the lineage does.
        batch_size: Rows a batch.

    Raises:
        UnsupportedAdapterError: If it is no fusion.
        BaseMismatchError: If it belongs to another base.
    """
    config = fusion.spec.config
    if not isinstance(config, FusionConfig):
        raise UnsupportedAdapterError(f"got a {config.method} adapter, wanted a fusion")
    info, recorder = rows.info(task), AttentionRecorder()
    examples = [encode(loaded.tokenizer, info, text, y) for text, y in zip(rows.texts, rows.targets, strict=True)]
    collator = Collator(loaded.tokenizer.pad_token_id)
    adapted = AdaptedModel(loaded.model, loaded.base)
    try:
        adapted.add("fusion", fusion)
        adapted.eval()
        with adapted.route("fusion"), torch.no_grad(), watched(recorder):
            for group in by_length(examples, batch_size):
                batch = collator([examples[row] for row in group])
                moved = {key: value.to(loaded.model.device) for key, value in batch.items()}
                recorder.mask = moved["attention_mask"]
                recorder.decoder_mask = moved["labels"].ne(IGNORED) if task.kind == "seq2seq" else None
                adapted(**model_inputs(task.kind, moved))
        places = recorder.mean(adapted, "fusion")
    finally:
        adapted.detach()
    return AttentionTable(task.name, len(rows), tuple(names) or source_names(fusion), places)


def _reads_decoder(path: str) -> bool:
    """Whether a module reads the decoder's tokens: keys and values of cross-attention read the encoder's."""
    return "decoder" in path.split(".") and not path.endswith(("EncDecAttention.k", "EncDecAttention.v"))


def source_names(fusion: Adapter) -> tuple[str, ...]:
    """What the sources of a composed adapter are called: their references, or else their tasks or numbers."""
    parents = [parent.ref for parent in fusion.spec.lineage.parents if parent.relation == "composed"]
    if len(parents) == len(fusion.sources):
        return tuple(parents)
    return tuple(
        source.spec.task.name if source.spec.task else f"source {number + 1}"
        for number, source in enumerate(fusion.sources)
    )


def draw_attention(tables: Sequence[AttentionTable]) -> bytes:
    """Draw what a fusion attends to, a panel for each task: a row for each place, a column for each source.

    Returns:
        A PNG image.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places, sources = len(tables[0].places), len(tables[0].sources)
    figure = Figure(figsize=(3.4 + 0.75 * sources * len(tables), 1.6 + 0.34 * places), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axes, table in zip(grid, tables, strict=True):
        image = _draw(axes, table)
    grid[0].set_yticks(range(places), labels=list(tables[0].labels()))
    figure.colorbar(image, ax=grid, label="mean attention")
    buffer = io.BytesIO()
    # no time and no version in the file: the same table gives the same bytes
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Axes, table: AttentionTable) -> AxesImage:
    values = [[float("nan") if weight is None else weight for weight in place.weights] for place in table.places]
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(
        range(len(table.sources)), labels=list(table.sources), rotation=30, ha="right", rotation_mode="anchor"
    )
    axes.set_title(f"{table.task}, {table.rows} rows", fontsize=10)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:  # not NaN
                colour = "white" if value < 0.6 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    return image
