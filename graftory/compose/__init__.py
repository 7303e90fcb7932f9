"""Many adapters to one adapter (`merge`), and one adapter into a plain model (`export`)."""

from graftory.compose.export import ExportCheck, export, save_export, verify_export
from graftory.compose.merge import METHODS, merge
from graftory.compose.merge.base import MergeMethod

__all__ = ["METHODS", "ExportCheck", "MergeMethod", "export", "merge", "save_export", "verify_export"]
