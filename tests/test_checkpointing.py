"""Gradient checkpointing changes what is kept, and nothing else."""

import pytest
import torch

from sarfm.models.checkpointing import KeptBytes, set_checkpointing
from sarfm.models.kinds import build_encoder
from sarfm.models.mae import MAE
from sarfm.models.networks import build_network
from sarfm.models.vit import Encoder
from sarfm.scenes.channels import Target
from sarfm.tasks.predictor import Predictor
from sarfm.tasks.tasks import Classes
from sarfm.train.steps import Recipe, Training


def mae(**options):
    torch.manual_seed(0)
    return MAE(Encoder(3, 8, 64, 4, 4, drop_path=0.3, **options), 32, 2, 4)


def predictor(name="vit-nano", head="setr-pup"):
    torch.manual_seed(0)
    tasks = {"land": Classes(Target("land", classes={0: "a", 1: "b", 2: "c"}))}
    return Predictor(build_encoder(name, 3, None if "swin" in name else 8, 0.2), tasks, head, 16)


def step(model, batch, again, precision=torch.float32):
    """Loss, gradients and kept bytes of one step."""
    set_checkpointing(model, again)
    model.zero_grad()
    torch.manual_seed(1)  # of stochastic depth
    with KeptBytes(model) as kept, torch.autocast("cpu", precision, enabled=precision is not torch.float32):
        loss, _ = model.loss(batch)
    loss.backward()
    return loss.detach(), [w.grad.clone() for w in model.parameters() if w.grad is not None], kept.total


def masked(model, valid=None):
    image = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    return model.draw({"image": image, "valid": valid}, torch.Generator().manual_seed(3))


def labelled():
    generator = torch.Generator().manual_seed(2)
    return {
        "image": torch.randn(4, 3, 96, 96, generator=generator),
        "target_land": torch.randint(0, 3, (4, 96, 96), generator=generator),
    }


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mae", "mae with holes", "learned", "vit", "swin"])
def test_loss_and_gradients_are_the_same_and_less_is_kept(kind, precision):
    if kind in ("vit", "swin"):
        model, batch = predictor("vit-nano" if kind == "vit" else "swin-nano"), labelled()
    else:
        model = mae(**({"positions": "learned", "grid": (12, 12)} if kind == "learned" else {}))
        valid = torch.rand(4, 96, 96) > 0.3 if kind == "mae with holes" else None
        batch = masked(model.train(), valid)
    model.train()
    (loss, gradients, kept), (other, others, less) = (step(model, batch, again, precision) for again in (False, True))
    assert abs(loss - other) <= 1e-6 and len(gradients) == len(others)
    assert all((a - b).abs().max() <= 1e-6 for a, b in zip(gradients, others, strict=True))
    assert less < 0.8 * kept, (less, kept)


def test_a_recipe_switches_it_on_in_all_parts_and_refuses_models_without_layers():
    training = Training(mae(), Recipe(steps=2, checkpoint_layers=True))
    assert training.learner.encoder.checkpoint_layers and training.learner.decoder.checkpoint_layers
    assert not Training(mae(), Recipe(steps=2)).learner.encoder.checkpoint_layers
    tasks = {"land": Classes(Target("land", classes={0: "a", 1: "b"}))}
    with pytest.raises(ValueError, match="Predictor has none. Leave it False"):
        Training(Predictor(build_network("unet_starter", 3), tasks), Recipe(steps=2, checkpoint_layers=True))


def test_a_training_goes_on_with_it_or_without_it():
    plain, less = (Training(mae(), Recipe(steps=2, checkpoint_layers=again)).settings() for again in (False, True))
    assert plain == less


def test_nothing_is_computed_again_where_no_gradient_is_wanted():
    model, calls = mae(), []
    set_checkpointing(model)
    model.encoder.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.loss(masked(model))
    assert len(calls) == 1
    loss, _ = model.loss(masked(model))
    loss.backward()
    assert len(calls) == 3  # once, and again in the backward pass
