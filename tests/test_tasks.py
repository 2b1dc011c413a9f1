"""Tasks: losses and scores against scikit-learn and against the models that one predictor replaces."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch.nn import functional as F

from sarfm.ice.charts import chart_targets
from sarfm.models.networks import build_network
from sarfm.models.vit import Encoder
from sarfm.scenes.channels import Target
from sarfm.tasks.losses import UNKNOWN, class_loss, cross_entropy, number_loss, tag_loss
from sarfm.tasks.predictor import Predictor, body_maps, build_predictor
from sarfm.tasks.scores import average_precision, precision_bound
from sarfm.tasks.tasks import Classes, Number, Tags, build_task, task_for

STAGE = Target("stage", "classes", classes={10: "water", 20: "young", 30: "first year", 40: "old"})
COVER = Target("cover", "number", units="%", limits=(0, 100))
USES = Target("uses", "tags", "tile", classes={0: "forest", 1: "town", 2: "field"})
KIND = Target("kind", "classes", "tile", classes={0: "land", 1: "sea"})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encoder(channels=2):
    torch.manual_seed(0)
    return Encoder(channels, 8, 32, 4, 4)


# ---- scores -------------------------------------------------------------------------------------------------------


def class_case(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 4, (5, 30, 30))
    prediction = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, 4, truth.shape))
    truth[rng.random(truth.shape) < 0.1] = UNKNOWN
    return torch.from_numpy(prediction), torch.from_numpy(truth)


@pytest.mark.parametrize("seed", range(3))
def test_class_scores_are_scikit_learns(seed):
    prediction, truth = class_case(seed)
    task = Classes(dataclasses.replace(STAGE, units="steps"))
    found = task.scores(task.tally(prediction, truth).sum(0).numpy())
    known = truth != UNKNOWN
    t, p = truth[known].numpy(), prediction[known].numpy()
    each = {"average": None, "labels": range(4)}
    assert np.allclose(found["iou"], sk.jaccard_score(t, p, **each), atol=1e-6)
    assert np.allclose(found["f1"], sk.f1_score(t, p, **each), atol=1e-6)
    assert np.allclose(found["precision"], sk.precision_score(t, p, **each), atol=1e-6)
    assert np.allclose(found["recall"], sk.recall_score(t, p, **each), atol=1e-6)
    assert math.isclose(found["mean_iou"], sk.jaccard_score(t, p, average="macro"), abs_tol=1e-6)
    assert math.isclose(found["mean_f1"], sk.f1_score(t, p, average="macro"), abs_tol=1e-6)
    assert math.isclose(found["accuracy"], sk.accuracy_score(t, p), abs_tol=1e-6)
    assert math.isclose(found["r2"], sk.r2_score(t, p), abs_tol=1e-6)
    assert math.isclose(found["weighted_f1"], sk.f1_score(t, p, average="weighted"), abs_tol=1e-6)
    false_alarm = [((p == k) & (t != k)).sum() / (t != k).sum() for k in range(4)]
    assert np.allclose(found["false_alarm"], false_alarm, atol=1e-6)


def test_r2_is_of_classes_that_are_steps_of_a_scale():
    sums = np.ones(16)
    assert "r2" not in Classes(STAGE).scores(sums) and "weighted_f1" in Classes(STAGE).scores(sums)
    assert "r2" in Classes(STAGE, loss_of="number").scores(sums)
    ordered = {name: task_for(target).ordered for name, target in chart_targets().items()}
    assert ordered == {"sic": True, "sod": False, "floe": False}


@pytest.mark.parametrize("classes, ignored", [((0, 1), False), ((1, 3), True), ((2,), False), (range(4), True)])
def test_dice_is_the_mean_over_the_classes_present(classes, ignored):
    logits = torch.randn(2, 4, 16, 16, generator=seeded())
    truth = torch.tensor(list(classes))[torch.randint(0, len(classes), (2, 16, 16), generator=seeded(1))]
    if ignored:
        truth[0, :8] = UNKNOWN
    probability, known = logits.softmax(1), truth != UNKNOWN
    overlaps = []
    for k in classes:
        said, true = probability[:, k][known], (truth == k)[known].float()
        overlaps.append(2 * (said * true).sum() / (said.sum() + true.sum()))
    assert torch.isclose(class_loss("dice")(logits, truth), 1 - torch.stack(overlaps).mean(), atol=1e-5)
    assert class_loss("dice")(logits, torch.full_like(truth, UNKNOWN)) == 0


@pytest.mark.parametrize("offset", [0, 50, 1e6])
def test_number_scores_are_scikit_learns(offset):
    limits = (offset - 10, offset + 10)
    task = Number(Target("height", "number", units="m", limits=limits))
    truth = offset + torch.randn(4, 20, 20, generator=seeded(), dtype=torch.float64)
    guess = truth + 0.3 + 0.5 * torch.randn(4, 20, 20, generator=seeded(1), dtype=torch.float64)
    truth[0, :5] = torch.nan
    found = task.scores(task.tally(task.decide(guess[:, None]), truth).sum(0).numpy())
    known = truth.isfinite()
    t, p = truth[known].numpy(), guess[known].numpy()
    assert math.isclose(found["r2"], sk.r2_score(t, p), abs_tol=1e-6)
    assert math.isclose(found["rmse"], sk.root_mean_squared_error(t, p), rel_tol=1e-6)
    assert math.isclose(found["mae"], sk.mean_absolute_error(t, p), rel_tol=1e-6)
    assert math.isclose(found["bias"], (p - t).mean(), rel_tol=1e-6)


def test_a_number_without_spread_has_no_r2():
    task = Number(COVER)
    sums = task.tally(torch.full((1, 5), 33.0), torch.full((1, 5), 33.3))
    assert np.isnan(task.scores(sums.numpy())["r2"]) and np.isnan(task.scores(np.zeros(6))["rmse"])


@pytest.mark.parametrize(("tiles", "sharp"), [(50, 1.0), (3000, 1.0), (3000, 4.0)])
def test_tag_scores_are_scikit_learns(tiles, sharp):
    task = Tags(USES)
    present = (torch.rand(tiles, 3, generator=seeded()) < torch.tensor([0.5, 0.2, 0.05])).long()
    logits = sharp * (torch.randn(tiles, 3, generator=seeded(1)) + 2 * present - 1)
    truth = present.clone()
    truth[::10, 0] = UNKNOWN
    probability = task.decide(logits)
    found = task.scores(task.tally(probability, truth).sum(0).numpy())
    bins = (probability.double() * task.bins).long().clamp(max=task.bins - 1)
    for tag in range(3):
        known = (truth[:, tag] != UNKNOWN).numpy()
        t, p = truth[known, tag].numpy(), probability[known, tag].numpy()
        rounded = sk.average_precision_score(t, bins[known, tag].numpy())
        assert math.isclose(found["average_precision"][tag], rounded, abs_tol=1e-6)
        assert abs(found["average_precision"][tag] - sk.average_precision_score(t, p)) <= found["bound"][tag] + 1e-9
        for name, score in (("f1", sk.f1_score), ("precision", sk.precision_score), ("recall", sk.recall_score)):
            assert math.isclose(found[name][tag], score(t, p >= 0.5), abs_tol=1e-6)
    full = task.scores(task.tally(probability, present).sum(0).numpy())
    decided, flat = (probability >= 0.5).numpy(), bins.numpy()
    assert math.isclose(full["f1_macro"], sk.f1_score(present, decided, average="macro"), abs_tol=1e-6)
    assert math.isclose(full["f1_micro"], sk.f1_score(present, decided, average="micro"), abs_tol=1e-6)
    assert math.isclose(full["map_micro"], sk.average_precision_score(present.ravel(), flat.ravel()), abs_tol=1e-6)
    assert math.isclose(full["map_macro"], sk.average_precision_score(present, flat, average="macro"), abs_tol=1e-6)


def test_the_bound_holds_for_the_worst_order_in_a_bin():
    rng = np.random.default_rng(0)
    for _ in range(200):
        truth, bins = rng.random(40) < rng.uniform(0.1, 0.9), rng.integers(0, 4, 40)
        truth[0] = True
        histogram = [np.bincount(bins[truth == side], minlength=4) for side in (True, False)]
        for worst in (1, -1):  # all with the tag last, or first, within their bin
            exact = sk.average_precision_score(truth, bins - worst * 0.1 * truth + 1e-6 * rng.random(40))
            assert abs(average_precision(*histogram) - exact) <= precision_bound(*histogram) + 1e-9


def test_tallies_add_up_and_scores_work_on_many():
    prediction, truth = class_case(0)
    task = Classes(STAGE)
    tally = task.tally(prediction, truth)
    parts = torch.cat([task.tally(prediction[k : k + 1], truth[k : k + 1]) for k in range(5)])
    assert tally.dtype == torch.float64 and torch.equal(tally, parts)
    many = task.scores(np.stack([tally.numpy(), 2 * tally.numpy()]))
    assert many["iou"].shape == (2, 5, 4) and many["mean_iou"].shape == (2, 5)
    assert np.array_equal(many["mean_iou"][0], many["mean_iou"][1])


# ---- losses -------------------------------------------------------------------------------------------------------


def test_class_losses_are_torchs():
    logits, truth = torch.randn(3, 4, 9, 9, generator=seeded()), torch.randint(0, 4, (3, 9, 9), generator=seeded(1))
    truth[0, :4] = UNKNOWN
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    theirs = F.cross_entropy(logits, truth, weight, ignore_index=UNKNOWN)
    assert torch.isclose(cross_entropy(logits, truth, weight=weight), theirs, rtol=1e-5)
    smooth = F.cross_entropy(logits, truth, ignore_index=UNKNOWN, label_smoothing=0.1)
    assert torch.isclose(cross_entropy(logits, truth, smoothing=0.1), smooth, rtol=1e-5)
    task = Classes(STAGE, class_weights=(1, 2, 0.5, 3))
    assert torch.isclose(task.loss(logits, truth), theirs, rtol=1e-5)
    all_pixels = F.cross_entropy(logits, truth, ignore_index=UNKNOWN, reduction="sum") / truth.numel()
    assert torch.isclose(Classes(STAGE, avg_non_ignore=False).loss(logits, truth), all_pixels, rtol=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "dice", "cross_entropy+dice", "number"])
def test_labels_where_nothing_was_observed_do_not_count(loss):
    task = Classes(STAGE, loss_of=loss)
    output = torch.randn(2, task.channels, 16, 16, generator=seeded())
    truth, valid = torch.randint(0, 4, (2, 16, 16)), torch.ones(2, 16, 16, dtype=torch.bool)
    valid[:, 4:9] = False
    other = truth.masked_fill(~valid, 2)
    assert torch.equal(task.loss(output, truth, valid), task.loss(output, other, valid))
    assert torch.equal(task.loss(output, truth, valid), task.loss(output, truth.masked_fill(~valid, UNKNOWN)))


@pytest.mark.parametrize("error", ["mse", "mae", "huber"])
def test_a_number_is_learnt_in_units_of_half_its_range(error):
    task = Number(COVER, error=error)
    output, truth = 100 * torch.rand(2, 1, 8, 8, generator=seeded()), 100 * torch.rand(2, 8, 8, generator=seeded(1))
    truth[0, :3] = torch.nan
    known, theirs = truth.isfinite(), {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}[error]
    expected = theirs(output[:, 0][known] / 50, truth[known] / 50)
    assert torch.isclose(task.loss(output, truth), expected, rtol=1e-5)


def test_without_a_label_losses_are_zero_with_zero_gradients():
    cases = [
        (class_loss("cross_entropy+dice"), torch.randn(2, 3, 8, 8), torch.full((2, 8, 8), UNKNOWN)),
        (number_loss, torch.randn(2, 8, 8), torch.full((2, 8, 8), torch.nan)),
        (tag_loss, torch.randn(2, 3), torch.full((2, 3), UNKNOWN)),
    ]
    for loss, output, truth in cases:
        value = loss(output.requires_grad_(), truth)
        value.backward()
        assert value == 0 and output.grad.abs().sum() == 0


def test_bad_tasks_are_refused():
    with pytest.raises(ValueError, match="Choose the task of that kind"):
        Classes(COVER)
    with pytest.raises(ValueError, match="overlap of maps"):
        Classes(KIND, loss_of="dice")
    with pytest.raises(ValueError, match="the loss is one of"):
        Classes(STAGE, loss_of="focal")
    with pytest.raises(ValueError, match="is 0 or more; got -1"):
        Classes(STAGE, weight=-1)
    with pytest.raises(ValueError, match="class numbers in 0..3 or 255; found 4"):
        Classes(STAGE).tally(torch.zeros(1, 2).long(), torch.tensor([[1, 4]]))
    with pytest.raises(ValueError, match="no kind of task 'boxes'"):
        build_task({"kind": "boxes", "target": {}})
    with pytest.raises(ValueError, match="edge of one"):
        Tags(USES, bins=7)


@pytest.mark.parametrize("target", [STAGE, COVER, USES, KIND])
def test_a_task_is_made_again_from_json(target):
    task = task_for(target, weight=2.0)
    assert build_task(json.loads(json.dumps(task.config()))) == task


# ---- the predictor -------------------------------------------------------------------------------------------------


def batch(size=(32, 48), tiles=3):
    data = {"image": torch.randn(tiles, 2, *size, generator=seeded(5)), "valid": torch.ones(tiles, *size).bool()}
    data["valid"][0, :9] = False
    data["target_stage"] = torch.randint(0, 4, (tiles, *size), generator=seeded(6))
    data["target_cover"] = 100 * torch.rand(tiles, *size, generator=seeded(7))
    data["target_uses"] = torch.randint(0, 2, (tiles, 3), generator=seeded(8))
    data["target_kind"] = torch.randint(0, 2, (tiles,), generator=seeded(9))
    return data


ALL = {"stage": Classes(STAGE), "cover": Number(COVER), "uses": Tags(USES), "kind": Classes(KIND)}


@pytest.mark.parametrize("pair", [None, "difference", "concat"])
@pytest.mark.parametrize("head", ["upernet", "linear", "setr-pup", "unet_winner"])
def test_every_kind_of_task_with_every_head_and_pair(head, pair):
    network = head.startswith("unet")
    channels = 1 if pair else 2
    body = build_network(head, channels) if network else encoder(channels)
    torch.manual_seed(0)
    model = Predictor(body, ALL, "upernet" if network else head, 16, pair=pair, auxiliary=not network, dropout=0.1)
    data = batch((35, 50))
    loss, terms = model.train().loss(model.draw(data, seeded()))
    loss.backward()
    names = {f"loss_{n}" for n in ALL} | ({f"loss_{n}_auxiliary" for n in ("stage", "cover")} if not network else set())
    assert {n for n in terms if n.startswith("loss_")} == names and loss.isfinite()
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("body"))
    outputs = model.eval()(data["image"], data["valid"])
    assert outputs["stage"].shape == (3, 4, 35, 50) and outputs["cover"].shape == (3, 1, 35, 50)
    assert outputs["uses"].shape == (3, 3) and outputs["kind"].shape == (3, 2)
    again = build_predictor(json.loads(json.dumps(model.config()))).eval()
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(a, outputs[n]) for n, a in again(data["image"], data["valid"]).items())
    truths, decided = model.truths(data), model.decide(outputs)
    assert {n: len(task.tally(decided[n], truths[n])) for n, task in ALL.items()} == dict.fromkeys(ALL, 3)


def test_a_fresh_predictor_of_numbers_begins_in_the_centre():
    torch.manual_seed(0)
    model = Predictor(encoder(), {"cover": Number(COVER)}, "linear").eval()
    assert abs(model(torch.randn(4, 2, 32, 32))["cover"].mean() - 50) < 25


def test_what_the_auxiliary_heads_and_weights_do():
    data = batch()
    tasks = {"stage": Classes(STAGE, weight=3.0), "cover": Number(COVER, weight=0.0)}
    torch.manual_seed(0)
    model = Predictor(encoder(), tasks, "upernet", 16, auxiliary=True)
    loss, terms = model.loss(data)
    assert torch.isclose(loss, 3 * (terms["loss_stage"] + 0.4 * terms["loss_stage_auxiliary"]))


def test_a_frozen_encoder_rests():
    model = Predictor(encoder(), {"stage": ALL["stage"]}, "upernet", 16, frozen=True).train()
    assert not model.encoder.training and model.decoders.training
    model.loss(batch())[0].backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.decoders.parameters())


def test_bad_predictors_are_refused():
    with pytest.raises(ValueError, match="at least one task"):
        Predictor(encoder(), {})
    with pytest.raises(ValueError, match="pair is one of"):
        Predictor(encoder(), ALL, pair="sum")
    with pytest.raises(ValueError, match="has none"):
        Predictor(build_network("unet_winner", 2), ALL, frozen=True)
    with pytest.raises(ValueError, match="four layers in 0..3"):
        Predictor(encoder(), ALL, layers=[0, 1, 2, 4])
    with pytest.raises(ValueError, match="no head 'segformer'"):
        Predictor(encoder(), ALL, "segformer")
    with pytest.raises(ValueError, match="at least 2 tiles"):
        Predictor(encoder(), ALL, "upernet", 16).train()(torch.randn(1, 2, 32, 32))
    with pytest.raises(ValueError, match="no target_stage"):
        Predictor(encoder(), ALL, "linear").loss({"image": torch.randn(2, 2, 32, 32)})


def test_a_pair_is_seen_by_one_body():
    torch.manual_seed(0)
    model = Predictor(encoder(), {"stage": ALL["stage"]}, "linear", pair="difference").eval()
    image = torch.randn(2, 2, 32, 32, generator=seeded())
    maps = model.maps(torch.cat([image, image], 1))
    assert all((features == 0).all() for features in maps) and body_maps(model.encoder, "concat")[0] == [64] * 4


@pytest.mark.parametrize("pair", [None, "difference"])
@pytest.mark.parametrize("head", ["linear", "unet_winner"])
def test_a_predictor_is_saved_and_loaded(tmp_path, pair, head):
    from sarfm.models.weights import load_encoder, load_model, save_model
    from sarfm.patches.contract import InputContract

    body = build_network(head, 1 if pair else 2) if head.startswith("unet") else encoder(1 if pair else 2)
    model = Predictor(body, ALL, "linear", pair=pair, dropout=0.1).eval()
    contract = InputContract(
        channels=["vv", "vh"], quantity="gamma0", units="dB", spacing_m=10.0, patch_size=8, mean=[-10.0] * 2, std=[3.0] * 2
    )  # fmt: skip
    save_model(model, tmp_path, contract)
    again, stated = load_model(tmp_path, kind="predictor")
    data = batch()
    outputs = model(data["image"], data["valid"])
    assert all(torch.equal(x, outputs[n]) for n, x in again(data["image"], data["valid"]).items())
    assert again.tasks == model.tasks and stated == contract
    with pytest.raises(ValueError, match="takes 2 channels, its contract names 1"):
        save_model(model, tmp_path, contract.model_copy(update={"channels": ["vv"]}))
    if head == "linear":
        weights = load_encoder(tmp_path)[0].state_dict()
        assert all(torch.equal(x, weights[n]) for n, x in model.encoder.state_dict().items())
    else:
        with pytest.raises(ValueError, match="no encoder to go on with"):
            load_encoder(tmp_path)
