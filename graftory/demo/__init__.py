"""`hub demo`: all of graftory on real tasks, in a few minutes, in a folder of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from graftory.demo import plan
from graftory.demo.journal import Journal
from graftory.schema import Json

__all__ = ["run_demo"]

_PIPE_WIDTH = 120
"""Columns of the table where there is no terminal to ask."""


def run_demo(folder: Path) -> dict[str, Json]:
    """Do every step that has no result yet, then show all results.

    Args:
        folder: Where everything goes: hubs, results, pictures. Stopped at any point and started again with the
            same folder, the demo goes on.

    Returns:
        The results of all steps, by name.
    """
    from rich.console import Console

    from graftory.demo.summary import draw, make_table

    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    results = _do_all(folder, console.print)
    pictures = draw(results, folder)
    console.print()
    console.print(make_table(results))
    for picture in pictures:
        console.print(f"picture: {picture}", soft_wrap=True)
    console.print(f"hub: hub --registry {folder / 'hub'} list", soft_wrap=True)
    return results


def _do_all(folder: Path, say: Callable[[str], None]) -> dict[str, Json]:
    from graftory.demo import steps

    def tell(text: str) -> None:
        say(f"     {text}")

    journal, bench = Journal(folder / "results"), steps.Bench(folder, tell)
    todo: dict[str, tuple[str, Callable[[], Json]]] = {"fetch": ("fetch model and data", partial(steps.fetch, bench))}
    for planned in plan.ADAPTERS:
        title = f"train {planned.name} ({planned.config.method})"
        todo[f"train-{planned.name}"] = (title, partial(steps.train_one, bench, planned))
    todo["share"] = ("push all to a second hub, pull one from there", partial(steps.share, bench))
    todo["merge"] = (f"merge {' and '.join(plan.MERGED)}", partial(steps.merge_two, bench))
    todo["measure"] = ("measure all adapters in mixed batches", partial(steps.measure, bench))
    for strategy in plan.STRATEGIES:
        title = f"learn the tasks one after another: {strategy}"
        todo[f"continual-{strategy}"] = (title, partial(steps.sequence, bench, strategy))
    todo["export"] = ("export one plain model", partial(steps.export_one, bench))
    return {
        step: _do(journal, step, f"{number:2}/{len(todo)} {title}", make, say)
        for number, (step, (title, make)) in enumerate(todo.items(), 1)
    }


def _do(journal: Journal, step: str, title: str, make: Callable[[], Json], say: Callable[[str], None]) -> Json:
    known = journal.get(step)
    if known is not None:
        say(f"{title}: done before")
        return known
    say(title)
    start = time.monotonic()
    result = journal.once(step, make)
    say(f"     done in {time.monotonic() - start:.0f} s")
    return result
