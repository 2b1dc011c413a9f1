"""A task: classes in an order, learnt as thresholds (Frank and Hall 2001) and scored by how far off they are."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sarfm.tasks.tasks import Task

UNKNOWN = 255


@dataclass(frozen=True)
class Ordered(Task):
    """Ordered classes: K-1 questions "more than k?", the mean distance between decided and true class as score."""

    kind: ClassVar[str] = "classes"
    headline: ClassVar[str] = "distance"

    @property
    def channels(self) -> int:  # K-1
        """Count the questions."""
        return self.target.size - 1

    def loss(
        self,
        output: Tensor,  # (B, K-1, H, W)
        truth: Tensor,  # (B, H, W) class numbers, 255 unknown
        valid: Tensor | None = None,  # (B, H, W)
    ) -> Tensor:
        """Ask each threshold."""
        known = truth != UNKNOWN if valid is None else (truth != UNKNOWN) & valid
        more = torch.stack([truth > k for k in range(self.channels)], 1).to(output.dtype)
        each = nn.functional.binary_cross_entropy_with_logits(output, more, reduction="none").mean(1)
        return (each * known).sum() / known.sum().clamp_min(1)

    def decide(
        self,
        output: Tensor,  # (B, K-1, H, W)
    ) -> Tensor:  # (B, H, W) class numbers
        """Count the thresholds that are passed."""
        return (output > 0).sum(1).to(torch.uint8)

    def tally(
        self,
        decided: Tensor,  # (B, H, W)
        truth: Tensor,  # (B, H, W)
    ) -> Tensor:  # (B, 2): pixels, sum of distances
        """Add up how far off each image is."""
        known = truth != UNKNOWN
        far = (decided.long() - truth.long()).abs() * known
        return torch.stack([known.flatten(1).sum(1), far.flatten(1).sum(1)], 1).double()

    def scores(
        self,
        sums: np.ndarray,  # (..., 2)
    ) -> dict[str, np.ndarray]:
        """Mean distance between decided and true class."""
        return {"distance": sums[..., 1] / np.maximum(sums[..., 0], 1)}
