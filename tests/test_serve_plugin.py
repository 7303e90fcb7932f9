"""The plugin for vLLM, through the interface that vLLM calls: what it resolves, what it refuses; `hub serve-plugin`."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import PeftModel

from graftory import Adapter, AdapterConfig, BottleneckConfig, LoraConfig, attach, serving
from graftory.cli import cli
from graftory.errors import CorruptAdapterError, HubNotFoundError
from graftory.hub import Hub, folders
from graftory.serving import cache as serving_cache
from graftory.serving.cache import BASE_VARIABLE, CACHE_VARIABLE, cache_folder, serve
from tests import vllm_double
from tests.adapter_samples import make
from tests.conftest import tiny_batch, tiny_model

ID = "meta/tiny"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a folder."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(str(folder))
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = Hub.create(tmp_path / "hub")
    for seed in (1, 2):
        hub.put("org/plain", adapter(LoraConfig(rank=4, alpha=6, targets=("all",)), seed=seed))
    hub.set_alias("org/plain", "prod", 1)
    hub.put("large", adapter(LoraConfig(rank=20)))
    hub.put("headed", adapter(LoraConfig(rank=4), labels=3))
    hub.put("neck", adapter(BottleneckConfig()))
    return hub


def adapter(config: AdapterConfig, labels: int = 0, seed: int = 0) -> Adapter:
    """An adapter of the tiny model, whose base has a name that a server could have."""
    made = make(tiny_model("llama"), config, labels, seed)
    return replace(made, spec=replace(made.spec, base=replace(made.spec.base, id=ID)))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(BASE_VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[vllm_double.Registry]:
    yield vllm_double.install(monkeypatch)
    sys.modules.pop("graftory.serving.resolver", None)


@pytest.fixture
def resolver(hub: Hub, cache: Path, registry: vllm_double.Registry, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The resolver that a server gets from its registry."""
    monkeypatch.setenv("GRAFTORY_REGISTRY", str(hub.root))
    serving.register()
    return registry.get_resolver("graftory")


def ask(resolver: Any, name: str, base: str = ID) -> Any:
    return asyncio.run(resolver.resolve_lora(base_model_name=base, lora_name=name))


# registration


def test_the_entry_point_is_register() -> None:
    (point,) = entry_points(group="vllm.general_plugins", name="graftory")
    assert point.load() is serving.register


def test_it_is_a_resolver_and_is_registered_once(resolver: Any, registry: vllm_double.Registry) -> None:
    assert isinstance(resolver, vllm_double.LoRAResolver)
    serving.register()  # as vLLM's processes may
    assert [name for name, _ in registry.put] == ["graftory"]


def test_where_there_is_no_hub_nothing_is_registered(
    registry: vllm_double.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAFTORY_REGISTRY", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    serving.register()
    assert registry.put == []
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_is_asked_for_must_be_there(
    registry: vllm_double.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTORY_REGISTRY", str(tmp_path / "missing"))
    with pytest.raises(HubNotFoundError, match="GRAFTORY_REGISTRY"):
        serving.register()


def test_the_cache_is_where_vllm_says_or_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x"
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_folder().parts[-2:] == ("graftory", "vllm")


# what is resolved


def test_the_four_forms(resolver: Any, hub: Hub, cache: Path) -> None:
    first, second = hub.record("org/plain@1"), hub.record("org/plain@2")
    forms = {"org/plain@1": first, "org/plain:prod": first, "org/plain": second, f"org/plain@{first.digest}": first}
    for name, record in forms.items():
        request = ask(resolver, name)
        assert (request.lora_name, request.base_model_name, request.load_inplace) == (name, None, False)
        folder = Path(request.lora_path)
        assert folder.is_relative_to(cache)
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        weights = next(entry for entry in record.files if entry.path == "adapter_model.safetensors")
        assert folder.joinpath(weights.path).stat().st_size == weights.size
    ids = {name: ask(resolver, name).lora_int_id for name in forms}
    assert len(set(ids.values())) == 2
    assert ids["org/plain@1"] == ids["org/plain:prod"] == int(first.digest[7:22], 16) + 1


def test_peft_loads_what_the_server_is_given(resolver: Any, hub: Hub) -> None:
    request = ask(resolver, "org/plain")
    config = json.loads(Path(request.lora_path, "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["peft_type"], config["r"]) == (ID, "LORA", 4)
    batch = tiny_batch("llama")
    adapted = attach(tiny_model("llama"), {"x": hub.get("org/plain")})
    with adapted.route("x"), torch.no_grad():
        wanted = adapted(**batch).logits
    with torch.no_grad():
        got = PeftModel.from_pretrained(tiny_model("llama"), request.lora_path)(**batch).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_an_alias_that_has_moved_is_another_request(resolver: Any, hub: Hub) -> None:
    before = ask(resolver, "org/plain:prod")
    hub.set_alias("org/plain", "prod", 2)
    after = ask(resolver, "org/plain:prod")
    assert before.lora_int_id != after.lora_int_id
    assert before.lora_path != after.lora_path
    assert Path(before.lora_path, "adapter_config.json").is_file(), "requests under way still need it"


def test_a_version_that_comes_while_the_server_runs_is_found(resolver: Any, hub: Hub) -> None:
    assert ask(resolver, "new") is None
    hub.put("new", adapter(LoraConfig(rank=3), seed=7))
    assert ask(resolver, "new").lora_name == "new"


# what is not


BAD = ["../x", "org/../../x", "/etc/passwd", "org/plain/../plain", "..", "", "a" * 5000, "ORG/plain", "org/plain@0"]
MISSING = ["nobody", "org/plain@3", "org/plain:nope", f"org/plain@sha256:{'0' * 64}", "org/plain@sha256:zz", "x\n"]


@pytest.mark.parametrize("name", [*BAD, *MISSING])
def test_what_is_no_name_or_not_there_is_left_to_others(resolver: Any, tmp_path: Path, cache: Path, name: str) -> None:
    assert ask(resolver, name) is None
    assert not cache.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize(
    ("name", "said"), [("headed", "head of its own"), ("neck", "serves LoRA, this is a bottleneck")]
)
def test_what_vllm_cannot_take_is_refused_and_logged(
    resolver: Any, cache: Path, name: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(resolver, name) is None
    assert said in caplog.text
    assert not cache.exists()


def test_another_base_is_refused_unless_it_is_said_to_be_the_same(
    resolver: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(resolver, "org/plain", "meta/other") is None
    assert f"{BASE_VARIABLE}={ID}" in caplog.text
    assert not cache.exists()
    monkeypatch.setenv(BASE_VARIABLE, ID)
    request = ask(resolver, "org/plain", "meta/other")
    config = json.loads(Path(request.lora_path, "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "meta/other"
    assert ask(resolver, "org/plain", ID).lora_path != request.lora_path


def test_a_base_in_a_folder_is_looked_at(
    resolver: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(BASE_VARIABLE, ID)
    assert ask(resolver, "org/plain", str(base)) is not None
    tiny_model("bert").save_pretrained(str(tmp_path / "bert"))
    assert ask(resolver, "org/plain", str(tmp_path / "bert")) is None
    assert "cannot be served" in caplog.text
    (tmp_path / "bin").mkdir()
    assert ask(resolver, "org/plain", str(tmp_path / "bin")) is not None, "no safetensors to look at"


def test_damage_is_an_error_and_not_a_missing_adapter(resolver: Any, hub: Hub, cache: Path) -> None:
    weights = next(e for e in hub.record("org/plain").files if e.path == "adapter_model.safetensors")
    (blob,) = (path for path in (hub.root / ".hub").rglob("*") if path.name == weights.sha256)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(data)
    with pytest.raises(CorruptAdapterError):
        ask(resolver, "org/plain")
    assert not cache.exists()


def test_a_cache_that_somebody_changed_is_an_error(resolver: Any) -> None:
    config = Path(ask(resolver, "org/plain").lora_path, "adapter_config.json")
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    with pytest.raises(CorruptAdapterError, match="changed the cache"):
        ask(resolver, "org/plain")


# at once


def test_many_at_once_see_whole_folders(resolver: Any, hub: Hub, cache: Path) -> None:
    names = ["org/plain", "org/plain@1", "org/plain:prod", "large"] * 6
    found: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for folder in cache.glob("graftory/*/org/plain"):
                found.append(f"{len(list(folder.iterdir()))} files")  # noqa: PERF401 (they appear while we look)

    async def all_of_them() -> list[Any]:
        other = type(resolver)(hub.root)
        return await asyncio.gather(*(each.resolve_lora(ID, name) for name in names for each in (resolver, other)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        requests = asyncio.run(all_of_them())
    finally:
        done.set()
        watcher.join()
    assert len({request.lora_path for request in requests}) == 3
    assert set(found) <= {"2 files"}
    assert not list(cache.rglob(".*")), "nothing unfinished is left"


def test_one_who_comes_second_takes_what_the_first_wrote(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes the folder after this one has seen that it is not there."""
    make_folder = folders.__dict__["make_folder"]
    first: list[Path] = []
    coming = [True]

    def interrupted(folder: Path) -> None:
        if coming:
            coming.clear()
            first.append(serve(hub, "large", ID, cache).folder)
        make_folder(folder)

    monkeypatch.setattr(folders, "make_folder", interrupted)
    assert [serve(hub, "large", ID, cache).folder] == first
    assert [path.name for path in first[0].parent.iterdir()] == ["large"]


def test_the_server_goes_on_while_files_are_written(resolver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    write = serving_cache._write

    def remember(*args: Any) -> Path:
        threads.append(threading.get_ident())
        return write(*args)

    monkeypatch.setattr(serving_cache, "_write", remember)
    assert ask(resolver, "org/plain") is not None
    assert threads != [threading.get_ident()]


# the command


def run(hub: Hub, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--registry", str(hub.root), "serve-plugin", *arguments])


def test_it_says_how_to_start_a_server(hub: Hub, cache: Path) -> None:
    result = run(hub)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert f"export GRAFTORY_REGISTRY={hub.root}" in lines
    assert "export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in lines
    assert f"vllm serve {ID} --enable-lora --max-lora-rank 32 --max-loras 8" in lines
    assert f"base    {ID}, 2 adapters to serve" in lines
    assert any(line.startswith("not     headed@1: has a head of its own") for line in lines)
    assert "plugin  graftory.serving:register" in lines
    assert BASE_VARIABLE not in result.stdout


def test_a_base_under_another_name(hub: Hub, cache: Path) -> None:
    result = run(hub, "--served-base", "/models/my llama", "--json")
    data = json.loads(result.stdout)
    assert data["environment"][BASE_VARIABLE] == ID
    assert data["command"][:3] == ["vllm", "serve", "/models/my llama"]
    assert data["adapters"] == ["large", "org/plain"]
    assert list(data["refused"]) == ["headed"]
    text = run(hub, "--served-base", "/models/my llama").stdout
    assert shlex.join(data["command"]) in text.splitlines()


def test_check_resolves_as_the_plugin_does(
    resolver: Any, hub: Hub, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = json.loads(run(hub, "--check", "org/plain:prod", "--json").stdout)
    request = ask(resolver, "org/plain:prod")
    assert data == {
        "ref": "org/plain@1",
        "digest": hub.record("org/plain@1").digest,
        "folder": request.lora_path,
        "id": request.lora_int_id,
    }
    assert run(hub, "--check", "org/plain").stdout.split()[0] == "org/plain@2"
    served = json.loads(run(hub, "--check", "org/plain", "--served-base", str(base), "--json").stdout)
    monkeypatch.setenv(BASE_VARIABLE, ID)
    assert served["folder"] == ask(resolver, "org/plain", str(base)).lora_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--check", "headed"], "has a head of its own"),
        (["--check", "../x"], "is not an adapter name"),
        (["--check", "nobody"], "no adapter 'nobody'"),
        (["--check", "large", "--base", "other"], f"is for the base '{ID}'"),
        (["--base", "other"], f"nothing to serve on 'other'; its LoRA adapters are for {ID}"),
    ],
)
def test_what_cannot_be_served_is_an_error(hub: Hub, cache: Path, arguments: list[str], said: str) -> None:
    result = run(hub, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr
    assert not cache.exists()


def test_a_hub_without_lora_has_nothing_to_serve(tmp_path: Path) -> None:
    result = run(Hub.create(tmp_path / "empty"))
    assert result.exit_code == 1
    assert "it has no LoRA adapter, and vLLM serves LoRA" in result.stderr
