"""What is read of an encoder for a whole tile, SETR-PUP in both published sizes, and the root mean square error of a batch."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from sarfm.evaluation.contestants import Bodies, Cell, Head, Trials
from sarfm.evaluation.counting import Scoring
from sarfm.evaluation.intervals import batch_means
from sarfm.io.ranks import gather, run_ranks
from sarfm.models.heads import HalfProgressiveDecoder, ProgressiveDecoder
from sarfm.models.kinds import build_encoder
from sarfm.models.networks import build_network
from sarfm.models.tile_heads import TILE_HEADS, FlattenHead, TokensHead, tile_head
from sarfm.models.vit import Encoder
from sarfm.patches.contract import InputContract
from sarfm.patches.loading import Crops
from sarfm.patches.prepare import write_store
from sarfm.scenes.channels import Target
from sarfm.scenes.open import make_scene
from sarfm.tasks.losses import number_loss
from sarfm.tasks.predictor import Predictor, build_predictor
from sarfm.tasks.tasks import Classes, Number
from sarfm.train.steps import Recipe
from sarfm.train.trainer import make_fabric

COVER = Number(Target("tree_cover", "number", "tile", units="%", limits=(0, 100)), error="rmse")
LAND = Classes(Target("land", classes={k: f"class {k}" for k in range(11)}))


def predictor(body=None, tasks=None, **options):
    torch.manual_seed(0)
    return Predictor(body or Encoder(2, 8, 32, 4, 4), tasks or {"tree_cover": COVER}, **options)


def test_the_published_sizes():
    head = TokensHead(768, 1, tokens=785, classed=True)
    shapes = [tuple(part.weight.shape) for part in head.modules() if isinstance(part, (nn.Conv1d, nn.Linear))]
    assert shapes == [(196, 785, 1), (192, 768, 1), (512, 37_632), (256, 512), (128, 256), (1, 128)] or sorted(
        shapes, key=str
    ) == sorted([(196, 785, 1), (192, 768, 1), (512, 37_632), (256, 512), (128, 256), (1, 128)], key=str)
    count = lambda part: sum(w.numel() for w in part.parameters())
    assert (count(head.mix_tokens), count(head.mix_channels)) == (154_056, 147_648)
    assert count(head.connect) == 19_268_096 + 131_328 + 32_896 + 129
    steps = []
    for part in (head.mix_tokens, head.mix_channels, head.connect):
        part.register_forward_hook(lambda part, given, made: steps.append((tuple(given[0].shape), tuple(made.shape))))
    head(torch.randn(2, 768, 28, 28), torch.randn(2, 768))
    assert steps == [((2, 785, 768), (2, 196, 768)), ((2, 768, 196), (2, 192, 196)), ((2, 37_632), (2, 1))]
    with torch.device("meta"):
        flat = FlattenHead(768, 1, tokens=785, classed=True)
    assert flat.connect[0].in_features == 602_880
    assert [layer.out_features for layer in flat.connect if isinstance(layer, nn.Linear)] == [512, 256, 128, 1]
    assert [type(layer).__name__ for layer in flat.connect] == ["Linear", "ReLU"] * 3 + ["Linear"]


def test_the_convolutional_head_computes_what_it_says():
    torch.manual_seed(0)
    head, top, first = TokensHead(8, 2, tokens=17, classed=True), torch.randn(3, 8, 4, 4), torch.randn(3, 8)
    tokens = torch.cat([first[:, None], top.flatten(2).transpose(1, 2)], 1)  # (B, N, D)
    over_tokens = torch.einsum("bnd,mn->bmd", tokens, head.mix_tokens.weight[:, :, 0]) + head.mix_tokens.bias[:, None]
    mixed = torch.einsum("bmd,ed->bme", over_tokens, head.mix_channels.weight[:, :, 0]) + head.mix_channels.bias
    assert torch.allclose(head(top, first), head.connect(mixed.flatten(1)), atol=1e-5)


@pytest.mark.parametrize("tile", list(TILE_HEADS))
@pytest.mark.parametrize("pair", [None, "difference", "concat"])
def test_every_head_predicts_trains_and_is_built_again(tile, pair):
    if "change" in tile and pair != "difference":
        with pytest.raises(ValueError, match="reads the difference of a pair"):
            predictor(tile=tile, pair=pair)
        return
    model = predictor(tile=tile, tile_px=48, pair=pair)
    batch = {"image": torch.randn(3, 4 if pair else 2, 48, 48), "target_tree_cover": torch.tensor([10.0, 90.0, 35.0])}
    loss, _ = model.loss(batch)
    loss.backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in model.classify.parameters())
    seen = model.encoder.blocks[-1].mlp.fc2.weight.grad
    assert seen is not None and seen.any()
    again = build_predictor(model.config())
    again.load_state_dict(model.state_dict())
    image = batch["image"][:1]
    assert torch.equal(again.eval()(image)["tree_cover"], model.eval()(image)["tree_cover"])


def test_the_class_token_is_the_one_of_the_last_layer():
    model = predictor(tile="class_token").eval()
    image = torch.randn(2, 2, 40, 48)
    expected = model.classify["tree_cover"](None, model.encoder.encode(image)[0][:, 0])
    assert torch.allclose(model(image)["tree_cover"], COVER.finish(expected), atol=1e-4)
    assert tuple(model(torch.randn(1, 2, 8, 8))["tree_cover"].shape) == (1, 1)  # of any size


def test_a_map_and_a_tile_come_from_one_pass():
    model = predictor(tasks={"land": LAND, "tree_cover": COVER}, tile="tokens", tile_px=32, head="linear")
    calls = []
    model.encoder.embed.register_forward_hook(lambda *_: calls.append(1))
    outputs = model(torch.randn(2, 2, 32, 32))
    assert len(calls) == 1 and outputs["land"].shape == (2, 11, 32, 32) and outputs["tree_cover"].shape == (2, 1)


def test_tiles_of_another_size_are_refused_in_pixels():
    model = predictor(tile="tokens", tile_px=48)
    with pytest.raises(
        ValueError, match="'tokens' of tree_cover was made for tiles of 48 x 48 px, got 56 x 48 px.*mean"
    ):
        model(torch.randn(1, 2, 56, 48))
    with pytest.raises(ValueError, match="tiles of 37 tokens, got 17 from a map of 4 x 4"):
        model.classify["tree_cover"](torch.randn(1, 32, 4, 4), torch.randn(1, 32))
    with pytest.raises(ValueError, match="State it .tile_px."):
        predictor(tile="flatten")
    with pytest.raises(ValueError, match="no head of tiles 'max'. Choose one of mean"):
        predictor(tile="max")
    assert predictor(tile="tokens", tile_px=44).eval()(torch.randn(1, 2, 44, 44))["tree_cover"].shape == (
        1,
        1,
    )  # padded


def test_an_encoder_without_class_token_has_heads_of_its_patches():
    swin = lambda: build_encoder("swin-nano", 2, 4)
    model = predictor(swin(), tile="tokens", tile_px=128)
    assert model.classify["tree_cover"].tokens == 16
    assert model(torch.randn(2, 2, 128, 128))["tree_cover"].shape == (2, 1)
    with pytest.raises(ValueError, match="this one gives none"):
        predictor(swin(), tile="class_token")


def test_what_was_not_observed_has_no_say_in_a_tile():
    valid = torch.rand(2, 48, 48) > 0.2
    for tile in TILE_HEADS:
        pair = "difference" if "change" in tile else None
        image, model = torch.randn(2, 4 if pair else 2, 48, 48), predictor(tile=tile, tile_px=48, pair=pair).eval()
        found = [model(image.masked_fill(~valid[:, None], f), valid)["tree_cover"] for f in (0.0, 1e9, float("nan"))]
        assert found[0].isfinite().all() and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), tile


def test_a_saved_mean_head_keeps_its_names_and_its_configuration():
    model = predictor()
    assert set(model.classify.state_dict()) == {"tree_cover.weight", "tree_cover.bias"}
    assert not {"tile", "tile_px", "tile_elu", "legacy_logits_act"} & set(model.config())
    image = torch.randn(2, 2, 40, 48)
    pooled = model.maps(image)[-1].mean((2, 3))
    layer = model.classify["tree_cover"]
    assert torch.allclose(model(image)["tree_cover"], 50 + 50 * (pooled @ layer.weight.T + layer.bias), atol=1e-3)


def test_an_elu_ends_numbers_at_the_lower_limit_and_leaves_classes_alone():
    kinds = {"tree_cover": COVER, "use": Classes(Target("use", "classes", "tile", classes={0: "a", 1: "b"}))}
    plain, ended = (predictor(tasks=kinds, tile_elu=elu).eval() for elu in (False, True))
    for model in (plain, ended):
        model.classify["tree_cover"].bias.data.fill_(-7.0)
    image = torch.randn(4, 2, 32, 32)
    assert (plain(image)["tree_cover"] < -200).all() and (ended(image)["tree_cover"] >= 0).all()
    assert torch.equal(plain(image)["use"], ended(image)["use"])
    no_limits = Number(Target("height", "number", "tile", units="m"))
    model = predictor(tasks={"height": no_limits}, tile_elu=True).eval()
    model.classify["height"].bias.data.fill_(-70.0)
    assert torch.allclose(model(image)["height"], torch.tensor(-1.0))  # as published: never below -1


def test_contestants_take_the_tile_s_size_and_networks_keep_the_mean():
    head = Head(tile="tokens", tile_elu=True, legacy_logits_act=True)
    tasks = {"tree_cover": COVER, "land": LAND}
    encoder = head.on(build_encoder("vit-nano", 2, 8), tasks, tile_px=32)
    assert encoder.config()["tile"] == "tokens" and encoder.config()["tile_px"] == 32 and encoder.legacy_logits_act
    network = head.on(build_network("unet_starter", 2), tasks, tile_px=32)
    assert "tile" not in network.config() and network(torch.randn(2, 2, 32, 32))["tree_cover"].shape == (2, 1)
    assert "tile_px" not in Head().on(build_encoder("vit-nano", 2, 8), tasks, tile_px=32).config()


class Widest(nn.Module):
    """A head of somebody else's."""

    def __init__(self, width, outputs, tokens=None, classed=False):
        super().__init__()
        self.last = nn.Linear(width, outputs)

    def forward(self, top, class_token=None):
        return self.last(top.amax((2, 3)))


def test_a_head_of_an_installed_package_is_found(monkeypatch):
    from importlib.metadata import EntryPoint

    from sarfm.models import tile_heads

    point = EntryPoint("widest", "test_tile_heads:Widest", "sarfm.tile_heads")
    monkeypatch.setattr(tile_heads, "registered", lambda group: {"widest": point})
    assert tile_head("widest") is Widest or tile_head("widest").__name__ == "Widest"
    assert predictor(tile="widest")(torch.randn(2, 2, 16, 16))["tree_cover"].shape == (2, 1)


# SETR-PUP


def sides(model, image):
    """The sides of the maps on the way through a decoder, its last convolution and the enlargement."""
    found = []
    decoder = model.decoders["land"]
    found.append(image.shape[-1] // model.encoder.patch_size)
    for stage in decoder.stages:
        stage.register_forward_hook(lambda *call: found.append(call[2].shape[-1]))
    logits = []
    model.classify["land"].register_forward_hook(lambda *call: logits.append(call[2].shape[-1]))
    final = model.eval()(image)["land"].shape[-1]
    return found, logits[0], final


@pytest.mark.parametrize(
    ("head", "path", "logits", "kernel"),
    [("setr-pup-half", [28, 56, 112, 224], 224, (3, 3)), ("setr-pup", [28, 56, 112, 224, 448], 448, (1, 1))],
)
def test_setr_pup_goes_through_the_published_sizes(head, path, logits, kernel):
    model = predictor(Encoder(1, 16, 32, 1, 2), {"land": LAND}, head=head, head_width=4, layers=[0, 0, 0, 0])
    assert sides(model, torch.zeros(1, 1, 448, 448)) == (path, logits, 448)
    assert model.classify["land"].kernel_size == kernel
    assert predictor(tasks={"land": LAND}, head=head, kernel_px=5).classify["land"].kernel_size == (5, 5)


def test_the_stages_are_convolution_normalisation_relu_and_doubling():
    for make, count in ((ProgressiveDecoder, 4), (HalfProgressiveDecoder, 3)):
        decoder = make([768] * 4, [16] * 4, 256)
        assert len(decoder.stages) == count and decoder.width == 256
        kinds = [type(layer).__name__ for layer in decoder.stages[0]]
        assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "Upsample"]
        first, second = decoder.stages[0][0], decoder.stages[1][0]
        assert (first.in_channels, first.out_channels, second.in_channels) == (768, 256, 256)
        assert first.kernel_size == (3, 3) and decoder.stages[0][3].mode == "bilinear"


def test_the_legacy_activation_loses_what_is_below_zero():
    model = predictor(tasks={"land": LAND}, head="setr-pup-half", head_width=8, legacy_logits_act=True)
    kinds = [type(layer).__name__ for layer in model.classify["land"]]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] and model.config()["legacy_logits_act"]
    image = torch.randn(2, 2, 32, 32)
    assert (model(image)["land"] >= 0).all() and (
        predictor(tasks={"land": LAND}, head="setr-pup-half")(image)["land"] < 0
    ).any()
    again = build_predictor(model.config())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(image)["land"], model.eval()(image)["land"])


# the loss of a batch


def test_rmse_is_the_root_of_the_mean_square_with_its_gradient():
    torch.manual_seed(0)
    truth = torch.rand(8) * 100
    truth[2] = torch.nan
    made = (truth.nan_to_num() + torch.randn(8)).requires_grad_()
    loss = number_loss(made, truth, "rmse")
    (gradient,) = torch.autograd.grad(loss, made)
    known = truth.isfinite()
    by_hand = (made[known] - truth[known]).square().mean().sqrt()
    (expected,) = torch.autograd.grad(by_hand, made)
    assert torch.isclose(loss, by_hand) and torch.allclose(gradient, expected) and gradient[2] == 0


def test_rmse_of_nothing_or_of_no_error_has_no_gradient_and_no_nan():
    for truth in (torch.full((4,), torch.nan), torch.ones(4)):
        made = torch.ones(4, requires_grad=True)
        loss = number_loss(made, truth, "rmse")
        loss.backward()
        assert loss == 0 and made.grad.tolist() == [0] * 4


def test_a_task_of_a_number_learns_by_rmse_in_units_of_half_its_range():
    output, truth = torch.tensor([[40.0], [80.0]]), torch.tensor([50.0, 60.0])
    assert np.isclose(COVER.loss(output, truth).item(), np.sqrt((10**2 + 20**2) / 2) / 50)
    with pytest.raises(ValueError, match="mse, mae, huber, rmse; got 'rms'"):
        Number(COVER.target, error="rms")


def shared_rmse(link, truth, made):
    """One of two ranks, each with half of the numbers: tell loss and gradient of both."""
    make_fabric("cpu", link.ranks, 30)
    mine = slice(4 * link.rank, 4 * link.rank + 4)
    estimate = made[mine].clone().requires_grad_()
    loss = number_loss(estimate, truth[mine], "rmse")
    loss.backward()
    link.tell((gather(loss.detach()[None]).tolist(), (gather(estimate.grad) / link.ranks).tolist()))
    gather(loss.detach()[None])
    torch.distributed.destroy_process_group()


def test_two_ranks_descend_the_rmse_of_all_their_numbers():
    torch.manual_seed(0)
    truth, heard = torch.rand(8) * 100, []
    truth[5:7] = torch.nan  # the ranks know four numbers and two
    made = (truth.nan_to_num() + torch.randn(8)).requires_grad_()
    run_ranks(shared_rmse, (truth, made.detach()), 2, heard.append, timeout_s=60)
    loss = number_loss(made, truth, "rmse")
    loss.backward()
    ((losses, gradient),) = heard
    assert losses == pytest.approx([loss.item()] * 2) and gradient == pytest.approx(made.grad.tolist())


def test_contestants_learn_the_number_of_a_tile_from_all_its_tokens(tmp_path):
    draw, scenes = np.random.default_rng(0), {}
    for k in range(24):
        cover = draw.uniform(0, 100)
        vv = (draw.normal(-20, 1, (32, 32)) + cover / 10).astype(np.float32)
        labels = {"tree_cover": (np.float32(cover), COVER.target)}
        scenes[f"t{k:02d}"] = make_scene({"vv": vv, "vh": vv - 7}, units="dB", quantity="gamma0", labels=labels)
    store = write_store(scenes, tmp_path / "s.zarr", size=32, progress=False)
    parts = pd.Series(["train"] * 16 + ["test"] * 8)
    contract = InputContract.fit(store, np.arange(16), 8, crop_px=32)
    trials = Trials(
        tmp_path, store, parts, contract, {"tree_cover": COVER}, Bodies(2), Head(tile="tokens", tile_elu=True),
        Recipe(steps=60, batch_size=8, rate=1e-3, warmup=0, floor=1), Crops(symmetries=False), Scoring(unit="patch"),
        device="cpu",
    )  # fmt: skip
    for who, kind in {"scratch": "TokensHead", "unet_starter": "MeanHead", "rcf": "MeanHead"}.items():
        model = trials.model(Cell(who, 1.0, 0, 1e-3))
        assert type(model.classify["tree_cover"]).__name__ == kind
    table = trials.run(Cell("scratch", 1.0, 0, 1e-3))
    means = batch_means(table, {"tree_cover": COVER}, 4).set_index("score")
    pooled = COVER.scores(np.stack(table["sums"].tolist()).sum(0))
    assert pooled["rmse"] < 12 and pooled["r2"] > 0.7  # a guess of the middle misses by 29
    assert means.loc["rmse", "batches"] == 2 and means.loc["rmse", "value"] <= pooled["rmse"] + 1e-9
