"""The native codec: round trip, and every way in which tensors and specification can disagree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftory.adapter import Adapter, TaskInfo
from graftory.errors import CorruptAdapterError, UnsupportedAdapterError
from graftory.hub import Hub
from tests.hub_samples import bottleneck, lora, same


def test_round_trip_through_hub_and_folder(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    ref = hub.put("a", bottleneck())
    assert same(hub.get(ref), bottleneck())
    out = hub.materialize(ref, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"adapter.safetensors", "graftory.json"}
    other = Hub.create(tmp_path / "other")
    assert same(other.get(other.add(out, name="b")), bottleneck())
    assert other.record("b").digest == hub.record("a").digest


def test_a_head_travels_along(tmp_path: Path) -> None:
    plain = bottleneck()
    task = TaskInfo("t", "regression", head=("head",))
    adapter = Adapter(replace(plain.spec, task=task), {**plain.tensors, "head.weight": torch.ones(1, 4)})
    hub = Hub.create(tmp_path / "hub")
    assert same(hub.get(hub.put("a", adapter)), adapter)
    with pytest.raises(CorruptAdapterError, match="lists the head 'head'"):
        hub.put("b", Adapter(adapter.spec, plain.tensors))


Change = Callable[[dict[str, Tensor]], object]
BAD: list[tuple[str, Change, type[Exception], str]] = [
    ("unknown key", lambda t: t.update({"m.0.gate": torch.ones(1)}), UnsupportedAdapterError, "m.0.gate"),
    ("missing bias", lambda t: t.pop("m.0.adapter_up.bias"), CorruptAdapterError, "m.0"),
    ("wrong size", lambda t: t.update({"m.0.adapter_down.bias": torch.ones(3)}), CorruptAdapterError, "size 2"),
    ("wrong width", lambda t: t.update({"m.1.adapter_up.weight": torch.ones(5, 3)}), CorruptAdapterError, "m.1"),
    (
        "site not listed",
        lambda t: t.update({key.replace("m.0", "m.9"): value.clone() for key, value in t.items()}),
        CorruptAdapterError,
        "m.9",
    ),
    (
        "not finite",
        lambda t: t.update({"m.1.adapter_up.bias": torch.full((4,), torch.nan)}),
        CorruptAdapterError,
        "NaN",
    ),
    ("integers", lambda t: t.update({"m.1.adapter_up.bias": torch.ones(4).int()}), UnsupportedAdapterError, "I32"),
]


@pytest.mark.parametrize(("change", "error", "text"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_disagreement_is_refused(change: Change, error: type[Exception], text: str, tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    tensors = dict(bottleneck().tensors)
    change(tensors)
    with pytest.raises(error, match=text):
        hub.put("a", Adapter(bottleneck().spec, tensors))
    assert hub.index() == ()


def test_weights_alone_say_too_little(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    out = hub.materialize(hub.put("a", bottleneck()), tmp_path / "out")
    (out / "graftory.json").unlink()
    with pytest.raises(CorruptAdapterError, match=r"without graftory\.json"):
        hub.add(out, name="b")


def test_sidecar_of_another_method_is_refused(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    ours = hub.materialize(hub.put("a", bottleneck()), tmp_path / "a")
    peft = hub.materialize(hub.put("b", lora()), tmp_path / "b")
    (peft / "graftory.json").write_bytes((ours / "graftory.json").read_bytes())
    with pytest.raises(CorruptAdapterError, match="another"):
        hub.add(peft, name="c")
