"""Situations that people who work with radar files met: the right number, or a question that has an answer."""

import warnings

import numpy as np
import pytest
import rasterio
import xarray as xr
from PIL import Image
from rasterio.transform import from_origin
from test_scenes_real import REAL, sources

from sarfm import sar
from sarfm.datasets.catalog import open_dataset
from sarfm.scenes.open import OpenQuestion, make_scene, open_scene, save_scene
from sarfm.scenes.plausibility import UnlikelyValues

H = W = 64
DB = np.random.default_rng(0).normal(-12, 2, (H, W)).astype("float32")
SIGMA0 = {"quantity": "sigma0"}
COMPLEX = (np.random.default_rng(1).normal(size=(2, H, W)) * [[[3]], [[5]]]).astype("float32")
COMPLEX = (COMPLEX[0] + 1j * COMPLEX[1]).astype("complex64")


def tif(path, bands, names=(), units=None, scale=None, mask=None, alpha=False, **profile):
    """Write a GeoTIFF as somebody else would."""
    bands = np.asarray(bands)
    bands = bands[None] if bands.ndim == 2 else bands
    place = {"crs": "EPSG:32633", "transform": from_origin(5e5, 6e6, 10, 10), "dtype": bands.dtype}
    shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", **({"driver": "GTiff"} | place | shape | profile)) as out,
    ):
        out.write(bands)
        for index, name in enumerate(names, start=1):
            out.set_band_description(index, name)
        if units:
            out.units = [units] * len(bands)
        if scale:
            out.scales, out.offsets = ([s[k] for s in scale] for k in (0, 1))
        if mask is not None:
            out.write_mask(mask)
    return path


def asked(call, *arguments, **answers):
    """Expect a question; tell which argument answers it, and what it says."""
    with pytest.raises(OpenQuestion) as caught:
        call(*arguments, **answers)
    lines = str(caught.value).splitlines()[1:]
    return {line.split("=")[0].strip(): line for line in lines}


def entry(folder, pattern, channels, **read):
    """Write an entry of one's own beside files."""
    import yaml

    told = {"id": "mine", "title": "Mine", "channels": channels, "read": {"scenes": pattern} | read}
    (folder / "mine.yaml").write_text(yaml.safe_dump(told))
    return folder / "mine.yaml"


# ---- scale and offset ----------------------------------------------------------------------------------------------

PACKED = np.round((DB + 30) / 0.2).clip(0, 254).astype("uint8")


@pytest.mark.parametrize("chunks", [None, 16])
def test_scale_and_offset_of_a_geotiff(tmp_path, chunks):
    holes = PACKED.copy()
    holes[:16] = 255
    path = tif(tmp_path / "a.tif", holes, ["VV"], "dB", [(0.2, -30)], nodata=255)
    scene = open_scene(path, chunks=chunks, **SIGMA0)
    assert np.abs(scene.vv[16:] - DB[16:]).max() < 0.11 and scene.sar.valid_fraction == 0.75


def test_each_band_has_its_own_scale(tmp_path):
    other = np.round((DB - 7 + 40) / 0.01).astype("uint16")
    bands = np.stack([np.round((DB + 30) / 0.001).astype("uint16"), other])
    path = tif(tmp_path / "a.tif", bands, ["VV", "VH"], "dB", [(0.001, -30), (0.01, -40)], nodata=0)
    scene = open_scene(path, **SIGMA0)
    assert np.abs(scene.vv - DB).max() < 0.002 and np.abs(scene.vh - (DB - 7)).max() < 0.01


def test_scale_and_offset_of_a_virtual_raster_and_of_an_entry(tmp_path):
    path = tif(tmp_path / "a.tif", PACKED, ["VV"], "dB", [(0.2, -30)], nodata=255)
    vrt = tmp_path / "a.vrt"
    rasterio.shutil.copy(path, vrt, driver="VRT")
    assert np.abs(open_scene(vrt, **SIGMA0).vv - DB).max() < 0.11
    mine = entry(tmp_path, "{scene}.tif", {"vv": {"units": "dB", "quantity": "sigma0"}})
    assert np.abs(open_dataset(mine, tmp_path)["a"].vv - DB).max() < 0.11


def test_scale_of_a_netcdf_variable_does_not_meet_its_fill_value(tmp_path):
    """Stored 0 is the fill value, and stored 150 is a legal 0 dB."""
    values = np.where(np.arange(W) < 8, np.nan, np.where(np.arange(W) < 16, 0.0, DB))
    data = xr.Dataset({"vv": (("y", "x"), values, {"units": "dB", "quantity": "sigma0"})})
    packing = {"dtype": "uint8", "scale_factor": 0.2, "add_offset": -30.0, "_FillValue": 0}
    data.to_netcdf(tmp_path / "a.nc", encoding={"vv": packing})
    scene = open_scene(tmp_path / "a.nc")
    assert scene.sar.valid_fraction == 7 / 8 and np.abs(scene.vv[:, 8:16]).max() < 1e-5


def test_a_formula_with_a_scale_is_a_question(tmp_path):
    dn = np.round(10 ** ((DB + 83) / 20)).astype("uint16")
    path = tif(tmp_path / "a.tif", dn, ["VV"], None, [(2.0, 0)], nodata=0)
    assert list(asked(open_scene, path, formula="20*log10(DN)-83", **SIGMA0)) == ["formula"]
    stored = open_scene(path, formula="20*log10(stored)-83", **SIGMA0)
    scaled = open_scene(path, formula="20*log10(scaled)-83", **SIGMA0)
    assert np.abs(stored.vv - DB).max() < 0.1 and np.allclose(scaled.vv - stored.vv, 20 * np.log10(2), atol=1e-4)


@pytest.mark.parametrize("scale", [(0, 0), (float("nan"), 0), (1, float("inf"))])
def test_a_scale_that_leaves_nothing_is_refused(tmp_path, scale):
    with pytest.raises(ValueError, match="a.tif: expected a scale that leaves numbers"):
        open_scene(tif(tmp_path / "a.tif", DB, ["VV"], "dB", [scale]), **SIGMA0)


def test_labels_are_not_scaled(tmp_path):
    codes = np.repeat(np.uint8([[1, 2]]), H, axis=0).repeat(W // 2, axis=1)
    tif(tmp_path / "l.tif", codes, scale=[(0.5, 10)])
    path = tif(tmp_path / "a.tif", DB, ["VV"], "dB")
    meanings = {"ice": {1: "water", 2: "ice"}}
    scene = open_scene(path, labels={"ice": tmp_path / "l.tif"}, label_meanings=meanings, **SIGMA0)
    assert np.array_equal(scene.ice, codes)


# ---- complex numbers -----------------------------------------------------------------------------------------------


def complex_file(folder, kind):
    """Write a single-look complex image."""
    if kind in ("complex64", "complex_int16"):
        return tif(folder / "a.tif", np.round(COMPLEX), ["VV"], dtype=kind)
    data = xr.Dataset({"vv": (("y", "x"), np.round(COMPLEX))})
    if kind == "netcdf":
        data.to_netcdf(folder / "a.nc", engine="netcdf4", auto_complex=True)
        return folder / "a.nc"
    data.to_zarr(folder / "a.zarr", zarr_format=int(kind[-1]), consolidated=False)
    return folder / "a.zarr"


@pytest.mark.parametrize("kind", ["complex64", "complex_int16", "zarr 2", "zarr 3", "netcdf"])
@pytest.mark.parametrize("chunks", [None, 32])
def test_complex_numbers_are_a_question(tmp_path, kind, chunks):
    path = complex_file(tmp_path, kind)
    for answers in ({}, {"units": "1", "quantity": "intensity"}, {"formula": "20*log10(DN)-83"}):
        assert "abs(z)" in asked(open_scene, path, chunks=chunks, **answers)["formula"]
    scene = open_scene(path, formula="abs(z)**2", chunks=chunks, nodata="none")
    assert np.allclose(scene.vv, np.abs(np.round(COMPLEX)) ** 2) and scene.vv.quantity == "intensity"
    decibels = open_scene(path, formula="10*log10(abs(z)**2)-20", chunks=chunks, nodata="none", **SIGMA0)
    assert np.nanmax(np.abs(decibels.vv - (scene.sar.to_db().vv - 20))) < 1e-3


def test_an_amplitude_is_no_intensity(tmp_path):
    path = complex_file(tmp_path, "complex64")
    with pytest.raises(ValueError, match="abs"):
        open_scene(path, formula="abs(z)", quantity="intensity")
    assert open_scene(path, formula="abs(z)", nodata="none").vv.quantity == "amplitude"


def test_arithmetic_and_scenes_refuse_complex_numbers():
    for function in (sar.to_db, sar.to_power, sar.to_amplitude, sar.mean_power, sar.equivalent_number_of_looks):
        with pytest.raises(ValueError, match="complex"):
            function(COMPLEX, units="1")
    with pytest.raises(ValueError, match="complex"):
        sar.db_from_digital_number(COMPLEX)
    with pytest.raises(ValueError, match="complex"):
        make_scene({"vv": COMPLEX}, units="1", quantity="intensity")


def test_real_and_imaginary_parts_are_no_polarisation(tmp_path):
    path = tif(tmp_path / "a.tif", np.stack([COMPLEX.real, COMPLEX.imag]), ["i_VV", "q_VV"])
    assert "channels" in asked(open_scene, path, units="1", quantity="intensity", nodata="none")


# ---- no data that float32 rounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-99.99, 1e20, -999.9, -3.4028235e38])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_no_data_value_that_float32_rounds(tmp_path, value, dtype):
    holes = DB.astype(dtype)
    holes[:16] = np.float32(value)
    path = tif(tmp_path / "a.tif", holes, ["VV"], "dB")
    for chunks in (None, 32):
        assert open_scene(path, nodata=value, chunks=chunks, **SIGMA0).sar.valid_fraction == 0.75
    mine = entry(tmp_path, "{scene}.tif", {"vv": {"units": "dB", "quantity": "sigma0", "nodata": value}})
    assert open_dataset(mine, tmp_path)["a"].sar.valid_fraction == 0.75


@pytest.mark.parametrize("key", ["missing_value", "variable_fill_value", "nodata", "_FillValue"])
def test_a_rounded_no_data_attribute(tmp_path, key):
    holes = DB.copy()
    holes[:16] = 1e20
    stated = {"units": "dB", "quantity": "sigma0", key: np.float32(1e20) if key == "_FillValue" else 1e20}
    data = xr.Dataset({"vv": (("y", "x"), holes, stated)})
    data.to_zarr(tmp_path / "a.zarr", consolidated=False, zarr_format=2)
    assert open_scene(tmp_path / "a.zarr").sar.valid_fraction == 0.75
    if key != "_FillValue":
        data.to_netcdf(tmp_path / "a.nc", encoding={"vv": {"_FillValue": None}})
        assert open_scene(tmp_path / "a.nc").sar.valid_fraction == 0.75


def test_a_number_that_a_band_cannot_hold_is_no_other_number(tmp_path):
    path = tif(tmp_path / "a.tif", np.uint8([[1, 241]]).repeat(H, 0).repeat(W, 1), ["VV"])
    scene = open_scene(path, units="1", quantity="digital_number", nodata=-9999 % 65536 - 256)
    assert scene.sar.valid_fraction == 1  # -9999 as uint8 would be 241


# ---- several values that nobody declared ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, 16])
def test_two_sentinels_are_asked_about_until_none_is_left(tmp_path, chunks):
    holes = DB.copy()
    holes[:16], holes[-16:] = -9999, 0
    path = tif(tmp_path / "a.tif", holes, ["VV"], "dB")
    first = asked(open_scene, path, chunks=chunks, **SIGMA0)["nodata"]
    assert "-9999" in first and "25.0% is 0" in first and "nodata=[-9999, 0]" in first
    assert "nodata=[-9999, 0]" in asked(open_scene, path, nodata=-9999, chunks=chunks, **SIGMA0)["nodata"]
    assert open_scene(path, nodata=[-9999, 0], chunks=chunks, **SIGMA0).sar.valid_fraction == 0.5
    assert open_scene(path, nodata=[-9999, "none"], chunks=chunks, **SIGMA0).sar.valid_fraction == 0.75


@pytest.mark.parametrize("chunks", [None, 16])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [-99999, -999.99, -1e10, 1e30, -200.5, np.finfo("f8").min])
def test_a_number_that_no_echo_has_is_asked_about(tmp_path, value, dtype, chunks):
    """However few they are; and the answer in the question is one that answers it."""
    holes = DB.astype(dtype)
    with np.errstate(over="ignore"):
        holes[0, :5] = np.dtype(dtype).type(value)
    path = tif(tmp_path / "a.tif", holes, ["VV"], "dB")
    answer = {}
    if np.isfinite(holes).all():
        said = asked(open_scene, path, chunks=chunks, **SIGMA0)["nodata"]
        answer = {"nodata": float(said.split("nodata=")[-1].split(",")[0])}
    scene = open_scene(path, chunks=chunks, **answer, **SIGMA0)
    assert scene.sar.valid_fraction == 1 - 5 / holes.size and abs(scene.vv.mean() + 12) < 0.1


def test_many_numbers_that_no_echo_has_are_another_unit(tmp_path):
    intensity = (10 ** (DB / 10) * 1e6 - 3e4).astype("float32")  # a noise floor was subtracted
    path = tif(tmp_path / "a.tif", intensity, ["VV"])
    assert "nodata" not in asked(open_scene, path)
    assert open_scene(path, units="1", quantity="intensity").sar.valid_fraction == 1


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_what_is_infinite_is_no_data(tmp_path, value):
    holes = DB.copy()
    holes[:16] = value
    scene = open_scene(tif(tmp_path / "a.tif", holes, ["VV"], "dB"), **SIGMA0)
    made = make_scene({"vv": holes}, units="dB", **SIGMA0)
    assert np.isfinite(scene.vv.mean()) and np.isnan(made.vv[:16]).all() and scene.sar.valid_fraction == 0.75


def test_no_data_of_packed_integers_is_answered_as_stored(tmp_path):
    path = tif(tmp_path / "a.tif", PACKED.astype("int16"), ["VV"], "dB", [(0.2, -30)])
    with pytest.raises(ValueError, match="as it is stored, int16, before scale 0.2 and offset -30, got .-30.2"):
        open_scene(path, nodata=-30.2, **SIGMA0)


@pytest.mark.parametrize("chunks", [None, 16])
@pytest.mark.parametrize(
    "limits", [{"valid_range": np.int16([-3000, 0])}, {"valid_min": np.int16(-3000)}, {"valid_min": -30.5}]
)
def test_what_a_file_says_to_be_out_of_range_is_not_valid(tmp_path, limits, chunks):
    """CF: integers limit what is stored, fractions what was measured."""
    stored = np.round(DB * 100).astype("int16")
    stored[:16] = -4000
    stated = {"units": "dB", "scale_factor": 0.01, "_FillValue": np.int16(-32768)} | limits
    xr.Dataset({"vv": (("y", "x"), stored, stated)}).to_netcdf(tmp_path / "a.nc")
    scene = open_scene(tmp_path / "a.nc", chunks=chunks, **SIGMA0)
    assert scene.sar.valid_fraction == 0.75 and abs(scene.vv.mean() + 12) < 0.1


def test_every_band_is_looked_at(tmp_path):
    vv, vh = DB.copy(), DB - 7
    vv[:16], vh[-16:] = -9999, -32768
    path = tif(tmp_path / "a.tif", np.stack([vv, vh]), ["VV", "VH"], "dB")
    assert "-32768" in asked(open_scene, path, nodata=-9999, **SIGMA0)["nodata"]
    scene = open_scene(path, nodata={"vv": -9999, "vh": -32768}, **SIGMA0)
    assert scene.sar.valid_fraction == 0.5


def test_what_is_declared_is_not_asked_about(tmp_path):
    holes = DB.copy()
    holes[:16] = -9999
    path = tif(tmp_path / "a.tif", holes, ["VV"], "dB", nodata=-9999)
    assert open_scene(path, **SIGMA0).sar.valid_fraction == 0.75
    holes[-16:] = 0
    path = tif(tmp_path / "b.tif", holes, ["VV"], "dB", nodata=-9999)
    assert "nodata" in asked(open_scene, path, **SIGMA0)
    assert open_scene(path, nodata=0, **SIGMA0).sar.valid_fraction == 0.5


def test_a_packed_sentinel_is_a_legal_number(tmp_path):
    stored = np.round(DB * 100).astype("int16")
    stored[:16] = -999
    path = tif(tmp_path / "a.tif", stored, ["VV"], "dB", [(0.01, 0)], nodata=-32768)
    scene = open_scene(path, **SIGMA0)
    assert scene.sar.valid_fraction == 1 and np.allclose(scene.vv[:16], -9.99)
    stored[:16] = -32768
    path = tif(tmp_path / "b.tif", stored, ["VV"], "dB", [(0.01, 0)], nodata=-1)
    assert "-32768" in asked(open_scene, path, **SIGMA0)["nodata"]


# ---- bands beside backscatter, dates in names ----------------------------------------------------------------------

EXPORT = np.stack([DB, DB - 7, DB * 0 + 38])


def test_an_export_of_vv_vh_and_angle(tmp_path):
    path = tif(tmp_path / "a.tif", EXPORT, ["VV", "VH", "angle"])
    scene = open_scene(path, channels=["vv", "vh"], units="dB", **SIGMA0)
    assert list(scene.data_vars) == ["vv", "vh", "valid"] and np.array_equal(scene.vh, DB - 7)
    scene = open_scene(path, units="dB", **SIGMA0)
    assert (scene["angle"].quantity, scene["angle"].units) == ("incidence_angle", "degree")
    assert scene.sar.polarisations == ["vv", "vh"] and np.allclose(scene["angle"], 38)
    mine = entry(tmp_path, "{scene}.tif", {p: {"units": "dB", "quantity": "sigma0"} for p in ("vv", "vh")})
    assert np.array_equal(open_dataset(mine, tmp_path)["a"].vh, DB - 7)


@pytest.mark.parametrize("extra", ["ratio", "noise", None])
def test_a_band_that_states_nothing_is_left_out_or_kept(tmp_path, extra):
    path = tif(tmp_path / "a.tif", EXPORT, ["VV", "VH", extra] if extra else ["VV", "VH"])
    answers = {"units": "dB", **SIGMA0}
    assert "['vv', 'vh']" in asked(open_scene, path, **answers)["channels"]
    assert open_scene(path, channels=["vv", "vh"], **answers).sar.polarisations == ["vv", "vh"]
    assert open_scene(path, channels=["vv", "vh", None], **answers).sar.polarisations == ["vv", "vh"]
    names = ["vv", "vh", extra or "tilt"]
    measures = {"units": {"vv": "dB", "vh": "dB", names[2]: "degree"}}
    measures["quantity"] = {"vv": "sigma0", "vh": "sigma0", names[2]: "slope"}
    assert list(open_scene(path, channels=names, **measures).data_vars) == [*names, "valid"]


@pytest.mark.parametrize("name", ["VV_stdDev", "VV_count", "noise_VV", "NESZ_VV", "VV_layover_mask"])
def test_a_statistic_of_an_echo_is_no_echo(tmp_path, name):
    path = tif(tmp_path / "a.tif", np.stack([DB, abs(DB)]), ["VV_mean", name])
    assert name in asked(open_scene, path, units="dB", **SIGMA0)["channels"]
    assert abs(open_scene(path, channels="vv", units="dB", **SIGMA0).vv.mean() + 12) < 0.1


def test_names_in_the_order_of_the_bands_must_not_contradict_the_file(tmp_path):
    path = tif(tmp_path / "a.tif", EXPORT, ["VV", "VH"], "dB")
    with pytest.raises(ValueError, match="states 'vv', but channels names it 'vh'"):
        open_scene(path, channels=["vh", "vv", "noise"], **SIGMA0)


def test_two_calibrations_of_one_polarisation_are_chosen_by_description(tmp_path):
    path = tif(tmp_path / "a.tif", EXPORT[:2], ["Sigma0_VV", "Gamma0_VV"], "dB")
    assert "variables={'Sigma0_VV': 'vv'}" in asked(open_scene, path)["times"]
    scene = open_scene(path, variables={"Gamma0_VV": "vv"})
    assert scene.sar.quantity == "gamma0" and np.array_equal(scene.vv, DB - 7)


@pytest.mark.parametrize("style", ["{0}_2020{1:02}01", "2020-{1:02}-01_{0}", "{0}_mst_01{2}2020", "S1A_IW_2020{1:02}01T055014_2020{1:02}01T055039_{0}"])  # fmt: skip
def test_dates_in_band_names(tmp_path, style):
    months = ((1, "Jan"), (3, "Mar"))
    names = [style.format(p, *month) for month in months for p in ("VV", "VH")]
    path = tif(tmp_path / "a.tif", np.stack([DB, DB - 7, DB + 1, DB - 6]), names, "dB")
    scene = open_scene(path, **SIGMA0)
    assert [str(t)[:10] for t in scene.time.values] == ["2020-01-01", "2020-03-01"]
    assert np.array_equal(scene.vv, [DB, DB + 1]) and np.array_equal(scene.vh, [DB - 7, DB - 6])
    again = open_scene(path, times=["2020-01-01", "2020-03-01"], **SIGMA0)
    assert np.array_equal(again.vv, scene.vv)
    with pytest.raises(ValueError, match="order"):
        open_scene(path, times=["2020-03-01", "2020-01-01"], **SIGMA0)


def test_bands_without_a_date_are_dated_by_an_answer(tmp_path):
    path = tif(tmp_path / "a.tif", np.stack([DB, DB - 7, DB + 1, DB - 6]), ["VV_1", "VH_1", "VV_2", "VH_2"], "dB")
    assert "times" in asked(open_scene, path, **SIGMA0)
    scene = open_scene(path, times=["before", "after"], **SIGMA0)
    assert np.array_equal(scene.vh, [DB - 7, DB - 6]) and scene.time.values.tolist() == ["before", "after"]
    for wrong, match in ((["2020-01-01"] * 2, "once"), (["a", "b", "c"], "3 dates")):
        with pytest.raises(ValueError, match=match):
            open_scene(path, times=wrong, **SIGMA0)


def test_one_date_twice_is_a_question(tmp_path):
    path = tif(tmp_path / "a.tif", np.stack([DB, DB + 1]), ["VV_20200101", "VV_20200101"], "dB")
    assert "times" in asked(open_scene, path, **SIGMA0)


# ---- masks ---------------------------------------------------------------------------------------------------------

HALF = np.arange(H)[:, None] * np.ones(W) >= 16


@pytest.mark.parametrize("chunks", [None, 16])
@pytest.mark.parametrize("kind", ["internal", "beside", "virtual", "alpha"])
def test_what_a_mask_hides_is_not_valid(tmp_path, kind, chunks):
    if kind == "alpha":
        bands = np.stack([PACKED, HALF * np.uint8(255)])
        path = tif(tmp_path / "a.tif", bands, ["VV"], alpha=True, ALPHA="YES")
        scene = open_scene(path, units="1", quantity="digital_number", chunks=chunks)
        assert list(scene.data_vars) == ["vv", "valid"]
    else:
        path = tif(tmp_path / "a.tif", DB, ["VV"], "dB", mask=HALF if kind != "beside" else None)
        if kind == "beside":
            with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as out:
                out.write_mask(HALF)
        if kind == "virtual":
            rasterio.shutil.copy(path, path := tmp_path / "a.vrt", driver="VRT")
        scene = open_scene(path, chunks=chunks, **SIGMA0)
    assert scene.sar.valid_fraction == 0.75 and np.isnan(scene.vv[:16]).all()


@pytest.mark.parametrize("chunks", [None, 16])
def test_bands_of_a_virtual_raster_with_masks_of_their_own(tmp_path, chunks):
    tif(tmp_path / "a.tif", np.stack([DB, DB - 7]))
    tif(tmp_path / "m.tif", (np.arange(H)[:, None] + 0 * DB >= 16).astype("uint8"))
    source = '<SimpleSource><SourceFilename relativeToVRT="1">{}.tif</SourceFilename><SourceBand>{}</SourceBand></SimpleSource>'
    mask = f'<MaskBand><VRTRasterBand dataType="Byte">{source.format("m", 1)}</VRTRasterBand></MaskBand>'
    band = '<VRTRasterBand dataType="Float32" band="{}"><Description>{}</Description><UnitType>dB</UnitType>{}</VRTRasterBand>'
    bands = band.format(1, "VV", source.format("a", 1)) + band.format(2, "VH", source.format("a", 2) + mask)
    (tmp_path / "a.vrt").write_text(f'<VRTDataset rasterXSize="{W}" rasterYSize="{H}">{bands}</VRTDataset>')
    scene = open_scene(tmp_path / "a.vrt", chunks=chunks, **SIGMA0)
    assert np.isfinite(scene.vv).all() and np.isfinite(scene.vh).mean() == 0.75


def test_four_bytes_named_by_their_user_are_four_channels(tmp_path):
    """GDAL marks the fourth of four 8-bit bands as transparency by itself."""
    path = tif(tmp_path / "a.tif", np.stack([PACKED] * 3 + [PACKED * HALF]))
    answers = {"units": "1", "quantity": "digital_number", "nodata": "none"}
    scene = open_scene(path, channels=["vv", "vh", "hh", "hv"], **answers)
    assert len(scene.sar.polarisations) == 4 and scene.sar.valid_fraction == 1


@pytest.mark.parametrize("kind", ["png", "mask"])
def test_what_a_mask_hides_of_a_label_is_unlabelled(tmp_path, kind):
    codes = np.ones((H, W), "uint8")
    if kind == "png":
        Image.fromarray(np.stack([codes, HALF * np.uint8(255)], -1), "LA").save(tmp_path / "l.png")
        where = tmp_path / "l.png"
    else:
        where = tif(tmp_path / "l.tif", codes, mask=HALF)
    path = tif(tmp_path / "a.tif", DB, ["VV"], "dB", crs=None if kind == "png" else "EPSG:32633")
    for meanings in ({1: "ice"}, {1: "ice", 255: "land"}):
        scene = open_scene(path, labels={"ice": where}, label_meanings={"ice": meanings}, **SIGMA0)
        encoded = scene.sar.targets["ice"].encode(scene.ice.values)
        assert (encoded == np.where(HALF, 0, 255)).all()


# ---- zeros in large files ------------------------------------------------------------------------------------------


def test_zeros_inside_a_large_lazy_file(tmp_path):
    large = np.tile(DB, (20, 20))
    large[300:600, 500:800] = 0
    path = tif(tmp_path / "a.tif", large, ["VV"], "dB", tiled=True)
    eager, lazy = (asked(open_scene, path, chunks=chunks, **SIGMA0) for chunks in (None, 256))
    assert eager == lazy and "5.5% is 0" in eager["nodata"]
    scene = open_scene(path, chunks=256, nodata=0, **SIGMA0)
    assert scene.vv.chunks is not None and scene.sar.valid_fraction == pytest.approx(1 - 9e4 / large.size)


def test_few_sentinels_anywhere_in_a_large_lazy_file(tmp_path):
    large = np.tile(DB, (20, 20))
    large[700, 700] = -9999
    path = tif(tmp_path / "a.tif", large, ["VV"], "dB", tiled=True)
    assert "-9999" in asked(open_scene, path, chunks=256, **SIGMA0)["nodata"]


# ---- saved scenes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers",
    [
        {"units": "1"},
        {"quantity": "gamma0"},
        {"units": {"hh": "dB"}},
        {"nodata": -12.0},
        {"formula": "20*log10(DN)-83"},
        {"bands": "time"},
        {"times": ["2020-01-01"]},
        {"seasons": ["winter"]},
        {"variables": {"vv": "vh"}},
        {"channels": ["hh"]},
        {"labels": {"ice": "nothere.tif"}},
        {"label_meanings": {"ice": {0: "water"}}},
    ],
    ids=lambda answers: next(iter(answers)),
)
def test_a_saved_scene_refuses_what_contradicts_it(tmp_path, answers):
    values = DB.copy()
    values[0, 0] = -12
    path = save_scene(make_scene({"vv": values}, units="dB", **SIGMA0), tmp_path / "s.nc")
    with pytest.raises((ValueError, FileNotFoundError)):
        open_scene(path, **answers)
    with pytest.raises(ValueError):
        open_scene({"vh": path})


def test_a_saved_scene_takes_what_adds_to_it(tmp_path):
    label = tif(tmp_path / "l.tif", np.ones((H, W), "uint8"))
    path = save_scene(make_scene({"vv": DB}, units="dB", **SIGMA0), tmp_path / "s.nc")
    scene = open_scene(
        {"vv": path},
        units="db",
        quantity="Sigma0",
        nodata="none",
        bands="channel",
        labels={"ice": label},
        label_meanings={"ice": {1: "ice"}},
        attrs={"looks": 4.0},
        chunks=16,
    )
    assert (scene.ice == 1).all() and scene.attrs["looks"] == 4 and scene.vv.data.numblocks == (4, 4)


# ---- plausible numbers ---------------------------------------------------------------------------------------------

POWER = 10 ** (DB / 10)
CONTRADICTIONS = {
    "decibels as power": (DB, {"units": "1"}),
    "decibels as intensity": (DB, {"units": "power", "quantity": "intensity"}),
    "power as decibels": (POWER, {"units": "dB"}),
    "power as decibels of gamma0": (POWER / 3, {"units": "dB", "quantity": "gamma0"}),
    "16-bit numbers as decibels": ((DB + 40) * 150, {"units": "dB", "nodata": "none", "dtype": "uint16"}),
    "8-bit numbers as decibels": ((DB + 30) * 5, {"units": "dB", "nodata": "none", "dtype": "uint8"}),
    "16-bit numbers as power": ((DB + 40) * 150, {"units": "1", "nodata": "none", "dtype": "uint16"}),
    "decibels calibrated again": (DB, {"units": "dB", "formula": "10*log10(DN)"}),
    "a byte as coherence": ((DB + 40) * 5, {"units": "1", "quantity": "coherence", "channels": ["coherence"]}),
}


@pytest.mark.parametrize("chunks", [None, 16])
@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_numbers_that_cannot_be_are_refused(tmp_path, kind, chunks):
    values, answers = CONTRADICTIONS[kind]
    answers = SIGMA0 | answers
    dtype = answers.pop("dtype", "float32")
    name = [] if "channels" in answers else ["VV"]
    path = tif(tmp_path / "a.tif", values.astype(dtype), name)
    with pytest.raises(ValueError, match="expected|never negative|negative"):
        open_scene(path, chunks=chunks, **answers)


UNLIKELY = {
    "doubled decibels": ([2 * DB, 2 * DB - 14], {"units": "dB"}),
    "cross-polarised above co-polarised": ([DB - 7, DB], {"units": "dB"}),
    "cross-polarised power above co-polarised": ([POWER / 5, POWER], {"units": "1"}),
    "some negative power": ([np.where(DB < -14, -POWER / 10, POWER), POWER / 5], {"units": "1"}),
    "standardised decibels": ([(DB + 12) / 2, (DB + 12) / 2], {"units": "dB"}),
    "bright decibels": ([DB + 30, DB + 23], {"units": "dB"}),
}


@pytest.mark.parametrize("kind", UNLIKELY)
def test_numbers_that_are_unlikely_are_a_warning(tmp_path, kind):
    images, answers = UNLIKELY[kind]
    path = tif(tmp_path / "a.tif", np.stack(images).astype("float32"), ["VV", "VH"])
    with pytest.warns(UnlikelyValues):
        scene = open_scene(path, **SIGMA0, **answers)
    to_db = scene.sar.to_db()
    assert not (to_db.valid & ~np.isfinite(to_db.vv)).any()


def test_plausible_numbers_pass_without_a_word(tmp_path):
    path = tif(tmp_path / "a.tif", np.stack([DB, DB - 7, DB * 0 + 38]), ["VV", "VH", "angle"])
    with warnings.catch_warnings(action="error", category=UnlikelyValues):
        open_scene(path, units="dB", **SIGMA0)
        path = tif(tmp_path / "b.tif", np.stack([POWER, POWER / 5]), ["VV", "VH"])
        open_scene(path, units="linear", **SIGMA0)


def test_a_formula_for_a_file_that_states_decibels_is_refused(tmp_path):
    path = tif(tmp_path / "a.tif", DB, ["VV"], "dB")
    for formula in ("20*log10(DN)-83", "0.5*DN-14"):
        with pytest.raises(ValueError, match="states decibels"):
            open_scene(path, formula=formula, **SIGMA0)
    with pytest.raises(ValueError, match="units"):  # a logarithm gives no power
        open_scene(tif(tmp_path / "b.tif", POWER, ["VV"]), formula="10*log10(DN)", units="1", **SIGMA0)


def test_what_has_no_decibels_is_not_valid():
    power = POWER.copy()
    power[:16], power[16:32] = 0, -0.001
    scene = make_scene({"vv": power, "vh": POWER}, units="1", **SIGMA0)
    assert scene.sar.valid_fraction == 1 and scene.sar.to_db().sar.valid_fraction == 0.5
    with pytest.raises(ValueError, match="median"):
        make_scene({"vv": DB}, units="1", **SIGMA0)


# Medians, first percentiles and the cross-polarised minus the co-polarised median of all real files: lowest to highest.
FIGURES = {
    "terramesh": {"vv": (-12.5, -10.2, -20.0), "vh": (-17.9, -17.0, -26.8), "gap": (-6.8, -5.3)},
    "opera": {"vv": (-15.4, -8.8, -25.3), "vh": (-28.3, -15.4, -38.0), "gap": (-12.9, -5.9)},
    "pakistan": {"vv": (-10.3, -9.6, -16.3), "vh": (-17.2, -17.1, -26.8), "gap": (-7.6, -6.8)},
    "belgium": {"vv": (-9.9, -9.9, -15.6), "vh": (-16.6, -16.6, -23.2), "gap": (-6.7, -6.7)},
    "florida": {"vv": (-10.7, -10.7, -21.6), "vh": (-15.1, -15.1, -25.7), "gap": (-4.4, -4.4)},
    "borneo": {"vv": (-9.1, -9.1, -24.3), "vh": (-15.1, -15.1, -27.5), "gap": (-6.1, -6.1)},
    "bigearthnet": {"vv": (-20.8, -7.9, -26.3), "vh": (-30.7, -14.5, -38.3), "gap": (-15.1, -4.9)},
    "extra wide swath": {"hv": (0.005, 0.005, 0.001)},
    "ai4arctic patch": {"hh": (-17.1, -8.8, -24.2), "hv": (-27.1, -21.8, -29.0), "gap": (-15.8, -9.4)},
    "ai4arctic scene": {"hh": (108.0, 108.0, 2.0), "hv": (60.0, 60.0, 15.0), "gap": (-48.0, -48.0)},
    "biomassters": {"vv": (-14.6, -10.3, -20.7), "vh": (-23.2, -16.4, -33.5), "gap": (-8.7, -5.8)},
    "ombria": {"vv": (72.0, 208.0, 15.0)},
}


@pytest.mark.parametrize("kind", REAL)
def test_figures_of_real_files_are_plausible(shared, kind):
    found: dict[str, list] = {}
    files = sources(shared, REAL[kind])
    for source in files[:: max(1, len(files) // 60)]:
        with warnings.catch_warnings(action="error", category=UnlikelyValues):
            scene = open_scene(source, **REAL[kind].answers)
        numbers = {p: (v := scene[p].where(scene.valid).values)[np.isfinite(v)] for p in scene.sar.polarisations}
        medians = {p: np.median(v) for p, v in numbers.items() if v.size}
        for p, median in medians.items():
            found.setdefault(p, []).append((median, np.percentile(numbers[p], 1)))
        if len(medians) == 2:
            co, cross = medians.values()
            found.setdefault("gap", []).append((cross - co,))
    table = {p: (min(v)[0], max(v)[0], *(min(w[k] for w in v) for k in range(1, len(v[0])))) for p, v in found.items()}
    print(kind, {p: tuple(float(f"{f:.3f}") for f in figures) for p, figures in table.items()})
    assert set(table) == set(FIGURES[kind])
    for p, figures in table.items():
        assert figures == pytest.approx(FIGURES[kind][p], abs=0.06 if abs(figures[0]) > 0.1 else 6e-4)


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word, unit", [("db", "dB"), ("decibel", "dB"), ("linear", "1"), ("Power", "1"), ("1", "1")])
@pytest.mark.parametrize("quantity", ["Gamma0", "gamma nought", "γ0", "gamma_0"])
def test_words_for_units_and_quantities(tmp_path, word, unit, quantity):
    path = tif(tmp_path / "a.tif", DB if unit == "dB" else POWER, ["VV"])
    scene = open_scene(path, units=word, quantity=quantity)
    assert (scene.sar.units, scene.sar.quantity) == (unit, "gamma0")
    values = DB if unit == "dB" else POWER
    assert make_scene({"vv": values}, units=word, quantity=quantity).sar.units == unit
    mine = entry(tmp_path, "{scene}.tif", {"vv": {"units": word, "quantity": quantity}})
    assert open_dataset(mine, tmp_path)["a"].sar.quantity == "gamma0"


def test_words_that_come_near_are_named(tmp_path):
    path = tif(tmp_path / "a.tif", np.stack([DB, DB - 7]), ["VV", "VH"], "dB")
    for argument in ("polarisations", "polarizations"):
        assert open_scene(path, **{argument: ["vv"]}, **SIGMA0).sar.polarisations == ["vv"]
        with pytest.raises(ValueError, match="vx"):
            open_scene(path, **{argument: ["vv", "vx"]}, **SIGMA0)
    for slip, argument in (("quantiy", "quantity"), ("unit", "units"), ("chunk", "chunks")):
        with pytest.raises(TypeError, match=f"mean {argument!r}"):
            open_scene(path, **{slip: "sigma0"})
    with pytest.raises(ValueError, match="mean 'gamma0'"):
        open_scene(path, quantity="gama0")
    scene = open_scene(path, channels="vv", **SIGMA0)
    with pytest.raises(ValueError, match="mean 'vv'"):
        scene.sar.stack("vvv")
    bare = tif(tmp_path / "b.tif", np.stack([DB, DB - 7]))
    with pytest.raises(ValueError, match="vx"):
        open_scene(bare, channels=["vv", "vx"], units="dB", **SIGMA0)


def test_answers_to_what_is_not_there_are_refused(tmp_path):
    path = tif(tmp_path / "a.tif", DB, ["VV"], "dB")
    with pytest.raises(ValueError, match="label_meanings explains .'ice'., but the labels are"):
        open_scene(path, label_meanings={"ice": {0: "water", 1: "ice"}}, **SIGMA0)
    with pytest.raises(ValueError, match="has no groups, but group='measurement'"):
        open_scene(path, group="measurement", **SIGMA0)
    with pytest.raises(TypeError, match="Did you mean 'polarisations'"):
        slip = dict.fromkeys(["polarisation"], "vv")
        open_scene(path, **slip, **SIGMA0)
    for step in (0, -1e-5):
        with pytest.raises(ValueError, match="expected a step above 0"):
            save_scene(open_scene(path, **SIGMA0), tmp_path / "a.nc", scale=step)


def test_errors_of_a_data_set_name_the_file(tmp_path):
    mine = entry(tmp_path, "{scene}.tif", {"vv": {"units": "dB", "quantity": "sigma0"}})
    with pytest.raises(FileNotFoundError, match="name the folder that holds them"):
        open_dataset(mine, tmp_path)
    tif(tmp_path / "linear.tif", 10 ** (DB / 10), ["VV"], "1")
    with pytest.raises(ValueError, match=r"linear.tif: vv states units \['1'\], but units='dB'"):
        open_dataset(mine, tmp_path)["linear"].load()


def test_slips_at_the_prompt():
    scene = make_scene({"vv": DB, "vh": DB - 7}, units="dB", **SIGMA0)
    for n in (2.5, 0, 100):
        with pytest.raises(ValueError, match="whole pixels"):
            scene.sar.looks(n)
    assert scene.sar.looks(2.0).sizes["y"] == H // 2 and len(scene.sar.stack("vv")) == 1
    assert len(scene.sar.plot("vv").axes) >= 1


def test_a_polarisation_that_nobody_knows(tmp_path):
    path = tmp_path / "chip.png"
    Image.fromarray(PACKED).save(path)
    question = asked(open_scene, path)["channels"]
    assert "['amplitude'] where nobody knows the polarisation" in question
    scene = open_scene(path, channels=["amplitude"], units="1", quantity="amplitude", nodata="none")
    assert scene.sar.valid_fraction == 1 and scene.sar.to_power().amplitude.quantity == "intensity"
    with pytest.raises(ValueError, match="both polarisations"):
        scene.sar.ratio()


def test_a_place_in_rational_polynomials_is_said(tmp_path):
    line, sample = ([float(k == at) for k in range(20)] for at in (2, 1))
    terms = {"line_num_coeff": line, "line_den_coeff": [1.0] + [0.0] * 19}
    terms |= {"samp_num_coeff": sample, "samp_den_coeff": [1.0] + [0.0] * 19}
    scales = {f"{key}_{part}": 1.0 for key in ("height", "lat", "long", "line", "samp") for part in ("off", "scale")}
    path = tif(tmp_path / "a.tif", DB, ["VV"], "dB", crs=None, transform=None, rpcs=rasterio.rpc.RPC(**terms, **scales))
    with pytest.warns(UserWarning, match="rational polynomials"):
        open_scene(path, **SIGMA0)


def test_files_without_a_place_are_read_without_a_warning(tmp_path):
    for k in range(3):
        Image.fromarray(PACKED).save(tmp_path / f"{k}.png")
    mine = entry(tmp_path, "{scene}.png", {"vv": {"units": "1", "quantity": "digital_number", "nodata": "none"}})
    with warnings.catch_warnings(action="error", category=rasterio.errors.NotGeoreferencedWarning):
        for chunks in (None, 16):
            answers = {"channels": ["vv"], "units": "1", "quantity": "digital_number", "nodata": "none"}
            open_scene(tmp_path / "0.png", chunks=chunks, **answers).load()
        for scene in open_dataset(mine, tmp_path).values():
            scene.load()
