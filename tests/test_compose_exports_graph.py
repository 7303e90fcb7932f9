"""Graphs of base + adapter, run by torch alone, against the batched kernels that graftory serves with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftory.adapters import attach
from graftory.compose.exports.graph import export_graph
from graftory.config import AdapterConfig, BottleneckConfig, NormedBottleneckConfig, PromptConfig
from graftory.errors import ConfigError, MergeError
from tests.adapter_samples import make
from tests.conftest import tiny_model
from tests.training_samples import tokenizer_of

IDS = torch.tensor([[3, 5, 7, 9, 2], [4, 6, 8, 11, 12]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def batches(kind: str) -> list[dict[str, Tensor]]:
    """Of other sizes than those that the graph is made with."""
    if kind == "vit":
        return [{"pixel_values": torch.linspace(-1, 1, n * 3 * 256).reshape(n, 3, 16, 16)} for n in (1, 3)]
    first = {"input_ids": IDS[:1, :4], "attention_mask": MASK[:1, :4]}
    return [
        first,
        {"input_ids": IDS, "attention_mask": MASK},
        {"input_ids": IDS[1:, :1], "attention_mask": MASK[1:, :1]},
    ]


CASES: list[tuple[str, AdapterConfig]] = [
    ("bert", BottleneckConfig(placement="parallel", size=4, activation="tanh", scale=2.0)),
    ("distilbert", BottleneckConfig(placement="pfeiffer", size=4)),
    ("llama", BottleneckConfig(placement="pfeiffer", size=4, activation="silu")),
    ("vit", NormedBottleneckConfig(placement="houlsby", size=4)),
]


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_the_graph_does_what_base_and_adapter_do(tmp_path: Path, kind: str, config: AdapterConfig) -> None:
    model: Any = tiny_model(kind)
    model.save_pretrained(tmp_path / "base")
    if kind != "vit":
        tokenizer_of(kind).save_pretrained(tmp_path / "base")
    adapter = make(model, config, labels=3)
    given = batches(kind)
    done = export_graph(str(tmp_path / "base"), adapter, tmp_path / "graph", batches=given)
    assert done.check is not None
    assert done.check.max_difference < 1e-5
    report = json.loads((tmp_path / "graph" / "graftory_export.json").read_text())
    assert report["graph_inputs"] == list(given[0])
    assert "torch.export.load" in (tmp_path / "graph" / "README.md").read_text()
    program = torch.export.load(tmp_path / "graph" / "model.pt2")
    assert not [node for node in program.graph.nodes if "graftory" in str(node.target)]
    adapted = attach(model, {"a": adapter})
    for batch in given:
        with torch.no_grad(), adapted.route("a"):
            wanted = adapted(**batch).logits
        with torch.no_grad(), adapted.route(None):
            bare = adapted(**batch).logits
        got = program.module()(*batch.values())
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() < 1e-5
        assert bare.shape != wanted.shape or (bare - wanted).abs().max() > 1e-3
    if kind == "distilbert":
        runs_with_torch_alone(tmp_path / "graph" / "model.pt2")


def runs_with_torch_alone(graph: Path) -> None:
    code = (
        "import sys, torch; model = torch.export.load(sys.argv[1]).module(); "
        "print(tuple(model(torch.tensor([[3, 5]]), torch.tensor([[1, 1]])).shape)); "
        "assert not {'transformers', 'graftory', 'peft'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(graph)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=graph.parent)
    assert done.stdout.strip() == "(1, 3)"


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    model: Any = tiny_model("bert")
    model.save_pretrained(tmp_path / "base")
    prompt = make(model, PromptConfig(length=2))
    with pytest.raises(
        MergeError, match=r"prompt adapter can be written neither .* \(bottleneck, normed_bottleneck and"
    ):
        export_graph(str(tmp_path / "base"), prompt, tmp_path / "graph", batches=batches("bert"))
    with pytest.raises(ConfigError, match="no batches"):
        export_graph(str(tmp_path / "base"), make(model, BottleneckConfig()), tmp_path / "graph", batches=[])
    assert {each.name for each in tmp_path.iterdir()} == {"base"}
