"""Names, references, specifications."""

from __future__ import annotations

import pytest

from graftory import AdapterRef, AdapterSpec, BaseModel, BottleneckConfig, Lineage, LoraConfig, Metric, Parent, TaskInfo
from graftory.adapter import check_name, spec_from_json, spec_to_json
from graftory.errors import ConfigError, InvalidNameError

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize("text", ["sst2", "sst2@3", f"org/sst2@{DIGEST}", "sst2:prod"])
def test_references_round_trip(text: str) -> None:
    assert str(AdapterRef.parse(text)) == text


def test_references_are_read_into_parts() -> None:
    assert AdapterRef.parse("org/sst2@12") == AdapterRef("org/sst2", version=12)
    assert AdapterRef.parse("sst2:prod") == AdapterRef("sst2", alias="prod")
    assert AdapterRef.parse(f"sst2@{DIGEST}") == AdapterRef("sst2", digest=DIGEST)


@pytest.mark.parametrize(
    "text",
    ["", "SST2", "a@0", "a@01", "a@x", "a@", "a@1:prod", "a:", "a:Prod", "a@sha256:12", "a/b/c", "a b", "ä", "a\n"],
)
def test_bad_references_are_refused(text: str) -> None:
    with pytest.raises(InvalidNameError):
        AdapterRef.parse(text)


@pytest.mark.parametrize("name", ["con", "org/nul.txt", "com1", "..", "../x", "a/../b", ".a", "a.", "-a", "a" * 65])
def test_names_that_some_file_system_refuses_are_refused(name: str) -> None:
    with pytest.raises(InvalidNameError, match="not an adapter name"):
        check_name(name)
    assert check_name("a" * 64) == "a" * 64


def test_specifications_round_trip_through_json() -> None:
    spec = AdapterSpec(
        base=BaseModel("org/model", "main", "bert", "sha256:a", "sha256:b"),
        config=LoraConfig(rank=4, targets=("x.y",), rank_pattern={"x.y": 2}),
        task=TaskInfo("trec", "classification", ("a", "b"), ("classifier",)),
        lineage=Lineage("merge", (Parent("a@1", DIGEST, "merged", 0.5),), {"rank": 4}, "sha256:c", 7, {"torch": "2"}),
        metrics=(Metric("accuracy", 0.9, "trec", "test", 500),),
        licence="apache-2.0",
    )
    assert spec_from_json(spec_to_json(spec), "record") == spec
    other = AdapterSpec(BaseModel("m"), BottleneckConfig(placement="parallel", scale=4))
    assert spec_from_json(spec_to_json(other), "record") == other


def test_unknown_methods_and_keys_are_named() -> None:
    data = spec_to_json(AdapterSpec(BaseModel("m"), LoraConfig()))
    with pytest.raises(ConfigError, match=r"unknown adapter method 'magic'; known: lora, .*bottleneck"):
        spec_from_json({**data, "config": {"method": "magic"}}, "record")
    with pytest.raises(ConfigError, match="unknown key 'size'"):
        spec_from_json({**data, "config": {"method": "lora", "size": 3}}, "record")


def test_scales_follow_the_patterns() -> None:
    config = LoraConfig(rank=4, alpha=8, rank_pattern={"b": 16}, alpha_pattern={"b": 4.0})
    assert (config.scale_of("a"), config.scale_of("b")) == (2.0, 0.25)
    assert LoraConfig(rank=16, alpha=8, rslora=True).scale_of("a") == 2.0


@pytest.mark.parametrize("bad", [{"rank": 0}, {"dropout": 1.0}, {"rank_pattern": {"a": 0}}])
def test_impossible_configurations_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="wanted"):
        LoraConfig(**bad)  # type: ignore[arg-type]
