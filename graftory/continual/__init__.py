"""Tasks one after another: sequences, strategies, the runner, the router, metrics and reports."""

from graftory.continual.metrics import Summary, summarise
from graftory.continual.report import Report, Routing, TaskResult, compare_runs, load_report
from graftory.continual.router import Router, RouterSettings
from graftory.continual.runner import run_sequence
from graftory.continual.sequence import Limits, TaskSequence, load_sequence
from graftory.continual.state import Event
from graftory.continual.strategies import STRATEGIES, Strategy

__all__ = [
    "STRATEGIES",
    "Event",
    "Limits",
    "Report",
    "Router",
    "RouterSettings",
    "Routing",
    "Strategy",
    "Summary",
    "TaskResult",
    "TaskSequence",
    "compare_runs",
    "load_report",
    "load_sequence",
    "run_sequence",
    "summarise",
]
