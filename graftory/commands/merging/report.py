"""`--report` of `hub merge`: what the merge does to the adapters in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from graftory.adapter import Adapter
from graftory.commands.output import print_table, working
from graftory.errors import ConfigError
from graftory.schema import Json, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graftory.compose.merge.report import MergeReport, Pair


@dataclass(frozen=True, slots=True)
class Reporter:
    """What was asked for.

    Attributes:
        file: Where the picture goes; None for no report.
        rows: So many test rows of each adapter's task; None for a report from the weights alone.
        keep: Share of its own score that each task must keep.
        seed: Which rows.
    """

    file: Path | None
    rows: int | None
    keep: float | None
    seed: int

    def check(self) -> None:
        """Refuse what cannot be, before anything is merged.

        Raises:
            ConfigError: If options do not go together, or the picture cannot be written there.
        """
        if self.file is None:
            given = {"--report-rows": self.rows, "--keep": self.keep}
            odd = [name for name, value in given.items() if value is not None]
            if odd:
                raise ConfigError(f"{odd[0]} needs --report FILE, where the picture goes; see hub merge --help")
            return
        from graftory.compose.merge.report.picture import check_picture

        check_picture(self.file)

    def report(
        self, adapters: Mapping[str, Adapter], merged: Adapter, base: PreTrainedModel | None
    ) -> MergeReport | None:
        """The report, its picture written; None if none was asked for."""
        if self.file is None:
            return None
        from graftory.compose.merge.report import merge_report
        from graftory.compose.merge.report.advice import KEEP
        from graftory.compose.merge.report.picture import draw_report

        keep = KEEP if self.keep is None else self.keep
        with working("comparing updates" if self.rows is None else "comparing updates, and measuring tasks"):
            found = merge_report(adapters, merged, rows=self.rows, seed=self.seed, keep=keep, base=base)
        self.file.write_bytes(draw_report(found, self.file.suffix.lower()[1:]))
        return found


def report_to_json(found: MergeReport, file: Path | None) -> Json:
    """The report as plain JSON values."""
    return {**encode(found), "picture": str(file)}


def print_report(found: MergeReport, file: Path | None) -> None:
    """The report for people: means over modules, tasks, what to do."""
    if found.interference.pairs:
        columns = ("adapters", "sign conflict", "overlap, written", "overlap, read", "cosine", "norms")
        print_table(columns, [_cells(pair) for pair in found.interference.pairs])
        click.echo()
    where = "its inputs" if found.interference.by_inputs else "what it reads"
    print_table(
        ("adapter", f"error on {where}", "agreement"),
        [(one.adapter, _number(one.error, ".3f"), f"{one.agreement:.3f}") for one in found.interference.effects],
    )
    if found.retention:
        click.echo()
        print_table(
            ("task", "metric", "base", "own adapter", "merged", "retained"),
            [
                (one.task, one.metric, f"{one.base:.4f}", f"{one.own:.4f}", f"{one.merged:.4f}", _share(one.retained))
                for one in found.retention
            ],
        )
    click.echo(f"\n{found.advice.what}: {found.advice.reason}")
    click.echo(f"by module: {file}")


def _cells(pair: Pair) -> Sequence[str]:
    overlaps = (f"{pair.write_overlap:.3f}", f"{pair.read_overlap:.3f}")
    ratio = _number(pair.norm_ratio, ".2f")
    return (f"{pair.first}, {pair.second}", f"{pair.sign_conflict:.1%}", *overlaps, f"{pair.cosine:+.3f}", ratio)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
