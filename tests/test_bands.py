"""Bands across the Earth, held to the rule as it is specified, word by word; fractions of labels that keep shares."""

import time
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import shapely

from sarfm.patches.leaks import leak_report
from sarfm.patches.prepare import write_store
from sarfm.patches.splits import (
    Split,
    assign_bands,
    band_borders,
    band_points,
    label_strata,
    label_subset,
    make_split,
    split_by_bands,
)
from sarfm.scenes.channels import Target
from sarfm.scenes.open import make_scene


def as_specified(shapes, bands, angle):
    """The published rule, written down as slowly as its specification reads; no width: None."""
    coords = np.array([np.array(shape.envelope.boundary.coords).mean(axis=0) for shape in shapes])
    if abs(angle) < np.pi / 4:
        p_lon, p_lat = abs(angle) / (np.pi / 4), 1
    else:
        p_lon, p_lat = np.sign(angle), (np.pi / 2 - abs(angle)) / (np.pi / 4)
    x, y = ((coords - coords.min(axis=0)) / (coords.max(axis=0) - coords.min(axis=0))).T
    if angle < 0:
        x, y = 1 - x, 1 - y
    for k in np.linspace(0.1, 50, 10_000):
        band = ((p_lon * x + p_lat * y) / (k / bands)).astype(int)
        band = band - band.min()
        if len(set(band.tolist())) == bands:
            order = {number: place for place, number in enumerate(sorted(set(band.tolist())))}
            return [("train", "train", "train", "test", "val")[order[number] % 5] for number in band.tolist()]
    return None


def scattered(seed, count=4000):
    """Tiles of some kilometres, turned a little as those of a UTM grid are, over a region."""
    g = np.random.default_rng(seed)
    west, south = g.uniform(-12, 30, count), g.uniform(35, 62, count)
    turn, side = g.uniform(-0.1, 0.1, count), 0.04
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * side
    spin = np.stack([np.stack([np.cos(turn), -np.sin(turn)], -1), np.stack([np.sin(turn), np.cos(turn)], -1)], 1)
    shapes = shapely.polygons(np.stack([west, south], -1)[:, None] + np.einsum("nij,kj->nki", spin, corners))
    return shapes, pd.DataFrame(shapely.bounds(shapes), columns=["west", "south", "east", "north"])


@pytest.mark.parametrize("angle", [0.9, 1.5, 0.2, 0.0, np.pi / 2, np.pi / 4, -0.3, -0.9, -np.pi / 2])
def test_bands_are_those_of_the_rule(angle):
    for seed, bands in ((0, 60), (1, 60), (2, 7)):
        shapes, tiles = scattered(seed, 4000 if seed == 0 else 900)
        wanted = as_specified(shapes, bands, angle)
        tiles["place"] = [f"{k:04d}" for k in range(len(tiles))]
        if wanted is None:
            with pytest.raises(ValueError, match=f"can't be cut into {bands} bands"):
                split_by_bands(tiles, bands, angle)
            continue
        assert split_by_bands(tiles, bands, angle).tolist() == wanted
        number = assign_bands(band_points(tiles), bands, angle)
        assert set(number.tolist()) == set(range(bands))


def test_points_are_those_of_the_boundary():
    shapes, tiles = scattered(3, 200)
    assert np.array_equal(band_points(tiles), [np.array(s.envelope.boundary.coords).mean(axis=0) for s in shapes])


def test_sixty_bands_are_36_12_12_and_monotone():
    shapes, tiles = scattered(0)
    points = band_points(tiles)
    number = assign_bands(points, 60, 0.9)
    tiles["place"] = np.arange(len(tiles))
    part = pd.DataFrame({"band": number, "part": split_by_bands(tiles, 60, 0.9)}).drop_duplicates()
    assert part["part"].value_counts().to_dict() == {"train": 36, "test": 12, "val": 12} and len(part) == 60
    scaled = (points - points.min(0)) / np.ptp(points, axis=0)
    across = scaled[:, 0] + (np.pi / 2 - 0.9) / (np.pi / 4) * scaled[:, 1]
    assert (np.diff(number[np.argsort(across)]) >= 0).all()


def test_ties_and_lines_are_settled():
    row = pd.DataFrame({"west": np.arange(10.0), "south": 5.0, "east": np.arange(10.0) + 1, "north": 6.0})
    assert assign_bands(band_points(row), 5, np.pi / 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    with pytest.raises(ValueError, match="10 tiles at 1 positions can't be cut into 2 bands"):
        assign_bands(band_points(row), 2, 0.0)  # all of one latitude
    with pytest.raises(ValueError, match="from 1 to the number of places, 10; got 11"):
        assign_bands(band_points(row), 11, 0.0)
    for angle in (1.6, -1.6, np.nan):
        with pytest.raises(ValueError, match="radians"):
            assign_bands(band_points(row), 2, angle)
    with pytest.raises(ValueError, match="1 of 10 places don't say where"):
        assign_bands(np.vstack([band_points(row)[:9], [np.nan, np.nan]]), 2, 0.0)


def test_borders_part_the_bands():
    _, tiles = scattered(4, 3000)
    points = band_points(tiles)
    for angle in (0.0, 0.2, 0.9, 1.5, np.pi / 2, -0.4, -1.2):
        number, lines = assign_bands(points, 12, angle), band_borders(points, 12, angle)
        assert len(lines) in (11, 12) and (lines.min((0, 1)) >= points.min(0) - 1e-9).all()
        extent = np.ptp(points, axis=0)
        flat, ends = points / extent, lines / extent
        direction = ends[0, 1] - ends[0, 0]
        normal = np.array([-direction[1], direction[0]]) / np.linalg.norm(direction)
        side = np.searchsorted(np.sort(ends[:, 0] @ normal), flat @ normal)
        assert pd.crosstab(number, side).gt(0).sum(axis=1).max() <= 1 + (angle < -np.pi / 4)
        assert (pd.crosstab(side, number).gt(0).sum(axis=1) == 1).all(), "no field between borders holds two bands"


def test_the_date_line_cuts_no_region_in_two():
    lon = np.arange(170, 190, 0.5)
    west = np.where(lon >= 180, lon - 360, lon)
    tiles = pd.DataFrame({"west": west, "south": -10.0, "east": west + 0.5, "north": -9.5})
    assert (np.diff(assign_bands(band_points(tiles), 8, np.pi / 2)) >= 0).all()


def test_six_hundred_thousand_tiles_take_seconds():
    lon, lat = (v.ravel() for v in np.meshgrid(np.linspace(-12, 40, 800), np.linspace(35, 70, 750)))
    tiles = pd.DataFrame(
        {"west": lon, "south": lat, "east": lon + 0.06, "north": lat + 0.04, "place": np.arange(len(lon))}
    )
    began = time.process_time()
    parts = split_by_bands(tiles, 60, 0.9)
    assert time.process_time() - began < 20 and len(parts) == 600_000


def a_store(tmp_path):
    """Tiles of 8 px in a grid, two dates each, with a class of pixels, a number and tags."""
    scenes, g = {}, np.random.default_rng(0)
    for k in range(60):
        place = {"crs": "EPSG:32633", "transform": (10, 0, 400_000 + 80 * (k % 10), 0, -10, 5_600_000 - 80 * (k // 10))}
        cover = np.full((8, 8), 1 + (k % 4 == 0), np.uint8)
        cover[0] = 2
        labels = {
            "cover": (cover, {1: "forest", 2: "water"}),
            "mass": (np.full((8, 8), float(k)), Target("mass", kind="number", units="t/ha")),
            "season": ([k % 3 == 0, True], Target("season", kind="tags", of="tile", classes={0: "dry", 1: "wet"})),
        }
        bands = {"vv": g.normal(-12, 2, (2, 8, 8))}
        scenes[f"t{k:02d}"] = make_scene(
            bands, units="dB", quantity="sigma0", times=["2020-01-01", "2020-07-01"], labels=labels, **place
        )
    return write_store(scenes, tmp_path / "s.zarr", size=8, dates="scenes", progress=False)


def test_all_dates_of_a_place_are_in_one_band(tmp_path):
    store = a_store(tmp_path)
    parts = Split(by="bands", bands=5, angle=0.9).parts(store)
    assert len(store) == 120 and (parts.groupby(store.index["place"]).nunique() == 1).all()
    assert set(parts) == {"train", "val", "test"}
    assert parts.equals(make_split(store.index, "bands", bands=5, angle=0.9))
    buffered = Split(by="bands", bands=5, angle=0.9, buffer_m=20.0).parts(store)
    assert (buffered[parts == "test"] == "test").all() and (buffered == "").any()
    report = leak_report(store, buffered, 20.0)
    assert (report["distance_m"] >= 20).all() and (report["near"] == 0).all()
    with pytest.raises(ValueError, match="buffer of 5000 m leaves no place"):
        Split(by="bands", bands=5, angle=0.9, buffer_m=5000.0).parts(store)


def test_a_store_without_places_is_refused(tmp_path):
    field = np.random.default_rng(0).normal(-12, 2, (8, 8))
    scenes = {f"s{k}": make_scene({"vv": field + k}, units="dB", quantity="sigma0") for k in range(6)}
    store = write_store(scenes, tmp_path / "s.zarr", size=8, progress=False)
    with pytest.raises(ValueError, match="6 of 6 places don't say where on Earth"):
        Split(by="bands", bands=5).parts(store)
    with pytest.raises(ValueError, match="prepared without places"):
        split_by_bands(store.index.drop(columns=["west"]), 5)


@pytest.mark.parametrize("by", ["cover", "mass", "season", "place"])
def test_fractions_keep_shares_and_are_nested(tmp_path, by):
    store = a_store(tmp_path)
    rows = np.flatnonzero(store.index["patch"] % 7 > 0)
    kinds = label_strata(store, rows, by)
    assert (kinds[rows] >= 0).all() and (np.delete(kinds, rows) == -1).all()
    counts = np.bincount(kinds[rows])
    assert len(counts) == {"cover": 2, "mass": 10, "season": 2, "place": 60}[by]
    subsets = [label_subset(store.index, rows, f, seed=3, strata=kinds) for f in (0.05, 0.2, 0.5, 1.0)]
    for small, large in pairwise(subsets):
        assert set(small) <= set(large) <= set(rows)
    for subset, fraction in zip(subsets, (0.05, 0.2, 0.5, 1.0), strict=True):
        assert len(subset) == max(1, round(fraction * len(rows)))
        assert np.abs(np.bincount(kinds[subset], minlength=len(counts)) - fraction * counts).max() <= 1.5
    assert not np.array_equal(subsets[1], label_subset(store.index, rows, 0.2, seed=4, strata=kinds))
    if by == "cover":
        assert set(store.index["place"].iloc[rows[kinds[rows] == 1]].str[1:].astype(int) % 4) == {0}


def test_a_thousandth_lies_in_a_hundredth():
    index = pd.DataFrame({"patch": np.arange(200_000)})
    kinds = np.random.default_rng(0).choice(11, 200_000, p=[0.4, 0.3, 0.2, *8 * [0.0125]])
    subsets = [label_subset(index, index["patch"], f, seed=0, strata=kinds) for f in (0.001, 0.01, 0.1, 1.0)]
    assert [len(s) for s in subsets] == [200, 2000, 20_000, 200_000]
    for small, large in pairwise(subsets):
        assert np.isin(small, large).all()
    shares = [np.bincount(kinds[s], minlength=11) / len(s) for s in subsets]
    assert all(np.abs(s - shares[-1]).max() * len(subset) <= 2 for s, subset in zip(shares, subsets, strict=True))


def test_strata_need_a_target_or_a_column(tmp_path):
    store = a_store(tmp_path)
    with pytest.raises(ValueError, match="no 'soil'"):
        label_strata(store, [0], "soil")
    assert (
        Split().strata(store, np.arange(3)) is None and Split(stratify="cover").strata(store, np.arange(3)) is not None
    )
