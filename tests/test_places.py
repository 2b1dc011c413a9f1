"""Where scenes and labels lie: grids written in every way, labels from elsewhere, the date line, few tie points, one row."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
from pyproj import CRS, Geod, Transformer
from rasterio.transform import from_origin

from sarfm.datasets.entries import load_entry
from sarfm.datasets.files import open_scene as open_entry_scene
from sarfm.datasets.files import scenes as entry_scenes
from sarfm.evaluation.export import write_cog
from sarfm.patches.contract import InputContract
from sarfm.patches.prepare import write_store
from sarfm.patches.store import patch_corners
from sarfm.scenes.open import OpenQuestion, open_scene, save_scene
from sarfm.scenes.place import PixelMap
from sarfm.scenes.scene import make_scene
from sarfm.viz.maps import scene_map
from sarfm.viz.projection import project_scene

H, W = 40, 60
RNG = np.random.default_rng(0)
DB = RNG.normal(-12, 2, (H, W)).astype("float32")
LABEL = (np.add.outer(np.arange(H) // 8, np.arange(W) // 6) % 2).astype("uint8")
MEANINGS = {"ice": {0: "water", 1: "ice"}}
POLAR = CRS.from_epsg(3413)
Y, X = -1.5e6 - 1000.0 * np.arange(H), -5e5 + 1000.0 * np.arange(W)
SIGMA = {"quantity": "sigma0"}
IN_DB = {"units": "dB", "quantity": "sigma0"}
UTM = {"crs": "EPSG:32633", "transform": from_origin(5e5, 6e6, 10, 10)}
GEOD = Geod(ellps="WGS84")
CF = {key: value for key, value in POLAR.to_cf().items() if key != "crs_wkt"}


def grid(path, dims=("y", "x"), values=DB, scale=1.0, unit="m", mapping=CF, named="map", **more):
    """Write a polar grid of 1 km as somebody else would."""
    units = {} if unit is None else {"units": unit}
    data = xr.Dataset(coords={"y": ("y", Y * scale, units), "x": ("x", X * scale, units)})
    data["vv"] = (dims, values, {"units": "dB"} | ({"grid_mapping": named} if named else {}))
    data = data.assign({name: ((), 0, attrs) for name, attrs in ({} if mapping is None else {"map": mapping}).items()})
    data.assign(more).to_netcdf(path)
    return path


def tif(path, values, **profile):
    """Write a GeoTIFF."""
    values = values if values.ndim == 3 else values[None]
    profile = {"driver": "GTiff", "count": len(values), "dtype": values.dtype, **UTM, **profile}
    with (
        warnings.catch_warnings(action="ignore"),
        rasterio.open(path, "w", height=values.shape[1], width=values.shape[2], **profile) as out,
    ):
        out.write(values)
        out.set_band_description(1, "VV") if values.dtype == np.float32 else None
        out.set_band_unit(1, "dB") if values.dtype == np.float32 else None
    return path


def in_place(scene, tolerance_m=1.0):
    """Tell whether every pixel lies where the polar grid has it."""
    lon, lat = Transformer.from_crs(POLAR, 4326, always_xy=True).transform(*np.meshgrid(X, Y))
    return GEOD.inv(*(v.values for v in scene.sar.lonlat()), lon, lat)[2].max() < tolerance_m


@pytest.mark.parametrize(
    "scale, unit", [(1.0, "m"), (1e-3, "km"), (1e-5, "100  km"), (1 / 0.3048, "feet"), (1.0, None)]
)
def test_kilometre_coordinates_are_metres(tmp_path, scale, unit):
    scene = open_scene(grid(tmp_path / "f.nc", scale=scale, unit=unit), **SIGMA)
    assert scene.sar.spacing_m == pytest.approx(1000) and in_place(scene)


def test_a_unit_that_is_no_length_loses_the_place_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="lost its place.*'pixels'"):
        scene = open_scene(grid(tmp_path / "f.nc", unit="pixels"), **SIGMA)
    assert scene.sar.spacing_m is None


def test_of_two_grid_mappings_the_variables_own_counts(tmp_path):
    other = ((), 0, {"crs_wkt": CRS.from_epsg(32633).to_wkt()})
    assert in_place(open_scene(grid(tmp_path / "a.nc", aaa=other), **SIGMA))
    assert in_place(open_scene(grid(tmp_path / "b.nc", named="map: x y aaa: lat lon", aaa=other), **SIGMA))
    with pytest.warns(UserWarning, match="names none of them"):
        lost = open_scene(grid(tmp_path / "c.nc", named=None, aaa=other), **SIGMA)
    assert lost.sar.spacing_m is None and in_place(open_scene(tmp_path / "c.nc", crs=3413, **SIGMA))


@pytest.mark.parametrize("dims", [("x", "y"), ("y", "x", "time"), ("x", "time", "y"), ("time", "x", "y")])
def test_columns_first_and_dates_last_are_put_in_order(tmp_path, dims):
    values = xr.DataArray(np.stack([DB, DB + 1]), dims=("time", "y", "x"))
    values = values.transpose(*dims) if "time" in dims else values[0].transpose(*dims)
    dates = {"time": ("time", np.array(["2020-01-01", "2020-07-01"], "datetime64[ns]"))} if "time" in dims else {}
    scene = open_scene(grid(tmp_path / "f.nc", dims, values.values, **dates), **SIGMA)
    assert np.array_equal(scene.vv.values, np.stack([DB, DB + 1]) if "time" in dims else DB) and in_place(scene)


def test_axes_are_told_by_their_attributes_before_their_names(tmp_path):
    data = xr.open_dataset(grid(tmp_path / "f.nc")).load().rename(x="a", y="b")
    data.a.attrs["axis"], data.b.attrs["standard_name"] = "X", "projection_y_coordinate"
    data.vv.attrs["grid_mapping"] = "map"
    data.transpose("a", "b").to_netcdf(tmp_path / "g.nc")
    scene = open_scene(tmp_path / "g.nc", **SIGMA)
    assert np.array_equal(scene.vv, DB) and in_place(scene)


@pytest.mark.parametrize("mapping", [CF, {"crs_wkt": POLAR.to_wkt()}, {"spatial_ref": POLAR.to_wkt()}, {"epsg_code": "EPSG:3413"},
    {"proj4": "+proj=stere +lat_0=90 +lat_ts=70 +lon_0=-45 +datum=WGS84 +units=m"}])  # fmt: skip
def test_a_reference_system_in_any_spelling(tmp_path, mapping):
    assert in_place(open_scene(grid(tmp_path / "f.nc", mapping=mapping), **SIGMA))


@pytest.mark.parametrize("mapping, named", [(None, None), (None, "map"), ({"grid_mapping_name": "nonsense"}, "map")])
def test_a_lost_place_is_said_and_crs_answers(tmp_path, mapping, named):
    path = grid(tmp_path / "f.nc", mapping=mapping, named=named)
    with pytest.warns(UserWarning, match=r"f\.nc has lost its place.*crs="):
        assert "spatial_ref" not in open_scene(path, **SIGMA).coords
    assert in_place(open_scene(path, crs="EPSG:3413", **SIGMA))


@pytest.mark.parametrize("scale, unit", [(1e-3, "km"), (1, "m"), (1, None), (1, "pixels"), (1 / 0.3048, "ft")])
def test_an_answered_crs_counts_in_the_unit_of_the_coordinates(tmp_path, scale, unit):
    path = grid(tmp_path / "a.nc", scale=scale, unit=unit, mapping=None, named=None)
    assert in_place(open_scene(path, crs=3413, **SIGMA))
    with pytest.raises(ValueError, match="fit WGS 84|latitudes up to 90"):
        open_scene(path, crs=4326, **SIGMA)


def test_metres_are_no_degrees(tmp_path):
    with pytest.raises(ValueError, match="expected latitudes up to 90, got rows from 6e"):
        open_scene(tif(tmp_path / "a.tif", DB, crs="EPSG:4326"), **SIGMA)
    rows = np.linspace(90, -90, 37)  # a global grid may have rows on both poles
    scene = make_scene({"vv": np.resize(DB, (37, 72))}, crs=4326, transform=(5, 0, -180, 0, -5, 92.5), **IN_DB)
    assert np.allclose(scene.y, rows)


@pytest.mark.parametrize("kind", ["GDAL", "GeoZarr", "nothing"])
def test_a_transform_without_coordinates(tmp_path, kind):
    data = xr.Dataset({"vv": (("y", "x"), DB, {"units": "dB", "grid_mapping": "map"})})
    data["map"] = ((), 0, {"crs_wkt": POLAR.to_wkt()})
    if kind == "GDAL":
        data["map"].attrs["GeoTransform"] = f"{X[0] - 500} 1000 0 {Y[0] + 500} 0 -1000"
    if kind == "GeoZarr":
        data = data.drop_vars("map").assign_attrs({"proj:code": "EPSG:3413"})
        data.attrs["spatial:transform"] = [1000.0, 0.0, X[0] - 500, 0.0, -1000.0, Y[0] + 500]
        del data.vv.attrs["grid_mapping"]
    data.to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=False)
    if kind == "nothing":
        with pytest.warns(UserWarning, match="neither coordinates nor a transform"):
            open_scene(tmp_path / "a.zarr", **SIGMA)
    else:
        assert in_place(open_scene(tmp_path / "a.zarr", **SIGMA))


@pytest.mark.parametrize("dates, moved, known", [(1, 0.0, True), (2, 0.0, True), (2, 0.5, False)])
def test_images_of_longitude_for_every_date(tmp_path, dates, moved, known):
    lonlat = Transformer.from_crs(POLAR, 4326, always_xy=True).transform(*np.meshgrid(X, Y))
    data = xr.Dataset()
    for name, values in zip(("lon", "lat"), lonlat, strict=True):
        shift = moved * np.arange(dates)[:, None, None]
        data[name] = (
            ("time", "row", "col"),
            values + shift,
            {"units": {"lon": "degrees_east", "lat": "degrees_north"}[name]},
        )
    data["vv"] = (("time", "row", "col"), np.stack([DB] * dates), {"units": "dB"})
    data.to_netcdf(tmp_path / "a.nc")
    answers = {"times": [f"2020-01-0{k + 1}" for k in range(dates)] if dates > 1 else None} | SIGMA
    if known:
        assert in_place(open_scene(tmp_path / "a.nc", **answers), 30)
    else:
        with pytest.warns(UserWarning, match="differ from date to date"):
            assert open_scene(tmp_path / "a.nc", **answers).sar.spacing_m is None


def test_crs_never_overrules_a_file(tmp_path):
    with pytest.raises(ValueError, match="states WGS 84 / UTM zone 33N"):
        open_scene(tif(tmp_path / "a.tif", DB), crs=3413, **SIGMA)
    save_scene(open_scene(tmp_path / "a.tif", **SIGMA), tmp_path / "a.nc")
    with pytest.raises(ValueError, match="states WGS 84 / UTM zone 33N"):
        open_scene(tmp_path / "a.nc", crs=3413)
    tif(tmp_path / "chip.tif", DB, crs=None, transform=rasterio.Affine.identity())
    with pytest.raises(ValueError, match="no coordinates"):
        open_scene(tmp_path / "chip.tif", crs=3413, **SIGMA)


def test_a_tiff_with_half_a_place(tmp_path):
    with pytest.warns(UserWarning, match="a transform, but no reference system"):
        open_scene(tif(tmp_path / "a.tif", DB, crs=None), **SIGMA)
    assert open_scene(tmp_path / "a.tif", crs=32633, **SIGMA).sar.spacing_m == 10
    with pytest.warns(UserWarning, match="no transform"):
        assert (
            open_scene(tif(tmp_path / "b.tif", DB, transform=rasterio.Affine.identity()), **SIGMA).sar.spacing_m is None
        )


def test_longitudes_in_32_bits(tmp_path):
    lon, lat = (119 + 1e-4 * np.arange(W)).astype("f4"), (5.4 - 1e-4 * np.arange(H)).astype("f4")
    coords = {"lat": ("lat", lat, {"units": "degrees_north"}), "lon": ("lon", lon, {"units": "degrees_east"})}
    xr.Dataset({"vv": (("lat", "lon"), DB, {"units": "dB"})}, coords).to_netcdf(tmp_path / "f.nc")
    scene = open_scene(tmp_path / "f.nc", **SIGMA)
    assert scene.sar.spacing_m == pytest.approx(11.1, abs=0.1) and float(scene.x[-1]) == pytest.approx(
        lon[-1], abs=1e-5
    )


@pytest.mark.parametrize("named", [("lat", "lon"), ("nav_lat", "nav_lon"), ("a", "b")])
@pytest.mark.parametrize("turned", [False, True])
def test_images_of_longitude_and_latitude_are_tie_points(tmp_path, named, turned):
    lon, lat = Transformer.from_crs(POLAR, 4326, always_xy=True).transform(*np.meshgrid(X, Y))
    lat[:3, :3] = np.nan
    images = {named[0]: (lat, "degrees_north"), named[1]: (lon, "degrees_east")}
    data = xr.Dataset({n: (("line", "sample"), v.astype("f4"), {"units": u}) for n, (v, u) in images.items()})
    data = data.assign(vv=(("line", "sample"), DB, {"units": "dB"}))
    (data.transpose("sample", "line") if turned else data).to_netcdf(tmp_path / "f.nc")
    scene = open_scene(tmp_path / "f.nc", **SIGMA)
    assert np.array_equal(scene.vv, DB) and in_place(scene, 5)


def test_an_unknown_spacing_is_said_to_a_model_that_has_one():
    contract = InputContract(
        channels=["vv"], quantity="sigma0", units="dB", mean=[-12], std=[2], patch_size=8, spacing_m=10.0
    )
    with pytest.warns(UserWarning, match="states neither a place nor a spacing"):
        contract.check(make_scene({"vv": DB}, **IN_DB))
    with warnings.catch_warnings(action="error"):
        contract.check(make_scene({"vv": DB}, attrs={"spacing_m": 10.0}, **IN_DB))


ELSEWHERE = {
    "shifted": {"transform": from_origin(5e5 + 10, 6e6, 10, 10)},
    "half a pixel": {"transform": from_origin(5e5, 6e6 + 5, 10, 10)},
    "other zone": {"crs": "EPSG:32632"},
    "other pixel size": {"transform": from_origin(5e5, 6e6, 20, 20)},
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_label_on_another_grid_is_refused(tmp_path, kind):
    tif(tmp_path / "a.tif", DB), tif(tmp_path / "l.tif", LABEL, **ELSEWHERE[kind])
    with pytest.raises(ValueError, match=r"l\.tif does not lie on .*a\.tif.*px elsewhere"):
        open_scene(tmp_path / "a.tif", labels={"ice": tmp_path / "l.tif"}, label_meanings=MEANINGS, **SIGMA)


@pytest.mark.parametrize("down, left", [(True, False), (False, True), (True, True)])
def test_a_label_upside_down_is_turned_and_said(tmp_path, down, left):
    transform = rasterio.Affine(
        -10 if left else 10, 0, 5e5 + 10 * W * left, 0, 10 if down else -10, 6e6 - 10 * H * down
    )
    tif(tmp_path / "a.tif", DB)
    tif(
        tmp_path / "l.tif", np.ascontiguousarray(LABEL[:: -1 if down else 1, :: -1 if left else 1]), transform=transform
    )
    with pytest.warns(UserWarning, match="the other way round"):
        scene = open_scene(tmp_path / "a.tif", labels={"ice": tmp_path / "l.tif"}, label_meanings=MEANINGS, **SIGMA)
    assert np.array_equal(scene.ice, LABEL)


@pytest.mark.parametrize("silent", ["label", "image", "both"])
def test_a_transform_without_a_system_is_compared_too(tmp_path, silent):
    image, label = ({"crs": None} if silent in (kind, "both") else {} for kind in ("image", "label"))
    tif(tmp_path / "a.tif", DB, **image)
    labelled = {"labels": {"ice": tmp_path / "l.tif"}, "label_meanings": MEANINGS}
    with warnings.catch_warnings(action="ignore"):
        tif(tmp_path / "l.tif", LABEL[::-1], transform=rasterio.Affine(10, 0, 5e5, 0, 10, 6e6 - 10 * H), **label)
        assert np.array_equal(open_scene(tmp_path / "a.tif", **labelled, **SIGMA).ice, LABEL)
        tif(tmp_path / "l.tif", LABEL, transform=rasterio.Affine(1, 0, 0, 0, -1, H), **label)  # a count of pixels
        if silent != "image":
            assert np.array_equal(open_scene(tmp_path / "a.tif", **labelled, **SIGMA).ice, LABEL)
        tif(tmp_path / "l.tif", LABEL, transform=from_origin(5e5 + 10, 6e6, 10, 10), **label)
        with pytest.raises(ValueError, match="up to 1 px elsewhere"):
            open_scene(tmp_path / "a.tif", **labelled, **SIGMA)


def test_a_label_of_the_same_grid_in_other_words(tmp_path):
    (
        tif(tmp_path / "a.tif", DB),
        tif(tmp_path / "l.tif", LABEL, crs="EPSG:25833"),
        tif(tmp_path / "m.tif", LABEL, crs=None),
    )
    for name in ("l.tif", "m.tif"):
        scene = open_scene(tmp_path / "a.tif", labels={"ice": tmp_path / name}, label_meanings=MEANINGS, **SIGMA)
        assert np.array_equal(scene.ice, LABEL)


def test_a_label_of_a_data_set_is_held_to_its_image(tmp_path):
    entry = tmp_path / "own.yaml"
    entry.write_text(ENTRY)
    (tmp_path / "d").mkdir()
    tif(tmp_path / "d" / "a_vv.tif", DB), tif(tmp_path / "d" / "a_ice.tif", LABEL, **ELSEWHERE["shifted"])
    own = load_entry(entry)
    with pytest.raises(ValueError, match=r"a_ice\.tif does not lie on .*a_vv\.tif"):
        open_entry_scene(own, entry_scenes(own, tmp_path / "d")["a"])
    tif(tmp_path / "d" / "a_ice.tif", LABEL)
    assert np.array_equal(open_entry_scene(own, entry_scenes(own, tmp_path / "d")["a"]).ice, LABEL)


def test_polarisations_are_compared_as_places(tmp_path):
    tif(tmp_path / "vv.tif", DB), tif(tmp_path / "vh.tif", DB - 7, crs="EPSG:25833")
    tif(tmp_path / "hv.tif", DB, transform=rasterio.Affine(10, 0, 5e5, 0, 10, 6e6 - 10 * H))
    paths = lambda other: [tmp_path / "vv.tif", tmp_path / f"{other}.tif"]
    with rasterio.open(tmp_path / "vh.tif", "r+") as f:
        f.set_band_description(1, "VH")
    assert open_scene(paths("vh"), **SIGMA).sar.polarisations == ["vv", "vh"]
    with rasterio.open(tmp_path / "hv.tif", "r+") as f:
        f.set_band_description(1, "HV")
    with pytest.raises(ValueError, match=r"hv\.tif is the other way round"):
        open_scene(paths("hv"), **SIGMA)


def test_a_picture_is_no_label_and_grey_in_three_bands_is_one(tmp_path):
    ask = {"labels": {"ice": tmp_path / "l.tif"}, "label_meanings": MEANINGS, **SIGMA}
    tif(tmp_path / "a.tif", DB), tif(tmp_path / "l.tif", np.stack([LABEL, 2 * LABEL, LABEL]))
    with pytest.raises(ValueError, match=r"l\.tif: expected one band of codes for 'ice'"):
        open_scene(tmp_path / "a.tif", **ask)
    tif(tmp_path / "l.tif", np.stack([LABEL] * 3))
    assert np.array_equal(open_scene(tmp_path / "a.tif", **ask).ice, LABEL)


def test_a_label_in_floats(tmp_path):
    ask = {"labels": {"ice": tmp_path / "l.tif"}, "label_meanings": MEANINGS, **SIGMA}
    tif(tmp_path / "a.tif", DB), tif(tmp_path / "l.tif", LABEL.astype("f8"))
    scene = open_scene(tmp_path / "a.tif", **ask)
    assert np.array_equal(scene.ice, LABEL) and scene.ice.dtype == np.uint8
    tif(tmp_path / "l.tif", LABEL * 0.5)
    with pytest.raises(ValueError, match=r"l\.tif: ice: expected integer codes, got fractions"):
        open_scene(tmp_path / "a.tif", **ask)


@pytest.mark.parametrize("kind", ["nc", "zarr2", "zarr3"])
@pytest.mark.parametrize("dtype, fill", [("u1", 255), ("i2", -1), ("i4", -2147483647)])
@pytest.mark.parametrize("beside", [False, True])
def test_a_label_with_a_fill_value_is_read_as_codes(tmp_path, kind, dtype, fill, beside):
    codes = LABEL.astype(dtype)
    codes[30:] = fill
    image = {"vv": (("y", "x"), DB, {"units": "dB"})}
    data = xr.Dataset(({} if beside else image) | {"ice": (("x", "y"), codes.T)})
    path, first = tmp_path / f"f.{kind[:4]}", tmp_path / "a.nc"
    encoding = {"ice": {"_FillValue": np.dtype(dtype).type(fill)}}
    if kind == "nc":
        data.to_netcdf(path, encoding=encoding)
    else:
        data.to_zarr(path, encoding=encoding, zarr_format=int(kind[-1]), consolidated=False)
    xr.Dataset(image).to_netcdf(first)
    scene = open_scene(
        first if beside else path, labels={"ice": path if beside else "ice"}, label_meanings=MEANINGS, **SIGMA
    )
    assert scene.ice.dtype == np.uint8 and np.array_equal(scene.ice, np.where(np.arange(H)[:, None] < 30, LABEL, 255))


@pytest.mark.parametrize("kind", ["nc", "h5", "zarr"])
def test_images_in_groups_are_asked_for_by_name(tmp_path, kind):
    path = tmp_path / f"g.{kind}"
    image = xr.Dataset({"vv": (("y", "x"), DB, {"units": "dB"})})
    write = image.to_zarr if kind == "zarr" else image.to_netcdf
    write(path, group="measurement/iw1")
    with pytest.raises(OpenQuestion, match=r"group=…  .*\['measurement/iw1'\]"):
        open_scene(path, **SIGMA)
    assert np.array_equal(open_scene(path, group="measurement/iw1", **SIGMA).vv, DB)
    with pytest.raises(ValueError, match="no group 'iw1'; its groups are"):
        open_scene(path, group="iw1", **SIGMA)


def test_a_group_has_the_coordinates_of_its_parents(tmp_path):
    path = grid(tmp_path / "g.nc")
    data = xr.open_dataset(path).load()
    data.drop_vars("vv").to_netcdf(tmp_path / "h.nc")
    data[["vv"]].drop_vars(["x", "y"]).to_netcdf(tmp_path / "h.nc", group="measurement", mode="a")
    assert in_place(open_scene(tmp_path / "h.nc", group="measurement", **SIGMA))


def test_a_file_of_profiles_has_no_image(tmp_path):
    xr.Dataset({"vv": (("t",), DB[0]), "u": ((), 1)}).to_netcdf(tmp_path / "p.nc")
    with pytest.raises(ValueError, match=r"p\.nc has none; it holds \['vv', 'u'\]"):
        open_scene(tmp_path / "p.nc", **SIGMA)


def geographic(lon, lat=75.0, step=0.01):
    """Make a labelled scene in degrees."""
    return make_scene(
        {"vv": DB}, crs=4326, transform=(step, 0, lon, 0, -step, lat), labels={"ice": (LABEL, MEANINGS["ice"])}, **IN_DB
    )


@pytest.mark.parametrize("lon", [10, 190, 179.7, 359.7, -180.3, -170, 539.7])
def test_longitudes_beyond_180_are_shown_whole(tmp_path, lon):
    scene = geographic(lon)
    areas = []
    for one in (scene, geographic(-45.3)):
        with rasterio.open(write_cog(one, tmp_path / "m.tif", crs=3413)) as cog:
            areas.append((cog.read(1) != 255).sum() * cog.res[0] ** 2)
    assert areas[0] == pytest.approx(areas[1], rel=0.02) and np.mean(project_scene(scene).rows >= 0) > 0.25
    pixels = PixelMap(scene, POLAR)
    rows, columns = np.meshgrid(np.arange(H) + 0.5, np.arange(W) + 0.5, indexing="ij")
    assert np.allclose(pixels.to_scene(*pixels.to_map(rows, columns)), (rows, columns), atol=1e-4)
    assert abs(scene.sar.lonlat()[0]).max() <= 180 and scene_map(scene) is not None
    with rasterio.open(write_cog(scene, tmp_path / "own.tif")) as own:
        assert np.array_equal(own.read(1), LABEL)


def test_a_cap_in_degrees_is_shown_around_the_pole():
    scene = make_scene({"vv": np.zeros((40, 360))}, crs=4326, transform=(1, 0, 0, 0, -0.25, 90), **IN_DB)
    grid = project_scene(scene, max_px=200)
    lon, lat = grid.lonlat(*grid.to_map(grid.rows[100, 60] + 0.5, grid.columns[100, 60] + 0.5))
    assert np.mean(grid.rows >= 0) == pytest.approx(np.pi / 4, abs=0.02) and lat > 80
    for at in ((60, 60), (100, 150), (150, 101)):
        place = grid.pixels.to_map(grid.rows[at] + 0.5, grid.columns[at] + 0.5)
        x0, y0, x1, y1 = grid.bounds
        shown = x0 + (at[1] + 0.5) / grid.rows.shape[1] * (x1 - x0), y1 - (at[0] + 0.5) / grid.rows.shape[0] * (y1 - y0)
        assert np.hypot(*np.subtract(place, shown)) < 30_000


@pytest.mark.parametrize("crs, at", [(3031, (1e6, 1.2e6)), (32733, (5e5, 7e6)), (3413, (-5e5, -1.5e6))])
def test_a_map_keeps_the_scenes_own_grid(tmp_path, crs, at):
    scene = make_scene(
        {"vv": DB}, crs=crs, transform=(40, 0, at[0], 0, -40, at[1]), labels={"ice": (LABEL, MEANINGS["ice"])}, **IN_DB
    )
    for chosen in (None, crs):
        with rasterio.open(write_cog(scene, tmp_path / "m.tif", crs=chosen)) as cog:
            assert (
                cog.shape == (H, W)
                and cog.transform[:6] == (40, 0, at[0], 0, -40, at[1])
                and np.array_equal(cog.read(1), LABEL)
            )


@pytest.mark.parametrize("crs, lon, lat", [(3413, 10, -70), (3031, 10, 70), (3857, 179.7, 60), (3413, 10, -50)])
def test_a_map_many_times_larger_than_its_scene_is_refused(tmp_path, crs, lon, lat):
    with pytest.raises(
        ValueError, match=r"stretches the scene of 40 × 60 px to a map of \d+ × \d+ px; choose a system"
    ):
        write_cog(geographic(lon, lat), tmp_path / "m.tif", crs=crs)
    assert not list(tmp_path.iterdir())


def tied(rows, columns, size=(64, 64), px=40.0, turn=0.2):
    """Make a turned scene in UTM that knows its place by tie points only, and how far off its pixels are."""
    row, column = (v.ravel().astype(float) for v in np.meshgrid(rows, columns, indexing="ij"))
    c, s = np.cos(turn) * px, np.sin(turn) * px
    where = lambda r, k: (5e5 + c * k + s * r, 8.3e6 + s * k - c * r)
    lon, lat = Transformer.from_crs(32633, 4326, always_xy=True).transform(*where(row, column))
    scene = make_scene({"vv": np.zeros(size)}, gcps=np.stack([row, column, lon, lat], -1), **IN_DB)
    found = Transformer.from_crs(4326, 32633, always_xy=True).transform(*(v.values for v in scene.sar.lonlat()))
    truth = where(*np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5, indexing="ij"))
    pixels = PixelMap(scene, 32633)
    back = np.stack(pixels.to_scene(*truth)) - np.stack(
        np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5, indexing="ij")
    )
    return float(np.hypot(*np.subtract(found, truth)).max()), float(abs(back).max())


@pytest.mark.parametrize("rows, columns", [
    ((0, 64), (0, 64)), ((0, 64), np.linspace(0, 64, 8)), (np.linspace(0, 64, 8), (0, 64)), ((64, 32, 0), (64, 0)), ((64, 0), (0, 64)),
    ((0.5, 63.5), (0.5, 63.5))])  # fmt: skip
def test_few_tie_points_are_enough_for_a_small_scene(rows, columns):
    off_m, off_px = tied(rows, columns)
    assert off_m < 1 and off_px < 0.05


def test_three_tie_points_make_a_plane():
    points = np.array([[0, 0, 15, 75], [0, 64, 15.08, 75], [64, 0, 15, 74.98]])
    lon, lat = make_scene({"vv": np.zeros((64, 64))}, gcps=points, **IN_DB).sar.lonlat()
    assert float(lon[0, 63]) == pytest.approx(15 + 0.08 * 63.5 / 64, abs=1e-4) and float(lat[63, 0]) == pytest.approx(
        75 - 0.02 * 63.5 / 64, abs=1e-4
    )


@pytest.mark.parametrize("rows, columns, found", [
    ((10,), np.linspace(0, 64, 8), "8 tie points in 1 row and 8 columns"), (np.linspace(0, 64, 8), (3,), "8 rows and 1 column"),
    ((0, 10_000), np.linspace(0, 10_000, 21), "42 tie points in 2 rows and 21 columns over 4"), ((0, 10_000), (0, 10_000), "2 rows and 2 columns over 4")])  # fmt: skip
def test_degenerate_tie_points_are_refused_and_counted(rows, columns, found):
    with pytest.raises(ValueError, match=found):
        tied(rows, columns)


def test_tie_points_on_a_diagonal_or_twice():
    diagonal = np.stack([np.arange(8) * 8.0, np.arange(8) * 8.0, 15 + np.arange(8) / 100, 75 - np.arange(8) / 100], -1)
    with pytest.raises(ValueError, match="on one line"):
        make_scene({"vv": np.zeros((64, 64))}, gcps=diagonal, **IN_DB).sar.lonlat()
    corners = np.array([[0, 0, 15, 75], [0, 64, 15.08, 75], [64, 0, 15, 74.98], [0, 0, 15.5, 75]])
    with pytest.raises(ValueError, match="contradict"):
        make_scene({"vv": np.zeros((64, 64))}, gcps=corners, **IN_DB).sar.lonlat()


@pytest.mark.parametrize("dx, dy", [(-10, -10), (10, 10), (-10, 10), (10, -10)])
def test_corners_of_patches_are_not_mirrored(tmp_path, dx, dy):
    scene = make_scene({"vv": np.zeros((64, 64))}, crs=32633, transform=(dx, 0, 5e5, 0, dy, 6e6), **IN_DB)
    store = write_store({"a": scene}, tmp_path / "s.zarr", size=32, progress=False)
    x, y = Transformer.from_crs(4326, 32633, always_xy=True).transform(*patch_corners(store, 1).T)
    assert np.allclose(x, 5e5 + dx * np.array([32, 64, 64, 32]), atol=0.1) and np.allclose(
        y, 6e6 + dy * np.array([0, 0, 32, 32]), atol=0.1
    )


def test_attributes_that_no_file_can_hold(tmp_path):
    attrs = {
        "note": None,
        "calibrated": True,
        "flags": [True, False],
        "path": Path("a"),
        "more": {"a": 1},
        "date": np.datetime64("2020-01-01"),
    }
    scene = make_scene({"vv": DB}, attrs=attrs, **IN_DB)
    scene.vv.attrs["thermal_noise_removed"] = False
    again = open_scene(save_scene(scene, tmp_path / "s.nc"))
    assert again.attrs["calibrated"] == 1 and "note" not in again.attrs and again.vv.attrs["thermal_noise_removed"] == 0
    assert (
        again.attrs["date"] == "2020-01-01"
        and scene.attrs["note"] is None
        and scene.vv.attrs["thermal_noise_removed"] is False
    )


@pytest.mark.parametrize("size", [(1, 60), (40, 1), (1, 2)])
def test_a_scene_of_one_row_has_square_pixels(tmp_path, size):
    part = (slice(size[0]), slice(size[1]))
    scene = make_scene(
        {"vv": DB[part]},
        crs=32633,
        transform=(10, 0, 5e5, 0, -10, 6e6),
        labels={"ice": (LABEL[part], MEANINGS["ice"])},
        **IN_DB,
    )
    grid = project_scene(scene)
    assert np.allclose(grid.bounds, (5e5, 6e6 - 10 * size[0], 5e5 + 10 * size[1], 6e6)) and scene.sar.spacing_m == 10
    assert scene_map(scene) is not None
    with rasterio.open(write_cog(scene, tmp_path / "m.tif")) as cog:
        assert cog.transform[:6] == (10, 0, 5e5, 0, -10, 6e6) and np.array_equal(cog.read(1), LABEL[part])


def test_one_pixel_has_no_size():
    scene = make_scene({"vv": DB[:1, :1]}, crs=32633, transform=(10, 0, 5e5, 0, -10, 6e6), **IN_DB)
    with pytest.raises(ValueError, match="one pixel .* of unknown size"):
        project_scene(scene)


ENTRY = """
id: own
title: Own
description: made here
license: CC0-1.0
citation: nobody
crs: EPSG:32633
spacing_m: 10
channels:
  vv: {units: dB, quantity: sigma0}
targets:
  ice: {classes: {0: {name: water}, 1: {name: ice}}}
access: open
read: {scenes: "{scene}_{channel}.tif", targets: {ice: "{scene}_ice.tif"}}
"""


def test_a_map_has_the_codes_of_the_label(tmp_path):
    scene = geographic(10)
    classes = scene.ice.copy(data=np.where(LABEL == 1, np.uint8(4), np.uint8(1))).assign_attrs(
        flag_values=np.array([1, 4], np.uint8), flag_meanings="water sea_ice"
    )
    scene["ice"] = classes.assign_attrs(flag_colors="#0a2a5e #dfe8f0")
    with rasterio.open(write_cog(scene, tmp_path / "m.tif")) as cog:
        assert np.array_equal(cog.read(1), np.where(LABEL == 1, 4, 1)) and cog.colormap(1)[4] == (0xDF, 0xE8, 0xF0, 255)
        assert cog.tags(1)["flag_values"] == "1 4"
    names = (tmp_path / "m.tif.aux.xml").read_text()
    assert (
        "<Category></Category><Category>water</Category>" in names
        and "<Category>sea_ice</Category></CategoryNames>" in names
    )


def on_terrain(path, height, bend=0.0):
    """Write a swath of 40 m with tie points on terrain, seen from the left; say where a pixel of the sea lies."""
    where = lambda r, c, h: (40.0 * c - 1.5 * h + bend * r**2, -2e6 - 40.0 * r)
    row, column = (
        v.ravel() for v in np.meshgrid(np.linspace(0, H * 20, 11), np.linspace(0, W * 20, 13), indexing="ij")
    )
    z = height(row, column)
    lon, lat = Transformer.from_crs(POLAR, 4326, always_xy=True).transform(*where(row, column, z))
    values = np.kron(DB, np.ones((20, 20), "f4"))
    gcps = [rasterio.control.GroundControlPoint(*p) for p in zip(row, column, lon, lat, z, strict=True)]
    tif(path, values, crs=None, transform=rasterio.Affine.identity())
    with rasterio.open(path, "r+") as out:
        out.gcps = gcps, rasterio.CRS.from_epsg(4326)
    return path, lambda scene: GEOD.inv(
        *(v.values[100:700:60, 100:1100:60].ravel() for v in scene.sar.lonlat()),
        *Transformer.from_crs(POLAR, 4326, always_xy=True).transform(*(v.ravel() for v in where(*np.meshgrid(
            np.arange(100, 700, 60) + 0.5, np.arange(100, 1100, 60) + 0.5, indexing="ij"), 0.0))))[2].max()  # fmt: skip


@pytest.mark.parametrize("bend", [0.0, 1e-4])
def test_the_sea_beside_a_plateau_is_in_its_place(tmp_path, bend):
    path, off = on_terrain(tmp_path / "a.tif", lambda r, c: np.where(c > 600, 2000.0, 0.0), bend)
    with pytest.warns(UserWarning, match="heights from 0 to 2000 m, which moves them by up to"):
        assert off(open_scene(path, **SIGMA)) < 40


def test_even_terrain_is_left_alone(tmp_path):
    path, off = on_terrain(tmp_path / "a.tif", lambda r, c: 0 * r)
    with warnings.catch_warnings(action="error"):
        assert off(open_scene(path, **SIGMA)) < 5


def test_heights_that_places_do_not_follow_are_said(tmp_path):
    rng = np.random.default_rng(1)
    path, _ = on_terrain(tmp_path / "a.tif", lambda r, c: 0 * r)
    with rasterio.open(path, "r+") as out:
        points, crs = out.gcps
        for point in points:
            point.x, point.z = point.x + 0.05 * rng.normal(), float(rng.uniform(0, 3000))
        out.gcps = points, crs
    with pytest.warns(UserWarning, match="places don't follow them"):
        open_scene(path, **SIGMA)


def test_variables_of_two_places_are_no_scene(tmp_path):
    image = np.random.default_rng(0).normal(-12, 2, (40, 60)).astype("float32")
    axes = {"y": -1.5e6 - 1000.0 * np.arange(40), "x": -5e5 + 1000.0 * np.arange(60)}
    data = xr.Dataset(coords={name: (name, values, {"units": "m"}) for name, values in axes.items()})
    for name, code, mapping in (("vh", 32633, "aaa"), ("vv", 3413, "crs")):
        data[mapping] = ((), 0, {"crs_wkt": CRS.from_epsg(code).to_wkt()})
        data[name] = (("y", "x"), image, {"units": "dB", "quantity": "sigma0", "grid_mapping": mapping})
    data.to_netcdf(tmp_path / "two.nc")
    with pytest.raises(ValueError, match=r"two\.nc: variables 'vh' and 'vv' state different places"):
        open_scene(tmp_path / "two.nc")
    for name, code in (("vv", 3413), ("vh", 32633)):
        for chosen in ({"channels": [name]}, {"variables": {name: name}}):
            assert (
                CRS.from_wkt(open_scene(tmp_path / "two.nc", **chosen).spatial_ref.attrs["crs_wkt"]).to_epsg() == code
            )
