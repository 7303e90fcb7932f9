"""Which hub is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftory.errors import HubNotFoundError
from graftory.hub import Hub
from tests.hub_samples import lora


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFTORY_REGISTRY", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")


def test_explicit_path_wins_over_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("explicit", "variable", "work"):
        Hub.create(tmp_path / name)
    monkeypatch.setenv("GRAFTORY_REGISTRY", str(tmp_path / "variable"))
    assert Hub.open(tmp_path / "explicit").root == tmp_path / "explicit"
    assert Hub.open(tmp_path / "explicit" / "registry.json").root == tmp_path / "explicit"
    assert Hub.open().root == tmp_path / "variable"
    monkeypatch.delenv("GRAFTORY_REGISTRY")
    assert Hub.open().root == tmp_path / "work"


def test_nothing_at_the_path_or_the_variable_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubNotFoundError, match="hub init"):
        Hub.open(tmp_path / "nowhere")
    monkeypatch.setenv("GRAFTORY_REGISTRY", str(tmp_path / "nowhere"))
    with pytest.raises(HubNotFoundError, match="GRAFTORY_REGISTRY"):
        Hub.open()
    assert not (tmp_path / "nowhere").exists()


def test_a_foreign_registry_json_is_passed_over(tmp_path: Path) -> None:
    Hub.create(tmp_path / "work")
    (tmp_path / "work" / "deep" / "registry.json").write_text('{"name": "another tool"}')
    assert Hub.open().root == tmp_path / "work"


def test_the_user_s_own_hub_is_made_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "data" / "own"
    monkeypatch.setattr("graftory.hub.locate.user_hub", lambda: home)
    monkeypatch.setattr("graftory.hub.locate.is_hub", lambda folder: False)
    assert Hub.open().root == home
    assert (home / "registry.json").is_file()


def test_an_empty_hub_survives_a_checkout_without_empty_folders(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "work")
    for path in sorted((hub.root / ".hub").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (hub.root / ".hub").rmdir()
    found = Hub.open()
    assert found.root == tmp_path / "work"
    assert str(found.put("trec", lora())) == "trec@1"


def test_create_leaves_an_existing_hub_alone(tmp_path: Path) -> None:
    hub = Hub.create(tmp_path / "hub")
    hub.put("trec", lora())
    assert Hub.create(tmp_path / "hub").index() == hub.index()
