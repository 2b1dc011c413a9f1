"""Simulated scenes: the same for a seed, true to what was asked, near the real statistics, and usable downstream."""

import inspect
import json

import numpy as np
import pytest
import torch
import xarray as xr

from sarfm.ice.sea_ice import simulate_ice
from sarfm.models.mae import MAE
from sarfm.models.vit import Encoder
from sarfm.patches.contract import InputContract
from sarfm.patches.loading import CropDataset, Crops
from sarfm.patches.prepare import restore, write_store
from sarfm.sar import to_power
from sarfm.scenes.open import open_scene, save_scene
from sarfm.scenes.scene import check_scene, flag_meanings
from sarfm.scenes.simulate import EW, IW, noise_pattern, observe, product_speckle, simulate_flood, simulate_season

KINDS = {"ice": simulate_ice, "season": simulate_season, "flood": simulate_flood}


def looks_of(power, size=9):
    """Estimate looks in windows of power: mean squared over variance, one number per window."""
    h, w = (n // size * size for n in power.shape)
    cut = power[:h, :w].reshape(h // size, size, w // size, size).transpose(0, 2, 1, 3).reshape(-1, size * size)
    return cut.mean(1) ** 2 / cut.var(1, ddof=1)


def level(values):
    """Average in power, dB."""
    return float(10 * np.log10(np.mean(10 ** (np.asarray(values, float) / 10))))


# ---- the same for a seed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_bits_and_another_seed_other_ones(kind):
    first, again, other = (KINDS[kind]((70, 51), seed=s) for s in (3, 3, 4))
    for name in first.variables:
        assert first[name].to_numpy().tobytes() == again[name].to_numpy().tobytes(), name
    band = next(iter(first.data_vars))
    assert not np.isclose(first[band], other[band]).mean() > 0.01
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    KINDS[kind]((20, 20), seed=3)
    assert (np.random.get_state()[1] == state).all(), "the global generator was used"  # noqa: NPY002


# ---- Scenes, labelled simulated ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (1, 40), (33, 1), (47, 90)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_is_a_valid_scene_labelled_simulated(kind, shape):
    scene = check_scene(KINDS[kind](shape, seed=1))
    assert (scene.sizes["y"], scene.sizes["x"]) == shape and bool(scene.valid.all())
    assert scene.attrs["simulated"].startswith("yes") and "imulated" in scene.attrs["attribution"]
    assert scene.title.startswith("Simulated") and scene.sensor.startswith("simulated")
    held = json.loads(scene.attrs["parameters"])
    assert held["seed"] == 1 and set(held) == set(inspect.signature(KINDS[kind]).parameters) - {"crs"}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_opened_it_is_the_same_and_still_says_simulated(kind, tmp_path):
    scene = KINDS[kind]((40, 40), seed=1, crs="EPSG:3413")
    again = open_scene(save_scene(scene, tmp_path / "s.nc"))
    assert again.attrs["simulated"] == scene.attrs["simulated"] and again.sar.spacing_m == scene.attrs["spacing_m"]
    for name in scene.data_vars:
        np.testing.assert_array_equal(again[name], scene[name], err_msg=name)


# ---- the truth is what was asked for -------------------------------------------------------------------------------


@pytest.mark.parametrize("concentration, open_water, leads", [(0.6, 0.3, 0.0), (0.95, 0.0, 0.05), (1.0, 0.5, 0.02)])
def test_ice_covers_the_fractions_asked_for(concentration, open_water, leads):
    asked = dict(concentration=concentration, open_water=open_water, lead_fraction=leads, floe_diameter_m=(300, 3000))
    scene = simulate_ice((200, 180), seed=2, **asked)
    share = {n: float((scene.ice_class == c).mean()) for c, n in flag_meanings(scene.ice_class).items()}
    ice = (1 - open_water) * concentration
    assert abs(share["open water"] - (1 - ice)) < 1e-3
    assert abs(share["lead"] - leads * ice) < 1e-3
    assert ((scene.floe > 0) == scene.ice_class.isin((2, 3, 4))).all()


@pytest.mark.parametrize("multi_year", [0.0, 0.3, 1.0])
def test_old_ice_is_the_fraction_of_floes_asked_for(multi_year):
    scene = simulate_ice((300, 300), seed=5, multi_year=multi_year, floe_diameter_m=(300, 900), ridge_fraction=0.0)
    first, old = (len(np.unique(scene.floe.values[scene.ice_class.values == c])) for c in (2, 3))
    assert abs(old / (first + old) - multi_year) < 0.06


@pytest.mark.parametrize("flooded", [0.0, 0.1, 0.5])
def test_flood_covers_the_fraction_of_the_land_asked_for(flooded):
    scene = simulate_flood((150, 160), seed=1, flooded=flooded)
    land = scene.flood != 2
    assert abs(float((scene.flood == 1).sum() / land.sum()) - flooded) < 1e-3
    assert ((scene.flood == 2) == (scene.cover == 0)).all(), "permanent water is water in the cover"


def test_land_cover_follows_the_fractions_over_many_parcels():
    scene = simulate_season((400, 400), seed=2, dates=1, spacing_m=20.0, forest=0.3, built_up=0.1)
    for code, asked in ((1, 0.3), (2, 0.1)):
        assert abs(float((scene.cover == code).mean()) - asked) < 0.05


def test_parcels_reach_the_corners():
    cover = simulate_season((500, 500), seed=0, dates=1, spacing_m=20.0, forest=0.0, built_up=0.0).cover.values
    corners = [cover[r, c] for r in (slice(60), slice(-60, None)) for c in (slice(60), slice(-60, None))]
    changes = [float((c[1:] != c[:-1]).mean()) for c in (*corners, cover)]
    assert min(changes[:4]) > 0.5 * changes[4], changes


# ---- the physics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sensor, spacing_m", [(EW, 20.0), (EW, 40.0), (EW, 80.0), (IW, 10.0), (IW, 30.0)])
def test_looks_and_correlation_are_those_of_the_averaged_product(sensor, spacing_m):
    looks, correlation_px = product_speckle(sensor, spacing_m)
    power = 10 ** (observe(np.zeros((700, 700)), np.random.default_rng(0), looks, correlation_px, 0.5) / 10)
    next_to = np.corrcoef(power[:, 1:].ravel(), power[:, :-1].ravel())[0, 1]
    assert abs(power.mean() - 1) < 0.01 and abs(1 / power.var() / looks - 1) < 0.05
    assert abs(next_to - np.exp(-1 / correlation_px**2)) < 0.03
    if spacing_m <= sensor.spacing_m:  # finer than the product: the same speckle, only sampled more densely
        assert looks == sensor.looks and abs(correlation_px * spacing_m - sensor.correlation_m) < 1e-6


def test_noise_adds_in_power_and_speckles_with_the_signal():
    noisy = observe(np.full((400, 400), -30.0), np.random.default_rng(0), 10.0, 1.0, 1.0, nesz_db=-30.0)
    assert abs(level(noisy) + 30 - 10 * np.log10(2)) < 0.05
    power = 10 ** (noisy / 10)
    assert abs(power.mean() ** 2 / power.var() / 10 - 1) < 0.05


def test_scene_noise_is_the_one_stated_and_changes_nothing_but_the_power():
    asked = dict(shape=(128, 400), seed=0, open_water=1.0, wind_speed=4.0, incidence_deg=(20, 46))
    quiet, noisy = (simulate_ice(nesz_db=n, **asked) for n in (None, -26.0))
    assert "nesz" not in quiet and abs(float(noisy.nesz.mean()) + 26) < 1.5
    xr.testing.assert_equal(quiet.ice_class, noisy.ice_class)
    for name in ("hh", "hv"):
        sums = to_power(quiet[name].values, "dB").mean() + to_power(noisy.nesz.values, "dB").mean()
        assert abs(level(noisy[name]) - 10 * np.log10(sums)) < 0.2, name
    assert float((noisy.hv - quiet.hv).median()) > 3 > float((noisy.hh - quiet.hh)[:, :150].median())


def test_noise_pattern_has_five_swaths_and_none_when_flat():
    angle = np.linspace(19, 47, 1000)
    assert np.ptp(noise_pattern(angle, np.zeros(3), 0.0)) == 0
    line = noise_pattern(angle, np.zeros(1), 1.5)[0]
    assert ((np.diff(np.sign(np.diff(line))) > 0) & (np.diff(line)[1:] < 0.1)).sum() == 5, "a minimum in each sub-swath"
    assert line[angle < 27].mean() > line[angle > 29].mean()


@pytest.mark.parametrize("surface, slope_db", [("water", -0.73), ("ice", -0.235)])
def test_backscatter_falls_off_with_the_incidence_angle(surface, slope_db):
    kind = dict(open_water=1.0) if surface == "water" else dict(multi_year=0.0, concentration=1.0, lead_fraction=0.0)
    scene = simulate_ice((300, 400), seed=1, incidence_deg=(20, 46), spacing_m=200.0, ridge_fraction=0.0, **kind)
    columns = [level(scene.hh.values[:, c : c + 20]) for c in range(0, 400, 20)]
    slope = np.polyfit(scene.incidence_angle.values[0, 10::20], columns, 1)[0]
    assert abs(slope - slope_db) < 0.1


def test_wind_brightens_water_and_leaves_ice():
    calm, windy = (simulate_ice((200, 200), seed=1, open_water=0.5, wind_speed=w) for w in (4, 12))
    rise = windy.hh - calm.hh
    water, ice = (float(rise.where(calm.ice_class.isin(codes)).median()) for codes in ((0,), (3,)))
    assert 4 < water < 9 and abs(ice) < 0.3


def test_classes_come_in_order_and_floods_darken_fields_but_not_forest():
    ice = simulate_ice((256, 256), seed=1, lead_fraction=0.06)
    hh = [level(ice.hh.values[ice.ice_class.values == c]) for c in (1, 2, 3, 4)]
    assert hh == sorted(hh)
    flood = simulate_flood((256, 256), seed=3, forest=0.4, flooded=0.3)
    change = (flood.vv[1] - flood.vv[0]).values
    of = lambda state, *codes: float(
        np.mean(change[(flood.flood.values == state) & np.isin(flood.cover.values, codes)])
    )
    assert of(1, 3, 4, 5) < -6 and of(1, 1) > 1 and abs(of(0, 3, 4, 5)) < 2 and abs(of(0, 1)) < 1


# ---- near the real ones --------------------------------------------------------------------------------------------

# 10th and 90th percentile over the real patches, as measured on the page "What the simulator gets right"
REAL_LAND = {"vv": (-11.3, -7.0), "vh": (-18.2, -13.5), "offset": (-7.6, -5.2), "looks": (2.9, 5.3)}


def land_statistics(vv, vh):
    """Measure what the simulator is held to."""
    looks = float(np.median(looks_of(10 ** (np.asarray(vv, float) / 10))))
    return {"vv": level(vv), "vh": level(vh), "offset": level(vh) - level(vv), "looks": looks}


def simulated_land(number=6):
    made = lambda k: simulate_season((120, 120), k, dates=3, forest=0.1 + 0.7 * k / number, built_up=0.05)
    return [land_statistics(s.vv.values[m], s.vh.values[m]) for s in map(made, range(number)) for m in range(3)]


def test_land_has_the_statistics_that_were_measured_in_real_patches():
    found = simulated_land()
    for name, (low, high) in REAL_LAND.items():
        assert low <= np.median([f[name] for f in found]) <= high, name


def test_land_stays_within_a_tolerance_of_real_patches(shared):
    folder = shared / "multilabel/bigearthnet_s1"
    listed = json.loads((folder / "labels.json").read_text())
    listed = [e["file"] for e in listed if e["file"].startswith("S1") and "Marine waters" not in e["labels"]]
    told = dict(channels=("vv", "vh"), units="dB", quantity="sigma0", nodata="none", bands="channel")
    real = [open_scene(folder / name, **told) for name in listed[::3]]
    real, simulated = [land_statistics(s.vv.values, s.vh.values) for s in real], simulated_land()
    for name, tolerance in {"vv": 2.0, "vh": 2.0, "offset": 1.5, "looks": 1.5}.items():
        medians = [np.median([s[name] for s in kind]) for kind in (simulated, real)]
        assert abs(medians[0] - medians[1]) < tolerance, (name, medians)


def test_ice_speckle_and_levels_stay_within_a_tolerance_of_real_patches(shared):
    with xr.open_dataset(shared / "sea_ice/ai4arctic_patches/train_04.nc") as data:  # all ice
        observed = (data.ICE_BINARY != 255).values
        hh, hv = 5.6597 * data.nersc_sar_primary.values - 14.508, 4.7468 * data.nersc_sar_secondary.values - 24.701
    scenes = [simulate_ice((224, 224), k, spacing_m=80.0, noise_pattern_db=0.0, multi_year=0.8) for k in range(3)]
    for name, actual, top in (("hh", hh, -8.85), ("hv", hv, -19.95)):  # the real patch is cut off above
        values = np.concatenate([np.minimum(s[name].values, top).ravel() for s in scenes])
        assert abs(np.median(values) - np.median(actual[observed])) < 2, name
        looks = [np.percentile(looks_of(10 ** (z / 10)), 90) for z in (scenes[0][name].values, actual[3:-3, 3:-3])]
        assert 0.5 < looks[0] / looks[1] < 2, (name, looks)


# ---- what can't be drawn -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, asked, words",
    [
        ("ice", dict(concentration=90), "fractions between 0 and 1, got {'concentration': 90}; 90 % is 0.9"),
        ("ice", dict(lead_fraction=-0.1), "'lead_fraction': -0.1"),
        ("ice", dict(ridge_fraction=float("nan")), "'ridge_fraction': nan"),
        ("ice", dict(shape=(0, 5)), "shape=(rows, columns), whole numbers of at least 1, got (0, 5)"),
        ("ice", dict(shape=(64.5, 64)), "whole numbers"),
        ("ice", dict(shape=256), "expected shape=(rows, columns)"),
        ("ice", dict(spacing_m=0), "numbers above 0, got {'spacing_m': 0}"),
        ("ice", dict(looks=-1), "'looks': -1"),
        ("ice", dict(wind_speed=0), "'wind_speed': 0"),
        ("ice", dict(floe_diameter_m=(8000, 500)), "(smallest, largest) in metres, got (8000, 500)"),
        ("ice", dict(incidence_deg=95), "between 0° and 90°, got 95"),
        ("season", dict(dates=0), "'dates': 0"),
        ("season", dict(forest=20), "'forest': 20"),
        ("season", dict(forest=0.7, built_up=0.6), "forest and built_up together at most 1, got 0.7 + 0.6"),
        ("flood", dict(flooded=1.5), "'flooded': 1.5"),
        ("flood", dict(spacing_m=float("inf")), "'spacing_m': inf"),
    ],
    ids=lambda v: v if isinstance(v, str) and len(v) < 8 else "-".join(map(str, v)) if isinstance(v, dict) else "",
)
def test_what_cannot_be_drawn_is_refused_with_what_to_do(kind, asked, words):
    with pytest.raises(ValueError) as error:
        KINDS[kind](**asked)
    assert str(error.value).startswith("expected") and words in str(error.value)


# ---- downstream ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, label", [("ice", "ice_class"), ("season", "cover"), ("flood", "flood")])
def test_a_simulated_scene_is_cut_restored_and_trained_on(kind, label, tmp_path):
    scenes = {f"s{k}": KINDS[kind]((64, 96), seed=k, **({"dates": 2} if kind == "season" else {})) for k in range(2)}
    store = write_store(scenes, tmp_path / "s.zarr", size=32, targets=[label], progress=False, shard_mb=1)
    assert len(store) == 12 and len(store.verify()) == 0
    again = restore(store, "s1")
    assert again.attrs["simulated"] == scenes["s1"].attrs["simulated"]
    np.testing.assert_array_equal(again[label], scenes["s1"][label])
    contract = InputContract.fit(store, range(len(store)), patch_size=8)
    crops = CropDataset(store, range(len(store)), contract, Crops(32), [label], augment=False)
    batch = torch.utils.data.default_collate([crops[k] for k in range(4)])
    torch.manual_seed(0)
    model = MAE(Encoder(batch["image"].shape[1], 8, 16, 1, 2), 16, 1, 2)
    batch = model.draw(batch, torch.Generator().manual_seed(0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss, _ = model.loss(batch)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
