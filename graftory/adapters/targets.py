"""Targets of the methods that sit on linear layers: groups, roles and ends of paths, made explicit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftory.adapters.architectures import GROUPS, Architecture, architecture_of, head_paths, is_linear, matching
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linear_targets(model: PreTrainedModel, targets: Sequence[str]) -> tuple[str, ...]:
    """The explicit linear layers that targets mean, heads left out.

    A target is a group (`qv`, `attention`, `ffn`, `all`) or role (`q`, `v`, ...) of the architecture table, or the
    end of a module path, as in PEFT (`query`, `layer.0.attention.self.query`).

    Raises:
        UnsupportedAdapterError: If a target fits no linear layer.
    """
    row = architecture_of(model)
    heads = (*head_paths(model), "lm_head")
    linears = [path for path, module in model.named_modules() if is_linear(module) and path.split(".")[0] not in heads]
    chosen: list[str] = []
    for target in targets:
        found = linears if target == "all" and row is None else paths_of(target, row, linears)
        if not found:
            raise UnsupportedAdapterError(
                f"target {target!r} fits no linear layer of {type(model).__name__}; give a group "
                f"({', '.join(GROUPS)}), a role ({', '.join(row.linears) if row else 'none for this architecture'}) "
                "or the end of a module path"
            )
        chosen += found
    return tuple(sorted(set(chosen)))


def paths_of(target: str, row: Architecture | None, paths: Sequence[str]) -> list[str]:
    """Those of some paths that a target means: a group or role of the architecture, or the end of a path."""
    patterns = [target]
    if row and (target in GROUPS or target in row.linears):
        patterns = [pattern for role in GROUPS.get(target, (target,)) for pattern in row.linears.get(role, ())]
    return [path for path, _ in matching(paths, patterns)]
