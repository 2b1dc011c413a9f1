"""Dated stacks from a STAC API on the loopback: every number held to files that were written here."""

import json
import subprocess
import sys
import urllib.request
import warnings
from pathlib import Path

import cloudpickle
import numpy as np
import pystac
import pytest
import rasterio
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.enums import Resampling

import sarfm.land.stac as land_stac
import sarfm.scenes.accessor  # noqa: F401  registers scene.sar
from sarfm.io.files import CorruptData
from sarfm.land.composites import seasonal_composites
from sarfm.land.stac import load_stack, search_stac
from sarfm.scenes.questions import OpenQuestion

WEST, NORTH, H, W = 560_000, 5_660_000, 120, 160  # 20 m pixels
PC = "https://planetarycomputer.microsoft.com/api/stac/v1/collections"
BOX, DATES = (3.7, 50.9, 4.1, 51.2), "2023-01-01/2023-12-31"
GRID = GeoBox.from_bbox((WEST, NORTH - 20 * H, WEST + 20 * W, NORTH), crs="EPSG:32631", resolution=20)
FRAMES = {"whole": slice(0, H), "north": slice(0, 70), "south": slice(60, H)}
PASSES = [  # time, direction, frame
    ("2023-04-04T05:25:10Z", "descending", "north"),
    ("2023-04-04T05:25:35Z", "descending", "south"),
    ("2023-04-04T17:24:40Z", "ascending", "whole"),
    ("2023-05-04T23:59:50Z", "descending", "north"),
    ("2023-05-05T00:00:15Z", "descending", "south"),
    ("2023-06-06T17:24:40Z", "ascending", "whole"),
    ("2023-06-07T05:25:00Z", "descending", "whole"),
]
generator = np.random.default_rng(0)


class Server:
    """A process that answers."""

    def __init__(self, folder):
        command = [sys.executable, str(Path(__file__).with_name("stac_archive.py")), str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        self.url, self.folder = f"http://127.0.0.1:{self.process.stdout.readline().strip()}", folder

    def count(self, fault):
        with urllib.request.urlopen(f"{self.url}/count", timeout=20) as answer:
            return json.load(answer).get(fault, 0)

    def stop(self):
        urllib.request.urlopen(f"{self.url}/release", timeout=20).close()
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


def write_tif(path, values, rows=slice(0, H), nodata=-32768.0, **more):
    """Write a tiled GeoTIFF of 20 m pixels."""
    place = rasterio.Affine(20, 0, WEST, 0, -20, NORTH - 20 * rows.start)
    profile = dict(driver="GTiff", dtype=values.dtype, count=1, crs="EPSG:32631", transform=place, nodata=nodata)
    profile |= dict(height=values.shape[0], width=values.shape[1], tiled=True, blockxsize=32, blockysize=32) | more
    with rasterio.open(path, "w", **profile) as file:
        file.write(values, 1)


def described(name, when, direction, collection="sentinel-1-rtc", band=None):
    """Describe an item of two assets as the Planetary Computer does."""
    ring = [[3.85, 51.0], [3.95, 51.0], [3.95, 51.1], [3.85, 51.1], [3.85, 51.0]]
    properties = {"datetime": when, "platform": "sentinel-1a", "sat:orbit_state": direction, "sar:product_type": "GRD"}
    band = {"data_type": "float32", "nodata": -32768} if band is None else band
    assets = {p: {"href": f"BASE/{name}_{p}.tif", "roles": ["data"], "raster:bands": [band]} for p in ("vv", "vh")}
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "collection": collection,
        "links": [{"rel": "collection", "href": f"{PC}/{collection}"}],
        "stac_extensions": [],
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": [3.85, 51.0, 3.95, 51.1],
        "properties": properties,
        "assets": assets,
    }


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    server, items = Server(folder), []
    server.truth = {}
    for k, (when, direction, frame) in enumerate(PASSES):
        for pol, level in (("vv", 0.1), ("vh", 0.02)):
            values = (level * generator.gamma(4, 0.25, (H, W)))[FRAMES[frame]].astype("float32")
            values[:, : 8 + k] = -32768
            write_tif(folder / f"item{k}_{pol}.tif", values, FRAMES[frame])
            server.truth[k, pol] = np.where(values == -32768, np.nan, values)
        items.append(described(f"item{k}", when, direction))
    (folder / "items.json").write_text(json.dumps(items))
    yield server
    server.stop()


def items_of(archive, *numbers):
    """Take items, their assets with addresses of the server."""
    text = (archive.folder / "items.json").read_text().replace("BASE", archive.url)
    return [pystac.Item.from_dict(item) for k, item in enumerate(json.loads(text)) if k in numbers or not numbers]


def one(archive, name, values, band=None, quiet=False, **more):
    """Write one more item of one asset, and take it."""
    write_tif(archive.folder / f"{name}_vv.tif", values, **more)
    held = described(name, "2023-08-01T05:25:00Z", "descending", band=band)
    held["assets"].pop("vh")
    if quiet:
        held["links"], held["assets"]["vv"]["raster:bands"] = [], [band or {}]
    return pystac.Item.from_dict(json.loads(json.dumps(held).replace("BASE", archive.url)))


# ---- search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["all", "get"])
def test_pages_are_followed_to_the_end(archive, fault):
    before = archive.count(fault)
    found = search_stac(f"{archive.url}/{fault}", "sentinel-1-rtc", BOX, DATES)
    assert [item.id for item in found] == [f"item{k}" for k in range(7)]
    assert archive.count(fault) - before == 4  # the catalogue and three pages


def test_orbit_and_dates_choose(archive):
    where = f"{archive.url}/chosen", "sentinel-1-rtc", BOX
    assert [i.id for i in search_stac(*where, DATES, orbit="ascending")] == ["item2", "item5"]
    assert [i.id for i in search_stac(*where, ("2023-06-01", "2023-06-30"))] == ["item5", "item6"]
    with pytest.raises(ValueError, match="found 1 of the other orbit"):
        search_stac(*where, "2023-06-07/2023-06-30", orbit="ascending")
    with pytest.raises(ValueError, match="found none at all"):
        search_stac(*where, "2022-06-07/2022-06-30")
    with pytest.raises(ValueError, match="Did you mean 'descending'"):
        search_stac(*where, DATES, orbit="descend")


@pytest.mark.parametrize("retries", [0, 1])
def test_a_server_that_hangs_ends_in_its_name(archive, retries):
    before = archive.count("hang")
    with pytest.raises(ConnectionError, match=f"{archive.url}/hang: .* asked {retries + 1} times with 0.3 s"):
        search_stac(f"{archive.url}/hang", "sentinel-1-rtc", BOX, DATES, timeout_s=0.3, retries=retries)
    assert archive.count("hang") - before == retries + 1


def test_a_server_that_recovers_is_asked_again(archive):
    found = search_stac(f"{archive.url}/flaky", "sentinel-1-rtc", BOX, DATES, retries=2)
    assert len(found) == 7 and archive.count("flaky") == 6  # two of them failed


def test_an_hour_is_not_waited(archive, monkeypatch):
    monkeypatch.setattr(land_stac, "LONGEST_WAIT_S", 0.01)
    assert len(search_stac(f"{archive.url}/busy", "sentinel-1-rtc", BOX, DATES, retries=1)) == 7


def test_a_server_that_stays_broken_is_named(archive):
    with pytest.raises(ConnectionError, match=f"{archive.url}/broken: .*out of order"):
        search_stac(f"{archive.url}/broken", "sentinel-1-rtc", BOX, DATES, retries=1)
    assert archive.count("broken") == 2
    with pytest.raises(ConnectionError, match="127.0.0.1:9"):
        search_stac("http://127.0.0.1:9", "sentinel-1-rtc", BOX, DATES, retries=0, timeout_s=2)


def test_pages_that_repeat_or_lack_are_noticed(archive):
    with pytest.raises(ConnectionError, match="repeats the items before"):
        search_stac(f"{archive.url}/loop", "sentinel-1-rtc", BOX, DATES)
    with pytest.warns(UserWarning, match="states 9 items and gave 7"):
        search_stac(f"{archive.url}/short", "sentinel-1-rtc", BOX, DATES)


# ---- stack ----------------------------------------------------------------------------------------------------------


def test_dates_are_overflights_and_numbers_those_of_the_files(archive):
    stack = load_stack(items_of(archive), GRID, chunks=50)
    assert stack.vv.dims == ("time", "y", "x") and stack.vv.chunks is not None
    begins = [
        "2023-04-04T05:25:10",
        "2023-04-04T17:24:40",
        "2023-05-04T23:59:50",
        "2023-06-06T17:24:40",
        "2023-06-07T05:25",
    ]
    assert list(stack.time.values) == [np.datetime64(t, "ns") for t in begins]
    assert [d[0] for d in stack.orbit_direction.values] == list("dadad") and set(stack.platform.values) == {
        "sentinel-1a"
    }
    assert list(stack["items"].values) == ["item0 item1", "item2", "item3 item4", "item5", "item6"]
    assert (stack.sar.units, stack.sar.quantity) == ("1", "gamma0") and stack.odc.geobox == GRID
    for date, (first, second) in enumerate([(0, 1), (2, None), (3, 4), (5, None), (6, None)]):
        for pol in ("vv", "vh"):
            expected = np.full((H, W), np.nan, "float32")
            if second is not None:
                expected[FRAMES["south"]] = archive.truth[second, pol]
            rows = FRAMES[PASSES[first][2]]
            own = archive.truth[first, pol]
            expected[rows] = np.where(np.isfinite(own), own, expected[rows])  # the earlier frame counts
            np.testing.assert_array_equal(stack[pol][date], expected)
            assert np.array_equal(stack.valid[date], np.isfinite(expected))


def test_coarser_grids_are_means_of_power_and_not_of_overviews(archive):
    values = generator.gamma(4, 0.025, (H, W)).astype("float32")
    item = one(archive, "coarse", values)
    with rasterio.open(archive.folder / "coarse_vv.tif", "r+") as file:
        file.build_overviews([2, 4], Resampling.nearest)
    stack = load_stack([item], GRID.zoom_out(4), ["vv"], resampling="average")
    means = values.reshape(H // 4, 4, W // 4, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(stack.vv[0], means, rtol=1e-5)
    assert stack.attrs["resampling"] == "average in power"


def test_no_data_is_no_number_even_where_only_the_item_states_it(archive):
    values = generator.gamma(4, 0.025, (H, W)).astype("float32")
    values[40:60, 50:90] = -32768
    item = one(archive, "unmarked", values, nodata=None)
    shifted = GRID.translate_pix(0.5, 0.5)
    found = load_stack([item], shifted, ["vv"]).vv[0].values
    held = np.where(values == -32768, np.nan, values)
    four = np.stack([held[:-1, :-1], held[1:, :-1], held[:-1, 1:], held[1:, 1:]]).astype(float)
    whole = np.isfinite(four).all(axis=0)
    np.testing.assert_allclose(found[:-1, :-1][whole], four.mean(axis=0)[whole], rtol=1e-5)
    assert np.nanmin(found) > 0, "no value is mixed with -32768"
    assert np.isnan(found[45:55, 55:85]).all()


def test_other_projections_are_interpolated_in_power(archive):
    y, x = np.mgrid[0:H, 0:W].astype("float32")
    item = one(archive, "slope", 0.01 + 1e-4 * y + 2e-4 * x)
    grid = GeoBox.from_bbox((3.865, 51.072, 3.885, 51.086), crs="EPSG:4326", resolution=0.0003)
    found = load_stack([item], grid, ["vv"]).vv[0].values
    places = np.meshgrid(*(grid.coordinates[d].values for d in ("longitude", "latitude")))
    east, north = Transformer.from_crs(4326, 32631, always_xy=True).transform(*(v.ravel() for v in places))
    column, row = (east - WEST) / 20 - 0.5, (NORTH - north) / 20 - 0.5
    expected = (0.01 + 1e-4 * row + 2e-4 * column).reshape(found.shape)
    inside = ((row > 2) & (row < H - 3) & (column > 2) & (column < W - 3)).reshape(found.shape)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(found[inside], expected[inside], atol=2e-5)  # GDAL places to an eighth of a pixel


def test_a_stack_travels_to_workers(archive):
    stack = load_stack(items_of(archive, 2), GRID)
    np.testing.assert_array_equal(cloudpickle.loads(cloudpickle.dumps(stack.vv)), stack.vv)


def test_seasonal_composites_take_a_stack(archive):
    stack = load_stack(items_of(archive), GRID, chunks=50)
    cube = seasonal_composites(stack, year=2023, orbit="descending")
    two = np.stack([stack.vv[0].values, stack.vv[2].values]).astype(float)
    spring = np.where(np.isfinite(two).all(axis=0), two.mean(axis=0), np.nan)  # the median of two
    found = cube.vv.sel(season="spring").values
    both = np.isfinite(spring)
    assert cube.vv.attrs["units"] == "dB" and both.mean() > 0.8
    np.testing.assert_allclose(found[both], 10 * np.log10(spring[both]), atol=1e-4)


# ---- faults ---------------------------------------------------------------------------------------------------------


def damaged(archive, fault):
    """Items of which the second has a fault."""
    items = items_of(archive, 0, 1, 2)
    if fault == "lacks":
        items[1].assets.pop("vh")
    elif fault == "absent":
        items[1].assets["vh"].href = f"{archive.url}/absent.tif"
    else:
        whole = (archive.folder / "item1_vh.tif").read_bytes()
        (archive.folder / "cut.tif").write_bytes(whole[: len(whole) // 2])
        items[1].assets["vh"].href = f"{archive.url}/cut.tif"
    return items


FAULTS = {
    "lacks": (FileNotFoundError, r"item item1 has no asset 'vh'; it holds \['vv'\]"),
    "absent": (CorruptData, r"absent\.tif: asset 'vh' of item item1 can't be read .*404"),
    "cut": (CorruptData, r"cut\.tif: asset 'vh' of item item1 can't be read \(it is cut off"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_the_item_or_leaves_it_out(archive, fault):
    kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message):
        load_stack(damaged(archive, fault), GRID)
    with pytest.warns(UserWarning, match="1 of 3 items were left out: .*item1"):
        stack = load_stack(damaged(archive, fault), GRID, missing="skip", errors="skip")
    assert "item1" in stack.attrs["left_out"] and list(stack["items"].values) == ["item0", "item2"]
    assert not stack.valid[0, 70:].any() and stack.valid[1, :, 20:].all()
    with pytest.raises(ValueError, match="all 1 were left out"):
        load_stack(damaged(archive, fault)[1:2], GRID, missing="skip", errors="skip")


def test_nothing_is_skipped_that_was_not_asked_for(archive):
    with pytest.raises(FileNotFoundError):
        load_stack(damaged(archive, "lacks"), GRID, errors="skip")
    with pytest.raises(CorruptData):
        load_stack(damaged(archive, "absent"), GRID, missing="skip")
    with pytest.raises(ValueError, match="missing='raise' or 'skip'"):
        load_stack(items_of(archive), GRID, missing="ignore")


def test_a_file_that_breaks_later_is_an_error_and_no_gap(archive):
    values = generator.gamma(4, 0.025, (H, W)).astype("float32")
    item = one(archive, "later", values)
    stack = load_stack([item], GRID, ["vv"], retries=0, timeout_s=5)
    path = archive.folder / "later_vv.tif"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(CorruptData, match="later_vv.tif: asset 'vv' of item later can't be read any more"):
        stack.vv.compute(scheduler="synchronous")


def test_a_file_that_never_comes_is_named(archive):
    item = items_of(archive, 2)[0]
    item.assets["vv"].href = f"{archive.url}/hang/file.tif"
    with pytest.raises(CorruptData, match="hang/file.tif: asset 'vv' of item item2"):
        load_stack([item], GRID, ["vv"], timeout_s=0.5, retries=0)


# ---- what the numbers are -------------------------------------------------------------------------------------------

POWER = np.full((H, W), 0.05, "float32")


def test_what_nobody_states_is_asked_for(archive):
    item = one(archive, "silent", POWER, quiet=True, nodata=None)
    with pytest.raises(OpenQuestion, match=r"(?s)units=….*quantity=….*nodata=…"):
        load_stack([item], GRID, ["vv"])
    stack = load_stack([item], GRID, ["vv"], units="linear", quantity="sigma nought", nodata="none")
    assert (stack.sar.units, stack.sar.quantity) == ("1", "sigma0") and np.allclose(stack.vv, 0.05)


def test_a_number_for_no_data_can_be_said(archive):
    values = POWER.copy()
    values[:, :50] = 0
    item = one(archive, "zeros", values, quiet=True, nodata=None)
    stack = load_stack([item], GRID, ["vv"], units="1", quantity="gamma0", nodata=0)
    assert not stack.valid[0, :, :50].any() and stack.valid[0, :, 50:].all()


def test_items_state_units_quantity_and_scale(archive):
    band = {"unit": "dB", "description": "gamma0 of VV", "scale": 0.01, "offset": -5.0, "nodata": -32768}
    stored = np.full((H, W), -900, "int16")
    stored[:5] = -32768
    item = one(archive, "scaled", stored, band=band, quiet=True)
    stack = load_stack([item], GRID, ["vv"], resampling="nearest")
    assert (stack.sar.units, stack.sar.quantity) == ("dB", "gamma0")
    assert np.allclose(stack.vv[0, 5:], -14) and not stack.valid[0, :5].any()
    with pytest.raises(ValueError, match="expected linear power to take bilinear of"):
        load_stack([item], GRID, ["vv"])
    with pytest.raises(ValueError, match="'dB'.*'1'|'1'.*'dB'"):
        load_stack([item], GRID, ["vv"], units="1", resampling="nearest")


def test_documentation_counts_only_for_its_archive(archive):
    item = items_of(archive, 2)[0]
    with pytest.raises(ValueError, match="the argument says 'sigma0' and the archive's documentation 'gamma0'"):
        load_stack([item], GRID, quantity="sigma0")
    item.clear_links()
    with pytest.raises(OpenQuestion, match="quantity=…"):
        load_stack([item], GRID)


def test_uncalibrated_and_unplaced_images_are_refused(archive):
    item = items_of(archive, 2)[0]
    item.collection_id = "sentinel-1-grd"
    with pytest.raises(ValueError, match="uncalibrated digital numbers in the geometry of the radar"):
        load_stack([item], GRID)
    with warnings.catch_warnings(action="ignore"):
        write_tif(archive.folder / "swath_vv.tif", POWER, crs=None, transform=rasterio.Affine.identity())
    other = items_of(archive, 2)[0]
    other.assets["vv"].href = f"{archive.url}/swath_vv.tif"
    with pytest.raises(ValueError, match="states no reference system"):
        load_stack([other], GRID, ["vv"])


def test_orbits_and_grids_that_do_not_fit_are_refused(archive):
    item = items_of(archive, 2)[0]
    del item.properties["sat:orbit_state"]
    with pytest.raises(ValueError, match="item item2: expected its orbit's direction"):
        load_stack([item], GRID)
    beside = GeoBox.from_bbox((700_000, 5_000_000, 701_000, 5_001_000), crs="EPSG:32631", resolution=20)
    with pytest.raises(ValueError, match="none of 1 touches it"):
        load_stack(items_of(archive, 2), beside)


def test_assets_may_have_other_names(archive):
    item = items_of(archive, 2)[0]
    for name in ("vv", "vh"):
        item.assets[f"{name.upper()}_g0"] = item.assets.pop(name)
    stack = load_stack([item], GRID, {"vh": "vh_g0", "vv": "VV_g0"})
    np.testing.assert_array_equal(stack.vv[0], archive.truth[2, "vv"])
    assert list(stack.data_vars)[:2] == ["vh", "vv"]


def test_signed_addresses_are_read(archive):
    item = items_of(archive, 2)[0]
    for asset in item.assets.values():
        asset.href = asset.href.replace(archive.url, "https://elsewhere.invalid")
    stack = load_stack([item], GRID, sign=lambda href: href.replace("https://elsewhere.invalid", archive.url))
    np.testing.assert_array_equal(stack.vh[0], archive.truth[2, "vh"])
