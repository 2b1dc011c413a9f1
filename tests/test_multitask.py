"""Several targets from one body: outputs, losses, weights and what is left alone."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sarfm.models.kinds import build, build_encoder, describe
from sarfm.models.mae import MAE
from sarfm.models.networks import BASELINES, build_network
from sarfm.models.tokens import patchify
from sarfm.models.vit import Encoder
from sarfm.models.weights import load_encoder, load_model, save_model
from sarfm.patches.contract import InputContract
from sarfm.scenes.channels import Target
from sarfm.tasks.predictor import Predictor
from sarfm.tasks.tasks import Classes
from sarfm.train.steps import Recipe, Training

SIZES = {"sic": 11, "sod": 6, "floe": 7}
WEIGHTS = {"sic": 1.0, "sod": 3.0, "floe": 3.0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def charts(names=SIZES, weights=WEIGHTS, avg_non_ignore=False, number="sic"):
    """Three targets of classes, concentration learnt as a number."""
    target = lambda name: Target(name, classes={k: f"class {k}" for k in range(SIZES[name])})
    loss = lambda name: "number" if name == number else "cross_entropy"
    options = {"avg_non_ignore": avg_non_ignore}
    return {n: Classes(target(n), weight=weights[n], loss_of=loss(n), **options) for n in names}


def small(tasks=None, **options):
    torch.manual_seed(0)
    return Predictor(Encoder(2, 8, 32, 4, 2), tasks or charts(), **{"head_width": 16, "dropout": 0.1, **options})


def network(name, tasks=None, channels=2, encoder=None):
    body = build_network(name, channels, encoder or ("mit_b0" if name == "segformer" else "resnet18"))
    return Predictor(body, tasks or charts())


def batch(size=(32, 48), tiles=2, seed=0):
    found = {"image": torch.randn(tiles, 2, *size, generator=seeded(seed)), "patch": torch.arange(tiles)}
    for k, (chart, classes) in enumerate(SIZES.items()):
        truth = torch.randint(0, classes, (tiles, *size), generator=seeded(seed + k + 1))
        found[f"target_{chart}"] = truth.masked_fill(torch.rand(tiles, *size, generator=seeded(9 + k)) < 0.3, 255)
    found["valid"] = torch.rand(tiles, *size, generator=seeded(99)) > 0.1
    return found


def models():
    yield small()
    yield small(auxiliary=True, layers=[0, 1, 2, 3])
    yield small(head="linear")
    for name in BASELINES:
        yield network(name)
    yield network("upernet", encoder="tu-convnext_atto")


# models


@pytest.mark.parametrize("size", [(64, 64), (50, 71)])
def test_every_model_predicts_every_target_at_any_size(size):
    image, valid = torch.randn(2, 2, *size), torch.rand(2, *size) > 0.1
    valid[0, :20] = False
    for model in models():
        with torch.no_grad():
            drawn = model.eval()(image, valid)
            other = model(image.masked_fill(~valid[:, None], float("nan")), valid)
        shapes = {chart: tuple(x.shape) for chart, x in drawn.items()}
        assert shapes == {"sic": (2, 1, *size), "sod": (2, 6, *size), "floe": (2, 7, *size)}
        assert all(x.dtype is torch.float32 and x.isfinite().all() for x in drawn.values())
        assert all(torch.equal(drawn[chart], other[chart]) for chart in SIZES), "what was not observed has an influence"


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels(channels):
    for name in ("unet_starter", "upernet"):
        drawn = network(name, charts(["sod"]), channels).eval()(torch.randn(1, channels, 32, 40))
        assert drawn["sod"].shape == (1, 6, 32, 40)


def test_swin_is_not_bound_to_one_size():
    model = network("upernet", charts(["sod"]), encoder="tu-swin_tiny_patch4_window7_224").eval()
    with torch.no_grad():
        assert model(torch.randn(1, 2, 96, 50))["sod"].shape == (1, 6, 96, 50)


def test_auxiliary_heads_exist_in_training_only():
    model, data = small(auxiliary=True), batch()
    names = set(model.train()(data["image"], data["valid"]))
    assert names == set(SIZES) | {f"{chart}_auxiliary" for chart in SIZES}
    assert set(model.eval()(data["image"], data["valid"])) == set(SIZES)
    assert set(small().train()(data["image"])) == set(SIZES)


def test_no_parameter_is_left_without_gradient():
    for model in models():
        model.train().loss(batch((64, 64)))[0].backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        if model.encodes:
            assert not missing, missing
        else:  # a photograph network's encoder may have a classification layer that nobody asks
            assert len(missing) <= 4, missing


def test_options_that_do_not_fit_are_refused():
    encoder = build_encoder("vit-nano", 2, 8)
    for wrong, said in (({"layers": [1, 2]}, "four layers"), ({"head": "a"}, "head")):
        with pytest.raises(ValueError, match=said):
            Predictor(encoder, charts(), **wrong)
    with pytest.raises(ValueError, match="at least 2"):
        Classes(Target("sic", classes={0: "water"}))
    with pytest.raises(ValueError, match="there is no network 'vgg'"):
        build_network("vgg", 2)
    for model in (small(), network("deeplabv3plus")):
        with pytest.raises(ValueError, match="at least 2 tiles"):
            model.train()(torch.randn(1, 2, 32, 32))


@pytest.mark.parametrize("name", [None, *BASELINES])
def test_a_model_of_charts_comes_back_exactly(name, tmp_path):
    model = small(auxiliary=True, layers=[0, 1, 2, 3]) if name is None else network(name)
    contract = InputContract(
        channels=["hh", "hv"], quantity="sigma0", units="dB", spacing_m=200.0, patch_size=8, mean=[-14, -24], std=[5, 5]
    )
    save_model(model, tmp_path, contract)
    again, _ = load_model(tmp_path, kind="predictor")
    assert again.config() == model.config() and list(again.tasks) == list(SIZES)
    assert again.tasks == model.tasks and again.tasks["sic"].loss_of == "number"
    image = torch.randn(1, 2, 40, 32)
    ours, theirs = model.eval()(image), again(image)
    assert all(torch.equal(ours[chart], theirs[chart]) for chart in SIZES)
    if name:
        with pytest.raises(ValueError, match="no encoder to go on with"):
            load_encoder(tmp_path)
    else:
        assert torch.equal(load_encoder(tmp_path)[0](image), model.encoder(image))


def test_the_order_of_targets_in_a_file_does_not_matter():
    for model in (small(), network("unet_winner")):
        config = json.loads(json.dumps(describe(model), sort_keys=True))
        again = build(config).eval()
        again.load_state_dict(model.state_dict())
        image = torch.randn(1, 2, 32, 32)
        assert all(torch.equal(x, again(image)[chart]) for chart, x in model.eval()(image).items())


# losses


def test_concentration_is_the_nearest_class_in_range():
    said = torch.tensor([-3.0, 0.49, 0.51, 9.6, 10.4, 99.0]).view(1, 1, 1, 6)
    assert charts()["sic"].decide(said).flatten().tolist() == [0, 0, 1, 10, 10, 10]


def test_squared_error_is_over_labelled_pixels_only():
    truth, task = torch.tensor([[[0, 10, 255, 5]]]), charts()["sic"]
    said = torch.tensor([[[[1.0, 8.0, 1e20, 5.0]]]], requires_grad=True)
    loss = task.loss(said, truth)
    loss.backward()
    assert torch.isclose(loss, torch.tensor((1 + 4 + 0) / 3)) and said.grad[0, 0, 0, 2] == 0
    infinite = torch.full((1, 1, 1, 4), float("nan"), requires_grad=True)
    nothing = task.loss(infinite, torch.full_like(truth, 255))
    nothing.backward()
    assert nothing == 0 and infinite.grad.abs().sum() == 0


@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_the_loss_is_the_published_sum(avg_non_ignore):
    model, data = small(charts(avg_non_ignore=avg_non_ignore), auxiliary=True, dropout=0.0), batch()
    loss, terms = model.train().loss(data)
    outputs, expected = model(data["image"], data["valid"]), 0.0
    for chart, weight in WEIGHTS.items():
        truth = data[f"target_{chart}"].masked_fill(~data["valid"], 255)
        there = truth != 255
        for name, factor in ((chart, 1.0), (f"{chart}_auxiliary", 0.4)):
            if chart == "sic":
                term = ((outputs[name][:, 0] - truth)[there] ** 2).mean()
            else:
                term = F.cross_entropy(outputs[name], truth, ignore_index=255)
                term = term if avg_non_ignore else term * there.sum() / truth.numel()
            assert torch.isclose(terms[f"loss_{name}"], term, rtol=1e-4)
            expected = expected + weight * factor * term
    assert torch.isclose(loss, expected, rtol=1e-4)
    assert {f"accuracy_{chart}" for chart in SIZES} < set(terms)


def test_the_auxiliary_weight_and_the_weights_of_targets_are_used():
    data = batch()
    loss, terms = small(charts(weights={"sic": 0, "sod": 2, "floe": 0}), dropout=0.0).train().loss(data)
    assert torch.isclose(loss, 2 * terms["loss_sod"])
    model = small(auxiliary=True, dropout=0.0, auxiliary_weight=0.0).train()
    loss, terms = model.loss(data)
    assert torch.isclose(loss, sum(w * terms[f"loss_{c}"] for c, w in WEIGHTS.items()))


@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_a_batch_without_labels_is_zero_and_finite(avg_non_ignore):
    data = batch()
    data |= {f"target_{chart}": torch.full((2, 32, 48), 255) for chart in SIZES}
    model = small(charts(avg_non_ignore=avg_non_ignore), auxiliary=True).train()
    loss, terms = model.loss(data)
    loss.backward()
    assert loss == 0 and all(value == 0 for value in terms.values())
    assert all(p.grad.abs().sum() == 0 for p in model.parameters() if p.grad is not None)


def test_labels_where_nothing_was_observed_do_not_count():
    data, model = batch(), small(dropout=0.0)
    other = {**data, "target_sod": data["target_sod"].masked_fill(~data["valid"], 3)}
    assert torch.equal(model.train().loss(data)[0], model.loss(other)[0])


def test_bad_batches_are_named():
    data = batch()
    with pytest.raises(ValueError, match="no target_floe"):
        small().loss({name: x for name, x in data.items() if name != "target_floe"})
    data["target_sod"][0, 0, 0] = 6
    with pytest.raises(ValueError, match="labels of sod are class numbers in 0..5 or 255; found 6"):
        small().loss(data)


def test_a_frozen_encoder_rests():
    model = small(frozen=True)
    training = Training(model, Recipe(steps=1, rate=0.1)).train()
    assert not model.encoder.training and model.decoders.training
    training.losses(batch(), None)[0].backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.decoders.parameters())
    with pytest.raises(ValueError, match="has none"):
        Predictor(build_network("unet_winner", 2), charts(), frozen=True)


def test_layer_decay_reaches_the_encoder_and_not_the_heads():
    model = small(auxiliary=True)
    groups = Recipe(steps=1, layer_decay=0.5).optimiser(model).param_groups
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert scale[id(model.encoder.embed.project.weight)] == 0.5**5
    for part in ("decoders", "classify", "assist", "neck"):
        assert all(scale[id(p)] == 1 for p in getattr(model, part).parameters())


def test_settings_are_plain_and_complete():
    settings = Training(small(), Recipe(steps=1)).settings()
    assert json.loads(json.dumps(settings)) == settings
    other = Training(small(charts(weights={"sic": 1, "sod": 2, "floe": 2})), Recipe(steps=1)).settings()
    assert other["learner"] != settings["learner"], "a checkpoint of other weights would be continued"


def test_several_targets_are_counted_as_one():
    from sarfm.evaluation.counting import count_patches
    from sarfm.evaluation.tallies import Tallies

    data, model = batch(), small().eval()
    alone, together = Tallies(), Tallies()
    count_patches(together, model, [data], ["A", "B"])
    count_patches(alone, model, [{k: v for k, v in data.items() if k not in ("target_sic", "target_floe")}], ["A", "B"], names={"sod": "sod"})  # fmt: skip
    table = together.table()
    assert len(table) == 6 and {len(s) for s in table["sums"]} == {k**2 for k in SIZES.values()}
    ours = table[table["target"] == "sod"]["sums"].to_list()
    assert np.array_equal(ours, alone.table()["sums"].to_list())
    truth = data["target_sod"].masked_fill(~data["valid"], 255)
    decided = model(data["image"], data["valid"])["sod"].argmax(1)
    by_hand = [[int(((truth[0] == t) & (decided[0] == p)).sum()) for p in range(6)] for t in range(6)]
    assert ours[0].reshape(6, 6).tolist() == by_hand


# the published ways of pretraining


def mae(**options):
    torch.manual_seed(0)
    return MAE(Encoder(2, 8, 32, 2, 2), 16, 2, 2, **options)


def holed():
    image, valid = torch.randn(2, 2, 32, 48, generator=seeded()), torch.ones(2, 32, 48, dtype=torch.bool)
    valid[0, 3:20, 5:30] = False  # two patches without a valid pixel, others cut
    valid[1, 30:, :1] = False
    return image, valid


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("error", ["mse", "l1"])
def test_missing_as_a_number_counts_whole_patches_only(norm_pix, error):
    image, valid = holed()
    model = mae(missing=255.0, norm_pix=norm_pix, error=error)
    data = model.draw({"image": image, "valid": valid}, seeded(4))
    loss, parts = model.loss(data)
    shown = patchify(image.masked_fill(~valid[:, None], 255.0), 8)
    counts = (shown != 255).all(dim=2)[data["hidden"]]  # v_i of the hidden patches
    assert not counts.all() and counts.any()
    target = shown[data["hidden"]]
    if norm_pix:
        target = (target - target.mean(dim=1, keepdim=True)) / (target.var(dim=1, keepdim=True) + 1e-6).sqrt()
    difference = parts["prediction"].flatten(0, 1) - target
    each = (difference**2 if error == "mse" else difference.abs()).mean(dim=1)
    assert torch.isclose(loss, each[counts].mean(), rtol=1e-4) and loss.isfinite()


def test_missing_as_a_number_is_seen_and_drawn_like_anything_else():
    image, valid = holed()
    model = mae(missing=255.0)
    data = model.draw({"image": image, "valid": valid}, seeded(4))
    for seed in range(5):  # patches are hidden whatever they hold
        drawn = (
            model.draw(tile, seeded(seed))["hidden"] for tile in ({"image": image, "valid": valid}, {"image": image})
        )
        assert torch.equal(*drawn)
    filled = image.masked_fill(~valid[:, None], 255.0)
    plain = mae()
    assert torch.equal(
        model.loss(data)[1]["prediction"], plain.loss({"image": filled, "hidden": data["hidden"]})[1]["prediction"]
    )
    spoilt = {**data, "image": image.masked_fill(~valid[:, None], float("nan"))}
    assert torch.equal(model.loss(data)[0], model.loss(spoilt)[0])
    pictures = model.pictures(spoilt["image"], valid, hidden=data["hidden"])
    assert pictures["reconstruction"].isnan().any(dim=1).equal(~valid)


def test_without_holes_missing_changes_nothing():
    image, valid = holed()
    data = {"image": image, "valid": torch.ones_like(valid)}
    plain, theirs = mae(), mae(missing=255.0)
    drawn = plain.draw(data, seeded())
    assert torch.equal(plain.loss(drawn)[0], theirs.loss(drawn)[0])


def test_a_tile_of_nothing_but_missing_has_a_finite_loss():
    model = mae(missing=255.0, norm_pix=True)
    data = {"image": torch.full((2, 2, 32, 32), float("nan")), "valid": torch.zeros(2, 32, 32, dtype=torch.bool)}
    loss, _ = model.loss(model.draw(data, seeded()))
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_options_are_saved():
    model = mae(missing=255.0, error="l1")
    assert build(json.loads(json.dumps(model.config()))).config() == model.config()
    assert mae().config()["missing"] is None and mae().config()["error"] == "mse"
    with pytest.raises(ValueError, match="Choose mse or l1"):
        mae(error="huber")
