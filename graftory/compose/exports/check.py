"""Whether an exported model does what base + adapter does, on real inputs; the two are never in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from graftory.adapters import AdaptedModel
from graftory.errors import MergeError, ShapeError

TOLERANCE = 1e-3
"""Largest difference of logits that an export may have; rounding alone stays far below it in fp32."""
_ROUNDINGS = 8
"""In half precision each changed weight is rounded anew: logits may differ by this many units in the last place of the
largest of them."""


@dataclass(frozen=True, slots=True)
class ExportCheck:
    """How far the exported model is from base + adapter."""

    max_difference: float
    """Largest absolute difference of two logits."""
    n: int
    """Rows compared."""
    largest: float = 0.0
    """Largest absolute logit."""


def tolerance(check: ExportCheck, dtype: torch.dtype) -> float:
    """How far a model in weights of a type may be from base + adapter in fp32."""
    if dtype in (torch.float32, torch.float64):
        return TOLERANCE
    return max(TOLERANCE, _ROUNDINGS * torch.finfo(dtype).eps * check.largest)


def record_logits(
    adapted: AdaptedModel, batches: Iterable[Mapping[str, Any]], folder: Path, *, name: str, head: str | None
) -> tuple[Path, ...]:
    """Write the logits of base + adapter to files, one a batch."""
    files = []
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            with adapted.route(name, heads=head):
                logits = cast(Tensor, adapted(**batch).logits)
            files.append(folder / f"{number}.pt")
            torch.save(logits.clone(), files[-1])
    return tuple(files)


def recorded(files: Sequence[Path]) -> Iterator[Tensor]:
    """What `record_logits` wrote."""
    return (torch.load(file, weights_only=True) for file in files)


def compare(
    exported: Callable[..., Any], batches: Iterable[Mapping[str, Any]], wanted: Iterable[Tensor]
) -> ExportCheck:
    """Compare a model's logits with those that were recorded.

    Args:
        exported: The model, or whatever takes a batch and returns something with `logits`.
        batches: Inputs.
        wanted: The logits of each.

    Raises:
        MergeError: If there is nothing to compare.
        ShapeError: If the logits have different shapes.
    """
    worst, largest, rows = 0.0, 0.0, 0
    with torch.inference_mode():
        for batch, want in zip(batches, wanted, strict=True):
            got = cast(Tensor, exported(**batch).logits)
            if want.shape != got.shape:
                raise ShapeError(
                    f"base + adapter gives logits {tuple(want.shape)}, the exported model {tuple(got.shape)}"
                )
            # one row at a time: in fp64 all of them would be several times the logits of a batch
            for one, other in zip(want, got, strict=True):
                difference = float((one.double() - other.double()).abs().max())
                # a number that is none differs, wherever it stands
                worst = difference if difference != difference else max(worst, difference)
                largest = max(largest, float(one.abs().max()))
            rows += want.shape[0]
            if worst != worst:
                break
    if rows == 0:
        raise MergeError("no batches to compare the exported model on; give at least one row")
    return ExportCheck(worst, rows, largest)
