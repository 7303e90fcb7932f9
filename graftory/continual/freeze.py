"""Proof that what was to stay frozen did: a hash of every such tensor, before and after."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graftory.errors import CorruptAdapterError


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def frozen_hashes(model: nn.Module, adapters: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """The hash of the base and of each adapter."""
    return {"the base model": hash_tensors(model.state_dict()), **{n: hash_tensors(t) for n, t in adapters.items()}}


@contextmanager
def must_stay(model: nn.Module, adapters: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    """Fail if the base or an adapter is another after the block than before it.

    Yields:
        One hash over all of them.

    Raises:
        CorruptAdapterError: If one changed; the text names it.
    """
    before = frozen_hashes(model, adapters)
    yield f"sha256:{hashlib.sha256(repr(sorted(before.items())).encode()).hexdigest()}"
    after = frozen_hashes(model, adapters)
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    if changed:
        raise CorruptAdapterError(
            f"{changed[0]} changed while another task was learnt, though it is frozen; this is a bug of the training "
            "code: nothing of this step was kept"
        )
