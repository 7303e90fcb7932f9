"""Every strategy, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TypeVar

from graftory.continual.strategies.agem import AGem
from graftory.continual.strategies.base import (
    NOTHING,
    Answer,
    Context,
    Finished,
    Kept,
    Lesson,
    Needs,
    Plan,
    Scenario,
    Step,
    Strategy,
)
from graftory.continual.strategies.ewc import Ewc
from graftory.continual.strategies.frozen import Frozen
from graftory.continual.strategies.gated import Gated
from graftory.continual.strategies.inflora import InfLora
from graftory.continual.strategies.isolated import Isolated
from graftory.continual.strategies.joint import Joint
from graftory.continual.strategies.lwf import Lwf
from graftory.continual.strategies.migu import Migu
from graftory.continual.strategies.olora import OLora
from graftory.continual.strategies.opcm import Opcm
from graftory.continual.strategies.plugin import Plugin
from graftory.continual.strategies.progressive import ProgressivePrompts
from graftory.continual.strategies.ranpac import RanPac
from graftory.continual.strategies.replay import ReplayRows
from graftory.continual.strategies.sdlora import SdLora
from graftory.continual.strategies.seq import Sequential
from graftory.continual.strategies.single import Single
from graftory.continual.strategies.slao import Slao
from graftory.errors import ConfigError
from graftory.schema import Json, decode

STRATEGIES: Mapping[str, type[Strategy]] = {
    "seq": Sequential,
    "isolated": Isolated,
    "o-lora": OLora,
    "inflora": InfLora,
    "sd-lora": SdLora,
    "slao": Slao,
    "opcm": Opcm,
    "gated": Gated,
    "progressive-prompts": ProgressivePrompts,
    "ranpac": RanPac,
    "frozen": Frozen,
    "single": Single,
    "joint": Joint,
}
"""Every strategy, by name."""

PLUGINS: Mapping[str, type[Plugin]] = {row.name: row for row in (ReplayRows, Ewc, Lwf, AGem, Migu)}
"""What can be added to `seq`: `ewc` is `seq+ewc`, and `replay+migu` adds two."""

__all__ = [
    "NOTHING",
    "PLUGINS",
    "STRATEGIES",
    "Answer",
    "Context",
    "Finished",
    "Kept",
    "Lesson",
    "Needs",
    "Plan",
    "Plugin",
    "Scenario",
    "Step",
    "Strategy",
    "strategy_of",
]

T = TypeVar("T")


def strategy_of(name: str, parameters: Mapping[str, Json] | None = None) -> Strategy:
    """The strategy of a name.

    Args:
        name: A row of `STRATEGIES` or `PLUGINS`, or several plugins joined by `+`.
        parameters: Its parameters; where plugins are joined, a mapping for each plugin by its name.

    Raises:
        ConfigError: If there is none, or a parameter does not fit.
    """
    given = dict(parameters or {})
    if name in STRATEGIES and name != "seq":
        return _made(STRATEGIES[name], given, f"parameters of {name}")
    names = name.split("+")
    plugins = names[1:] if names[0] == "seq" else names
    unknown = [each for each in plugins if each not in PLUGINS]
    if unknown or len(set(plugins)) < len(plugins):
        raise ConfigError(
            f"strategy: unknown strategy {name!r}; known: {', '.join([*STRATEGIES, *PLUGINS])}, and plugins "
            f"joined by '+', each once: {'+'.join(list(PLUGINS)[:2])}"
        )
    if len(plugins) == 1:
        given = {plugins[0]: given}
    strange = sorted(set(given) - set(plugins))
    if strange:
        wanted = f"a mapping for each of {', '.join(plugins)}" if plugins else "none"
        raise ConfigError(f"parameters: got {strange[0]!r} for strategy {name}, wanted {wanted}")
    return Sequential(
        plugins=tuple(_made(PLUGINS[each], given.get(each, {}), f"parameters of {each}") for each in plugins)
    )


def _made(kind: type[T], given: Json, where: str) -> T:
    if given and isinstance(given, dict) and not fields(kind):  # type: ignore[arg-type]
        raise ConfigError(f"{where}: got {sorted(given)[0]!r}, but it takes none")
    return decode(kind, given, where)
