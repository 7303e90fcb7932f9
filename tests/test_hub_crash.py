"""Every crash point of every command that writes: no mixed state, and the next command succeeds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from graftory.adapter import Parent
from graftory.hub import Hub
from graftory.hub.keys import create_key, load_private_key
from tests.crash_points import SCENARIOS
from tests.crash_watch import DAMAGES, MUTATIONS
from tests.hub_samples import bottleneck, lora

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="watches files through /proc")


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders to add, and two hubs: `hub` with a composition, aliases and signatures, `other` with a part of it."""
    home = tmp_path_factory.mktemp("fixtures")
    create_key(home / "key")
    maker = Hub.create(home / "maker")
    for number, name in enumerate("abc"):
        maker.put(name, lora(number))
        maker.materialize(name, home / name)
    hub, other = Hub.create(home / "hub"), Hub.create(home / "other")
    hub.put("a", lora(0))
    hub.put("a", lora(1))
    hub.put("b", bottleneck())
    parents = [Parent(ref, hub.record(ref).digest, "composed") for ref in ("a@2", "b@1")]
    both = lora(5)
    lineage = replace(both.spec.lineage, parents=tuple(parents))
    hub.put("both", replace(both, spec=replace(both.spec, lineage=lineage)))
    hub.set_alias("a", "prod", 1)
    hub.set_alias("both", "prod", 1)
    hub.set_alias("both", "best", 1)
    hub.sign("both", load_private_key(home / "key"))
    hub.sign("a@2", load_private_key(home / "key"))
    other.put("both", lora(9), version=3)
    other.set_alias("both", "prod", 3)
    other.put("a", lora(1), version=2)
    return home


def run(fixtures: Path, *arguments: str) -> dict[str, object]:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "tests.crash_points", str(fixtures), *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


LEAST = {
    "init": 15,
    "add the first": 25,
    "add the next": 25,
    "add the same": 1,
    "alias, new": 10,
    "alias, moved": 10,
    "push to a new hub": 100,
    "push to a hub": 60,
    "pull": 60,
    "pull one": 25,
    "gc": 5,
    "verify --rebuild": 4,
    "sign": 4,
    "remote add": 4,
    "remote remove": 4,
}
"""Operations of each command at least: an enumeration that saw nothing would prove nothing."""


@pytest.fixture(scope="module")
def found_by(fixtures: Path) -> Iterator[dict[str, Future[dict[str, object]]]]:
    """All scenarios, two at a time, the long ones first."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run, fixtures, name) for name in sorted(SCENARIOS, key=LEAST.__getitem__, reverse=True)
        }


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_crash_point(found_by: dict[str, Future[dict[str, object]]], name: str) -> None:
    found = found_by[name].result()
    assert found["wrong"] == []
    operations, points = found["operations"], found["points"]
    assert isinstance(operations, int)
    assert operations >= LEAST[name]
    assert points == operations * len(DAMAGES)


@pytest.mark.parametrize(
    ("mutation", "name"),
    [
        ("files are not synced", "add the next"),
        ("folders are not synced", "add the next"),
        ("the record comes before its files", "add the first"),
        ("no note of pending rows", "add the next"),
        ("records are written in place", "add the next"),
    ],
)
def test_a_mistake_would_be_found(fixtures: Path, mutation: str, name: str) -> None:
    assert mutation in MUTATIONS
    assert run(fixtures, name, mutation)["wrong"]
