"""Many adapters to one adapter (`merge`), and one adapter into a plain model (`export`)."""

from graftory.compose.convert import Converted, to_lora
from graftory.compose.export import ExportCheck, Exported, Source, export, export_folder, save_export, verify_export
from graftory.compose.gradients import record_gradients
from graftory.compose.merge import METHODS, merge, needs_base
from graftory.compose.merge.base import MergeMethod
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
