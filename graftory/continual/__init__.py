"""Tasks one after another: sequences, strategies, the runner, the router, metrics and reports."""

from graftory.continual.asking import Asked, LearntRun
from graftory.continual.compare import Difference, paired_differences
from graftory.continual.metrics import Summary, summarise
from graftory.continual.report import Report, Routing, TaskResult, load_report
from graftory.continual.report_text import compare_runs
from graftory.continual.router import Router, RouterSettings
from graftory.continual.runner import run_sequence
from graftory.continual.sequence import Limits, TaskSequence, load_sequence
from graftory.continual.state import Event
from graftory.continual.strategies import PLUGINS, STRATEGIES, Plugin, Strategy, strategy_of
from graftory.continual.study import Spread, Study, StudyReport, load_study, run_study

__all__ = [
    "PLUGINS",
    "STRATEGIES",
    "Asked",
    "Difference",
    "Event",
    "LearntRun",
    "Limits",
    "Plugin",
    "Report",
    "Router",
    "RouterSettings",
    "Routing",
    "Spread",
    "Strategy",
    "Study",
    "StudyReport",
    "Summary",
    "TaskResult",
    "TaskSequence",
    "compare_runs",
    "load_report",
    "load_sequence",
    "load_study",
    "paired_differences",
    "run_sequence",
    "run_study",
    "strategy_of",
    "summarise",
]
