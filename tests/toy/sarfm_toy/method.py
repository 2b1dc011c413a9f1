"""A method: tell each token's mean from its neighbours'."""

import torch
from torch import Tensor, nn


class TokenMeans(nn.Module):
    """Hide some tokens and predict the mean of each channel in them from the mean of all visible ones' codes."""

    views = None  # one square

    def __init__(
        self,
        encoder: nn.Module,  # any encoder with one map
        hidden_share: float = 0.5,  # of the tokens, in (0, 1)
    ) -> None:
        super().__init__()
        self.encoder, self.hidden_share = encoder, hidden_share
        width, _ = encoder.maps[0]
        self.readout = nn.Linear(width, encoder.channels)
        self.steps_done = 0

    def draw(
        self,
        batch: dict[str, Tensor],  # image (B, C, H, W), valid (B, H, W)
        generator: torch.Generator | None = None,  # draws what is hidden
    ) -> dict[str, Tensor]:  # with "hidden" (B, N) bool, the same number in every row
        """Draw what is hidden."""
        image, stride = batch["image"], self.encoder.stride_px
        count = (image.shape[-2] // stride) * (image.shape[-1] // stride)
        noise = torch.rand(len(image), count, generator=generator, device=image.device)
        hidden = torch.zeros_like(noise, dtype=torch.bool)
        hidden.scatter_(1, noise.argsort(1)[:, : int(self.hidden_share * count)], True)
        return {**batch, "hidden": hidden}

    def loss(
        self,
        batch: dict[str, Tensor],  # as `draw` gives it
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare predicted and true means of the hidden tokens."""
        visible = ~batch["hidden"]
        tokens = self.encoder(batch["image"], batch.get("valid"), visible)
        truth = nn.functional.avg_pool2d(batch["image"], self.encoder.stride_px).flatten(2).transpose(1, 2)
        error = (self.readout(tokens.mean(1, keepdim=True)) - truth)[batch["hidden"]].square().mean()
        return error, {"error": error.detach()}

    def stepped(
        self,
        step: int,  # that was done
        steps: int,  # of all
    ) -> None:
        """Count."""
        self.steps_done = step

    def pictures(
        self,
        image: Tensor,  # (B, C, H, W)
        valid: Tensor | None,  # (B, H, W)
        generator: torch.Generator | None = None,  # unused
    ) -> dict[str, Tensor]:
        """Make none."""
        return {}

    def config(self) -> dict[str, object]:
        """Give the arguments that build this method again."""
        return {"hidden_share": self.hidden_share}
