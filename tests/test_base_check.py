"""Whether an adapter fits a base, told from headers alone, against adapters that graftory made for the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from graftory import Adapter, BottleneckConfig, LoraConfig, new_adapter
from graftory.config import AdapterConfig
from graftory.errors import BaseMismatchError, CorruptAdapterError, DataError
from graftory.hub import Hub
from graftory.hub.base_check import base_shapes, check_fits
from graftory.hub.codecs import codec_of
from tests.conftest import RELATIVES, TINY, tiny_model

CONFIGS: tuple[AdapterConfig, ...] = (
    LoraConfig(targets=("all",)),
    BottleneckConfig(placement="houlsby"),
    BottleneckConfig(placement="pfeiffer"),
    BottleneckConfig(placement="parallel"),
)


def check(adapter: Adapter, folder: Path) -> None:
    codec = codec_of(adapter.spec)
    check_fits(adapter.spec, codec.check(codec.encode(adapter), adapter.spec), base_shapes(folder))


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [*TINY, *RELATIVES])
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    """Fits the task model and the bare backbone; not one of another width, nor one with fewer layers."""
    model = tiny_model(kind)
    whole, bare = saved(model, tmp_path / "whole"), saved(model.base_model, tmp_path / "bare")
    config = model.config
    wide = {name: 64 for name in ("hidden_size", "n_embd", "d_model", "dim") if name in config.to_dict()}
    other = saved(type(model)(type(config).from_dict({**config.to_dict(), **wide})), tmp_path / "wide")
    few: dict[str, Any] = {
        name: 1 for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in config.to_dict()
    }
    few |= {"num_decoder_layers": 1} if kind == "t5" else {}
    few |= {"layer_types": None} if "layer_types" in config.to_dict() else {}
    low = saved(type(model)(type(config).from_dict({**config.to_dict(), **few})), tmp_path / "low")
    for setting in CONFIGS:
        adapter = new_adapter(model, setting)
        check(adapter, whole)
        check(adapter, bare)
        with pytest.raises(BaseMismatchError, match="wide"):
            check(adapter, other)
        with pytest.raises(BaseMismatchError, match=r"no such module|layers"):
            check(adapter, low)


def test_another_architecture(tmp_path: Path) -> None:
    adapter = new_adapter(tiny_model("bert"), LoraConfig())
    with pytest.raises(BaseMismatchError, match=r"architecture 'bert'.*'roberta'"):
        check(adapter, saved(tiny_model("roberta"), tmp_path))


def test_shards(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check(new_adapter(model, LoraConfig(targets=("all",))), tmp_path)
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(DataError, match="is missing"):
        base_shapes(tmp_path)


def test_names_that_the_library_changed(tmp_path: Path) -> None:
    """A copy whose modules are all called something else is judged by its widths."""
    model = tiny_model("bert")
    saved(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.replace("query", "w1").replace("value", "w2"): t for name, t in load_file(path).items()}
    save_file(tensors, path)
    check(new_adapter(model, LoraConfig()), tmp_path)
    with pytest.raises(BaseMismatchError, match="no such module"):
        check(new_adapter(model, LoraConfig(targets=("all",))), tmp_path)


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        ({}, DataError, "no config.json"),
        ({"config.json": b"{}"}, DataError, "model.safetensors"),
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, DataError, "load the base"),
        ({"config.json": b"[]", "model.safetensors": b""}, CorruptAdapterError, "not an object"),
        ({"config.json": b"{}", "model.safetensors": b"\xff" * 8}, CorruptAdapterError, "header"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"{}"}, CorruptAdapterError, "weight_map"),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../b"}}'},
            CorruptAdapterError,
            "weight_map",
        ),
    ],
)
def test_what_is_no_base(tmp_path: Path, content: dict[str, bytes], error: type[Exception], said: str) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=said):
        base_shapes(tmp_path)


def test_nothing_is_fetched_that_does_not_fit(tmp_path: Path) -> None:
    model = tiny_model("bert")
    right = saved(model, tmp_path / "right")
    wrong = saved(tiny_model("gpt2"), tmp_path / "wrong")
    there = Hub.create(tmp_path / "there")
    there.put("a", new_adapter(model, LoraConfig()))
    here = Hub.create(tmp_path / "here")
    with pytest.raises(BaseMismatchError):
        here.pull(f"{there.root.as_uri()}/a", base=wrong)
    assert not (here.root / ".hub" / "blobs").exists()
    assert here.index() == ()
    here.pull(f"{there.root.as_uri()}/a", base=right)
    here.check_base("a", right)
    with pytest.raises(BaseMismatchError):
        here.check_base("a", wrong)


def test_add_can_check_first(tmp_path: Path) -> None:
    model = tiny_model("bert")
    right = saved(model, tmp_path / "right")
    hub = Hub.create(tmp_path / "hub")
    hub.put("a", new_adapter(model, LoraConfig()))
    hub.materialize("a", tmp_path / "files")
    hub.add(tmp_path / "files", name="b", fits=right)
    config = json.loads((right / "config.json").read_text())
    (right / "config.json").write_text(json.dumps({**config, "model_type": "electra"}))
    with pytest.raises(BaseMismatchError):
        hub.add(tmp_path / "files", name="c", fits=right)
