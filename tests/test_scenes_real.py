"""Every real file opens as a Scene that agrees with its README, or is refused with the question that it leaves open."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401 (the rio accessor)

from sarfm import sar
from sarfm.scenes.open import OpenQuestion, make_scene, open_scene


@dataclass
class Real:
    """One kind of real file: how it opens, and what its README says about it."""

    source: object  # pattern, list of patterns, or dict by polarisation; {} is what * matched in the first
    answers: dict = field(default_factory=dict)  # what the user has to say
    asked: tuple = ()  # what it asks without answers
    polarisations: tuple = ("vv", "vh")
    units: str = "dB"
    quantity: str = "sigma0"
    epsg: object = None  # number, None, or None for some files with `some_without_crs`
    dates: int = 0
    size: tuple = (0, 0)
    spacing_m: float | None = None
    valid: float = 1.0  # at least this share
    files: int = 1  # how many there are


BORNEO, FLORIDA = "vegetation/borneo_treecover/S1_{}_2017_2018.tif", "land/nd_florida_monthly/S1_{}_monthly_2017.tif"
BELGIUM = "land/worldcereal_belgium_monthly/S1_sigma0_{}_monthly.tif"
OMBRIA = {
    "channels": ["vv"],
    "times": ["before", "after"],
    "units": "1",
    "quantity": "digital_number",
    "nodata": "none",
}
RTT = {
    "channels": ["hh", "hv"],
    "formula": {"hh": "5.66*DN-14.5", "hv": "4.75*DN-24.7"},
    "units": "dB",
    "quantity": "sigma0",
    "attrs": {"spacing_m": 80.0},
}
DISPLAY = {"channels": ["hh", "hv"], "units": "1", "quantity": "digital_number", "nodata": "none"}
FINLAND = {"variables": {"s1/VV_asc": "vv", "s1/VH_asc": "vh"}, "quantity": "sigma0", "nodata": -9999}

REAL = {
    "terramesh": Real("land/terramesh_s1rtc_lulc/*_S1RTC.tif", quantity="gamma0", epsg="utm", size=(224, 224), spacing_m=10, files=3),
    "opera": Real(
        {p: f"land/opera_rtc_california/{{}}_{p}.tif" for p in ("VV", "VH")}, quantity="gamma0", epsg=32611, dates=22, size=(100, 100), spacing_m=30, files=5, valid=0.99
    ),
    "pakistan": Real("land/ssl4eo_pakistan/*.tif", epsg=4326, size=(264, 264), spacing_m=9.8, files=2),
    "belgium": Real({p: BELGIUM.format(p) for p in ("VV", "VH")}, epsg=32631, dates=12, size=(100, 100), spacing_m=10),
    "florida": Real(
        {p: FLORIDA.format(p) for p in ("VV", "VH")}, {"quantity": "intensity"}, ("quantity",), quantity="intensity", epsg=3086, dates=12, size=(400, 400), spacing_m=178.28, valid=0.99
    ),
    "borneo": Real(
        {p: BORNEO.format(p) for p in ("VV", "VH")}, {"quantity": "intensity"}, ("quantity",), quantity="intensity", epsg=4326, dates=24, size=(192, 400), spacing_m=14
    ),
    "bigearthnet": Real("multilabel/bigearthnet_s1/*_[0-9]*_[0-9]*.tif", epsg="utm or none", size=(120, 120), files=38),
    "extra wide swath": Real(
        "sea_ice/s1_ew_hv_sigma0/*.tif", {"units": "1"}, ("units",), ("hv",), "1", size=(1000, 1000), spacing_m=40, files=2
    ),
    "ai4arctic patch": Real("sea_ice/ai4arctic_patches/*.nc", RTT, ("units", "quantity", "channels"), ("hh", "hv"), size=(224, 224), spacing_m=80, files=6, valid=0.5),
    "ai4arctic scene": Real(
        "sea_ice/ai4arctic_scene_lowres/*.nc", DISPLAY, ("channels", "units", "quantity", "nodata"), ("hh", "hv"), "1", "digital_number", size=(318, 332), valid=0.43
    ),
    "biomassters": Real("vegetation/biomassters_agb/*.nc", FINLAND, ("variables", "channels", "quantity"), dates=12, size=(32, 32), files=7, valid=0.0),
    "ombria": Real(
        ["flood/ombria_s1/before/*.png", "flood/ombria_s1/after/{}.png"], OMBRIA, ("channels", "units", "quantity", "nodata"), ("vv",), "1", "digital_number",
        dates=2, size=(256, 256), files=694,
    ),
}  # fmt: skip

# Single files that leave questions open which their READMEs do not answer either, or that are no SAR images at all.
REFUSED = {
    "land/*/*_LULC.tif": "channels=",
    "land/*/*DEM.tif": "channels=",
    "land/*/*NDVI*.tif": "channels=",
    "land/*/*rgbn.tif": "channels=",
    "land/*/labels_polygons.tif": "channels=",
    "land/*monthly*/S1_*.tif": "channels=",
    "land/opera_rtc_california/*.tif": "channels=",
    "vegetation/borneo_treecover/*.tif": "channels=",
    "flood/ombria_s1/mask/*.png": "channels=",
    "multilabel/bigearthnet_s1/*_clc.tif": "channels=",
    "sea_ice/caffe_glacier_zones/*.tif": "channels=",
    "misc/m4sar_objects/*.png": "channels=",
    "misc/airsar_sanfrancisco/*.png": "channels=",
    "misc/esa_worldcover_baltic/*.tif": "channels=",
    "*/*/*.npz": "make_scene",
    "*/*/*.csv": "make_scene",
    "*/*/*.json": "make_scene",
    "*/*/*.txt": "make_scene",
    "*.md": "make_scene",
}


def sources(shared, real):
    """All sources of one kind: path, list of paths or dict of paths."""
    if isinstance(real.source, dict):
        first = next(iter(real.source.values()))
        stems = [""]
        if "{}" in first:
            stems = [p.name.removesuffix("_VV.tif") for p in sorted(shared.glob(first.replace("{}", "*")))]
        return [{p: shared / f.replace("{}", s) for p, f in real.source.items()} for s in stems]
    if isinstance(real.source, list):
        return [
            [p] + [shared / f.replace("{}", p.stem) for f in real.source[1:]]
            for p in sorted(shared.glob(real.source[0]))
        ]
    return sorted(p for p in shared.glob(real.source) if not p.stem.endswith("_clc"))


@pytest.mark.parametrize("kind", REAL)
def test_real_files_open_and_agree_with_their_readme(shared, kind):
    real = REAL[kind]
    found = sources(shared, real)
    assert len(found) == real.files
    for source in found[:: max(1, len(found) // 60)]:  # all, but every 11th of OMBRIA's
        scene = open_scene(source, **real.answers)
        assert (
            tuple(scene.sar.polarisations) == real.polarisations
            and scene.sar.units == real.units
            and scene.sar.quantity == real.quantity
        )
        assert (scene.sizes["y"], scene.sizes["x"]) == real.size and scene.sizes.get("time", 0) == real.dates
        assert scene.sar.valid_fraction >= real.valid
        epsg = scene.rio.crs.to_epsg() if "spatial_ref" in scene.coords else None
        assert epsg == real.epsg or (real.epsg in ("utm", "utm or none") and 32601 <= (epsg or 32601) <= 32760)
        if real.spacing_m is not None:
            assert scene.sar.spacing_m == pytest.approx(real.spacing_m, rel=0.02)


@pytest.mark.parametrize("kind", [k for k, r in REAL.items() if r.asked])
def test_real_files_ask_what_they_leave_open(shared, kind):
    source = sources(shared, REAL[kind])[0]
    with pytest.raises(OpenQuestion) as caught:
        open_scene(source)
    asked = {line.split("=")[0].strip() for line in str(caught.value).splitlines()[1:]}
    assert asked == set(REAL[kind].asked)


@pytest.mark.parametrize("pattern", REFUSED)
def test_other_real_files_are_refused_with_the_reason(shared, pattern):
    paths = sorted(shared.glob(pattern))
    assert paths
    for path in paths[:: max(1, len(paths) // 20)]:
        with pytest.raises(ValueError, match=REFUSED[pattern]) as caught:
            open_scene(path)
        assert path.name in str(caught.value)


def test_no_file_is_forgotten(shared):
    """Every file of every folder is in one of the two tables."""
    known = set()
    for real in REAL.values():
        for source in sources(shared, real):
            known |= set(
                source.values() if isinstance(source, dict) else source if isinstance(source, list) else [source]
            )
    for pattern in REFUSED:
        known |= set(shared.glob(pattern))
    files = [
        p for p in shared.rglob("*") if p.is_file() and not p.name.endswith(".aux.xml")
    ]  # those are GDAL's own notes
    forgotten = sorted(str(p.relative_to(shared)) for p in files if p not in known)
    assert forgotten == []


def test_pixels_are_those_of_the_file(shared):
    path = shared / "land/terramesh_s1rtc_lulc/637U_59R_1_3_S1RTC.tif"
    with rasterio.open(path) as raster:
        vv, vh = raster.read()
        transform = tuple(raster.transform)[:6]
    scene = open_scene(path)
    assert (scene.vv.values == vv).all() and (scene.vh.values == vh).all() and vv.mean() > vh.mean() + 4
    assert np.allclose(tuple(scene.rio.transform())[:6], transform, rtol=0, atol=1e-6)


def test_hh_is_not_in_a_vv_vh_file(shared):
    with pytest.raises(ValueError, match=r"38D_378R_2_3_S1RTC\.tif has no 'hh'; it holds \['vv', 'vh'\]\. Choose"):
        open_scene(shared / "land/terramesh_s1rtc_lulc/38D_378R_2_3_S1RTC.tif", channels=["hh"])


def test_swaths_near_the_pole_lie_where_their_tie_points_say(shared):
    """86.6° N: leave out every fourth tie point, and find it again."""
    from pyproj import Geod

    from sarfm.scenes.place import tie_point_lonlat

    for path in sorted((shared / "sea_ice/s1_ew_hv_sigma0").glob("*.tif")):
        scene = open_scene(path, units="1")
        points = np.stack([scene[f"gcp_{k}"].values for k in ("row", "col", "lon", "lat")], axis=-1)
        lon, lat = scene.sar.lonlat()
        assert 86 < float(lat.min()) and float(lat.max()) < 87.2
        inner = [p for p in points[3::4] if 0 < p[0] < 1000 and 0 < p[1] < 1000]
        kept = np.array([p for p in points if not any((p == q).all() for q in inner)])
        got = [tie_point_lonlat(kept, np.array([r]), np.array([c])) for r, c, *_ in inner]
        errors = [
            Geod(ellps="WGS84").inv(float(g[0][0, 0]), float(g[1][0, 0]), p[2], p[3])[2]
            for g, p in zip(got, inner, strict=True)
        ]
        assert max(errors) < 20, errors  # half a pixel of 40 m
        power = scene.sar.to_db().hv
        assert -40 < float(power.median()) < -15


def test_missing_orbits_are_not_data(shared):
    path = shared / "vegetation/biomassters_agb/51241122.nc"
    descending = {"s1/VV_desc": "vv", "s1/VH_desc": "vh"}
    with pytest.raises(OpenQuestion, match="nodata=-9999"):
        open_scene(path, variables=descending, quantity="sigma0")
    with pytest.raises(ValueError, match=r"51241122\.nc.*not one pixel is valid"):
        open_scene(path, **FINLAND | {"variables": descending})
    assert open_scene(path, **FINLAND).vv.max() < 10


def test_labels_of_real_scenes(shared):
    folder = shared / "flood/ombria_s1"
    source, mask = [folder / "before/0001.png", folder / "after/0001.png"], {"flood": folder / "mask/0001.png"}
    scene = open_scene(source, **OMBRIA, labels=mask, label_meanings={"flood": {0: "dry", 255: "flooded"}})
    after = scene.vv.sel(time="after")
    assert float(after.where(scene.flood == 255).mean()) < float(after.where(scene.flood == 0).mean())
    patch = shared / "sea_ice/ai4arctic_patches/train_03.nc"
    ice = open_scene(patch, **RTT, labels={"ice": "ICE_BINARY"}, label_meanings={"ice": {0: "water", 1: "sea ice"}})
    assert set(np.unique(ice.ice).tolist()) == {0, 1, 255} and float(ice.valid.mean()) < 0.97


def test_single_look_data_have_one_look(shared):
    """Covariance crops say neither polarisation nor calibration; make_scene takes them when the user does."""
    data = np.load(shared / "misc/s1_slc_singlelook/labrador_sentinel1.npz")
    scene = make_scene({"vv": data["C11"], "vh": data["C22"]}, units="1", quantity="intensity", nodata=0)
    enl = scene.sar.enl(9)
    assert 0.5 < float(enl.vv.median()) < 1.1
    assert float(sar.equivalent_number_of_looks(scene.sar.looks(3).vv, 9).median()) > 2 * float(enl.vv.median())


def test_multi_labels_match_the_patches(shared):
    labels = json.loads((shared / "multilabel/bigearthnet_s1/labels.json").read_text())
    assert len(labels) >= 38 and isinstance(shared, Path)
