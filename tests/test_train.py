"""Losses, schedules, the guarded step, accumulation, and what fit refuses."""

import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from predictors import one_target, unet
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from sarfm.io.files import CorruptData
from sarfm.models.mae import MAE
from sarfm.models.vit import Encoder
from sarfm.tasks.losses import LOSSES, class_loss, cross_entropy
from sarfm.train import trainer
from sarfm.train.checkpoints import generator_at, load_checkpoint, seed_at
from sarfm.train.optimizer import parameter_groups, warmup_cosine
from sarfm.train.previews import preview
from sarfm.train.steps import NonFiniteLoss, Recipe, Training, guarded_step, running_statistics
from sarfm.train.trainer import fit, make_fabric


class Numbers(Dataset):
    """y = 2x + 1; the samples in `bad` are infinite."""

    def __init__(self, bad=()):
        self.bad = set(bad)

    def __getitem__(self, k):
        x = torch.randn(3, generator=generator_at(5, k))
        return {"x": x / 0 if k in self.bad else x, "y": 2 * x[:1] + 1, "patch": k}


class InOrder:
    def __init__(self, length):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(range(self.epoch * self.length, (self.epoch + 1) * self.length))


class Regression(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def draw(self, batch, generator):
        return batch

    def loss(self, batch):
        return (self.network(batch["x"]) - batch["y"]).square().mean(), {"picture": batch["x"]}


def numbers(batch=4, batches=10, bad=()):
    return DataLoader(Numbers(bad), batch_size=batch, sampler=InOrder(batch * batches))


def regression(steps=30, model=None, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 1))
    defaults = {"rate": 0.01, "weight_decay": 0.01, "warmup": 5 / steps, "steps": steps}
    return Training(Regression(model), Recipe(**(defaults | options)))


def run(task, data, out, **options):
    return fit(task, data, out=out, steps_per_epoch=10, device="cpu", progress=False, **options)


# losses


def test_cross_entropy_agrees_with_pytorch():
    logits, truth = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8))
    truth[:, :3] = 255
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    assert torch.isclose(cross_entropy(logits, truth), functional.cross_entropy(logits, truth, ignore_index=255))
    expected = functional.cross_entropy(logits, truth, weight, ignore_index=255)
    assert torch.isclose(cross_entropy(logits, truth, weight=weight), expected)
    over_all = cross_entropy(logits, truth, avg_non_ignore=False)
    assert torch.isclose(over_all, cross_entropy(logits, truth) * 5 / 8)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_unlabelled_batches_are_zero_and_finite(name):
    logits = torch.randn(1, 3, 8, 8, requires_grad=True)
    loss = class_loss(name)(logits, torch.full((1, 8, 8), 255))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_have_no_gradient(name):
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    truth = torch.randint(0, 3, (2, 8, 8))
    truth[:, 4:] = 255
    class_loss(name)(logits, truth).backward()
    assert (logits.grad[:, :, 4:] == 0).all()
    assert (logits.grad[:, :, :4] != 0).any()


def test_warmup_cosine_ends_where_it_should():
    factors = [warmup_cosine(k, 10, 100, 0.1) for k in range(100)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert math.isclose(factors[-1], 0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_layer_decay_of_a_segmenter(head):
    model = one_target(Encoder(2, patch_size=8, width=32, depth=3, heads=2), 2, head)
    groups = parameter_groups(model, 0.05, 0.5)
    scale = {id(p): g["scale"] for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert len(scale) == len(named)
    assert {scale[id(p)] for name, p in named.items() if name.startswith("encoder.embed.")} == {0.5**4}
    assert [scale[id(named[f"encoder.blocks.{k}.attn.qkv.weight"])] for k in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert scale[id(named["encoder.norm.weight"])] == scale[id(named["classify.label.weight"])] == 1.0
    assert all(scale[id(p)] == 1.0 for name, p in named.items() if not name.startswith("encoder."))
    undecayed = [p for g in groups if g["weight_decay"] == 0 for p in g["params"]]
    assert all(p.ndim == 1 or p is named["encoder.embed.class_token"] for p in undecayed)


def test_layer_decay_in_the_other_convention_never_uses_the_full_rate():
    model = one_target(Encoder(2, patch_size=8, width=32, depth=3, heads=2), 2, "linear")
    groups = parameter_groups(model, 0.05, 0.7, "last_block")
    assert math.isclose(max(g["scale"] for g in groups), 0.7)
    with pytest.raises(ValueError, match="Leave layer_decay at None"):
        parameter_groups(unet(2, 2), 0.05, 0.7)


def published_scale(name, depth, decay, convention):
    """Give a parameter's factor by its name alone, as BEiT, MAE (`mae`) and SAR-W-MixMAE (`last_block`) do."""
    last = depth + 1 if convention == "mae" else depth
    block = re.search(r"^encoder\.blocks\.(\d+)\.", name)
    if not name.startswith("encoder.") or name.startswith("encoder.norm."):
        return decay ** (depth + 1 - last)
    return decay ** (depth + 1 - (int(block[1]) + 1 if block else 0))


@pytest.mark.parametrize("convention", ["mae", "last_block"])
def test_layer_decay_is_the_published_one(convention):
    encoder = Encoder(2, patch_size=8, width=32, depth=3, heads=2)
    for model in (one_target(encoder, 2, "upernet"), MAE(encoder, 32, 2, 2)):
        scale = {id(p): g["scale"] for g in parameter_groups(model, 0.05, 0.7, convention) for p in g["params"]}
        expected = {id(p): published_scale(name, 3, 0.7, convention) for name, p in model.named_parameters()}
        assert scale == {key: expected[key] for key in scale} and len(scale) == len(expected)


def test_layer_decay_of_an_encoder_in_stages():
    class Stages(nn.Module):
        depth = 4  # two stages of two layers

        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 4, 4)
            self.stages = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2))

        def layer_of(self, parameter):
            part, *rest = parameter.split(".")
            return 0 if part == "stem" else 1 + 2 * int(rest[0]) + int(rest[1])

    model = nn.ModuleDict({"encoder": Stages(), "head": nn.Linear(4, 2)})
    scale = {id(p): g["scale"] for g in parameter_groups(model, 0.05, 0.5) for p in g["params"]}
    linear = [layer for stage in model["encoder"].stages for layer in stage]
    assert scale[id(model["encoder"].stem.weight)] == 0.5**5
    assert [scale[id(layer.weight)] for layer in linear] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert scale[id(model["head"].weight)] == 1.0


# random streams and checkpoints


def test_streams_differ_and_repeat():
    assert len({seed_at(a, b, c) for a in range(10) for b in range(10) for c in range(10)}) == 1000
    assert seed_at(2**32 - 1, 2**40) == seed_at(2**32 - 1, 2**40) < 2**63


# the step


@pytest.mark.row(5)
def test_a_non_finite_step_changes_no_bit(tmp_path, monkeypatch):
    unchanged, task = [], regression(ema=0.9)

    def everything(optimiser):
        moments = [value for state in optimiser.state.values() for value in state.values()]
        return [value.clone() for value in [*task.state_dict().values(), *moments]]

    def watched(model, fabric, batches, optimiser, step=trainer.train_step):
        number, before = model.module.step, everything(optimiser)
        step(model, fabric, batches, optimiser)
        after = everything(optimiser)
        if len(before) == len(after) and all(map(torch.equal, before, after)):
            unchanged.append(number)

    monkeypatch.setattr(trainer, "train_step", watched)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = run(task, numbers(bad={4 * 7 + 2}), tmp_path)
    assert unchanged == [7]
    assert list(history["step"][history["skipped"]]) == [7]
    text = " ".join(str(w.message) for w in caught if "skipped" in str(w.message))
    assert "step 7" in text and "30" in text and "unchanged" in text
    assert all(p.isfinite().all() for p in task.state_dict().values())


@pytest.mark.row(5)
def test_an_infinite_gradient_with_a_finite_loss_is_skipped_too():
    model = nn.Linear(1, 1)
    optimiser = Recipe(steps=10, rate=0.1, weight_decay=0.0, warmup=0.0).optimiser(model)
    before = [p.clone() for p in model.parameters()]
    loss = model(torch.ones(1, 1)).sum()
    loss.backward()
    model.weight.grad.fill_(float("inf"))
    _, bad = guarded_step(optimiser, model, loss.detach(), running_statistics(model))
    assert bad and all(map(torch.equal, before, model.parameters()))


@pytest.mark.row(5)
def test_three_non_finite_steps_in_a_row_stop_the_run(tmp_path):
    bad = {4 * step for step in (3, 4, 12, 13, 14)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NonFiniteLoss, match="step 14"):
            run(regression(), numbers(bad=bad), tmp_path)
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["step"] == 10
    assert all(v.isfinite().all() for v in saved["weights"].values())


def test_accumulation_is_a_larger_batch(tmp_path):
    two = regression(model=nn.Linear(3, 1), accumulate=2)
    one = regression(model=nn.Linear(3, 1))
    one.load_state_dict(two.state_dict())
    a = run(two, numbers(4, 20), tmp_path / "two")
    b = run(one, numbers(8, 10), tmp_path / "one")
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
    assert torch.allclose(two.learner.network.weight, one.learner.network.weight, atol=1e-6)


def test_training_learns_and_the_average_follows(tmp_path):
    task = regression(steps=200, ema=0.95, clip_norm=5.0)
    history = run(task, numbers(16), tmp_path)
    assert history["loss"].tail(10).mean() < 0.2 * history["loss"].head(10).mean()
    assert list(history["step"]) == list(range(200))
    assert "picture" not in history
    slow, fast = task.average.state_dict(), task.learner.state_dict()
    assert any(not torch.equal(slow[k], fast[k]) for k in slow)
    assert task.trained() is task.average


def test_nothing_but_the_checkpoint_is_written(tmp_path, capfd):
    run(regression(), numbers(), tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["last.ckpt"]
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_a_processor_that_imitates_bfloat16_says_so(tmp_path, monkeypatch):
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run(regression(steps=10, precision="bf16-mixed"), numbers(16), tmp_path / str(supported))
        assert ["no instructions for bfloat16" in str(each.message) for each in said].count(True) == (not supported)


def test_bf16_trains(tmp_path):
    history = run(regression(steps=100, precision="bf16-mixed"), numbers(16), tmp_path)
    assert history["loss"].tail(10).mean() < 0.5 * history["loss"].head(10).mean()


def test_steps_need_not_be_whole_epochs(tmp_path):
    epochs = []
    history = run(regression(steps=25), numbers(), tmp_path, on_epoch=lambda task: epochs.append(task.step))
    assert len(history) == 25 and epochs == [10, 20, 25]
    again = run(regression(steps=25), numbers(), tmp_path)
    assert again.equals(history)


def test_a_learner_is_told_of_every_step_and_frozen_parts_rest(tmp_path):
    told = []

    class Watching(Regression):
        def stepped(self, step, steps):
            told.append((step, steps))

    network = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    task = Training(Watching(network), Recipe(steps=20), freeze=("network.0", "network.1"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run(task, numbers(), tmp_path)
    assert told == [(step, 20) for step in range(20)]
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"2.weight", "2.bias"}
    with pytest.raises(ValueError, match="freeze names encoder"):
        Training(Watching(network), Recipe(), freeze=("encoder",))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"batch_size": 0}, {"accumulate": 0}, {"rate": 0.0}, {"warmup": 1.0}, {"floor": 2.0}, {"ema": 1.0},
        {"weight_decay": -1.0}, {"betas": (0.9,)}, {"betas": (0.9, 1.0)}, {"clip_norm": -1.0}, {"layer_decay": 0.0},
        {"convention": "other"}, {"precision": "16-mixed"}, {"seed": -1}, {"epochs": -1.0},
    ],
)  # fmt: skip
def test_a_recipe_refuses_what_lies_outside_its_ranges(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}.*Change {next(iter(wrong))} of the recipe"):
        Recipe(**wrong)


# what fit refuses


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rate": 0.5}, "rate"),
        ({"seed": 1}, "seed"),
        ({"ema": 0.5}, "ema"),
        ({"weight_decay": 0.5}, "weight_decay"),
    ],
)
def test_other_settings_are_not_continued(tmp_path, change, word):
    run(regression(), numbers(), tmp_path)
    with pytest.raises(ValueError, match=word):
        run(regression(**change), numbers(), tmp_path)


def test_a_checkpoint_of_before_a_field_was_there_is_continued_at_its_default(tmp_path):
    from sarfm.train.checkpoints import save_checkpoint

    training = run(regression(), numbers(), tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    saved = load_checkpoint(path)
    for name in ("epochs", "decay_all"):
        del saved["settings"][name]
    save_checkpoint(saved, path)
    assert run(regression(), numbers(), tmp_path).equals(training)
    with pytest.raises(ValueError, match="decay_all: False there, True here"):
        run(regression(decay_all=True), numbers(), tmp_path)


def test_passes_over_the_data_become_steps_and_a_rate_may_stay_where_it_is():
    recipe = Recipe(epochs=2.5, batch_size=8, accumulate=2, warmup=0, floor=1, rate=3e-4)
    assert recipe.over(100).steps == 16 and recipe.over(1).steps == 1  # 250 items in steps of 16
    assert {recipe.over(100).rate_at(step) for step in range(16)} == {3e-4}
    assert Recipe(steps=7).over(100) == Recipe(steps=7)


def test_everything_decays_where_that_is_asked_for():
    model = MAE(Encoder(1, 8, 32, 2, 2), 16, 1, 2)
    usual, everything = (
        Recipe(weight_decay=0.01, decay_all=how).optimiser(model).param_groups for how in (False, True)
    )
    assert {group["weight_decay"] for group in usual} == {0.0, 0.01}
    assert [group["weight_decay"] for group in everything] == [0.01]
    assert len(everything[0]["params"]) == len(list(model.parameters()))


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(regression(), numbers(), tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptData, match=r"last\.ckpt"):
        run(regression(), numbers(), tmp_path)


def test_lengths_precision_and_device_are_checked(tmp_path):
    with pytest.raises(ValueError, match="steps_per_epoch=20"):
        run(regression(accumulate=2), numbers(), tmp_path)
    with pytest.raises(ValueError, match="bf16-mixed"):
        regression(precision="16-mixed")
    with pytest.raises(ValueError, match="cuda"):
        make_fabric("gpu")
    with pytest.raises(ValueError, match="validation_batches"):
        run(regression(), numbers(), tmp_path, validation_batches=2)


@pytest.mark.row(16)
def test_more_or_fewer_threads_are_reported(tmp_path):
    calls = []

    def stop(task):
        calls.append(task.step)
        raise RuntimeError("stopped")

    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="stopped"):
        run(regression(), numbers(), tmp_path, on_epoch=stop)
    try:
        torch.set_num_threads(threads + 1)
        with pytest.warns(UserWarning, match=f"ran with {threads} threads"):
            run(regression(), numbers(), tmp_path)
    finally:
        torch.set_num_threads(threads)


def test_ctrl_c_stays_a_keyboard_interrupt(tmp_path):
    import signal

    def interrupt(task):
        if task.step == 20:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="continues from"):
        run(regression(), numbers(), tmp_path, on_epoch=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(run(regression(), numbers(), tmp_path)) == 30


# the tasks


def test_pretraining_knows_no_method_by_name(tmp_path):
    class Method(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def draw(self, batch, generator):
            return batch | {"noise": torch.rand(1, generator=generator)}

        def loss(self, batch):
            return (self.weight * batch["noise"]).sum() ** 2, {"noise": batch["noise"]}

    histories = [
        run(Training(Method(), Recipe(steps=30, warmup=0.0, seed=seed)), numbers(), tmp_path / f"{n}")
        for n, seed in enumerate((3, 3, 4))
    ]
    assert list(histories[0]["noise"]) == list(histories[1]["noise"]) != list(histories[2]["noise"])
    assert histories[0]["noise"].nunique() == 30
    with pytest.raises(ValueError, match="lacks draw and loss"):
        Training(nn.Linear(1, 1), Recipe())
    with pytest.raises(ValueError, match="no pictures"):
        preview(Training(Method(), Recipe(steps=3)), {"image": torch.zeros(1)})


def test_evaluation_counts_what_is_counted_by_hand():
    from predictors import confusion

    from sarfm.evaluation.counting import count_patches
    from sarfm.evaluation.tallies import Tallies
    from sarfm.scenes.channels import Target
    from sarfm.tasks.predictor import Predictor
    from sarfm.tasks.tasks import Classes

    class Fixed(nn.Module):
        truths, decide = Predictor.truths, Predictor.decide

        def __init__(self, classes=3):
            super().__init__()
            self.tasks = {"shape": Classes(Target("shape", classes={k: f"{k}" for k in range(classes)}))}

        def forward(self, image, valid):
            return {"shape": torch.cat([image, -image, 0.5 * image], 1)}

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 1, 9, 9, generator=generator)
    truth = torch.randint(0, 3, (5, 9, 9), generator=generator)
    truth[:, :2] = 255
    valid = torch.ones(5, 9, 9, dtype=torch.bool)
    batches = [
        {"image": images[s], "valid": valid[s], "target_shape": truth[s], "patch": torch.arange(5)[s] + 10}
        for s in (slice(0, 2), slice(2, 5))
    ]
    counted, names = Tallies(), [f"patch {k}" for k in range(20)]
    count_patches(counted, Fixed(), batches, names)
    assert list(counted.table()["scene"]) == names[10:15]
    called = Fixed()(images, valid)["shape"].argmax(1).numpy()
    expected = np.stack([confusion(p, t, 3) for p, t in zip(called, truth.numpy(), strict=True)])
    np.testing.assert_array_equal(np.stack(counted.table()["sums"]).reshape(-1, 3, 3), expected)
    with pytest.raises(ValueError, match="found 2"):
        count_patches(Tallies(), Fixed(2), batches, names)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        count_patches(Tallies(), Fixed(), [], names)


def test_a_frozen_encoder_rests():
    model = one_target(Encoder(1, patch_size=4, width=16, depth=1, heads=2), 2, "linear", frozen=True)
    training = Training(model, Recipe(steps=1)).train()
    assert not model.encoder.training and model.classify.training
    assert all(p.shape[0] == 2 for g in training.recipe.optimiser(model).param_groups for p in g["params"])


def test_layer_decay_reaches_the_layers_of_a_swin_through_a_training(tmp_path):
    """AdamW's first step is the rate in each weight: what moves, moves by rate x decay ** (layers above)."""
    from sarfm.models.kinds import build_encoder
    from sarfm.scenes.channels import Target
    from sarfm.tasks.predictor import Predictor
    from sarfm.tasks.tasks import task_for

    torch.manual_seed(0)
    target = Target("cover", "classes", "pixel", classes={0: "water", 1: "land"})
    model = Predictor(build_encoder("swin-nano", 1), {"cover": task_for(target)}, "linear")
    task = Training(model, Recipe(steps=1, rate=1e-3, warmup=0.0, weight_decay=0.0, layer_decay=0.5))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}

    class Tiles(Dataset):
        def __getitem__(self, k):
            image = torch.randn(1, 32, 32, generator=generator_at(1, k))
            return {
                "image": image,
                "valid": torch.ones(32, 32, dtype=torch.bool),
                "target_cover": (image[0] > 0).long(),
            }

    fit(task, DataLoader(Tiles(), 2, sampler=range(2)), out=tmp_path, steps_per_epoch=1, device="cpu", progress=False)
    depth, seen = model.body.depth, set()
    for name, value in model.named_parameters():
        moved = float((value.detach() - before[name]).abs().max())
        layer = model.body.layer_of(name.removeprefix("encoder.")) if name.startswith("encoder.") else depth + 1
        seen.add(layer)
        if moved:
            assert math.isclose(moved, 1e-3 * 0.5 ** (depth + 1 - layer), rel_tol=0.05), name
    assert seen >= {0, 1, depth, depth + 1}
