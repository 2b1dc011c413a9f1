"""Random convolutional features: fixed filters from the training images, as a contestant like any other."""

import pytest
import torch
from torch.nn import functional as F

from sarfm.models.kinds import NETWORKS, build, describe
from sarfm.models.random_features import RandomFeatures, draw_patches, whiten
from sarfm.models.weights import load_model, save_model
from sarfm.patches.contract import InputContract
from sarfm.scenes.channels import Target
from sarfm.tasks.predictor import Predictor
from sarfm.tasks.tasks import Classes, Number
from sarfm.train.optimizer import parameter_groups

TASKS = {
    "land": Classes(Target("land", classes={0: "a", 1: "b", 2: "c"})),
    "tree_cover": Number(Target("tree_cover", "number", "tile", units="%", limits=(0, 100))),
}


def images(seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    image = F.avg_pool2d(torch.randn(6, channels, 42, 42, generator=generator), 3, 1)
    return image, torch.rand(6, 40, 40, generator=generator) > 0.02


def learnt(seed=0, **options):
    network = RandomFeatures(3, 32, **options)
    network.learn_from(*images(), torch.Generator().manual_seed(seed))
    return network


def test_gaussian_features_are_torchgeo_s():
    """relu(w * x - 1) and relu(1 - w * x), pooled over the image, as read in torchgeo.models.RCF."""
    network, image = RandomFeatures(3, 32, filters="gaussian", seed=7), images()[0]
    weight = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(network.weight, weight)
    response = F.conv2d(image, weight, torch.full((16,), -1.0))
    pooled = torch.cat([F.relu(response), F.relu(-response)], 1).mean((2, 3))
    assert torch.allclose(network(image)[:, :, 1:-1, 1:-1].mean((2, 3)), pooled, atol=1e-5)


def test_nothing_of_it_learns():
    network = learnt()
    assert not list(network.parameters())
    model = Predictor(network, TASKS)
    groups = parameter_groups(model, 0.05)
    assert sum(p.numel() for g in groups for p in g["params"]) == 33 * 3 + 33
    before = {name: value.clone() for name, value in network.state_dict().items()}
    batch = {
        "image": images(1)[0],
        "target_land": torch.randint(0, 3, (6, 40, 40)),
        "target_tree_cover": torch.rand(6) * 100,
    }
    optimiser = torch.optim.AdamW(groups, 0.1)
    for _ in range(3):
        loss, _ = model.loss(batch)
        loss.backward()
        optimiser.step()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_filters_come_from_observed_patches_of_the_images_by_the_generator_alone():
    image, valid = images()
    hostile = image.masked_fill(~valid[:, None], float("nan"))
    found = draw_patches(hostile, valid, 200, 3, torch.Generator().manual_seed(0))
    assert found.isfinite().all() and found.shape == (200, 3, 3, 3)
    windows = F.unfold(image, 3).transpose(1, 2).flatten(0, 1).view(-1, 3, 3, 3)
    assert all((windows == patch).flatten(1).all(1).any() for patch in found[:20])
    first, again, other = (learnt(seed).weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    broken = RandomFeatures(3, 32)
    broken.learn_from(hostile, valid, torch.Generator().manual_seed(0))
    assert torch.allclose(broken.weight, first) and torch.allclose(broken.centre, learnt().centre)
    with pytest.raises(ValueError, match="no patch of 3 x 3 px"):
        draw_patches(image, torch.zeros_like(valid), 5, 3, torch.Generator())


def test_whitened_patches_are_uncorrelated():
    patches = draw_patches(*images(), 4000, 3, torch.Generator().manual_seed(0))
    unit = F.normalize(patches.flatten(1) - patches.flatten(1).mean(1, keepdim=True), dim=1).double()
    variance, axes = torch.linalg.eigh(unit.T @ unit / len(unit))
    zca = axes @ torch.diag((variance.clamp(min=0) + 1e-3) ** -0.5) @ axes.T
    expected = unit @ zca @ zca.T
    assert torch.allclose(whiten(patches, patches).flatten(1).double(), expected, atol=1e-4)


@pytest.mark.parametrize("filters", ["images", "whitened", "gaussian"])
def test_features_of_the_training_images_have_mean_zero_and_spread_one(filters):
    network, (image, valid) = learnt(filters=filters), images()
    blank = image.masked_fill(~valid[:, None], 0)
    found = network(blank).permute(1, 0, 2, 3)[:, valid]
    assert found.mean(1).abs().max() < 1e-4 and (found.std(1) - 1).abs().max() < 1e-3
    if filters != "gaussian":
        response = F.conv2d(blank, network.weight)
        assert (response.std((0, 2, 3)) - 1).abs().max() < 0.25


def test_it_is_saved_and_built_again(tmp_path):
    model = Predictor(learnt(), TASKS).eval()
    assert "rcf" in NETWORKS and describe(model.network)["kind"] == "rcf"
    assert build(describe(model.network)).width == 32
    contract = InputContract(
        channels=["a", "b", "c"], units="dB", quantity="sigma0", mean=[0.0] * 3, std=[1.0] * 3, patch_size=8, crop_px=40
    )
    save_model(model, tmp_path, contract)
    again, _ = load_model(tmp_path)
    image, valid = images(2)
    for name, output in model(image, valid).items():
        assert torch.equal(again(image, valid)[name], output)


def test_what_does_not_fit_is_refused():
    for wrong in ({"features": 31}, {"side_px": 4}, {"filters": "learnt"}):
        with pytest.raises(ValueError, match="features are even, side_px is odd"):
            RandomFeatures(3, **wrong)
    with pytest.raises(ValueError, match="expected 3 channels, got 2"):
        RandomFeatures(3)(torch.zeros(1, 2, 8, 8))
