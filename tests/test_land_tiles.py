"""Tiles of a region, from a stack that is larger than memory, on workers of whom one is killed: complete, and right to the bit.

The stack is a formula of date, row and column, so that NumPy alone can say what each tile must hold.
"""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import rioxarray  # noqa: F401 (the rio accessor)
import xarray as xr
from conftest import SOAK
from odc.geo.geobox import GeoBox
from patience import PATIENCE_S

from sarfm.land.composites import SEASONS, season_channels, seasonal_composites
from sarfm.land.tiles import (
    TileGrid,
    assemble,
    make_tiles,
    region_geometry,
    tile_map,
    tiles_of,
    to_grid,
    write_entry,
)
from sarfm.patches.prepare import prepare_store
from sarfm.scenes.open import make_scene, open_scene
from sarfm.scenes.scene import check_scene

LAND = Path(__file__).parents[2] / "shared/data/land"
DAYS = [f"2021-{month:02d}-{day}" for month in range(1, 12) for day in ("05", "20")]  # 22: 4, 6, 6 and 6 of a season
COMPOSE = {"year": 2021, "orbit": "ascending"}
GRID = TileGrid("EPSG:32631", 64)
HOLE = (slice(10, 40), slice(30, 50))  # where the first date has nothing


def formula(date: int, rows: np.ndarray, columns: np.ndarray, channel: int) -> np.ndarray:
    """Say what the stack holds, dB: (H, W) float32, NaN in the hole of the first date."""
    y, x = rows[:, None], columns[None]
    steps = (7 * y + 13 * x + 31 * date + 17 * channel) % 101 + 3 * ((y // 64 * 17 + x // 64 * 5 + date * date) % 23)
    db = (-26 + steps / 10 - 5 * channel).astype("float32")
    inside = (date == 0) & (y >= HOLE[0].start) & (y < HOLE[0].stop) & (x >= HOLE[1].start) & (x < HOLE[1].stop)
    return np.where(inside, np.float32(np.nan), db)


def write_stack(path: Path, height: int, width: int, block: int, days: list[str] = DAYS) -> Path:
    """Write the stack as Zarr, block by block: a user's own file with units, quantity and a CRS."""
    import dask
    import dask.array as da
    from pyproj import CRS

    def fill(channel: int, block_info=None) -> np.ndarray:
        (date, _), rows, columns = block_info[None]["array-location"]
        return formula(date, np.arange(*rows), np.arange(*columns), channel)[None]

    chunks = da.core.normalize_chunks((1, block, block), shape=(len(days), height, width), dtype="f4")
    make = lambda channel: da.map_blocks(fill, channel, chunks=chunks, dtype="f4", meta=np.empty((0, 0, 0), "f4"))
    dims, said = ("time", "y", "x"), {"units": "dB", "quantity": "sigma0", "grid_mapping": "spatial_ref"}
    coords = {"time": np.array(days, "datetime64[ns]"), "y": 5_600_000 - 10 * (np.arange(height) + 0.5)}
    coords |= {"x": 500_000 + 10 * (np.arange(width) + 0.5), "spatial_ref": ((), 0, CRS.from_epsg(32631).to_cf())}
    with dask.config.set(scheduler="threads", num_workers=2):
        xr.Dataset({n: (dims, make(k), said) for k, n in enumerate(("vv", "vh"))}, coords).to_zarr(
            path, zarr_format=3, consolidated=False
        )
    return path


def expected(rows: slice, columns: slice, days: list[str] = DAYS) -> dict[str, np.ndarray]:
    """Compose a window with NumPy alone: channel to (H, W) float32, and the counts by season."""
    at, out, counts = (np.arange(rows.start, rows.stop), np.arange(columns.start, columns.stop)), {}, {}
    stack = [np.stack([formula(date, *at, channel) for date in range(len(days))]) for channel in (0, 1)]
    seen = np.isfinite(stack[0]) & np.isfinite(stack[1])
    of = np.array([(int(day[5:7]) % 12) // 3 for day in days])
    for number, season in enumerate(SEASONS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            powers = [np.where(seen, 10 ** (v / 10), np.nan).astype("float32")[of == number] for v in stack]
            vv, vh = (10 * np.log10(np.nanmedian(power, axis=0)) for power in powers)
        out |= {f"vv@{season}": vv, f"vh@{season}": vh, f"ratio@{season}": vv - vh}
        counts[season] = seen[of == number].sum(0)
    return out | {"counts": counts}


def window_of(box: GeoBox) -> tuple[slice, slice]:
    """Find the rows and columns of the stack that a tile holds."""
    row, column = round((5_600_000 - box.affine.f) / 10), round((box.affine.c - 500_000) / 10)
    return slice(row, row + box.shape.y), slice(column, column + box.shape.x)


def hold_to_formula(folder: Path, boxes: dict[str, GeoBox], days: list[str] = DAYS) -> None:
    """Compare every tile, and every patch of the store that is cut from them, with NumPy."""
    for name, box in boxes.items():
        tile, must = open_scene(folder / f"{name}.nc"), expected(*window_of(box), days)
        assert tile.odc.geobox == box and tile.valid.all()
        for season in SEASONS:
            here = tile.sel(season=season)
            np.testing.assert_array_equal(here.observations, must["counts"][season])
            for variable in ("vv", "vh", "ratio"):
                np.testing.assert_array_equal(
                    here[variable], must[f"{variable}@{season}"], err_msg=f"{name} {variable}"
                )
    entry = write_entry(folder, "formula", "A stack by formula", license="CC0-1.0")
    store = prepare_store(entry, size=box.shape.x, stride=box.shape.x, cache=folder / "stores", progress=False)
    assert len(store) == len(boxes) and store.channel_names == season_channels()
    for row, name in enumerate(sorted(boxes)):
        must = expected(*window_of(boxes[name]), days)
        np.testing.assert_array_equal(store.read(row, "image"), np.stack([must[c] for c in season_channels()]))


# ---------------------------------------------------------------- a worker is killed


def some_tiles(grid: TileGrid, scene: xr.Dataset, every: int) -> dict[str, GeoBox]:
    """Choose tiles all over the stack."""
    return dict(list(tiles_of(grid, scene, whole=True).items())[::every])


def killed_midway(folder: str, stack: str, grid: dict, every: int, chunks: int, limit: str) -> None:
    """Make tiles with two workers, kill one that holds a tile when a third of them is done, and print what was seen."""
    import resource
    import signal

    from distributed import Client

    peak_mb = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    scene = open_scene(stack, chunks=chunks, nodata="none")
    boxes = some_tiles(TileGrid(**grid), scene, every)
    done, seen = [], {}

    def watch(row: dict) -> None:
        client = Client.current()
        done.append(row["tile"])
        seen.setdefault("pids", sorted(client.run(os.getpid).values()))
        if len(done) >= len(boxes) // 3 and "killed" not in seen:
            pids = client.run(os.getpid)
            seen["killed"] = next(
                pids[worker] for worker, held in client.processing().items() if held and worker in pids
            )
            os.kill(seen["killed"], signal.SIGKILL)
        if len(done) == len(boxes):
            seen["workers_mb"], seen["left"] = max(client.run(peak_mb).values()), sorted(client.run(os.getpid).values())

    table = make_tiles(
        scene, boxes, folder, compose=COMPOSE, workers=2, memory_limit=limit, progress=False, on_tile=watch
    )
    seen |= {"client_mb": peak_mb(), "rows": len(table), "unique": table.tile.nunique(), "done": len(done)}
    print(json.dumps(seen))


def run_killed(folder: Path, stack: Path, grid: TileGrid, every: int, chunks: int, limit: str) -> dict:
    """Run it in a process of its own."""
    call = f"killed_midway({str(folder)!r}, {str(stack)!r}, {asdict(grid)!r}, {every}, {chunks}, {limit!r})"
    code = f"if __name__ == '__main__':\n    from test_land_tiles import killed_midway\n    {call}\n"
    script = folder.parent / "run.py"  # not -c: dask starts its workers by the main file
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_a_killed_worker_costs_nothing(tmp_path):
    stack = write_stack(tmp_path / "stack.zarr", 320, 288, block=96)
    boxes = tiles_of(GRID, open_scene(stack, chunks=96, nodata="none"), whole=True)
    seen = run_killed(tmp_path / "tiles", stack, GRID, 1, 96, "2GiB")
    assert seen["killed"] in seen["pids"] and seen["killed"] not in seen["left"], "the worker that was killed is gone"
    assert seen["rows"] == seen["unique"] == seen["done"] == len(boxes) >= 12
    hold_to_formula(tmp_path / "tiles", boxes)


@pytest.mark.soak
def test_200_tiles_from_a_stack_ten_times_the_memory(tmp_path):
    """Two workers of 700 MB, a stack of 7 GB, one worker killed when a third is done; 448 px in the long form."""
    size, every = (448, 1) if SOAK else (224, 4)
    height, width, limit_mb = 10 * 448, 20 * 448, 700  # of which 300 are the interpreter and what it imports
    grid = TileGrid("EPSG:32631", size, origin=(500_000.0, 5_600_000.0 - 10 * height))
    stack = write_stack(tmp_path / "stack.zarr", height, width, block=512)
    assert 2 * 4 * len(DAYS) * height * width >= 10 * limit_mb * 1e6
    boxes = some_tiles(grid, open_scene(stack, chunks=512, nodata="none"), every)
    seen = run_killed(tmp_path / "tiles", stack, grid, every, 512, f"{limit_mb}MB")
    print(seen)
    assert len(boxes) == 200 and seen["killed"] not in seen["left"] and seen["rows"] == seen["unique"] == len(boxes)
    assert max(seen["workers_mb"], seen["client_mb"]) * 1.048576 < limit_mb
    hold_to_formula(tmp_path / "tiles", boxes)


# ---------------------------------------------------------------- without a cluster


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> xr.Dataset:
    """Open a small lazy stack."""
    return open_scene(
        write_stack(tmp_path_factory.mktemp("stack") / "stack.zarr", 200, 230, block=96), chunks=96, nodata="none"
    )


def test_tiles_are_right_and_are_made_once(stack, tmp_path):
    boxes = tiles_of(GRID, stack, whole=True)
    first = dict(list(boxes.items())[:2])
    make_tiles(stack, first, tmp_path / "t", compose=COMPOSE, progress=False)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("*.nc")}
    made = []
    table = make_tiles(
        stack, boxes, tmp_path / "t", compose=COMPOSE, progress=False, on_tile=lambda row: made.append(row["tile"])
    )
    assert len(written) == 2 and all(path.stat().st_mtime_ns == at for path, at in written.items())
    assert set(made) == set(boxes) - set(first) and list(table.tile) == sorted(boxes)
    hold_to_formula(tmp_path / "t", boxes)


@pytest.mark.parametrize("change", ["compose", "stack", "grid", "scale"])
def test_a_folder_holds_one_kind_of_tiles(stack, tmp_path, change):
    boxes = dict(list(tiles_of(GRID, stack, whole=True).items())[:1])
    make_tiles(stack, boxes, tmp_path / "t", compose=COMPOSE, progress=False)
    other = {"stack": stack, "boxes": boxes, "compose": COMPOSE, "scale": None}
    other |= {
        "compose": {"compose": COMPOSE | {"statistic": "mean"}},
        "stack": {"stack": stack.isel(time=slice(1, None))},
        "grid": {"boxes": dict(list(tiles_of(TileGrid("EPSG:32631", 32), stack, whole=True).items())[:1])},
        "scale": {"scale": 0.01},
    }[change]
    with pytest.raises(FileExistsError, match=change):
        make_tiles(other.pop("stack"), other.pop("boxes"), tmp_path / "t", progress=False, **other)


def test_what_every_tile_would_refuse_is_refused_at_once(stack, tmp_path):
    boxes = tiles_of(GRID, stack)
    for compose, match in (
        ({}, "orbit"),
        ({"orbit": "ascending", "yaer": 2021}, "yaer"),
        (COMPOSE | {"year": 1999}, "1999"),
    ):
        with pytest.raises(ValueError, match=match):
            make_tiles(stack, boxes, tmp_path / "t", compose=compose, progress=False)
    with pytest.raises(ValueError, match="at least one tile"):
        make_tiles(stack, {}, tmp_path / "t", compose=COMPOSE, progress=False)
    assert not (tmp_path / "t").exists()


def test_tiles_over_and_beside_the_edge(stack, tmp_path):
    boxes = tiles_of(GRID, stack)
    whole = tiles_of(GRID, stack, whole=True)
    beside = {"away": GRID.spec[500, 500]}
    table = make_tiles(stack, boxes | beside, tmp_path / "t", compose=COMPOSE, progress=False).set_index("tile")
    assert table.file["away"] == "" and set(whole) < set(boxes)
    for name in set(boxes) - set(whole):
        tile, (rows, columns) = open_scene(tmp_path / "t" / f"{name}.nc"), window_of(boxes[name])
        inside = (np.arange(rows.start, rows.stop)[:, None] >= 0) & (np.arange(rows.start, rows.stop)[:, None] < 200)
        inside = inside & (np.arange(columns.start, columns.stop) >= 0) & (np.arange(columns.start, columns.stop) < 230)
        assert (tile.valid == inside).all() and np.isnan(tile.vv.values[:, ~inside]).all() and 0 < inside.mean() < 1
    again = make_tiles(stack, boxes | beside, tmp_path / "t", compose=COMPOSE, progress=False)
    assert again.valid_fraction.isna().all() and set(again.tile) == {*boxes, "away"}


def test_packed_tiles_are_right_to_the_step(stack, tmp_path):
    boxes = dict(list(tiles_of(GRID, stack, whole=True).items())[:1])
    make_tiles(stack, boxes, tmp_path / "t", compose=COMPOSE, scale=0.01, progress=False)
    for name, box in boxes.items():
        tile = open_scene(tmp_path / "t" / f"{name}.nc")
        np.testing.assert_allclose(tile.vv.sel(season="summer"), expected(*window_of(box))["vv@summer"], atol=0.0051)


# ---------------------------------------------------------------- grids and regions


def test_ids_depend_on_the_place_alone(stack):
    small, large = tiles_of(GRID, (2.99, 50.52, 3.02, 50.55)), tiles_of(GRID, (2.9, 50.5, 3.1, 50.6))
    assert set(small) < set(large) and all(small[name] == large[name] for name in small)
    assert GRID.name(-1, -12) == "32631_w00001_s00012"
    assert len(set(large)) == len(large)


def test_regions_in_every_form(tmp_path):
    bounds = (3.0, 50.5, 3.02, 50.52)
    shape = region_geometry(bounds).json
    wanted = list(tiles_of(GRID, bounds))
    (tmp_path / "region.geojson").write_text(json.dumps({"type": "Feature", "geometry": shape, "properties": {}}))
    other = region_geometry(bounds).to_crs("EPSG:32631", resolution=0.001)
    for form in (shape, {"type": "GeometryCollection", "geometries": [shape]}, tmp_path / "region.geojson", other):
        assert list(tiles_of(GRID, form)) == wanted
    with pytest.raises(ValueError, match="west < east"):
        tiles_of(GRID, (3.02, 50.5, 3.0, 50.52))
    whole = tiles_of(GRID, bounds, whole=True)
    outline = region_geometry(bounds).to_crs("EPSG:32631", resolution=0.0001)
    assert 0 < len(whole) < len(wanted) and all(outline.contains(box.extent) for box in whole.values())


@pytest.mark.parametrize("wrong", [{"crs": "EPSG:4326"}, {"crs": "EPSG:2263"}, {"size_px": 0}, {"spacing_m": -10.0}])
def test_a_grid_is_of_metres(wrong):
    with pytest.raises(ValueError, match="metres"):
        TileGrid(**({"crs": "EPSG:32631"} | wrong))


# ---------------------------------------------------------------- warping


def flat(values: np.ndarray, epsg: int = 32631, step: float = 10.0, units: str = "dB", **more) -> xr.Dataset:
    """Place an image."""
    return make_scene(
        {"vv": values.astype("float32")},
        units=units,
        quantity="gamma0",
        crs=epsg,
        transform=(step, 0, 500_000, 0, -step, 5_600_000),
        **more,
    )


@pytest.mark.parametrize("units", ["dB", "1"])
@pytest.mark.parametrize("lazy", [False, True])
def test_coarser_pixels_are_means_of_power(units, lazy):
    power = np.random.default_rng(0).gamma(4, 0.02, (40, 60))
    power[:4, :2] = np.nan  # half of the first coarse pixel
    power[4:8, :3] = np.nan  # more than half of the second
    scene = flat(10 * np.log10(power) if units == "dB" else power, units=units)
    scene = scene.chunk(y=16, x=16) if lazy else scene
    box = GeoBox((10, 15), scene.odc.geobox.affine * scene.odc.geobox.affine.scale(4), "EPSG:32631")
    coarse = to_grid(scene, box)
    assert bool(coarse.vv.chunks) is lazy and coarse.vv.attrs == scene.vv.attrs
    coarse = check_scene(coarse.compute())
    blocks = np.nanmean(power.reshape(10, 4, 15, 4), axis=(1, 3))
    assert coarse.valid.values[0, 0] and not coarse.valid.values[1, 0] and coarse.valid.sum() == 149
    found = 10 ** (coarse.vv / 10) if units == "dB" else coarse.vv
    np.testing.assert_allclose(found, np.where(coarse.valid, blocks, np.nan), rtol=1e-4)


@pytest.mark.parametrize("lazy", [False, True])
def test_another_projection_finds_the_same_place(lazy):
    """A level that is a plane over longitude and latitude is that plane on any grid."""
    from pyproj import Transformer

    def plane(epsg, x, y):
        lon, lat = Transformer.from_crs(epsg, 4326, always_xy=True).transform(*np.meshgrid(x, y))
        return -15 + 100 * (lon - 3) + 80 * (lat - 50.5)

    x, y = 500_000 + 10 * (np.arange(300) + 0.5), 5_600_000 - 10 * (np.arange(300) + 0.5)
    scene = flat(plane(32631, x, y))
    scene = scene.chunk(y=70, x=110) if lazy else scene
    centre = scene.odc.geobox.footprint("EPSG:32632").centroid.points[0]
    spec = TileGrid("EPSG:32632", 128).spec
    box = spec[spec.pt2idx(*centre)]
    tile = check_scene(to_grid(scene, box).compute())
    must = plane(32632, *(box.coordinates[dim].values for dim in reversed(box.dimensions)))
    assert tile.odc.geobox == box and tile.valid.mean() > 0.5
    np.testing.assert_allclose(tile.vv.values[tile.valid], must[tile.valid], atol=0.02)


def test_labels_move_by_code_and_numbers_by_their_mean():
    codes = np.tile(np.array([[1, 1, 2, 2], [1, 2, 2, 2]], "uint8"), (10, 10))
    trees = np.tile(np.array([[10, 30, 200, 50], [10, 30, 200, 50]], "float32"), (10, 10))
    from sarfm.scenes.channels import Target

    labels = {
        "cover": (codes, {1: "crops", 2: "forest"}),
        "trees": (trees, Target("trees", "number", units="%", limits=(0, 100))),
    }
    scene = flat(np.full((20, 40), -10.0), labels=labels)
    scene["height"] = scene.vv.copy(data=np.tile(np.arange(40, dtype="float32"), (20, 1))).assign_attrs(
        units="m", quantity="elevation"
    )
    coarse = to_grid(scene, GeoBox((10, 20), scene.odc.geobox.affine * scene.odc.geobox.affine.scale(2), "EPSG:32631"))
    assert (
        coarse.cover.dtype == np.uint8
        and np.unique(coarse.cover[:, 0::2]).tolist() == [1]
        and np.unique(coarse.cover[:, 1::2]).tolist() == [2]
    )
    np.testing.assert_allclose(coarse.trees[:, :4], np.tile([20, 50, 20, 50], (10, 1)))
    np.testing.assert_allclose(coarse.height[0], np.arange(20) * 2 + 0.5)
    wider = to_grid(scene, scene.odc.geobox.pad(2))
    assert set(np.unique(wider.cover)) == {1, 2, 255} and wider.trees.isnull().sum() == 24 * 44 - 800


def test_a_stack_without_a_place_is_refused(tmp_path):
    scene = make_scene({"vv": np.full((1, 8, 8), -10.0)}, units="dB", quantity="sigma0", times=["2021-06-01"])
    with pytest.raises(ValueError, match="no CRS"):
        to_grid(scene, GRID.spec[0, 0])
    with pytest.raises(ValueError, match="beside the tile"):
        to_grid(flat(np.full((8, 8), -10.0)), GRID.spec[500, 500])


# ---------------------------------------------------------------- together again


def test_tiles_make_the_map_that_they_were_cut_from(stack, tmp_path):
    boxes = tiles_of(GRID, stack)
    make_tiles(stack, boxes, tmp_path / "t", compose=COMPOSE, progress=False)
    tiles = {path.stem: open_scene(path) for path in sorted((tmp_path / "t").glob("*.nc"))}
    direct = seasonal_composites(stack, **COMPOSE).compute()
    for variable in ("vv", "ratio", "observations"):
        whole = assemble(tiles, variable)
        rows, columns = whole.odc.geobox.overlap_roi(direct.odc.geobox, tol=1e-3)
        np.testing.assert_array_equal(whole[:, rows, columns], direct[variable])
        assert whole.attrs == direct[variable].attrs and whole.season.values.tolist() == list(SEASONS)
    assert np.isfinite(assemble(tiles, "vv")).sum() == 4 * 200 * 230


def test_gaps_stay_unknown_and_the_first_tile_keeps_a_pixel():
    image = flat(np.arange(64).reshape(8, 8) / 10 - 20, labels={"cover": (np.ones((8, 8), "uint8"), {1: "crops"})})
    left, right = image.isel(x=slice(0, 3)), image.isel(x=slice(5, 8), y=slice(2, 8))
    over = left.isel(y=slice(0, 2)).copy(deep=True)
    over["vv"] = over.vv + 5
    whole = assemble({"left": left, "right": right, "over": over}, "vv")
    np.testing.assert_array_equal(whole[:, :3], left.vv)
    assert whole.shape == (8, 8) and whole[:, 3:5].isnull().all() and whole[:2, 5:].isnull().all()
    cover = assemble({"left": left, "right": right}, "cover")
    assert cover.dtype == np.uint8 and (cover[:, 3:5] == 255).all() and (cover[2:, 5:] == 1).all()
    with pytest.raises(ValueError, match="one grid"):
        assemble({"left": left, "other": flat(np.full((4, 4), -10.0), step=20.0)}, "vv")


def test_a_number_of_each_tile_is_a_pixel():
    boxes = {GRID.name(c, r): GRID.spec[c, r] for c in range(3) for r in range(2)}
    numbers = {name: float(k) for k, name in enumerate(boxes) if k != 4}
    drawn = tile_map(numbers, boxes, {"units": "%"})
    np.testing.assert_array_equal(drawn, [[1, 3, 5], [0, 2, np.nan]])
    assert drawn.odc.geobox.resolution.x == 640 and drawn.attrs == {"units": "%"} and drawn.rio.crs.to_epsg() == 32631
    with pytest.raises(ValueError, match="elsewhere"):
        tile_map({"elsewhere": 1.0}, boxes)


# ---------------------------------------------------------------- from a folder to an encoder


@pytest.mark.soak
def test_belgium_from_files_to_an_encoder_of_twelve_channels(tmp_path):
    """What the page says a user does, word by word."""
    if not LAND.is_dir():
        pytest.skip(f"the real stacks are not here ({LAND})")
    files = {p.lower(): LAND / f"worldcereal_belgium_monthly/S1_sigma0_{p}_monthly.tif" for p in ("VV", "VH")}
    scene = open_scene(files)
    boxes = tiles_of(TileGrid("EPSG:32631", 32), scene, whole=True)
    make_tiles(scene, boxes, tmp_path / "tiles", compose={"year": 2021, "orbit": "mixed"}, progress=False)
    entry = write_entry(tmp_path / "tiles", "belgium", "Flanders, four seasons of 2021", license="MIT")
    words = {
        "data.dataset": entry,
        "data.patch_px": 32,
        "split.by": "scene",
        "encoder": "vit-nano",
        "learn.steps": 6,
        "learn.batch_size": 2,
    }
    words |= {"map_page": "false"}
    command = [sys.executable, "-c", "from sarfm.cli import main; raise SystemExit(main())", "run", "pretrain"]
    command += [word for name, value in words.items() for word in ("-p", f"{name}={value}")]
    environment = os.environ | {"SARFM_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", tmp_path / "run"], capture_output=True, text=True, env=environment, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    channels = json.loads((tmp_path / "run/model.json").read_text())["contract"]["channels"]
    assert [f"{c['variable']}@{c['at']}" for c in channels] == season_channels()
    assert {(c["variable"], c["units"], c["quantity"]) for c in channels} == {
        ("vv", "dB", "sigma0"), ("vh", "dB", "sigma0"), ("ratio", "dB", "ratio")
    }  # fmt: skip
    assert (tmp_path / "run/model.safetensors").exists()
