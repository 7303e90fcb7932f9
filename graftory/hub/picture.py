"""The family of an adapter as a picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from graftory.adapter import Metric
from graftory.errors import ConfigError
from graftory.hub.layers import Placed, place
from graftory.hub.records import Record
from graftory.printable import printable, shortened

if TYPE_CHECKING:
    import networkx
    from matplotlib.axes import Axes

FORMATS = ("png", "svg")
MOST = 400
"""Adapters in one picture; more cannot be read."""
_COLOURS = {
    "composed": "#0072B2",
    "merged": "#D55E00",
    "continued": "#009E73",
    "distilled": "#CC79A7",
    "generated": "#56B4E9",
    "compressed": "#E69F00",
}
"""Okabe and Ito's, which people with any colour vision tell apart; the edges are labelled as well."""
_GREY, _INK, _ASKED = "#707070", "#202020", "#FFF3C4"
_LONGEST = 34
"""Most characters of a line in a node."""
_HEIGHT = 0.66
_CHARACTER = 0.072
_MARGIN = 0.25
_LAST_LATIN = 0x24F
"""Above it the font may lack letters."""
_MOST_PIXELS = 60_000

Point = tuple[float, float]
_Box = tuple[float, float, float, float]
"""Left, upper, right and lower border."""


def main_metric(metrics: Sequence[Metric]) -> Metric | None:
    """The number that tells most: the first on test rows, otherwise the first."""
    return next((row for row in metrics if row.split == "test"), metrics[0] if metrics else None)


def metric_text(metrics: Sequence[Metric]) -> str:
    """`accuracy 0.9000 (trec test)`, or nothing."""
    row = main_metric(metrics)
    return printable(f"{row.name} {row.value:.4f} ({row.data} {row.split})") if row else ""


def link_text(links: Sequence[tuple[str, float | None]]) -> str:
    """`merged, weight 0.5`; several parts of one parent are joined."""
    return "; ".join(f"{relation}, weight {weight:g}" if weight is not None else relation for relation, weight in links)


def draw_family(graph: networkx.DiGraph[str], asked: str, form: str) -> bytes:
    """Draw a family in layers from the first ancestors to the last descendants.

    Args:
        graph: As `lineage_graph` makes it.
        asked: The digest of the adapter that is pointed out.
        form: One of `FORMATS`.

    Returns:
        An image. The same family gives the same bytes.

    Raises:
        ConfigError: If the family is too large.
    """
    if len(graph) > MOST:
        raise ConfigError(f"a picture of {len(graph)} adapters cannot be read; it takes {MOST}, use --json for more")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = {digest: _lines(node) for digest, node in graph.nodes.items()}
    page = _Page.of(place(graph), max(len(line) for lines in texts.values() for line in lines))
    with rc_context({"svg.hashsalt": "graftory", "font.family": "DejaVu Sans"}):
        dpi = min(150.0, _MOST_PIXELS / max(page.size))
        figure = Figure(figsize=page.size, dpi=dpi)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, page.size[0]), ylim=(page.size[1], 0))
        axes.set_axis_off()
        labels = [page.box(digest) for digest in graph]
        for (parent, child), data in graph.edges.items():
            late = graph.out_degree(parent) > graph.in_degree(child)
            _draw_edge(axes, page, (parent, child), data["links"], labels, 0.72 if late else 0.28)
        for digest, node in graph.nodes.items():
            _draw_node(axes, page, digest, texts[digest], node, digest == asked)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, metadata={"Software": None} if form == "png" else {"Date": None})
    return buffer.getvalue()


def _lines(node: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands in a node: reference, method, main metric."""
    record: Record | None = node.get("record")
    if record is None:
        return _drawable(node["ref"]), "not in this hub"
    facts = f"{record.spec.method}, {record.spec.lineage.process}"
    metric = metric_text(record.spec.metrics)
    return tuple(_drawable(line) for line in (node["ref"], facts, metric) if line)


def _drawable(text: str) -> str:
    plain = "".join(c if ord(c) <= _LAST_LATIN else "?" for c in printable(text))
    return shortened(plain, _LONGEST)


@dataclass(frozen=True, slots=True)
class _Page:
    """Where things are, in inches from the upper left corner."""

    placed: Placed
    across: bool
    """Whether layers are columns, from left to right, and not rows, from top to bottom."""
    width: float
    """Of a node."""
    ports: Mapping[tuple[str, str], tuple[float, float]]
    """How far from the middle of a node each edge begins and ends, as a part of its side."""

    @classmethod
    def of(cls, placed: Placed, letters: int) -> _Page:
        """The direction that fits a screen better."""
        width = 0.3 + _CHARACTER * letters
        ports = _ports(placed)
        pages = [cls(placed, across, width, ports) for across in (True, False)]
        return min(pages, key=lambda page: max(page.size[0] / 16, page.size[1] / 9))

    @property
    def steps(self) -> tuple[float, float]:
        """From a layer to the next one, and from a node to the next one of its layer."""
        return (self.width + 1.5, _HEIGHT + 0.26) if self.across else (_HEIGHT + 0.8, self.width + 0.3)

    @property
    def size(self) -> Point:
        """Width and height."""
        forward, beside = self.steps
        layers, span = (self.placed.layers - 1) * forward, (self.placed.span - 1) * beside
        x, y = (layers, span) if self.across else (span, layers)
        return x + self.width + 2 * _MARGIN, y + _HEIGHT + 2 * _MARGIN

    def centre(self, spot: tuple[int, float]) -> Point:
        """The middle of a node."""
        forward, beside = self.steps
        layer, row = spot[0] * forward, spot[1] * beside
        x, y = (layer, row) if self.across else (row, layer)
        return x + _MARGIN + self.width / 2, y + _MARGIN + _HEIGHT / 2

    def box(self, node: str) -> _Box:
        """What a node covers."""
        x, y = self.centre(self.placed.nodes[node])
        return x - self.width / 2, y - _HEIGHT / 2, x + self.width / 2, y + _HEIGHT / 2

    def moved(self, point: Point, forward: float, beside: float = 0.0) -> Point:
        """A point further towards the descendants, and along the layer."""
        x, y = (forward, beside) if self.across else (beside, forward)
        return point[0] + x, point[1] + y

    @property
    def half(self) -> float:
        """From the middle of a node to its border, in the direction of the descendants."""
        return (self.width if self.across else _HEIGHT) / 2

    @property
    def breadth(self) -> float:
        """Of a node, along its layer."""
        return _HEIGHT if self.across else self.width


def _ports(placed: Placed) -> dict[tuple[str, str], tuple[float, float]]:
    """Spread the edges of a node over its side, in the order in which they come, so that they can be told apart."""
    ends: dict[tuple[str, int], list[tuple[float, tuple[str, str]]]] = {}
    for edge, spots in placed.edges.items():
        ends.setdefault((edge[0], 0), []).append((spots[1][1], edge))
        ends.setdefault((edge[1], 1), []).append((spots[-2][1], edge))
    ports: dict[tuple[str, str], list[float]] = {edge: [0.0, 0.0] for edge in placed.edges}
    for (_, end), found in ends.items():
        gap = min(0.14, 0.7 / len(found))
        for number, (_, edge) in enumerate(sorted(found)):
            ports[edge][end] = (number - (len(found) - 1) / 2) * gap
    return {edge: (begin, end) for edge, (begin, end) in ports.items()}


def _draw_node(
    axes: Axes, page: _Page, digest: str, lines: Sequence[str], node: Mapping[str, Any], asked: bool
) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = page.centre(page.placed.nodes[digest])
    known = node["known"]
    box = FancyBboxPatch(
        (x - page.width / 2 + 0.06, y - _HEIGHT / 2 + 0.06),
        page.width - 0.12,
        _HEIGHT - 0.12,
        boxstyle="round,pad=0.06",
        facecolor=_ASKED if asked else "white",
        edgecolor=_INK if known else _GREY,
        linewidth=2.2 if asked else 1.1,
        linestyle="-" if known else "--",
        zorder=3,
    )
    axes.add_patch(box)
    for number, line in enumerate(lines):
        axes.text(
            x,
            y + (number - (len(lines) - 1) / 2) * 0.17,
            line,
            ha="center",
            va="center",
            fontsize=9 if number == 0 else 7.5,
            fontweight="bold" if number == 0 else "normal",
            color=_INK if known else _GREY,
            parse_math=False,
            zorder=4,
        )


def _draw_edge(
    axes: Axes,
    page: _Page,
    edge: tuple[str, str],
    links: Sequence[tuple[str, float | None]],
    taken: list[_Box],
    at: float,
) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    curves = _curves(page, edge)
    colour = _COLOURS.get(links[0][0], _INK)
    points, codes = [curves[0][0]], [int(Path.MOVETO)]
    for curve in curves:
        points += curve[1:]
        codes += [int(Path.CURVE4)] * 3
    arrow = FancyArrowPatch(
        path=Path(points, codes), arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.4, zorder=1
    )
    axes.add_patch(arrow)
    texts = [f"{relation} {weight:g}" if weight is not None else relation for relation, weight in links]
    axes.text(
        *_free(curves, at, 0.06 * max(map(len, texts)), 0.13 * len(texts), taken),
        "\n".join(texts),
        ha="center",
        va="center",
        fontsize=7,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        parse_math=False,
        zorder=2,
    )


Curve = tuple[Point, Point, Point, Point]


def _free(curves: Sequence[Curve], at: float, width: float, height: float, taken: list[_Box]) -> Point:
    """Where on an edge its label covers no node and no other label; on the straight parts first, else near `at`."""
    straight = [(curve, part) for curve in curves[1::2] for part in (0.5, 0.2, 0.8)]
    first, last = (curves[0], curves[-1]) if at < 0.5 else (curves[-1], curves[0])
    parts = sorted((0.14, 0.2, 0.28, 0.36, 0.44, 0.5, 0.58, 0.65, 0.72, 0.8, 0.86), key=lambda part: abs(part - at))
    spots = [_on(curve, part) for curve, part in [*straight, *((curve, p) for curve in (first, last) for p in parts)]]
    boxes = [(x - width / 2, y - height / 2, x + width / 2, y + height / 2) for x, y in spots]
    free = (number for number, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken))
    best = next(free, 0)
    taken.append(boxes[best])
    return spots[best]


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _curves(page: _Page, edge: tuple[str, str]) -> list[Curve]:
    """An edge as cubic curves between layers; layers on the way are passed straight on."""
    spots = page.placed.edges[edge]
    side = 1 if spots[-1][0] >= spots[0][0] else -1
    centres = [page.centre(spot) for spot in spots]
    for end, port in zip((0, -1), page.ports[edge], strict=True):
        centres[end] = page.moved(centres[end], 0.0, port * page.breadth)
    half, reach = side * page.half, side * 0.45 * (page.steps[0] - 2 * page.half)
    curves: list[Curve] = []
    for number, (before, after) in enumerate(pairwise(centres)):
        start, end_point = page.moved(before, half), page.moved(after, -half)
        if number:
            entry = curves[-1][3]
            curves.append((entry, _mix(entry, start, 1 / 3), _mix(entry, start, 2 / 3), start))
        curves.append((start, page.moved(start, reach), page.moved(end_point, -reach), end_point))
    return curves


def _mix(left: Point, right: Point, part: float) -> Point:
    return left[0] + part * (right[0] - left[0]), left[1] + part * (right[1] - left[1])


def _on(curve: Curve, at: float) -> Point:
    """A point of a cubic curve."""
    points: Sequence[Point] = curve
    mix: Callable[[Point, Point], Point] = lambda left, right: _mix(left, right, at)  # noqa: E731
    while len(points) > 1:
        points = [mix(left, right) for left, right in pairwise(points)]
    return points[0]
