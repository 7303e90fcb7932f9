"""A report's files: report.json for programs, report.md and report.html for people, and pictures."""

from __future__ import annotations

from pathlib import Path

from graftory.continual.files import write_atomically, write_json
from graftory.continual.report import Report
from graftory.continual.report_text import blocks_of, markdown, page


def write_report(report: Report, folder: Path) -> None:
    """Write all of them, each all or nothing."""
    write_json(folder / "report.json", report)
    pictures = _pictures(report)
    images = {name: image for name, (_, image) in pictures.items()}
    for name, image in images.items():
        write_atomically(folder / name, image)
    title = f"{report.name}: {report.strategy} on {report.base}"
    blocks = blocks_of(report, {name: text for name, (text, _) in pictures.items()})
    write_atomically(folder / "report.md", markdown(title, blocks).encode())
    write_atomically(folder / "report.html", page(title, blocks, images).encode())


def _pictures(report: Report) -> dict[str, tuple[str, bytes]]:
    """Titles and PNG images by file name."""
    from graftory.continual.curves import draw_curves, draw_general, draw_storage
    from graftory.continual.heatmap import Panel, draw_heatmaps

    known = "task id given" if report.id_known else "task id not needed"
    title = f"{report.name} ({report.strategy}), {known}"
    pictures = {"heatmap-oracle.png": (title, draw_heatmaps([Panel(title, report.matrix)], report.tasks))}
    ways: dict[str, tuple[tuple[float | None, ...], ...]] = {known: report.matrix}
    if report.routing is not None:
        title = f"{report.name} ({report.strategy}), Mahalanobis router"
        image = draw_heatmaps([Panel(title, report.routing.matrix)], report.tasks)
        pictures["heatmap-routed.png"] = (title, image)
        ways["router"] = report.routing.matrix
    curves = f"{report.name} ({report.strategy}), from task to task"
    pictures["curves.png"] = (curves, draw_curves(report.tasks, ways))
    if report.general is not None:
        title = f"{report.name} ({report.strategy}), general text"
        pictures["general.png"] = (title, draw_general(report.tasks, report.general))
    if report.storage:
        stored = f"{report.name} ({report.strategy}), what is stored"
        pictures["storage.png"] = (stored, draw_storage(report.tasks, report.storage))
    return pictures
