"""Figures, projections, maps, panels and what the comparison shows, without a browser."""

import base64
import io
import json
import re

import numpy as np
import pytest
import xarray as xr
from pyproj import CRS, Transformer

from sarfm.scenes.open import make_scene
from sarfm.scenes.place import metric_crs
from sarfm.viz import classes, figures, maps, projection

POLAR = CRS.from_epsg(3413)


def scene_in(crs, x=0.0, y=0.0, step=10.0, shape=(60, 80), **more):
    """A scene with a gradient, so that every pixel has its own value, in dB."""
    values = -20 + np.arange(np.prod(shape), dtype=float).reshape(shape) / np.prod(shape) * 10
    given = {"units": "dB", "quantity": "sigma0", "crs": crs, "transform": (step, 0, x, 0, -step, y)}
    return make_scene({"vv": values}, **given | more)


def swath(crs=POLAR, x=-30e3, y=5e3, step=40.0, size=1000, n=6, turn=0.4):
    """A swath of 40 m pixels, turned against its map, known by GCPs alone."""
    rows, cols = (v.ravel() for v in np.meshgrid(*[np.linspace(0, size, n)] * 2, indexing="ij"))
    c, s = np.cos(turn), np.sin(turn)
    at = x + step * (c * cols + s * rows), y + step * (s * cols - c * rows)
    lon, lat = Transformer.from_crs(crs, 4326, always_xy=True).transform(*at)
    values = np.random.default_rng(0).gamma(4, 0.25, (size, size))
    return make_scene({"hv": values}, units="1", quantity="sigma0", gcps=np.stack([rows, cols, lon, lat], axis=1))


# ---- figures --------------------------------------------------------------------------------------------------------------


def test_limits_ignore_nan_and_outliers():
    values = np.linspace(0, 100, 101)
    values[0] = np.nan
    assert figures.display_limits(values) == pytest.approx((2.98, 98.02))
    assert figures.display_limits(np.full(9, 3.0)) == (2.5, 3.5)


def test_linear_power_is_drawn_in_db_and_digital_numbers_are_not():
    power = xr.DataArray([0.01, 1.0], attrs={"units": "1", "quantity": "sigma0"})
    values, unit = figures.shown(power)
    assert unit == "dB" and values.values == pytest.approx([-20, 0]) and "dB" in figures.quantity_label(power)
    number = power.assign_attrs(quantity="digital_number")
    assert figures.shown(number)[1] == "" and "dB" not in figures.quantity_label(number)


def test_error_scale_is_symmetric_round_and_wide_enough():
    error = np.random.default_rng(0).normal(0, 2, 10_000)
    limit = figures.error_limit(error)
    assert (np.abs(error) <= limit).mean() >= 0.98 and limit * 2 == round(limit * 2)


def test_hidden_pixels_are_painted_in_no_grey():
    over = figures.hidden_overlay(np.array([[True, False]]))
    assert over[0, 0, 3] == 1 and over[0, 1, 3] == 0 and np.ptp(over[0, 0, :3]) > 0.15


@pytest.mark.parametrize("crs, label", [(32633, "easting (km)"), (4326, "longitude (°)"), (None, "column (px)")])
def test_axes_carry_units(crs, label):
    scene = (
        scene_in(crs, x=10.0, y=50.0, step=0.001 if crs == 4326 else 10.0) if crs else scene_in(None, transform=None)
    )
    figure = figures.show_scene(scene)
    assert figure.axes[0].get_xlabel() == label
    assert "dB" in figure.axes[-1].get_ylabel()


# ---- projections ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lon, lat, epsg",
    [(119.2, 5.4, 32650), (-70.0, -33.0, 32719), (179.99, 10.0, 32660), (10.0, 80.0, 3413), (0.0, -75.0, 3031)],
)
def test_display_crs_follows_the_place(lon, lat, epsg):
    scene = scene_in(4326, x=lon, y=lat, step=1e-4)
    assert metric_crs(scene).to_epsg() == epsg


def test_a_scene_in_metres_keeps_its_projection():
    own = CRS.from_proj4("+proj=laea +lat_0=86 +lon_0=20 +datum=WGS84 +units=m")
    assert metric_crs(scene_in(own)) == own


@pytest.mark.parametrize(
    "crs, x, y, step",
    [(32650, 7.4e5, 6e5, 10.0), (4326, 119.2, 5.4, 1e-4), (4326, 20.0, 86.0, 1e-3), (3413, -4e4, 3e4, 40.0)],
)
def test_every_pixel_is_found_again(crs, x, y, step):
    scene = scene_in(crs, x, y, step)
    grid = projection.project_scene(scene)
    for row, col in [(0, 0), (59, 79), (31, 7), (5, 60)]:
        assert grid.locate(*map(float, grid.to_map(row + 0.5, col + 0.5))) == (row, col)
    seen = np.unique(grid.rows[grid.rows >= 0] * 80 + grid.columns[grid.rows >= 0])
    assert len(seen) > 0.8 * 60 * 80, "most pixels are shown"


def test_a_scene_in_its_own_projection_is_not_resampled():
    scene = scene_in(32650, 7.4e5, 6e5)
    grid = projection.project_scene(scene)
    assert np.array_equal(grid.warp(scene["vv"].values), scene["vv"].values)


@pytest.mark.parametrize("crs, x, y", [(3413, -30e3, 5e3), (3413, -20e3, 20e3), (32660, 8.3e5, 0.0)])
def test_swath_of_gcps_lies_where_they_say(crs, x, y):
    """Around the pole and across the date line: within a hundredth of a pixel between the GCPs."""
    scene, truth = swath(CRS.from_epsg(crs), x, y), CRS.from_epsg(crs)
    grid = projection.project_scene(scene)
    there = Transformer.from_crs(grid.crs, truth, always_xy=True)
    rows, cols = np.array([111.0, 512.0, 903.0]), np.array([77.0, 490.0, 988.0])
    at = there.transform(*grid.to_map(rows, cols))
    c, s = np.cos(0.4), np.sin(0.4)
    wanted = x + 40 * (c * cols + s * rows), y + 40 * (s * cols - c * rows)
    assert np.abs(np.subtract(at, wanted)).max() < 0.4
    assert grid.locate(*map(float, grid.to_map(512.5, 490.5))) == (512, 490)


def test_window_of_a_swath_stays_in_place():
    scene = swath()
    part = scene.isel(y=slice(200, 300), x=slice(400, 520))
    whole, cut = projection.project_scene(scene), projection.project_scene(part)
    assert np.allclose(whole.to_map(250.5, 450.5), cut.to_map(50.5, 50.5), atol=0.01)


def test_real_swath_near_the_pole(shared):
    from sarfm.scenes.open import open_scene

    scene = open_scene(
        shared / "sea_ice/s1_ew_hv_sigma0/S1A_EW_GRDM_1SDH_20161005T142446.tif",
        channels=["hv"],
        units="1",
        quantity="sigma0",
        nodata="none",
    )
    grid = projection.project_scene(scene)
    assert grid.crs.to_epsg() == 3413
    points = {k: scene[f"gcp_{k}"].values for k in ("row", "col", "lon", "lat")}
    x, y = Transformer.from_crs(4326, 3413, always_xy=True).transform(points["lon"], points["lat"])
    at = grid.to_map(points["row"], points["col"])
    assert np.abs(np.subtract(at, (x, y))).max() < 1.0, "the spline goes through the GCPs, metres"
    lon, lat = grid.lonlat((grid.bounds[0] + grid.bounds[2]) / 2, (grid.bounds[1] + grid.bounds[3]) / 2)
    assert 86 < lat < 87.2
    view = maps.scene_map(scene)
    assert view.crs["name"] == "Simple" and len(view.layers) > 5


# ---- maps -----------------------------------------------------------------------------------------------------------------


def test_map_asks_no_server_for_anything():
    view = maps.scene_map(scene_in(32650, 7.4e5, 6e5))
    assert not [layer for layer in view.layers if "Tile" in type(layer).__name__]
    images = [layer.url for layer in view.layers if hasattr(layer, "url")]
    assert images and all(url.startswith("data:image/") for url in images)


def test_picture_survives_encoding():
    from PIL import Image

    rgba = np.zeros((8, 8, 4))
    rgba[:4] = (0.2, 0.4, 0.6, 1)
    url = maps.picture_url(rgba, lossless=True)
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))
    assert np.array_equal(back[:4], np.broadcast_to([51, 102, 153, 255], (4, 8, 4))) and (back[4:, :, 3] == 0).all()


@pytest.mark.parametrize(
    "lon, lat, land",
    [
        (114.0, 0.5, True),
        (-150.0, 0.0, False),
        (27.0, 64.0, True),
        (0.0, 90.0, False),
        (20.0, -85.0, True),
        (179.9, 68.0, True),
    ],
)
def test_land_is_where_it_is(lon, lat, land):
    """Borneo, the open Pacific, Finland, the pole, Antarctica's inside, Chukotka on the date line."""
    import shapely

    around = CRS.from_proj4(f"+proj=laea +lat_0={lat} +lon_0={lon} +datum=WGS84")
    shapes = [shapely.Polygon(rings[0], rings[1:]) for rings in maps.coastline(around, lon, lat)]
    assert any(shape.contains(shapely.Point(0, 0)) for shape in shapes) == land


@pytest.mark.parametrize(
    "scene", [scene_in(32650, 7.4e5, 6e5), scene_in(4326, 20.0, 86.0, 1e-3), swath()], ids=["utm", "north", "pole"]
)
def test_graticule_lies_on_its_degrees(scene):
    grid = projection.project_scene(scene)
    lines = maps.graticule(grid)
    assert 4 <= len(lines) < 80 and any(line["at"] for line in lines)
    for line in lines:
        lon, lat = grid.lonlat(*np.array(line["path"]).T)
        said = float(line["text"].split("°")[0])
        if line["kind"] == "lat":
            assert np.abs(np.abs(lat) - said).max() < 2e-3
        else:
            away = np.abs((np.abs(lon) - said + 180) % 360 - 180) * np.cos(np.radians(lat))
            assert away.max() < 2e-3


# ---- the page's JSON ------------------------------------------------------------------------------------------------------


def test_page_json_cannot_be_left():
    from sarfm.viz.pages import page_json

    value = {"a": "</script><!-- & \u2028", "b": [np.float32(1.5), float("nan"), np.int64(3)], "c": np.eye(2)}
    text = page_json(value)
    assert not re.search("[<>&\u2028]", text)
    assert json.loads(text) == {"a": "</script><!-- & \u2028", "b": [1.5, None, 3], "c": [[1.0, 0.0], [0.0, 1.0]]}


# ---- the comparison -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison():
    import torch

    from sarfm.models.mae import MAE
    from sarfm.models.vit import Encoder
    from sarfm.patches.contract import InputContract
    from sarfm.viz.comparison import Comparison

    torch.manual_seed(0)
    contract = InputContract(
        channels=["vv"], quantity="sigma0", units="dB", mean=[-15.0], std=[3.0], patch_size=8, crop_px=32
    )
    model = MAE(
        Encoder(1, patch_size=8, width=16, depth=1, heads=2), decoder_width=16, decoder_depth=1, decoder_heads=2
    )
    return Comparison(model.eval(), scene_in(32650, 7.4e5, 6e5), contract, seeds=(0, 1))


def test_comparison_reconstructs_each_choice_once(comparison):
    assert comparison.reconstruction(0.5, 0) is comparison.reconstruction(0.5, 0)
    assert comparison.reconstruction(0.5, 0) is not comparison.reconstruction(0.5, 1)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
def test_layers_show_what_their_names_say(comparison, ratio):
    from sarfm.viz.comparison import layer_colours

    made = comparison.reconstruction(ratio, 0)
    hidden = made["hidden"].values
    assert abs(hidden.mean() - ratio) < 0.08
    original, masked, error = (layer_colours(comparison, n, "vv", ratio, 0) for n in ("original", "masked", "error"))
    assert (masked[~hidden] == original[~hidden]).all() and len(np.unique(masked[hidden], axis=0)) == 1
    assert len(np.unique(error[~hidden], axis=0)) == 1


def test_tile_numbers_are_of_hidden_pixels_in_db(comparison):
    from sarfm.viz.comparison import scene_numbers, tile_nodes, tile_numbers

    made = comparison.reconstruction(0.75, 0).sel(channel="vv")
    numbers = tile_numbers(comparison, "vv", 0.75, 0)
    window = np.s_[0:32, 32:64]
    hidden = made["hidden"].values[window]
    wrong = (made["reconstruction"] - made["original"]).values[window][hidden]
    assert numbers["mse"][0, 1] == pytest.approx((wrong**2).mean(), rel=1e-4)
    assert numbers["hidden"][0, 1] == pytest.approx(100 * hidden.mean())
    assert tile_nodes(comparison).shape == (3, 4, 2)
    whole = (made["reconstruction"] - made["original"]).values[made["hidden"].values]
    assert scene_numbers(comparison, "vv", 0.75, 0)["mse"] == pytest.approx((whole**2).mean(), rel=1e-4)


def test_comparison_asks_for_what_is_missing(comparison):
    from sarfm.viz.comparison import Comparison
    from sarfm.viz.pages import export_comparison

    with pytest.raises(ValueError, match="contract"):
        Comparison(comparison.model, comparison.scene)
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        Comparison(comparison.model, comparison.scene, comparison.contract, ratios=(1.0,))
    with pytest.raises(ValueError, match="hh"):
        export_comparison(comparison.model, comparison.scene, "never.html", comparison.contract, channels=["hh"])


def test_exported_page_is_one_file_with_everything(comparison, tmp_path):
    from sarfm.viz.pages import export_comparison

    path = export_comparison(
        comparison.model, comparison.scene, tmp_path / "map.html", comparison.contract, ratios=(0.5, 0.9)
    )
    page = path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["map.html"], "no temporary file is left"
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert set(data["images"]["reconstruction"]) == {"0|0|0", "0|1|0"} and data["ratios"] == [0.5, 0.9]
    plain = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r'(src|href)\s*=\s*"(?!data:)|url\((?!data:)', plain) and not re.search("{{[A-Z]", plain)


def test_widget_exchanges_pictures_and_numbers(comparison):
    from sarfm.viz.widgets import MaskComparison

    widget = MaskComparison(comparison)
    left, right, numbers = widget.overlays["left"].url, widget.overlays["right"].url, widget.numbers.value
    widget.ratio.value = 0.25
    assert (
        widget.overlays["left"].url == left
        and widget.overlays["right"].url != right
        and widget.numbers.value != numbers
    )
    widget.left.value = "error"
    assert widget.overlays["left"].url != left
    widget.choose(*comparison.grid.to_map(40.5, 40.5))
    assert widget.tile == (1, 1) and "Tile at row 32, column 32" in widget.numbers.value and widget.outline.locations
    widget.choose(0.0, 0.0)
    assert widget.tile is None and not widget.outline.locations


def test_stills_move_without_a_kernel(comparison):
    from sarfm.viz.widgets import compare_stills

    slider, stack = compare_stills(comparison, width_px=300).children
    assert len(stack.children) == len(slider.options) == 4 and all(p.format == "webp" for p in stack.children)


def test_seasons_are_drawn_by_name():
    bands = {"vv": np.stack([np.full((8, 8), -9.0), np.full((8, 8), -12.0)]).astype("float32")}
    scene = make_scene(bands, units="dB", quantity="sigma0", seasons=["winter", "summer"], nodata="none")
    assert figures.channel_label(scene, "vv@summer") == "VV summer"
    assert classes.pixel_values(scene, {}, 1, 2)["VV summer"] == "−12.0 dB"
    assert [ax.get_title() for ax in figures.show_scene(scene).axes[:2]] == ["VV winter", "VV summer"]
