"""The published split of a region from its outlines, and the map that shows it."""

import json
import re

import numpy as np
import pytest
import shapely
from pyproj import Transformer

from sarfm.land.bands import ANGLES, published_subset, read_tiles, region_borders, region_split, tile_table
from sarfm.patches.leaks import assert_no_leak, leak_report
from sarfm.viz.parts import PART_COLOURS, export_parts, land_in, show_parts


def a_grid(count=60, side=4480.0, zone=32631):
    """Squares of a UTM grid, by identifier, askew in degrees as the published ones are."""
    back = Transformer.from_crs(zone, 4326, always_xy=True)
    left, low = (
        v.ravel()[:, None] for v in np.meshgrid(7e5 + side * np.arange(count), 5.6e6 + side * np.arange(count))
    )
    lon, lat = back.transform(left + side * np.array([0, 0, 1, 1]), low + side * np.array([0, 1, 1, 0]))
    return {f"{k:013x}": shape for k, shape in enumerate(shapely.polygons(np.stack([lon, lat], -1)))}


def test_regions_have_their_angles():
    assert dict(ANGLES) == {
        "europe": 0.9,
        "conus": 0.9,
        "china": 1.5,
        "southamerica": 0.2,
        "middleeast": 1.5,
        "pakin": 1.5,
    }


@pytest.mark.parametrize("aoi", sorted(ANGLES))
def test_a_region_has_36_bands_to_learn_from_and_12_of_each_other(aoi):
    tiles = tile_table(a_grid(90))
    parts = region_split(aoi, tiles)
    assert parts.index.equals(tiles.index) and parts.name == "split"
    assert len(region_borders(aoi, tiles)) == 59
    assert parts.value_counts(normalize=True).round(1).to_dict() == {"train": 0.6, "test": 0.2, "val": 0.2}


def test_outlines_touch_where_their_boxes_overlap():
    tiles = tile_table(a_grid())
    parts = region_split("europe", tiles)
    report = leak_report(tiles, parts)
    assert (report["overlapping"] == 0).all() and (report["distance_m"] < 0.01).all()
    boxes = tiles[["west", "south", "east", "north", "place"]]
    assert (leak_report(boxes, parts)["overlapping"] > 0).all()  # askew squares in boxes
    apart = region_split("europe", tiles, buffer_m=2000.0)
    assert (apart[parts == "test"] == "test").all() and (
        assert_no_leak(tiles, apart, 2000.0)["distance_m"] > 2000
    ).all()


def test_tiles_of_a_file_are_read_whole_and_cut_off_ones_too(tmp_path):
    shapes = a_grid(9)
    first = next(iter(shapes))
    shapes[first] = shapes[first].difference(shapes[first].centroid.buffer(0.01))  # cut off: many corners
    shapes[first] = max(shapely.get_parts(shapes[first]), key=shapely.area)
    features = [
        {
            "type": "Feature",
            "properties": {"identifier": n, "original_index": 0},
            "geometry": shapely.geometry.mapping(s),
        }
        for n, s in shapes.items()
    ]
    file = tmp_path / "europe_partitions_aschips_0.geojson"
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    tiles = read_tiles(file)
    assert list(tiles.index) == list(shapes) and np.isfinite(tiles.drop(columns="place").to_numpy(float)).all()
    assert np.allclose(
        tiles.loc[list(shapes)[5], ["west", "south", "east", "north"]].astype(float), shapes[list(shapes)[5]].bounds
    )
    file.write_text(json.dumps({"features": features + features[:1]}))
    with pytest.raises(ValueError, match="82 tiles with 81 identifiers"):
        read_tiles(file)
    with pytest.raises(ValueError, match="1 tiles have no outline, 'x' first"):
        tile_table({"x": shapely.Polygon(), **shapes})


def test_an_unknown_region_and_fraction_are_refused():
    tiles = tile_table(a_grid(9))
    with pytest.raises(ValueError, match="aoi is one of europe"):
        region_split("africa", tiles)
    with pytest.raises(ValueError, match="in \\(0, 1\\]"):
        published_subset(["a"], 1.5)


def test_published_subsets_are_nested_beginnings():
    names = [f"{k:05d}" for k in range(12_345)]
    np.random.seed(42)  # noqa: NPY002
    order = np.random.permutation(names)  # noqa: NPY002
    for fraction in (0.001, 0.01, 0.1, 1.0):
        assert published_subset(names, fraction) == list(order[: int(12_345 * fraction)])


def test_the_map_shows_every_tile_in_the_colour_of_its_part(tmp_path):
    tiles = tile_table(a_grid(20))
    parts = (
        region_split("southamerica", tiles)
        if len(tiles) >= 3600
        else tiles["place"].map(lambda n: ["train", "val", "test", ""][int(n, 16) % 4])
    )
    figure = show_parts(tiles, parts, title="tiles")
    (shapes,) = [c for c in figure.axes[0].collections if len(c.get_paths()) == len(tiles)]
    colours = [tuple(np.round(c[:3], 3)) for c in shapes.get_facecolor()]
    from matplotlib.colors import to_rgb

    assert colours == [tuple(np.round(to_rgb(PART_COLOURS[p]), 3)) for p in parts]
    page = export_parts(tiles, parts, tmp_path / "map.html", title="<script>alert(1)</script>").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert len(data["tiles"]) == 400 and sum(p["count"] for p in data["parts"]) == 400 and "<script>alert" not in page
    assert data["parts"][data["tiles"][5]["part"]]["name"] == (parts.iloc[5] or "unused")
    assert data["tiles"][5]["corners"][0] == pytest.approx(tiles[["lon_0", "lat_0"]].iloc[5].tolist(), abs=1e-5)


def test_land_goes_on_across_the_date_line():
    fiji = land_in((176.0, -20.0, 184.0, -15.0))
    assert (
        min(ring[:, 0].max() for rings in fiji for ring in rings) >= 176
        and max(ring[:, 0].max() for rings in fiji for ring in rings) > 180
    )
