"""What merging adapters does to each of them: interference by layer, retention by task, and whether to merge at all."""

from graftory.compose.merge.report.advice import Advice, advise
from graftory.compose.merge.report.interference import Effect, Interference, Pair, Place, interference
from graftory.compose.merge.report.retention import Retention, retention
from graftory.compose.merge.report.whole import MergeReport, merge_report

__all__ = [
    "Advice",
    "Effect",
    "Interference",
    "MergeReport",
    "Pair",
    "Place",
    "Retention",
    "advise",
    "interference",
    "merge_report",
    "retention",
]
