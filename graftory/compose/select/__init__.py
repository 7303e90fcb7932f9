"""Which adapters to merge: chosen by unlabelled examples of a new domain, or by trying."""

from graftory.compose.select.base import Choice, Domain, Selection
from graftory.compose.select.domains import encode_domains, example_texts
from graftory.compose.select.greedy import greedy_soup
from graftory.compose.select.table import SELECTORS, select
from graftory.compose.select.track import same_track

__all__ = [
    "SELECTORS",
    "Choice",
    "Domain",
    "Selection",
    "encode_domains",
    "example_texts",
    "greedy_soup",
    "same_track",
    "select",
]
