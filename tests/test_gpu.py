"""On a GPU: the sweeps of every kernel in every precision, no waiting for the device, graphs, and whole models.

python -m pytest tests/test_gpu.py -rs
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from graftory import AdaptedModel, attach, mixed_batches, new_adapter
from graftory.config import AdapterConfig, BottleneckConfig, DoraConfig, Ia3Config, LoraConfig
from graftory.kernels import Routing, batched_lora, batched_lora_slices
from tests import bottleneck_samples, kernel_samples
from tests import test_kernels_bottleneck_triton as neck
from tests import test_kernels_head as plain_head
from tests import test_kernels_head_triton as head
from tests import test_kernels_lora_triton as lora
from tests import test_kernels_scale as plain_scale
from tests import test_kernels_scale_triton as scale
from tests import test_kernels_slices as plain_slices
from tests import test_kernels_slices_triton as slices
from tests.conftest import tiny_batch, tiny_model
from tests.interpreted import poisoned, worst
from tests.kernel_samples import batch, error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
D = TypeVar("D")
Pairs = tuple[list[Tensor], list[Tensor]]
MOST = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Relative errors: of fp32 sums, and of what is stored in 16 bit, a few times its rounding."""


def on_gpu(given: D) -> D:
    """The same samples there."""
    made = {each.name: getattr(given, each.name) for each in fields(given)}  # type: ignore[arg-type]
    return replace(  # type: ignore[type-var]
        given, **{name: each.cuda() if isinstance(each, Tensor) else each for name, each in made.items()}
    )


def of_lora(given: kernel_samples.Batch, dtype: torch.dtype) -> Pairs:
    rounded = given.to(dtype)
    leaves = on_gpu(rounded).learning()
    update = lora.run(lora.padded_with_nan(leaves))
    grad = torch.randn(update.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    found = [update.detach(), *torch.autograd.grad(update, leaves.leaves(), grad.cuda())]
    return found, kernel_samples.expected(rounded, grad)


def beside_a_layer(given: kernel_samples.Batch, dtype: torch.dtype, *, factors: torch.dtype | None = None) -> Pairs:
    """A layer's inputs, its outputs and their gradient are of one precision; the factors may be of another."""
    rounded = replace(given.to(factors or dtype), x=given.x.to(dtype))
    leaves = on_gpu(rounded).learning()
    layer, onto = lora.outputs_of(given, dtype)
    total = lora.run(lora.padded_with_nan(leaves), onto.cuda().requires_grad_().clone())
    grad = torch.randn(total.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    found = [total.detach(), *torch.autograd.grad(total, leaves.leaves(), grad.cuda())]
    update, *gradients = kernel_samples.expected(rounded, grad)
    return found, [layer.double() + update, *gradients]


def of_neck(given: bottleneck_samples.Neck, dtype: torch.dtype) -> Pairs:
    rounded = given.to(dtype)
    leaves = on_gpu(rounded).learning()
    update = neck.padded_with_nan(leaves).run("triton")
    found = [update.detach(), *torch.autograd.grad(update, leaves.leaves(), poisoned(rounded.grad.cuda()))]
    return found, bottleneck_samples.expected(rounded)


def of_scale(given: plain_scale.Scaling, dtype: torch.dtype) -> Pairs:
    rounded = given.to(dtype)
    there = on_gpu(rounded)
    hurt = plain_scale.Scaling(poisoned(there.x), poisoned(there.vectors), there.index, poisoned(there.grad))
    return plain_scale.results(hurt, "triton"), plain_scale.expected(rounded)


def of_head(given: plain_head.Heads, dtype: torch.dtype) -> Pairs:
    rounded = given.to(dtype)
    there = on_gpu(rounded)
    bias = None if there.bias is None else poisoned(there.bias)
    x, weight, grad = (poisoned(each) for each in (there.x, there.weight, there.grad))
    got = plain_head.results(replace(there, x=x, weight=weight, bias=bias, grad=grad), "triton")
    want, padding = plain_head.expected(rounded), given.padding()
    assert bool((got[0][padding.cuda()] == float("-inf")).all())
    got[0], want[0] = got[0][~padding.cuda()], want[0][~padding]
    return got, want


def of_slices(given: plain_slices.Sliced, dtype: torch.dtype) -> Pairs:
    rounded = given.to(dtype)
    return plain_slices.results(slices.hurt(on_gpu(rounded)), "triton"), plain_slices.expected(rounded)


KINDS: Mapping[str, tuple[Mapping[str, Any], Callable[[Any, torch.dtype], Pairs]]] = {
    "lora": (lora.SWEEP, of_lora),
    "beside": (lora.SWEEP, beside_a_layer),
    "fp32 beside": (lora.SWEEP, partial(beside_a_layer, factors=torch.float32)),
    "bottleneck": (neck.SWEEP, of_neck),
    "scale": (scale.SWEEP, of_scale),
    "head": ({**head.SWEEP, "large": head.LARGE}, of_head),
    "slices": (slices.SWEEP, of_slices),
}
SWEEP = [(kind, name) for kind, (cases, _) in KINDS.items() for name in cases]


@pytest.mark.parametrize("dtype", MOST, ids=str)
@pytest.mark.parametrize(("kind", "name"), SWEEP)
def test_numbers_and_gradients_are_the_formula_s(kind: str, name: str, dtype: torch.dtype) -> None:
    cases, run = KINDS[kind]
    found, wanted = run(cases[name], dtype)
    assert worst([error(got.cpu(), want) for got, want in zip(found, wanted, strict=True)]) < MOST[dtype]


@pytest.mark.parametrize(("kind", "name"), SWEEP)
def test_run_to_run_the_bits_are_the_same(kind: str, name: str) -> None:
    cases, run = KINDS[kind]
    for one, other in zip(run(cases[name], torch.bfloat16)[0], run(cases[name], torch.bfloat16)[0], strict=True):
        assert torch.equal(one, other)


def drawn(dtype: torch.dtype, *, tokens: int = 40, ranks: tuple[int, ...] = (8, 16, 3, 64)) -> kernel_samples.Batch:
    """A batch of the size of a small model's."""
    index = [[k % 5 - 1] for k in range(23)]
    return on_gpu(batch(index, ranks, tokens=tokens, inputs=384, outputs=520).to(dtype))


@pytest.mark.parametrize("dtype", MOST, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_no_worse_than_torch_at_that_precision(dtype: torch.dtype, tokens: int) -> None:
    """Twice torch's own error, and a little for what is rounded once more."""
    given = drawn(dtype, tokens=tokens)
    exact = kernel_samples.expected(replace(given, **{k: getattr(given, k).cpu() for k in ("x", "a", "b")}, **{
        k: getattr(given, k).cpu() for k in ("scale", "index", "ranks")
    }))[0]  # fmt: skip
    mine = error(lora.run(given).cpu(), exact)
    theirs = batched_lora(given.x, given.a, given.b, given.scale, given.index, backend="torch")
    assert mine <= 2 * error(theirs.cpu(), exact) + 1e-7


def test_a_row_s_bits_depend_on_no_other_row() -> None:
    given = drawn(torch.bfloat16)
    together, order = lora.run(given), torch.randperm(23, generator=torch.Generator().manual_seed(1)).cuda()
    assert torch.equal(lora.run(replace(given, x=given.x[order], index=given.index[order])), together[order])
    a = given.a.clone()
    a[1] = float("nan")
    hurt, fine = lora.run(replace(given, a=a)), (given.index != 1).all(1)
    assert torch.equal(hurt[fine], together[fine])
    assert hurt[~fine].isnan().any()
    assert not together[given.index[:, 0] < 0].any()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    with warnings.catch_warnings(action="ignore"):  # a prototype, it says
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [1, 40])
def test_nothing_waits_for_the_device(tokens: int) -> None:
    given = drawn(torch.bfloat16, tokens=tokens).learning()
    grad = torch.ones_like(lora.run(given))
    with no_waiting():
        torch.autograd.grad(lora.run(given), given.leaves(), grad)
        with torch.no_grad():
            lora.run(given)


def test_a_graph_sees_new_choices_where_its_routing_is_made_inside() -> None:
    given = drawn(torch.bfloat16)
    calls: Mapping[bool, Callable[[], Tensor]] = {
        True: lambda: lora.run(given),
        False: partial(kept, given, Routing(given.index)),
    }
    for inside, call in calls.items():
        with torch.no_grad():
            for _ in range(2):
                call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made = call()
            before = given.index.clone()
            given.index.copy_(before.roll(1, 0))
            graph.replay()
            now = lora.run(given)
            given.index.copy_(before)
        assert torch.equal(made, now) is inside


def kept(given: kernel_samples.Batch, routing: Routing) -> Tensor:
    return batched_lora(given.x, given.a, given.b, given.scale, routing, ranks=given.ranks)


def test_a_compiler_sees_one_node() -> None:
    given = drawn(torch.bfloat16)

    def call(x: Tensor) -> Tensor:
        return batched_lora(x, given.a, given.b, given.scale, given.index, ranks=given.ranks) + 1

    compiled = torch.compile(call, fullgraph=True)
    with warnings.catch_warnings():  # of what its own compiler imports
        warnings.simplefilter("ignore", DeprecationWarning)
        made = compiled(given.x)
    torch.testing.assert_close(made, call(given.x))


def test_slices_are_the_calls_that_they_replace() -> None:
    given = drawn(torch.bfloat16)
    a, b = torch.stack([given.a, given.a.flip(0)]), torch.cat([given.b, given.b.flip(0)], 1)
    got = batched_lora_slices(given.x, a, b, [520, 520], given.scale, given.index)
    for each, up, down in zip(got, (given.a, given.a.flip(0)), (given.b, given.b.flip(0)), strict=True):
        one = batched_lora(given.x, up, down, given.scale, given.index)
        assert error(each, one) < MOST[torch.bfloat16]  # their sums are cut elsewhere: no number is the same to the bit


CONFIGS: Mapping[str, AdapterConfig] = {
    "lora": LoraConfig(rank=4, targets=("all",)),
    "bottleneck": BottleneckConfig(),
    "ia3": Ia3Config(),
    "dora": DoraConfig(rank=4),
}


def model_with(kind: str, device: str) -> AdaptedModel:
    """A tiny model with an adapter of each kind that has something to say."""
    model = tiny_model(kind)
    adapters = {name: new_adapter(model, config) for name, config in CONFIGS.items()}
    generator = torch.Generator().manual_seed(3)
    for adapter in adapters.values():
        for tensor in adapter.tensors.values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    adapted = attach(model, adapters)
    adapted.to(device)
    return adapted


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_a_model_on_a_gpu_is_the_same_model(kind: str) -> None:
    """Mixed batches of four methods and none, forward and every gradient, as on the CPU."""
    rows: list[str | None] = [*CONFIGS, None, *reversed(list(CONFIGS))][:8]
    found = {}
    for device in ("cpu", "cuda"):
        adapted = model_with(kind, device)
        adapted.train_only(*CONFIGS)
        given = {name: value.to(device) for name, value in tiny_batch(kind).items()}
        with adapted.route(rows):
            logits = adapted(**given).logits
        logits.square().sum().backward()
        grads = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
        assert grads
        found[device] = {"logits": logits.detach(), **grads}
    assert found["cpu"].keys() == found["cuda"].keys()
    for name, value in found["cpu"].items():
        torch.testing.assert_close(found["cuda"][name].cpu(), value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["lora", "bottleneck"])
def test_one_adapter_for_all_rows_takes_plain_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known to be one adapter's batch is no batch to gather, and comes to what it does on the CPU."""
    from graftory.kernels.batched_bottleneck import launch as neck_launch
    from graftory.kernels.batched_lora import launch

    for module in (launch, neck_launch):
        monkeypatch.setattr(module, "forward", None)
    found = {}
    for device in ("cpu", "cuda"):
        adapted = model_with("bert", device)
        adapted.train_only(name)
        with adapted.route(name):
            logits = adapted(**{key: value.to(device) for key, value in tiny_batch("bert").items()}).logits
        logits.square().sum().backward()
        grads = {key: p.grad.cpu() for key, p in adapted.named_parameters() if p.grad is not None}
        found[device] = {"logits": logits.detach().cpu(), **grads}
    assert len(found["cpu"]) > 1
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-4)


def test_peft_s_mixed_batch_on_a_gpu() -> None:
    import peft

    model = tiny_model("bert")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="one")
    wrapped.add_adapter("other", config)
    wrapped.eval().cuda()
    given = {name: value.cuda() for name, value in tiny_batch("bert").items()}
    rows = ["one", "other", "__base__", "one", "other", "one", "other", "other"]
    with torch.no_grad():
        want = wrapped(**given, adapter_names=rows).logits
        mixed_batches(wrapped)
        torch.testing.assert_close(wrapped(**given, adapter_names=rows).logits, want, rtol=1e-4, atol=1e-5)


def test_half_precision_models_and_autocast() -> None:
    rows: list[str | None] = ["lora", "bottleneck", None, "ia3", "lora", None, "dora", "bottleneck"]
    given = {name: value.cuda() for name, value in tiny_batch("bert").items()}
    exact = model_with("bert", "cuda")
    with torch.no_grad(), exact.route(rows):
        want = exact(**given).logits
        with torch.autocast("cuda", torch.bfloat16):
            torch.testing.assert_close(exact(**given).logits.float(), want, rtol=0.1, atol=0.05)
        half = exact.to(torch.bfloat16)
        torch.testing.assert_close(half(**given).logits.float(), want, rtol=0.1, atol=0.05)


def test_kernels_are_not_interpreted_here() -> None:
    from graftory.kernels.batched_lora import launch

    assert not launch.INTERPRETED
