"""Predictors of one target, as small as a test wants them, and counting by hand."""

import numpy as np
from torch import nn

from sarfm.models.networks import build_network
from sarfm.scenes.channels import Target
from sarfm.tasks.predictor import Predictor
from sarfm.tasks.tasks import Classes


def one_target(body: nn.Module, classes: int, head: str = "upernet", width: int = 64, **options: object) -> Predictor:
    """Predict the classes of a target named label."""
    target = Target("label", classes={k: f"class {k}" for k in range(classes)})
    return Predictor(body, {"label": Classes(target)}, head, width, **options)


def unet(channels: int, classes: int, encoder: str = "resnet18") -> Predictor:
    """Predict the same with a U-Net."""
    return one_target(build_network("unet", channels, encoder), classes)


def confusion(decided: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Count pair by pair; rows are the truth, what carries 255 isn't counted."""
    return np.array([[np.sum((truth == t) & (decided == p)) for p in range(classes)] for t in range(classes)])
