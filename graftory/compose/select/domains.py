"""Examples of domains: from a file of texts, a task, or what an adapter was trained on; and their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graftory.adapter import TASK_SOURCE, Adapter
from graftory.compose.select.base import Domain
from graftory.data import Rows, Text, load_rows, load_task
from graftory.errors import ConfigError, DataError
from graftory.training.features import features_of

if TYPE_CHECKING:
    from torch import Tensor

    from graftory.training import LoadedBase


def example_texts(source: str, limit: int, *, seed: int = 0) -> tuple[Text, ...]:
    """Unlabelled examples: the lines of a `.txt`, or the training texts of a task, without their labels.

    Args:
        source: A file of texts, one a line; or a task file or sample (`wheel:NAME`).
        limit: At most so many, drawn by the seed.
        seed: The seed.

    Raises:
        DataError: If there is none, or the file cannot be read.
        ConfigError: If it is no task.
    """
    if source.endswith(".txt"):
        return _lines(Path(source), limit, seed)
    return load_rows(load_task(source), "train", limit=limit, seed=seed).texts


def _lines(path: Path, limit: int, seed: int) -> tuple[Text, ...]:
    try:
        lines = [line.strip() for line in path.expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}); give one example a line, in UTF-8") from None
    texts = tuple(line for line in lines if line)
    if not texts:
        raise DataError(f"{path}: no examples in it; give one a line")
    return Rows("train", texts, (0,) * len(texts)).subsample(limit, seed).texts


def task_source(name: str, adapter: Adapter) -> str:
    """The task that an adapter was trained on, as its record says.

    Raises:
        ConfigError: If the record does not say it.
    """
    source = adapter.spec.lineage.parameters.get(TASK_SOURCE)
    if not isinstance(source, str):
        raise ConfigError(
            f"{name}: its record does not name the task it was trained on, so there are no examples of it; "
            "name the adapters to merge without --select, or train it with hub train"
        )
    return source


def encode_domains(
    encoder: LoadedBase,
    adapters: Mapping[str, Adapter],
    examples: str,
    *,
    limit: int = 100,
    seed: int = 0,
    batch_size: int = 32,
) -> tuple[tuple[Domain, ...], Tensor]:
    """Features of examples of what each adapter was trained on, and of the new domain.

    Args:
        encoder: The model that encodes them, without an adapter: mean-pooled last hidden states.
        adapters: By name; their records say what they were trained on.
        examples: The new domain, as in `example_texts`.
        limit: Examples of each.
        seed: Which examples.
        batch_size: Rows at a time.

    Raises:
        ConfigError: If a record does not name its task.
        DataError: If examples cannot be had.
    """
    sources = {name: task_source(name, adapter) for name, adapter in adapters.items()}
    texts: dict[str, Sequence[Text]] = {source: example_texts(source, limit, seed=seed) for source in sources.values()}
    new = features_of(encoder, example_texts(examples, limit, seed=seed), batch_size=batch_size)
    encoded = {source: features_of(encoder, some, batch_size=batch_size) for source, some in texts.items()}
    return tuple(Domain(name, encoded[source]) for name, source in sources.items()), new
