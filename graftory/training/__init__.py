"""Train, measure and use adapters on frozen models, with transformers' `Trainer`."""

from graftory.settings import TrainSettings
from graftory.training.base import LoadedBase, load_base
from graftory.training.evaluate import Job, evaluate
from graftory.training.losses import RowLosses, row_losses
from graftory.training.metrics import METRICS, measure
from graftory.training.predict import Prediction, Query, predict
from graftory.training.train import train
from graftory.training.trainer import GradientHook, Hooks, LossTerm, StepContext

__all__ = [
    "METRICS",
    "GradientHook",
    "Hooks",
    "Job",
    "LoadedBase",
    "LossTerm",
    "Prediction",
    "Query",
    "RowLosses",
    "StepContext",
    "TrainSettings",
    "evaluate",
    "load_base",
    "measure",
    "predict",
    "row_losses",
    "train",
]
