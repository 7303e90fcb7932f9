"""The hub of adapters: versions, their bytes, their records, and other hubs to push to and pull from."""

from graftory.hub.diff import Difference
from graftory.hub.gc import Collected
from graftory.hub.hub import Hub
from graftory.hub.index import IndexRow
from graftory.hub.records import FileEntry, Record, TensorEntry
from graftory.hub.report import Problem, Report
from graftory.hub.signing import Signed
from graftory.hub.transfer import Delivery

__all__ = [
    "Collected",
    "Delivery",
    "Difference",
    "FileEntry",
    "Hub",
    "IndexRow",
    "Problem",
    "Record",
    "Report",
    "Signed",
    "TensorEntry",
]
