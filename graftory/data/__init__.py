"""Tasks, their rows, and the sample models and data that come in wheels of the package index. No torch here."""

from graftory.data.catalogue import SAMPLE_MODELS, SAMPLE_TASKS, SampleModel, SampleTask
from graftory.data.models import sample_model
from graftory.data.rows import Rows, Text, load_rows
from graftory.data.task import METRICS_OF_KIND, TEXT_KINDS, DataSource, TaskFile, load_task
from graftory.data.wheels import PinnedWheel, fetch

__all__ = [
    "METRICS_OF_KIND",
    "SAMPLE_MODELS",
    "SAMPLE_TASKS",
    "TEXT_KINDS",
    "DataSource",
    "PinnedWheel",
    "Rows",
    "SampleModel",
    "SampleTask",
    "TaskFile",
    "Text",
    "fetch",
    "load_rows",
    "load_task",
    "sample_model",
]
