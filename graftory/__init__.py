"""graftory: a versioned hub for adapters on Hugging Face models.

The names below are stable. They are imported when first used, so that `import graftory` (and
`hub list`) never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftory.adapter import Adapter, AdapterRef, AdapterSpec, BaseModel, Lineage, Metric, Parent, TaskInfo
from graftory.config import AdapterConfig, BottleneckConfig, LoraConfig
from graftory.errors import GraftoryError
from graftory.lazy import lazily

if TYPE_CHECKING:
    from graftory.adapters import AdaptedModel, ResidentAdapters, attach, base_of, new_adapter
    from graftory.adapters.peft_model import mixed_batches, undo_mixed_batches
    from graftory.compose.exporting import export
    from graftory.compose.merge import merge
    from graftory.hub import Hub

__version__ = "0.1.0"

_LAZY = {
    "AdaptedModel": "graftory.adapters",
    "ResidentAdapters": "graftory.adapters",
    "attach": "graftory.adapters",
    "base_of": "graftory.adapters",
    "new_adapter": "graftory.adapters",
    "mixed_batches": "graftory.adapters.peft_model",
    "undo_mixed_batches": "graftory.adapters.peft_model",
    "export": "graftory.compose",
    "merge": "graftory.compose",
    "Hub": "graftory.hub",
}

__all__ = [
    "AdaptedModel",
    "Adapter",
    "AdapterConfig",
    "AdapterRef",
    "AdapterSpec",
    "BaseModel",
    "BottleneckConfig",
    "GraftoryError",
    "Hub",
    "Lineage",
    "LoraConfig",
    "Metric",
    "Parent",
    "ResidentAdapters",
    "TaskInfo",
    "attach",
    "base_of",
    "export",
    "merge",
    "mixed_batches",
    "new_adapter",
    "undo_mixed_batches",
]

__getattr__ = lazily(__name__, _LAZY)
