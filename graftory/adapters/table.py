"""The table of adapter methods."""

from __future__ import annotations

from collections.abc import Mapping

from graftory.adapters.apt import APT
from graftory.adapters.bitfit import BITFIT
from graftory.adapters.bottleneck import BOTTLENECK, NORMED_BOTTLENECK
from graftory.adapters.coda import CODA
from graftory.adapters.compacter import COMPACTER
from graftory.adapters.dora import DORA
from graftory.adapters.fusion import FUSION
from graftory.adapters.ia3 import IA3
from graftory.adapters.krona import KRONA
from graftory.adapters.lora import LORA
from graftory.adapters.lora_bias import LORA_BIAS
from graftory.adapters.method import Method
from graftory.adapters.peft_trained.table import PEFT_METHODS
from graftory.adapters.prefix import PREFIX
from graftory.adapters.prompt import PROMPT
from graftory.adapters.propetl import PROPETL
from graftory.adapters.smop import SMOP
from graftory.adapters.sparse_update import DIFF, SPARSE_UPDATE, SPT
from graftory.adapters.unipelt import UNIPELT
from graftory.adapters.update import UPDATE
from graftory.adapters.ways import WAYS
from graftory.config import AdapterConfig
from graftory.errors import UnsupportedAdapterError

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        LORA,
        DORA,
        IA3,
        BITFIT,
        UPDATE,
        SPARSE_UPDATE,
        PREFIX,
        APT,
        BOTTLENECK,
        COMPACTER,
        PROPETL,
        KRONA,
        UNIPELT,
        CODA,
        NORMED_BOTTLENECK,
        FUSION,
        SMOP,
        PROMPT,
        *WAYS,
        DIFF,
        SPT,
        LORA_BIAS,
        *PEFT_METHODS,
    )
}
"""Every method that can be attached, by name."""


def method_of(config: AdapterConfig) -> Method:
    """The row of a configuration's method.

    Raises:
        UnsupportedAdapterError: If it cannot be attached.
    """
    method = METHODS.get(config.method)
    if method is None:
        raise UnsupportedAdapterError(
            f"a {config.method} makes adapters and is none itself: take one task's, with hub compose export-task or "
            "graftory.compose.hyperformer.task_adapter"
        )
    return method
