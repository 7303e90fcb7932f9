"""Many adapters to one adapter (`merge`), and one adapter into a plain model (`export`)."""

from graftory.compose.export import ExportCheck, export, save_export, verify_export
from graftory.compose.merge import METHODS, merge
from graftory.compose.merge.base import MergeMethod
from graftory.compose.record import record_inputs

__all__ = ["METHODS", "ExportCheck", "MergeMethod", "export", "merge", "record_inputs", "save_export", "verify_export"]
