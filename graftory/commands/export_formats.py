"""`hub export --format`: an adapter's own files as another library reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from graftory.hub import Hub, Record

Format = Callable[["Hub", "Record", Path, str], Path]
"""(hub, version, folder, base model) -> the folder written."""


def peft(hub: Hub, record: Record, folder: Path, base: str) -> Path:
    """PEFT's two files, as they are kept, and graftory.json beside them."""
    from graftory.hub.codecs.peft import WRITES

    del base
    if type(record.spec.config) not in WRITES:
        methods = ", ".join(kind.method for kind in WRITES)
        raise UnsupportedAdapterError(
            f"{record.ref}: PEFT has no {record.spec.method} adapters; its files can hold {methods}"
        )
    return hub.materialize(record.ref, folder)


def adapterhub(hub: Hub, record: Record, folder: Path, base: str) -> Path:
    """AdapterHub's files; of the base its configuration is read, for the number of its layers."""
    from graftory.hub.adapterhub import write
    from graftory.hub.folders import place
    from graftory.training.base import layers_of

    adapter = hub.get(record.ref)
    return place(folder.absolute(), write(adapter, record.name, layers=layers_of(base)))


FORMATS: Mapping[str, Format] = {"peft": peft, "adapterhub": adapterhub}
"""Libraries whose files can be written, beside the plain model."""
