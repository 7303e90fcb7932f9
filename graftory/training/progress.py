"""Progress bars for training, in place of tqdm."""

# ruff: noqa: ARG002 - the signatures are those of transformers

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftory.training import processes


class TrainingProgress(TrainerCallback):
    """Shows steps, loss and the time left on the terminal's error stream; nothing where there is no terminal."""

    def __init__(self, title: str) -> None:
        self.progress = _bar(TextColumn("{task.fields[loss]}"))
        self.title = title

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the bar where a resumed training stands."""
        self.progress.start()
        self.bar = self.progress.add_task(
            f"training {self.title}", total=state.max_steps, completed=state.global_step, loss=""
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step further."""
        self.progress.update(self.bar, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the newest loss."""
        if logs and "loss" in logs:
            self.progress.update(self.bar, loss=f"loss {float(logs['loss']):.3f}")

    def stop(self) -> None:
        """Take the bar away, come what may."""
        self.progress.stop()


@contextmanager
def counted(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for something else than steps; what it gives is told how many more are done."""
    progress = _bar()
    with progress:
        bar = progress.add_task(title, total=total)
        yield lambda more: progress.advance(bar, more)


def _bar(*columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    return Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or not processes.is_first(),
    )
