"""What merged updates are stored as: the plainest kind of adapter that holds them exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graftory.compose.merge.base import Body
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.lora import factors_of, lora_body, ranks_of
from graftory.config import BitfitConfig, Ia3Config, LoraConfig, SparsePlace, SparseUpdateConfig, UpdateConfig

_NAME = "the merged adapter"


def body_of_updates(found: Mapping[str, Delta], merged: Sequence[Body]) -> Body:
    """Updates as an adapter, exactly.

    Products alone are a LoRA of scale 1. Biases alone are BitFit. What (IA)³ adapters add up to is (IA)³ again, what
    sparse updates add up to is sparse where that is smaller.
    Everything else is an `update`: a product, factors on the rows and the columns of the base's weight, and a bias.

    Args:
        found: The merged update of every module.
        merged: The adapters that it was made of.
    """
    if all(isinstance(body.config, SparseUpdateConfig) for body in merged):
        return _sparse(found)
    if all(delta.scaling is None and delta.bias is None for delta in found.values()):
        return lora_body(found, max(getattr(body.config, "dropout", 0.0) for body in merged))
    if all(delta.bias is not None and not delta.changes_weight for delta in found.values()):
        return _bitfit(found)
    if all(isinstance(body.config, Ia3Config) for body in merged) and all(map(_is_ia3, found.values())):
        return _ia3(found)
    return _update(found)


def _sparse(found: Mapping[str, Delta]) -> Body:
    """Entries where they and their positions are fewer numbers than the factors, a LoRA elsewhere."""
    index, value = SparseUpdateConfig.parts[:2]
    places: list[SparsePlace] = []
    products: dict[str, Delta] = {}
    tensors: dict[str, Tensor] = {}
    for path, delta in found.items():
        flat = delta.dense().flatten()
        count, (outputs, inputs) = int(flat.count_nonzero()), delta.shape
        if not 0 < 2 * count < delta.rank * (outputs + inputs):
            products[path] = delta
            continue
        places.append(SparsePlace(path=path, count=count, inputs=inputs, outputs=outputs))
        chosen = flat.nonzero()[:, 0]
        tensors |= {f"{path}.{index}": chosen.to(torch.int32), f"{path}.{value}": flat[chosen]}
    if not places:
        return lora_body(products, 0.0)
    low_rank = lora_body(products, 0.0) if products else None
    lora_config = low_rank.config if low_rank is not None else None
    assert lora_config is None or isinstance(lora_config, LoraConfig)
    config = SparseUpdateConfig(targets=tuple(found), init_seed=None, sparse=tuple(places), low_rank=lora_config)
    return Body(_NAME, config, {**tensors, **(low_rank.tensors if low_rank is not None else {})})


def _bitfit(found: Mapping[str, Delta]) -> Body:
    tensors = {f"{path}.{BitfitConfig.parts[0]}": delta.bias for path, delta in found.items() if delta.bias is not None}
    return Body(_NAME, BitfitConfig(targets=tuple(found), init_seed=None), tensors)


def _is_ia3(delta: Delta) -> bool:
    """Whether one side alone is scaled, and nothing added. Of (IA)³ adapters Δb is always that of the rows."""
    scaling = delta.scaling
    return delta.rank == 0 and scaling is not None and not (bool(scaling.rows.any()) and bool(scaling.columns.any()))


def _ia3(found: Mapping[str, Delta]) -> Body:
    tensors, reading = {}, []
    for path, delta in found.items():
        assert delta.scaling is not None
        reads = bool(delta.scaling.columns.any())
        reading += [path] if reads else []
        tensors[f"{path}.{Ia3Config.parts[0]}"] = (
            1 + delta.scaling.columns[None] if reads else 1 + delta.scaling.rows[:, None]
        )
    return Body(_NAME, Ia3Config(targets=tuple(found), init_seed=None, feedforward=tuple(reading)), tensors)


def _update(found: Mapping[str, Delta]) -> Body:
    # where only biases change, nobody knows how wide a module is, or whether it has a matrix at all
    bias_only = tuple(path for path, delta in found.items() if delta.shape[1] == 0)
    linear = {path: delta.at_least_one() for path, delta in found.items() if path not in bias_only}
    rank, other = ranks_of(linear)
    tensors: dict[str, Tensor] = factors_of(linear)
    rows = columns = False
    for path, delta in found.items():
        d_out, d_in = delta.shape
        tensors[f"{path}.bias_delta"] = torch.zeros(d_out) if delta.bias is None else delta.bias
        if path in linear:
            scaling = delta.scaling
            tensors[f"{path}.row_scale"] = torch.zeros(d_out) if scaling is None else scaling.rows
            tensors[f"{path}.column_scale"] = torch.zeros(d_in) if scaling is None else scaling.columns
            rows |= bool(tensors[f"{path}.row_scale"].any())
            columns |= bool(tensors[f"{path}.column_scale"].any())
    config = UpdateConfig(
        targets=tuple(found),
        init_seed=None,
        rank=rank,
        rank_pattern=other,
        bias_only=bias_only,
        rows=rows,
        columns=columns,
    )
    return Body(_NAME, config, tensors)
