"""The whole report of one merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftory.adapter import Adapter
from graftory.compose.merge.judging import Bench, trials_of
from graftory.compose.merge.report.advice import KEEP, Advice, advise
from graftory.compose.merge.report.interference import Interference, interference
from graftory.compose.merge.report.retention import Retention, retention
from graftory.compose.record import record_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge does to the adapters in it.

    Attributes:
        method: How they were merged.
        interference: Module by module.
        retention: Task by task; empty if no rows were asked for.
        advice: Whether to merge.
    """

    method: str
    interference: Interference
    retention: tuple[Retention, ...]
    advice: Advice


def merge_report(
    adapters: Mapping[str, Adapter],
    merged: Adapter,
    *,
    rows: int | None = None,
    split: str = "test",
    seed: int = 0,
    keep: float = KEEP,
    base: PreTrainedModel | None = None,
) -> MergeReport:
    """Report what a merge does to the adapters in it.

    Args:
        adapters: By name, of linear methods and one base.
        merged: What they were merged to.
        rows: So many rows of each adapter's own task, to weigh the error by what the adapter reads of them and to
            measure retention; without, no model is loaded.
        split: Which rows.
        seed: Which of them.
        keep: Share of its own score that each task must keep.
        base: The plain base model, for adapters that scale its own weights (`needs_base`).

    Raises:
        MergeError: If one is not linear.
        ConfigError: If rows are asked for and a record names no task.
    """
    method = str(merged.spec.lineage.parameters.get("method", "unknown"))
    if rows is None:
        found = interference(adapters, merged, base=base)
        return MergeReport(method, found, (), advise(found, keep=keep))
    trials = trials_of(adapters, rows, seed=seed, split=split)
    bench = Bench(trials)
    inputs = [record_inputs(bench.loaded(trial.task.kind), trial.adapter, trial.rows.texts) for trial in trials]
    found, kept = interference(adapters, merged, inputs, base=base), retention(bench, merged)
    return MergeReport(method, found, kept, advise(found, kept, keep=keep))
