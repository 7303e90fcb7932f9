"""What is composed goes push, another process, pull, and gives equal logits there; its parents are in the log."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from graftory import Adapter, BottleneckConfig, Hub, LoraConfig, Parent, attach
from graftory.compose import merge
from graftory.compose.fusion import new_fusion
from graftory.training import LoadedBase, load_base
from tests.adapter_samples import make, shaken
from tests.training_samples import save_base

THERE = """
import json, sys
import torch
from graftory import Hub, attach
from graftory.training import load_base

base, remote, names, ids = json.loads(sys.argv[1])
hub = Hub.create(sys.argv[2])
torch.set_num_threads(1)  # as here: more threads add in another order
model = load_base(base, "classification").model
found = {}
for name in names:
    hub.pull(f"{remote}/{name}")
    adapted = attach(model, {name: hub.get(name)})
    with torch.no_grad(), adapted.route(name):
        mask = torch.ones(len(ids), len(ids[0])).long()
        found[name] = adapted(input_ids=torch.tensor(ids), attention_mask=mask).logits.tolist()
    adapted.detach()
assert hub.verify().ok
print(json.dumps(found))
"""
IDS = [[1, 7, 9, 12, 2], [1, 20, 8, 5, 2]]
Make = Callable[[LoadedBase, Sequence[Adapter], Sequence[Parent]], Adapter]


def fused(loaded: LoadedBase, adapters: Sequence[Adapter], parents: Sequence[Parent]) -> Adapter:
    return shaken(new_fusion(loaded.model, adapters, base=loaded.base, head=adapters[0], parents=parents))


def merged(method: str) -> Make:
    return lambda loaded, adapters, parents: merge(adapters, method, parents=parents)


COMPOSED: Mapping[str, tuple[str, Make]] = {
    "fused": ("composed", fused),
    "soup": ("merged", merged("soup")),
    "sum": ("merged", merged("linear")),
    "aligned": ("merged", merged("mera")),
}
"""The relation of the parents, and how each is made."""


KINDS = {"lora": LoraConfig(rank=3), "bottleneck": BottleneckConfig(size=5)}
CASES = [pytest.param(kind, name, id=f"{kind}-{name}") for kind in KINDS for name in COMPOSED]


@pytest.fixture(scope="module")
def arrived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Hub, dict[str, Any], Any]:
    """The hub they were made in, the logits here, and the logits in another process after a pull."""
    home = tmp_path_factory.mktemp("travel")
    base = save_base("bert", home / "base")
    loaded = load_base(base, "classification")
    hub = Hub.create(home / "hub")
    here = {}
    for kind, config in KINDS.items():
        adapters = [make(loaded.model, config, labels=3, seed=seed) for seed in (1, 2)]
        refs = [hub.put(f"{kind}-parent{number}", adapter) for number, adapter in enumerate(adapters)]
        for each, (relation, compose) in COMPOSED.items():
            name = f"{kind}-{each}"
            parents = [Parent(str(ref), hub.record(ref).digest, relation) for ref in refs]  # type: ignore[arg-type]
            hub.put(name, compose(loaded, adapters, parents))
            adapted = attach(loaded.model, {name: hub.get(name)})
            with torch.no_grad(), adapted.route(name):
                mask = torch.ones(2, 5, dtype=torch.long)
                here[name] = adapted(input_ids=torch.tensor(IDS), attention_mask=mask).logits
            adapted.detach()
            hub.push(name, (home / "remote").as_uri())
    argument = json.dumps([base, (home / "remote").as_uri(), list(here), IDS])
    done = subprocess.run(
        [sys.executable, "-c", THERE, argument, str(home / "there")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return hub, here, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_logits_are_equal_in_another_process(kind: str, name: str, arrived: tuple[Hub, dict[str, Any], Any]) -> None:
    _, all_here, all_there = arrived
    here, there = (each[f"{kind}-{name}"] for each in (all_here, all_there))
    assert torch.equal(here, torch.tensor(there))
    assert not torch.equal(here[0], here[1])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_log_has_its_parents(kind: str, name: str, arrived: tuple[Hub, dict[str, Any], Any]) -> None:
    hub, _, _ = arrived
    record = hub.record(f"{kind}-{name}")
    family = hub.lineage(f"{kind}-{name}")
    edges = family.in_edges(record.digest, data=True)
    assert {(family.nodes[parent]["ref"], data["relation"]) for parent, _, data in edges} == {
        (f"{kind}-parent0@1", COMPOSED[name][0]),
        (f"{kind}-parent1@1", COMPOSED[name][0]),
    }
