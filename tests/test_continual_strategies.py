"""Every strategy against something that is not its own code: closed forms, sums by hand, what its paper promises."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftory.adapter import Adapter
from graftory.adapters import AdaptedModel, attach, new_adapter
from graftory.config import AdapterConfig, BottleneckConfig, LoraConfig
from graftory.continual.memory import Memory, Sample
from graftory.continual.stack import stacked
from graftory.continual.strategies import agem
from graftory.continual.strategies.agem import project
from graftory.continual.strategies.ewc import penalty
from graftory.continual.strategies.inflora import directions, grown
from graftory.continual.strategies.lwf import distance
from graftory.continual.strategies.migu import loudest
from graftory.continual.strategies.olora import overlap
from graftory.continual.strategies.opcm import factors, projected, singular
from graftory.continual.strategies.replay import drift
from graftory.continual.strategies.sdlora import decoupled
from graftory.continual.strategies.slao import orthonormal
from graftory.data import load_rows, load_task
from graftory.training import Job, LoadedBase, evaluate, load_base
from tests.continual_samples import SHORT, Run, make_place, short_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def loaded(place: Path) -> LoadedBase:
    return load_base(str(place / "base"), "classification")


@pytest.fixture(scope="module")
def run_of(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Two tasks with a strategy: its report, its versions, its folder. The same run is made once."""
    made: dict[str, Run] = {}

    def run(strategy: str, **changes: Any) -> Run:
        key = f"{strategy} {sorted(changes.items())}"
        if key not in made:
            root = tmp_path_factory.mktemp("run")
            made[key] = short_run(place, root, strategy, ["colours", "animals"], **changes)
        return made[key]

    return run


def part(adapter: Adapter, end: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in adapter.body_tensors().items() if key.endswith(end)}


# --- ewc -------------------------------------------------------------------------------------------------------------


def test_ewc_without_strength_is_seq_bit_for_bit(run_of: Callable[..., Run]) -> None:
    plain, free = run_of("seq"), run_of("ewc", parameters={"strength": 0.0})
    assert free[0].matrix == plain[0].matrix
    for one, other in zip(plain[1], free[1], strict=True):
        assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
    held = run_of("ewc", parameters={"strength": 1e4})
    assert not all(torch.equal(plain[1][1].tensors[key], held[1][1].tensors[key]) for key in plain[1][1].tensors)


def test_ewc_with_much_strength_holds_what_mattered(run_of: Callable[..., Run]) -> None:
    """Weighted by importance, the way from task 1 to task 2 is far shorter than that of `seq`."""
    held = run_of("ewc", parameters={"strength": 1e4})
    importance = held[2].kept(held[2].commits()[0]).under("ewc").tensors
    ways = []
    for _, (first, second), _ in (run_of("seq"), held):
        ways.append(sum(float((w * (second.tensors[k] - first.tensors[k]) ** 2).sum()) for k, w in importance.items()))
    assert ways[1] < 0.1 * ways[0]


def test_ewc_penalty_by_hand() -> None:
    weights = {"a": torch.tensor([1.0, 2.0], requires_grad=True), "b": torch.tensor([[3.0]], requires_grad=True)}
    anchor, importance = {"a": torch.tensor([0.0, 2.5]), "b": torch.tensor([[1.0]])}, {}
    importance = {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([[0.5]])}
    value = penalty(weights, anchor, importance)
    assert value.item() == pytest.approx(0.5 * (2 * 1 + 4 * 0.25 + 0.5 * 4))
    value.backward()
    gradient = weights["a"].grad
    assert gradient is not None
    assert gradient.tolist() == [2.0 * 1.0, 4.0 * -0.5]


# --- lwf -------------------------------------------------------------------------------------------------------------


def test_lwf_distance_by_hand() -> None:
    """Two outputs, T = 2: p_old = σ(ln 3) = (3/4, 1/4), p_new = (1/2, 1/2)."""
    old, new = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.tensor([[5.0, 5.0]])
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert float(distance(old, new, 2.0)) == pytest.approx(expected, rel=1e-6)
    assert float(distance(old, old, 2.0)) == 0
    assert float(distance(torch.tensor([[1.0]]), torch.tensor([[3.0]]), 2.0)) == 4
    tokens = torch.stack([old, new], dim=1)
    counted = torch.tensor([[7, -100]])
    assert float(distance(tokens, tokens.flip(1), 2.0, counted)) == pytest.approx(expected, rel=1e-6)


def test_lwf_keeps_old_outputs_closer(run_of: Callable[..., Run], place: Path, loaded: LoadedBase) -> None:
    texts = load_rows(load_task(str(place / "animals.yaml")), "train", limit=48, seed=3).texts

    def away(run: Run) -> float:
        """How far the first task's outputs are from what they were, on the second task's training rows."""
        first, second = run[1]
        adapted = attach(loaded.model, {"old": first, "new": second})
        batch = loaded.tokenizer(list(texts), padding=True, return_tensors="pt")
        logits = []
        for body in ("old", "new"):
            with torch.no_grad(), adapted.route(body, heads="old"):
                logits.append(adapted(**batch).logits)
        adapted.detach()
        return float(distance(logits[0], logits[1], 2.0))

    assert away(run_of("lwf", parameters={"strength": 10.0})) < 0.3 * away(run_of("seq"))


def test_lwf_runs_the_old_body_once_a_step_whatever_the_number_of_heads(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And learns what it would if both bodies were run for every head."""
    forwards: list[bool] = []
    plain = AdaptedModel.forward

    def counted(self: AdaptedModel, *args: Any, **kwargs: Any) -> Any:
        forwards.append(self.training)
        return plain(self, *args, **kwargs)

    def adapters(name: str) -> list[Adapter]:
        forwards.clear()
        return short_run(place, tmp_path / name, "lwf", ["colours", "animals", "tools"])[1]

    monkeypatch.setattr(AdaptedModel, "forward", counted)
    once = adapters("once")
    assert sum(forwards) == SHORT["max_steps"] * (1 + 2 + 2)
    monkeypatch.setattr(AdaptedModel, "through_heads", lambda *_: None)
    often = adapters("often")
    assert sum(forwards) == SHORT["max_steps"] * (1 + 3 + 5)
    for one, other in zip(once, often, strict=True):
        assert all(torch.allclose(one.tensors[key], other.tensors[key], atol=1e-5) for key in one.tensors)


# --- a-gem, replay ---------------------------------------------------------------------------------------------------


def test_agem_projection_in_closed_form() -> None:
    g, reference = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-1.0, 1.0, 0.0])
    expected = g - (g @ reference) / (reference @ reference) * reference
    pieces, others = [g[:1].clone(), g[1:].clone()], [reference[:1], reference[1:]]
    project(pieces, others)
    assert torch.allclose(torch.cat(pieces), expected)
    assert float(torch.cat(pieces) @ reference) >= -1e-6
    along = [torch.tensor([2.0, 1.0])]
    project(along, [torch.tensor([1.0, 0.0])])
    assert along[0].tolist() == [2.0, 1.0]


def test_agem_steps_do_old_rows_no_harm(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[float] = []
    after: list[float] = []

    def watched(gradients: list[Tensor], reference: list[Tensor]) -> None:
        before.append(float(sum((g * r).sum() for g, r in zip(gradients, reference, strict=True))))
        size = math.sqrt(float(sum((r * r).sum() for r in reference)) * float(sum((g * g).sum() for g in gradients)))
        project(gradients, reference)
        after.append(float(sum((g * r).sum() for g, r in zip(gradients, reference, strict=True))) / size)

    monkeypatch.setattr(agem, "project", watched)
    short_run(place, tmp_path, "a-gem", ["colours", "animals"])
    assert len(before) == 12
    assert min(before) < 0
    assert min(after) >= -1e-6


def test_the_reservoir_is_bounded_even_and_the_same_for_the_same_seed() -> None:
    rows = [Sample("a", (str(number),), number) for number in range(40)]
    assert Memory().grown(rows, 8, 1) == Memory().grown(rows, 8, 1) != Memory().grown(rows, 8, 2)
    assert Memory().grown(rows[:25], 8, 1).seen == 25
    picked: Counter[int] = Counter()
    for seed in range(2000):
        memory = Memory().grown(rows[:10], 8, seed).grown(rows[10:], 8, seed + 10_000)
        assert len(memory.samples) == 8
        assert memory.seen == 40
        picked.update(sample.target for sample in memory.samples)
    # each row stays with probability 8 / 40: 400 of 2000, standard deviation 18
    assert all(310 < picked[number] < 490 for number in range(40))
    batch = memory.draw(5, 3, 7)
    assert batch == memory.draw(5, 3, 7) != memory.draw(5, 3, 8)
    assert len({sample.target for sample in batch}) == 5


def test_replay_keeps_a_bounded_buffer_and_learns_old_heads_on(
    run_of: Callable[..., Run], place: Path, loaded: LoadedBase
) -> None:
    parameters, long = {"capacity": 20, "batch": 8, "alpha": 0.5}, {**SHORT, "max_steps": 24}
    report, versions, folder = run_of("replay", parameters=parameters, train=long)
    assert report.storage[1]["replay"] < 4000
    kept = folder.kept(folder.commits()[1])
    samples = kept.values["replay/memory"]["samples"]
    assert len(samples) == 20
    assert {sample["task"] for sample in samples} == {"colours", "animals"}
    assert {len(sample["logits"]) for sample in samples if sample["task"] == "animals"} == {3}
    head = kept.tensors["heads/colours/classifier.weight"]
    assert head.shape == versions[0].tensors["classifier.weight"].shape
    assert not torch.equal(head, versions[0].tensors["classifier.weight"])
    old = Adapter(versions[0].spec, {**versions[0].tensors, "classifier.weight": head})
    old = replace(old, tensors={**old.tensors, "classifier.bias": kept.tensors["heads/colours/classifier.bias"]})
    plain = run_of("seq", train=long)[1]
    assert loss_of(place, loaded, versions[1], old) < 0.5 * loss_of(place, loaded, plain[1], plain[0])


def loss_of(place: Path, loaded: LoadedBase, body: Adapter, head: Adapter) -> float:
    """On the first task's test rows."""
    task = load_task(str(place / "colours.yaml"))
    [metrics] = evaluate(loaded, [Job("a", body, head, task, load_rows(task, "test", limit=30, seed=3))])
    return metrics[1].value


def test_the_distance_to_old_logits_by_hand() -> None:
    samples = (Sample("a", ("x",), 0, (1.0, 2.0)), Sample("b", ("y",), 0, (0.0, 0.0, 3.0)))
    logits = torch.tensor([[2.0, 2.0, -math.inf], [0.0, 0.0, 0.0]])
    assert float(drift(logits, samples)) == pytest.approx((1 / 2 + 9 / 3) / 2)


# --- migu ------------------------------------------------------------------------------------------------------------


def test_the_loudest_units_by_hand() -> None:
    """|h| / ‖h‖₁ is (.1 .2 .7 0) and (.5 .1 .1 .3), their mean (.3 .15 .4 .15); the second would win by size."""
    outputs = torch.tensor([[-0.1, 0.2, -0.7, 0.0], [50.0, 10.0, -10.0, 30.0]])
    assert loudest(outputs, 0.25).tolist() == [0, 0, 1, 0]
    assert loudest(outputs, 0.5).tolist() == [1, 0, 1, 0]
    assert loudest(outputs, 0.01).sum() == 1


def test_migu_changes_only_some_rows_in_a_step(run_of: Callable[..., Run]) -> None:
    one = {"max_steps": 1, "learning_rate": 0.01, "batch_size": 8, "weight_decay": 0.0, "warmup": 0.0}
    masked, plain = run_of("migu", train=one, parameters={"share": 0.25}), run_of("seq", train=one)
    changed: dict[str, dict[str, int]] = {}
    for name, (_, versions, _) in (("migu", masked), ("seq", plain)):
        # B starts at zero, so a row that is not has been updated
        ups = part(versions[0], "lora_B.weight")
        changed[name] = {key: int((b != 0).any(1).sum()) for key, b in ups.items()}
    rows = {key: len(b) for key, b in part(plain[1][0], "lora_B.weight").items()}
    assert changed["seq"] == rows
    assert changed["migu"] == {key: round(0.25 * number) for key, number in rows.items()}


# --- sums of adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [LoraConfig(rank=3, targets=("all",)), LoraConfig(rank=2, rslora=True, alpha=5.0), BottleneckConfig(size=4)],
    ids=["lora", "rslora", "bottleneck"],
)
def test_a_stacked_adapter_is_the_sum(loaded: LoadedBase, config: AdapterConfig) -> None:
    adapters = []
    for seed in range(3):
        fresh = new_adapter(loaded.model, replace(config, init_seed=seed), base=loaded.base)
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(value.shape, generator=generator) / 4 for key, value in fresh.tensors.items()}
        adapters.append(Adapter(fresh.spec, tensors))
    whole = stacked(stacked(adapters[0], adapters[1]), adapters[2])
    adapted = attach(loaded.model, {**{str(i): each for i, each in enumerate(adapters)}, "whole": whole})
    batch = loaded.tokenizer(["red paint", "owl zoo river"], padding=True, return_tensors="pt")
    logits = []
    for route in ([{"0": 1.0, "1": 1.0, "2": 1.0}], [{"whole": 1.0}]):
        with torch.no_grad(), adapted.route(route):
            logits.append(adapted(**batch).logits)
    adapted.detach()
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert whole.spec.config.init_seed is None


def test_olora_overlap_by_hand() -> None:
    old = {"x.a": torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])}
    new = {"x.a": torch.tensor([[3.0, -1.0]]), "x.b": torch.ones(2, 1)}
    by_hand = (abs(3.0) + abs(-2.0) + abs(2.0)) / 1**2
    assert float(overlap(old, new)) == pytest.approx(by_hand)
    two = overlap({"p": torch.eye(2), "q": torch.eye(2)}, {"p": torch.ones(2, 2), "q": torch.zeros(2, 2)})
    assert float(two) == pytest.approx((4 / 4 + 0) / 2)


def test_olora_overlap_falls_and_the_first_adapter_stays(run_of: Callable[..., Run]) -> None:
    found = {}
    for strength in (0.0, 200.0):
        _, (first, second), _ = run_of("o-lora", parameters={"orthogonality": strength})
        old = part(first, "lora_A.weight")
        new = {key: a[8:] for key, a in part(second, "lora_A.weight").items()}
        assert all(torch.equal(part(second, "lora_A.weight")[key][:8], a) for key, a in old.items())
        assert all(
            torch.equal(part(second, "lora_B.weight")[key][:, :8], b) for key, b in part(first, "lora_B.weight").items()
        )
        found[strength] = float(overlap(old, new))
    assert found[200.0] < 0.5 * found[0.0]


# --- inflora ---------------------------------------------------------------------------------------------------------


def test_inflora_directions_avoid_the_basis_and_follow_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64) * torch.linspace(3, 0.1, 12)
    moment = x.T @ x
    basis = torch.linalg.qr(torch.randn(12, 4, generator=generator, dtype=torch.float64))[0]
    rows = directions(moment, basis, 3)
    assert float((rows.double() @ basis).abs().max()) <= 1e-6
    # the right singular vectors of the projected inputs, whatever their signs
    off = x @ (torch.eye(12, dtype=torch.float64) - basis @ basis.T)
    leading = torch.linalg.svd(off, full_matrices=False)[2][:3]
    assert torch.allclose((3**0.5 * rows.double() @ leading.T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-5)
    none_left = directions(moment, torch.eye(12, dtype=torch.float64)[:, :11], 3)
    assert [bool(row.any()) for row in none_left] == [True, False, False]


def test_inflora_basis_holds_the_energy_with_as_few_directions_as_possible() -> None:
    moment = torch.diag(torch.tensor([50.0, 30.0, 15.0, 5.0], dtype=torch.float64))
    first = grown(None, moment, 0.9)
    assert first.shape == (4, 3)
    assert grown(None, moment, 0.8).shape == (4, 2)
    second = grown(torch.eye(4, dtype=torch.float64)[:, 3:], moment, 0.8)
    assert second.shape == (4, 3)  # 5 + 50 < 80 <= 5 + 50 + 30
    assert torch.allclose(second.T @ second, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert grown(torch.eye(4, dtype=torch.float64), moment, 1.0).shape == (4, 4)


def test_inflora_updates_are_orthogonal_to_what_earlier_tasks_read(run_of: Callable[..., Run]) -> None:
    _, (first, second), folder = run_of("inflora", parameters={"energy": 0.9})
    bases = folder.kept(folder.commits()[0]).under("basis").tensors
    for path, basis in bases.items():
        a, b = second.tensors[f"{path}.lora_A.weight"][8:], second.tensors[f"{path}.lora_B.weight"][:, 8:]
        assert float((b.double() @ a.double() @ basis).abs().max()) <= 1e-5
        assert 0 < basis.shape[1] < basis.shape[0]
    assert any(bool(b[:, 8:].any()) for b in part(second, "lora_B.weight").values())
    later = folder.kept(folder.commits()[1]).under("basis").tensors
    assert all(torch.equal(later[path][:, : basis.shape[1]], basis) for path, basis in bases.items())
    assert all(torch.equal(second.tensors[key][:8], a) for key, a in part(first, "lora_A.weight").items())


# --- sd-lora, slao ---------------------------------------------------------------------------------------------------


def test_sdlora_keeps_directions_and_trains_magnitudes(run_of: Callable[..., Run]) -> None:
    _, (first, second), _ = run_of("sd-lora")
    moved = []
    for path in first.spec.config.targets:
        before, [old] = decoupled(first, path, 8)
        after, [same, _] = decoupled(second, path, 8)
        assert torch.allclose(old, same, atol=1e-6)
        assert torch.equal(second.tensors[f"{path}.lora_A.weight"][:8], first.tensors[f"{path}.lora_A.weight"])
        norms = first.tensors[f"{path}.lora_B.weight"].norm() * first.tensors[f"{path}.lora_A.weight"].norm()
        assert float(before[0]) == pytest.approx(float(norms))
        moved.append(abs(float(after[0] - before[0])))
    assert min(moved) > 1e-4


def test_slao_starts_orthonormal_and_merges_in_closed_form(run_of: Callable[..., Run]) -> None:
    a = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = orthonormal(a)
    assert torch.allclose(rows @ rows.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
    triangle = a @ rows.T  # Aᵀ = Q R, so A Q = Rᵀ: lower triangular with a positive diagonal
    assert torch.allclose(triangle, triangle.tril(), atol=1e-12)
    assert bool((triangle.diagonal() > 0).all())
    report, (first, second), folder = run_of("slao")
    trained = folder.kept(folder.commits()[1]).under("b").tensors
    for key, merged in part(second, "lora_B.weight").items():
        old = first.tensors[key]
        assert torch.allclose(merged, old + (trained[key] - old) / math.sqrt(2), atol=1e-7)
    assert report.storage[0]["adapters"] == report.storage[1]["adapters"]
    assert report.storage[0]["b"] == report.storage[1]["b"]


# --- opcm ------------------------------------------------------------------------------------------------------------


def test_opcm_projection_against_the_sum_over_singular_vectors() -> None:
    """Σ_{i,j>k, i≠j} ⟨τ, u_i v_jᵀ⟩ u_i v_jᵀ term by term, with the singular vectors of the whole matrix."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 4), (4, 6)))
    task = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 3), (3, 6)))
    merged, tau = left @ right, task[0] @ task[1]
    u, sizes, vh = torch.linalg.svd(merged)
    k = next(n for n in range(1, 5) if sizes[:n].sum() >= 0.6 * sizes.sum())
    expected = torch.zeros(9, 6, dtype=torch.float64)
    for i in range(k, 9):
        for j in range(k, 6):
            # of the merged matrix's own directions, those that belong to one singular value are left out
            if i != j or i >= 4:
                expected += (u[:, i] @ tau @ vh[j]) * torch.outer(u[:, i], vh[j])
    low = projected((task[0], task[1]), singular((left, right)), 0.6)
    found = low[0] @ low[1]
    assert 1 < k < 4
    assert torch.allclose(found, expected, atol=1e-12)
    assert float((u[:, :k].T @ found).abs().max()) < 1e-12
    assert float((found @ vh[:k].T).abs().max()) < 1e-12
    assert abs(float((found * merged).sum())) < 1e-11


def product(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[0] @ pair[1]


def test_opcm_adds_what_is_orthogonal_to_what_is_merged_and_keeps_the_norm(run_of: Callable[..., Run]) -> None:
    _, (first, second), folder = run_of("opcm")
    kept = [folder.kept(commit).under("opcm").values for commit in folder.commits()]
    paths = first.spec.config.targets
    before, after = ({p: product(factors(each, p)) for p in paths} for each in (first, second))
    for path in paths:
        added = kept[1]["scale"] * after[path] - before[path]
        u, sizes, vh = torch.linalg.svd(before[path], full_matrices=False)
        k = int((sizes.cumsum(0) < 0.5 * sizes.sum()).sum()) + 1
        size = float(added.norm())
        assert size > 1e-3
        assert float((u[:, :k].T @ added).norm()) < 1e-5 * size
        assert float((added @ vh[:k].T).norm()) < 1e-5 * size
        assert abs(float((added * before[path]).sum())) < 1e-5 * size * float(before[path].norm())
    norms = [math.sqrt(sum(float(matrix.square().sum()) for matrix in each.values())) for each in (before, after)]
    assert norms[0] == pytest.approx(kept[0]["norms"], rel=1e-5)
    assert norms[1] == pytest.approx(kept[1]["norms"] / 2, rel=1e-5)


def test_opcm_does_not_grow(run_of: Callable[..., Run]) -> None:
    report, (first, second), _ = run_of("opcm", parameters={"most": 1})
    assert report.storage[0]["adapters"] == report.storage[1]["adapters"]
    config = second.spec.config
    assert isinstance(config, LoraConfig)
    assert {config.rank_of(path) for path in config.targets} == {8}
    assert not torch.equal(
        *(part(each, "lora_B.weight")[f"{config.targets[0]}.lora_B.weight"] for each in (first, second))
    )
