"""What files state and their users answer, once more: what is lost is said, what contradicts is refused."""

import datetime
import warnings

import netCDF4
import numpy as np
import pytest
import rasterio
import xarray as xr
from PIL import Image
from pyproj import Transformer
from test_real_files import DB, PACKED, SIGMA0, H, W, asked, entry, tif

from sarfm import sar
from sarfm.datasets.catalog import open_dataset, show_entry
from sarfm.patches.prepare import restore, write_store
from sarfm.scenes.open import make_scene, open_scene, save_scene
from sarfm.scenes.plausibility import UnlikelyValues

DATES = ["2020-01-01", "2020-01-13"]
STATED = {"units": "dB", "quantity": "sigma0"}
TOP = np.arange(H)[:, None] * np.ones(W) < 16


def netcdf(path, dims=("y", "x"), values=None, coords=None, **variables):
    """Write VV in decibels, and other variables, as NetCDF."""
    values = DB if values is None else values
    xr.Dataset({"vv": (dims, values, STATED)} | variables, coords or {}).to_netcdf(path)
    return path


def series(folder, **given):
    """Save two dates, each with its own hole, as scenes; VV is finite in both."""
    paths = []
    for k, valid in enumerate((~TOP, ~TOP[::-1])):
        bands = {"vv": DB + k, "vh": DB - 7 + k}
        scene = make_scene(bands, **STATED, valid=valid, **{key: values[k] for key, values in given.items()})
        paths.append(save_scene(scene, folder / f"{k}.nc"))
    return paths


# ---- saved scenes, one per date ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, 16])
def test_saved_scenes_keep_what_is_valid(tmp_path, chunks):
    scene = open_scene(series(tmp_path), times=DATES, chunks=chunks)
    assert np.array_equal(scene.valid, [~TOP, ~TOP[::-1]]) and np.array_equal(scene.vv, [DB, DB + 1])
    again = open_scene(save_scene(scene.load(), tmp_path / "both.nc"))
    assert again.identical(scene.load())


def test_saved_scenes_of_one_date_are_valid_where_both_are(tmp_path):
    paths = series(tmp_path)
    scene = open_scene(dict(zip(("vv", "vh"), paths, strict=True)))
    assert np.array_equal(scene.valid, ~(TOP | TOP[::-1])) and np.allclose(scene.vh, DB - 6)


def test_saved_scenes_keep_place_and_what_their_attributes_agree_on(tmp_path):
    """Tie points count in pixels of the whole scene, of which a part may have been saved."""
    rows, columns = (v.ravel().astype(float) for v in np.meshgrid([0, H / 2, H], [0, W / 2, W], indexing="ij"))
    lonlat = Transformer.from_crs(3413, 4326, always_xy=True).transform(4000 * columns, -2e6 - 4000 * rows)
    gcps = np.stack([rows, columns, *lonlat], axis=1)
    attrs = [{"looks": 4, "orbit": k, "sensor": "S1"} for k in range(2)]
    paths = series(tmp_path, gcps=[gcps, gcps], attrs=attrs)
    scene = open_scene(paths, times=DATES)
    assert np.array_equal(scene.gcp_row, rows) and "orbit" not in scene.attrs
    assert (scene.attrs["looks"], scene.attrs["sensor"]) == (4, "S1")
    parts = [
        save_scene(open_scene(p).isel(y=slice(20, None), x=slice(8, None)), tmp_path / f"p{p.name}") for p in paths
    ]
    part = open_scene(parts, times=DATES)
    assert np.allclose(part.sar.lonlat()[1], scene.sar.lonlat()[1][20:, 8:], atol=1e-6)


def test_the_target_of_any_date_is_kept_and_two_are_a_question(tmp_path):
    codes = np.tile(np.uint8([1, 2]), (H, W // 2))
    target = lambda values: {"ice": (values, {1: "water", 2: "ice"})}
    for labels in ([{}, target(codes)], [target(codes), target(codes)]):
        scene = open_scene(series(tmp_path, labels=labels), times=DATES)
        assert np.array_equal(scene.ice, codes) and scene.sar.targets["ice"].names == ["water", "ice"]
    paths = series(tmp_path, labels=[target(codes), target(3 - codes)])
    assert "0.nc, 1.nc state different 'ice'" in asked(open_scene, paths, times=DATES)["labels"]
    assert np.array_equal(open_scene(paths, times=DATES, labels={"ice": paths[1]}).ice, 3 - codes)


# ---- dates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dimension of size 1", "scalar", "band", "file", "season"])
def test_a_single_date_is_kept(tmp_path, form):
    day = np.array(["2020-01-01"], "datetime64[ns]")
    if form == "dimension of size 1":
        source = netcdf(tmp_path / "a.nc", ("time", "y", "x"), DB[None], {"time": day})
    elif form == "scalar":
        source = netcdf(tmp_path / "a.nc", coords={"time": day[0]})
    elif form == "season":
        source = netcdf(tmp_path / "a.nc", ("season", "y", "x"), DB[None], {"season": ["winter"]})
    else:
        name, band = ("a", "VV_20200101") if form == "band" else ("VV_20200101", "VV")
        source = tif(tmp_path / f"{name}.tif", DB, [band], "dB")
    scene = open_scene(source, quantity="sigma0")
    assert scene.vv.dims == ("y", "x") and scene.valid.dims == ("y", "x")
    assert (str(scene.season.values) == "winter") if form == "season" else (scene.time == day[0])
    again = open_scene(save_scene(scene, tmp_path / "saved.nc"))
    assert again.identical(scene)
    if form != "season":
        with pytest.raises(ValueError, match="was saved with times"):
            open_scene(tmp_path / "saved.nc", times=["2021-01-01"])
    store = write_store({"one": scene}, tmp_path / "s.zarr", size=16, progress=False)
    assert restore(store, "one").coords.to_dataset().identical(scene.coords.to_dataset())
    assert scene.sar.looks(2).sizes["y"] == H // 2


def test_saved_scenes_that_know_their_dates_are_not_asked_for_them(tmp_path):
    for day in DATES:
        scene = open_scene(tif(tmp_path / f"VV_{day.replace('-', '')}.tif", DB, ["VV"], "dB"), **SIGMA0)
        save_scene(scene, tmp_path / f"{day}.nc")
    paths = [tmp_path / f"{day}.nc" for day in DATES]
    assert [str(t)[:10] for t in open_scene(paths).time.values] == DATES
    with pytest.raises(ValueError, match="states 2020-01-01.*times says 2020-01-13; order times"):
        open_scene(paths, times=DATES[::-1])


def test_names_of_files_that_contradict_times_are_refused_or_said(tmp_path):
    name = lambda text: tif(tmp_path / f"{text}.tif", DB, ["VV"], "dB")
    plain, written = [name("20200101"), name("20200113")], [name("a_2020-01-01"), name("a_13Jan2020")]
    for paths in (plain, written):
        with warnings.catch_warnings(action="error"):
            open_scene(paths, times=DATES, **SIGMA0)
            open_scene(paths, times=["before", "after"], **SIGMA0)
            open_scene(paths, times=["2020-01-01T05:50:14", "2020-01-13T05:50:14"], **SIGMA0)
        with pytest.raises(ValueError, match="20200101.tif|a_2020-01-01.tif"):
            open_scene(paths, times=DATES[::-1], **SIGMA0)
    with pytest.raises(ValueError, match="its name states 2020-01-01, but times says 2021-05-01"):
        open_scene(written, times=["2021-05-01", "2021-05-13"], **SIGMA0)
    with pytest.warns(UserWarning, match="unless the number is no date"):
        open_scene(plain, times=["2021-05-01", "2021-05-13"], **SIGMA0)
    with pytest.warns(UserWarning, match="unless the number is no date"):
        open_scene(plain[0], times=["2021-05-01"], **SIGMA0)


def test_one_of_two_dates_is_not_chosen_silently(tmp_path):
    paths = {p: tif(tmp_path / f"{p}_{day}.tif", DB, [p], "dB") for p, day in (("VV", "20200101"), ("VH", "20200113"))}
    with pytest.warns(UserWarning, match=r"dates \['2020-01-01', '2020-01-13'\]; say times"):
        assert "time" not in open_scene(paths, **SIGMA0).coords


def test_a_dimension_of_dates_without_a_coordinate_is_answered_once(tmp_path):
    two = np.stack([DB, DB + 1])
    paths = [netcdf(tmp_path / f"{k}.nc", ("time", "y", "x"), two + 2 * k) for k in range(2)]
    assert "times" in asked(open_scene, paths)
    scene = open_scene(paths, times=["2020", "2021", "2022", "2023"])
    assert np.array_equal(scene.vv, np.concatenate([two, two + 2])) and scene.sizes["time"] == 4
    for source in (paths, {"vv": paths}):
        with pytest.raises(ValueError, match="0.nc holds 2 images without a date.*name 4 dates"):
            open_scene(source, times=["2020", "2021"])
    for source in (paths[0], [paths[0]], {"vv": paths[0]}):
        assert np.array_equal(open_scene(source, times=["2020", "2021"]).vv, two)


def test_dates_of_python_are_dates(tmp_path):
    path = tif(tmp_path / "a.tif", np.stack([DB, DB + 1]), ["VV_20200101", "VV_20200113"], "dB")
    days = [datetime.datetime(2020, 1, 1, 5), datetime.datetime(2020, 1, 13, 5)]
    assert open_scene(path, times=days, **SIGMA0).sizes["time"] == 2
    with pytest.raises(ValueError, match="order times"):
        open_scene(path, times=days[::-1], **SIGMA0)


# ---- numbers that cannot be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, 16])
@pytest.mark.parametrize("units, value", [("dB", -100), ("dB", 60), ("1", 1e-10), ("1", -1)])
def test_an_impossible_number_again_and_again_is_asked_about(tmp_path, units, value, chunks):
    right = DB if units == "dB" else 10 ** (DB / 10)
    for rows in (1, H // 4):
        values = right.copy()
        values[:rows] = value
        path = tif(tmp_path / "a.tif", values, ["VV"], units)
        said = asked(open_scene, path, chunks=chunks, **SIGMA0)["nodata"]
        assert float(said.split("% is ")[1].split(" in band 1")[0]) == pytest.approx(value)
        assert open_scene(path, nodata=value, chunks=chunks, **SIGMA0).sar.valid_fraction == 1 - rows / H


def test_an_impossible_number_is_found_behind_a_scale_and_a_formula(tmp_path):
    stored = np.round(DB * 100).astype("int16")
    stored[:16] = -10000
    path = tif(tmp_path / "a.tif", stored, ["VV"], "dB", [(0.01, 0)], nodata=-32768)
    assert "25.0% is -10000 in band 1" in asked(open_scene, path, **SIGMA0)["nodata"]
    dn = np.round(10 ** ((DB + 83) / 20)).astype("uint16")
    dn[:16] = 1
    path = tif(tmp_path / "b.tif", dn, ["VV"], nodata=0)
    assert "25.0% is 1 in band 1" in asked(open_scene, path, formula="20*log10(DN)-83", **SIGMA0)["nodata"]


@pytest.mark.parametrize(
    "quantity, value", [("coherence", -1), ("coherence", 255), ("slope", 255), ("elevation", -12000)]
)
def test_other_quantities_have_impossible_numbers_too(tmp_path, quantity, value):
    values = np.full((H, W), 0.5, "float32")
    values[:16] = value
    units = {"coherence": "1", "slope": "degree", "elevation": "m"}[quantity]
    path = netcdf(tmp_path / "a.nc", extra=(("y", "x"), values, {"units": units, "quantity": quantity}))
    assert f"25.0% is {value}" in asked(open_scene, path)["nodata"]


@pytest.mark.parametrize("values", [DB - 60, np.where(TOP, DB - 60, DB), 2 * DB - 40], ids=["all", "some", "doubled"])
def test_different_numbers_that_are_rare_are_no_question(tmp_path, values):
    path = tif(tmp_path / "a.tif", values.astype("float32"), ["VV"], "dB")
    with warnings.catch_warnings(action="ignore", category=UnlikelyValues):
        assert open_scene(path, **SIGMA0).sar.valid_fraction == 1


# ---- angles --------------------------------------------------------------------------------------------------------

ANGLE = np.linspace(20, 45, H * W, dtype="float32").reshape(H, W)


def angles(folder, form, values, units):
    """Write VV and an angle, as a GeoTIFF or as NetCDF that states the quantity or doesn't."""
    if form == "tif":
        path = tif(folder / "a.tif", np.stack([DB, values]), ["VV", "angle"])
        with rasterio.open(path, "r+") as out:
            out.units = ["dB", units or ""]
        return path
    said = {"units": units} if units else {}
    said |= {"quantity": "incidence_angle"} if form == "netcdf" else {}
    return netcdf(folder / "a.nc", angle=(("y", "x"), values, said))


@pytest.mark.parametrize("chunks", [None, 16])
@pytest.mark.parametrize("form", ["tif", "netcdf", "bare"])
def test_angles_in_radians_become_degrees_and_degrees_are_no_radians(tmp_path, form, chunks):
    more = {"quantity": {"vv": "sigma0", "angle": "incidence_angle"}, "chunks": chunks}
    more |= {"channels": ["vv", "angle"]} if form == "bare" else {}
    scene = open_scene(angles(tmp_path, form, np.deg2rad(ANGLE), "radians"), **more)
    assert np.allclose(scene["angle"], ANGLE, atol=1e-4) and scene["angle"].units == "degree"
    for k, wrong in enumerate((ANGLE, np.linspace(0, 8, H * W, dtype="float32").reshape(H, W))):
        (tmp_path / f"{k}").mkdir()
        with pytest.raises(ValueError, match="'angle'.* is said to be in radians, but .* above π, as if in degrees"):
            open_scene(angles(tmp_path / f"{k}", form, wrong, "radians"), **more)
    (tmp_path / "2").mkdir()
    with pytest.raises(ValueError, match="states .'rad'., but units='degree' was given"):
        path = angles(tmp_path / "2", form, np.deg2rad(ANGLE), "radians")
        open_scene(path, units={"vv": "dB", "angle": "degree"}, **more)


def test_angles_whose_unit_nobody_states_are_answered_in_either(tmp_path):
    path = angles(tmp_path, "netcdf", np.deg2rad(ANGLE), None)
    assert "('degree', 'rad')" in asked(open_scene, path)["units"]
    scene = open_scene(path, units={"angle": "radians"})
    assert np.allclose(scene["angle"], ANGLE, atol=1e-4)
    with pytest.raises(ValueError, match="as if in degrees"):
        open_scene(angles(tmp_path, "netcdf", ANGLE, None), units={"angle": "radians"})


@pytest.mark.parametrize("form, units", [("tif", "degrees"), ("tif", None), ("netcdf", "degrees")])
def test_radians_that_are_called_degrees_are_said(tmp_path, form, units):
    with pytest.warns(UnlikelyValues, match="angle is said to be .* as if it were in radians"):
        open_scene(angles(tmp_path, form, np.deg2rad(ANGLE), units), quantity={"vv": "sigma0"})


# ---- labels, attributes, systems, dimensions -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jpeg", "tif"])
def test_a_label_that_compression_altered_is_refused(tmp_path, kind):
    codes = np.where(TOP, 1, 2).astype("uint8")
    if kind == "jpeg":
        Image.fromarray(codes).save(where := tmp_path / "l.jpg")
    else:
        where = tif(tmp_path / "l.tif", codes, compress="JPEG")
    path = tif(tmp_path / "a.tif", DB, ["VV"], "dB", **({"crs": None, "transform": None} if kind == "jpeg" else {}))
    how = {"labels": {"ice": where}, "label_meanings": {"ice": {1: "water", 2: "ice"}}}
    with pytest.raises(ValueError, match=f"{where.name}: .*JPEG compression alters.*save the label as PNG"):
        open_scene(path, **how, **SIGMA0)


@pytest.mark.parametrize("n", [(2, 3), "2", None, float("nan"), float("inf"), 2.5])
def test_looks_that_are_no_number_are_refused_in_words(n):
    with pytest.raises(ValueError, match="expected one block side in whole pixels"):
        make_scene({"vv": DB}, **STATED).sar.looks(n)


def test_looks_of_numpy_are_looks():
    assert sar.multilook(DB, np.int64(2), units="dB").shape == (H // 2, W // 2)


def test_a_system_that_nobody_knows_is_refused_in_words(tmp_path):
    unplaced = tif(tmp_path / "a.tif", DB, ["VV"], "dB", crs=None)
    saved = save_scene(make_scene({"vv": DB}, **STATED), tmp_path / "s.nc")
    calls = [lambda: open_scene(unplaced, crs="nonsense", **SIGMA0), lambda: open_scene(saved, crs="nonsense")]
    calls += [lambda: make_scene({"vv": DB}, **STATED, crs="nonsense", transform=(1, 0, 0, 0, -1, 0))]
    for call in calls:
        with pytest.raises(ValueError, match="expected crs= as pyproj understands it.* got 'nonsense'"):
            call()


@pytest.mark.parametrize("name", ["km/h", "", " a", "a\n"])
def test_names_of_attributes_that_netcdf_cannot_hold(tmp_path, name):
    scene = make_scene({"vv": DB}, **STATED)
    for wrong in (scene.assign_attrs({name: 1}), scene.assign(vv=scene.vv.assign_attrs({name: 1}))):
        with pytest.raises(ValueError, match="names of attributes that NetCDF can hold"):
            save_scene(wrong, tmp_path / "s.nc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", [datetime.datetime(2020, 1, 1, 5, 50), np.datetime64("2020-01-01T05:50")])
def test_a_store_keeps_dates_among_attributes(tmp_path, when):
    scene = make_scene({"vv": DB}, **STATED, attrs={"acquired": when})
    store = write_store({"one": scene}, tmp_path / "s.zarr", size=16, progress=False)
    assert restore(store, "one").attrs["acquired"] == np.datetime64("2020-01-01T05:50")


def test_a_store_names_the_attribute_that_it_cannot_keep(tmp_path):
    scene = make_scene({"vv": DB}, **STATED, attrs={"orbits": {1, 2}})
    with pytest.raises(ValueError, match="'orbits' of set; write it as text"):
        write_store({"one": scene}, tmp_path / "s.zarr", size=16, progress=False)


def test_four_dimensions_are_refused_where_they_are_wanted(tmp_path):
    deep = (("time", "level", "y", "x"), np.broadcast_to(DB, (2, 3, H, W)).copy())
    xr.Dataset({"vv": (*deep, STATED)}).to_netcdf(tmp_path / "a.nc")
    match = r"vv has the dimensions \('time', 'level', 'y', 'x'\), expected .* data.isel\(level=0\)"
    for answers in ({}, {"variables": {"vv": "vv"}}, {"channels": ["vv"]}):
        with pytest.raises(ValueError, match=match):
            open_scene(tmp_path / "a.nc", **answers)
    path = netcdf(tmp_path / "b.nc", weather=deep)
    assert "['weather'] state neither" in asked(open_scene, path)["channels"]
    assert list(open_scene(path, channels=["vv"]).data_vars) == ["vv", "valid"]


@pytest.mark.parametrize("missing", [-9999, -8888])
def test_two_values_for_no_data_are_taken_and_said_once(tmp_path, missing):
    values = DB.copy()
    values[:16], values[-16:] = -9999, missing
    with netCDF4.Dataset(tmp_path / "a.nc", "w") as file:
        file.createDimension("y", H)
        file.createDimension("x", W)
        vv = file.createVariable("vv", "f4", ("y", "x"), fill_value=-9999)
        vv[:] = values
        vv.setncatts(STATED | {"missing_value": np.float32(missing)})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert open_scene(tmp_path / "a.nc").sar.valid_fraction == 0.5
    assert len(said) == (missing != -9999) and all("several values for no data" in str(w.message) for w in said)


# ---- catalogues and several files ----------------------------------------------------------------------------------


def described(folder, crs, pattern="{scene}.tif"):
    """Write an entry that states a reference system, or words."""
    path = entry(folder, pattern, {"vv": STATED})
    path.write_text(path.read_text() + f"crs: {crs}\n")
    return open_dataset(path, folder)


def test_the_system_of_an_entry_places_files_that_state_none(tmp_path):
    tif(tmp_path / "a.tif", DB, ["VV"], "dB", crs=None)
    tif(tmp_path / "b.tif", DB, ["VV"], "dB")
    scenes = described(tmp_path, "EPSG:32633")
    assert scenes["a"].rio.crs.to_epsg() == scenes["b"].rio.crs.to_epsg() == 32633
    with pytest.raises(ValueError, match="b.tif states another reference system than mine, crs: EPSG:32634"):
        described(tmp_path, "EPSG:32634")["b"].load()
    assert described(tmp_path, "UTM, as stated in each file")["b"].rio.crs.to_epsg() == 32633


def test_the_system_of_an_entry_whose_files_have_no_coordinates_is_said_to_be_lost(tmp_path):
    tif(tmp_path / "a.tif", DB, ["VV"], "dB", crs=None, transform=None)
    with pytest.warns(UserWarning, match="crs EPSG:32633 doesn't place .*a.tif: it has no coordinates"):
        assert "spatial_ref" not in described(tmp_path, "EPSG:32633")["a"].coords


def test_a_question_names_the_file_that_leaves_it_open(tmp_path):
    for date, low in (("before", DB[0, 0]), ("after", -9999)):
        (tmp_path / date).mkdir()
        values = DB.copy()
        values[0, 0] = low
        tif(tmp_path / date / "0125.tif", values, ["VV"], "dB")
    paths = [tmp_path / date / "0125.tif" for date in ("before", "after")]
    question = asked(open_scene, paths, times=["before", "after"], **SIGMA0)["nodata"]
    assert "-9999 in band 1 'VV' of after/0125.tif" in question and "before" not in question
    (tmp_path / "one").mkdir()
    Image.fromarray(PACKED).save(tmp_path / "one" / "0.png")
    assert "of" not in asked(open_scene, tmp_path / "one" / "0.png")["nodata"].split("holds")[0].split()


def test_a_catalogue_shows_no_data_as_people_read_it(tmp_path):
    told = {None: "not stated", 255: "255", "none": "none"}
    for nodata, text in [*told.items(), ([255, "none"], "255, no others"), ([-9999, 0], "-9999 and 0")]:
        path = entry(tmp_path, "{scene}.tif", {"vv": STATED | {"nodata": nodata}})
        line = next(line for line in show_entry(path).splitlines() if line.startswith("channels"))
        assert line.endswith(f"no-data {text}")
