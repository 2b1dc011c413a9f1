"""Coarser scenes: the sources' way to the bit of torch, the right way in power, in place, and band by band."""

import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr

from sarfm.patches.prepare import restore, write_store
from sarfm.patches.scales import coarse_size, downscale
from sarfm.scenes.open import check_scene, make_scene
from sarfm.scenes.scene import scene_lonlat, spacing_m


def ice(height=143, width=160, seed=0, **attrs):
    """Make a scene as the AI4Arctic reader makes them: swath, charts, other fields, a corner without data."""
    g = np.random.default_rng(seed)
    hh = g.normal(-14, 3, (height, width)).astype(np.float32)
    hh[: height // 6, : width // 5] = np.nan
    hh[g.random((height, width)) < 0.01] = np.nan
    codes = g.integers(0, 6, (height // 16 + 1, width // 16 + 1)).repeat(16, 0).repeat(16, 1)[:height, :width]
    codes = np.where(g.random((height, width)) < 0.1, 255, codes).astype(np.uint8)
    r, c = (v.ravel() for v in np.meshgrid(np.linspace(0, height, 6), np.linspace(0, width, 6), indexing="ij"))
    scene = make_scene(
        {"hh": hh, "hv": hh - 8 + g.normal(0, 1, hh.shape).astype(np.float32)},
        units="dB",
        quantity="sigma0",
        labels={"sod": (codes, {k: f"class {k}" for k in range(6)})},
        gcps=np.stack([r, c, -30 + 0.002 * c + 0.0003 * r, 80 - 0.00036 * r], axis=1),
        attrs={"spacing_m": 40.0, "part": "test", "scene": "a", **attrs},
    )
    angle = np.broadcast_to(np.linspace(19, 47, width, dtype=np.float32), hh.shape)
    scene["incidence_angle"] = (("y", "x"), angle.copy(), {"units": "degree", "quantity": "incidence_angle"})
    scene["distance_map"] = (
        ("y", "x"),
        g.integers(0, 41, hh.shape).astype(np.float32),
        {"units": "1", "quantity": "distance"},
    )
    scene["lead"] = (("y", "x"), g.random(hh.shape) < 0.05, {"units": "1", "quantity": "mask"})
    scene["t2m"] = (
        ("y_2km", "x_2km"),
        g.normal(268, 9, (3, 4)).astype(np.float32),
        {"units": "K", "quantity": "temperature"},
    )
    return check_scene(scene)


def by_torch(values, size, pool=True, mode="bilinear"):
    """Downscale as the sources' code does."""
    values = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    values = torch.nn.functional.avg_pool2d(values, 2) if pool else values
    how = {} if mode == "nearest" else {"align_corners": False}
    return torch.nn.functional.interpolate(values, size, mode=mode, **how)[0, 0].numpy()


@pytest.mark.parametrize("factor", range(2, 11))
@pytest.mark.parametrize("shape", [(143, 160), (200, 301)])
def test_db_is_what_the_sources_do(factor, shape):
    scene = ice(*shape)
    coarse = downscale(scene, factor, "db")
    size = tuple(int(n // 2 // (factor / 2)) for n in shape)
    assert (coarse.sizes["y"], coarse.sizes["x"]) == size
    for name in ("hh", "hv"):
        wanted = by_torch(scene[name].to_numpy(), size)
        assert np.array_equal(np.isnan(coarse[name]), np.isnan(wanted))
        assert np.nanmax(np.abs(coarse[name] - wanted)) < 1e-3
    for name in ("distance_map", "incidence_angle"):
        assert np.abs(coarse[name] - by_torch(scene[name].to_numpy(), size, pool=False)).max() < 1e-3
    assert np.array_equal(coarse["sod"], by_torch(scene["sod"].to_numpy(), size, pool=False, mode="nearest"))
    assert np.array_equal(coarse["valid"], np.isfinite(coarse["hh"]) & np.isfinite(coarse["hv"]))


@pytest.mark.parametrize("length", [9999, 10_000, 10_001, 10_417])
def test_nearest_is_torchs_at_full_size(length):
    from sarfm.patches.scales import nearest_axis

    numbers = torch.arange(length, dtype=torch.float64)[None, None]
    for factor in range(2, 11):
        size = coarse_size(length, factor, "db")
        theirs = torch.nn.functional.interpolate(numbers.float(), size, mode="nearest")[0, 0].long()
        assert np.array_equal(nearest_axis(length, size).first, theirs)


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_power_is_the_mean_power_of_what_half_is_seen(factor):
    scene = ice()
    coarse = downscale(scene, factor)
    rows, cols = 143 // factor, 160 // factor
    blocks = scene["hh"].to_numpy()[: rows * factor, : cols * factor].reshape(rows, factor, cols, factor)
    power, seen = 10 ** (blocks.astype(float) / 10), np.isfinite(blocks)
    wanted = np.full((rows, cols), np.nan)
    enough = seen.mean((1, 3)) >= 0.5
    wanted[enough] = 10 * np.log10(np.where(seen, power, 0).sum((1, 3))[enough] / seen.sum((1, 3))[enough])
    assert np.array_equal(np.isnan(coarse["hh"]), np.isnan(wanted)) and 0 < np.isnan(wanted).sum() < wanted.size
    assert np.nanmax(np.abs(coarse["hh"] - wanted)) < 1e-4
    middle = scene["sod"].to_numpy()[factor // 2 :: factor, factor // 2 :: factor][:rows, :cols]
    assert np.array_equal(coarse["sod"], middle)


def test_a_masked_pixel_has_no_say():
    scene = ice()
    hidden = scene.assign(valid=scene.valid & (np.arange(160) >= 80))
    for average in ("power", "db"):
        coarse = downscale(hidden, 4, average)
        assert not coarse["valid"][:, :19].any() and coarse["valid"][10:, 21:].mean() > 0.5
    power = downscale(scene.sar.to_power(), 4)
    assert power.hh.attrs["units"] == "1"
    assert np.allclose(10 * np.log10(power.hh), downscale(scene, 4).hh, atol=1e-3, equal_nan=True)


def test_what_it_states():
    scene = ice(looks=10.0)
    for average in ("power", "db"):
        coarse = check_scene(downscale(scene, 5, average))
        assert coarse.attrs["spacing_m"] == 200 and coarse.attrs["scale"] == 5 and coarse.attrs["part"] == "test"
        assert coarse["sod"].attrs["flag_meanings"] == scene["sod"].attrs["flag_meanings"]
        assert {v: coarse[v].dtype for v in scene.data_vars} == {v: scene[v].dtype for v in scene.data_vars}
        assert coarse["t2m"].identical(scene["t2m"]) and coarse["hh"].attrs == scene["hh"].attrs
    assert downscale(scene, 5).attrs["looks"] == 250 and downscale(scene, 5, "db").attrs["looks"] == 10
    same = downscale(scene, 1)
    assert same.attrs["scale"] == 1 and same.drop_attrs(deep=False).identical(scene.drop_attrs(deep=False))


@pytest.mark.parametrize("average", ["power", "db"])
@pytest.mark.parametrize("factor", [2, 5, 7])
def test_a_pixel_stays_where_it_is(average, factor):
    scene = ice(301, 403)
    coarse = downscale(scene, factor, average)
    size = coarse.sizes["y"], coarse.sizes["x"]
    scale = [factor if average == "power" else n // 2 * 2 / m for n, m in zip((301, 403), size, strict=True)]
    middles = [(np.arange(m) + 0.5) * s for m, s in zip(size, scale, strict=True)]  # in fine pixels
    fine = xr.Dataset(coords={"y": middles[0], "x": middles[1]} | {k: scene[k] for k in scene.coords if "gcp" in k})
    for wanted, got, px in zip(scene_lonlat(fine), scene_lonlat(coarse), (0.002, 0.00036), strict=True):
        assert np.abs(wanted - got).max() < 0.05 * factor * px
    assert spacing_m(coarse) == pytest.approx(factor * spacing_m(scene), rel=0.03)


def test_a_map_keeps_its_crs():
    place = dict(crs="EPSG:3413", transform=(40.0, 0, 1e5, 0, -40.0, -2e6))
    values = np.random.default_rng(0).normal(-12, 3, (100, 120))
    scene = make_scene({"hh": values}, units="dB", quantity="sigma0", **place)
    coarse = downscale(scene, 5)
    assert spacing_m(coarse) == pytest.approx(200) and "spatial_ref" in coarse.coords
    assert coarse.x[0] == 1e5 + 100 and coarse.y[0] == -2e6 - 100 and coarse.x[-1] == 1e5 + 4700
    assert spacing_m(downscale(scene, 5, "db")) == pytest.approx(200)


def test_dates_are_averaged_each():
    pair = np.random.default_rng(0).normal(-12, 3, (2, 60, 80)).astype(np.float32)
    scene = make_scene({"vv": pair}, units="dB", quantity="gamma0", times=["before", "after"])
    one = make_scene({"vv": pair[1]}, units="dB", quantity="gamma0")
    for average in ("power", "db"):
        coarse = check_scene(downscale(scene, 4, average))
        assert np.array_equal(coarse["vv"][1], downscale(one, 4, average)["vv"])


@pytest.mark.parametrize("average", ["power", "db"])
def test_lazy_is_the_same(average):
    scene = ice(1200, 300)
    lazy = downscale(scene.chunk(y=100, x=130), 3, average)
    assert all(lazy[v].chunks for v in lazy.data_vars)
    xr.testing.assert_identical(lazy.compute(), downscale(scene, 3, average))


@pytest.mark.parametrize("average", ["power", "db"])
def test_a_band_reads_only_its_rows(average):
    asked = []

    def chunk(block_info=None):
        asked.append(block_info[None]["array-location"][0][0])
        return np.full((100, 50), -12, np.float32)

    values = da.map_blocks(chunk, chunks=((100,) * 100, (50,)), dtype="f4", meta=np.empty((0, 0), "f4"))
    scene = make_scene({"hh": values}, units="dB", quantity="sigma0", attrs={"spacing_m": 40.0})
    coarse = downscale(scene, 5, average)
    assert asked == []
    coarse.isel(y=slice(1000, 1100)).compute(scheduler="synchronous")  # fine rows 5000 to 5499
    assert len(asked) == len(set(asked)) and min(asked) >= 3500 and max(asked) < 7000


def test_planning_and_cutting_a_lazy_scene_never_holds_it(tmp_path, monkeypatch):
    scene = ice(1200, 300)
    most = []
    whole = xr.Dataset.load

    def load(self, **kwargs):
        most.append(self.sizes.get("y", 1) if self.chunks else 0)
        return whole(self, **kwargs)

    monkeypatch.setattr(xr.Dataset, "load", load)
    lazy = write_store({"a": scene.chunk(y=128)}, tmp_path / "l.zarr", size=64, scales=[2, 3], progress=False)
    assert most.count(1) == 1 and max(most) == 64  # the middle row of the source once, then bands
    monkeypatch.undo()
    eager = write_store({"a": scene}, tmp_path / "e.zarr", size=64, scales=[2, 3], progress=False)
    for array in eager.arrays:
        assert all(eager.read(k, array).tobytes() == lazy.read(k, array).tobytes() for k in range(len(eager)))


class Counting(dict):
    """Count how often a scene is opened."""

    opened = 0

    def __getitem__(self, name):
        Counting.opened += 1
        return super().__getitem__(name)


def test_all_scales_and_dates_open_the_source_once(tmp_path):
    Counting.opened = 0
    scenes = Counting(a=ice(), b=ice(seed=1).assign_attrs(columns="colour", colour="blue"))
    store = write_store(scenes, tmp_path / "s.zarr", size=32, scales=[2, 5], dates="scenes", progress=False)
    assert Counting.opened == 2
    assert store.scenes[["place", "factor"]].values.tolist() == [["a", 2], ["a", 5], ["b", 2], ["b", 5]]
    assert store.index.groupby("scene").spacing_m.first().tolist() == [80, 200, 80, 200]
    assert set(store.index["part"]) == {"test"}
    wanted = downscale(ice(seed=1), 5).drop_vars(["incidence_angle", "distance_map", "lead", "t2m"])
    name = store.scenes.index[3]
    xr.testing.assert_identical(restore(store, name), wanted.assign_attrs(columns="colour", colour="blue"))


WRONG = {
    "average": (lambda s: downscale(s, 5, "mean"), "average is 'power'"),
    "factor": (lambda s: downscale(s, 100), "from 1 to half the scene's 143 px; got 100"),
    "fraction": (lambda s: downscale(s, 2.5), "whole number"),
    "unit": (lambda s: downscale(s.sar.to_power(), 5, "db"), "decibels can't be averaged"),
    "twice": (lambda s: write_store({"a": s}, "nowhere.zarr", scales=[2, 2]), "each once"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case):
    ask, message = WRONG[case]
    with pytest.raises((ValueError, KeyError), match=message):
        ask(ice())


def a_cover(lazy=False):
    """Make a scene with a percentage, unknown in parts."""
    g = np.random.default_rng(0)
    cover = g.integers(0, 101, (61, 47)).astype(np.uint8)
    cover[:20, :20] = 255  # no data, beyond the limits
    cover[::7] = 255
    attrs = {"target_kind": "number", "units": "%", "valid_min": 0.0, "valid_max": 100.0}
    scene = make_scene({"vv": g.normal(-10, 2, (61, 47)).astype(np.float32)}, units="dB", quantity="gamma0")
    scene["cover"] = ("y", "x"), cover, attrs
    return scene.chunk(y=16, x=16) if lazy else scene


@pytest.mark.parametrize("average", ["power", "db"])
def test_numbers_are_averaged_over_the_area_where_they_are_known(average):
    scene, factor = a_cover(), 5
    coarse = downscale(scene, factor, average).cover
    known = np.where(scene.cover == 255, np.nan, scene.cover.astype(float))
    size = coarse.shape
    step = [factor, factor] if average == "power" else [n // 2 * 2 / k for n, k in zip((61, 47), size, strict=True)]
    edges = [np.floor(np.arange(k + 1) * s).astype(int) for k, s in zip(size, step, strict=True)]
    for i in range(size[0]):
        for j in range(size[1]):
            block = known[edges[0][i] : edges[0][i + 1], edges[1][j] : edges[1][j + 1]]
            mean = np.nan if np.isnan(block).all() else np.nanmean(block)
            np.testing.assert_allclose(coarse[i, j], mean, rtol=1e-6)
    assert np.isnan(coarse[0, 0]) and coarse.dtype == np.float32
    np.testing.assert_array_equal(downscale(a_cover(lazy=True), factor, average).cover, coarse)
    if average == "power":
        np.testing.assert_allclose(scene.sar.looks(factor).cover, coarse, rtol=1e-6)


@pytest.mark.parametrize(
    "coarser", [lambda s: downscale(s, 2), lambda s: downscale(s, 2, "db"), lambda s: s.sar.looks(2)]
)
def test_a_phase_is_never_averaged(coarser):
    values = np.random.default_rng(0).uniform(-np.pi, np.pi, (8, 8)).astype(np.float32)
    bands = {"vv": values - 10, "interferogram": values}
    said = dict(units={"vv": "dB", "interferogram": "rad"}, quantity={"vv": "sigma0", "interferogram": "phase"})
    with pytest.raises(ValueError, match="interferogram is a phase: an angle that wraps"):
        coarser(make_scene(bands, **said))
    coarser(make_scene({"vv": values - 10}, units="dB", quantity="sigma0"))
