"""`--select` of `hub merge`: which of the adapters are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftory.adapter import Adapter, AdapterRef
from graftory.commands.options import given_settings
from graftory.commands.output import print_json, print_ref, print_table, working
from graftory.errors import ConfigError
from graftory.schema import Json
from graftory.settings import SelectSettings

if TYPE_CHECKING:
    from graftory.compose.select import Selection
    from graftory.hub import Hub


_GO_WITH: Mapping[str | None, set[str]] = {None: set(), "greedy": {"--on", "--on-rows"}}
"""Options that go with each `--select`; those by examples have two others."""


@dataclass(frozen=True, slots=True)
class Chooser:
    """What was asked for.

    Attributes:
        method: `clustering`, `similarity`, `greedy`; None to merge all.
        examples: Examples of the new domain, for the first two.
        encoder: The model that encodes them; None for the adapters' base.
        on: The task whose training rows decide, for `greedy`.
        rows: How many of them.
        seed: Which examples and rows, and the clustering's.
        merge_method: How the adapters are merged, for `greedy`.
    """

    method: str | None
    examples: str | None
    encoder: str | None
    on: str | None
    rows: int | None
    seed: int
    merge_method: str

    def check(self, weights: Sequence[float] | None) -> None:
        """Refuse options that do not go together.

        Raises:
            ConfigError: If some do not, or one is missing.
        """
        given = {"--examples": self.examples, "--encoder": self.encoder, "--on": self.on, "--on-rows": self.rows}
        wanted = _GO_WITH.get(self.method, {"--examples", "--encoder"})
        odd = sorted(name for name, value in given.items() if value is not None and name not in wanted)
        if odd:
            which = f"--select {self.method}" if self.method else "no --select"
            raise ConfigError(f"{odd[0]} and {which} do not go together; see hub merge --help")
        if self.method is None:
            if given_settings(SelectSettings):
                raise ConfigError(
                    f"--{next(iter(given_settings(SelectSettings)))} needs --select; see hub merge --help"
                )
            return
        needed = "--on" if self.method == "greedy" else "--examples"
        if given[needed] is None:
            raise ConfigError(f"--select {self.method} needs {needed}; see hub merge --help")
        if weights is not None:
            raise ConfigError("--weights and --select do not go together: those that are selected have equal weights")

    def choose(self, adapters: Mapping[str, Adapter]) -> Selection | None:
        """The adapters to merge, best first; None if nothing was asked for.

        Raises:
            MergeError: If none of them suits.
        """
        if self.method is None:
            return None
        return self._by_trying(adapters) if self.method == "greedy" else self._by_examples(adapters, self.method)

    def notes(self, selection: Selection | None) -> dict[str, Json]:
        """What the lineage tells of it."""
        if selection is None:
            return {}
        found: dict[str, Json] = {"select": selection.method, "seed": self.seed}
        extra = {"examples": self.examples, "encoder": self.encoder, "on": self.on, "on_rows": self.rows}
        found |= {key: value for key, value in extra.items() if value is not None}
        found |= given_settings(SelectSettings)
        return found | {"judged": {choice.name: choice.score for choice in selection.choices}}

    def _by_examples(self, adapters: Mapping[str, Adapter], method: str) -> Selection:
        from graftory.compose.select import encode_domains, select
        from graftory.training import load_base

        settings = SelectSettings(**given_settings(SelectSettings))
        first = next(iter(adapters.values()))
        encoder = self.encoder or first.spec.base.id
        kind = first.spec.task.kind if first.spec.task and self.encoder is None else "classification"
        with working(f"loading {encoder}"):
            loaded = load_base(encoder, kind)
        with working(f"encoding examples of {len(adapters) + 1} domains"):
            domains, new = encode_domains(
                loaded, adapters, str(self.examples), limit=settings.per_domain, seed=self.seed
            )
        return select(domains, new, method, settings, seed=self.seed)

    def _by_trying(self, adapters: Mapping[str, Adapter]) -> Selection:
        from graftory.compose.select import greedy_soup
        from graftory.data import load_rows, load_task
        from graftory.training import Job, evaluate, load_base
        from graftory.training.metrics import LOWER_IS_BETTER

        task = load_task(str(self.on))
        rows = load_rows(task, "train", limit=self.rows, seed=self.seed)
        first = next(iter(adapters.values()))
        with working(f"loading {first.spec.base.id}"):
            loaded = load_base(first.spec.base.id, task.kind)

        def score(adapter: Adapter) -> float:
            (metrics,) = evaluate(loaded, [Job("candidate", adapter, None, task, rows)])
            return -metrics[0].value if metrics[0].name in LOWER_IS_BETTER else metrics[0].value

        settings = SelectSettings(**given_settings(SelectSettings))
        with working(f"trying {len(adapters)} adapters on {len(rows)} rows"):
            return greedy_soup(adapters, score, method=self.merge_method, most=settings.most)


def print_selection(selection: Selection, hub: Hub, ref: AdapterRef, as_json: bool) -> None:
    """Say which adapters were taken and why."""
    if as_json:
        print_json({"ref": str(ref), "digest": hub.record(ref).digest, "selection": selection})
        return
    print_table(
        ("adapter", "merged", "because"),
        [(choice.name, "yes" if choice.chosen else "no", choice.reason) for choice in selection.choices],
    )
    print_ref("merged into", hub, ref, as_json=False)
