"""A top-k that gradients go through (Lei et al. 2023, arXiv:2304.04947, section 3).

λ = argmax s·λ + ε H(λ) with Σ λ = k and 0 ≤ λ ≤ 1, H(λ) = -Σ λ ln λ. The answer is λ_i = min(1, exp((s_i + a) / ε)),
with the a that makes the sum k. The paper finds it by coordinate ascent on the dual: from b = 0

    a ← ε ln k - ε ln Σ exp((s_i + b_i) / ε),   b_i ← min(-s_i - a, 0)

some twenty times, ε falling from a larger one to its own. Each step brings the sum of λ nearer to k from below, the
faster the fewer of the k are at 1; gradients go through the steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 20
_FIRST, _DECAY = 4.0, 0.7
"""ε of the first step as a multiple of its own, and what it is multiplied with from one step to the next; ours."""


def soft_top_k(scores: Tensor, count: Tensor, epsilon: Tensor, *, steps: int = STEPS) -> Tensor:
    """How far each of n numbers is among the k largest of its row.

    Args:
        scores: s, [rows, n]; minus infinity for what does not take part, which gets 0.
        count: k of each row, [rows], 1 or more.
        epsilon: ε of each row, [rows].
        steps: Of the iteration.

    Returns:
        λ, [rows, n]; exactly 1 for all that take part where k is no less than their number.
    """
    own, wanted = epsilon[:, None].to(scores.dtype), count[:, None].to(scores.dtype).log()
    shift, cut = torch.zeros_like(own), torch.zeros_like(scores)
    for step in range(steps):
        soft = own * max(_FIRST * _DECAY**step, 1.0)
        shift = soft * (wanted - ((scores + cut) / soft).logsumexp(1, keepdim=True))
        cut = (-scores - shift).clamp(max=0)
    taking_part = scores > -torch.inf
    found = ((scores + shift) / own).clamp(max=0).exp()
    return torch.where(count[:, None] >= taking_part.sum(1, keepdim=True), taking_part.to(found.dtype), found)
