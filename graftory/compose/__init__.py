"""Many adapters to one adapter (`merge`), and one adapter into a plain model (`export`)."""

from graftory.compose.export import ExportCheck, export, save_export, verify_export
from graftory.compose.merge import METHODS, merge
from graftory.compose.merge.base import MergeMethod
from graftory.compose.merge.ledger import merge_again, merge_without
from graftory.compose.record import record_examples, record_inputs

__all__ = [
    "METHODS",
    "ExportCheck",
    "MergeMethod",
    "export",
    "merge",
    "merge_again",
    "merge_without",
    "record_examples",
    "record_inputs",
    "save_export",
    "verify_export",
]
