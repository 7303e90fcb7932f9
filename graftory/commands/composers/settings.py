"""Options of a composer from its typed settings, as `hub train` has them, but of one method."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import click

from graftory.commands.options import joined_option, names_of
from graftory.commands.run_file import FromFile, config_option


class SettingsCommand(FromFile):
    """A command with an option for each field made with `graftory.config.option`; `given_settings` has their values.

    A field that several settings have becomes one option. One that the command declares itself is not derived.
    """

    def __init__(self, *args: Any, settings: tuple[type, ...], **kwargs: Any) -> None:
        """Take, beside click's own arguments, the classes whose fields become options."""
        super().__init__(*args, **kwargs)
        self.settings = settings

    @cached_property
    def derived(self) -> list[click.Parameter]:
        """The options of the fields."""
        declared = {parameter.name for parameter in self.params}
        owners: dict[str, type] = {}
        for kind in self.settings:
            owners |= {name: kind for name in names_of([kind]) if name not in owners}
        options = [joined_option(name, {"": kind}) for name, kind in owners.items() if name not in declared]
        return [*options, config_option()]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, then the derived ones, then `--help`."""
        last = self.get_help_option(ctx)
        own = [parameter for parameter in super().get_params(ctx) if parameter is not last]
        return [*own, *self.derived, *([last] if last else [])]
