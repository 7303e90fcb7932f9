"""Adapters of the Hugging Face Hub that graftory did not push: a repository as PEFT's users upload it."""

from __future__ import annotations

import hashlib
import re

from graftory.errors import AdapterNotFoundError, UnsupportedAdapterError
from graftory.hub import strict_json
from graftory.hub.codecs.peft import CONFIG, WEIGHTS
from graftory.hub.records import FileEntry, is_name
from graftory.hub.remotes.base import Foreign
from graftory.hub.remotes.huggingface_client import Repo, RepoFile

_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_SMALL = 64 << 20
"""Most bytes of weights that the hub keeps without a hash of its own; it keeps larger files with one."""


def find(repo: Repo, commit: str) -> Foreign:
    """The adapter at the root of a repository, and what its card says of its licence.

    Raises:
        AdapterNotFoundError: If there is none.
        UnsupportedAdapterError: If its weights are a pickle.
    """
    files = {file.path: file for file in repo.files(commit)}
    missing = [name for name in (CONFIG, WEIGHTS) if name not in files]
    if missing:
        pickle = next((name for name in _PICKLES if name in files), None)
        if pickle:
            raise UnsupportedAdapterError(
                f"hf://{repo.id}: {pickle} is a pickle, which can run code and is never opened; convert it with "
                "torch.load(..., weights_only=True) and safetensors.torch.save_file, then hub add"
            )
        raise AdapterNotFoundError(f"hf://{repo.id}@{commit[:12]}: no adapter here, {missing[0]} is missing")
    entries = tuple(_entry(repo, commit, files[name]) for name in (CONFIG, WEIGHTS))
    return Foreign(_name(repo.id), entries, f"hf://{repo.id}@{commit}", repo.licence(commit))


def _entry(repo: Repo, commit: str, file: RepoFile) -> FileEntry:
    if file.sha256 is not None:
        return FileEntry(file.path, file.sha256, file.size)
    limit = strict_json.LARGE if file.path == CONFIG else _SMALL
    if file.size > limit:
        raise UnsupportedAdapterError(
            f"hf://{repo.id}: {file.path} has {file.size} bytes and no hash there; fetch it yourself, then hub add"
        )
    data = repo.read(commit, file.path, limit=file.size + 1) or b""
    return FileEntry(file.path, hashlib.sha256(data).hexdigest(), len(data))


def _name(repo: str) -> str:
    """A name made of the repository's: `Org/My_LoRA` becomes `org/my_lora`."""
    parts = [re.sub(r"[^a-z0-9]+$", "", re.sub(r"[^a-z0-9._-]+", "-", part.lower()))[:64] for part in repo.split("/")]
    parts = [re.sub(r"([._-])[._-]+", r"\1", part).strip("._-") for part in parts]
    name = "/".join(parts)
    return name if is_name(name) else parts[-1] if is_name(parts[-1]) else "adapter"
