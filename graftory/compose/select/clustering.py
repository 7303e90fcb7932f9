"""Selection by the clusters that new examples fall into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftory.compose.select.base import Domain
from graftory.settings import SelectSettings


def by_clustering(domains: Sequence[Domain], examples: Tensor, settings: SelectSettings, seed: int) -> dict[str, float]:
    """The share of the new examples in the clusters of each domain.

    Features are projected on their principal components (fitted on the domains), a Gaussian mixture with a
    component for each domain is fitted, each component belongs to the domain that most of its examples are
    of, and each new example to its likeliest component. As in AdapterSoup, which follows Aharoni and
    Goldberg 2020 (arXiv:2004.02105). The covariances are diagonal: with a hundred examples of a domain a full one is
    not determined. Domains without a component of their own get 0.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    known = torch.cat([domain.features for domain in domains]).double().numpy()
    owner = [number for number, domain in enumerate(domains) for _ in range(len(domain.features))]
    width = min(settings.components, *known.shape)
    pca: Any = PCA(width, random_state=seed).fit(known)
    mixture: Any = GaussianMixture(
        len(domains), covariance_type="diag", reg_covar=1e-6, n_init=5, random_state=seed, max_iter=500
    )
    clusters = mixture.fit_predict(pca.transform(known))
    counts = torch.zeros(len(domains), len(domains), dtype=torch.long)
    for cluster, number in zip(clusters, owner, strict=True):
        counts[cluster, number] += 1
    majority = counts.argmax(1).tolist()
    found = Counter(majority[cluster] for cluster in mixture.predict(pca.transform(examples.double().numpy())))
    return {domain.name: found[number] / len(examples) for number, domain in enumerate(domains)}


def is_shared(score: float, settings: SelectSettings) -> bool:
    """Whether enough of the examples fall into an adapter's clusters."""
    return score >= settings.min_share and score > 0


def explain(score: float, settings: SelectSettings, scores: Mapping[str, float]) -> str:  # noqa: ARG001 (every selector's)
    """The reason, for people."""
    relation = "at least" if is_shared(score, settings) else "less than"
    return f"{score:.0%} of the examples in its clusters, {relation} {settings.min_share:.0%}"
