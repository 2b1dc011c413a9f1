"""Maps of predictions: what a COG is, where its pixels lie, colours and names, the pole, memory."""

import numpy as np
import pytest
import rasterio
import xarray as xr
from pyproj import CRS, Transformer
from rasterio.transform import from_origin

from sarfm.evaluation.export import write_cog
from sarfm.ice.charts import chart_label
from sarfm.scenes.open import make_scene, open_scene
from sarfm.scenes.place import PixelMap, tie_point_lonlat

REAL = ["S1A_EW_GRDM_1SDH_20161005T142446.tif", "S1B_EW_GRDM_1SDH_20161005T101835.tif"]


def numbered(scene: xr.Dataset) -> xr.Dataset:
    """Let every pixel say its own row and column, from the corner, and a class."""
    rows, columns = np.meshgrid(np.arange(scene.sizes["y"]), np.arange(scene.sizes["x"]), indexing="ij")
    stage = ((rows // 50 + columns // 50) % 6).astype(np.uint8)
    layers = {"row": (("y", "x"), (rows + 0.5).astype("f4")), "column": (("y", "x"), (columns + 0.5).astype("f4"))}
    return xr.Dataset(layers | {"sod": chart_label(stage, "sod")}, coords=scene.coords, attrs=scene.attrs)


def swath(place, height=600, width=700, every=100, crs=3413):
    """Make a scene whose pixels lie where `place` says, in metres of a CRS, and its tie points."""
    at = np.meshgrid(np.arange(0, height + 1, every), np.arange(0, width + 1, every), indexing="ij")
    rows, columns = (v.ravel().astype(float) for v in at)
    lonlat = Transformer.from_crs(crs, 4326, always_xy=True).transform(*place(rows, columns))
    bands = {"hh": np.zeros((height, width), np.float32)}
    return make_scene(bands, units="dB", quantity="sigma0", gcps=np.stack([rows, columns, *lonlat], axis=1))


def over_the_pole(rows, columns):
    """Lay pixels of 400 m over the pole, turned and bent."""
    x, y = 400.0 * (columns - 300) + 0.01 * rows**2, 400.0 * (320 - rows)
    return 0.8 * x - 0.6 * y, 0.6 * x + 0.8 * y


def offsets(scene, path, rows, columns, lon, lat, **options):
    """Tell how far, in pixels of the scene, the map is off at places that are known."""
    off, crs = [], options.get("crs", 3413)
    x, y = Transformer.from_crs(4326, crs, always_xy=True).transform(lon, lat)
    for name, known in (("row", rows), ("column", columns)):
        with rasterio.open(write_cog(scene, path / f"{name}.tif", layer=name, **options)) as cog:
            off.append(np.array([value[0] for value in cog.sample(zip(x, y, strict=True))]) - known)
    return np.abs(off)


def test_a_cog_is_one(tmp_path):
    scene = numbered(swath(over_the_pole, 900, 1100)).assign_attrs(source="made up", licence="CC0", looks=4)
    with rasterio.open(write_cog(scene, tmp_path / "sod.tif")) as cog:
        assert cog.driver == "GTiff" and cog.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert cog.is_tiled and set(cog.block_shapes) == {(512, 512)} and cog.overviews(1)
        assert cog.compression.name == "deflate" and cog.nodata == 255 and cog.dtypes == ("uint8",)
        assert CRS.from_wkt(cog.crs.to_wkt()).to_epsg() == 3413 and cog.descriptions == ("sod",)
        tags, table, values = cog.tags(1), cog.colormap(1), cog.read(1)
        assert tags["flag_values"] == "0 1 2 3 4 5" and tags["flag_meanings"] == scene["sod"].attrs["flag_meanings"]
        assert cog.tags()["licence"] == "CC0" and cog.tags()["looks"] == "4"
        x, y = cog.transform * (0, 0)
        assert (x / cog.res[0]).is_integer() and (y / cog.res[0]).is_integer()
    colours = scene["sod"].attrs["flag_colors"].split()
    assert all(table[k] == (*bytes.fromhex(c[1:]), 255) for k, c in enumerate(colours))
    assert set(np.unique(values)) == {0, 1, 2, 3, 4, 5, 255}
    assert abs((values != 255).sum() / (900 * 1100) - (400 / cog.res[0]) ** 2) < 0.01
    with rasterio.open(tmp_path / "sod.tif", overview_level=0) as coarse:
        assert set(np.unique(coarse.read(1))) == {0, 1, 2, 3, 4, 5, 255}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sod.tif", "sod.tif.aux.xml"]


@pytest.mark.parametrize("spacing_m", [400.0, 137.0])
def test_the_pole_is_a_place_like_others(tmp_path, spacing_m):
    rng = np.random.default_rng(0)
    rows, columns = rng.uniform(5, 595, 400), rng.uniform(5, 695, 400)
    rows[0], columns[0] = 320.0, 300 - 0.01 * 320**2 / 400  # the pole itself
    lon, lat = Transformer.from_crs(3413, 4326, always_xy=True).transform(*over_the_pole(rows, columns))
    assert lat[0] == pytest.approx(90)
    off = offsets(numbered(swath(over_the_pole)), tmp_path, rows, columns, lon, lat, spacing_m=spacing_m)
    assert np.isfinite(off).all() and off.max() < 1.25 if spacing_m == 400 else off.max() < 0.8


def test_nearest_neighbour_takes_exactly_the_nearest(tmp_path):
    straight = lambda rows, columns: (400.0 * columns - 120_000, 120_000 - 400.0 * rows)
    scene = numbered(swath(straight))
    with rasterio.open(write_cog(scene, tmp_path / "sod.tif", spacing_m=400.0)) as cog:
        window = rasterio.windows.from_bounds(-120_000, 120_000 - 240_000, 280_000 - 120_000, 120_000, cog.transform)
        np.testing.assert_array_equal(cog.read(1, window=window.round_offsets().round_lengths()), scene["sod"])


@pytest.mark.parametrize("name", REAL)
def test_real_swaths_lie_where_their_tie_points_say(shared, tmp_path, name):
    real = open_scene(
        shared / "sea_ice/s1_ew_hv_sigma0" / name, channels=["hv"], units="1", quantity="sigma0", nodata="none"
    )
    rows, columns, lon, lat = (real[f"gcp_{k}"].values for k in ("row", "col", "lon", "lat"))
    inside = (rows > 1) & (rows < real.sizes["y"] - 1) & (columns > 1) & (columns < real.sizes["x"] - 1)
    assert inside.sum() > 50
    scene, known = numbered(real), [v[inside] for v in (rows, columns, lon, lat)]
    finest = offsets(scene, tmp_path, *known, spacing_m=10.0)
    assert np.isfinite(finest).all() and finest.max() < 1.0
    usual = offsets(scene, tmp_path, *known)
    assert np.isfinite(usual).all() and usual.max() < 1.5  # half a pixel of the map, turned, and half of the scene
    truth = Transformer.from_crs(4326, 3413, always_xy=True).transform(lon, lat)
    metres = np.hypot(*(np.array(PixelMap(real, 3413).to_map(rows, columns)) - truth))
    assert metres.max() < 0.01  # the plate goes through every tie point


def test_there_and_back_agree_between_the_tie_points():
    scene = swath(over_the_pole)
    points = np.stack([scene[f"gcp_{k}"].values for k in ("row", "col", "lon", "lat")], axis=1)
    there = PixelMap(scene, 3413)
    for row, column in np.random.default_rng(0).uniform((1, 1), (599, 699), (50, 2)):
        x, y = there.to_map(np.array([row]), np.array([column]))
        back = there.to_scene(x, y)
        assert abs(back[0].item() - row) < 0.01 and abs(back[1].item() - column) < 0.01
        lon, lat = tie_point_lonlat(points, np.array([row]), np.array([column]))
        onto = Transformer.from_crs(4326, 3413, always_xy=True).transform(lon.item(), lat.item())
        assert np.hypot(onto[0] - x.item(), onto[1] - y.item()) < 1


def test_parts_and_coarser_scenes_lie_in_the_same_place(tmp_path):
    scene = numbered(swath(over_the_pole))
    part = scene.isel(y=slice(200, 400), x=slice(100, 500))
    with (
        rasterio.open(write_cog(scene, tmp_path / "whole.tif", spacing_m=400.0)) as whole,
        rasterio.open(write_cog(part, tmp_path / "part.tif", spacing_m=400.0)) as cut,
    ):
        window = rasterio.windows.from_bounds(*cut.bounds, whole.transform).round_offsets().round_lengths()
        small, large = cut.read(1), whole.read(1, window=window, boundless=True, fill_value=255)
    both = small != 255
    assert (small[both] == large[both]).mean() > 0.999 and both.sum() > 70_000
    coarse = part.isel(y=slice(2, None, 5), x=slice(2, None, 5))
    with rasterio.open(write_cog(coarse, tmp_path / "coarse.tif", spacing_m=400.0)) as cut:
        window = rasterio.windows.from_bounds(*cut.bounds, whole.transform).round_offsets().round_lengths()
        assert cut.width > 300 and cut.bounds.left == pytest.approx(whole.bounds.left, abs=1e5)
        assert (cut.read(1) != 255).sum() == pytest.approx(both.sum(), rel=0.02)


def test_scenes_on_a_grid_and_other_projections(tmp_path):
    bands = {"hh": np.zeros((300, 400), np.float32)}
    place = {"crs": "EPSG:32633", "transform": from_origin(500_000, 8_700_000, 40, 40)}
    scene = numbered(make_scene(bands, units="dB", quantity="sigma0", **place))
    with rasterio.open(write_cog(scene, tmp_path / "same.tif", crs=32633)) as cog:
        np.testing.assert_array_equal(cog.read(1), scene["sod"])
    rows, columns = np.array([10.5, 150.5, 299.5]), np.array([10.5, 399.5, 0.5])
    lonlat = Transformer.from_crs(32633, 4326, always_xy=True).transform(500_000 + 40 * columns, 8_700_000 - 40 * rows)
    assert offsets(scene, tmp_path, rows, columns, *lonlat, crs=3413, spacing_m=20.0).max() <= 1
    south = swath(over_the_pole, crs=3031)
    with rasterio.open(write_cog(numbered(south), tmp_path / "south.tif", crs=3031)) as cog:
        assert cog.crs.to_epsg() == 3031 and (cog.read(1) != 255).sum() > 300_000


def test_labels_without_colours_get_some(tmp_path):
    scene = numbered(swath(over_the_pole))
    del scene["sod"].attrs["flag_colors"]
    with rasterio.open(write_cog(scene, tmp_path / "sod.tif")) as cog:
        assert len({cog.colormap(1)[k] for k in range(6)}) == 6


def test_refusals(tmp_path):
    scene = numbered(swath(over_the_pole))
    with pytest.raises(ValueError, match="projected"):
        write_cog(scene, tmp_path / "a.tif", crs=4326)
    with pytest.raises(ValueError, match="layer="):
        write_cog(scene.assign(floe=chart_label(np.zeros((600, 700), np.uint8), "floe")), tmp_path / "a.tif")
    with pytest.raises(ValueError, match="int64"):
        write_cog(scene.assign(sod=scene["sod"].astype("int64").assign_attrs(scene["sod"].attrs)), tmp_path / "a.tif")
    with pytest.raises(ValueError, match="tie points nor a CRS"):
        write_cog(scene.drop_vars(["gcp_row", "gcp_col", "gcp_lon", "gcp_lat"]), tmp_path / "a.tif")
    with pytest.raises(ValueError, match="spacing"):
        write_cog(scene, tmp_path / "a.tif", spacing_m=-1.0)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_map(tmp_path):
    import subprocess
    import sys

    code = (
        "import resource, sys, pathlib; sys.path.insert(0, sys.argv[1]); import numpy as np, test_export as t;"
        "s = t.numbered(t.swath(t.over_the_pole)); s['row'][:] = np.random.default_rng(0).normal(size=s['row'].shape);"
        "t.write_cog(s, sys.argv[2] + '/small.tif');"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000));"
        "t.write_cog(s, sys.argv[2] + '/large.tif', layer='row')"
    )
    folder = str(__import__("pathlib").Path(__file__).parent)
    ran = subprocess.run([sys.executable, "-c", code, folder, str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 1, (ran.returncode, ran.stderr[-800:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.tif", "small.tif.aux.xml"]


@pytest.mark.parametrize("dy", [-10.0, 10.0])
def test_a_scene_on_a_grid_keeps_it_corner_to_corner(tmp_path, dy):
    """224 px stay 224 px, class by class and number by number, in the scene's own system and spacing."""
    height = np.random.default_rng(0).normal(12, 3, (224, 224)).astype(np.float32)
    height[:9] = np.nan
    coords = {"y": 5e6 + dy * (np.arange(224) + 0.5), "x": 5e5 + 10 * (np.arange(224) + 0.5)}
    place = make_scene(
        {"vv": height}, units="dB", quantity="sigma0", crs="EPSG:32633", transform=from_origin(0, 0, 1, 1)
    )
    layers = {
        "height": (("y", "x"), height, {"units": "m"}),
        "stage": chart_label((np.arange(224 * 224) % 6).astype(np.uint8).reshape(224, 224), "sod"),
    }
    scene = xr.Dataset(layers, coords=coords | {"spatial_ref": place["spatial_ref"]})
    with rasterio.open(write_cog(scene, tmp_path / "height.tif", layer="height")) as cog:
        np.testing.assert_array_equal(cog.read(1), height)
        assert cog.transform == rasterio.Affine(10, 0, 5e5, 0, dy, 5e6) and cog.crs.to_epsg() == 32633
        assert cog.dtypes == ("float32",) and cog.units == ("m",) and np.isnan(cog.nodata)
    with rasterio.open(write_cog(scene, tmp_path / "stage.tif")) as cog:
        np.testing.assert_array_equal(cog.read(1), scene["stage"])


def test_degrees_are_kept_and_an_asked_for_map_is_laid_out(tmp_path):
    coords = {"y": 6 - 0.001 * np.arange(300), "x": 116 + 0.001 * np.arange(400)}
    field = {"vv": np.zeros((3, 3), np.float32)}
    place = make_scene(field, units="dB", quantity="sigma0", crs="EPSG:4326", transform=from_origin(0, 0, 1, 1))
    scene = numbered(
        xr.Dataset(coords=coords | {"spatial_ref": place["spatial_ref"]}).assign(a=(("y", "x"), np.zeros((300, 400))))
    )
    with rasterio.open(write_cog(scene, tmp_path / "own.tif")) as cog:
        assert cog.crs.to_epsg() == 4326 and cog.shape == (300, 400)
        np.testing.assert_array_equal(cog.read(1), scene["sod"])
    with rasterio.open(write_cog(scene, tmp_path / "utm.tif", crs=32650, spacing_m=111.0)) as cog:
        assert cog.crs.to_epsg() == 32650 and cog.res == (111.0, 111.0)


def test_a_swath_gets_the_system_that_fits(tmp_path):
    scene = numbered(swath(over_the_pole))
    with rasterio.open(write_cog(scene, tmp_path / "pole.tif")) as cog:
        assert cog.crs.to_epsg() == 3413
    tropics = swath(lambda row, column: (6e5 + 10 * column, 7e5 - 10 * row), 200, 300, crs=32650)
    with rasterio.open(write_cog(numbered(tropics), tmp_path / "borneo.tif", spacing_m=10.0)) as cog:
        assert cog.crs.to_epsg() == 32650
        assert np.allclose(cog.bounds, (6e5, 7e5 - 2000, 6e5 + 3000, 7e5), atol=10)


def test_names_stand_where_gis_programs_look(tmp_path):
    path = write_cog(numbered(swath(over_the_pole)), tmp_path / "sod.tif")
    text = (tmp_path / "sod.tif.aux.xml").read_text()
    assert text.count("<Category>") == 6 and "<Category>new_ice</Category>" in text
    with rasterio.open(path) as cog:
        assert cog.count == 1
