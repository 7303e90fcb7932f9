"""What a record does not say: the gaps that keep people from judging, using or remaking an adapter.

What is wanted depends on how the adapter was made: a merge has no training data, an import has all that
training has, only nobody wrote it down. Each fact is a row of the table below.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from graftory.adapter import AdapterSpec, Parent
from graftory.config import HyperformerConfig
from graftory.hub.records import Record

_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
"""A model of the Hugging Face Hub. Folders and samples of installed packages have no revision."""
_PLACEHOLDER = re.compile(r"LABEL_[0-9]+")
"""What an import calls the labels that its files do not name."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_TRAINED = ("train", "continual", "compose")
_IMPORTED = ("import", "imported")
_CODE = ("graftory", "peft")


@dataclass(frozen=True, slots=True)
class Gap:
    """One fact that a record lacks.

    Attributes:
        field: The fact, in words.
        remedy: What it is needed for, and how the next version gets it.
    """

    field: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Completeness:
    """How much of what is wanted of a record is there.

    Attributes:
        wanted: How many facts are wanted of an adapter made this way.
        gaps: Those that are missing.
    """

    wanted: int
    gaps: tuple[Gap, ...]

    @property
    def known(self) -> int:
        """How many of the wanted facts are there."""
        return self.wanted - len(self.gaps)

    def __str__(self) -> str:
        return f"{self.known} of {self.wanted}"


Test = Callable[[AdapterSpec], bool]


@dataclass(frozen=True, slots=True)
class _Fact:
    field: str
    wanted: Test
    known: Test
    remedy: str


def completeness(record: Record) -> Completeness:
    """Count what a record says of what is wanted, and name what it does not."""
    wanted = [fact for fact in _FACTS if fact.wanted(record.spec)]
    missing = (Gap(fact.field, fact.remedy) for fact in wanted if not fact.known(record.spec))
    return Completeness(len(wanted), tuple(missing))


def gaps(record: Record) -> tuple[Gap, ...]:
    """What a record does not say of what is wanted of an adapter made this way; empty if it is complete."""
    return completeness(record).gaps


def _always(spec: AdapterSpec) -> bool:  # noqa: ARG001 (one signature for all rows)
    return True


def _by(*processes: str) -> Test:
    return lambda spec: spec.lineage.process in processes


def _library(*names: str) -> Test:
    return lambda spec: all(spec.lineage.libraries.get(name) for name in names)


def _needs_task(spec: AdapterSpec) -> bool:
    """A merge of several tasks has none, a hyperformer tells its own; everything else was made for one."""
    return spec.task is not None or not (spec.lineage.process == "merge" or isinstance(spec.config, HyperformerConfig))


def _is(*kinds: str) -> Test:
    return lambda spec: spec.task is not None and spec.task.kind in kinds


def _named_labels(spec: AdapterSpec) -> bool:
    labels = spec.task.labels if spec.task else ()
    return bool(labels) and not any(_PLACEHOLDER.fullmatch(label) for label in labels)


def _identified(parents: tuple[Parent, ...]) -> bool:
    return bool(parents) and all(parent.ref and _DIGEST.fullmatch(parent.digest) for parent in parents)


def _measured(spec: AdapterSpec) -> bool:
    return bool(spec.metrics) and all(row.name and row.data and row.split and row.n > 0 for row in spec.metrics)


_MADE = _by(*_TRAINED, *_IMPORTED)
_ON_THE_NEXT = "load the base with graftory and train or import again"

_FACTS = (
    _Fact(
        "base model",
        _always,
        lambda spec: spec.base.id not in ("", "unknown"),
        "nobody can load the adapter without it; add it again with hub add --base ID",
    ),
    _Fact(
        "base revision",
        lambda spec: _HUB_ID.fullmatch(spec.base.id) is not None,
        lambda spec: bool(spec.base.revision),
        "a model id may mean other weights tomorrow; record the commit of the base (BaseModel.revision)",
    ),
    _Fact(
        "base architecture",
        _always,
        lambda spec: bool(spec.base.architecture),
        f"tells whether the module paths can exist in a base; {_ON_THE_NEXT}",
    ),
    _Fact(
        "base config fingerprint",
        _always,
        lambda spec: bool(spec.base.config_hash),
        f"tells a base of other shapes apart; {_ON_THE_NEXT} (graftory.base_of)",
    ),
    _Fact(
        "base weights fingerprint",
        _always,
        lambda spec: bool(spec.base.weights_hash),
        f"tells a base of other weights apart, whatever it is called; {_ON_THE_NEXT} (graftory.base_of)",
    ),
    _Fact(
        "tokenizer hash",
        _always,
        lambda spec: bool(spec.base.tokenizer_hash),
        f"other token numbers give other answers without an error; {_ON_THE_NEXT} (BaseModel.tokenizer_hash)",
    ),
    _Fact(
        "task kind",
        _needs_task,
        lambda spec: spec.task is not None,
        "says how to load the base and read its output; add the adapter with a task (AdapterSpec.task)",
    ),
    _Fact(
        "labels",
        _is("classification"),
        _named_labels,
        "without them the outputs are numbers without a meaning; name them in order (TaskInfo.labels)",
    ),
    _Fact(
        "head",
        _is("classification", "regression"),
        lambda spec: spec.task is not None and bool(spec.task.head),
        "the base's own head is random at every load; save the trained one (PEFT: modules_to_save)",
    ),
    _Fact(
        "modules",
        _always,
        lambda spec: bool(spec.config.targets),
        "where the adapter sits, path by path; train or import it again",
    ),
    _Fact(
        "init seed",
        _MADE,
        lambda spec: spec.config.init_seed is not None,
        "only adapters of one initialisation may be averaged weight by weight; train it with graftory",
    ),
    _Fact(
        "training data hash",
        _MADE,
        lambda spec: bool(spec.lineage.data_hash),
        "shows whether test rows were trained on, and is needed to make it again; train it with graftory",
    ),
    _Fact(
        "training seed",
        _MADE,
        lambda spec: spec.lineage.seed is not None,
        "needed to make it again; train it with graftory",
    ),
    _Fact(
        "library versions",
        _always,
        _library("torch", "transformers"),
        "needed to make it again; train it with graftory (Lineage.libraries: torch, transformers)",
    ),
    _Fact(
        "code version",
        _always,
        lambda spec: any(spec.lineage.libraries.get(name) for name in _CODE),
        "which code wrote it; train it with graftory, or save it with a newer PEFT",
    ),
    _Fact(
        "metrics",
        _always,
        _measured,
        "nobody knows how good it is; measure it (hub eval) and record value, data, split and rows "
        "(AdapterSpec.metrics)",
    ),
    _Fact(
        "licence",
        _always,
        lambda spec: bool(spec.licence),
        "nobody knows what is allowed; record one that base and data permit (AdapterSpec.licence)",
    ),
    _Fact(
        "process",
        _always,
        lambda spec: spec.lineage.process not in ("", *_IMPORTED),
        "how it was made is not known; a run of graftory (hub train, hub merge) records it",
    ),
    _Fact(
        "training parameters",
        _MADE,
        lambda spec: bool(spec.lineage.parameters),
        "learning rate, epochs and so on are needed to make it again; train it with graftory",
    ),
    _Fact(
        "merge parameters",
        _by("merge"),
        lambda spec: bool(spec.lineage.parameters.get("method")),
        "which method with which settings made it; merge again with hub merge",
    ),
    _Fact(
        "parents",
        lambda spec: bool(spec.lineage.parents) or spec.lineage.process in ("merge", "generated"),
        lambda spec: _identified(spec.lineage.parents),
        "what it was made from, by reference and digest; merge adapters that are in a hub (hub merge)",
    ),
    _Fact(
        "parent weights",
        _by("merge"),
        lambda spec: bool(spec.lineage.parents) and all(row.weight is not None for row in spec.lineage.parents),
        "how much of each parent is in it; merge again with hub merge",
    ),
)
"""Every fact that may be wanted: of which adapters, when it counts as known, and why it matters."""
