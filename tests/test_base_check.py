"""Whether an adapter fits a base, told from headers alone, against adapters that graftory made for the base."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from graftory import Adapter, BottleneckConfig, LoraConfig, new_adapter
from graftory.adapter import BaseModel
from graftory.cli import cli
from graftory.compose.fusion import new_fusion
from graftory.config import AdapterConfig, ComposedConfig
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
    adapters = [new_adapter(model, setting) for setting in CONFIGS]
    for adapter in (*adapters, new_fusion(model, adapters[:3])):
        check(adapter, whole)
        check(adapter, bare)
        with pytest.raises(BaseMismatchError, match="wide"):
            check(adapter, other)
        with pytest.raises(BaseMismatchError, match=r"no such module|layers"):
            check(adapter, low)


def without_architecture(adapter: Adapter) -> Adapter:
    """As imported from PEFT's files."""
    return replace(adapter, spec=replace(adapter.spec, base=BaseModel("org/base")))


@pytest.mark.parametrize("kind", [*TINY, *RELATIVES])
def test_an_adapter_that_does_not_say_its_architecture(kind: str, tmp_path: Path) -> None:
    """Its modules tell: of another family no name fits, whatever the widths."""
    model = tiny_model(kind)
    adapter = without_architecture(new_adapter(model, LoraConfig(targets=("all",))))
    check(adapter, saved(model, tmp_path / "own"))
    other = tiny_model("gpt2" if kind != "gpt2" else "bert")
    with pytest.raises(BaseMismatchError, match=r"no such module \((\d+) of \1 modules"):
        check(adapter, saved(other, tmp_path / "other"))


def test_the_text_says_where_and_how_many(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = new_adapter(model, LoraConfig(targets=("all",)))
    config = type(model.config).from_dict({**model.config.to_dict(), "intermediate_size": 40})
    other = saved(type(model)(config), tmp_path)
    said = r"model\.layers\.0\.mlp\.down_proj: .* 48 x 32 wide, the base 40 x 32 \(6 of 14 modules"
    with pytest.raises(BaseMismatchError, match=said):
        check(adapter, other)


def test_a_module_that_is_composed_in_a_way_not_known_here(tmp_path: Path) -> None:
    """Its modules are looked up, its widths are not known."""
    model = tiny_model("bert")
    adapter = new_adapter(model, LoraConfig())
    folder = saved(model, tmp_path)
    for targets, fits in ((adapter.spec.config.targets, True), (("bert.encoder.layer.7",), False)):
        spec = replace(adapter.spec, config=ComposedConfig(targets=targets))
        if fits:
            check_fits(spec, (), base_shapes(folder))
        else:
            with pytest.raises(BaseMismatchError, match="no such module"):
                check_fits(spec, (), base_shapes(folder))


def test_quantised_weights_do_not_show_their_widths(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = new_adapter(model, LoraConfig(targets=("all",)))
    saved(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    packed = {name: t for name, t in tensors.items() if "proj" not in name}
    for name in tensors.keys() - packed.keys():
        if "q_proj" in name:
            packed[name] = torch.zeros(7, 1, dtype=torch.uint8)
        else:
            packed[name.replace(".weight", ".qweight")] = torch.zeros(4, 4, dtype=torch.int32)
    save_file(packed, path)
    check(adapter, tmp_path)
    save_file({name: t for name, t in packed.items() if "k_proj" not in name}, path)
    with pytest.raises(BaseMismatchError, match="k_proj: the base has no such module"):
        check(adapter, tmp_path)


@pytest.mark.parametrize("setting", [LoraConfig(), BottleneckConfig()])
def test_a_record_that_promises_what_it_lacks(setting: AdapterConfig, tmp_path: Path) -> None:
    model = tiny_model("bert")
    adapter = new_adapter(model, setting)
    folder = saved(model, tmp_path)
    codec = codec_of(adapter.spec)
    tensors = codec.check(codec.encode(adapter), adapter.spec)
    with pytest.raises(CorruptAdapterError, match="is missing, wanted a matrix"):
        check_fits(adapter.spec, tensors[1:3], base_shapes(folder))
    flat = [replace(tensor, shape=(8,)) for tensor in tensors]
    with pytest.raises(CorruptAdapterError, match=r"is \(8,\), wanted a matrix"):
        check_fits(adapter.spec, flat, base_shapes(folder))


def test_no_weights_are_read_and_torch_is_not_loaded(tmp_path: Path) -> None:
    """The data of the base may be anything; a terabyte of it costs nothing."""
    model = tiny_model("bert")
    path = saved(model, tmp_path) / "model.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:header])
    with path.open("r+b") as file:
        file.truncate(len(data))
    check(new_adapter(model, LoraConfig()), tmp_path)
    code = """
import sys, pathlib
from graftory.hub.base_check import base_shapes
base_shapes(pathlib.Path(sys.argv[1]))
sys.exit(bool({"torch", "numpy", "safetensors"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False).returncode == 0


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
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": ".."}}'},
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


def test_a_folder_in_place_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "model.safetensors.index.json").write_bytes(b'{"weight_map": {"a": "a.safetensors"}}')
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        base_shapes(tmp_path)


def test_the_commands_say_it_in_a_line(tmp_path: Path) -> None:
    """hub pull --base and hub add --fits: what does not fit is not kept."""
    model = tiny_model("bert")
    right, wrong = saved(model, tmp_path / "right"), saved(tiny_model("roberta"), tmp_path / "wrong")
    there, here = Hub.create(tmp_path / "there"), Hub.create(tmp_path / "here")
    there.put("a", new_adapter(model, LoraConfig()))
    there.materialize("a", tmp_path / "files")
    for arguments in (
        ["pull", f"{there.root.as_uri()}/a", "--base"],
        ["add", str(tmp_path / "files"), "--name", "b", "--fits"],
    ):
        result = CliRunner().invoke(cli, ["--registry", str(here.root), *arguments, str(wrong)])
        assert result.exit_code != 0
        assert "architecture 'bert'" in result.output
        assert "Traceback" not in result.output
        assert not (here.root / ".hub" / "blobs").exists()
    assert here.index() == ()
    for arguments in (["pull", f"{there.root.as_uri()}/a"], ["add", str(tmp_path / "files"), "--name", "b"]):
        option = "--base" if arguments[0] == "pull" else "--fits"
        result = CliRunner().invoke(cli, ["--registry", str(here.root), *arguments, option, str(right)])
        assert result.exit_code == 0, result.output
    assert sorted(row.name for row in here.index()) == ["a", "b"]
