"""What the Fisher information of a task's model is made of: inputs and gradients at each module, example by example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftory.adapter import Adapter, TaskInfo, TaskKind
from graftory.adapters.architectures import module_at
from graftory.compose.exporting import export
from graftory.compose.merge.fisher import GRADIENTS, MAX_TOKENS, ROWS
from graftory.data import Text
from graftory.training import LoadedBase
from graftory.training.encode import IGNORED, Collator, encode
from graftory.training.losses import model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def record_gradients(
    loaded: LoadedBase,
    adapter: Adapter,
    texts: Sequence[Text],
    *,
    seed: int = 0,
    batch_size: int = 32,
    max_length: int = 128,
) -> dict[str, Tensor]:
    """Run base + adapter, and keep what −log p(y | text) is made of at each module, y drawn from the model itself.

    The gradient by a module's weight is Σ g xᵀ over the tokens of an example, x what the module reads and g the
    gradient by what it returns. No labels are needed: the Fisher information is an expectation over the model's own
    answers. A class is drawn for each text, a next token for each position; for a regression, a normal density of
    variance 1, the expectation is the square of the derivative of the output, and nothing is drawn.

    Args:
        loaded: The base model.
        adapter: An adapter that folds into its weights; with the head of its task, if it has one.
        texts: Of its task.
        seed: Of what is drawn.
        batch_size: Rows at a time.
        max_length: Tokens a text is cut to, or those of the task if they are fewer.

    Returns:
        By path x [tokens, d_in], by `<path>.gradients` g [tokens, d_out], by `<path>.rows` the example of each, counted
        from 0 [tokens]; tokens without a gradient are left out. As many whole examples as have `MAX_TOKENS` together.

    Raises:
        MergeError: If the adapter does not fold into weights.
        BaseMismatchError: If it belongs to another base.
    """
    task = adapter.spec.task or TaskInfo("texts", "classification")
    model = export(loaded.model, adapter).eval()
    watch = _Watch(model, adapter.spec.config.targets)
    generator = torch.Generator().manual_seed(seed)
    info = TaskInfo(task.name, task.kind, max_length=min(task.max_length, max_length), template=task.template)
    examples = [encode(loaded.tokenizer, info, text, "" if task.kind == "seq2seq" else None) for text in texts]
    collator, taken, start = Collator(loaded.tokenizer.pad_token_id), 0, 0
    with watch:
        while start < len(examples) and taken < MAX_TOKENS:
            some = examples[start : start + batch_size]
            batch = {key: value.to(loaded.model.device) for key, value in collator(some).items()}
            logits = model(**model_inputs(task.kind, batch)).logits
            watch.keep(_surprise(task.kind, logits, batch, generator), start)
            taken += sum(len(one["input_ids"]) for one in some)
            start += len(some)
    return watch.kept()


def _surprise(kind: TaskKind, logits: Tensor, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Σ −log p(y) over the rows of a batch, y drawn from p."""
    if kind == "regression":
        return logits[:, 0].float().sum()
    if kind == "classification":
        flat = logits.float()
    else:
        counted = batch["labels"] != IGNORED if kind == "seq2seq" else batch["attention_mask"].bool()
        flat = logits.float()[counted]
    drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return functional.cross_entropy(flat, drawn.to(flat.device), reduction="sum")


class _Watch:
    """Keeps what modules read and return, and the gradients by the latter."""

    def __init__(self, model: PreTrainedModel, paths: Sequence[str]) -> None:
        self._modules = {path: module_at(model, path)[1] for path in paths}
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._parts: dict[str, list[Tensor]] = {}
        # a graph for what modules return begins at the embeddings: no weight of a module needs a gradient
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)

    def __enter__(self) -> None:
        self._handles = [module.register_forward_hook(self._hook(path)) for path, module in self._modules.items()]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen.setdefault(path, []).append((args[0].detach(), output))

        return hook

    def keep(self, loss: Tensor, start: int) -> None:
        """Take the gradients of one batch, whose first row has this number."""
        calls = [(path, x, y) for path, seen in self._seen.items() for x, y in seen]
        gradients = torch.autograd.grad(loss, [y for _, _, y in calls], allow_unused=True)
        for (path, x, _), g in zip(calls, gradients, strict=True):
            if g is None:
                continue
            rows = torch.arange(len(x)).view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1]).flatten() + start
            flat = g.float().flatten(0, -2).cpu()
            moved = flat.any(dim=1)
            for name, tensor in (
                (path, x.float().flatten(0, -2).cpu()),
                (f"{path}.{GRADIENTS}", flat),
                (f"{path}.{ROWS}", rows),
            ):
                self._parts.setdefault(name, []).append(tensor[moved])
        self._seen.clear()

    def kept(self) -> dict[str, Tensor]:
        """Everything, by name."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}
