"""The commands that keep adapters, on tiny ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from graftory import Adapter, AdapterSpec, BaseModel, BottleneckConfig, Hub, Lineage, LoraConfig, Metric, TaskInfo
from graftory.cli import cli

PATHS = ("encoder.layer.0.query", "encoder.layer.0.value")
Run = Callable[..., Result]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def run(root: Path) -> Run:
    """`hub --registry root ...`, in a hub that exists."""
    Hub.create(root)

    def call(*arguments: str | Path) -> Result:
        return CliRunner().invoke(cli, ["--registry", str(root), *map(str, arguments)])

    return call


def lora(seed: int, *, rank: int = 2, base: str = "tiny") -> Adapter:
    """A LoRA on two square layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in PATHS:
        tensors[f"{path}.lora_A.weight"] = torch.randn(rank, 6, generator=generator)
        tensors[f"{path}.lora_B.weight"] = torch.randn(6, rank, generator=generator)
    config = LoraConfig(rank=rank, alpha=4.0, targets=PATHS, init_seed=seed)
    lineage = Lineage(process="train", parameters={"epochs": 2})
    metrics = (Metric("accuracy", 0.875, "sst2", "test", 8),)
    return Adapter(AdapterSpec(BaseModel(base, architecture="bert"), config, None, lineage, metrics), tensors)


def peft_folder(folder: Path, *, rank: int = 2) -> Path:
    """What plain PEFT writes, made by hand."""
    folder.mkdir()
    prefix = "base_model.model.bert.encoder.layer.0.attention.self.query"
    tensors = {f"{prefix}.lora_A.weight": torch.ones(rank, 6), f"{prefix}.lora_B.weight": torch.ones(6, rank)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["query"]}
    config |= {"base_model_name_or_path": "tiny", "bias": "none", "task_type": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def everything_in(root: Path) -> dict[str, bytes]:
    """All files of a hub but its lock."""
    files = (path for path in root.rglob("*") if path.is_file() and "lock" not in path.name)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def assert_error(result: Result, *words: str) -> None:
    """One line on the standard error with these words, nothing on the standard output, exit code 1."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def as_json(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_init_makes_a_hub_and_leaves_one_alone(tmp_path: Path) -> None:
    for _ in range(2):
        result = CliRunner().invoke(cli, ["init", str(tmp_path / "new")])
        assert result.exit_code == 0
        assert str(tmp_path / "new") in result.output
        before = everything_in(tmp_path / "new")
    assert everything_in(tmp_path / "new") == before
    assert (tmp_path / "new" / "registry.json").is_file()


def test_init_without_a_folder_makes_it_where_the_registry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(cli, ["--registry", str(tmp_path / "there"), "init"]).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert CliRunner().invoke(cli, ["init"]).exit_code == 0
    assert (tmp_path / "registry.json").is_file()


def test_list_of_an_empty_hub_says_what_to_do(run: Run) -> None:
    assert "hub train" in run("list").output
    assert as_json(run("list", "--json")) == []


def test_add_list_show(run: Run, root: Path, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft")
    added = as_json(run("add", folder, "--name", "sst2", "--json"))
    assert (added["ref"], added["version"]) == ("sst2@1", 1)
    again = as_json(run("add", folder, "--name", "sst2", "--json"))
    assert again == added
    (row,) = as_json(run("list", "--json"))
    assert (row["name"], row["version"], row["method"], row["base"]) == ("sst2", 1, "lora", "tiny")
    head, line = run("list").output.splitlines()
    assert head.split() == ["name", "version", "task", "method", "base", "aliases"]
    assert line.split()[:2] == ["sst2", "1"]
    shown = run("show", "sst2").output
    assert added["digest"] in shown
    assert "adapter_model.safetensors" in shown
    record = as_json(run("show", "sst2@1", "--json"))
    assert record["spec"]["config"]["rank"] == 2
    assert record["digest"] == added["digest"]


def test_show_tells_method_task_and_metrics(run: Run, root: Path) -> None:
    adapter = lora(1)
    task = TaskInfo("sst2", "classification", ("neg", "pos"))
    Hub.open(root).put("sst2", replace(adapter, spec=replace(adapter.spec, task=task)))
    text = run("show", "sst2").output
    for word in ("rank=2", "2 modules", "labels neg, pos", "0.8750", "epochs=2", "48 numbers"):
        assert word in text


def test_another_version_with_other_bytes_is_refused(run: Run, root: Path, tmp_path: Path) -> None:
    assert run("add", peft_folder(tmp_path / "one"), "--name", "sst2", "--version", "1").exit_code == 0
    before = everything_in(root)
    other = peft_folder(tmp_path / "two", rank=3)
    assert_error(run("add", other, "--name", "sst2", "--version", "1"), "sst2@1")
    assert everything_in(root) == before


@pytest.mark.parametrize("damage", ["no folder", "no config", "text for tensors", "cut"])
def test_add_refuses_what_it_cannot_read(run: Run, root: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "peft"
    if damage != "no folder":
        peft_folder(folder)
    weights = folder / "adapter_model.safetensors"
    if damage == "no config":
        (folder / "adapter_config.json").unlink()
    if damage == "text for tensors":
        weights.write_text("hello")
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    before = everything_in(root)
    assert_error(run("add", folder, "--name", "sst2"))
    assert everything_in(root) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "sst3"),
        ("show", "sst2@7"),
        ("show", "sst2:prod"),
        ("log", "sst3"),
        ("alias", "sst3", "prod"),
        ("push", "sst3", "file:///nowhere"),
        ("merge", "sst2", "sst3", "--name", "both"),
        ("show", "SST2"),
        ("eval", "sst3"),
        ("predict", "sst3", "text"),
        ("export", "sst3", "folder"),
    ],
)
def test_unknown_references_are_one_line(run: Run, root: Path, arguments: tuple[str, ...]) -> None:
    Hub.open(root).put("sst2", lora(1))
    before = everything_in(root)
    assert_error(run(*arguments))
    assert everything_in(root) == before


def test_no_hub_says_how_to_make_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["--registry", str(tmp_path / "nothing"), "list"])
    assert_error(result, "hub init")
    assert list(tmp_path.iterdir()) == []


def test_alias_is_set_moved_and_listed(run: Run, root: Path) -> None:
    hub = Hub.open(root)
    for seed in (1, 2):
        hub.put("sst2", lora(seed))
    assert as_json(run("alias", "sst2@1", "prod", "--json")) == {"prod": 1}
    assert run("show", "sst2:prod").output.split()[1] == "sst2@1"
    assert "sst2:prod is sst2@2" in run("alias", "sst2", "prod").output
    assert run("alias", "sst2").output.split() == ["alias", "version", "prod", "2"]
    assert "prod=2" in run("list").output
    assert_error(run("alias", "sst2", "2nd"), "alias")


def test_push_and_pull_keep_the_version(run: Run, root: Path, tmp_path: Path) -> None:
    hub = Hub.open(root)
    for seed in (1, 2):
        hub.put("sst2", lora(seed))
    remote = (tmp_path / "remote").as_uri()
    pushed = as_json(run("push", "sst2@2", remote, "--json"))
    assert pushed["ref"] == "sst2@2"
    Hub.create(tmp_path / "third")
    result = CliRunner().invoke(cli, ["--registry", str(tmp_path / "third"), "pull", f"{remote}/sst2@2", "--json"])
    assert as_json(result) == pushed
    pulled = Hub.open(tmp_path / "third").get("sst2@2")
    for key, tensor in lora(2).tensors.items():
        assert torch.equal(pulled.tensors[key], tensor)


def test_pull_of_damaged_bytes_leaves_nothing(run: Run, root: Path, tmp_path: Path) -> None:
    Hub.open(root).put("sst2", lora(1))
    remote = tmp_path / "remote"
    assert run("push", "sst2", remote.as_uri()).exit_code == 0
    largest = max(
        (path for path in (remote / ".hub" / "blobs").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.chmod(0o644)
    largest.write_bytes(bytes(data))
    Hub.create(tmp_path / "third")
    result = CliRunner().invoke(cli, ["--registry", str(tmp_path / "third"), "pull", f"{remote.as_uri()}/sst2@1"])
    assert_error(result)
    assert not [path for path in everything_in(tmp_path / "third") if "records" in path]
    assert Hub.open(tmp_path / "third").index() == ()


@pytest.mark.parametrize("remote", ["nowhere", "ftp://host/folder", "file://relative"])
def test_push_to_what_is_no_remote(run: Run, root: Path, remote: str) -> None:
    Hub.open(root).put("sst2", lora(1))
    assert_error(run("push", "sst2", remote), "file://")


def test_merge_is_the_weighted_sum_of_updates_and_is_in_the_log(run: Run, root: Path) -> None:
    hub = Hub.open(root)
    first, second = lora(1, rank=2), lora(2, rank=3)
    refs = [str(hub.put(name, adapter)) for name, adapter in (("one", first), ("two", second))]
    merged = as_json(run("merge", *refs, "--weights", "0.25,2", "--name", "both", "--json"))
    adapter = hub.get(merged["ref"])
    for path in PATHS:
        wanted = sum(
            weight * (4.0 / rank) * part.tensors[f"{path}.lora_B.weight"] @ part.tensors[f"{path}.lora_A.weight"]
            for weight, rank, part in ((0.25, 2, first), (2.0, 3, second))
        )
        config = adapter.spec.config
        assert isinstance(config, LoraConfig)
        got = (
            config.scale_of(path) * adapter.tensors[f"{path}.lora_B.weight"] @ adapter.tensors[f"{path}.lora_A.weight"]
        )
        torch.testing.assert_close(got, wanted)
    family = as_json(run("log", "both", "--json"))
    names = {node["digest"]: node["ref"] for node in family["nodes"]}
    assert [(names[edge["parent"]], edge["relation"], edge["weight"]) for edge in family["edges"]] == [
        ("one@1", "merged", 0.25),
        ("two@1", "merged", 2.0),
    ]
    top, *below = run("log", "both").output.splitlines()
    assert top.startswith("both@1")
    assert [line[:8] for line in below] == ["├─ one@1", "└─ two@1"]


def test_log_says_what_is_not_here(run: Run, root: Path, tmp_path: Path) -> None:
    hub = Hub.open(root)
    for name, seed in (("one", 1), ("two", 2)):
        hub.put(name, lora(seed))
    assert run("merge", "one", "two", "--name", "both").exit_code == 0
    remote = (tmp_path / "remote").as_uri()
    assert run("push", "both", remote).exit_code == 0
    result = CliRunner().invoke(cli, ["--registry", str(tmp_path / "remote"), "log", "both"])
    assert result.output.count("not in this hub") == 2


def test_merge_cuts_to_a_rank(run: Run, root: Path) -> None:
    hub = Hub.open(root)
    for name, seed in (("one", 1), ("two", 2)):
        hub.put(name, lora(seed))
    assert run("merge", "one", "two", "--name", "both", "--rank", "1").exit_code == 0
    assert hub.get("both").tensors[f"{PATHS[0]}.lora_A.weight"].shape == (1, 6)


def test_merge_refuses_what_cannot_be_merged(run: Run, root: Path) -> None:
    hub = Hub.open(root)
    hub.put("one", lora(1))
    hub.put("elsewhere", lora(2, base="other"))
    config = BottleneckConfig(size=2, targets=("encoder.layer.0.output",))
    shapes = {"down.weight": (2, 6), "down.bias": (2,), "up.weight": (6, 2), "up.bias": (6,)}
    tensors = {f"{config.targets[0]}.adapter_{part}": torch.zeros(shape) for part, shape in shapes.items()}
    hub.put("bottle", Adapter(AdapterSpec(BaseModel("tiny"), config), tensors))
    before = everything_in(root)
    assert_error(run("merge", "one", "elsewhere", "--name", "both"), "base")
    assert_error(run("merge", "one", "bottle", "--name", "both"), "bottleneck")
    assert_error(run("merge", "one", "--weights", "1,2", "--name", "both"), "2 weights")
    assert_error(run("merge", "one", "--method", "soup", "--rank", "1", "--name", "both"), "--rank", "linear")
    assert run("merge", "one", "--weights", "a", "--name", "both").exit_code == 2
    assert everything_in(root) == before
