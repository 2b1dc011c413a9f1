"""DINO computes what is written down, its teacher learns nothing by itself, and a training continues to the bit."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from patience import PATIENCE_S
from torch import nn
from torch.nn import functional as F

from sarfm.io.ranks import run_ranks
from sarfm.models.dino import DINO
from sarfm.models.dino_loss import verdict_on
from sarfm.models.kinds import build, build_encoder, build_method, describe, shown_px
from sarfm.models.radar_views import FLAT
from sarfm.models.vit import Encoder
from sarfm.models.weights import load_encoder, load_model, save_model
from sarfm.patches.contract import InputContract
from sarfm.patches.loading import Crops, PatchDataModule
from sarfm.patches.prepare import open_store, write_store
from sarfm.runs.parameters import check_parameters, read_preset
from sarfm.scenes.open import make_scene
from sarfm.train.steps import Recipe, Training
from sarfm.train.trainer import find_checkpoint, fit, make_fabric, train_epochs

SMALL = {"head_width": 24, "bottleneck": 8, "prototypes": 20, "global_px": 32, "local_px": 16, "local_crops": 3}
QUIET = {"speckle": 0.0, "multilook": 0.0, "gain_db": 0.0, "ramp_db": 0.0}
CHANNELS = [SimpleNamespace(variable=v, at=None, quantity="gamma0", units="dB") for v in ("vv", "vh")]
CONTRACT = SimpleNamespace(inputs=CHANNELS, mean=[-10.0, -17.0], std=[4.0, 5.0])


def small(positions="sincos", **options):
    torch.manual_seed(0)
    grid = (4, 4) if positions == "learned" else None
    method = build_method("dino", Encoder(2, 8, 16, 2, 2, positions=positions, grid=grid), SMALL | options)
    method.state_scale(CONTRACT)
    return method


def seeded(number):
    return torch.Generator().manual_seed(number)


def batch(items=3, side=48, dtype=torch.float32):
    return {"image": torch.randn(items, 2, side, side, generator=seeded(7), dtype=dtype)}


# ---- the numbers --------------------------------------------------------------------------------------------------


def plain_branch(encoder, head, view, valid, prototypes):
    """Encode one image and compare it with prototypes, as it is written down."""
    token = encoder.encode(view[None], None if valid is None else valid[None])[0][0, 0]
    for layer in head.layers:
        token = nn.functional.gelu(token) if isinstance(layer, nn.GELU) else layer.weight @ token + layer.bias
    token = token / token.norm()
    return (prototypes / prototypes.norm(dim=1, keepdim=True)) @ token


def plain_loss(method, drawn, centre, warmth):
    """Compute the loss item by item and pair by pair, and what the teacher said on average."""
    views = [(v, k) for v in ("large", "small") for k in range(len(drawn.get(v, [])))]
    shown = lambda name: drawn[f"{name}_valid"]
    terms, said = [], []
    for item in range(len(drawn["image"])):
        teacher, student, seen = {}, {}, {}
        for view in views:
            name, k = view
            mask = None if shown(name) is None else shown(name)[k, item]
            seen[view] = mask is None or bool(mask.any())
            one = drawn[name][k, item], mask
            learnt = method.student
            student[view] = plain_branch(learnt.encoder, learnt.head, *one, learnt.head.prototypes.directions)
            if name == "large":
                teacher[view] = plain_branch(method.encoder, method.head, *one, method.head.prototypes.directions)
                said += [teacher[view]] if seen[view] else []
        for q in teacher:
            p = ((teacher[q] - centre) / warmth).softmax(0)
            terms += [-(p * (student[v] / 0.1).log_softmax(0)).sum() for v in views if v != q and seen[q] and seen[v]]
    return torch.stack(terms).mean(), torch.stack(said).mean(0).detach()


@pytest.mark.parametrize("case", ["whole", "holes", "no small crops"])
def test_loss_and_gradients_are_those_of_the_plain_formulation(case):
    method = small(**QUIET, **({"local_crops": 0} if case == "no small crops" else {}), freeze_last=0.0).double()
    given = batch(dtype=torch.float64)
    if case == "holes":
        given["valid"] = torch.rand(3, 1, 1, generator=seeded(1)).expand(3, 48, 48) < 2
        given["valid"] = given["valid"].clone()
        given["valid"][0, :, 20:] = False
        given["valid"][2] = False  # nothing of this item was observed
    drawn = method.draw(given, seeded(3))
    method.centre.normal_(generator=seeded(4)).mul_(0.05)
    loss, _ = method.loss(drawn)
    parameters = [p for p in method.student.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected, _ = plain_loss(method, drawn, method.centre, 0.04)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert abs(float((loss - expected).detach())) < 1e-10
    for name, a, b in zip(dict(method.student.named_parameters()), found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-9), name


def test_centre_and_teacher_follow_the_plain_computation():
    method = small(**QUIET, momentum=0.9, freeze_last=0.0).double()
    optimiser = torch.optim.SGD(method.student.parameters(), 0.5)
    centre = torch.zeros(20, dtype=torch.float64)
    slow = [p.clone() for p in (*method.encoder.parameters(), *method.head.parameters())]
    for step in range(6):
        drawn = method.draw(batch(dtype=torch.float64), seeded(step))
        loss, _ = method.loss(drawn)
        expected, said = plain_loss(method, drawn, centre, 0.04)
        assert abs(float((loss - expected).detach())) < 1e-10
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        method.stepped(step, 6)
        centre = 0.9 * centre + 0.1 * said
        momentum = 1 - 0.1 * (math.cos(math.pi * step / 6) + 1) / 2
        fast = (*method.student.encoder.parameters(), *method.student.head.parameters())
        slow = [momentum * s + (1 - momentum) * f.detach() for s, f in zip(slow, fast, strict=True)]
        assert torch.allclose(method.centre, centre, atol=1e-12)
        for mine, plain in zip((*method.encoder.parameters(), *method.head.parameters()), slow, strict=True):
            assert torch.allclose(mine, plain, atol=1e-12)
    moved = [float((s - f).abs().max()) for s, f in zip(slow, fast, strict=True)]
    assert max(moved) > 1e-4  # the comparison above was not of things that stood still


def test_centre_takes_the_mean_over_accumulated_batches():
    method = small(**QUIET)
    said = []
    for part in range(2):
        drawn = method.draw(batch(), seeded(part))
        method.loss(drawn)
        with torch.no_grad():
            said.append(method.head(method.encoder.encode(drawn["large"].flatten(0, 1))[0][:, 0]))
    method.stepped(0, 10)
    assert torch.allclose(method.centre, 0.1 * torch.cat(said).mean(0), atol=1e-6)


def test_schedules_at_given_steps():
    method = small(**QUIET, first_temperature=0.02, teacher_temperature=0.06, temperature_warmup=0.5)
    seen = {}
    for step in range(100):
        seen[step] = method.temperature()
        method.stepped(step, 100)
    assert [round(seen[step], 6) for step in (0, 25, 50, 99)] == [0.02, 0.04, 0.06, 0.06]
    recipe = Recipe(steps=100, weight_decay=0.04, last_weight_decay=0.4)
    assert [round(recipe.decay_at(step), 6) for step in (0, 25, 50)] == [
        0.04,
        round(0.4 - 0.18 * (1 + 0.5**0.5), 6),
        0.22,
    ]
    with pytest.raises(ValueError, match="last_weight_decay is above 0"):
        Recipe(weight_decay=0.0, last_weight_decay=0.4)


def test_student_and_teacher_share_nothing():
    method = small(freeze_last=0.0)
    teacher = [*method.encoder.parameters(), *method.head.parameters()]
    student = list(method.student.parameters())
    storages = lambda parameters: {p.untyped_storage().data_ptr() for p in parameters}
    assert not storages(teacher) & storages(student)
    assert all(torch.equal(t, s) for t, s in zip(teacher, student, strict=True))
    drawn = method.draw(batch(), seeded(0))
    method.loss(drawn)[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher)
    assert all(p.grad is not None for p in student)
    before = [t.clone() for t in teacher]
    torch.optim.SGD(student, 1.0).step()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher, strict=True))
    assert not any(m.training for m in (*method.encoder.modules(), *method.head.modules()))
    assert method.student.training and not method.eval().student.training


def test_prototypes_stay_in_the_first_steps():
    method = small(freeze_last=0.25)
    learnt = []
    for step in range(8):
        method.zero_grad()
        method.loss(method.draw(batch(), seeded(step)))[0].backward()
        learnt.append(method.student.head.prototypes.directions.grad is not None)
        method.stepped(step, 8)
    assert learnt == [False, False, *[True] * 6]


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_any_channels_any_positions_and_holes(positions):
    method = small(positions, local_crops=2)
    given = batch(4, 64)
    valid = torch.ones(4, 64, 64, dtype=torch.bool)
    valid[0], valid[1, 10:] = False, False
    losses = []
    for stored in (0.0, 1e6, torch.nan):
        image = given["image"].masked_fill(~valid[:, None], stored)
        loss, parts = method.loss(method.draw({"image": image, "valid": valid}, seeded(1)))
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1] == losses[2] and math.isfinite(losses[0])
    assert all(part.ndim == 0 and part.isfinite() for part in parts.values())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in method.student.parameters() if p.grad is not None)
    assert shown_px("dino", {"global_px": 32}, 64) == 32 == shown_px("dino", {}, 32)


def test_a_step_that_is_not_finite_leaves_the_centre():
    method = small(**QUIET)
    method.loss(method.draw(batch(), seeded(0)))
    method.stepped(0, 10)
    before = method.centre.clone()
    method.loss(method.draw({"image": torch.full((2, 2, 48, 48), torch.nan)}, seeded(0)))
    method.stepped(1, 10)
    assert torch.equal(method.centre, before) and before.any()


def test_bf16_agrees_with_float32_within_its_precision():
    method = small()
    drawn = method.draw(batch(8), seeded(0))
    with torch.no_grad():
        exact = method.loss(drawn)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded, parts = method.loss(method.draw(batch(8), seeded(0)))
    assert rounded.dtype == torch.float32 and abs(float(rounded.detach() / exact) - 1) < 0.02
    assert all(value.dtype == torch.float32 for value in parts.values())
    rounded.backward()


def test_what_is_refused():
    with pytest.raises(ValueError, match="class token"):
        build_method("dino", build_encoder("swin-nano", 2, 4), {})
    with pytest.raises(ValueError, match="state_scale"):
        build_method("dino", Encoder(2, 8, 16, 1, 2), SMALL).draw(batch())
    with pytest.raises(ValueError, match=r"crops\.other_date=true"):
        small(temporal=True).draw(batch())
    with pytest.raises(ValueError, match="temperatures are above 0"):
        small(teacher_temperature=0.0)


def test_another_date_is_the_other_view():
    method = small(**QUIET, temporal=True, channel_dropout=0.0, local_crops=4)
    first, other = torch.zeros(2, 2, 48, 48), torch.ones(2, 2, 48, 48)
    drawn = method.draw({"image": first, "other": other}, seeded(0))
    assert drawn["large"].mean(dim=(1, 2, 3, 4)).round(decimals=4).tolist() == [0, 1]
    assert drawn["small"].mean(dim=(1, 2, 3, 4)).round(decimals=4).tolist() == [0, 0, 1, 1]


def test_the_preset_says_what_is_published():
    said = check_parameters("pretrain", read_preset("system4_pretrain", "pretrain"))
    method = build_method("dino", build_encoder("vit-nano", 12, 16), said["settings"] | {"prototypes": 64})
    assert method.views.sides(448, 16) == (224, 96) and method.views.local_crops == 8
    recipe = Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in said["learn"].items()}).over(3000)
    assert recipe.steps == math.ceil(100 * 3000 / 64) and recipe.decay_at(recipe.steps) == 0.4
    assert recipe.rate_at(recipe.steps - 1) == pytest.approx(1e-6) and recipe.rate == 0.0005 * 64 / 256


def test_a_small_encoder_begins_with_a_small_head():
    said = check_parameters("pretrain", {"method": "dino"})
    assert said["settings"]["prototypes"] == 1024 and said["settings"]["head_width"] == 256
    said = check_parameters("pretrain", {"method": "dino", "encoder": "vit-small"})
    assert said["settings"]["prototypes"] == 65536


# ---- saved and continued ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("dino") / "store.zarr"
    field = np.random.default_rng(0).normal(-12, 3, (2, 144, 144)).astype("float32")
    field[:, 40:50, 40:60] = np.nan
    scene = make_scene({"vv": field[0], "vh": field[1]}, units="dB", quantity="gamma0")
    write_store({"made": scene}, path, size=48, progress=False)
    return open_store(path)


def made(store, steps=12, drop_path=0.2, **recipe):
    """Make a training and its data."""
    split = pd.Series(["train"] * (len(store) - 2) + ["val"] * 2)
    contract = InputContract.fit(store, np.flatnonzero(split == "train"), 8)
    torch.manual_seed(3)
    encoder = Encoder(2, 8, 16, 2, 2, drop_path=drop_path)
    options = {"first_temperature": 0.02, "teacher_temperature": 0.05, "freeze_last": 0.2, "norm_last_layer": False}
    method = build_method("dino", encoder, SMALL | options)
    method.state_scale(contract)
    recipe = {"batch_size": 4, "weight_decay": 0.04, "last_weight_decay": 0.4, "seed": 3} | recipe
    training = Training(method, Recipe(steps, rate=1e-3, **recipe))
    each = 4 * training.recipe.accumulate
    data = PatchDataModule(store, split, contract, crops=Crops(48), batch_size=4, steps_per_epoch=each, seed=3)
    return training, data, contract


def run(training, data, out, on_epoch=None):
    how = {"steps_per_epoch": 4, "device": "cpu", "progress": False, "validation_batches": 1}
    return fit(training, data, out=out, on_epoch=on_epoch, **how)


def bits(training):
    return {name: value.clone() for name, value in training.state_dict().items()}


@pytest.mark.parametrize("recipe", [{}, {"accumulate": 2, "ema": 0.9, "precision": "bf16-mixed"}])
def test_a_training_that_was_stopped_continues_to_the_bit(store, tmp_path, recipe):
    whole, data, _ = made(store, **recipe)
    history = run(whole, data, tmp_path / "whole")

    def stop(training):
        if training.step == 8:
            raise KeyboardInterrupt

    begun, data, _ = made(store, **recipe)
    with pytest.raises(KeyboardInterrupt):
        run(begun, data, tmp_path / "pieces", stop)
    again, data, _ = made(store, **recipe)
    continued = run(again, data, tmp_path / "pieces")
    pd.testing.assert_frame_equal(continued, history, check_exact=True)
    assert all(torch.equal(value, bits(again)[name]) for name, value in bits(whole).items())
    assert whole.learner.centre.any() and whole.learner.done == 12
    assert {"teacher_entropy", "information", "feature_rank", "val_loss"} <= set(history)
    assert whole.learner.verdict(history)


def test_weight_decay_follows_its_schedule(store, tmp_path, monkeypatch):
    training, data, _ = made(store)
    seen, plain = [], Recipe.optimiser

    def watched(recipe, learner):
        optimiser = plain(recipe, learner)
        step = optimiser.step
        optimiser.step = lambda: seen.append([g["weight_decay"] for g in optimiser.param_groups]) or step()
        return optimiser

    monkeypatch.setattr(Recipe, "optimiser", watched)
    run(training, data, tmp_path)
    assert len(seen) == 12 and {min(values) for values in seen} == {0.0}
    wanted = [0.4 - 0.18 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    np.testing.assert_allclose([max(values) for values in seen], wanted)


def test_a_saved_dino_is_built_again_and_its_teacher_is_kept(store, tmp_path):
    training, data, contract = made(store)
    run(training, data, tmp_path / "run")
    method = training.learner
    save_model(method, tmp_path / "model", contract)
    loaded, _ = load_model(tmp_path / "model", kind="dino")
    assert describe(loaded) == describe(method) == describe(build(describe(method)))
    assert all(torch.equal(v, loaded.state_dict()[n]) for n, v in method.state_dict().items())
    assert (loaded.done, loaded.steps) == (12, 12)
    encoder, _ = load_encoder(tmp_path / "model")
    image = torch.randn(1, 2, 48, 48)
    with torch.no_grad():
        assert torch.equal(encoder(image), method.eval().encoder(image))
        assert not torch.equal(encoder(image), method.student.encoder(image))


def test_it_begins_where_the_encoder_stood():
    torch.manual_seed(1)
    learnt = build_method("mae", Encoder(2, 8, 16, 2, 2), {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2})
    method = build_method("dino", learnt.encoder, SMALL)
    image = torch.randn(1, 2, 32, 32)
    with torch.no_grad():
        assert torch.equal(method.eval().encoder(image), learnt.eval().encoder(image))


RANKS = {"plain": {"drop_path": 0.0}, "accumulated": {"drop_path": 0.0, "accumulate": 2}}


def whole_and_pieces(link, path, folder):
    """Train in this rank as it is, and with a stop after which another training continues."""
    torch.set_num_threads(1)
    store = open_store(path)
    for case, recipe in RANKS.items():
        for name, stops in (("whole", [None]), ("pieces", [8, None])):
            for stop in stops:
                training, data, _ = made(store, **recipe)
                checkpoint = folder / case / name / "last.ckpt"
                fabric = make_fabric("cpu", link.ranks, PATIENCE_S)
                saved = find_checkpoint(training, checkpoint)

                def leave(training, stop=stop):
                    link.wait()  # until rank 0 has saved
                    if training.step == stop:
                        raise InterruptedError

                try:
                    train_epochs(training, data, fabric, checkpoint, 4, 1, saved, lambda: None, leave)
                except InterruptedError:
                    continue
            weights = {n: v.clone() for n, v in training.state_dict().items()}
            link.tell((case, name, training.history.frame(), weights))


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_process_and_continue_to_the_bit(store, tmp_path):
    heard = []
    run_ranks(whole_and_pieces, (store.path, tmp_path), 2, heard.append, PATIENCE_S)
    told = {(case, name): (history, weights) for case, name, history, weights in heard}
    for case, recipe in RANKS.items():
        (history, weights), (continued, again) = told[case, "whole"], told[case, "pieces"]
        pd.testing.assert_frame_equal(continued, history, check_exact=True)
        assert all(torch.equal(value, again[name]) for name, value in weights.items())
        alone, data, _ = made(store, **recipe)
        expected = run(alone, data, tmp_path / f"{case}-alone")
        for name in ("loss", "val_loss", "teacher_entropy", "information", "feature_rank"):
            first = 1e-3 if name == "feature_rank" else 1e-5  # of few vectors that differ little
            np.testing.assert_allclose(history[name][0], expected[name][0], rtol=first, err_msg=name)
            np.testing.assert_allclose(history[name], expected[name], rtol=3e-3, atol=1e-5, err_msg=name)
        assert torch.allclose(weights["learner.centre"], alone.learner.centre, atol=1e-4)


# ---- right in kind ------------------------------------------------------------------------------------------------


def nearest(encoder, image, labels, learnt):
    """Classify by the nearest neighbour among the first images, by cosine."""
    with torch.no_grad():
        token = F.normalize(encoder.encode(image)[0][:, 0], dim=1)
    found = (token[learnt:] @ token[:learnt].T).argmax(1)
    return float((labels[:learnt][found] == labels[learnt:]).float().mean())


def test_collapse_is_seen():
    """With a temperature that decides nothing, the teacher says everything about each image, and the verdict says so."""
    method = small(**QUIET, student_temperature=0.1, teacher_temperature=1.0, first_temperature=1.0)
    rows = []
    for step in range(4):
        _, parts = method.loss(method.draw(batch(16), seeded(step)))
        rows.append({name: float(value) for name, value in parts.items()})
        method.stepped(step, 4)
    assert "Collapsed" in method.verdict(pd.DataFrame(rows)) and "all prototypes" in method.verdict(pd.DataFrame(rows))


def test_a_low_rank_alone_is_no_collapse():
    """A small training told images apart by a bit along a line; another came back from one prototype with nothing."""
    assert verdict_on(2.9, 1.01, 1.4, 64).startswith("No collapse")
    assert verdict_on(5.8, 0.19, 1.4, 64).startswith("Nearly collapsed")
    assert verdict_on(0.0, 0.0, 7.0, 64).startswith("Collapsed") and verdict_on(6.0, 0.0, 1.0, 64).startswith(
        "Collapsed"
    )


def test_flat_views_need_no_units():
    method = DINO(Encoder(1, 4, 16, 1, 2), 24, 8, 20, views=FLAT)
    assert method.loss(method.draw({"image": torch.randn(2, 1, 16, 16)}, seeded(0)))[0].isfinite()
