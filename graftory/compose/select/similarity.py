"""Selection by the mean cosine between examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graftory.compose.select.base import Domain
from graftory.settings import SelectSettings


def similarities(domains: Sequence[Domain], examples: Tensor) -> dict[str, float]:
    """The mean cosine over all pairs of an example and one of each domain.

    It is the dot product of the means of the normalised rows, in float64.
    """
    new = torch.nn.functional.normalize(examples.double(), dim=1).mean(0)
    return {
        domain.name: float(torch.nn.functional.normalize(domain.features.double(), dim=1).mean(0) @ new)
        for domain in domains
    }


def by_similarity(domains: Sequence[Domain], examples: Tensor, settings: SelectSettings, seed: int) -> dict[str, float]:  # noqa: ARG001 (every selector's)
    """Scores of `similarity`."""
    return similarities(domains, examples)


def is_similar(score: float, settings: SelectSettings) -> bool:
    """Whether a mean cosine is high enough."""
    return score > settings.threshold


def explain(score: float, settings: SelectSettings, scores: Mapping[str, float]) -> str:  # noqa: ARG001 (every selector's)
    """The reason, for people."""
    relation = "above" if is_similar(score, settings) else "not above"
    return f"mean cosine {score:.3f}, {relation} {settings.threshold:g}"
