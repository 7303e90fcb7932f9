"""`--select` of `hub merge`: which of the adapters are merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftory.adapter import Adapter
from graftory.commands.options import given_settings
from graftory.commands.output import print_table, working
from graftory.errors import ConfigError
from graftory.schema import Json
from graftory.settings import SelectSettings

if TYPE_CHECKING:
    from torch import Tensor

    from graftory.compose.merge.base import MergeParameters
    from graftory.compose.merge.mera import MeraParameters
    from graftory.compose.select import Selection


_ON = {"--on", "--on-rows"}
_GO_WITH: Mapping[str | None, set[str]] = {None: set(), "greedy": _ON, "same-track": _ON}
"""Options that go with each `--select`; those by examples have two others."""


@dataclass(frozen=True, slots=True)
class Chooser:
    """What was asked for.

    Attributes:
        method: `clustering`, `similarity`, `greedy`, `same-track`; None to merge all.
        examples: Examples of the new domain, for the first two.
        encoder: The model that encodes them; None for the adapters' base.
        on: The task whose training rows decide, for `greedy` and the best anchor, or whose labels, for `same-track`.
        rows: How many of them.
        seed: Which examples and rows, and the clustering's.
        merge_method: How the adapters are merged, for `greedy`.
        merge_parameters: Parameters of that method.
        anchored: Whether the best anchor is wanted, which needs `on`.
    """

    method: str | None
    examples: str | None
    encoder: str | None
    on: str | None
    rows: int | None
    seed: int
    merge_method: str
    merge_parameters: MergeParameters | None = None
    anchored: bool = False

    def check(self, weights: object) -> None:
        """Refuse options that do not go together.

        Raises:
            ConfigError: If some do not, or one is missing.
        """
        given = {"--examples": self.examples, "--encoder": self.encoder, "--on": self.on, "--on-rows": self.rows}
        wanted = _GO_WITH.get(self.method, {"--examples", "--encoder"})
        wanted = wanted | _ON if self.anchored else wanted
        if self.anchored and self.on is None:
            raise ConfigError("--anchor 0 needs --on, the task whose rows tell which anchor is best")
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
        needed = "--on" if "--on" in _GO_WITH.get(self.method, set()) else "--examples"
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
        ways = {"greedy": self._by_trying, "same-track": self._by_track}
        way = ways.get(self.method)
        return way(adapters) if way else self._by_examples(adapters, self.method)

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
        from graftory.compose.merge.loading import base_for
        from graftory.compose.select import greedy_soup

        parts, parameters = list(adapters.values()), self.merge_parameters
        base, inputs = base_for(parts, self.merge_method), None
        if parameters is not None and parameters.reads == "own tasks":
            read = recorded_inputs(parts, None, self.seed, gradients=parameters.gradients)
            inputs = dict(zip(adapters, read, strict=True))
        score = self._score(next(iter(adapters.values())))
        settings = SelectSettings(**given_settings(SelectSettings))
        with working(f"trying {len(adapters)} adapters"):
            return greedy_soup(
                adapters,
                score,
                method=self.merge_method,
                parameters=parameters,
                base=base,
                inputs=inputs,
                most=settings.most,
            )

    def _by_track(self, adapters: Mapping[str, Adapter]) -> Selection:
        from graftory.compose.select import same_track
        from graftory.data import load_rows, load_task

        task = load_task(str(self.on))
        return same_track(adapters, load_rows(task, "train", limit=1).info(task))

    def best_anchor(
        self, adapters: Sequence[Adapter], parameters: MeraParameters, inputs: Sequence[Mapping[str, Tensor]]
    ) -> tuple[MeraParameters, list[float]]:
        """The anchor of `mera` whose merge is best on the task, and the score of each."""
        from graftory.compose.select.greedy import best_anchor

        score = self._score(adapters[0])
        with working(f"trying {len(adapters)} anchors"):
            return best_anchor(adapters, score, parameters, inputs)

    def _score(self, like: Adapter) -> Callable[[Adapter], float]:
        """What measures adapters on the task, higher is better; it loads the base once."""
        from graftory.data import load_rows, load_task
        from graftory.training import Job, evaluate, load_base
        from graftory.training.metrics import LOWER_IS_BETTER

        task = load_task(str(self.on))
        rows = load_rows(task, "train", limit=self.rows, seed=self.seed)
        with working(f"loading {like.spec.base.id}"):
            loaded = load_base(like.spec.base.id, task.kind)

        def score(adapter: Adapter) -> float:
            (metrics,) = evaluate(loaded, [Job("candidate", adapter, None, task, rows)])
            return -metrics[0].value if metrics[0].name in LOWER_IS_BETTER else metrics[0].value

        return score


def recorded_inputs(
    adapters: Sequence[Adapter], examples: str | None, seed: int, *, gradients: bool
) -> list[dict[str, Tensor]]:
    """What each adapter reads at its sites, for a hundred examples, or for as many of its own task's."""
    from graftory.compose.record import record_examples

    limit = SelectSettings(**given_settings(SelectSettings)).per_domain
    with working(f"recording what {len(adapters)} adapters read of {examples or 'their own tasks'}"):
        return record_examples(adapters, examples, limit=limit, seed=seed, gradients=gradients)


def print_selection(selection: Selection) -> None:
    """Say which adapters were taken and why."""
    print_table(
        ("adapter", "merged", "because"),
        [(choice.name, "yes" if choice.chosen else "no", choice.reason) for choice in selection.choices],
    )
