"""A linear adapter of any method as a plain LoRA, which everything reads, with how far it is from the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graftory.adapter import Adapter, Lineage, Parent
from graftory.compose.merge.base import body_of, check_rank
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.kinds import check_linear, delta_at
from graftory.compose.merge.lora import lora_body
from graftory.compose.merge.originals import Originals, no_originals, originals_of
from graftory.compose.merge.spectrum import cut
from graftory.errors import MergeError
from graftory.schema import Json
from graftory.versions import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Converted:
    """A LoRA that was made of another adapter."""

    adapter: Adapter
    errors: Mapping[str, float]
    """|ΔW − s B A| / |ΔW| of each module (Frobenius); 0 where ΔW is 0."""
    error: float
    """The same over all modules together."""


def to_lora(
    adapter: Adapter, *, rank: int | None = None, base: PreTrainedModel | None = None, parent: Parent | None = None
) -> Converted:
    """Write an adapter down as LoRA. Its head, task, base and licence stay.

    Args:
        adapter: An adapter of a linear method.
        rank: Rank of the LoRA, the best one by SVD; None: as much as it takes, exactly.
        base: The plain base model, for methods whose update depends on it (`needs_base`).
        parent: Where the adapter came from, for the lineage.

    Raises:
        MergeError: If the method is not linear, changes biases, or needs the base and there is none.
    """
    check_rank(rank)
    originals: Originals = no_originals if base is None else originals_of(base, adapter.spec.base)
    body = body_of(adapter, 0, originals=originals)
    check_linear(body)
    found: dict[str, Delta] = {}
    errors: dict[str, float] = {}
    missed = whole = 0.0
    for path in adapter.spec.config.targets:
        delta = delta_at(body, path)
        if delta.bias is not None and bool(delta.bias.any()):
            raise MergeError(f"{path}: the {body.config.method} adapter changes a bias, which a LoRA cannot hold")
        exact = replace(delta, bias=None).double()
        found[path] = (exact.factored() if rank is None else cut(exact, rank)).float()
        size = float(exact.dense().norm())
        far = float((exact.dense() - found[path].double().dense()).norm())
        errors[path] = far / size if size else 0.0
        missed, whole = missed + far**2, whole + size**2
    made = lora_body(found, getattr(body.config, "dropout", 0.0))
    error = (missed / whole) ** 0.5 if whole else 0.0
    told: dict[str, Json] = {"from": body.config.method, "rank": rank, "error": error}
    parents = () if parent is None else (replace(parent, relation="generated"),)
    lineage = Lineage("convert", parents, told, libraries=library_versions())
    spec = replace(adapter.spec, config=made.config, lineage=lineage, metrics=())
    return Converted(Adapter(spec, {**made.tensors, **adapter.head_tensors()}), errors, error)
