"""mera: the mean of adapters whose hidden units are aligned by optimal transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from graftory.compose.merge.align import Transport, align, distances
from graftory.compose.merge.base import Body, MergeMethod, MergeParameters, Reads, check_keys
from graftory.compose.merge.delta import Delta
from graftory.compose.merge.lora import lora_body, lora_deltas
from graftory.config import BottleneckConfig, LoraConfig, option
from graftory.errors import MergeError

_DOWN, _DOWN_BIAS, _UP, _UP_BIAS = BottleneckConfig.parts
_ADVICE = "merge with 'linear' instead, which needs no correspondence"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeraParameters(MergeParameters):
    """Parameters of `mera`."""

    by: Literal["weights", "activations"] = option("what tells that two hidden units are alike", "weights")
    transport: Transport = option("exact, or with entropy", "emd")
    epsilon: float = option("sinkhorn: factor on the entropy, relative to the mean cost", 0.01)
    cost_of: Literal["down", "all"] = option(
        "weights: compare what units read (down), or their biases and what they write too (all)", "down"
    )
    anchor: int = option("number of the adapter that the others are aligned to, from 1; 0: the best on --on", 1)

    @property
    def reads(self) -> Reads:
        """See `MergeParameters`."""
        return "examples" if self.by == "activations" else "nothing"

    def __post_init__(self) -> None:
        if self.epsilon <= 0 or self.anchor < 0:
            raise MergeError(f"mera: epsilon {self.epsilon:g} and anchor {self.anchor}: wanted above 0, and 0 or more")


@dataclass(frozen=True, slots=True)
class Units:
    """The hidden units of one adapter at one site, in float64.

    Attributes:
        down: D [r, d_in], a row for each.
        bias: c [r].
        up: U [d_out, r], a column for each.
        rest: What is added whatever the units do, e [d_out].
        activation: The non-linearity.
        free_sign: Whether (−row, −column) is the same unit.
    """

    down: Tensor
    bias: Tensor
    up: Tensor
    rest: Tensor
    activation: Callable[[Tensor], Tensor]
    free_sign: bool

    def hidden(self, x: Tensor) -> Tensor:
        """[n, r] for inputs [n, d_in]."""
        return self.activation(x.double() @ self.down.T + self.bias)

    def described(self, cost_of: str) -> Tensor:
        """A row of numbers for each unit, to be compared."""
        return self.down if cost_of == "down" else torch.cat([self.down, self.bias[:, None], self.up.T], dim=1)


def mera(bodies: Sequence[Body], weights: Sequence[float], parameters: MeraParameters) -> Body:
    """Σ w_t θ̃_t / Σ w_t over adapters θ̃_t aligned to an anchor (MerA, He et al. 2023, arXiv:2308.15982).

    Inputs and outputs of an adapter are the frozen model's residual stream, so only the r hidden units are carried,
    by one r_t x r_anchor plan per site and adapter: C_ij = ‖D^A_i − D^B_j‖² (`weights`), or the mean of
    (a^A_i − a^B_j)² over hidden activations of the same inputs (`activations`; after OTFusion, Singh and Jaggi
    2020, arXiv:1910.05653); see `align`. D̃ = T̂ᵀD, c̃ = T̂ᵀc, Ũ = U T̂, e as it is. Every activation works unit by unit,
    so a copy with permuted units merges back to the original. The result has the anchor's width.

    LoRA has no fixed units: (BG, G⁻¹A) is the same update for every invertible G. So the factors are first made
    canonical by a singular value decomposition of the update; a pair of units then agrees up to a sign,
    which is chosen for each pair. The paper has bottleneck adapters only.

    Raises:
        MergeError: If sites, placements, activations or widths differ, the anchor is none of them, the weights
            sum to 0 or less, or inputs are missing that `activations` needs.
    """
    total = sum(weights)
    if total <= 0:
        raise MergeError(f"mera: the weights sum to {total:g}, wanted more than 0, as it is a weighted mean")
    if not 1 <= parameters.anchor <= len(bodies):
        raise MergeError(
            f"mera: got anchor {parameters.anchor} of {len(bodies)} adapters, counted from 1; best_anchor tries all"
        )
    _check_alike(bodies)
    units_of = _KINDS[bodies[0].config.method]
    all_units = [units_of(body) for body in bodies]
    anchor = parameters.anchor - 1
    merged: dict[str, Units] = {}
    for path in bodies[anchor].config.targets:
        here = [
            each[path]
            if number == anchor
            else _carried(each[path], all_units[anchor][path], path, bodies, number, parameters)
            for number, each in enumerate(all_units)
        ]
        shares = [weight / total for weight in weights]
        merged[path] = Units(
            down=_mean([units.down for units in here], shares),
            bias=_mean([units.bias for units in here], shares),
            up=_mean([units.up for units in here], shares),
            rest=_mean([units.rest for units in here], shares),
            activation=here[0].activation,
            free_sign=here[0].free_sign,
        )
    return _bodies[bodies[0].config.method](bodies[anchor], merged)


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * tensor for share, tensor in zip(shares, tensors, strict=True)]).sum(0)


def _carried(
    units: Units, anchor: Units, path: str, bodies: Sequence[Body], number: int, parameters: MeraParameters
) -> Units:
    """The units of one adapter in place of the anchor's."""
    if units.down.shape[1] != anchor.down.shape[1] or units.up.shape[0] != anchor.up.shape[0]:
        raise MergeError(f"mera: {path}: adapters of different widths; are they of one base model?")
    if parameters.by == "weights":
        mine, its = units.described(parameters.cost_of), anchor.described(parameters.cost_of)
    else:
        mine, its = (
            (each.hidden(_inputs(body, path)) / _inputs(body, path).shape[0] ** 0.5).T
            for each, body in ((units, bodies[number]), (anchor, bodies[parameters.anchor - 1]))
        )
        if mine.shape[1] != its.shape[1]:
            raise MergeError("mera: activations of different inputs cannot be compared; record both on the same texts")
    cost, signs = distances(mine, its), None
    if units.free_sign:
        signs = torch.where(mine @ its.T < 0, -1.0, 1.0)
        cost = torch.minimum(cost, distances(-mine, its))
    plan = align(cost, parameters.transport, parameters.epsilon, signs)
    return replace(units, down=plan.down.T @ units.down, bias=plan.down.T @ units.bias, up=units.up @ plan.up)


def _inputs(body: Body, path: str) -> Tensor:
    if path not in body.inputs:
        raise MergeError(
            f"mera: by activations needs the inputs that {body.name} reads at {path}; give --examples, or "
            "inputs=record_inputs(...) from Python"
        )
    return body.inputs[path].double()


def _check_alike(bodies: Sequence[Body]) -> None:
    first = bodies[0].config
    for body in bodies[1:]:
        if set(body.config.targets) != set(first.targets):
            raise MergeError(f"mera: {bodies[0].name} and {body.name} have different targets; {_ADVICE}")
        for name in ("placement", "activation"):
            mine, its = getattr(first, name, None), getattr(body.config, name, None)
            if mine != its:
                raise MergeError(
                    f"mera: {bodies[0].name} and {body.name} differ in {name} ({mine}, {its}); merge each kind alone"
                )


def _bottleneck_units(body: Body) -> dict[str, Units]:
    from transformers.activations import ACT2FN  # here, as other merges need nothing of transformers

    config = cast(BottleneckConfig, body.config)
    check_keys(body, [f"{site}.{part}" for site in config.targets for part in config.parts])
    found = {}
    for site in config.targets:
        part = {name: body.tensors[f"{site}.{name}"].double() for name in config.parts}
        found[site] = Units(
            down=part[_DOWN],
            bias=part[_DOWN_BIAS],
            up=config.scale * part[_UP],
            rest=config.scale * part[_UP_BIAS],
            activation=ACT2FN[config.activation],
            free_sign=False,
        )
    return found


def _lora_units(body: Body) -> dict[str, Units]:
    found = {}
    for path, delta in lora_deltas(body).items():
        up, down = canonical(delta.left.double(), delta.right.double())
        zero = torch.zeros(1, dtype=torch.float64)
        found[path] = Units(down, zero.expand(down.shape[0]), up, zero.expand(up.shape[0]), _identity, free_sign=True)
    return found


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def canonical(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (U √S, √S Vᵀ) of B A, the same for every (BG, G⁻¹A) up to a sign of each pair, if no two σ are equal.

    Args:
        b: [d_out, r].
        a: [r, d_in].
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s.sqrt()
    return q_b @ u * root, root[:, None] * (vh @ q_a.T)


def _bottleneck_body(anchor: Body, merged: Mapping[str, Units]) -> Body:
    config = replace(cast(BottleneckConfig, anchor.config), scale=1.0, init_seed=None)
    tensors = {
        f"{site}.{part}": value.float().contiguous()
        for site, units in merged.items()
        for part, value in ((_DOWN, units.down), (_DOWN_BIAS, units.bias), (_UP, units.up), (_UP_BIAS, units.rest))
    }
    return Body("the merged adapter", config, tensors)


def _lora_body(anchor: Body, merged: Mapping[str, Units]) -> Body:
    deltas = {path: Delta(units.up.float(), units.down.float()) for path, units in merged.items()}
    return lora_body(deltas, cast(LoraConfig, anchor.config).dropout)


_KINDS: Mapping[str, Callable[[Body], dict[str, Units]]] = {"bottleneck": _bottleneck_units, "lora": _lora_units}
_bodies: Mapping[str, Callable[[Body, Mapping[str, Units]], Body]] = {
    "bottleneck": _bottleneck_body,
    "lora": _lora_body,
}

MERA = MergeMethod(
    name="mera",
    title="MerA (aligned by optimal transport)",
    paper="https://arxiv.org/abs/2308.15982",
    space="aligned",
    accepts=("lora", "bottleneck"),
    params=MeraParameters,
    default_weight=lambda n: 1.0 / n,
    fn=mera,
)
