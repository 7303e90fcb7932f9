"""P-tuning: an encoder makes the soft tokens while they learn, and is gone afterwards (Liu et al. 2021,
arXiv:2103.10385).

P = E(e), e [l, d] learns and so does E: three linear layers with ReLUs between them (`mlp`, the default of PEFT), or a
bidirectional LSTM of two layers, along the prompt, and two linear layers behind it (`lstm`, the paper's). Soft tokens
so depend on each other from the first step. What is kept is P, a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from graftory.adapter import Adapter
from graftory.adapters.smop import PROMPTS
from graftory.config import PromptConfig, PTuningConfig
from graftory.training.recipes.base import Recipe, Scene, plain

_LSTM_LAYERS = 2


class Encoder(nn.Module):
    """From e [1, l, d] to P [1, l, d]."""

    def __init__(self, config: PTuningConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden or config.width
        self.along: nn.LSTM | None = None
        if config.encoder == "lstm":
            self.along = nn.LSTM(width, hidden, num_layers=_LSTM_LAYERS, bidirectional=True, batch_first=True)
            self.each = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
            return
        layers = (nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.each = nn.Sequential(*layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """The prompt."""
        read = tokens if self.along is None else self.along(tokens)[0]
        made: Tensor = self.each(read)
        return made


def p_tuning(scene: Scene) -> Recipe:
    """The recipe."""
    config = scene.config
    assert isinstance(config, PTuningConfig)
    key = f"{config.targets[0]}.{PROMPTS}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1 + (config.init_seed or 0))
        encoder = Encoder(config).to(scene.model.weights(scene.name)[key])
    return Recipe(stand_ins=partial(_encoded, encoder, key), extra=encoder, finish=partial(_kept, encoder, key))


def _encoded(encoder: Encoder, key: str, live: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {**live, key: encoder(live[key])}


def _kept(encoder: Encoder, key: str, adapter: Adapter) -> Adapter:
    with torch.no_grad():
        prompt = encoder(adapter.tensors[key].to(next(encoder.parameters())))
    return plain(adapter, PromptConfig, {key: prompt.cpu()})
