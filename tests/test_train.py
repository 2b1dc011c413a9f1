"""Losses, schedules, the guarded step, accumulation, and what fit refuses."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from sarfm.io.files import CorruptData
from sarfm.models.heads import Segmenter, build_unet
from sarfm.models.vit import Encoder
from sarfm.train.checkpoints import generator_at, load_checkpoint, seed_at
from sarfm.train.finetune import SegmentationTask, evaluate_segmentation
from sarfm.train.losses import LOSSES, cross_entropy, parameter_groups, segmentation_loss, warmup_cosine
from sarfm.train.pretrain import PretrainTask, preview
from sarfm.train.trainer import fit, make_fabric
from sarfm.train.training import NonFiniteLoss, Recipe, Training, guarded_step, running_statistics


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


class Regression(Training):
    def losses(self, batch, generator):
        return (self.model(batch["x"]) - batch["y"]).square().mean(), {"picture": batch["x"]}


def numbers(batch=4, batches=10, bad=()):
    return DataLoader(Numbers(bad), batch_size=batch, sampler=InOrder(batch * batches))


def regression(steps=30, model=None, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 1))
    defaults = {"learning_rate": 0.01, "weight_decay": 0.01, "warmup_steps": 5, "steps": steps}
    return Regression(model, Recipe(**(defaults | options)))


def run(task, data, out, steps=30, **options):
    return fit(task, data, out=out, steps=steps, steps_per_epoch=10, device="cpu", progress=False, **options)


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
    loss = segmentation_loss(name)(logits, torch.full((1, 8, 8), 255))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_have_no_gradient(name):
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    truth = torch.randint(0, 3, (2, 8, 8))
    truth[:, 4:] = 255
    segmentation_loss(name)(logits, truth).backward()
    assert (logits.grad[:, :, 4:] == 0).all()
    assert (logits.grad[:, :, :4] != 0).any()


def test_warmup_cosine_ends_where_it_should():
    factors = [warmup_cosine(k, 10, 100, 0.1) for k in range(100)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert math.isclose(factors[-1], 0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_layer_decay_of_a_segmenter(head):
    model = Segmenter(Encoder(2, patch_size=8, width=32, depth=3, heads=2), 2, head)
    groups = parameter_groups(model, 0.05, 0.5)
    scale = {id(p): g["scale"] for g in groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert len(scale) == len(named)
    assert {scale[id(p)] for name, p in named.items() if name.startswith("encoder.embed.")} == {0.5**4}
    assert [scale[id(named[f"encoder.blocks.{k}.attn.qkv.weight"])] for k in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert scale[id(named["encoder.norm.weight"])] == scale[id(named["classify.weight"])] == 1.0
    assert all(scale[id(p)] == 1.0 for name, p in named.items() if not name.startswith("encoder."))
    undecayed = [p for g in groups if g["weight_decay"] == 0 for p in g["params"]]
    assert all(p.ndim == 1 or p is named["encoder.embed.class_token"] for p in undecayed)


def test_layer_decay_in_the_other_convention_never_uses_the_full_rate():
    model = Segmenter(Encoder(2, patch_size=8, width=32, depth=3, heads=2), 2, "linear")
    groups = parameter_groups(model, 0.05, 0.7, "last_block")
    assert math.isclose(max(g["scale"] for g in groups), 0.7)
    with pytest.raises(ValueError, match="Leave layer_decay at None"):
        parameter_groups(build_unet(2, 2), 0.05, 0.7)


# random streams and checkpoints


def test_streams_differ_and_repeat():
    assert len({seed_at(a, b, c) for a in range(10) for b in range(10) for c in range(10)}) == 1000
    assert seed_at(2**32 - 1, 2**40) == seed_at(2**32 - 1, 2**40) < 2**63


# the step


@pytest.mark.row(5)
def test_a_non_finite_step_changes_no_bit(tmp_path):
    unchanged = []

    class Watched(Regression):
        def everything(self, optimiser):
            moments = [value for state in optimiser.state.values() for value in state.values()]
            return [value.clone() for value in [*self.state_dict().values(), *moments]]

        def add_batch(self, batch, optimiser, *rest):
            step, before = self.step, self.everything(optimiser)
            super().add_batch(batch, optimiser, *rest)
            after = self.everything(optimiser)
            if len(before) == len(after) and all(map(torch.equal, before, after)):
                unchanged.append(step)

    plain = regression(ema=0.9)
    task = Watched(plain.model, plain.recipe)
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
    optimiser = Recipe(0.1, 0.0, 0, 10).optimiser(model)
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
    two = regression(model=nn.Linear(3, 1))
    one = regression(model=nn.Linear(3, 1))
    one.load_state_dict(two.state_dict())
    a = run(two, numbers(4, 20), tmp_path / "two", accumulate=2)
    b = run(one, numbers(8, 10), tmp_path / "one")
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
    assert torch.allclose(two.model.weight, one.model.weight, atol=1e-6)


def test_training_learns_and_the_average_follows(tmp_path):
    task = regression(steps=200, ema=0.95, clip_norm=5.0)
    history = run(task, numbers(16), tmp_path, steps=200)
    assert history["loss"].tail(10).mean() < 0.2 * history["loss"].head(10).mean()
    assert list(history["step"]) == list(range(200))
    assert "picture" not in history
    slow, fast = task.average.state_dict(), task.model.state_dict()
    assert any(not torch.equal(slow[k], fast[k]) for k in slow)
    assert task.trained() is task.average


def test_nothing_but_the_checkpoint_is_written(tmp_path, capfd):
    run(regression(), numbers(), tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["last.ckpt"]
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_bf16_trains(tmp_path):
    history = run(regression(steps=100), numbers(16), tmp_path, steps=100, precision="bf16-mixed")
    assert history["loss"].tail(10).mean() < 0.5 * history["loss"].head(10).mean()


def test_steps_need_not_be_whole_epochs(tmp_path):
    epochs = []
    history = run(regression(steps=25), numbers(), tmp_path, steps=25, on_epoch=lambda task: epochs.append(task.step))
    assert len(history) == 25 and epochs == [10, 20, 25]
    again = run(regression(steps=25), numbers(), tmp_path, steps=25)
    assert again.equals(history)


# what fit refuses


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"seed": 1}, "seed"),
        ({"ema": 0.5}, "ema"),
        ({"weight_decay": 0.5}, "weight_decay"),
    ],
)
def test_other_settings_are_not_continued(tmp_path, change, word):
    run(regression(), numbers(), tmp_path)
    with pytest.raises(ValueError, match=word):
        run(regression(**change), numbers(), tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(regression(), numbers(), tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptData, match=r"last\.ckpt"):
        run(regression(), numbers(), tmp_path)


def test_lengths_precision_and_device_are_checked(tmp_path):
    with pytest.raises(ValueError, match="steps_per_epoch=20"):
        run(regression(), numbers(), tmp_path, accumulate=2)
    with pytest.raises(ValueError, match="made for 30 steps"):
        run(regression(), numbers(), tmp_path, steps=40)
    with pytest.raises(ValueError, match="bf16-mixed"):
        run(regression(), numbers(), tmp_path, precision="16-mixed")
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
        run(PretrainTask(Method(), steps=30, seed=seed), numbers(), tmp_path / f"{n}")
        for n, seed in enumerate((3, 3, 4))
    ]
    assert list(histories[0]["noise"]) == list(histories[1]["noise"]) != list(histories[2]["noise"])
    assert histories[0]["noise"].nunique() == 30
    with pytest.raises(ValueError, match="lacks draw and loss"):
        PretrainTask(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no reconstruct"):
        preview(PretrainTask(Method(), steps=3), {"image": torch.zeros(1)})


def test_evaluation_counts_what_metrics_count():
    from sarfm.evaluation.metrics import confusion, confusions

    class Fixed(nn.Module):
        def forward(self, image, valid):
            return torch.cat([image, -image, 0.5 * image], 1)

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 1, 9, 9, generator=generator)
    truth = torch.randint(0, 3, (5, 9, 9), generator=generator)
    truth[:, :2] = 255
    valid = torch.ones(5, 9, 9, dtype=torch.bool)
    batches = [
        {"image": images[s], "valid": valid[s], "mask": truth[s], "patch": torch.arange(5)[s] + 10}
        for s in (slice(0, 2), slice(2, 5))
    ]
    table = evaluate_segmentation(Fixed(), batches, 3)
    assert list(table["patch"]) == [10, 11, 12, 13, 14]
    called = Fixed()(images, valid).argmax(1).numpy()
    expected = np.stack([confusion(p, t, 3) for p, t in zip(called, truth.numpy(), strict=True)])
    np.testing.assert_array_equal(confusions(table), expected)
    with pytest.raises(ValueError, match="found 2"):
        evaluate_segmentation(Fixed(), batches, 2)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_segmentation(Fixed(), [], 2)


def test_a_frozen_encoder_rests():
    model = Segmenter(Encoder(1, patch_size=4, width=16, depth=1, heads=2), 2, "linear")
    task = SegmentationTask(model, 2, freeze_encoder=True)
    task.train()
    assert not model.encoder.training and model.classify.training
    assert all(p.shape[0] == 2 for g in task.recipe.optimiser(task.model).param_groups for p in g["params"])
