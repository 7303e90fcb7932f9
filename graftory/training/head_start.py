"""Where a fresh head starts: at the best linear head on what the model says before anything has learnt.

Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution"
(arXiv:2202.10054, LP-FT): a random head pulls the features about until it fits them; one that fits them already does
not, and a few hundred rows of many labels are learnt at once. The paper trains the probe by gradient steps; here it is
scikit-learn's logistic or ridge regression, on features that are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graftory.adapter import TaskKind
from graftory.adapters.head import last_linear
from graftory.training import processes
from graftory.training.encode import Example
from graftory.training.linear_probe import linear_probe
from graftory.training.progress import counted

if TYPE_CHECKING:
    from graftory.training.trainer import AdapterTrainer

_MOST_ROWS = 5000
"""Rows that a head is fitted on; of more, evenly spaced ones."""
_BATCH = 32


def start_head(trainer: AdapterTrainer, owner: str, kind: TaskKind, rows: Sequence[Example]) -> None:
    """Put the best linear head in the place of a fresh one; where it has several layers, of its last.

    Args:
        trainer: About to train.
        owner: The attached adapter whose head it is.
        kind: What the head is for.
        rows: The rows that go through it.
    """
    rows = rows[:: -(-len(rows) // _MOST_ROWS)]
    adapted = trainer.adapted
    before = adapted.extract(owner).head_tensors()
    weight, bias = (f"{last_linear(adapted.model)}.{part}" for part in ("weight", "bias"))
    outputs, width = before[weight].shape
    # the identity: the model itself picks the token, or the pooled state, that it takes its logits from
    same = {weight: torch.eye(width), **({bias: torch.zeros(width)} if bias in before else {})}
    adapted.replace_head(owner, before | same)
    probe = None
    if processes.is_first():
        targets = torch.tensor([row["labels"] for row in rows])
        with counted("fitting the head", len(rows)) as advance:
            features = _features(trainer, rows, width, advance)
            probe = linear_probe(kind, features, targets, outputs, intercept=bias in before)
    # all processes start at the same numbers, whatever each would have rounded them to
    probe = processes.from_first(probe)
    adapted.replace_head(owner, before if probe is None else before | dict(zip((weight, bias), probe, strict=False)))


def _features(trainer: AdapterTrainer, rows: Sequence[Example], width: int, advance: Callable[[int], None]) -> Tensor:
    """What the head's last layer reads of each row, as training will run it but for dropout, [rows, width] fp64."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    features = torch.empty(len(rows), width, dtype=torch.float64)
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        features[part] = trainer.logits([rows[row] for row in part]).double().cpu()
        advance(len(part))
    return features
