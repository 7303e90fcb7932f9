"""Where the losses of a training go beside the progress bar: the integrations of transformers' `Trainer`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers.integrations.integration_utils import get_available_reporting_integrations

from graftory.errors import ConfigError

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"
"""Where the `Trainer` looks for the folder; it has no argument for it."""


@dataclass(frozen=True, slots=True)
class Reporting:
    """What is told about one training, to whom."""

    to: tuple[str, ...] = ()
    """Names as in `TrainingArguments.report_to`: tensorboard, wandb, ..."""
    run: str = ""
    """What the run is called there."""
    folder: Path | None = None
    """Where TensorBoard's files go."""

    @contextmanager
    def at_its_place(self) -> Iterator[None]:
        """While a trainer is made and runs; afterwards its W&B run is closed, so that the next has one of its own."""
        before = os.environ.get(_TENSORBOARD)
        if self.folder is not None:
            os.environ[_TENSORBOARD] = str(self.folder)
        try:
            yield
        finally:
            os.environ.pop(_TENSORBOARD, None)
            if before is not None:
                os.environ[_TENSORBOARD] = before
            if "wandb" in self.to:
                import wandb  # type: ignore[import-not-found,unused-ignore]

                wandb.finish()


NOWHERE = Reporting()


def check_reporting(names: Sequence[str]) -> None:
    """Check that what should be told is installed.

    Raises:
        ConfigError: If one is not.
    """
    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            raise ConfigError(
                f"report_to: {name!r} is not installed, or no integration of transformers; installed: "
                f"{', '.join(available) or 'none'}; install its package, or leave it out"
            )
