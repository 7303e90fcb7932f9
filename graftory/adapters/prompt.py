"""Prompt tuning: one soft prompt at the input, the same for every row (Lester, Al-Rfou and Constant 2021,
arXiv:2104.08691).

It is SMoP with one prompt, and the site is SMoP's: where the prompt stands, how it is masked and how it lies in a
cache is told in `graftory.adapters.smop`. Fresh soft tokens are embeddings of tokens drawn from the vocabulary, which
the paper finds better than noise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graftory.adapters.architectures import module_at
from graftory.adapters.method import Method
from graftory.adapters.prompt_places import embedding_path
from graftory.adapters.smop import PROMPTS, PromptSite, embedding_width
from graftory.config import PromptConfig
from graftory.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _resolve(model: PreTrainedModel, config: PromptConfig) -> tuple[str, ...]:
    path = embedding_path(model)
    if config.targets and (len(config.targets) > 1 or module_at(model, config.targets[0])[0] != path):
        raise UnsupportedAdapterError(f"a prompt enters at {path} and nowhere else; leave the targets out")
    return config.targets or (path,)


def _fill(model: PreTrainedModel, config: PromptConfig) -> PromptConfig:
    return replace(config, width=embedding_width(module_at(model, config.targets[0])[1]))


def _initial(model: PreTrainedModel, path: str, config: PromptConfig, generator: torch.Generator) -> dict[str, Tensor]:
    embedding = module_at(model, path)[1]
    assert isinstance(embedding, nn.Embedding)
    if config.start == "normal":
        return {PROMPTS: torch.empty(1, config.length, config.width).normal_(0.0, config.spread, generator=generator)}
    drawn = torch.randint(embedding.num_embeddings, (config.length,), generator=generator)
    return {PROMPTS: embedding.weight.detach()[drawn.to(embedding.weight.device)].float().cpu()[None].clone()}


def _site(model: PreTrainedModel, path: str, owner: int, _: PromptConfig) -> PromptSite:
    return PromptSite(model, path, owner)


PROMPT = Method(
    name="prompt",
    title="Prompt tuning",
    paper="Lester et al. 2021, arXiv:2104.08691",
    config=PromptConfig,
    linear=False,
    site=_site,
    resolve=_resolve,
    initial=_initial,
    fill=_fill,
)
