"""What methods ask of pixels: weights and targets against plain NumPy, holes, other dates, one group of settings."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from sarfm.datasets.catalog import open_dataset
from sarfm.evaluation.pictures import makes_pictures
from sarfm.models.kinds import build, build_encoder, build_method, describe
from sarfm.models.pixel_targets import gradient_by_ratio, local_mean, log_ratio, multilook, to_power
from sarfm.models.pixel_weights import PixelLoss, backscatter_weights, lee_filter
from sarfm.models.tokens import patchify
from sarfm.patches.contract import InputContract
from sarfm.patches.loading import CropDataset, Crops
from sarfm.patches.prepare import write_store
from sarfm.runs.parameters import check_parameters

# ---- plain formulations ----------------------------------------------------------------------------------------------

E = math.e
DB = np.array([[[[-20.0, -10], [-15, 0]], [[-12, -6], [-9, -3]]]])  # VH, VV
MEAN, STD = np.array([-19.1966, -12.5144])[:, None, None], np.array([5.4501, 5.0019])[:, None, None]
PUBLISHED = {  # §6.2 of the specification, from the released code
    ("per_channel", "db"): [[[E, 2.482065], [2.659555, 1.000001]], [[E, 1.769425], [2.355278, 1.000002]]],
    ("shared_power", "db"): [[[E, 2.237300], [2.562252, 1.000001]]] * 2,
    ("per_channel", "zscore"): [[[E, 1.829565], [2.277027, 1.000001]], [[E, 1.462690], [2.037047, 1.000002]]],
}


def plain_weights(x, maps, scale=1.0, valid=None):
    """Weigh image by image and map by map, over observed pixels only."""
    found = np.ones_like(x)
    valid = np.ones_like(x[:, 0], bool) if valid is None else valid
    for image, out, seen in zip(x, found, valid, strict=True):
        power = 10 ** (np.where(seen, image, 0) / 10)
        if maps == "shared_power":
            power = np.repeat(power.mean(0, keepdims=True), len(power), 0)
        each = []
        for p in power:
            low, high = p[seen].min(), p[seen].max()
            each.append(np.exp(scale * (1 - (p - low) / (high - low + 1e-6))))
        each = np.mean(each, 0, keepdims=True) if maps == "shared_weight" else np.array(each)
        out[:] = np.where(seen, each, 1.0)
    return found


def around(k, reach, length):
    """Give the places within reach of a place."""
    return slice(max(0, k - reach), min(length, k + reach + 1))


def plain_means(power, seen, window):
    """Average the observed pixels of each window, pixel by pixel."""
    found = np.zeros_like(power)
    (height, width), reach = power.shape[-2:], window // 2
    for y, x in np.ndindex(height, width):
        place = around(y, reach, height), around(x, reach, width)
        some = seen[place]
        found[..., y, x] = power[(..., *place)][..., some].mean(-1) if some.any() else 0
    return found


def plain_gradient(db, seen, window):
    """Compare the two sides of each pixel, pixel by pixel."""
    reach, (height, width) = window // 2, db.shape[-2:]
    power, found, known = 10 ** (db / 10), np.zeros_like(db), np.zeros(seen.shape, bool)
    for y, x in np.ndindex(height, width):
        rows, cols = around(y, reach, height), around(x, reach, width)
        left, right = slice(max(0, x - reach), x), slice(x + 1, x + reach + 1)
        above, below = slice(max(0, y - reach), y), slice(y + 1, y + reach + 1)
        sides = [(rows, left), (rows, right), (above, cols), (below, cols)]
        if seen[y, x] and all(seen[s].any() for s in sides):
            means = [10 * np.log10(power[(..., *s)][..., seen[s]].mean(-1)) for s in sides]
            found[..., y, x] = np.hypot(means[0] - means[1], means[2] - means[3])
            known[y, x] = True
    return found, known


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maps, domain", PUBLISHED)
def test_weights_are_the_published_ones(maps, domain, dtype):
    z = torch.tensor((DB - MEAN) / STD, dtype=dtype)
    asked = PixelLoss(weights=maps, weight_domain=domain)
    level = z if domain == "zscore" else torch.tensor(DB, dtype=dtype)
    assert np.allclose(asked.weigh(level)[0], PUBLISHED[maps, domain], atol=1e-6)
    assert (
        PixelLoss(weights=maps, weight_domain=domain)
        .weigh(level[..., :1, :1].expand(-1, -1, 3, 3))
        .allclose(torch.tensor(E, dtype=dtype))
    ), "no contrast: e everywhere"


def test_the_readme_s_shared_map_is_the_mean_of_both_weights():
    both = np.array(PUBLISHED["per_channel", "db"])
    found = backscatter_weights(torch.tensor(DB), maps="shared_weight")[0]
    assert np.allclose(found, both.mean(0, keepdims=True).repeat(2, 0), atol=1e-6)
    assert not np.allclose(found, PUBLISHED["shared_power", "db"], atol=1e-2)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("channels, scale", [(1, 1.0), (2, 0.7), (4, -1.0)])
@pytest.mark.parametrize("maps", ["per_channel", "shared_power", "shared_weight"])
def test_weights_are_those_of_a_plain_formulation(maps, channels, scale, holes):
    rng = np.random.default_rng(0)
    x = rng.normal(-15, 5, (3, channels, 24, 17))
    valid = rng.random((3, 24, 17)) > 0.3 if holes else None
    given = torch.tensor(np.where(valid[:, None], x, np.nan) if holes else x)
    for level in (given, (given + 15) / 5):  # decibels, and normalised
        expected = plain_weights(level.numpy(), maps, scale, valid)
        found = backscatter_weights(level, None if valid is None else torch.tensor(valid), maps, scale)
        assert np.allclose(found, expected, atol=1e-9)
        assert np.allclose(backscatter_weights(level.float(), None if valid is None else torch.tensor(valid), maps, scale), expected, atol=5e-6)  # fmt: skip


def test_dark_weighs_most_or_bright_does():
    db = torch.tensor(DB)
    dark, bright = backscatter_weights(db), backscatter_weights(db, scale=-1.0)
    assert dark[0, 0].argmax() == db[0, 0].argmin() and abs(dark.max() / dark.min() - E) < 1e-4
    assert torch.allclose(bright, 1 / dark) and bright[0, 0].argmax() == db[0, 0].argmax()


def test_lee_s_filter_keeps_edges_and_averages_speckle():
    rng = np.random.default_rng(1)
    power = np.where(np.arange(40) < 20, 0.01, 1.0) * rng.gamma(4, 1 / 4, (1, 1, 30, 40))
    seen = rng.random((30, 40)) > 0.1
    mean = plain_means(power, seen, 5)
    variance = plain_means(power**2, seen, 5) - mean**2
    share = np.clip((variance - mean**2 / 4) / (variance * 1.25), 0, 1)
    given = torch.tensor(power), torch.tensor(seen)[None, None]
    found = lee_filter(*given, 5, 4).numpy()
    assert np.allclose(found, mean + share * (power - mean), atol=1e-9)
    error = lambda x: np.abs(np.log(x / np.where(np.arange(40) < 20, 0.01, 1.0)))[..., 18:20][
        :, :, seen[:, 18:20]
    ].mean()
    assert error(found) < 0.7 * error(local_mean(*given, 5).numpy()), "the dark side of the edge stays dark"
    inside = (slice(None), slice(None), slice(None), slice(25, 38))
    assert found[inside].std() < 0.6 * power[inside].std()


# ---- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [3, 5, 7])
def test_targets_are_those_of_plain_formulations(window):
    rng = np.random.default_rng(2)
    db, seen = rng.normal(-12, 4, (2, 13, 18)), rng.random((13, 18)) > 0.25
    given = torch.tensor(np.where(seen, db, np.nan))[None], torch.tensor(seen)[None]
    mean = 10 * np.log10(np.maximum(plain_means(10 ** (db / 10), seen, window), 1e-20))
    assert np.allclose(multilook(*given, window)[0].numpy()[:, seen], mean[:, seen], atol=1e-9)
    assert np.allclose(log_ratio(*given, window)[0].numpy()[:, seen], (db - mean)[:, seen], atol=1e-9)
    expected, known = plain_gradient(db, seen, window)
    found, where = gradient_by_ratio(*given, window)
    assert np.array_equal(where[0], known) and 0 < known.sum() < seen.sum()
    assert np.allclose(found[0].numpy()[:, known], expected[:, known], atol=1e-6)


CONTRACT = InputContract(
    channels=["vh", "vv"], quantity="sigma0", units="dB", mean=[-19.0, -12.0], std=[5.0, 4.0], patch_size=8
)


def method(name, **settings):
    torch.manual_seed(0)
    encoder = build_encoder("vit-nano", 2, 8) if name == "mae" else build_encoder("mixmim-nano", 2, 4)
    sizes = dict(decoder_width=64, decoder_depth=1, decoder_heads=4, norm_pix=False)
    model = build_method(name, encoder, {**sizes, **settings})
    model.state_scale(CONTRACT)
    return model


def expected_loss(model, batch, image, valid, weights=None):
    """Average the weighted squared error of what a model predicts, over all that counts, in NumPy."""
    _, parts = model.loss(batch)
    size = model.encoder.stride_px
    take = lambda x: np.stack([patchify(x, size)[k][m].numpy() for k, m in enumerate(parts["masked"])])
    counts = take(valid[:, None].expand_as(image).double())
    target = np.where(counts > 0, take(image.double()), 0)
    error = (parts["prediction"].double().numpy() - target) ** 2 * counts
    return (error * (1 if weights is None else take(weights.double()))).sum() / counts.sum()


@pytest.mark.parametrize("name", ["mae", "mixmae"])
@pytest.mark.parametrize("target", ["pixels", "other_date", "log_ratio", "gradient"])
def test_both_methods_ask_for_the_target_and_weigh_its_errors(name, target):
    rng = torch.Generator().manual_seed(3)
    z = torch.randn(3, 2, 128, 128, generator=rng)
    other, valid = torch.randn(3, 2, 128, 128, generator=rng), torch.rand(3, 128, 128, generator=rng) > 0.2
    seen = torch.rand(3, 128, 128, generator=rng) > 0.3
    mean, std = (torch.tensor(v)[:, None, None] for v in (CONTRACT.mean, CONTRACT.std))
    image, where = (other, seen) if target == "other_date" else (z, valid)
    db, asked, known = image * std + mean, image, where
    if target == "log_ratio":
        asked = log_ratio(db, where) / std
    if target == "gradient":
        asked, known = gradient_by_ratio(db, where)
        asked = asked / std
    model = method(name, target=target, weights="shared_power", weight_window_px=3)
    hidden = lambda x, v: x.masked_fill(~v[:, None], torch.nan)
    batch = {"image": hidden(z, valid), "valid": valid, "other": hidden(other, seen), "other_valid": seen}
    drawn = model.draw(batch, torch.Generator().manual_seed(0))
    weights = backscatter_weights(db, where, "shared_power", window_px=3)
    with torch.no_grad():
        found = model.loss(drawn)[0].item()
        assert math.isclose(found, expected_loss(model, drawn, asked, known, weights), rel_tol=1e-5)
    assert makes_pictures(model) == (target in ("pixels", "other_date"))


def test_other_settings_of_pixels_leave_the_plain_loss_alone():
    model, plain = method("mae", target="pixels", weight_scale=3.0), method("mae")
    drawn = plain.draw({"image": torch.randn(2, 2, 64, 64)}, torch.Generator().manual_seed(0))
    assert model.loss(drawn)[0] == plain.loss(drawn)[0]
    smooth = method("mae", target_window_px=5)
    assert smooth.loss(drawn)[0] != plain.loss(drawn)[0]
    asked, _, _ = smooth.asked(drawn)
    assert asked.std() < 0.5 * drawn["image"].std()


@pytest.mark.parametrize("name", ["mae", "mixmae"])
def test_settings_of_pixels_are_one_group_for_every_method(name):
    given = {f"settings.{field.name}": field.default for field in dataclasses.fields(PixelLoss)}
    checked = check_parameters("pretrain", {"method": name, "encoder": "mixmim-nano" if name == "mixmae" else "vit-nano", **given, "settings.weights": "shared_weight"})  # fmt: skip
    assert checked["settings"]["weights"] == "shared_weight" and checked["settings"]["target"] == "pixels"
    with pytest.raises(ValueError, match="one of none"):
        check_parameters("pretrain", {"method": name, "settings.weights": "shared_avg"})
    model = method(name, target="log_ratio", weights="per_channel", weight_domain="zscore")
    again = build(describe(model))
    assert again.pixels == model.pixels and again.config() == model.config()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"target": "dates"}, "target is one of"),
        ({"target": "gradient", "target_window_px": 1}, "at least 3"),
        ({"target_window_px": 4}, "odd"),
        ({"weight_window_px": 2}, "odd"),
        ({"weight_domain": "power"}, "weight_domain is one of"),
        ({"weight_looks": -1.0}, "at least 0"),
        ({"weight_looks": 4.0}, "window to average in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        PixelLoss(**wrong)


def test_decibels_are_asked_for():
    scale = {"mean": [0.1, 0.1], "std": [1, 1]}
    linear = InputContract(channels=["vh", "vv"], quantity="sigma0", units="1", patch_size=8, **scale)
    for settings in ({"weights": "per_channel"}, {"target": "gradient"}, {"target_window_px": 3}):
        with pytest.raises(ValueError, match="units"):
            method("mae", **settings).state_scale(linear)
    method("mae").state_scale(linear)  # pixels as they are have no unit to ask for
    method("mae", weights="per_channel", weight_domain="zscore").state_scale(linear)  # nor have normalised values
    model = build_method("mae", build_encoder("vit-nano", 2, 8), {"target": "gradient"})
    with pytest.raises(ValueError, match="state_scale"):
        model.loss(model.draw({"image": torch.randn(1, 2, 64, 64)}))
    with pytest.raises(ValueError, match="border"):
        build_method("mae", build_encoder("vit-nano", 2, 8), {"target": "gradient", "missing": 255.0})


# ---- other dates -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dated(tmp_path_factory):
    scene = open_dataset("borneo")["borneo"]
    path = tmp_path_factory.mktemp("dated") / "d.zarr"
    store = write_store({"borneo": scene}, path, size=64, stride=32, dates="scenes", progress=False)
    return store, InputContract.fit(store, range(len(store)), patch_size=8)


def test_an_item_shows_the_same_window_at_another_date(dated):
    store, contract = dated
    crops = CropDataset(store, np.arange(len(store)), contract, Crops(32, other_date=True), seed=5)
    index, seen = store.index, set()
    for k in range(40):
        item, window = crops[k], crops._window(k)
        found = [
            j for j in crops.others(window.patch)
            if torch.equal(crops[k]["other"], torch.from_numpy(turned(contract, store, j, window)))
        ]  # fmt: skip
        assert len(found) == 1 and index["date"][found[0]] != index["date"][window.patch]
        columns = ["place", "factor", "row", "col"]
        assert index.loc[found[0], columns].equals(index.loc[window.patch, columns])
        assert item["other_valid"].shape == (32, 32) and not torch.equal(item["other"], item["image"])
        seen.add(index["date"][found[0]])
    assert len(seen) == 4
    again = CropDataset(store, np.arange(len(store)), contract, Crops(32, other_date=True), seed=5)
    assert torch.equal(again[17]["other"], crops[17]["other"])
    plain = CropDataset(store, np.arange(len(store)), contract, Crops(32), seed=5)
    assert torch.equal(plain[17]["image"], crops[17]["image"]) and "other" not in plain[17]


def turned(contract, store, patch, window):
    """Read a window of another patch, normalised and turned as an item is."""
    from sarfm.patches.loading import augment_square

    image = store.read(patch, window=window.place)
    image = contract.normalise(image, np.ones(image.shape[1:], bool))
    return augment_square(image, window.symmetry).copy()


def test_places_seen_once_are_left_out_or_refused(dated):
    store, contract = dated
    first = np.flatnonzero(store.index["date"] == store.index["date"].min())
    with pytest.raises(ValueError, match="two dates"):
        CropDataset(store, first, contract, Crops(32, other_date=True))
    some = np.concatenate([first, [len(store) - 1]])  # only one place has a second date
    crops = CropDataset(store, some, contract, Crops(32, other_date=True))
    assert len(crops) == 2
    model = method("mae", target="other_date")
    with pytest.raises(ValueError, match=r"crops\.other_date"):
        model.loss(model.draw({"image": torch.randn(1, 2, 64, 64)}))


def test_power_of_nothing_stays_finite():
    power, seen = to_power(torch.full((1, 1, 8, 8), torch.nan), torch.zeros(1, 8, 8, dtype=torch.bool))
    assert power.eq(1).all() and not seen.any() and local_mean(power, seen, 3).eq(0).all()
    assert gradient_by_ratio(torch.full((1, 1, 8, 8), torch.nan), seen[:, 0])[0].eq(0).all()
    assert backscatter_weights(torch.full((1, 1, 8, 8), torch.nan), seen[:, 0]).eq(1).all()
