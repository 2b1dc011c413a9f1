"""What two sets of patches share, found on Earth and within scenes; planted leaks; every shipped split without one."""

import itertools

import numpy as np
import pandas as pd
import pytest
import shapely
from pyproj import Geod, Transformer

from sarfm.patches.footprints import CORNERS, box_footprints, footprints, is_near, near_pairs, pixel_keys
from sarfm.patches.leaks import assert_no_leak, compare_sets, leak_lines, leak_report, leaks_of, seen_line, seen_report
from sarfm.patches.prepare import Cut, write_store
from sarfm.patches.splits import NAMES, Split, make_split, split_by_bands
from sarfm.patches.store import patch_corners
from sarfm.scenes.open import make_scene

GEOD = Geod(ellps="WGS84")
SIDE = 320.0  # of a tile, metres
RNG = np.random.default_rng(5)


def tile(east, north=5_600_000.0, values=None, zone=32631, **attrs):
    """Make a placed tile of 32 px of 10 m."""
    values = RNG.normal(-12, 2, (32, 32)).astype("float32") if values is None else values
    place = {"crs": f"EPSG:{zone}", "transform": (10, 0, east, 0, -10, north)}
    return make_scene({"vv": values}, units="dB", quantity="sigma0", attrs=attrs, **place)


def store_of(tmp_path, scenes, **options):
    """Cut scenes, one patch each unless said otherwise."""
    return write_store(scenes, tmp_path / "s.zarr", **({"size": 32, "progress": False} | options))


def in_a_row(tmp_path, east, **pixels):
    """Nine tiles beside each other: five to learn from, two to tune, two to test."""
    scenes = {f"t{k}": tile(500_000 + x, values=pixels.get(f"t{k}")) for k, x in enumerate(east)}
    return store_of(tmp_path, scenes), pd.Series(["train"] * 5 + ["val"] * 2 + ["test"] * 2)


ROW = [SIDE * k for k in range(9)]


def test_a_row_of_tiles_is_told_as_it_lies(tmp_path):
    store, parts = in_a_row(tmp_path, ROW)
    report = assert_no_leak(store, parts)
    assert report["distance_m"].round(1).tolist() == pytest.approx([2 * SIDE, 0, 0], abs=0.5)
    assert (report[["overlap_m2", "overlapping", "same_pixels", "near", "unplaced"]] == 0).all().all()
    assert report["patches"].tolist() == [5, 5, 2] and report["others"].tolist() == [2, 2, 2]


def test_a_tile_moved_over_another_is_found(tmp_path):
    store, parts = in_a_row(tmp_path, [*ROW[:8], SIDE * 3 + 100])
    found = leak_report(store, parts).loc["train | test"]
    assert found["overlapping"] == 2 and found["overlap_m2"] == pytest.approx(
        SIDE * SIDE, rel=1e-3
    )  # beside both it covers
    assert found["overlap_m"] == pytest.approx(SIDE - 100, rel=1e-3) and (found["patch"], found["other"]) == (3, 8)
    with pytest.raises(ValueError, match=r"train \| test leak: .* 2 pairs share .* patches 3 and 8"):
        assert_no_leak(store, parts)


def test_a_copy_elsewhere_is_found(tmp_path):
    same = RNG.normal(-12, 2, (32, 32)).astype("float32")
    store, parts = in_a_row(tmp_path, [*ROW[:8], 90_000], t1=same, t8=same)
    found = leak_report(store, parts).loc["train | test"]
    assert found["same_pixels"] == 1 and found["overlapping"] == 0 and (found["patch"], found["other"]) == (1, 8)
    with pytest.raises(ValueError, match="1 with the same pixels"):
        assert_no_leak(store, parts)
    nearly = same.copy()
    nearly[0, 0] = np.nextafter(nearly[0, 0], np.float32(0))
    other = tmp_path / "other"
    other.mkdir()
    assert_no_leak(*in_a_row(other, ROW, t1=same, t8=nearly))


def test_constant_tiles_are_no_copies(tmp_path):
    flat = np.full((32, 32), -30, np.float32)
    store, parts = in_a_row(tmp_path, ROW, t1=flat, t8=flat)
    assert (pixel_keys(store) == 0).sum() == 2
    assert_no_leak(store, parts)


def test_a_neighbour_is_too_near_where_a_distance_is_asked_for(tmp_path):
    store, parts = in_a_row(tmp_path, [*ROW[:8], SIDE * 5])  # the last test tile beside the last one learnt from
    parts[5:7] = ""
    assert leak_report(store, parts).loc["train | test", "distance_m"] == pytest.approx(0, abs=1e-3)
    assert_no_leak(store, parts)
    with pytest.raises(ValueError, match="1 pairs too near, where 1 m are asked for"):
        assert_no_leak(store, parts, distance_m=1.0)


def test_dates_of_a_place_and_zones_of_a_projection_are_one_ground(tmp_path):
    onto = Transformer.from_crs(32631, 32632, always_xy=True)
    x, y = onto.transform(799_000, 5_600_000)
    scenes = {"a": tile(799_000), "b": tile(x, y, zone=32632), "c": tile(770_000)}
    store = store_of(tmp_path, scenes)
    found = leak_report(store, pd.Series(["train", "test", "val"]))
    assert found.loc["train | test", "overlap_m2"] == pytest.approx(SIDE**2, rel=0.1)  # turned by some degrees
    assert found.loc["train | val", "distance_m"] == pytest.approx(
        29_000 - SIDE, rel=2e-3
    )  # the zone's scale at its edge


def test_without_a_place_only_the_own_scene_is_known(tmp_path):
    fields = {name: RNG.normal(-12, 2, (64, 96)).astype("float32") for name in "ab"}
    scenes = {
        name: make_scene({"vv": v}, units="dB", quantity="sigma0", attrs={"spacing_m": 10.0})
        for name, v in fields.items()
    }
    store = store_of(tmp_path, scenes, stride=16)
    apart = store.index["scene"].map({"a": "train", "b": "test"})
    found = leak_report(store, apart).loc["train | test"]
    assert np.isnan(found["distance_m"]) and found["unplaced"] == len(store) and found["overlapping"] == 0
    assert "distance unknown" in leak_lines(leak_report(store, apart)) and "without a place" in leak_lines(
        leak_report(store, apart)
    )
    left = store.index["col"].map(lambda c: "train" if c <= 16 else "test" if c >= 64 else "")
    assert assert_no_leak(store, left).loc["train | test", "distance_m"] == 160
    left[(store.index["scene"] == "b") & (store.index["col"] == 32)] = "test"
    found = leak_report(store, left).loc["train | test"]
    assert found["overlapping"] > 0 and found["overlap_m2"] > 0 and found["shared_places"] == 2
    with pytest.raises(ValueError, match="leak"):
        assert_no_leak(store, left)


def test_scales_and_tie_points_have_their_place(tmp_path):
    rows, cols = (v.ravel() for v in np.meshgrid([0, 60, 120], [0, 80, 160], indexing="ij"))
    lon, lat = 10 + cols * 1e-3, 70 - rows * 4e-4
    field = RNG.normal(-12, 2, (120, 160)).astype("float32")
    scene = make_scene({"vv": field}, units="dB", quantity="sigma0", gcps=np.stack([rows, cols, lon, lat], 1))
    store = store_of(tmp_path, {"swath": scene}, size=20, scales=[1, 2])
    found = footprints(store)[list(CORNERS)].to_numpy().reshape(-1, 4, 2)
    assert np.abs(found - np.stack([patch_corners(store, k) for k in range(len(store))])).max() < 1e-6
    by_scale = store.index["factor"].map({1: "train", 2: "test"})
    area = leak_report(store, by_scale).loc["train | test", "overlap_m2"]
    corners = [GEOD.inv(10, 70, 10 + 160e-3, 70)[2], GEOD.inv(10, 70, 10, 70 - 120 * 4e-4)[2]]
    assert area == pytest.approx(corners[0] * corners[1], rel=0.02)  # the coarse patches cover all of the fine ones


def test_pairs_are_those_of_a_search_through_all():
    lon, lat = RNG.uniform(20, 21, 300), RNG.uniform(-33, -32, 300)
    size = RNG.choice([0.01, 0.03, 0.2], 300)
    table = box_footprints(pd.DataFrame({"west": lon, "south": lat, "east": lon + size, "north": lat + size}))
    a, b = table[:200].reset_index(drop=True), table[200:].reset_index(drop=True)
    plane = Transformer.from_crs(4326, "+proj=laea +lat_0=-32.5 +lon_0=20.5 +ellps=WGS84", always_xy=True)
    x, y = plane.transform(*table[list(CORNERS)].to_numpy().reshape(-1, 4, 2).reshape(-1, 2).T)
    shapes = shapely.polygons(np.stack([x, y], -1).reshape(-1, 4, 2))
    every = {(i, j): shapes[i].distance(shapes[200 + j]) for i, j in itertools.product(range(200), range(100))}
    for within in (0.0, 500.0, 20_000.0):
        found = {(i, j): d for block in near_pairs(a, b, within) for i, j, d in zip(*block[:3], strict=True)}
        sure = {pair for pair, d in every.items() if d < within * 0.999}
        assert sure <= set(found) and all(every[pair] <= within * 1.001 + 1 for pair in found)
        assert all(abs(every[pair] - d) <= 1e-3 * d + 0.5 for pair, d in found.items())
        if within:
            near = np.zeros(100, bool)
            near[[j for _, j in found]] = True
            assert np.array_equal(is_near(a, b, within), near)
    assert compare_sets(a, b)["overlapping"] == sum(
        shapes[i].intersection(shapes[200 + j]).area > 1 for i, j in every if every[i, j] == 0
    )


def test_the_date_line_and_far_places_are_no_trap():
    across = pd.DataFrame({"west": [179.9, -179.9], "south": 10.0, "east": [179.95, -179.85], "north": 10.05})
    found = compare_sets(box_footprints(across)[:1], box_footprints(across)[1:])
    assert found["distance_m"] == pytest.approx(GEOD.inv(179.95, 10.05, -179.9, 10.05)[2], rel=1e-3)
    far = pd.DataFrame({"west": [0.0, 90.0, 180.0], "south": 0.0, "east": [0.1, 90.1, 180.1], "north": 0.1})
    table = box_footprints(far)
    assert compare_sets(table[:1], table[1:2])["distance_m"] == pytest.approx(1e7, rel=0.01)
    assert compare_sets(table[:1], table[2:])["distance_m"] == pytest.approx(2e7, rel=0.01)
    assert compare_sets(table[:1], table[2:])["overlapping"] == 0


def test_a_pretraining_that_saw_the_test_is_told(tmp_path):
    store, parts = in_a_row(tmp_path, ROW)
    before = footprints(store, np.flatnonzero(parts == "train"))
    assert "has not seen" in seen_line(seen_report(before, store, parts))
    every = footprints(store, np.arange(9))
    found = seen_report(every, store, parts)
    assert found["same_pixels"].item() == 2 and "has seen test patches, without their labels" in seen_line(found)


def test_other_lengths_and_columns_are_refused(tmp_path):
    store, parts = in_a_row(tmp_path, ROW)
    with pytest.raises(ValueError, match="a part for each of 9 patches, got 3"):
        leak_report(store, parts[:3])
    with pytest.raises(ValueError, match="within_m is a distance"):
        list(near_pairs(footprints(store), footprints(store), -1.0))


@pytest.mark.parametrize("by", ["region x", "region y", "bands"])
def test_the_embedded_sample_is_split_without_a_leak(tmp_path, by):
    store = Cut(patch_px=24, stride_px=8).store(progress=False)
    if by == "bands":
        parts = pd.Series(NAMES).take(np.arange(len(store)) % 3).reset_index(drop=True)
        with pytest.raises(ValueError, match="leak"):  # neighbours dealt out one by one
            assert_no_leak(store, parts)
        return
    assert_no_leak(store, Split(by="region", axis=by[-1]).parts(store))
    assert_no_leak(
        store, make_split(store.index, "region", {"train": 0.5, "val": 0.25, "test": 0.25}, by[-1], 16), 50.0
    )


def test_bands_with_a_buffer_keep_it_on_the_ground(tmp_path):
    east, north = np.meshgrid(SIDE * np.arange(16), SIDE * np.arange(16))
    scenes = {
        f"t{k:03d}": tile(600_000 + x, 5_600_000 + y)
        for k, (x, y) in enumerate(zip(east.ravel(), north.ravel(), strict=True))
    }
    store = store_of(tmp_path, scenes)
    assert leak_report(store, split_by_bands(store.index, 5, 0.4))["distance_m"].min() < 1
    for buffer_m in (100.0, 400.0):
        parts = split_by_bands(store.index, 5, 0.4, buffer_m=buffer_m)
        assert len(leaks_of(leak_report(store, parts, buffer_m))) == 0
    assert len(leaks_of(leak_report(store, split_by_bands(store.index, 5, 0.4), 100.0)))


def test_real_chips_without_a_place_are_told_as_such(tmp_path, shared):
    from sarfm.datasets.catalog import open_dataset

    folder = shared / "flood" / "ombria_s1"
    if not folder.is_dir():
        pytest.skip("no OMBRIA beside the checkout (shared/data/flood/ombria_s1)")
    scenes = open_dataset("ombria", folder)
    names = list(scenes)[::10]
    store = store_of(
        tmp_path, {name: scenes[name] for name in names}, size=256, dataset="ombria", split={"by": "block"}
    )
    report = assert_no_leak(store, Split().parts(store))
    assert report["distance_m"].isna().all() and (report["unplaced"] == report["patches"] + report["others"]).all()
    twice = pd.Series(["train", "test"] + [""] * (len(store) - 2))
    (tmp_path / "copy").mkdir()
    copied = store_of(
        tmp_path / "copy",
        {"a": scenes[names[0]], "b": scenes[names[0]], **{n: scenes[n] for n in names[1:3]}},
        size=256,
    )
    assert leak_report(copied, twice[: len(copied)])["same_pixels"].tolist() == [1]
