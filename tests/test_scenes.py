"""Scenes: made, opened, asked about, refused, saved."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401 (the rio accessor)
import xarray as xr

from sarfm.io.files import CorruptData
from sarfm.scenes import rasters
from sarfm.scenes.channels import Channel, Target
from sarfm.scenes.open import OpenQuestion, open_scene, save_scene
from sarfm.scenes.place import tie_point_lonlat
from sarfm.scenes.scene import (
    channel_names,
    check_scene,
    find_channels,
    flag_meanings,
    label_names,
    make_scene,
    spacing_m,
    stack_channels,
)

UTM = {"crs": "EPSG:32633", "transform": (10.0, 0.0, 5e5, 0.0, -10.0, 5e6)}
DB = {"units": "dB", "quantity": "sigma0"}
RNG = np.random.default_rng(0)


def image(*shape):
    return RNG.normal(-14, 3, shape).astype("float32")


def write(path, values, descriptions=None, tags=None, gcps=None, **profile):
    values = values if values.ndim == 3 else values[None]
    profile = {
        "driver": "GTiff",
        "count": len(values),
        "height": values.shape[1],
        "width": values.shape[2],
        "dtype": values.dtype,
    } | profile
    if gcps is None and profile["driver"] == "GTiff" and "crs" not in profile:
        profile |= {"crs": UTM["crs"], "transform": rasterio.Affine(*UTM["transform"])}
    with warnings.catch_warnings(action="ignore"), rasterio.open(path, "w", **profile) as out:
        out.write(values)
        if descriptions:
            out.descriptions = descriptions
        if gcps:
            out.gcps = gcps, rasterio.CRS.from_epsg(4326)
        out.update_tags(**(tags or {}))
    return path


# ---- the contract -------------------------------------------------------------------------------------------------


def test_make_scene_states_everything():
    codes = np.array([[0, 1, 2, 2]] * 3, "uint8")
    scene = make_scene(
        {"VV": image(3, 4), "VH": image(3, 4)},
        **DB,
        **UTM,
        labels={"cover": (codes, {1: "open water", 2: "ice"})},
        attrs={"sensor": "S1"},
    )
    assert (
        list(scene.data_vars) == ["vv", "vh", "valid", "cover"]
        and scene.vv.dtype == np.float32
        and scene.attrs["sensor"] == "S1"
    )
    assert scene.y.values.tolist() == [4999995, 4999985, 4999975] and scene.x.values[0] == 500005
    assert label_names(scene) == ["cover"] and flag_meanings(scene.cover) == {1: "open water", 2: "ice"}
    assert scene.sar.units == "dB" and scene.sar.quantity == "sigma0" and scene.sar.polarisations == ["vv", "vh"]


def test_rio_and_odc_accessors_agree_with_the_contract():
    import odc.geo.xr  # noqa: F401

    scene = make_scene({"vv": image(3, 4)}, **DB, **UTM)
    assert scene.rio.crs.to_epsg() == 32633 and tuple(scene.rio.transform())[:6] == UTM["transform"]
    assert scene.odc.geobox.crs.epsg == 32633 and tuple(scene.odc.geobox.affine)[:6] == UTM["transform"]
    part = scene.sar.window(1, 2, 2, 2)
    assert tuple(part.rio.transform())[:6] == (10, 0, 500020, 0, -10, 4999990)


def test_valid_means_all_polarisations_observed():
    vv, vh = image(4, 4), image(4, 4)
    vv[0, 0], vh[1, 1] = np.nan, -9999
    scene = make_scene({"vv": vv, "vh": vh}, **DB, nodata=-9999, valid=np.arange(16).reshape(4, 4) < 12)
    assert scene.valid.sum() == 10 and np.isnan(scene.vh[1, 1]) and np.isfinite(scene.vv[1, 1])
    assert np.isnan(stack_channels(scene)[:, 1, 1]).all() and np.isnan(stack_channels(scene)[:, 3]).all()


def test_channels_are_date_by_date():
    scene = make_scene({"vh": image(2, 3, 4), "vv": image(2, 3, 4)}, **DB, times=["20170124", "2018-03"])
    assert channel_names(scene) == ["vh@0", "vv@0", "vh@1", "vv@1"]
    assert scene.time.values[0] == np.datetime64("2017-01-24")
    stacked = stack_channels(scene, ["vv@1", "vh@0"])
    assert (
        stacked.dims == ("channel", "y", "x")
        and stacked.dtype == np.float32
        and stacked.channel.values.tolist() == ["vv@1", "vh@0"]
    )
    assert (stacked[0].values == scene.vv[1].values).all() and (stacked[1].values == scene.vh[0].values).all()
    named = make_scene({"vv": image(2, 3, 4)}, **DB, times=["before", "after"])
    assert named.time.values.tolist() == ["before", "after"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"units": "dBm"}, "in 'dBm', expected units"),
        ({"quantity": "sigma"}, "quantity 'sigma'"),
        ({"bands": {"vv": np.full((3, 4), np.nan)}}, "not one pixel is valid"),
        ({"bands": {"vv": np.zeros((3, 4)), "vh": np.zeros((4, 4))}}, "one shape"),
        ({"units": "degree", "quantity": "incidence_angle"}, "no channel among"),
        ({"units": "dB", "quantity": "coherence"}, "expected units"),
        ({"times": [1], "seasons": ["winter"]}, "leave one out"),
        ({"bands": {"vv": np.zeros((2, 3, 4))}}, "times"),
        ({"crs": None}, "crs and transform together"),
        ({"transform": (10, 1, 0, 1, -10, 0)}, "rotated"),
        ({"labels": {"cover": (np.zeros((3, 4)), {0: "x"})}}, "integer"),
    ],
)
def test_make_scene_refuses(change, words):
    arguments = {"bands": {"vv": image(3, 4)}, **DB, **UTM} | change
    with pytest.raises(ValueError, match=words):
        make_scene(arguments.pop("bands"), **arguments)


def test_check_scene_lists_everything_wrong():
    scene = make_scene({"vv": image(3, 4), "vh": image(3, 4)}, **DB, **UTM)
    scene["vv"] = scene.vv.astype("float64").assign_attrs(units="1")
    scene["valid"] = scene.valid.astype("uint8")
    scene["vh"] = scene.vh.drop_attrs()
    scene["ratio"] = (scene.vv * 0).drop_attrs()
    scene["angle"] = scene.vv.astype("float32").assign_attrs(units="1", quantity="incidence_angle").T
    with pytest.raises(ValueError) as caught:
        check_scene(scene)
    expected = (
        "float64",
        "boolean variable 'valid'",
        "vh states units None",
        "ratio states units",
        "angle has dimensions",
    )
    for words in (*expected, "angle is a incidence_angle in '1'"):
        assert words in str(caught.value)


def test_accessor_looks_ratio_power():
    cover = np.zeros((6, 9), "uint8")
    cover[:, 4:] = 3
    scene = make_scene(
        {"vv": image(6, 9), "vh": image(6, 9)},
        **DB,
        **UTM,
        labels={"cover": (cover, {0: "a", 3: "b"})},
        attrs={"looks": 4.0},
    )
    fewer = check_scene(scene.sar.looks(3))
    assert dict(fewer.sizes) == {"y": 2, "x": 3} and fewer.attrs["looks"] == 36 and fewer.sar.spacing_m == 30
    assert fewer.cover.values.tolist() == [[0, 3, 3]] * 2 and flag_meanings(fewer.cover) == {0: "a", 3: "b"}
    assert np.allclose(scene.sar.ratio(), scene.vh - scene.vv) and np.allclose(
        scene.sar.to_power().sar.to_db().vv, scene.vv, atol=1e-4
    )
    with pytest.raises(ValueError, match="window inside"):
        scene.sar.window(0, 0, 7, 9)
    with pytest.raises(ValueError, match="two of"):
        scene[["vv", "valid"]].sar.ratio()


def mixed(**given):
    """Four seasons of backscatter, ratio and coherence, one height, a percentage and a tag."""
    values = {"VV": image(4, 6, 9), "VH": image(4, 6, 9), "vv_vh": image(4, 6, 9), "height": image(6, 9)}
    values["coherence"] = RNG.random((4, 6, 9)).astype("float32")
    units = {"VV": "dB", "VH": "dB", "vv_vh": "dB", "coherence": "1", "height": "m"}
    quantity = {"VV": "gamma0", "VH": "gamma0", "vv_vh": "ratio", "coherence": "coherence", "height": "elevation"}
    trees = Target("trees", "number", units="%", limits=(0, 100))
    uses = Target("uses", "tags", of="tile", classes={0: "pasture", 1: "water"})
    percent = np.full((6, 9), 30, "uint8")
    percent[0] = 200
    labels = {"trees": (percent, trees), "uses": (np.array([1, 0]), uses)}
    seasons = ["winter", "spring", "summer", "autumn"]
    return make_scene(values, units=units, quantity=quantity, seasons=seasons, labels=labels, **UTM, **given)


def test_a_scene_of_many_quantities_over_four_seasons(tmp_path):
    scene = mixed()
    texts = [str(c) for c in scene.sar.channels]
    assert texts[:4] == ["vv@winter", "vh@winter", "vv_vh@winter", "coherence@winter"] and texts[-1] == "height"
    assert len(texts) == 17 and channel_names(scene) == texts[:-1] and list(scene.sar.targets) == ["trees", "uses"]
    assert scene.sar.units == "dB" and scene.sar.quantity == "gamma0" and scene.sar.polarisations == ["vv", "vh"]
    power = scene.sar.to_power()
    assert np.allclose(power.vv_vh, 10 ** (scene.vv_vh / 10)) and power.vv_vh.attrs["units"] == "1"
    assert power.coherence.identical(scene.coherence) and power.height.identical(scene.height)
    assert power.sar.to_db().coherence.identical(scene.coherence)
    assert open_scene(save_scene(scene, tmp_path / "a.nc")).identical(scene)
    fewer = check_scene(scene.sar.looks(3))
    blocks = scene.coherence.values.reshape(4, 2, 3, 3, 3).mean((2, 4))
    assert (
        np.allclose(fewer.coherence, blocks) and np.allclose(fewer.trees, 30) and fewer.uses.values.tolist() == [1, 0]
    )
    linear = (10 ** (scene.vv.values / 10)).reshape(4, 2, 3, 3, 3).mean((2, 4))
    assert np.allclose(fewer.vv, 10 * np.log10(linear), atol=1e-4)


def test_stacked_channels_keep_their_units_and_their_holes():
    scene = mixed(valid=RNG.random((4, 6, 9)) > 0.5)
    stack = stack_channels(scene, ["coherence@summer", "height", "vv@winter"])
    expected = [
        np.where(scene.valid[2], scene.coherence[2], np.nan),
        np.where(scene.valid.any("season"), scene.height, np.nan),
        np.where(scene.valid[0], scene.vv[0], np.nan),
    ]
    np.testing.assert_array_equal(stack.values, np.array(expected))
    assert stack.dtype == np.float32 and stack.units.values.tolist() == ["1", "m", "dB"] and stack.attrs == {}
    assert stack_channels(scene, ["vv@winter", "vv@spring"]).attrs == {"units": "dB", "quantity": "gamma0"}


def test_a_channel_in_another_unit_is_not_the_one_wanted():
    scene = mixed()
    held = find_channels(scene)
    assert find_channels(scene, held[::-1]) == held[::-1]
    with pytest.raises(ValueError, match="convert one of them"):
        find_channels(scene, [Channel("vv", "1", "gamma0", "winter")])
    with pytest.raises(ValueError, match=r"has no 'vv', 'hh@winter'; it holds \['vv@winter'"):
        find_channels(scene, ["vv", "hh@winter"])
    with pytest.raises(ValueError, match="has no 'channel'"):
        find_channels(scene, [])


def test_wrong_targets_are_refused():
    with pytest.raises(ValueError, match="numbers.*got float64"):
        make_scene({"vv": image(3, 4)}, **DB, labels={"t": (np.zeros((1, 3, 4)), Target("t", "number"))})
    scene = make_scene({"vv": image(3, 4)}, **DB)
    scene["codes"] = ("x", "y"), np.zeros((4, 3), "uint8"), {"flag_values": [1, 2], "flag_meanings": "one"}
    with pytest.raises(ValueError, match="codes: expected a meaning"):
        check_scene(scene)


def test_spacing():
    at = lambda **place: spacing_m(make_scene({"vv": image(9, 9)}, **DB, **place))
    assert at(**UTM) == 10 and at() is None
    assert spacing_m(make_scene({"vv": image(9, 9)}, **DB, attrs={"spacing_m": 80})) == 80
    assert at(crs=4326, transform=(1e-4, 0, 20, 0, -1e-4, 60)) == pytest.approx(7.88, abs=0.05)
    assert at(crs="EPSG:2263", transform=(100, 0, 1e6, 0, -100, 2e5)) == pytest.approx(
        30.48, abs=0.01
    )  # US survey feet


@pytest.mark.parametrize("epsg", [3413, 3031])
def test_swath_over_the_pole(epsg):
    from pyproj import Geod, Transformer

    to_lonlat = Transformer.from_crs(epsg, 4326, always_xy=True)
    where = lambda r, c: to_lonlat.transform((c - 50) * 400.0, (60 - r) * 400.0)
    r, c = (v.ravel() for v in np.meshgrid(np.linspace(0, 120, 7), np.linspace(0, 100, 7), indexing="ij"))
    gcps = np.stack([r, c, *where(r, c)], axis=-1)
    scene = make_scene({"hh": image(120, 100)}, **DB, gcps=gcps)
    rows, columns = np.meshgrid(scene.y, scene.x, indexing="ij")
    truth = where(rows, columns)
    lon, lat = scene.sar.lonlat()
    assert Geod(ellps="WGS84").inv(lon.values, lat.values, *truth)[2].max() < 5  # metres, of pixels of 400 m
    assert scene.sar.spacing_m == pytest.approx(400 / 0.97, rel=0.03)
    part = scene.sar.window(50, 40, 20, 20)
    assert np.allclose(part.sar.lonlat()[1], lat[50:70, 40:60], atol=1e-6)


def test_a_whole_swath_scene_is_quick():
    points = np.array(
        [[r, c, 10 + c * 1e-3, 75 - r * 3e-4] for r in np.linspace(0, 10000, 21) for c in np.linspace(0, 10000, 21)]
    )
    lon, lat = tie_point_lonlat(points, np.arange(0, 10000, 10) + 0.5, np.arange(0, 10000, 10) + 0.5)
    assert np.allclose(lon[500], 10 + (np.arange(0, 10000, 10) + 0.5) * 1e-3, atol=1e-4)


# ---- files --------------------------------------------------------------------------------------------------------


def test_tags_answer_every_question(tmp_path):
    values = image(2, 20, 30)
    path = write(tmp_path / "a.tif", values, ("VH", "VV"), {"units": "dB gamma0 RTC", "sensor": "S1"}, nodata=-9999)
    scene = open_scene(path)
    assert (
        scene.sar.polarisations == ["vh", "vv"]
        and scene.sar.quantity == "gamma0"
        and scene.attrs == {"sensor": "S1", "source": "a.tif"}
    )
    assert (scene.vh.values == values[0]).all()
    swapped = open_scene(path, channels=["VV", "vh"])
    assert swapped.sar.polarisations == ["vv", "vh"] and (swapped.vh.values == values[0]).all()
    assert tuple(swapped.rio.transform())[:6] == UTM["transform"]


def test_questions_come_all_at_once_and_are_answered(tmp_path):
    path = write(tmp_path / "a.png", np.full((8, 8), 7, "uint8"), driver="PNG")
    with warnings.catch_warnings(action="error"), pytest.raises(OpenQuestion) as caught:
        open_scene(path)
    assert all(f"{q}=" in str(caught.value) for q in ("channels", "units", "quantity", "nodata")) and str(path) in str(
        caught.value
    )
    scene = open_scene(path, channels=["hh"], units="1", quantity="amplitude", nodata="none")
    assert (
        scene.y.values[0] == 0.5
        and "spatial_ref" not in scene.coords
        and scene.sar.to_db().hh[0, 0] == pytest.approx(20 * np.log10(7))
    )


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"units": "1"}, "states units"),
        ({"quantity": "beta0"}, "states quantity"),
        ({"channels": ["hh"]}, r"has no 'hh'; it holds \['vh', 'vv'\]"),
        ({"bands": "dates"}, "bands='channel', 'time'"),
        ({"formula": "os.remove(DN)", "quantity": "sigma0"}, "formula like"),
        ({"nodata": "zero"}, "nodata"),
    ],
)
def test_contradictions_and_wrong_answers(tmp_path, answers, words):
    path = write(tmp_path / "a.tif", image(2, 8, 8), ("VH", "VV"), {"units": "dB gamma0"})
    with pytest.raises(ValueError, match=words):
        open_scene(path, **answers)


def test_dates_in_bands_and_in_files(tmp_path):
    values = image(2, 3, 8, 8)
    dates = ("20170101", "20170113", "20170125")
    vv, vh = (
        write(tmp_path / f"{p}.tif", v, dates, {"units": "dB sigma0"})
        for p, v in zip(("vv", "vh"), values, strict=True)
    )
    scene = open_scene({"vv": vv, "vh": vh})
    assert (
        scene.vv.dims == ("time", "y", "x")
        and (scene.vh.values == values[1]).all()
        and scene.time.values[1] == np.datetime64("2017-01-13")
    )
    with pytest.raises(OpenQuestion, match="the file's name suggests vh"):
        open_scene(vh)
    single = [write(tmp_path / f"{i}.tif", values[:, i], ("VV", "VH"), {"units": "dB sigma0"}) for i in (0, 1)]
    assert (open_scene(single, times=["before", "after"]).vh.values == values[1, :2]).all()
    plain = [write(tmp_path / f"p{i}.tif", values[i, 0], tags={"units": "dB sigma0"}) for i in (0, 1)]
    assert open_scene(plain, channels=["vh", "vv"]).sar.polarisations == ["vh", "vv"]
    unnamed = write(tmp_path / "u.tif", values[0], tags={"units": "dB sigma0"})
    assert open_scene(unnamed, channels=["vv"], bands="time", times=dates).sizes["time"] == 3
    grid = {"vv": plain[:1] * 2, "vh": plain[1:] * 2}
    assert channel_names(open_scene(grid, times=[2017, 2018])) == ["vv@0", "vh@0", "vv@1", "vh@1"]


def test_files_on_different_grids_are_refused(tmp_path):
    a = write(tmp_path / "a.tif", image(8, 8), ("VV",), {"units": "dB sigma0"})
    b = write(
        tmp_path / "b.tif",
        image(8, 8),
        ("VH",),
        {"units": "dB sigma0"},
        crs="EPSG:32633",
        transform=rasterio.Affine(10, 0, 5e5 + 5, 0, -10, 5e6),
    )
    with pytest.raises(ValueError, match="one grid"):
        open_scene([a, b])
    with pytest.raises(ValueError, match="was given as 'vv'"):
        open_scene({"vv": b})


def test_digital_numbers_with_a_formula(tmp_path):
    dn = np.array([[0, 1000], [4000, 65535]], "uint16")
    path = write(tmp_path / "dn.tif", np.stack([dn, dn]), ("VV", "VH"))
    with pytest.raises(OpenQuestion, match="nodata="):
        open_scene(path, units="1", quantity="digital_number")
    scene = open_scene(path, formula="20*log10(DN)-83", quantity="sigma0")
    assert np.isnan(scene.vv[0, 0]) and np.allclose(
        scene.vv.values.ravel()[1:], 20 * np.log10([1000, 4000, 65535]) - 83, atol=1e-4
    )
    assert (
        scene.valid.values.ravel().tolist() == [False, True, True, True] and scene.attrs["formula"] == "20*log10(DN)-83"
    )
    raw = open_scene(path, units="1", quantity="digital_number", nodata=0)
    assert raw.vv[0, 1] == 1000 and np.isnan(raw.vv[0, 0])


@pytest.mark.parametrize(("value", "count"), [(-9999, 1), (-32768, 1), (0, 64)])
def test_undeclared_sentinels_are_asked_about(tmp_path, value, count):
    values = image(40, 40)
    values.flat[:count] = value
    path = write(tmp_path / "a.tif", values, ("VV",), {"units": "dB sigma0"})
    with pytest.raises(OpenQuestion, match=f"nodata={value}"):
        open_scene(path)
    assert open_scene(path, nodata=value).valid.sum() == 1600 - count
    assert open_scene(path, nodata="none").valid.all()
    declared = write(tmp_path / "b.tif", values, ("VV",), {"units": "dB sigma0"}, nodata=value)
    assert open_scene(declared).valid.sum() == 1600 - count


def test_large_files_are_lazy_and_equal(tmp_path, monkeypatch):
    values = image(2, 300, 400)
    values[0, 0, 0] = np.nan
    path = write(tmp_path / "a.tif", values, ("VV", "VH"), {"units": "dB sigma0"})
    eager, lazy = open_scene(path), open_scene(path, chunks=128)
    assert lazy.vv.chunks == ((128, 128, 44), (128, 128, 128, 16)) and stack_channels(lazy).chunks is not None
    assert lazy.compute().identical(eager)
    monkeypatch.setattr(rasters, "LAZY_ABOVE", 1000)
    assert open_scene(path).vh.chunks is not None


def test_gcp_only_swath(tmp_path):
    gcps = [
        rasterio.control.GroundControlPoint(r, c, x=179.0 + c * 0.02, y=70 - r * 0.01)
        for r in (0, 50, 100)
        for c in (0, 50, 100)
    ]
    gcps = [rasterio.control.GroundControlPoint(g.row, g.col, x=(g.x + 180) % 360 - 180, y=g.y) for g in gcps]
    path = write(tmp_path / "a.tif", image(100, 100), ("sigma0_HV",), {"units": "dB"}, gcps=gcps)
    scene = open_scene(path)
    lon, lat = scene.sar.lonlat()
    assert scene.sar.quantity == "sigma0" and scene.sizes["gcp"] == 9
    assert (
        float(np.abs(lon).min()) > 178.9 and float(lon[0, 0]) > 179 and float(lon[0, -1]) < -178.9
    )  # across the dateline
    assert float(lat[0, 0]) == pytest.approx(70, abs=0.01)
    saved = save_scene(scene, tmp_path / "a.nc")
    assert open_scene(saved).identical(scene)


def test_labels_from_a_file(tmp_path):
    path = write(tmp_path / "a.tif", image(8, 8), ("VV",), {"units": "dB sigma0"})
    mask = write(tmp_path / "mask.tif", np.eye(8, dtype="uint8") * 255)
    with pytest.raises(OpenQuestion, match=r"label_meanings=.*\[0, 255\]"):
        open_scene(path, labels={"flood": mask})
    scene = open_scene(path, labels={"flood": mask}, label_meanings={"flood": {0: "dry", 255: "flooded"}})
    assert flag_meanings(scene.flood) == {0: "dry", 255: "flooded"} and scene.flood.dtype == np.uint8


# ---- NetCDF and Zarr ----------------------------------------------------------------------------------------------


def cube(**attrs):
    y, x = 5e6 - 5 - 10 * np.arange(6.0), 5e5 + 5 + 10 * np.arange(7.0)
    data = xr.Dataset(
        {"sigma0_vv": (("y", "x"), image(6, 7), attrs), "sigma0_vh": (("y", "x"), image(6, 7), attrs)}, {"y": y, "x": x}
    )
    data["crs"] = ((), 0, {"crs_wkt": rasterio.CRS.from_epsg(32633).to_wkt()})
    return data


def test_netcdf_without_units_asks(tmp_path):
    cube().to_netcdf(tmp_path / "a.nc")
    with pytest.raises(OpenQuestion, match="units="):
        open_scene(tmp_path / "a.nc")
    scene = open_scene(tmp_path / "a.nc", units="dB")
    assert scene.sar.quantity == "sigma0" and scene.sar.spacing_m == 10 and scene.rio.crs.to_epsg() == 32633


def test_zarr_and_netcdf_agree(tmp_path):
    data = cube(units="dB")
    data.to_netcdf(tmp_path / "a.nc")
    data.to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=False)
    a, b = open_scene(tmp_path / "a.nc"), open_scene(tmp_path / "a.zarr")
    assert a.drop_attrs(deep=False).identical(b.drop_attrs(deep=False)) and (a.vv.values == data.sigma0_vv.values).all()
    lazy = open_scene(tmp_path / "a.nc", chunks=4)
    assert lazy.vv.chunks == ((4, 2), (4, 3)) and lazy.compute().identical(a)


def test_order_of_a_zarr_folder_is_not_that_of_its_disk(tmp_path, monkeypatch):
    said = {"units": "dB", "quantity": "sigma0"}
    data = xr.Dataset({name: (("y", "x"), image(6, 7), said) for name in ("vh", "hh", "vv", "hv")})
    data.to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=False)
    listed = Path.iterdir
    for turned in (False, True):
        monkeypatch.setattr(Path, "iterdir", lambda folder, t=turned: iter(sorted(listed(folder), reverse=t)))
        assert open_scene(tmp_path / "a.zarr", nodata="none").sar.polarisations == ["hh", "hv", "vv", "vh"]


def test_covariance_is_asked_about_and_named(tmp_path):
    xr.Dataset({k: (("y", "x"), image(6, 7), {"units": "dB"}) for k in ("C11", "C22")}).to_netcdf(tmp_path / "c2.nc")
    with pytest.raises(OpenQuestion, match=r"variables=.*'C11'"):
        open_scene(tmp_path / "c2.nc", quantity="intensity")
    scene = open_scene(tmp_path / "c2.nc", quantity="intensity", variables={"C22": "vv", "C11": "vh"})
    assert scene.sar.polarisations == ["vv", "vh"]


def test_band_dimension_and_times_of_a_cube(tmp_path):
    values = image(3, 4, 6, 7)
    coords = {"month": ["May", "June", "July"], "band": ["VV_asc", "VH_asc", "VV_desc", "VH_desc"]}
    xr.Dataset({"s1": (("month", "band", "y", "x"), values, {"units": "dB sigma0"})}, coords).to_netcdf(
        tmp_path / "a.nc"
    )
    with pytest.raises(OpenQuestion, match="variables=.*s1/VV_desc"):
        open_scene(tmp_path / "a.nc")
    scene = open_scene(tmp_path / "a.nc", variables={"s1/VH_desc": "vh", "s1/VV_desc": "vv"})
    assert (
        scene.sar.polarisations == ["vh", "vv"]
        and scene.time.values.tolist() == coords["month"]
        and (scene.vv.values == values[:, 2]).all()
    )


# ---- saving, damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.01])
def test_saved_scenes_open_without_questions(tmp_path, scale):
    vv = image(2, 30, 40)
    vv[0, :3] = np.nan
    codes = RNG.integers(0, 3, (30, 40)).astype("uint8")
    labels = {"cover": (codes, {1: "open water", 2: "ice"})}
    scene = make_scene(
        {"vv": vv, "vh": vv - 6},
        **DB,
        **UTM,
        times=["2017-01-01", "2018-01-01"],
        labels=labels,
        attrs={"looks": 4.4, "licence": "CC BY 4.0"},
    )
    back = open_scene(save_scene(scene, tmp_path / "s.nc", scale))
    assert [p.name for p in tmp_path.iterdir()] == ["s.nc"]
    if scale is None:
        assert back.identical(scene)
    else:
        assert (
            float(abs(back.vv - scene.vv).max()) <= scale / 2 + 1e-5
            and (back.valid == scene.valid).all()
            and back.vv.dtype == np.float32
        )
    assert flag_meanings(back.cover) == {1: "open water", 2: "ice"} and back.rio.crs.to_epsg() == 32633
    assert open_scene(tmp_path / "s.nc", channels=["vh"]).sar.polarisations == ["vh"]
    with pytest.raises(ValueError, match="s.nc has no 'hh'"):
        open_scene(tmp_path / "s.nc", channels=["hh"])


def test_packing_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="larger scale"):
        save_scene(make_scene({"vv": np.full((4, 4), 400.0)}, units="1", quantity="amplitude"), tmp_path / "a.nc", 0.01)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["tif", "cog", "png", "jpg", "nc", "scene.nc"])
def test_damage_is_named(tmp_path, kind):
    """Any truncation ends in CorruptData that names the file: no crash, no silent pixels."""
    values = RNG.integers(0, 255, (2, 256, 256)).astype("uint8")
    path = tmp_path / f"a.{kind}"
    answers = {"channels": ["vv"], "units": "1", "quantity": "amplitude", "nodata": "none"}
    if kind == "png":
        write(path, values[0], driver="PNG")
    elif kind == "jpg":
        write(path, values[0], driver="JPEG")
    elif kind == "tif":
        write(path, values[0], compress="deflate")
    elif kind == "cog":
        path = write(tmp_path / "a.tif", values[0].astype("float32"), tiled=True, blockxsize=64, blockysize=64)
    elif kind == "nc":
        xr.Dataset({"vv": (("y", "x"), values[0].astype("float32"))}).to_netcdf(path, encoding={"vv": {"zlib": True}})
    else:
        save_scene(make_scene({"vv": values[0]}, units="1", quantity="amplitude"), path)
    whole = path.read_bytes()
    open_scene(path, **answers)
    for share in (0.0, 0.01, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CorruptData) as caught:
            open_scene(path, **answers)
        assert path.name in str(caught.value)


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tif"):
        open_scene(tmp_path / "nowhere.tif")
    (tmp_path / "a.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match="make_scene"):
        open_scene(tmp_path / "a.npz")


def test_all_nan_file_is_refused_by_name(tmp_path):
    path = write(tmp_path / "empty.tif", np.full((8, 8), np.nan, "float32"), ("VV",), {"units": "dB sigma0"})
    with pytest.raises(ValueError, match=r"empty\.tif.*not one pixel is valid"):
        open_scene(path)
