"""A few trials over method, placement, size and learning rate, by Optuna's TPE; the best trial's adapter is kept.

Every trial trains on the same rows and is measured on held-out ones, which are not the test rows. Trials are in a
database in the search's folder. A search that was killed goes on with the trial it was in, from the trainer's
checkpoint, and comes to the same end: what a trial tries depends on the seed and the trials before it alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import safe_open
from safetensors.torch import save_file

from graftory.adapter import Adapter, spec_from_json, spec_to_json
from graftory.data import Rows, TaskFile
from graftory.errors import ConfigError, CorruptAdapterError
from graftory.schema import Json, canonical, decode, encode
from graftory.settings import TrainSettings
from graftory.training.base import LoadedBase
from graftory.training.evaluation import Job, evaluate
from graftory.training.learning import train
from graftory.training.metrics import LOWER_IS_BETTER
from graftory.training.search_space import Candidate, SearchSpace

if TYPE_CHECKING:
    import optuna

_STUDY, _DATABASE, _CLAIM, _BEST = "search", "trials.db", "search.json", "best.safetensors"
_RESULT = "result"
_RANDOM_TRIALS = 4
"""So many trials are drawn at random before TPE looks at their results."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial that came to an end."""

    number: int
    """From 1."""
    method: str
    options: Mapping[str, Json]
    learning_rate: float
    value: float | None
    """The metric on the held-out rows; None if there is none."""
    parameters: int
    """Numbers in the adapter, its head apart."""
    reason: str = ""
    """Why there is no value."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to."""

    adapter: Adapter
    """Of the best trial."""
    best: int
    """Its number."""
    metric: str
    trials: tuple[Trial, ...]
    held_out: int
    """Rows that trials were measured on."""

    def notes(self) -> dict[str, Json]:
        """What goes into the record of the version."""
        found = {"best": self.best, "metric": self.metric, "held_out": self.held_out, "trials": encode(self.trials)}
        return {"search": found}


TrialProgress = Callable[[int, Candidate | Trial], None]
"""Told of every trial twice: its number with what it will train, and what came of it."""


def check_installed() -> None:
    """Say what to install where Optuna is missing.

    Raises:
        ConfigError: If it is.
    """
    if find_spec("optuna") is None:
        raise ConfigError("a search needs the package optuna, which is not installed: pip install 'graftory[search]'")


def hold_out(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Cut rows in two, by a hash of their numbers: what is trained on, and a share (at least one row) held out.

    Raises:
        ConfigError: If there are too few.
    """
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise ConfigError(f"search: got {len(rows)} training rows, wanted at least 2, as some are held out")
    ranked = sorted(range(len(rows)), key=lambda row: hashlib.sha256(f"{seed}:held-out:{row}".encode()).digest())
    parts = (sorted(ranked[count:]), sorted(ranked[:count]))
    kept, held = (
        Rows(rows.split, tuple(rows.texts[i] for i in part), tuple(rows.targets[i] for i in part), rows.labels)
        for part in parts
    )
    return kept, held


def search(
    loaded: LoadedBase,
    task: TaskFile,
    rows: Rows,
    held_out: Rows,
    space: SearchSpace,
    settings: TrainSettings,
    *,
    trials: int,
    folder: str | Path,
    progress: TrialProgress | None = None,
) -> Found:
    """Try so many candidates, or go on with a search in the folder until it has so many.

    Args:
        loaded: The base model.
        task: The task; its metric is the aim.
        rows: Training rows.
        held_out: Rows that trials are measured on.
        space: What is tried. The first trial has the defaults of its first method.
        settings: How every trial is trained; the learning rate is the trial's.
        trials: How many.
        folder: Holds trials, the best adapter and the checkpoints of the trial in progress.
        progress: Told of every trial.

    Raises:
        ConfigError: If Optuna is missing, the folder is another search's, or no trial came to a value.
    """
    check_installed()
    if trials < 1:
        raise ConfigError(f"search: got {trials} trials, wanted 1 or more")
    root = Path(folder)
    _claim(root, loaded, task, rows, held_out, space, settings)
    work = _Work(loaded, task, rows, held_out, settings, root)
    with _study(root) as study:
        _take_up(study, space)
        while len(done := _finished(study)) < trials:
            number = len(done) + 1
            trial = _ask(study, settings.seed, number)
            candidate = space.suggest(trial)
            if progress is not None:
                progress(number, candidate)
            made = work.run(number, candidate, done)
            trial.set_user_attr(_RESULT, encode(made))
            study.tell(trial, made.value) if made.value is not None else study.tell(trial, state=_states().FAIL)
            shutil.rmtree(work.checkpoints(number), ignore_errors=True)
            if progress is not None:
                progress(number, made)
    best = best_of(done, task.metric)
    return Found(work.load(best), best.number, task.metric, tuple(done), len(held_out))


def best_of(trials: Sequence[Trial], metric: str) -> Trial:
    """The best value; of equal ones the smallest adapter, then the earliest.

    Raises:
        ConfigError: If no trial has a value.
    """
    sign = 1 if metric in LOWER_IS_BETTER else -1
    measured = {
        (sign * trial.value, trial.parameters, trial.number): trial for trial in trials if trial.value is not None
    }
    if not measured:
        raise ConfigError(f"search: none of {len(trials)} trials came to a value; the last: {trials[-1].reason}")
    return measured[min(measured)]


@dataclass(frozen=True, slots=True)
class _Work:
    """Trains and measures candidates, and keeps the best adapter."""

    loaded: LoadedBase
    task: TaskFile
    rows: Rows
    held_out: Rows
    settings: TrainSettings
    root: Path

    def checkpoints(self, number: int) -> Path:
        return self.root / "work" / f"{number:03}"

    def run(self, number: int, candidate: Candidate, before: Sequence[Trial]) -> Trial:
        made = Trial(number, candidate.config.method, candidate.options, candidate.learning_rate, None, 0)
        settings = replace(self.settings, learning_rate=candidate.learning_rate)
        try:
            adapter = train(
                self.loaded, self.task, self.rows, candidate.config, settings,
                name=f"trial {number}", output_dir=self.checkpoints(number),
            )  # fmt: skip
        except ConfigError as error:
            # what does not fit this base is no reason to stop: the table says so
            return replace(made, reason=str(error))
        [metrics] = evaluate(self.loaded, [Job(made.method, adapter, None, self.task, self.held_out)])
        made = replace(made, parameters=sum(tensor.numel() for tensor in adapter.body_tensors().values()))
        if not math.isfinite(metrics[0].value):
            return replace(made, reason=f"{self.task.metric} is {metrics[0].value}")
        made = replace(made, value=metrics[0].value)
        if best_of([*before, made], self.task.metric) is made:
            self._save(adapter, number)
        return made

    def _save(self, adapter: Adapter, number: int) -> None:
        """In one file, which appears whole or not at all; it takes the place of the last best."""
        tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in adapter.tensors.items()}
        spec = canonical(spec_to_json(adapter.spec)).decode()
        scratch = self.root / f".{_BEST}.part"
        save_file(tensors, scratch, metadata={"format": "pt", "trial": str(number), "spec": spec})
        scratch.replace(self.root / _BEST)

    def load(self, best: Trial) -> Adapter:
        path = self.root / _BEST
        try:
            with safe_open(path, framework="pt") as file:
                metadata: Mapping[str, str] = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        except OSError as error:
            raise CorruptAdapterError(f"{path} cannot be read ({error}); search again in a new folder") from None
        if metadata["trial"] != str(best.number):
            raise CorruptAdapterError(
                f"{path} is of trial {metadata['trial']}, not of the best, {best.number}; start again in a new folder"
            )
        return Adapter(spec_from_json(json.loads(metadata["spec"]), str(path)), tensors)


def _claim(
    root: Path,
    loaded: LoadedBase,
    task: TaskFile,
    rows: Rows,
    held_out: Rows,
    space: SearchSpace,
    settings: TrainSettings,
) -> None:
    """Mark the folder as this search's; the number of trials may grow."""
    mine = {
        "base": loaded.base.weights_hash,
        "task": {"kind": task.kind, "metric": task.metric, "max_length": task.max_length, "template": task.template},
        "rows": rows.hash,
        "held_out": held_out.hash,
        "space": encode(space),
        "settings": encode(settings),
    }
    path = root / _CLAIM
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key, value in json.loads(canonical(mine)).items() if before.get(key) != value]
        if changed:
            raise ConfigError(
                f"{root} holds another search (other {', '.join(changed)}); delete it or give another folder"
            )
        return
    root.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_bytes(canonical(mine))
    scratch.replace(path)


@contextmanager
def _study(root: Path) -> Iterator[optuna.Study]:
    """The study in the folder's database."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{root / _DATABASE}")
    try:
        claim = json.loads((root / _CLAIM).read_text(encoding="utf-8"))
        lower = claim["task"]["metric"] in LOWER_IS_BETTER
        direction: Literal["minimize", "maximize"] = "minimize" if lower else "maximize"
        yield optuna.create_study(storage=storage, study_name=_STUDY, direction=direction, load_if_exists=True)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _take_up(study: optuna.Study, space: SearchSpace) -> None:
    """Let trials that a kill cut off be tried again, with what they were to try; in a new study, the defaults first."""
    states = _states()
    for stale in study.get_trials(states=(states.RUNNING,)):
        if _RESULT in stale.user_attrs:  # measured, but not told
            value = stale.user_attrs[_RESULT]["value"]
            study.tell(stale.number, value) if value is not None else study.tell(stale.number, state=states.FAIL)
            continue
        if not study.get_trials(deepcopy=False, states=(states.WAITING,)):
            study.enqueue_trial({**stale.system_attrs.get("fixed_params", {}), **stale.params})
        study.tell(stale.number, state=states.FAIL)
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(_defaults(space))


def _defaults(space: SearchSpace) -> dict[str, Any]:
    """The first method with its own defaults, where the space has them."""
    from graftory.config import CONFIGS

    method = space.methods[0]
    own = CONFIGS[method]()
    wanted = {**encode(own), "targets": "qv"}
    choices = space.choices(method)
    chosen = {f"{method}.{name}": wanted[name] for name, values in choices.items() if wanted[name] in values}
    return {"method": method, "learning_rate": TrainSettings().learning_rate, **chosen}


def _ask(study: optuna.Study, seed: int, number: int) -> optuna.Trial:
    """The next trial; its sampler's seed follows from the search's and the trial's number."""
    import optuna

    digest = hashlib.sha256(f"{seed}/trial/{number}".encode()).digest()
    study.sampler = optuna.samplers.TPESampler(
        seed=int.from_bytes(digest[:4], "big") & 0x7FFFFFFF, n_startup_trials=_RANDOM_TRIALS
    )
    return study.ask()


def _finished(study: optuna.Study) -> list[Trial]:
    """Trials that came to an end, in order; those that were cut off are not among them."""
    states = _states()
    trials = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL))
    results = [trial.user_attrs[_RESULT] for trial in trials if _RESULT in trial.user_attrs]
    return sorted((decode(Trial, result, "trial") for result in results), key=lambda trial: trial.number)


def _states() -> type[optuna.trial.TrialState]:
    import optuna

    return optuna.trial.TrialState
