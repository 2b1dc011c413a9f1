"""The predictor gives the logits of the models that it replaces, with their weights."""

import pytest
import torch

from sarfm.models.heads import MultiSegmenter, Segmenter, UNet
from sarfm.models.networks import build_baseline, build_network
from sarfm.models.vit import Encoder
from sarfm.scenes.channels import Target
from sarfm.tasks.predictor import Predictor
from sarfm.tasks.tasks import Classes
from sarfm.train.multitask import MultiTask

SIZES = {"a": 11, "b": 6, "c": 7}


def tasks(numbers=(), weights=None, names=SIZES):
    return {
        n: Classes(
            Target(n, "classes", classes={i: f"c{i}" for i in range(k)}),
            weight=(weights or {}).get(n, 1.0),
            loss_of="number" if n in numbers else "cross_entropy",
            avg_non_ignore=False,
        )
        for n, k in SIZES.items()
        if n in names
    }


def load(new, old, renames):
    state = {}
    for name, tensor in old.state_dict().items():
        for before, after in renames:
            if name.startswith(before):
                name = after + name.removeprefix(before)
                break
        state[name] = tensor
    new.load_state_dict(state)
    return new


def image(size=(40, 52)):
    data, valid = torch.randn(2, 2, *size), torch.ones(2, *size).bool()
    valid[0, :10, :7] = False
    return data, valid


@pytest.mark.parametrize("head", ["upernet", "linear"])
@pytest.mark.parametrize("training", [True, False])
def test_of_a_segmenter(head, training):
    torch.manual_seed(0)
    old = Segmenter(Encoder(2, 8, 32, 4, 4), 6, head, 16)
    new = Predictor(Encoder(2, 8, 32, 4, 4), tasks(names="b"), head, 16)
    load(new, old, [("decoder.", "decoders.b.decoder."), ("classify.", "classify.b.")])
    data = image()
    old.train(training), new.train(training)
    assert torch.equal(old(*data), new(*data)["b"])


@pytest.mark.parametrize("head", ["upernet", "linear"])
@pytest.mark.parametrize("layers", [None, [0, 1, 1, 3]])
def test_of_a_multisegmenter_and_its_loss(head, layers):
    torch.manual_seed(0)
    weights = {"a": 1, "b": 3, "c": 2}
    old = MultiSegmenter(Encoder(2, 8, 32, 4, 4), SIZES, ["a"], 16, True, head, layers, 0.1)
    new = Predictor(Encoder(2, 8, 32, 4, 4), tasks("a", weights), head, 16, layers=layers, auxiliary=True, dropout=0.1)
    load(new, old, [(f"decoders.{n}.", f"decoders.{n}.decoder.") for n in SIZES])
    data, valid = image()
    truths = {n: torch.randint(0, k, (2, 40, 52)) for n, k in SIZES.items()}
    torch.manual_seed(3)
    before, terms = MultiTask(old.train(), weights).losses(
        {"image": data, "valid": valid, **{f"target_{n}": t for n, t in truths.items()}}, None
    )
    torch.manual_seed(3)
    now, parts = new.train().loss({"image": data, "valid": valid, **{f"target_{n}": t for n, t in truths.items()}})
    assert set(terms) == set(parts)
    assert all(torch.allclose(terms[n], parts[n], rtol=1e-6) for n in terms) and torch.isclose(before, now, rtol=1e-6)
    outputs = new.eval()(data, valid)
    assert all(torch.equal(x, outputs[n]) for n, x in old.eval()(data, valid).items())


@pytest.mark.parametrize("name", ["unet_winner", "unet_icefm", "upernet", "deeplabv3plus", "segformer", "unet"])
def test_of_a_baseline(name):
    torch.manual_seed(0)
    small = "mit_b0" if name == "segformer" else "resnet18"
    old = build_baseline(name, 2, SIZES, ["a"], small)
    new = Predictor(build_network(name, 2, small), tasks("a"), kernel_px=1)
    load(new, old, [("network.", "network.network.")])
    data = image((64, 70))
    assert all(torch.equal(x, new.eval()(*data)[n]) for n, x in old.eval()(*data).items())


def test_of_a_unet():
    torch.manual_seed(0)
    old = UNet(2, 6)
    new = Predictor(build_network("unet", 2, "resnet18"), tasks(names="b"))
    renames = [("network.segmentation_head.0.", "classify.b."), ("network.encoder.", "network.network.encode.")]
    load(new, old, [*renames, ("network.decoder.", "network.network.decode.")])
    data = image((64, 70))
    assert torch.equal(old.eval()(*data), new.eval()(*data)["b"])


def test_training_takes_the_steps_that_it_took_before(tmp_path):
    from torch.utils.data import DataLoader, Dataset

    from sarfm.train.trainer import fit
    from sarfm.train.training import Recipe, Training

    class Tiles(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, item):
            generator = torch.Generator().manual_seed(item)
            masks = {n: torch.randint(0, k, (32, 32), generator=generator) for n, k in SIZES.items()}
            out = {f"target_{n}": mask for n, mask in masks.items()}
            return out | {"image": torch.randn(2, 32, 32, generator=generator), "valid": torch.ones(32, 32).bool()}

    weights, options = {"a": 1, "b": 3, "c": 2}, {"learning_rate": 1e-2, "weight_decay": 0.01, "layer_decay": 0.75}
    options |= {"warmup_steps": 2, "steps": 6, "seed": 3, "ema": 0.9, "clip_norm": 1.0}
    torch.manual_seed(0)
    old = MultiSegmenter(Encoder(2, 8, 32, 4, 4, drop_path=0.1), SIZES, ["a"], 16, True)
    new = Predictor(
        Encoder(2, 8, 32, 4, 4, drop_path=0.1), tasks("a", weights), head_width=16, auxiliary=True, dropout=0.1
    )
    load(new, old, [(f"decoders.{n}.", f"decoders.{n}.decoder.") for n in SIZES])
    histories = {}
    recipe = Recipe(
        steps=6, rate=1e-2, warmup=2 / 6, weight_decay=0.01, betas=(0.9, 0.999), layer_decay=0.75, seed=3, ema=0.9,
        clip_norm=1.0,
    )  # fmt: skip
    for name, task in (("old", MultiTask(old, weights, **options)), ("new", Training(new, recipe))):
        loader = DataLoader(Tiles(), batch_size=2)
        histories[name] = fit(task, loader, out=tmp_path / name, steps_per_epoch=6, progress=False, device="cpu")
    before, now = histories["old"], histories["new"]
    assert set(before) == set(now) and len(now) == 6
    assert all(torch.allclose(torch.tensor(before[c]), torch.tensor(now[c]), rtol=1e-5) for c in before)
