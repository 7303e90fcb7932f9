"""Banks: weights of many adapters in one tensor, a view of it for each; and what the runtime makes of them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from graftory import Adapter, BottleneckConfig, LoraConfig, attach, new_adapter
from graftory.adapters import AdaptedModel
from graftory.adapters.bank import Bank
from graftory.adapters.banked_site import BankedSite, dropout_of
from graftory.config import NormedBottleneckConfig
from tests.adapter_samples import ROWS, eight, logits, make
from tests.conftest import tiny_batch, tiny_model

PARTS = ("a", "b")


def weights(rank: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(rank, 4, generator=generator), "b": torch.randn(3, rank, generator=generator)}


def filled(ranks: dict[str, int], places: int = 0) -> tuple[Bank, dict[str, dict[str, nn.Parameter]]]:
    bank = Bank(PARTS)
    bank.reserve(places)
    return bank, {slot: bank.put(slot, weights(rank, rank), float(rank)) for slot, rank in ranks.items()}


def test_parameters_are_views_of_the_bank_and_zeros_are_behind_them() -> None:
    bank, views = filled({"x": 2, "y": 5, "z": 3})
    assert bank.whole("a").shape == (4, 5, 4)
    assert bank.whole("b").shape == (4, 3, 5)
    for slot, rank in {"x": 2, "y": 5, "z": 3}.items():
        place = bank.place_of(slot)
        assert torch.equal(bank.whole("a")[place, :rank], weights(rank, rank)["a"])
        assert not bank.whole("a")[place, rank:].any()
        assert not bank.whole("b")[place, :, rank:].any()
        assert (float(bank.scales()[place]), int(bank.sizes()[place])) == (rank, rank)
        with torch.no_grad():
            views[slot]["b"].add_(1.0)
        assert torch.equal(bank.whole("b")[place, :, :rank], weights(rank, rank)["b"] + 1.0)


def test_one_comes_and_goes_and_the_others_stay_where_they_are() -> None:
    bank, views = filled({"x": 2, "y": 5, "z": 3}, places=4)
    where = bank.whole("a").data_ptr(), views["y"]["a"].data_ptr()
    version = bank.whole("a")._version
    bank.drop("x")
    bank.put("w", weights(1, 9), 1.0)
    bank.put("v", weights(4, 8), 1.0)
    assert bank.layout == ("w", "y", "z", "v")
    assert where == (bank.whole("a").data_ptr(), views["y"]["a"].data_ptr())
    assert bank.whole("a")._version == version, "what autograd saved of the others is still good"
    assert not bank.whole("a")[0, 1:].any(), "nothing is left of the one before"


@pytest.mark.parametrize("more", [2, 7])
def test_a_bank_that_is_full_or_too_narrow_moves_and_its_parameters_go_along(more: int) -> None:
    bank, views = filled({"x": 2, "y": 3})
    optimizer = torch.optim.SGD([views["x"]["a"]], lr=1.0)
    bank.put("z", weights(more, more), 1.0)
    views["x"]["a"].grad = torch.ones(2, 4)
    optimizer.step()
    assert torch.equal(bank.whole("a")[0, :2], weights(2, 2)["a"] - 1.0)
    assert torch.equal(bank.whole("a")[1, :3], weights(3, 3)["a"])
    assert torch.equal(bank.whole("b")[2, :, :more], weights(more, more)["b"])


@pytest.mark.parametrize("slots", [("x", "y", "z"), ("z", "x")])
def test_joined_gives_each_parameter_its_own_gradient(slots: tuple[str, ...]) -> None:
    bank, views = filled({"x": 2, "y": 5, "z": 3})
    views["y"]["a"].requires_grad_(False)
    joined = bank.joined("a", slots)
    factor = torch.randn(joined.shape)
    (joined * factor).sum().backward()
    for number, slot in enumerate(slots):
        view = views[slot]["a"]
        assert torch.equal(joined[number, : len(view)], view.detach())
        if slot == "y":
            assert view.grad is None
        else:
            assert view.grad is not None
            assert torch.equal(view.grad, factor[number, : len(view)])


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    bank, views = filled({"x": 2, "y": 2})
    loss = bank.joined("a", ("x", "y")).square().sum()
    with torch.no_grad():
        views["x"]["a"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_dropout_has_the_rate_of_each_rows_own_adapters() -> None:
    torch.manual_seed(0)
    index = torch.tensor([[0, 1], [1, -1], [2, 0]])
    kept = dropout_of([0.0, 0.5, 0.9], index, (3, 4000, 2 * 5))
    assert kept is not None
    shares = (kept == 0).float().view(3, 4000, 2, 5).mean((1, 3))
    torch.testing.assert_close(shares[:, 0], torch.tensor([0.0, 0.5, 0.9]), atol=0.02, rtol=0)
    assert float(shares[0, 1]) == pytest.approx(0.5, abs=0.02)
    assert float(kept[2].max()) == pytest.approx(10.0)
    assert float(kept[2].mean((0, 1))[:5].mean() if kept.dim() > 3 else kept[2][:, :5].mean()) == pytest.approx(
        1, abs=0.1
    )
    assert dropout_of([0.0, 0.0], index.clamp(max=1), (3, 2)) is None


def banks_of(adapted: AdaptedModel) -> list[Bank]:
    return [bank for site in adapted.sites.values() if isinstance(site, BankedSite) for bank in site.banks]


def test_a_model_that_is_moved_takes_its_banks_along() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapters = eight(model)
    double = {
        name: replace(each, tensors={key: value.double() for key, value in each.tensors.items()})
        for name, each in adapters.items()
    }
    wanted = attach(copy.deepcopy(model).double(), double, check_base=False)
    adapted = attach(model, adapters)
    adapted.to(torch.float64)
    assert {dtype for bank in banks_of(adapted) for dtype in bank.dtypes} == {torch.float64}
    with adapted.route(ROWS), wanted.route(ROWS), torch.no_grad():
        torch.testing.assert_close(logits(adapted, batch), logits(wanted, batch))
    with torch.no_grad():
        for weight in adapted.weights("large").values():
            weight.zero_()
    for site in adapted.sites.values():
        assert isinstance(site, BankedSite)
        slot = adapted.slot_of("large")
        for bank in site.banks:
            if slot in bank.layout:
                assert not bank.whole(bank.parts[0])[bank.place_of(slot)].any(), "still a view"


def test_weights_of_a_mixture_learn() -> None:
    """Central differences, in double precision."""
    model, batch = tiny_model("bert").double(), tiny_batch("bert")
    adapters = {
        "a": make(model, LoraConfig(rank=2, targets=("all",)), seed=1),
        "b": make(model, BottleneckConfig(size=3), seed=2),
        "c": make(model, LoraConfig(rank=4, targets=("all",)), seed=3),
    }
    adapted = attach(model, adapters, check_base=False).double()
    share = torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64, requires_grad=True)

    def loss(values: Tensor) -> Tensor:
        row = {"a": values[0], "b": values[1], "c": values[2]}
        with adapted.route([row, "a", row, None] * 2):
            return logits(adapted, batch).square().sum()

    loss(share).backward()
    assert share.grad is not None
    for at in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[at] = 1e-5
        with torch.no_grad():
            slope = (loss(share + step) - loss(share - step)) / 2e-5
        assert float(share.grad[at]) == pytest.approx(float(slope), rel=1e-5)
        assert abs(float(slope)) > 1e-6


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=3, targets=("all",)),
        BottleneckConfig(size=3, placement="houlsby"),
        NormedBottleneckConfig(size=3, placement="houlsby"),
        BottleneckConfig(size=3),
    ],
    ids=lambda config: config.method,
)
def test_a_mixture_of_an_adapter_with_itself_halved_is_the_adapter(config: LoraConfig | BottleneckConfig) -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    one = make(model, config, seed=1)
    adapted = attach(model, {"a": one, "again": one, "other": make(model, config, seed=2)})
    rows = ["a", {"a": 0.5, "again": 0.5}, None, {"other": 0.0, "a": 1.0}, {"again": 1.0}, "other", None, "a"]
    with torch.no_grad():
        with adapted.route("a"):
            alone = logits(adapted, batch)
        with adapted.route(rows):
            mixed = logits(adapted, batch)
    torch.testing.assert_close(mixed[[0, 1, 3, 4, 7]], alone[[0, 1, 3, 4, 7]], atol=2e-6, rtol=2e-6)
    assert not torch.allclose(mixed[5], alone[5], atol=1e-4)


def gradients(adapted: AdaptedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    adapted.zero_grad()
    with adapted.route(ROWS):
        out = logits(adapted, batch)
        out.masked_fill(torch.isneginf(out), 0.0).float().square().sum().backward()
    return {name: weight.grad.clone() for name, weight in adapted.named_parameters() if weight.grad is not None}


def test_checkpointing_of_gradients_changes_none() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapted = attach(model, eight(model))
    adapted.train_only(*adapted.names)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    plain = gradients(adapted, batch)
    model.activation_checkpointing_enable({"use_reentrant": False})
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = model.bert.encoder.layer[0].attention.self.query.register_forward_hook(count)
    again = gradients(adapted, batch)
    handle.remove()
    assert calls == 2, "the forward ran again"
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert torch.equal(grad, again[name]), name


def test_mixed_precision_trains_a_mixed_batch() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapted = attach(model, eight(model))
    adapted.train_only(*adapted.names)
    plain = gradients(adapted, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(adapted, batch)
    assert plain.keys() == mixed.keys()
    for name, grad in plain.items():
        assert mixed[name].dtype == torch.float32
        error = (mixed[name] - grad).norm() / grad.norm()
        assert float(error) < 0.1, name


def test_an_adapter_of_two_dtypes_comes_back_as_it_went_in() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    adapter = new_adapter(model, LoraConfig(rank=2))
    mixed = {key: value.bfloat16() if "lora_A" in key else value + 0.5 for key, value in adapter.tensors.items()}
    widened = {key: value.float() for key, value in mixed.items()}
    adapted = attach(model, {"mixed": Adapter(adapter.spec, mixed), "wide": Adapter(adapter.spec, widened)})
    with torch.no_grad():
        with adapted.route("mixed"):
            got = logits(adapted, batch)
        with adapted.route("wide"):
            assert torch.equal(got, logits(adapted, batch))
    for key, value in adapted.extract("mixed").tensors.items():
        assert torch.equal(value, mixed[key])
        assert value.dtype == mixed[key].dtype
