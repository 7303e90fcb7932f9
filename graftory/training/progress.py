"""A progress bar for training, in place of tqdm."""

# ruff: noqa: ARG002 - the signatures are those of transformers

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftory.training import processes


class TrainingProgress(TrainerCallback):
    """Shows steps, loss and the time left on the terminal's error stream; nothing where there is no terminal."""

    def __init__(self, title: str) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(
            *columns,
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or not processes.is_first(),
        )
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
