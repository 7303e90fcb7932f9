"""Adapters of a hub for servers that are not ours: vLLM asks `register`, found by its entry point, for a resolver."""

from __future__ import annotations

import os

from graftory.hub.locate import VARIABLE, find_hub, is_hub

RESOLVER = "graftory"
"""The resolver's name in vLLM's registry, and of the entry point."""


def register() -> None:
    """Let vLLM resolve names from the hub; called in every process of a server, more than once in some.

    Where no hub was asked for and none is found, nothing is registered: graftory beside vLLM changes nothing by itself.

    Raises:
        HubNotFoundError: If there is no hub where `GRAFTORY_REGISTRY` points.
    """
    root = find_hub()
    if not is_hub(root) and not os.environ.get(VARIABLE):
        return
    from graftory.serving.resolver import HubResolver, add_resolver

    add_resolver(RESOLVER, HubResolver(root))
