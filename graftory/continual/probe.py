"""The general-ability probe: how well a language model still reads text that belongs to none of the tasks.

L = (1/N) Σ_t -log p(x_t | x_<t) over the N tokens of held-out texts, and exp(L), the perplexity: of the bare base
before the first task, and after every task with the adapters that the strategy would use. The weights of the base never
change; what an adapter does to them is seen here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from torch import Tensor

from graftory.adapter import Adapter
from graftory.continual.evaluation import ABSTAINED
from graftory.continual.freeze import hash_tensors
from graftory.continual.probed import Probed, ProbeSettings
from graftory.continual.router import ABSTAIN, Router
from graftory.continual.router_fit import router_features
from graftory.data import Rows, load_rows, load_task
from graftory.errors import DataError
from graftory.training import LoadedBase
from graftory.training.prediction import read


def probe_texts(settings: ProbeSettings, seed: int) -> tuple[str, ...]:
    """The texts of a probe, each once.

    Raises:
        DataError: If there are none.
        ConfigError: If the file or task cannot be read.
    """
    texts = _paragraphs(Path(settings.text)) if settings.text.endswith(".txt") else _inputs(settings.text)
    unique = [text for text in dict.fromkeys(texts) if text.strip()]
    if not unique:
        raise DataError(f"probe: {settings.text} holds no text; give a .txt file, a task's YAML or wheel:NAME")
    drawn = Rows("test", tuple(unique), ("",) * len(unique)).subsample(settings.rows, seed)
    return tuple(str(text) for text in drawn.texts)


def _paragraphs(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"probe: cannot read {path}: {' '.join(str(error).split()):.160}") from None
    return [" ".join(paragraph.split()) for paragraph in text.replace("\r\n", "\n").split("\n\n")]


def _inputs(source: str) -> list[str]:
    rows = load_rows(load_task(source), "test")
    return [text if isinstance(text, str) else " ".join(text) for text in rows.texts]


@dataclass
class Probe:
    """Reads its texts with the bare base and with adapters."""

    loaded: LoadedBase
    texts: Sequence[str]
    max_length: int
    batch_size: int
    _features: list[Tensor] = field(default_factory=list)

    def base(self) -> Probed:
        """The bare base."""
        loss, tokens = self._read([None] * len(self.texts))
        return Probed(0, len(self.texts), tokens, loss)

    def after(
        self, step: int, bodies: Mapping[str, Adapter | None], router: Router | None, before: Probed | None
    ) -> Probed:
        """After a step.

        Args:
            step: From 1.
            bodies: What answers each task learnt so far; None is the bare base.
            router: None if there is nothing to route.
            before: The last point.
        """
        known = {} if before is None else {before.digests[task]: loss for task, loss in before.tasks.items()}
        digests, tasks = {}, {}
        tokens = 0 if before is None else before.tokens
        for task, body in bodies.items():
            digests[task] = "" if body is None else hash_tensors(body.body_tensors())
            if digests[task] not in known:
                known[digests[task]], tokens = self._read([body] * len(self.texts))
            tasks[task] = known[digests[task]]
        # a mean of equal numbers is that number, to the last bit
        mean = fmean(tasks.values()) if len(set(tasks.values())) > 1 else next(iter(tasks.values()))
        routed, routes = (None, {}) if router is None else self._routed(bodies, router)
        return Probed(step, len(self.texts), tokens, mean, tasks, digests, routed, routes)

    def _routed(self, bodies: Mapping[str, Adapter | None], router: Router) -> tuple[float, dict[str, int]]:
        """One mixed batch after another: every text with the adapter that the router takes for it."""
        if not self._features:
            self._features.append(router_features(self.loaded, router, self.texts, self.batch_size))
        chosen = [ABSTAINED if i == ABSTAIN else router.names[i] for i in router.route(self._features[0]).task.tolist()]
        loss, _ = self._read([None if name == ABSTAINED else bodies[name] for name in chosen])
        return loss, dict(sorted(Counter(chosen).items()))

    def _read(self, adapters: Sequence[Adapter | None]) -> tuple[float, int]:
        scored = read(self.loaded, self.texts, adapters, max_length=self.max_length, batch_size=self.batch_size)
        tokens = sum(row.targets for row in scored)
        if not tokens:
            raise DataError("probe: every text is a single token; nothing can be predicted; give longer texts")
        return sum(row.loss for row in scored) / tokens, tokens
