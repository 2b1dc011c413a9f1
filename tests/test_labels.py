"""`sarfm.land.labels`: codes, units and grids of land labels, on real rasters and against computations by other means."""

import numpy as np
import pytest
import rioxarray
import xarray as xr
from pyproj import Transformer

from sarfm.io.files import CorruptData
from sarfm.land.labels import (
    WORLDCOVER,
    aligned,
    biomass,
    built,
    class_fractions,
    label_target,
    land_target,
    tile_mean,
    tree_cover,
    worldcover,
    worldcover_forms,
)
from sarfm.scenes.channels import Target
from sarfm.scenes.open import open_scene
from sarfm.scenes.scene import check_scene


def grid(crs: str, west: float, north: float, step: float, shape: tuple[int, int]) -> xr.Dataset:
    """Place an empty image."""
    rows, columns = (step * (np.arange(n) + 0.5) for n in shape)
    image = xr.DataArray(np.zeros(shape, "float32"), {"y": north - rows, "x": west + columns}, ("y", "x"))
    return image.rio.write_crs(crs).to_dataset(name="vv")


def raster(path) -> xr.DataArray:
    """Read the first band of a file."""
    return rioxarray.open_rasterio(path).load()[0]


# ---- codes and units ----------------------------------------------------------------------------------------------


def test_worldcover_codes_become_the_class_numbers_of_the_published_loader():
    expected = {10: 0, 20: 1, 30: 2, 40: 3, 50: 4, 60: 5, 70: 6, 80: 7, 90: 8, 95: 9, 100: 10}
    target = land_target("land_cover")
    assert {code: int(target.encode(np.uint8([code]))[0]) for code in WORLDCOVER} == expected
    assert target.names[0] == "tree cover" and target.names[10] == "moss and lichen" and len(target.colors) == 11


@pytest.mark.parametrize("stored", ["codes", "indices", "classes"])
def test_unknown_is_never_class_0(stored):
    values = {"codes": [0, 100, 255, 20], "indices": [0, 11, 255, 2], "classes": [255, 10, 255, 1]}[stored]
    numbers = land_target("land_cover").encode(worldcover(np.uint8(values), stored))
    assert numbers.tolist() == [255, 10, 255, 1]
    legacy = land_target("land_cover").encode(worldcover(np.uint8(values), stored, legacy=True))
    assert legacy.tolist() == [0, 10, 0, 1]


def test_the_form_is_told_by_the_values_or_asked():
    assert worldcover_forms([0, 10, 80]) == ["codes"]
    assert worldcover_forms(range(12)) == ["indices"]
    assert worldcover_forms(range(11)) == ["indices", "classes"]
    assert worldcover_forms([0, 10, 255]) == ["codes", "indices", "classes"]
    assert worldcover_forms([10, 77]) == []
    with pytest.raises(ValueError, match="may be codes or indices or classes; state stored="):
        worldcover(np.uint8([0, 10]))
    with pytest.raises(ValueError, match="are no"):
        worldcover(np.uint8([10, 77]))
    with pytest.raises(CorruptData, match=r"got \[12\] too"):
        worldcover(np.uint8([1, 12]), "indices")
    with pytest.raises(ValueError, match="as integers"):
        worldcover([10.0])


def test_tree_cover_of_water_fill_and_nothing():
    stored = np.float32([0, 100, 200, 253, np.nan])
    assert np.array_equal(tree_cover(stored), np.float32([0, 100, 0, np.nan, np.nan]), equal_nan=True)
    assert np.isnan(tree_cover(stored, "unknown")[2:]).all()
    assert tree_cover(stored, legacy=True).tolist() == [0, 100, 0, 253, 0]
    assert tree_cover(np.uint8([7, 200])).tolist() == [7, 0]
    for wrong in (101, 199, 254, 255, -1):
        with pytest.raises(ValueError, match="tree cover is 0 to 100"):
            tree_cover([5, wrong])


def test_built_up_area_and_biomass():
    assert np.array_equal(built(np.uint16([0, 100, 10_000, 65535])), np.float32([0, 0.01, 1, np.nan]), equal_nan=True)
    with pytest.raises(ValueError, match="correct cell_m2"):
        built([10_001])
    assert built([np.nan], legacy=True).tolist() == biomass([np.nan], legacy=True).tolist() == [0]
    with pytest.raises(ValueError, match="no-data value"):
        biomass([-1])


# ---- real rasters -------------------------------------------------------------------------------------------------


def test_real_worldcover_map_on_a_tile(shared):
    """Nearest by GDAL against a lookup of every pixel's centre."""
    label = raster(shared / "misc/esa_worldcover_baltic/worldcover_baltic.tif")
    assert worldcover_forms(label) == ["codes"]
    codes = worldcover(label)
    assert set(np.unique(codes)) == {10, 30, 40, 50, 60, 80, 90, 255}
    assert np.array_equal(codes == 255, label.values == 0)
    tile = grid("EPSG:32633", 342_000, 6_036_000, 10, (448, 448))
    found = label_target("land_cover", label.copy(data=codes), tile)
    lon, lat = Transformer.from_crs(32633, 4326, always_xy=True).transform(*np.meshgrid(tile.x, tile.y))
    a, _, c, _, e, f = label.rio.transform()[:6]
    row, column = (lat - f) / e, (lon - c) / a
    by_hand = codes[np.floor(row).astype(int), np.floor(column).astype(int)]
    other = found.values != by_hand
    border = np.minimum(abs(row - np.round(row)), abs(column - np.round(column)))  # from the source's pixels, px
    assert len(np.unique(by_hand)) > 3 and other.mean() < 0.005 and border[other].max() < 0.05
    assert Target.from_attrs("land_cover", found.attrs) == land_target("land_cover")


def test_real_worldcover_map_on_coarser_pixels(shared):
    """The most frequent class of 8 × 8 pixels against a count."""
    label = raster(shared / "misc/esa_worldcover_baltic/worldcover_baltic.tif")[800 : 800 + 8 * 40, 800 : 800 + 8 * 60]
    codes = worldcover(label)
    a, _, c, _, e, f = label.rio.transform()[:6]
    tile = grid("EPSG:4326", c, f, 8 * a, (40, 60))
    tile = tile.assign_coords(y=f + 8 * e * (np.arange(40) + 0.5))
    found = aligned(label.copy(data=codes), tile, "classes")
    blocks = codes.reshape(40, 8, 60, 8).transpose(0, 2, 1, 3).reshape(40, 60, 64)
    counts = np.stack([(blocks == code).sum(-1) for code in WORLDCOVER])
    best = np.sort(counts, axis=0)
    clear = best[-1] > best[-2]
    assert clear.mean() > 0.9 and (best[-1] < 64).mean() > 0.3  # most blocks are clear, many are mixed
    assert np.array_equal(found[clear], np.array(WORLDCOVER)[counts.argmax(0)][clear])
    fractions = class_fractions(codes)
    assert fractions.sum() == pytest.approx(1, abs=1e-6)
    assert fractions[7] == pytest.approx((codes == 80).sum() / (codes != 255).sum())


def test_real_land_cover_tiles_of_another_legend(shared):
    """Nine classes of another map are taken for WorldCover by nobody, and fit it once they are recoded."""
    for path in sorted((shared / "land/terramesh_s1rtc_lulc").glob("*_LULC.tif")):
        label = raster(path)
        assert worldcover_forms(label) in (["indices", "classes"], ["indices"])
        if set(np.unique(label)) <= set(range(11)):
            with pytest.raises(ValueError, match="may be indices or classes"):
                worldcover(label)
        recoded = np.full(256, 255, np.uint8)
        for code, of in {1: 80, 2: 10, 3: 90, 4: 40, 5: 50, 6: 60, 7: 70, 9: 30}.items():
            recoded[code] = of
        image = str(path).replace("_LULC", "_S1RTC")
        scene = open_scene(image, units="dB", quantity="gamma0")
        scene["land_cover"] = label_target("land_cover", label.copy(data=recoded[label]), scene)
        assert np.array_equal(scene.land_cover, recoded[label.values])
        assert check_scene(scene).sar.targets


def test_real_tree_cover(shared):
    """Means of 7 × 7 pixels by GDAL against means by hand; the tile's mean against NumPy's."""
    label = raster(shared / "vegetation/borneo_treecover/treecover_2016_proxy.tif")[:189, :399]
    percent = label.copy(data=tree_cover(label))
    assert tile_mean(percent) == pytest.approx(label.values.astype(float).mean(), rel=1e-6)
    a, _, c, _, e, f = label.rio.transform()[:6]
    tile = grid("EPSG:4326", c, f, 7 * a, (27, 57)).assign_coords(y=f + 7 * e * (np.arange(27) + 0.5))
    by_hand = label.values.reshape(27, 7, 57, 7).mean((1, 3))
    assert np.abs(label_target("tree_cover", percent, tile).values - by_hand).max() < 0.01


def test_real_biomass_keeps_its_mean_on_another_grid(shared):
    """Samples without a place get one, and the mean over a tile that cuts through their pixels is computed by hand."""
    for path in sorted((shared / "vegetation/biomassters_agb").glob("*.nc"))[:4]:
        with xr.open_dataset(path) as sample:
            stored = sample["agb"].to_numpy()
        assert stored.min() >= 0
        placed = grid("EPSG:32635", 500_000, 6_900_000, 100, stored.shape)
        label = placed["vv"].copy(data=biomass(stored))
        tile = grid("EPSG:32635", 500_430, 6_899_750, 10, (224, 224))
        share = lambda start: np.clip(100 * np.arange(33), start, start + 2240)
        weight = np.outer(np.diff(share(250)), np.diff(share(430)))
        by_hand = float((weight * stored).sum() / weight.sum())
        assert label_target("biomass", label, tile).mean() == pytest.approx(by_hand, rel=2e-5)


def test_unknown_pixels_stay_unknown_and_known_ones_keep_their_numbers():
    label = grid("EPSG:32633", 500_000, 5_000_000, 100, (10, 10))["vv"] + np.float32(50)
    label[:5] = np.nan
    tile = grid("EPSG:32633", 500_000, 5_000_000, 10, (100, 100))
    found = aligned(label, tile, "density")
    assert np.isnan(found[:45]).all() and np.allclose(found[55:], 50)
    codes = label.copy(data=np.where(np.isnan(label), 255, 10).astype("uint8"))
    assert set(np.unique(aligned(codes, tile, "classes"))) == {10, 255}


def test_a_label_without_a_place_or_elsewhere_is_refused(tmp_path):
    label, tile = (
        grid("EPSG:32633", 500_000, 5_000_000, 100, (10, 10)),
        grid("EPSG:32633", 600_000, 5_000_000, 10, (9, 9)),
    )
    with pytest.raises(ValueError, match="take the label of its tile"):
        aligned(label["vv"], tile, "percent")
    with pytest.raises(ValueError, match="has no CRS and grid"):
        aligned(label["vv"].drop_vars("spatial_ref"), tile, "percent")
    with pytest.raises(ValueError, match="convert it first"):
        aligned(label["vv"], tile, "classes")
