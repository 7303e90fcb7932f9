"""Mixed batches on several processes: torch's DistributedDataParallel around an adapted model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from graftory import attach
from tests.adapter_samples import ROWS, eight, logits
from tests.conftest import tiny_batch, tiny_model

PROCESSES = 2


def one_step(wrap: Any, rows: slice) -> dict[str, Tensor]:
    """The weights after a step of SGD on some rows of the batch."""
    torch.set_num_threads(1)
    model = tiny_model("bert")
    adapted = attach(model, eight(model))
    adapted.train_only(*adapted.names)
    optimizer = torch.optim.SGD(adapted.trainable(), lr=0.1)
    wrapped = wrap(adapted)
    with adapted.route(ROWS[rows]):
        out = logits(wrapped, {key: value[rows] for key, value in tiny_batch("bert").items()})
        out.masked_fill(torch.isneginf(out), 0.0).square().sum().div(len(ROWS)).backward()
    optimizer.step()
    return {name: weight.detach().clone() for name, weight in adapted.named_parameters() if weight.requires_grad}


def process(rank: int, folder: str) -> None:
    """One of the processes: its share of the rows; a row's gradients come from all of them."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    share = len(ROWS) // PROCESSES
    weights = one_step(
        lambda adapted: DistributedDataParallel(adapted, find_unused_parameters=True),
        slice(rank * share, (rank + 1) * share),
    )
    torch.save(weights, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_processes_with_a_share_of_the_rows_each_take_the_step_of_one_with_all(tmp_path: Path) -> None:
    multiprocessing.spawn(process, (str(tmp_path),), nprocs=PROCESSES)  # type: ignore[attr-defined, no-untyped-call]
    start = attach_fresh()
    alone = one_step(lambda adapted: adapted, slice(0, len(ROWS)))
    together = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    assert alone.keys() == together[0].keys() == together[1].keys()
    moved = 0
    for name, weight in alone.items():
        assert torch.equal(together[0][name], together[1][name]), name
        # a mean over the processes, of sums over their rows
        half = start[name] + (weight - start[name]) / PROCESSES
        torch.testing.assert_close(together[0][name], half, atol=1e-6, rtol=1e-5)
        moved += not torch.equal(weight, start[name])
    assert moved > len(alone) // 2


def attach_fresh() -> dict[str, Tensor]:
    """The weights before the step."""
    model = tiny_model("bert")
    adapted = attach(model, eight(model))
    adapted.train_only(*adapted.names)
    return {name: weight.detach().clone() for name, weight in adapted.named_parameters() if weight.requires_grad}
