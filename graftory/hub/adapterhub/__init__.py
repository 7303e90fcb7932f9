"""AdapterHub's files (of the library `adapters`): `hub add` reads them, `hub export --format adapterhub` writes them.

`adapter_config.json` with `adapter.safetensors`, and for a head `head_config.json` with `model_head.safetensors`. They
are no format of the hub's own: an adapter that comes so is kept in PEFT's files (LoRA) or graftory's (bottlenecks).
Read and written are `seq_bn`, `double_seq_bn`, `par_bn` and LoRA on BERT, RoBERTa and XLM-R, as version 1.3 has them;
all else is refused by name.
"""

from __future__ import annotations

from graftory.hub.adapterhub.names import CONFIG, WEIGHTS
from graftory.hub.adapterhub.reading import file_names_in, read
from graftory.hub.adapterhub.writing import write

__all__ = ["CONFIG", "WEIGHTS", "file_names_in", "read", "write"]
