"""The resolver that vLLM asks for adapters that it does not know. The only module here that imports vLLM."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from graftory.errors import AdapterNotFoundError, BaseMismatchError, InvalidNameError, UnsupportedAdapterError
from graftory.hub import Hub
from graftory.serving.cache import BASE_VARIABLE, cache_folder, serve

logger = logging.getLogger("vllm.graftory")
"""Below vLLM's own, so that it is seen in the server's log."""


class HubResolver(LoRAResolver):  # type: ignore[misc]
    """Resolves `name`, `name@3`, `name:alias` and `name@sha256:...` from a hub.

    Args:
        root: The hub's folder.
        cache: Where adapters are written; see `cache_folder`.
    """

    def __init__(self, root: Path, cache: Path | None = None) -> None:
        self._root = root
        self._cache = cache if cache is not None else cache_folder()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter that a name means now, in the cache; None if the hub has none for this server.

        The server goes on serving while bytes are hashed and written. Why there is none is in the log.

        Args:
            base_model_name: The base, as the server was given it.
            lora_name: The name that a client asked for.

        Raises:
            CorruptAdapterError: If bytes are not the recorded ones.
        """
        return await asyncio.to_thread(self._resolve, base_model_name, lora_name)

    def _resolve(self, base: str, name: str) -> LoRARequest | None:
        called = os.environ.get(BASE_VARIABLE)
        try:
            served = serve(Hub(self._root), name, base, self._cache, called=called)
        except (InvalidNameError, AdapterNotFoundError) as error:
            logger.debug("%r is not for graftory: %s", name, error)  # another resolver may know it
            return None
        except (BaseMismatchError, UnsupportedAdapterError) as error:
            logger.warning("%r cannot be served: %s", name, error)
            return None
        logger.info("%r is %s, %s", name, served.ref, served.digest)
        return LoRARequest(lora_name=name, lora_int_id=served.id, lora_path=str(served.folder))


def add_resolver(name: str, resolver: LoRAResolver) -> None:
    """Register a resolver; the one that has the name already stays."""
    if name not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(name, resolver)
