"""How an adapter becomes files and back: one codec a file, one row a codec.

A codec sees only the bytes of its own fixed file names, so nothing in an adapter can name a path.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Protocol

from graftory.adapter import Adapter, AdapterSpec
from graftory.config import (
    AdapterConfig,
    AptConfig,
    BitfitConfig,
    BottleneckConfig,
    CodaConfig,
    CompacterConfig,
    DoraConfig,
    FusionConfig,
    HyperformerConfig,
    Ia3Config,
    KronaConfig,
    LoraBiasConfig,
    LoraConfig,
    NormedBottleneckConfig,
    PhaConfig,
    PrefixConfig,
    PromptConfig,
    PropetlConfig,
    SmopConfig,
    SparseUpdateConfig,
    UnipeltConfig,
    UpdateConfig,
)
from graftory.config.peft import PEFT_CONFIGS
from graftory.errors import CorruptAdapterError, DataError, UnsupportedAdapterError
from graftory.hub.codecs.composed import ComposedCodec
from graftory.hub.codecs.native import NativeCodec
from graftory.hub.codecs.packed import PackedCodec
from graftory.hub.codecs.peft import PeftCodec
from graftory.hub.records import TensorEntry
from graftory.hub.safetensors_header import Bytes

if TYPE_CHECKING:
    from torch import Tensor

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


class Codec(Protocol):
    """Files to adapter and back. Only `encode` and `decode` need torch."""

    file_names: tuple[str, ...]
    """The files, the one that tells the format apart first."""

    def encode(self, adapter: Adapter) -> dict[str, bytes]:
        """The files of an adapter; the same adapter gives the same bytes.

        Raises:
            UnsupportedAdapterError: If the format cannot hold it.
        """

    def imported_spec(self, files: Mapping[str, Bytes], name: str) -> AdapterSpec:
        """The specification as far as the files tell it, for an adapter without a sidecar.

        Raises:
            CorruptAdapterError: If a file breaks its format.
            UnsupportedAdapterError: If it uses something graftory does not do.
        """

    def check(self, files: Mapping[str, Bytes], spec: AdapterSpec) -> tuple[TensorEntry, ...]:
        """List the tensors, after checking that the files are well-formed and are what `spec` says.

        Raises:
            CorruptAdapterError: If a file breaks its format, or disagrees with `spec`.
            UnsupportedAdapterError: If it uses something graftory does not do.
        """

    def decode(self, files: Mapping[str, Bytes]) -> dict[str, Tensor]:
        """The tensors of checked files, under their names in `Adapter.tensors`."""


_PACKED, _PEFT, _NATIVE, _COMPOSED = PackedCodec(), PeftCodec(), NativeCodec(), ComposedCodec()

CODECS: Mapping[type[AdapterConfig], Codec] = {
    LoraConfig: _PEFT,
    LoraBiasConfig: _PEFT,
    DoraConfig: _PEFT,
    Ia3Config: _PEFT,
    BitfitConfig: _NATIVE,
    UpdateConfig: _NATIVE,
    SparseUpdateConfig: _NATIVE,
    PrefixConfig: _NATIVE,
    AptConfig: _NATIVE,
    BottleneckConfig: _NATIVE,
    CompacterConfig: _NATIVE,
    PropetlConfig: _NATIVE,
    KronaConfig: _NATIVE,
    UnipeltConfig: _NATIVE,
    CodaConfig: _NATIVE,
    NormedBottleneckConfig: _NATIVE,
    FusionConfig: _COMPOSED,
    HyperformerConfig: _COMPOSED,
    PhaConfig: _COMPOSED,
    SmopConfig: _COMPOSED,
    PromptConfig: _COMPOSED,
    **dict.fromkeys(PEFT_CONFIGS, _PEFT),
}
"""The codec of every method."""


def codec_of(spec: AdapterSpec) -> Codec:
    """The codec that stores a specification's method in its storage.

    Raises:
        UnsupportedAdapterError: If no codec does.
    """
    codec = CODECS.get(type(spec.config)) if spec.storage == "full" else _PACKED
    if codec is None:
        raise UnsupportedAdapterError(f"method {spec.method!r} has no file format; store it as another method")
    return codec


def codec_of_files(files: Mapping[str, object]) -> Codec:
    """The codec of files, by their names.

    Raises:
        UnsupportedAdapterError: If none has files of these names.
    """
    for codec in (*CODECS.values(), _PACKED):
        if set(codec.file_names) == set(files):
            return codec
    raise UnsupportedAdapterError(f"the files {sorted(files)} are no adapter; wanted those that PEFT or graftory saves")


def codec_of_folder(folder: Path) -> Codec:
    """The codec of the adapter in a folder, by its file names.

    Raises:
        DataError: If there is no such folder.
        UnsupportedAdapterError: If the weights are a pickle.
        CorruptAdapterError: If there is no adapter in it, or a file of it is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds the adapter's files")
    try:
        found = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); give a folder that you may read") from None
    for codec in (*CODECS.values(), _PACKED):
        if codec.file_names[0] in found:
            _check_complete(folder, codec, found)
            return codec
    _refuse_pickles(folder, found)
    wanted = " or ".join(codec.file_names[0] for codec in CODECS.values())
    raise CorruptAdapterError(f"{folder}: no adapter here; wanted {wanted}")


def _check_complete(folder: Path, codec: Codec, found: Set[str]) -> None:
    missing = [name for name in codec.file_names if name not in found]
    if missing:
        _refuse_pickles(folder, found)
        raise CorruptAdapterError(f"{folder}: {missing[0]} is missing; copy the whole adapter")


def _refuse_pickles(folder: Path, found: Set[str]) -> None:
    pickles = sorted(name for name in found if PurePath(name).suffix.lower() in _PICKLES)
    if pickles:
        raise UnsupportedAdapterError(
            f"{folder / pickles[0]}: a pickle can run code and is never opened; convert it yourself with "
            "torch.load(..., weights_only=True) and safetensors.torch.save_file"
        )
