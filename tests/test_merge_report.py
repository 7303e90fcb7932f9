"""The merge report against cases worked out by hand, dense matrices and SciPy's principal angles."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import scipy.linalg
import torch
from torch import Tensor

from graftory.adapter import Adapter, AdapterSpec
from graftory.compose import merge
from graftory.compose.merge.report import MergeReport, Retention, advise, interference, merge_report
from graftory.compose.merge.report.picture import check_picture, draw_report
from graftory.config import LoraConfig
from graftory.errors import ConfigError, MergeError
from tests.merge_oracles import regauged
from tests.test_compose_merge import BASE, SITES, bottleneck, delta, lora

PATH = "layer.0.query"


def product(left: list[list[float]], right: list[list[float]]) -> Adapter:
    """An adapter whose update of one module is left right."""
    b, a = torch.tensor(left), torch.tensor(right)
    config = LoraConfig(targets=(PATH,), rank=len(a), alpha=float(len(a)))
    return Adapter(AdapterSpec(BASE, config), {f"{PATH}.lora_A.weight": a, f"{PATH}.lora_B.weight": b})


def negative(adapter: Adapter) -> Adapter:
    turned = {key: -value if ".lora_B." in key else value for key, value in adapter.tensors.items()}
    return Adapter(adapter.spec, turned)


FIRST = product([[2.0], [0.0], [0.0]], [[1.0, 0.0]])
SECOND = product([[0.0], [1.0], [0.0]], [[0.0, 1.0]])


def test_orthogonal_adapters_do_not_interfere() -> None:
    adapters = {"first": FIRST, "second": SECOND}
    found = interference(adapters, merge([FIRST, SECOND], weights=[1.0, 1.0]))
    (pair,) = found.pairs
    assert (pair.sign_conflict, pair.write_overlap, pair.read_overlap, pair.cosine) == (0.0, 0.0, 0.0, 0.0)
    assert pair.norm_ratio == pytest.approx(2.0)
    for effect in found.effects:
        assert effect.error == pytest.approx(0.0, abs=1e-6)
        assert effect.agreement == pytest.approx(1.0)
    assert advise(found).what == "merge"
    halves = interference(adapters, merge([FIRST, SECOND]))
    assert [effect.error for effect in halves.effects] == pytest.approx([0.5, 0.5])
    assert [effect.agreement for effect in halves.effects] == pytest.approx([1.0, 1.0])


def test_an_adapter_and_its_negative_are_nothing_but_conflict() -> None:
    one = lora(1)
    found = interference({"one": one, "other": negative(one)}, merge([one, negative(one)]))
    (pair,) = found.pairs
    assert pair.sign_conflict == 1.0
    assert (pair.write_overlap, pair.read_overlap, pair.norm_ratio) == pytest.approx((1.0, 1.0, 1.0))
    assert pair.cosine == pytest.approx(-1.0)
    assert [effect.error for effect in found.effects] == pytest.approx([1.0, 1.0])
    assert [effect.agreement for effect in found.effects] == pytest.approx([0.0, 0.0], abs=1e-5)
    advice = advise(found)
    assert advice.what == "route"
    assert "below 0.71" in advice.reason


def test_conflicts_are_counted_where_both_change_something() -> None:
    """Entries (1, -1, 0, 2) and (1, 1, 5, 0): of the two that both change, one has opposite signs."""
    one, other = product([[1.0]], [[1.0, -1.0, 0.0, 2.0]]), product([[1.0]], [[1.0, 1.0, 5.0, 0.0]])
    (pair,) = interference({"one": one, "other": other}, merge([one, other])).pairs
    assert pair.sign_conflict == 0.5


def matrices(adapter: Adapter) -> Tensor:
    return delta(adapter, PATH)


def test_every_number_against_dense_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["graftory.compose.merge.dense"], "BLOCK", 40)
    one, other = lora(1, rank=2, targets=SITES[:1]), lora(2, rank=4, alpha=3.0, targets=SITES[:1])
    merged = merge([one, other], weights=[0.7, -0.2])
    inputs = [{PATH: torch.randn(30, 10, generator=torch.Generator().manual_seed(n))} for n in range(2)]
    found = interference({"one": one, "other": other}, merged, inputs)
    ((pair,), effects) = (found.places[0].pairs, found.places[0].effects)
    first, second = matrices(one), matrices(other)
    assert pair.sign_conflict == pytest.approx(float((first * second < 0).double().mean()))
    for got, left, right in (
        (pair.write_overlap, first, second),
        (pair.read_overlap, first.T, second.T),
    ):
        angles = scipy.linalg.subspace_angles(
            scipy.linalg.orth(left.numpy(), 1e-6), scipy.linalg.orth(right.numpy(), 1e-6)
        )
        assert len(angles) == 2
        assert got == pytest.approx(sum(math.cos(angle) ** 2 for angle in angles) / 2, abs=1e-6)
    assert pair.norm_ratio == pytest.approx(float(first.norm() / second.norm()))
    assert pair.cosine == pytest.approx(float((first * second).sum() / first.norm() / second.norm()), abs=1e-6)
    whole = 0.7 * first - 0.2 * second
    for effect, own, x in zip(effects, (first, second), (given[PATH].double().T for given in inputs), strict=True):
        assert effect.error == pytest.approx(float((whole @ x - own @ x).norm() / (own @ x).norm()), rel=1e-5)
        products = float((whole @ x * (own @ x)).sum() / (whole @ x).norm() / (own @ x).norm())
        assert effect.agreement == pytest.approx(products, abs=1e-6)
    assert found.by_inputs


def test_how_an_adapter_is_written_down_does_not_matter() -> None:
    one, other = lora(1), lora(2)
    merged = merge([one, other])
    found = interference({"one": one, "other": other}, merged)
    again = interference({"one": regauged(one, 1), "other": regauged(other, 2)}, regauged(merged, 3))
    for pair, twin in zip(found.pairs, again.pairs, strict=True):
        assert (pair.write_overlap, pair.read_overlap) == pytest.approx(
            (twin.write_overlap, twin.read_overlap), abs=1e-4
        )
    for effect, same in zip(found.effects, again.effects, strict=True):
        assert effect.error == pytest.approx(same.error, abs=1e-4)


def test_an_adapter_that_leaves_a_module_alone_is_in_no_pair_there() -> None:
    one, other = lora(1, targets=SITES[:1]), lora(2, targets=SITES[:2])
    found = interference({"one": one, "other": other}, merge([one, other]))
    assert [(place.path, len(place.pairs), len(place.effects)) for place in found.places] == [
        (SITES[0], 1, 2),
        (SITES[1], 0, 1),
    ]


def test_an_adapter_that_does_nothing_has_no_error() -> None:
    fresh = product([[0.0], [0.0], [0.0]], [[1.0, 2.0]])
    found = interference({"fresh": fresh, "first": FIRST}, merge([fresh, FIRST]))
    assert found.effects[0].error is None
    assert found.pairs[0].sign_conflict == 0.0


def kept(task: str, own: float, merged: float, share: float | None) -> Retention:
    return Retention(task, task, "accuracy", 50, 0.1, own, merged, share)


@pytest.mark.parametrize(
    ("shares", "what", "said"),
    [
        ((0.97, 0.96), "merge", "least b, 96.0%"),
        ((0.97, 0.5), "route", "b keeps only 50.0%"),
        ((None, 0.5), "route", "b keeps only 50.0%"),
        ((None, None), "merge", "agree by 1.00"),
    ],
)
def test_the_task_that_loses_most_decides(shares: tuple[float | None, float | None], what: str, said: str) -> None:
    found = interference({"first": FIRST, "second": SECOND}, merge([FIRST, SECOND]))
    advice = advise(found, [kept(name, 0.8, 0.8, share) for name, share in zip("ab", shares, strict=True)])
    assert advice.what == what
    assert said in advice.reason
    if shares == (0.97, 0.5):
        assert advise(found, [kept("b", 0.8, 0.4, 0.5)], keep=0.5).what == "merge"


def report() -> MergeReport:
    return merge_report({"first": FIRST, "second": SECOND}, merge([FIRST, SECOND]))


def test_the_same_report_gives_the_same_picture() -> None:
    found = report()
    assert found.method == "linear"
    assert draw_report(found).startswith(b"\x89PNG")
    measured = MergeReport("linear", found.interference, (kept("a", 0.8, 0.8, 1.0),), found.advice)
    svg = draw_report(measured, "svg")
    assert b"sign conflict" in svg
    assert b"its own adapter" in svg
    again = report()
    assert svg == draw_report(MergeReport("linear", again.interference, measured.retention, again.advice), "svg")


def test_pictures_that_cannot_be_written_are_refused_first(tmp_path: Path) -> None:
    assert check_picture(tmp_path / "a.SVG") == tmp_path / "a.SVG"
    with pytest.raises(ConfigError, match=r"wanted \.png, \.svg, \.pdf"):
        check_picture(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="make it first"):
        check_picture(tmp_path / "gone" / "a.png")


def test_what_has_no_update_of_weights_is_refused() -> None:
    one, other = bottleneck(1), bottleneck(2)
    with pytest.raises(MergeError, match="no update of a weight to compare"):
        interference({"one": one, "other": other}, merge([one, other]))
    with pytest.raises(MergeError, match="inputs of 1 for 2"):
        interference({"first": FIRST, "second": SECOND}, merge([FIRST, SECOND]), [{}])
