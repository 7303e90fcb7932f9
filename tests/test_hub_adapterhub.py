"""AdapterHub's files: the fixtures in tests/data/adapterhub were made and answered by the library `adapters` itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftory import Adapter, AdapterConfig, BottleneckConfig, Hub, LoraConfig, TaskInfo, attach, new_adapter
from graftory.config import Ia3Config
from graftory.errors import CorruptAdapterError, GraftoryError, UnsupportedAdapterError
from graftory.hub.adapterhub import read, write
from tests.adapter_samples import shaken
from tests.data.adapterhub.make import LABELS, SIZES, batch

DATA = Path(__file__).parent / "data" / "adapterhub"
FOLDERS = sorted(path.name for path in DATA.iterdir() if (path / "adapter_config.json").is_file())
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
}


def base_model(kind: str) -> Any:
    """transformers' own model with the weights of the fixtures; its head is random."""
    config, model = MODELS[kind]
    torch.manual_seed(5)
    made = model(config(**SIZES)).eval()
    odd = made.load_state_dict(load_file(DATA / f"{kind}.safetensors"), strict=False)
    assert all(key.startswith("classifier") for key in odd.missing_keys)
    return made


def kind_of(folder: str) -> str:
    return "roberta" if folder == "roberta" else "bert"


def answers(adapted: Any, name: str) -> dict[str, Tensor]:
    with adapted.route(name), torch.no_grad():
        output = adapted(**batch(), output_hidden_states=True)
    return {"hidden": output.hidden_states[-1], "logits": output.logits}


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_adapterhub_made_gives_its_own_answers_here(folder: str, tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    adapter = hub.get(hub.add(DATA / folder, name="theirs"))
    model = base_model(kind_of(folder))
    with torch.no_grad():
        bare = model(**batch(), output_hidden_states=True).hidden_states[-1]
    found = answers(attach(model, {"theirs": adapter}), "theirs")
    for key, value in load_file(DATA / f"{folder}.expected.safetensors").items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)
    assert (found["hidden"] - bare).abs().max() > 0.1


def test_fixtures_are_all_there() -> None:
    kinds = {"seq_bn", "double_seq_bn", "par_bn", "lora", "gelu", "gelu_old", "pooled", "headless", "roberta"}
    assert set(FOLDERS) == kinds


def test_what_is_known_of_an_import(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    spec = hub.record(hub.add(DATA / "par_bn", name="org/theirs")).spec
    assert isinstance(spec.config, BottleneckConfig)
    config = spec.config
    assert (config.placement, config.size, config.scale, config.activation) == ("parallel", 8, 4.0, "relu")
    assert config.targets == tuple(f"bert.encoder.layer.{layer}.output.dense" for layer in (0, 1))
    head = ("bert.pooler.dense", "classifier")
    assert spec.task == TaskInfo("theirs", "classification", labels=tuple(LABELS.values()), head=head)
    assert (spec.base.id, spec.base.architecture) == ("unknown", "bert")
    assert (spec.lineage.process, spec.lineage.libraries) == ("import", {"adapters": "1.3.0"})
    lora = hub.record(hub.add(DATA / "lora", name="lora")).spec.config
    assert isinstance(lora, LoraConfig)
    assert (lora.rank, lora.alpha, len(lora.targets)) == (3, 6.0, 8)


def test_adding_it_again_is_the_same_version(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    assert str(hub.add(DATA / "seq_bn", name="a")) == str(hub.add(DATA / "seq_bn", name="a")) == "a@1"
    out = hub.materialize("a@1", tmp_path / "out")
    assert str(hub.add(out, name="a")) == "a@1"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("folder", FOLDERS)
def test_written_again_it_is_what_adapterhub_wrote(folder: str, tmp_path: Path) -> None:
    """The same tensors under the same names, and every value of the configuration that says something to us."""
    adapter = read(files_of(DATA / folder), folder)
    for name, data in write(adapter, folder, layers=2).items():
        path = DATA / folder / name
        if name.endswith(".safetensors"):
            (tmp_path / name).write_bytes(data)
            ours, theirs = load_file(tmp_path / name), load_file(path)
            assert set(ours) == set(theirs)
            assert all(torch.equal(ours[key], value) for key, value in theirs.items())
            continue
        said, wanted = json.loads(data), json.loads(path.read_text())
        if name == "adapter_config.json":
            wanted["config"]["init_weights"] = said["config"]["init_weights"]
        if "version" not in wanted:
            wanted["config"]["non_linearity"] = "gelu_new"
        assert said["config"] == {key: wanted["config"][key] for key in said["config"]}
        top = ("model_type", "model_class", "hidden_size", "name")
        assert {key: said[key] for key in top} == {key: wanted[key] for key in top}


OURS: dict[str, Callable[[], AdapterConfig]] = {
    "lora": lambda: LoraConfig(rank=2, alpha=3.0, rslora=True, targets=("q", "v", "up")),
    "pfeiffer": lambda: BottleneckConfig(size=5, activation="gelu_new"),
    "houlsby": lambda: BottleneckConfig(size=4, placement="houlsby", activation="silu", scale=0.5),
    "parallel": lambda: BottleneckConfig(size=3, placement="parallel", scale=2.0),
}


def made_here(kind: str, config: AdapterConfig) -> Adapter:
    info = TaskInfo("t", "classification", ("a", "b", "c"))
    return shaken(new_adapter(base_model(kind), config, task=info), seed=3)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("method", list(OURS))
def test_made_here_written_and_read_again_it_answers_alike(method: str, kind: str) -> None:
    """`make.py check` holds the same files against the library itself."""
    adapter = made_here(kind, OURS[method]())
    again = read(write(adapter, "ours", layers=2), "t")
    assert again.spec.task is not None
    assert again.spec.task.labels == ("a", "b", "c")
    first = answers(attach(base_model(kind), {"a": adapter}), "a")
    second = answers(attach(base_model(kind), {"a": again}), "a")
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("targets", [("q", "up", "down"), ("down",), ("up",)])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_base_s_width_is_told_whatever_the_order_of_the_tensors(targets: tuple[str, ...], backwards: bool) -> None:
    adapter = made_here("bert", LoraConfig(rank=2, targets=targets))
    ordered = dict(sorted(adapter.tensors.items(), reverse=backwards))
    written = write(replace(adapter, tensors=ordered), "x", layers=2)
    assert json.loads(written["adapter_config.json"])["hidden_size"] == 16


def test_layers_that_are_left_out_are_told(tmp_path: Path) -> None:
    adapter = read(files_of(DATA / "headless"), "headless")
    config = json.loads(write(adapter, "x", layers=3)["adapter_config.json"])["config"]
    assert config["leave_out"] == [0, 2]


def changed(config: BottleneckConfig | LoraConfig, **values: Any) -> Adapter:
    """An adapter of BERT, whose specification says something else afterwards."""
    adapter = made_here("bert", config)
    return replace(adapter, spec=replace(adapter.spec, **values))


NOT_WRITTEN: list[tuple[Callable[[], Adapter], str]] = [
    (lambda: made_here("bert", Ia3Config()), "a ia3 adapter cannot be written for AdapterHub"),
    (lambda: made_here("bert", LoraConfig(targets=("o",))), "AdapterHub has no LoRA on attention.output.dense"),
    (lambda: made_here("bert", LoraConfig(targets=("layer.0.attention.self.query", "v"))), "another set"),
    (
        lambda: made_here("bert", LoraConfig(alpha_pattern={"bert.encoder.layer.0.attention.self.query": 3.0})),
        "several ranks or scales",
    ),
    (
        lambda: made_here("bert", BottleneckConfig(size_pattern={"bert.encoder.layer.0.output.LayerNorm": 3})),
        r"the sizes \[3, 48\]",
    ),
]


@pytest.mark.parametrize(("make", "text"), NOT_WRITTEN, ids=[text for _, text in NOT_WRITTEN])
def test_what_its_format_cannot_hold_is_refused(make: Callable[[], Adapter], text: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=text):
        write(make(), "x", layers=2)


def test_other_architectures_and_fewer_layers_are_refused() -> None:
    adapter = made_here("bert", LoraConfig())
    other = replace(adapter, spec=replace(adapter.spec, base=replace(adapter.spec.base, architecture="gpt2")))
    with pytest.raises(UnsupportedAdapterError, match="for bert, roberta, xlm-roberta, this is 'gpt2'"):
        write(other, "x", layers=2)
    with pytest.raises(UnsupportedAdapterError, match="lies in none of the base's 1 layers"):
        write(adapter, "x", layers=1)


def copied(source: str, target: Path, file: str, edit: Callable[[Any], Any]) -> Path:
    """A fixture with one JSON file changed."""
    shutil.copytree(DATA / source, target)
    path = target / file
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    return target


def with_value(key: str, value: Any) -> Callable[[Any], Any]:
    return lambda data: {**data, "config": {**data["config"], key: value}}


REFUSED: list[tuple[str, str, str, Any, type[GraftoryError]]] = [
    ("seq_bn", "adapter_config.json", "phm_layer", True, UnsupportedAdapterError),
    ("seq_bn", "adapter_config.json", "use_gating", True, UnsupportedAdapterError),
    ("seq_bn", "adapter_config.json", "inv_adapter", "nice", UnsupportedAdapterError),
    ("seq_bn", "adapter_config.json", "scaling", "learned", UnsupportedAdapterError),
    ("seq_bn", "adapter_config.json", "residual_before_ln", "post_add", UnsupportedAdapterError),
    ("seq_bn", "adapter_config.json", "non_linearity", "leakyrelu", UnsupportedAdapterError),
    ("seq_bn", "adapter_config.json", "a_feature_of_next_year", 3, UnsupportedAdapterError),
    ("seq_bn", "adapter_config.json", "is_parallel", True, UnsupportedAdapterError),
    ("lora", "adapter_config.json", "use_dora", True, UnsupportedAdapterError),
    ("lora", "adapter_config.json", "architecture", "prefix_tuning", UnsupportedAdapterError),
    ("lora", "adapter_config.json", "r", 4, CorruptAdapterError),
    ("seq_bn", "head_config.json", "head_type", "tagging", UnsupportedAdapterError),
    ("seq_bn", "head_config.json", "layers", 3, UnsupportedAdapterError),
    ("seq_bn", "head_config.json", "activation_function", "gelu", UnsupportedAdapterError),
    ("seq_bn", "head_config.json", "num_labels", "many", CorruptAdapterError),
    ("seq_bn", "head_config.json", "label2id", {"a": 0, "b": 0, "c": 1}, CorruptAdapterError),
]


@pytest.mark.parametrize(
    ("source", "file", "key", "value", "error"), REFUSED, ids=[f"{row[0]} {row[2]}" for row in REFUSED]
)
def test_what_is_not_supported_is_refused_by_name(
    source: str, file: str, key: str, value: Any, error: type[GraftoryError], tmp_path: Path
) -> None:
    hub = Hub.create(tmp_path / "hub")
    with pytest.raises(error, match=key):
        hub.add(copied(source, tmp_path / "changed", file, with_value(key, value)), name="a")
    assert hub.index() == ()


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    shutil.copytree(DATA / "seq_bn", tmp_path / "half")
    (tmp_path / "half" / "head_config.json").unlink()
    with pytest.raises(CorruptAdapterError, match=r"only one of head_config\.json"):
        hub.add(tmp_path / "half", name="a")
    (tmp_path / "half" / "model_head.safetensors").unlink()
    assert hub.record(hub.add(tmp_path / "half", name="a")).spec.task is None
    weights = tmp_path / "half" / "adapter.safetensors"
    save_file({**load_file(weights), "bert.other": torch.ones(2)}, weights)
    with pytest.raises(UnsupportedAdapterError, match=r"'bert\.other' is not understood"):
        hub.add(tmp_path / "half", name="b")
    scalar = copied("lora", tmp_path / "scalar", "adapter_config.json", lambda data: {**data, "model_name": "a\nb"})
    held = load_file(scalar / "adapter.safetensors")
    assert hub.record(hub.add(scalar, name="odd")).spec.base.id == "unknown"
    save_file({**held, next(iter(held)): torch.tensor(1.0)}, scalar / "adapter.safetensors")
    with pytest.raises(CorruptAdapterError, match="is one number"):
        hub.add(scalar, name="b")
    other = copied("seq_bn", tmp_path / "gpt2", "adapter_config.json", lambda data: {**data, "model_type": "gpt2"})
    with pytest.raises(UnsupportedAdapterError, match="this is 'gpt2'"):
        hub.add(other, name="b")
    nothing = copied("seq_bn", tmp_path / "nan", "adapter_config.json", lambda data: data)
    tensors = load_file(nothing / "adapter.safetensors")
    save_file({key: value * float("nan") for key, value in tensors.items()}, nothing / "adapter.safetensors")
    with pytest.raises(CorruptAdapterError, match="NaN"):
        hub.add(nothing, name="b")
