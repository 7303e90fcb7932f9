"""Every error that graftory raises on purpose.

Each one says what was got, what was wanted and what to do, in one line, and also inherits the
standard-library error that it stands for, so `except ValueError` keeps working.
"""


class GraftoryError(Exception):
    """Base of all errors raised on purpose; the command line prints it in one line and exits 1."""


class InvalidNameError(GraftoryError, ValueError):
    """A name or a reference that does not follow the grammar."""


class ConfigError(GraftoryError, ValueError):
    """A configuration, option or YAML file with a missing, unknown or impossible value."""


class DataError(GraftoryError, ValueError):
    """A data file that cannot be read or lacks what the task needs."""


class DownloadError(GraftoryError, OSError):
    """A file that could not be fetched, or whose bytes are not the pinned ones."""


class HubNotFoundError(GraftoryError, FileNotFoundError):
    """No hub where one was expected."""


class AdapterNotFoundError(GraftoryError, LookupError):
    """A reference that names nothing in the hub."""


class VersionConflictError(GraftoryError, FileExistsError):
    """A version that exists already with other bytes."""


class CorruptAdapterError(GraftoryError, ValueError):
    """Stored bytes that are not the recorded ones, or a file that breaks its format."""


class UnsupportedAdapterError(GraftoryError, NotImplementedError):
    """An adapter, or a model, that uses something graftory does not do; named, never ignored."""


class BaseMismatchError(GraftoryError, ValueError):
    """An adapter and a base model that do not belong together."""


class ShapeError(GraftoryError, ValueError):
    """Tensors whose shapes disagree."""


class RouteError(GraftoryError, ValueError):
    """A route that names unknown adapters or does not fit the batch."""


class MergeError(GraftoryError, ValueError):
    """Adapters that the chosen method cannot merge, or an adapter that cannot be folded in."""


class RemoteError(GraftoryError, OSError):
    """A remote that cannot be reached or is not what it should be."""


class StorageError(GraftoryError, OSError):
    """A disk that cannot take what should be written: full, over its quota, or a file too large for it."""


class SignatureError(GraftoryError, ValueError):
    """A signature that is missing, damaged, of another key, or not over what is here."""
