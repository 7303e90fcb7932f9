"""Adapters of a hub that share a few places in a model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftory import Adapter, AdapterRef, BottleneckConfig, Hub, LoraConfig, ResidentAdapters, attach
from graftory.adapters import Row
from graftory.adapters.banked_site import BankedSite
from graftory.errors import AdapterNotFoundError, BaseMismatchError, ConfigError, RouteError
from tests.adapter_samples import logits, make
from tests.conftest import tiny_batch, tiny_model

NAMES = ("a", "b", "c", "d", "e")


class Counted:
    """A hub that notes what is taken out of it."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.taken: list[str] = []

    def resolve(self, ref: str) -> AdapterRef:
        return self.hub.resolve(ref)

    def get(self, ref: AdapterRef) -> Adapter:
        self.taken.append(ref.name)
        return self.hub.get(ref)


@pytest.fixture
def model() -> Any:
    return tiny_model("bert")


@pytest.fixture
def source(tmp_path: Path, model: Any) -> Counted:
    hub = Hub.create(tmp_path)
    for seed, name in enumerate(NAMES):
        config = BottleneckConfig(size=3) if name == "c" else LoraConfig(rank=2 + seed % 2)
        hub.put(name, make(model, config, labels=2 + seed, seed=seed))
    hub.set_alias("b", "prod", 1)
    return Counted(hub)


def answers(resident: ResidentAdapters, rows: str | Sequence[Row]) -> Tensor:
    with resident.route(rows), torch.no_grad():
        return logits(resident.model, tiny_batch("bert"))


def test_what_is_used_least_recently_makes_room(source: Counted, model: Any) -> None:
    wanted = {}
    adapted = attach(model, {name: source.hub.get(name) for name in NAMES})
    for name in NAMES:
        with adapted.route(name), torch.no_grad():
            wanted[name] = logits(adapted, tiny_batch("bert"))
    adapted.detach()
    resident = ResidentAdapters(model, source, capacity=3)
    for name in ("a", "b", "c", "a", "d", "b:prod", "e", "a@1"):
        torch.testing.assert_close(answers(resident, name), wanted[name[0]])
    # d takes the place of b, b of c, e of a, a of d
    assert source.taken == ["a", "b", "c", "d", "b", "e", "a"]
    assert resident.names == ("b@1", "e@1", "a@1")
    mixed = answers(resident, ["e", None, {"b": 0.5, "b:prod": 0.5}, "a"] * 2)
    for row, name in ((0, "e"), (2, "b"), (3, "a"), (4, "e")):
        torch.testing.assert_close(mixed[row, : wanted[name].shape[-1]], wanted[name][row], atol=1e-5, rtol=1e-5)
    assert len(source.taken) == 7, "all were there"


def test_nothing_else_moves_when_one_comes_and_one_goes(source: Counted, model: Any) -> None:
    resident = ResidentAdapters(model, source, capacity=3)
    answers(resident, ["a", "b", "d", None] * 2)
    banks = [bank for site in resident.model.sites.values() if isinstance(site, BankedSite) for bank in site.banks]
    before = [[(part, bank.whole(part).data_ptr(), bank.whole(part)._version) for part in bank.parts] for bank in banks]
    kept = {name: weight.data_ptr() for name, weight in resident.model.weights("d@1").items()}
    answers(resident, "e")
    assert resident.names == ("b@1", "d@1", "e@1")
    after = [[(part, bank.whole(part).data_ptr(), bank.whole(part)._version) for part in bank.parts] for bank in banks]
    assert before == after
    assert kept == {name: weight.data_ptr() for name, weight in resident.model.weights("d@1").items()}


def test_no_room_is_said_and_leaves_everything_as_it_was(source: Counted, model: Any) -> None:
    resident = ResidentAdapters(model, source, capacity=2)
    answers(resident, "a")
    with pytest.raises(RouteError, match="use 3 adapters, there are 2 places"), resident.route(["a", "b", "c"]):
        pass
    with (
        resident.route(["a", "b"]),
        pytest.raises(RouteError, match="a route within another needs more"),
        resident.route("d"),
    ):
        pass
    with pytest.raises(AdapterNotFoundError), resident.route("nobody"):
        pass
    with pytest.raises(ConfigError, match="capacity"):
        ResidentAdapters(model, source, capacity=0)
    answers(resident, ["d", "e"])
    assert resident.names == ("d@1", "e@1")


def test_an_adapter_that_does_not_fit_is_no_longer_waited_for(source: Counted, model: Any) -> None:
    source.hub.put("other", make(tiny_model("bert", seed=7), LoraConfig(rank=2), seed=9))
    resident = ResidentAdapters(model, source, capacity=1)
    wanted = answers(resident, "a")
    with pytest.raises(BaseMismatchError), resident.route("other"):
        pass
    torch.testing.assert_close(answers(resident, "a"), wanted)


def test_an_error_in_a_route_frees_its_places(source: Counted, model: Any) -> None:
    resident = ResidentAdapters(model, source, capacity=1)
    with pytest.raises(ZeroDivisionError), resident.route("a"):
        raise ZeroDivisionError
    answers(resident, "b")
    assert resident.names == ("b@1",)


def test_detach_gives_the_base_back(source: Counted, model: Any) -> None:
    with torch.no_grad():
        bare = logits(model, tiny_batch("bert"))
    resident = ResidentAdapters(model, source, capacity=2)
    answers(resident, ["a", "c"])
    back = resident.detach()
    with torch.no_grad():
        assert torch.equal(logits(back, tiny_batch("bert")), bare)
    assert not resident.names


def test_threads_share_the_places(source: Counted, model: Any) -> None:
    batch = tiny_batch("bert")
    wanted = {name: answers(ResidentAdapters(tiny_model("bert"), source, capacity=1), name) for name in NAMES}
    resident = ResidentAdapters(model, source, capacity=2)
    wrong: list[object] = []

    def work(start: int) -> None:
        try:
            for turn in range(12):
                name = NAMES[(start + turn * (start + 1)) % len(NAMES)]
                with resident.route(name), torch.no_grad():
                    got = logits(resident.model, batch)
                if not torch.allclose(got, wanted[name], atol=1e-5):
                    wrong.append(name)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert len(resident.names) <= 2
