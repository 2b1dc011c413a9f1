"""GRD products of ESA's EOPF Zarr: products of two layouts written here, held to formulas of their own."""

import cloudpickle
import numpy as np
import pytest
import xarray as xr
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from scipy.interpolate import RegularGridInterpolator

from sarfm.io.files import CorruptData
from sarfm.land.eopf import along_time, geocode, open_eopf
from sarfm.land.passes import checked_direction, number_passes

H, W, STEP_S, SPACING_M = 130, 170, 6e-3, 10.0
LINES, PIXELS = np.array([0, 50, 100, 150]), np.array([0, 40, 80, 120, 160, 200])
BEGIN = np.datetime64("2024-02-01T16:49:15.722", "ns")
generator = np.random.default_rng(3)
DN = {p: generator.integers(1, 900, (H, W)).astype("uint16") for p in ("vv", "vh")}
A = {p: generator.uniform(300, 500, (4, 6)).astype("float32") for p in DN}
ACROSS = generator.uniform(5e3, 2e4, (4, 6)).astype("float32")
SWATHS = ((0, 89), (90, W - 1))  # first and last pixel
ALONG = generator.uniform(0.5, 2.0, (2, 4)).astype("float32")  # by sub-swath, on LINES
for dn in DN.values():
    dn[:, :5] = 0  # the border


def place(line, pixel):
    """Longitude and latitude of a swath, as a plane in UTM zone 33 that leans."""
    east = 500_000 + 9.8 * np.asarray(pixel) - 2.1 * np.asarray(line)
    north = 5_800_000 - 2.1 * np.asarray(pixel) - 9.8 * np.asarray(line)
    return Transformer.from_crs(32633, 4326, always_xy=True).transform(east, north)


def times(lines):
    return BEGIN + (np.asarray(lines) * STEP_S * 1e9).round().astype("timedelta64[ns]")


def coords(lines, pixels, old):
    held = {"azimuth_time": times(lines), "ground_range": SPACING_M * np.asarray(pixels, float)}
    counted = {"line": ("azimuth_time", lines), "pixel": ("ground_range", pixels)}
    return held | (counted if old else {})


def groups(pol, old):
    """Build the groups of one polarisation; `old` is the layout of CPM 2.x, with lines and pixels."""
    dims = ("azimuth_time", "ground_range")
    lon, lat = place(*np.meshgrid(LINES, PIXELS, indexing="ij"))
    nodes = coords(LINES, PIXELS, old)
    swaths = {f"{end}_range_sample": ("swath", [s[k] for s in SWATHS]) for k, end in enumerate(("first", "last"))}
    swaths |= {"first_azimuth_line": ("swath", [0, 0]), "last_azimuth_line": ("swath", [H - 1, H - 1])}
    along = xr.Dataset(
        {"noise_azimuth_lut": (("azimuth_time", "swath"), ALONG.T)} | swaths, {"azimuth_time": times(LINES)}
    )
    if old:
        along = along.drop_vars("azimuth_time").rename(azimuth_time="line").assign_coords(line=LINES)
    return {
        "measurements": xr.Dataset({"grd": (dims, DN[pol])}, coords(np.arange(H), np.arange(W), old)),
        "conditions/gcp": xr.Dataset(
            {"longitude": (dims, lon), "latitude": (dims, lat), "height": (dims, np.zeros_like(lon))}, nodes
        ),
        "quality/calibration": xr.Dataset(
            {"sigma_nought": (dims, A[pol]), "beta_nought": (dims, 2 * A[pol]), "gamma": (dims, 3 * A[pol])}, nodes
        ),
        "quality/noise_range": xr.Dataset({"noise_range_lut": (dims, ACROSS)}, nodes),
        "quality/noise_azimuth": along,
    }


ATTRS = {
    "stac_discovery": {
        "properties": {"product:type": "S01SIWGRD", "platform": "sentinel-1a", "sat:orbit_state": "ascending"}
    },
    "other_metadata": {},
}


def write(path, layout="2", change=None, attrs=ATTRS):
    """Write a product; `change` may alter its groups before."""
    tree = {}
    if layout == "2":
        for pol in DN:
            tree |= {f"S01SIWGRD_20240201T164915_{pol.upper()}/{n}": g for n, g in groups(pol, True).items()}
    else:
        both = {pol: groups(pol, False) for pol in ("vh", "vv")}
        for name in both["vv"]:
            stacked = xr.concat([both[p][name] for p in both], dim="polarization", data_vars="all", coords="minimal")
            tree[f"S01SIWGRD_20240201T164915/{name}"] = stacked.assign_coords(polarization=["VH", "VV"])
    if change:
        change(tree)
    tree["/"] = xr.Dataset(attrs=attrs)
    kind = {"zarr_format": 2} if layout == "2" else {"zarr_format": 3, "consolidated": False}
    xr.DataTree.from_dict(tree).to_zarr(path, mode="w", **kind)
    return path


def bilinear(table):
    """A table at every pixel, by SciPy."""
    at = np.stack(np.meshgrid(np.arange(H), np.arange(W), indexing="ij"), axis=-1)
    return RegularGridInterpolator((LINES, PIXELS), table.astype(float))(at)


def noise():
    """Thermal noise of every pixel: across range times along the flight."""
    along = np.stack([np.interp(np.arange(H), LINES, factor) for factor in ALONG])
    return bilinear(ACROSS) * np.where(np.arange(W) <= SWATHS[0][1], along[0][:, None], along[1][:, None])


@pytest.fixture(params=["2", "3"])
def product(request, tmp_path):
    return write(tmp_path / "S1A.zarr", request.param)


def test_sigma0_is_the_square_over_the_table(product):
    scene = open_eopf(product)
    assert list(scene.data_vars) == ["vv", "vh", "valid"] and scene.sar.units == "1" and scene.sar.quantity == "sigma0"
    assert scene.vv.chunks is not None
    for pol, dn in DN.items():
        expected = np.where(dn > 0, dn.astype(float) ** 2 / bilinear(A[pol]) ** 2, np.nan)
        np.testing.assert_allclose(scene[pol], expected, rtol=1e-5)
    assert not scene.valid[:, :5].any() and scene.valid[:, 5:].all()
    assert scene.attrs["thermal_noise"] == "kept" and scene.attrs["mode"] == "IW" and scene.attrs["processing"] == "GRD"


@pytest.mark.parametrize(("quantity", "factor"), [("beta0", 4), ("gamma0", 9)])
def test_other_tables(product, quantity, factor):
    scene = open_eopf(product, quantity=quantity, polarisations=["VH"])
    assert list(scene.data_vars) == ["vh", "valid"] and scene.sar.quantity == quantity
    expected = np.where(DN["vh"] > 0, DN["vh"].astype(float) ** 2 / bilinear(A["vh"]) ** 2 / factor, np.nan)
    np.testing.assert_allclose(scene.vh, expected, rtol=1e-5)


@pytest.mark.parametrize("negative", ["invalid", "zero"])
def test_thermal_noise(product, negative):
    scene = open_eopf(product, noise="subtract", negative=negative)
    for pol, dn in DN.items():
        power = dn.astype(float) ** 2 - noise()
        expected = np.where(power < 0, np.nan if negative == "invalid" else 0, power) / bilinear(A[pol]) ** 2
        expected = np.where(dn > 0, expected, np.nan)
        np.testing.assert_allclose(scene[pol], expected, rtol=1e-3, atol=1e-6)
        assert (power[dn > 0] < 0).mean() > 0.01  # the case occurs
    assert negative in scene.attrs["thermal_noise"] and "noise" in scene.attrs["formula"]


def test_blocks_make_no_difference(product):
    whole, parts = (open_eopf(product, noise="subtract", chunks=chunks) for chunks in (None, 37))
    assert len(parts.vv.chunks[0]) == 4
    np.testing.assert_array_equal(whole.vv, parts.vv)


def test_place_time_and_orbit(product):
    scene = open_eopf(product)
    lon, lat = scene.sar.lonlat()
    true = place(*np.indices((H, W)))
    metres = np.hypot((lon - true[0]) * 67_800, (lat - true[1]) * 111_300)
    assert metres.max() < 0.5, "the nodes count the middles of pixels"
    assert abs(scene.time.values - times([(H - 1) / 2])[0]) < np.timedelta64(1, "us")
    assert str(scene.orbit_direction.values) == "ascending" and str(scene.platform.values) == "sentinel-1a"


def test_lines_and_pixels_count_before_ground_range(tmp_path):
    def wrong(tree):  # the fault of CPM 2.6
        for name in [n for n in tree if n.endswith("calibration")]:
            tree[name] = tree[name].assign_coords(ground_range=tree[name].ground_range * 3.7)

    product = write(tmp_path / "a.zarr", change=wrong)
    np.testing.assert_allclose(open_eopf(product).vv, open_eopf(write(tmp_path / "b.zarr")).vv)


def test_nodes_that_differ_from_line_to_line(tmp_path):
    def uneven(tree):  # as range noise has them: missing nodes are -1
        for name in [n for n in tree if n.endswith("noise_range")]:
            pixel = np.broadcast_to(PIXELS, (4, 6)).copy()
            pixel[1, 2] = -1
            tree[name] = tree[name].drop_vars("pixel").assign_coords(pixel=(("azimuth_time", "ground_range"), pixel))

    scene = open_eopf(write(tmp_path / "a.zarr", change=uneven), noise="subtract", negative="zero")
    table = ACROSS.astype(float).copy()
    table[1, 2] = (table[1, 1] + table[1, 3]) / 2
    along = np.stack([np.interp(np.arange(H), LINES, factor) for factor in ALONG])
    factor = np.where(np.arange(W) <= SWATHS[0][1], along[0][:, None], along[1][:, None])
    expected = np.clip(DN["vv"].astype(float) ** 2 - bilinear(table) * factor, 0, None) / bilinear(A["vv"]) ** 2
    np.testing.assert_allclose(scene.vv.values[:, 5:], expected[:, 5:], rtol=1e-3, atol=1e-6)


def drop(end):
    return lambda tree: [tree.pop(name) for name in list(tree) if name.endswith(end)]


def alter(end, how):
    def change(tree):
        for name in [n for n in tree if n.endswith(end)]:
            tree[name] = how(tree[name])

    return change


FAULTS = {
    "no calibration": (drop("calibration"), {}, "expected quality/calibration"),
    "no noise": (drop("noise_range"), {"noise": "subtract"}, "noise='keep'"),
    "zero noise": (alter("noise_range", lambda g: g * 0), {"noise": "subtract"}, "all of its table is zero"),
    "noise of unknown order": (
        alter("noise_azimuth", lambda g: g.drop_vars("line")),
        {"noise": "subtract"},
        "noise_azimuth_lut by swath",
    ),
    "no tie points": (drop("gcp"), {}, "expected conditions/gcp"),
    "one tie point": (
        alter("gcp", lambda g: g.where((g.line == 0) & (g.pixel == 0)).assign_coords(g.coords)),
        {},
        "1 are filled in",
    ),
    "table of part of the image": (
        alter("calibration", lambda g: g.isel(ground_range=slice(0, 2))),
        {},
        "from pixel 0 to 40",
    ),
    "table of part of the lines": (
        alter("calibration", lambda g: g.isel(azimuth_time=slice(0, 2))),
        {},
        "from line 0 to 50",
    ),
    "table of zeros": (alter("calibration", lambda g: g * 0), {}, "a table above zero"),
    "table of nothing": (alter("calibration", lambda g: g * np.nan), {}, "all are missing"),
    "no positions": (
        alter("calibration", lambda g: g.drop_vars(["line", "azimuth_time"])),
        {},
        "expected 'line', or 'azimuth_time'",
    ),
    "polarisation": (None, {"polarisations": ["hh"]}, "has no 'hh'; it holds"),
    "quantity": (None, {"quantity": "sigma"}, "expected quantity of .* Did you mean 'sigma0'"),
    "noise word": (None, {"noise": "remove"}, "expected noise of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(tmp_path, fault):
    change, how, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        open_eopf(write(tmp_path / "S1A.zarr", change=change), **how)


def test_other_products_are_refused(tmp_path):
    attrs = {"stac_discovery": {"properties": {"product:type": "S01SIWSLC"}}}
    slc = {
        "S01SIWSLC_VH_IW1_604570/measurements": xr.Dataset(
            {"slc": (("azimuth_time", "slant_range_time"), np.ones((3, 3)))}
        )
    }
    xr.DataTree.from_dict(slc | {"/": xr.Dataset(attrs=attrs)}).to_zarr(tmp_path / "slc.zarr", zarr_format=2)
    with pytest.raises(ValueError, match="S01SIWSLC and holds .*604570"):
        open_eopf(tmp_path / "slc.zarr")
    with pytest.raises(FileNotFoundError, match="no product"):
        open_eopf(tmp_path / "absent.zarr")
    (tmp_path / "text.zarr").write_text("no")
    with pytest.raises(CorruptData, match=r"text\.zarr"):
        open_eopf(tmp_path / "text.zarr")


def test_an_orbit_that_is_not_stated_is_refused(tmp_path):
    attrs = {"stac_discovery": {"properties": {"product:type": "S01SIWGRD", "platform": "sentinel-1a"}}}
    with pytest.raises(ValueError, match="sat:orbit_state"):
        open_eopf(write(tmp_path / "S1A.zarr", attrs=attrs))


# ---- on a grid ----------------------------------------------------------------------------------------------------

GRID = GeoBox.from_bbox((500_050, 5_798_600, 501_350, 5_799_800), crs="EPSG:32633", resolution=10)


def pixels_of(grid):
    """Rows and columns of the swath at a grid's pixels, by solving the plane; whole numbers are middles."""
    east, north = np.meshgrid(*(grid.coordinates[d].values for d in ("x", "y")))
    solved = np.linalg.solve([[-2.1, 9.8], [-9.8, -2.1]], np.stack([east - 500_000, north - 5_800_000]).reshape(2, -1))
    return solved.reshape(2, *east.shape)


def test_power_is_interpolated_where_the_swath_has_the_place(product):
    scene = open_eopf(product)
    mapped = geocode(scene, GRID, chunks=40)
    at = pixels_of(GRID)
    inside = (at[0] > 0) & (at[0] < H - 1) & (at[1] > 5) & (at[1] < W - 1)
    interpolated = RegularGridInterpolator((np.arange(H), np.arange(W)), scene.vv.values, bounds_error=False)
    expected = interpolated(np.moveaxis(at, 0, -1))
    found = mapped.vv.values
    assert inside.mean() > 0.5 and np.isfinite(found[inside]).mean() > 0.999
    both = inside & np.isfinite(expected) & np.isfinite(found)
    np.testing.assert_allclose(found[both], expected[both], rtol=0.02, atol=0.02)  # places to 0.5 m of 10
    assert abs(found[both] - expected[both]).mean() < 2e-3
    outside = (at[0] < -1) | (at[0] > H) | (at[1] < -1) | (at[1] > W)
    assert outside.any() and not mapped.valid.values[outside].any()
    assert mapped.odc.geobox == GRID and mapped.vv.chunks is not None
    assert str(mapped.orbit_direction.values) == "ascending" and mapped.time == scene.time


def test_nearest_takes_pixels_as_they_are(product):
    scene = open_eopf(product)
    found = geocode(scene, GRID, resampling="nearest").vv.values
    at = np.floor(pixels_of(GRID) + 0.5).astype(int)
    clear = abs(pixels_of(GRID) + 0.5 - np.round(pixels_of(GRID) + 0.5)).min(axis=0) > 0.05  # not at an edge of a pixel
    clear &= (at[0] >= 0) & (at[0] < H) & (at[1] >= 5) & (at[1] < W)
    np.testing.assert_array_equal(found[clear], scene.vv.values[at[0][clear], at[1][clear]])


def test_a_coarser_grid_is_of_means(product):
    scene = open_eopf(product)
    coarse = geocode(scene, GRID.zoom_out(5))
    assert "5 × 5" in coarse.attrs["resampling"]
    assert float(coarse.vv.std()) < 0.35 * float(scene.vv.std()), "speckle of 25 pixels is averaged"
    assert abs(float(coarse.vv.mean()) / float(scene.vv.mean()) - 1) < 0.05


def test_geocode_asks_for_power_of_one_date(product):
    scene = open_eopf(product)
    with pytest.raises(ValueError, match="linear power"):
        geocode(scene.sar.to_db(), GRID)
    with pytest.raises(ValueError, match="expected resampling of"):
        geocode(scene, GRID, resampling="cubic")


def test_a_lazy_map_can_be_sent_to_workers(product):
    mapped = cloudpickle.loads(cloudpickle.dumps(geocode(open_eopf(product, noise="subtract"), GRID, chunks=50)))
    here = geocode(open_eopf(product, noise="subtract"), GRID).vv
    np.testing.assert_allclose(mapped.vv, here, rtol=1e-4)


def frame(begin, direction, value, columns, platform="sentinel-1a"):
    """A scene of one frame on the grid, valid in some columns."""
    from sarfm.scenes.scene import make_scene

    values = np.full(tuple(GRID.shape), np.nan, "float32")
    values[:, columns] = value
    scene = make_scene(
        {"vv": values}, units="1", quantity="sigma0", crs=str(GRID.crs), transform=tuple(GRID.affine)[:6]
    )
    stated = {"orbit_direction": direction, "platform": platform}
    return scene.assign_coords(time=np.datetime64(begin, "ns"), **stated).assign_attrs(source=begin)


def test_frames_of_an_overflight_are_one_date():
    frames = [
        frame("2024-02-01T16:49:40", "ascending", 0.2, slice(60, 130)),
        frame("2024-02-01T05:25:00", "descending", 0.5, slice(0, 130)),
        frame("2024-02-01T16:49:15", "ascending", 0.1, slice(0, 70)),
    ]
    stack = along_time(frames)
    assert stack.vv.dims == ("time", "y", "x") and list(stack.orbit_direction.values) == ["descending", "ascending"]
    assert list(stack.time.values) == [np.datetime64(t) for t in ("2024-02-01T05:25:00", "2024-02-01T16:49:15")]
    assert (stack.vv[1, :, :70] == np.float32(0.1)).all() and (stack.vv[1, :, 70:] == np.float32(0.2)).all()
    assert stack.valid.all()


def test_scenes_that_do_not_fit_are_refused():
    one, other = frame("2024-02-01", "ascending", 0.1, slice(None)), frame("2024-03-01", "ascending", 0.1, slice(None))
    with pytest.raises(ValueError, match="expected the grid of"):
        along_time([one, other.assign_coords(x=other.x + 10)])
    with pytest.raises(ValueError, match="'platform'"):
        along_time([one, other.drop_vars("platform")])
    with pytest.raises(ValueError, match="convert one"):
        along_time([one, other.sar.to_db()])


# ---- overflights --------------------------------------------------------------------------------------------------


def test_overflights_by_satellite_direction_and_gap():
    base = np.datetime64("2023-05-04T23:55:00", "ns")
    flown = [(0, "descending", "a"), (25, "descending", "a"), (590, "descending", "a"), (1300, "descending", "a")]
    flown += [(30, "ascending", "a"), (30, "descending", "b")]
    times = [base + np.timedelta64(s, "s") for s, *_ in flown]
    numbers = list(number_passes(times, [f[1] for f in flown], [f[2] for f in flown]))
    assert numbers[0] == numbers[1] == numbers[2] == 0 and len(set(numbers)) == 4
    assert numbers[3] == 3, "in the order of their beginnings"
    order = [5, 3, 0, 4, 2, 1]
    shuffled = number_passes([times[k] for k in order], [flown[k][1] for k in order], [flown[k][2] for k in order])
    same = lambda one: {(i, j) for i in range(6) for j in range(6) if one[i] == one[j]}
    assert same([numbers[k] for k in order]) == same(list(shuffled))


def test_directions_are_understood_or_refused():
    assert checked_direction(" ASCENDING ", "x") == "ascending"
    for word in (None, "", "geostationary"):
        with pytest.raises(ValueError, match="S1A: expected its orbit"):
            checked_direction(word, "S1A")
