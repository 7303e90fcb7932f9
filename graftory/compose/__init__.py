"""Many adapters to one adapter (`merge`), and one adapter into a plain model (`export`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftory.compose.merge import METHODS, merge, needs_base
from graftory.compose.merge.base import MergeMethod
from graftory.lazy import lazily

if TYPE_CHECKING:
    from graftory.compose.convert import Converted, to_lora
    from graftory.compose.exporting import (
        ExportCheck,
        Exported,
        Source,
        export,
        export_folder,
        save_export,
        verify_export,
    )
    from graftory.compose.gradients import record_gradients
    from graftory.compose.merge.ledger import merge_again, merge_without
    from graftory.compose.record import record_examples, record_inputs

__all__ = [
    "METHODS",
    "Converted",
    "ExportCheck",
    "Exported",
    "MergeMethod",
    "Source",
    "export",
    "export_folder",
    "merge",
    "merge_again",
    "merge_without",
    "needs_base",
    "record_examples",
    "record_gradients",
    "record_inputs",
    "save_export",
    "to_lora",
    "verify_export",
]

__getattr__ = lazily(
    __name__,
    {
        "Converted": "graftory.compose.convert",
        "ExportCheck": "graftory.compose.exporting",
        "Exported": "graftory.compose.exporting",
        "Source": "graftory.compose.exporting",
        "export": "graftory.compose.exporting",
        "export_folder": "graftory.compose.exporting",
        "merge_again": "graftory.compose.merge.ledger",
        "merge_without": "graftory.compose.merge.ledger",
        "record_examples": "graftory.compose.record",
        "record_gradients": "graftory.compose.gradients",
        "record_inputs": "graftory.compose.record",
        "save_export": "graftory.compose.exporting",
        "to_lora": "graftory.compose.convert",
        "verify_export": "graftory.compose.exporting",
    },
)
