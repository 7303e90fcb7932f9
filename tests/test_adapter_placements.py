"""Every bottleneck placement against its formula, with the block's own modules."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from graftory import BottleneckConfig, attach
from graftory.config import Placement
from tests.adapter_samples import PLACEMENTS, make
from tests.conftest import tiny_batch, tiny_model


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_bert_placements_equal_their_formulas(placement: Placement) -> None:
    """The last layer's output by hand, from the block's own modules."""
    model = tiny_model("bert")
    adapter = make(model, BottleneckConfig(placement=placement, size=5, activation="relu", scale=1.5))
    adapted = attach(model, {"a": adapter})
    with adapted.route("a"), torch.no_grad():
        states = adapted(**tiny_batch("bert"), output_hidden_states=True).hidden_states
    adapted.detach()
    layer = model.bert.encoder.layer[1]

    def neck(site: str, x: Tensor) -> Tensor:
        t = {key.removeprefix(f"{site}."): value for key, value in adapter.tensors.items() if key.startswith(site)}
        hidden = torch.relu(x @ t["adapter_down.weight"].T + t["adapter_down.bias"])
        return 1.5 * (hidden @ t["adapter_up.weight"].T + t["adapter_up.bias"])

    at = "bert.encoder.layer.1"
    mask = tiny_batch("bert")["attention_mask"][:, None, None, :].bool()
    with torch.no_grad():
        x = states[1]
        h = layer.attention.output.dense(layer.attention.self(x, attention_mask=mask)[0])
        h = h + neck(f"{at}.attention.output.dense", h) if placement == "houlsby" else h
        x = layer.attention.output.LayerNorm(h + x)
        h = layer.output.dense(layer.intermediate(x))
        norm = layer.output.LayerNorm
        expected = {
            "houlsby": lambda: norm(h + neck(f"{at}.output.dense", h) + x),
            "parallel": lambda: norm(h + neck(f"{at}.output.dense", x) + x),
            "pfeiffer": lambda: norm(neck(f"{at}.output.LayerNorm", norm(h + x)) + h + x),
        }[placement]()
    torch.testing.assert_close(states[2], expected, atol=1e-5, rtol=1e-5)


def _keep(seen: dict[str, Tensor], name: str, value: Tensor) -> None:
    seen[name] = value


def test_pre_norm_placements_equal_their_formulas() -> None:
    """Llama: Pfeiffer reads the residual stream behind the block, parallel the one ahead of the FFN's norm."""
    model, batch = tiny_model("llama"), tiny_batch("llama")
    for placement in PLACEMENTS[1:]:
        adapter = make(model, BottleneckConfig(placement=placement, size=5, activation="silu"))
        seen: dict[str, Tensor] = {}
        layer = model.model.layers[0]
        keep_x, keep_h = partial(_keep, seen, "x"), partial(_keep, seen, "h")
        handles = [
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args, keep=keep_x: keep(args[0])),
            layer.mlp.down_proj.register_forward_hook(lambda _, args, out, keep=keep_h: keep(out)),
        ]
        adapted = attach(model, {"a": adapter})
        with adapted.route("a"), torch.no_grad():
            states = adapted(**batch, output_hidden_states=True).hidden_states
        adapted.detach()
        for handle in handles:
            handle.remove()
        site = "model.layers.0" if placement == "pfeiffer" else "model.layers.0.mlp.down_proj"
        t = {part: adapter.tensors[f"{site}.adapter_{part}"] for part in ("down.weight", "down.bias", "up.weight")}
        source = seen["x"] + seen["h"] if placement == "pfeiffer" else seen["x"]
        hidden = torch.nn.functional.silu(source @ t["down.weight"].T + t["down.bias"])
        up = hidden @ t["up.weight"].T + adapter.tensors[f"{site}.adapter_up.bias"]
        torch.testing.assert_close(states[1], seen["x"] + seen["h"] + up, atol=1e-5, rtol=1e-5)
