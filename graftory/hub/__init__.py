"""The hub of adapters: versions, their bytes, their records, and other hubs to push to and pull from."""

from graftory.hub.hub import Hub
from graftory.hub.index import IndexRow
from graftory.hub.records import FileEntry, Record, TensorEntry
from graftory.hub.transfer import Delivery

__all__ = ["Delivery", "FileEntry", "Hub", "IndexRow", "Record", "TensorEntry"]
