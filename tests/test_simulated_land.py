"""Simulated seasonal land: the same for a seed, labels true to the pixels, regions apart, and through a store to lists of tiles."""

import numpy as np
import pytest
import yaml
from scipy import special

from sarfm.datasets.catalog import open_dataset
from sarfm.io.files import carried
from sarfm.land.simulated import (
    COVERS,
    FOREST,
    OUTSIDE,
    PRETRAINING,
    REGIONS,
    SEASONS,
    SUMMER,
    WORLDCOVER,
    median_speckle,
    season_medians,
    shifted,
    simulate_place,
)
from sarfm.land.simulated_files import simulate_dataset
from sarfm.patches.contract import InputContract
from sarfm.patches.prepare import Cut
from sarfm.patches.splits import Split, lists_of
from sarfm.scenes.open import open_scene
from sarfm.scenes.scene import channels_of, check_scene, scene_lonlat, spacing_m, targets_of

SMALL = {"with": "land", "pretrain": 4, "train": 3, "val": 1, "test": 2, "size_px": 48, "seed": 0}


@pytest.fixture(scope="module", params=REGIONS)
def tiles(request):
    """Draw twelve tiles of each region."""
    return [simulate_place(k, 64, region=request.param) for k in range(12)]


def test_a_tile_is_a_scene_of_twelve_channels_and_five_targets(tiles):
    scene = check_scene(tiles[0])
    assert [str(c) for c in channels_of(scene)] == [f"{n}@{s}" for s in SEASONS for n in ("vv", "vh", "ratio")]
    assert {(c.variable, c.units, c.quantity) for c in channels_of(scene)} == {
        ("vv", "dB", "sigma0"),
        ("vh", "dB", "sigma0"),
        ("ratio", "dB", "ratio"),
    }
    held = targets_of(scene)
    assert {n: (t.kind, t.of, t.units) for n, t in held.items()} == {
        "tree_cover": ("number", "pixel", "%"),
        "tree_cover_mean": ("number", "tile", "%"),
        "land_cover": ("classes", "pixel", ""),
        "biomass": ("number", "pixel", "Mg/ha"),
        "built": ("number", "pixel", "1"),
    }
    assert held["land_cover"].codes == [10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100] == list(WORLDCOVER)
    assert scene.valid.values.all() and spacing_m(scene) == 10.0 and scene.attrs["simulated"].startswith("yes")


def test_labels_are_true_to_each_other(tiles):
    for scene in tiles:
        trees, cover = scene.tree_cover.values, scene.land_cover.values
        assert np.array_equal(cover == 10, trees >= 10), "WorldCover says tree cover from 10 % on"
        assert np.array_equal(scene.built.values > 0, cover == 50)
        assert float(scene.tree_cover_mean) == pytest.approx(trees.mean(), abs=1e-4)
        assert (trees[cover == 80] == 0).all() and (scene.biomass.values[cover == 80] == 0).all()
        assert 0 <= trees.min() and trees.max() <= 100 and 0 <= scene.built.min() and scene.built.max() <= 1


def test_the_ratio_is_what_is_seen(tiles):
    for scene in tiles:
        assert np.allclose(scene.ratio, scene.vv - scene.vh, atol=1e-5)
        assert -35 < scene.vh.min() and scene.vv.max() < 10


def test_a_seed_is_a_tile():
    one, again, other = simulate_place(5, 48), simulate_place(5, 48), simulate_place(6, 48)
    assert one.identical(again) and not np.array_equal(one.vv, other.vv)
    assert not np.array_equal(one.vv, simulate_place(5, 48, region="china").vv)


def test_tiles_lie_in_their_region_and_nowhere_twice():
    from pyproj import CRS

    for name, region in REGIONS.items():
        corners = set()
        for number in range(40):
            scene = simulate_place(number, 8, region=name)
            lon, lat = (v.mean() for v in scene_lonlat(scene))
            assert region.lon[0] - 0.01 < lon < region.lon[1] + 0.01 and region.lat[0] < lat < region.lat[1] + 0.01
            zone = CRS.from_wkt(scene.spatial_ref.attrs["crs_wkt"]).to_epsg()
            assert zone == (32600 if lat > 0 else 32700) + int((lon + 180) // 6) + 1
            assert (scene.x.values - 5) % 10 == pytest.approx(0) and (scene.y.values - 5) % 10 == pytest.approx(0)
            corners.add((zone, float(scene.x[0]), float(scene.y[0])))
        assert len(corners) == 40


def test_what_went_in_comes_out():
    """The level of closed forest and of bare soil, from the table to the picture."""
    scenes = [simulate_place(k, 96, looks=1000.0) for k in range(40)]
    dense = np.concatenate([s.vh.values[:, s.tree_cover.values > 90].T for s in scenes])
    canopy = season_medians(np.array([FOREST]), np.zeros(1))[1, :, 0]
    assert len(dense) > 5000 and np.allclose(np.median(dense, 0), canopy, atol=1.0)


def test_the_year_is_half_a_year_late_in_the_south():
    north, south = (season_medians(np.array([SUMMER]), np.array([late])) for late in (0.0, 182.5))
    assert np.allclose(north[..., 0], np.roll(south[..., 0], 2, axis=1))
    assert north[1, :, 0].argmax() == 2, "summer crops are brightest in VH in summer"


def test_median_of_dates_is_drawn_exactly():
    many = np.median(np.random.default_rng(0).gamma(2.0, 0.5, (7, 200_000)), axis=0)
    drawn = median_speckle((400, 500), np.random.default_rng(1), 2.0, dates=7)
    share = [0.01, 0.1, 0.5, 0.9, 0.99]
    assert np.allclose(np.quantile(drawn, share), np.quantile(many, share), rtol=0.012)
    single = median_speckle((400, 500), np.random.default_rng(1), 4.0, dates=1)
    assert np.quantile(single, 0.3) == pytest.approx(special.gammaincinv(4.0, 0.3) / 4.0, rel=0.01)


def test_shift_is_a_distance_from_europe():
    europe, outside = REGIONS["europe"], REGIONS[OUTSIDE]
    assert shifted(outside, 0.0)[2:] == shifted(europe, 1.0)[2:] and shifted(outside, 1.0).shares == outside.shares
    assert shifted(outside, 0.25).late_days == pytest.approx(0.25 * outside.late_days)
    near, far = (simulate_place(2, 48, region=OUTSIDE, shift=s) for s in (0.1, 1.0))
    assert np.array_equal(near.x, far.x) and not np.array_equal(near.vh, far.vh)
    assert simulate_place(2, 48).equals(simulate_place(2, 48, shift=0.3)), "Europe is no distance from Europe"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"region": "mars"}, "expected a region of"),
        ({"shift": 1.5}, "shift"),
        ({"dates": 12}, "odd number of dates"),
        ({"size_px": 0}, "whole numbers of at least 1"),
        ({"looks": -1.0}, "numbers above 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        simulate_place(**{"size_px": 16} | given)


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    """Write a small copy of the catalogue's entry."""
    stated = yaml.safe_load((carried("data_catalogs") / "land_simulated.yaml").read_text())
    path = tmp_path_factory.mktemp("land") / "land_simulated.yaml"
    path.write_text(yaml.safe_dump(stated | {"simulate": SMALL}))
    return path


def test_the_entry_is_what_is_written(entry):
    scenes = open_dataset(entry)
    assert len(scenes) == 4 * 3 + 2 * (3 + 1 + 2)
    scene = scenes["south_america/00003"]
    drawn = simulate_place(3, 48, region=OUTSIDE)
    assert np.allclose(scene.vv, drawn.vv, atol=0.006) and np.array_equal(scene.land_cover, drawn.land_cover)
    assert float(scene.tree_cover_mean) == pytest.approx(float(drawn.tree_cover_mean))


def test_a_saved_tile_is_read_once(entry, monkeypatch):
    def again(*given, **more):
        raise AssertionError("its targets are in the scene already")

    monkeypatch.setattr("sarfm.scenes.open.read_target", again)
    assert set(targets_of(open_dataset(entry)["europe/00000"])) == set(targets_of(simulate_place(0, 48)))


def test_lists_divide_the_tiles(entry, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(entry.parent / "stores"))
    store = Cut(dataset=str(entry), patch_px=48, targets=("tree_cover", "tree_cover_mean", "land_cover")).store()
    lists = lists_of(store)
    assert len(lists["pretrain"]) == 4 * 3 + 3 and not any(name.startswith(OUTSIDE) for name in lists["pretrain"])
    assert {name.split("/")[0] for name in lists["pretrain"]} == set(PRETRAINING)
    for region in ("europe", OUTSIDE):
        split = Split("list", train_list=f"{region}_train", val_list=f"{region}_val", test_list=f"{region}_test")
        assert split.parts(store).value_counts().to_dict() == {"": 18, "train": 3, "test": 2, "val": 1}
    assert Split().parts(store).value_counts().to_dict() == {"": 18, "train": 3, "test": 2, "val": 1}
    with pytest.raises(ValueError, match="no list 'mars_val'"):
        Split("list", train_list="pretrain", val_list="mars_val").parts(store)


def test_patches_of_scenes_with_slashes_know_where_they_lie(entry, monkeypatch):
    from sarfm.evaluation.contestants import HEAD, choose_tasks
    from sarfm.evaluation.counting import Scoring, count_held_out
    from sarfm.models.kinds import build_encoder

    monkeypatch.setenv("SARFM_DATA", str(entry.parent / "stores"))
    store = Cut(dataset=str(entry), patch_px=48, targets=("tree_cover", "tree_cover_mean", "land_cover")).store()
    parts = Split().parts(store)
    contract = InputContract.fit(store, np.flatnonzero(parts == "train"), 8, crop_px=48)
    model = HEAD.on(build_encoder("vit-nano", 12, 8), choose_tasks(store, {"tree_cover_mean": "number"})).eval()
    counted = count_held_out(model, contract, store, parts, Scoring(unit="patch"))
    assert sorted(counted["place"]) == ["europe/00008", "europe/00009"] and set(counted["factor"]) == {1}


def test_the_region_outside_can_be_as_europe(tmp_path):
    made = simulate_dataset(tmp_path, pretrain=0, train=1, val=0, test=0, size_px=16, shift=0.0, progress=False)
    assert [path.parent.name for path in made] == ["europe", OUTSIDE]
    drawn = simulate_place(0, 16, region=OUTSIDE, shift=0.0)
    assert np.array_equal(open_scene(made[1]).tree_cover, drawn.tree_cover)
    with pytest.raises(ValueError, match="numbers of tiles"):
        simulate_dataset(tmp_path, pretrain=-1, progress=False)


def test_covers_are_coded_as_worldcover():
    assert {kind.code for kind in COVERS} <= set(WORLDCOVER)
    assert all(len(kind.vv_db) == len(kind.vh_db) == 12 for kind in COVERS)
