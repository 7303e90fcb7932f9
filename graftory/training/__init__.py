"""Train, measure and use adapters on frozen models, with transformers' `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftory.lazy import lazily
from graftory.settings import TrainSettings

if TYPE_CHECKING:
    from graftory.training.base import LoadedBase, load_base
    from graftory.training.company import ALONE, Company, Learnt, OtherTask
    from graftory.training.evaluation import Job, evaluate
    from graftory.training.learning import train, train_in_company
    from graftory.training.losses import RowLosses, row_losses
    from graftory.training.metrics import METRICS, measure
    from graftory.training.prediction import Prediction, Query, predict
    from graftory.training.trainer import NO_HOOKS, GradientHook, Hooks, LossTerm, StepContext, StepRoute

__all__ = [
    "ALONE",
    "METRICS",
    "NO_HOOKS",
    "Company",
    "GradientHook",
    "Hooks",
    "Job",
    "Learnt",
    "LoadedBase",
    "LossTerm",
    "OtherTask",
    "Prediction",
    "Query",
    "RowLosses",
    "StepContext",
    "StepRoute",
    "TrainSettings",
    "evaluate",
    "load_base",
    "measure",
    "predict",
    "row_losses",
    "train",
    "train_in_company",
]

__getattr__ = lazily(
    __name__,
    {
        "ALONE": "graftory.training.company",
        "Company": "graftory.training.company",
        "GradientHook": "graftory.training.trainer",
        "Hooks": "graftory.training.trainer",
        "Job": "graftory.training.evaluation",
        "Learnt": "graftory.training.company",
        "LoadedBase": "graftory.training.base",
        "LossTerm": "graftory.training.trainer",
        "METRICS": "graftory.training.metrics",
        "NO_HOOKS": "graftory.training.trainer",
        "OtherTask": "graftory.training.company",
        "Prediction": "graftory.training.prediction",
        "Query": "graftory.training.prediction",
        "RowLosses": "graftory.training.losses",
        "StepContext": "graftory.training.trainer",
        "StepRoute": "graftory.training.trainer",
        "evaluate": "graftory.training.evaluation",
        "load_base": "graftory.training.base",
        "measure": "graftory.training.metrics",
        "predict": "graftory.training.prediction",
        "row_losses": "graftory.training.losses",
        "train": "graftory.training.learning",
        "train_in_company": "graftory.training.learning",
    },
)
