"""The table of selectors, and selecting by one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from graftory.compose.select import clustering, similarity
from graftory.compose.select.base import Choice, Domain, Selection
from graftory.errors import MergeError
from graftory.settings import SelectSettings


@dataclass(frozen=True, slots=True)
class Selector:
    """A row of the table.

    Attributes:
        title: What it goes by.
        score: A score for each domain, higher is better.
        passes: Whether a score is good enough.
        explain: The reason in words.
    """

    title: str
    score: Callable[[Sequence[Domain], Tensor, SelectSettings, int], Mapping[str, float]]
    passes: Callable[[float, SelectSettings], bool]
    explain: Callable[[float, SelectSettings, Mapping[str, float]], str]


SELECTORS: Mapping[str, Selector] = {
    "clustering": Selector("share of examples", clustering.by_clustering, clustering.is_shared, clustering.explain),
    "similarity": Selector("mean cosine", similarity.by_similarity, similarity.is_similar, similarity.explain),
}
"""Selectors by unlabelled examples; `greedy` needs labelled ones and is `greedy_soup`."""


def select(
    domains: Sequence[Domain],
    examples: Tensor,
    method: str = "clustering",
    settings: SelectSettings | None = None,
    *,
    seed: int = 0,
) -> Selection:
    """Choose the adapters whose training data are like the examples of a new domain.

    Args:
        domains: Features of examples of what each adapter was trained on.
        examples: Features of examples of the new domain, [examples, width].
        method: A row of `SELECTORS`.
        settings: Limits.
        seed: For the clustering.

    Raises:
        MergeError: If the selector is unknown, something is empty, two have one name, or none is good enough.
    """
    row = SELECTORS.get(method)
    settings = settings or SelectSettings()
    if row is None:
        raise MergeError(f"unknown selector {method!r}; known: {', '.join(SELECTORS)}, and greedy with labelled rows")
    _check(domains, examples)
    scores = row.score(domains, examples, settings, seed)
    best = sorted(scores, key=lambda name: -scores[name])
    taken = [name for name in best if row.passes(scores[name], settings)][: settings.most]
    if not taken:
        raise MergeError(
            f"{method}: no adapter's training data are like the examples; the nearest is {best[0]} "
            f"({row.explain(scores[best[0]], settings, scores)}); allow more, or name the adapters without --select"
        )
    choices = tuple(
        Choice(name, scores[name], name in taken, row.explain(scores[name], settings, scores)) for name in best
    )
    return Selection(method, choices)


def _check(domains: Sequence[Domain], examples: Tensor) -> None:
    names = [domain.name for domain in domains]
    if not domains or len(set(names)) != len(names):
        raise MergeError(f"adapters to select from: got {', '.join(names) or 'none'}, wanted one or more, each once")
    empty = [domain.name for domain in domains if not len(domain.features)]
    if empty or not len(examples):
        raise MergeError(f"no examples of {empty[0] if empty else 'the new domain'}; give at least one")
