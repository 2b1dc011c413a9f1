"""Scenes larger than memory: prepare and predict hold a few rows of them, whatever their height. Row 18 of the matrix.

A child process makes a sparse scene, of which a few tiles are real and the rest is constant, and does one thing with it. Its
memory is what Linux counts: the most that was resident, over what was resident when everything was imported and had run once
on a small scene. Large arrays are given back at once (MALLOC_MMAP_THRESHOLD_): what glibc keeps of freed memory, up to
100 MB here, differs from run to run by more than the tenth that is asked for.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SOAK

LIMIT_MB = 400
BLOCK = 512  # side of the scene's dask blocks, px

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted on Linux only")


def read_block(file, shape, block_info=None):
    """Read one block of a raw float32 file, and let go of its pages."""
    (top, bottom), (left, right) = block_info[None]["array-location"]
    return np.array(np.memmap(file, np.float32, "r", shape=shape)[top:bottom, left:right])


def sparse_scene(folder: Path, height: int, width: int):
    """Make a lazy scene of two sparse files, with tie points over the pole, a hole and a chart."""
    import dask.array as da
    from pyproj import Transformer

    from sarfm.ice.charts import chart_label
    from sarfm.scenes.open import make_scene

    folder.mkdir(parents=True, exist_ok=True)
    rng, bands, chunks = np.random.default_rng(0), {}, da.core.normalize_chunks((BLOCK, BLOCK), shape=(height, width))
    for name in ("hh", "hv"):
        with open(folder / f"{name}.raw", "wb") as file:
            file.truncate(4 * height * width)
        pixels = np.memmap(folder / f"{name}.raw", np.float32, "r+", shape=(height, width))
        for row, column in zip(*rng.integers(0, (height, width), (12, 2)).T, strict=True):
            pixels[row : row + 300, column : column + 300] = rng.normal(-20, 3)
        pixels[:100, :100] = np.nan
        pixels.flush()
        bands[name] = da.map_blocks(
            read_block, folder / f"{name}.raw", (height, width), chunks=chunks, dtype=np.float32, meta=np.empty((0, 0))
        )
    rows, columns = (v.ravel() for v in np.meshgrid(np.linspace(0, height, 6), np.linspace(0, width, 6), indexing="ij"))
    lonlat = Transformer.from_crs(3413, 4326, always_xy=True).transform(40 * columns - 4e4, 4e4 - 40 * rows)
    gcps = np.stack([rows, columns, *lonlat], axis=1)
    scene = make_scene(bands, units="dB", quantity="sigma0", gcps=gcps, attrs={"scene": "sparse"})
    return scene.assign(sod=chart_label(da.ones((height, width), dtype=np.uint8, chunks=chunks), "sod"))


def model_of(charts: str):
    """Make a model that costs nothing: of eleven classes, or of three charts."""
    import torch

    from sarfm.ice.charts import chart_targets
    from sarfm.tasks.tasks import task_for

    class Charts(torch.nn.Module):
        def __init__(self, **tasks):
            super().__init__()
            self.tasks = tasks

        def forward(self, image, valid):
            return {name: image[:, :1].expand(-1, task.channels, -1, -1) for name, task in self.tasks.items()}

    targets = chart_targets()
    if charts != "charts":
        return Charts(sic=task_for(targets["sic"]))
    learnt_as = {"sic": {"loss_of": "number"}}
    return Charts(**{name: task_for(target, **learnt_as.get(name, {})) for name, target in targets.items()})


def work(what: str, folder: Path, height: int, width: int) -> None:
    """Do one of the things that are measured."""
    from sarfm.evaluation.export import write_cog
    from sarfm.evaluation.predict import predict_scene
    from sarfm.evaluation.tiles import Tiling
    from sarfm.patches.contract import InputContract
    from sarfm.patches.prepare import write_store

    scene = sparse_scene(folder, height, width)
    contract = InputContract(
        channels=["hh", "hv"],
        units="dB",
        quantity="sigma0",
        mean=[-20.0] * 2,
        std=[3.0] * 2,
        patch_size=16,
        crop_px=224,
    )
    if what == "prepare":
        write_store({"sparse": scene}, folder / "store.zarr", size=256, progress=False)
    elif what == "export":
        file = folder / "predicted.zarr"
        sparse = scene.drop_vars("sod")
        predicted = predict_scene(model_of(""), contract, sparse, Tiling(overlap=0.0), out=file)
        Path("/proc/self/clear_refs").write_text("5")
        write_cog(predicted, folder / "map.tif")
    else:
        predict_scene(model_of(what), contract, scene, probabilities=True, out=folder / "predicted.zarr")


def resident_mb(what: str) -> float:
    """Read what Linux counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def child(what: str, folder: str, height: int, width: int) -> None:
    """Run in a process of its own, and print the memory before and at most, in MB."""
    import dask
    import torch

    torch.set_num_threads(1)
    dask.config.set(scheduler="synchronous")  # one block at a time, so that every run needs the same
    work(what, Path(folder) / "small", 600, 700)
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
    work(what, Path(folder) / "large", height, width)
    print(json.dumps([before, resident_mb("VmHWM")]))


def peak_mb(what: str, folder: Path, height: int, width: int) -> float:
    """Measure the memory that one piece of work takes over the imports."""
    shutil.rmtree(folder, ignore_errors=True)
    code = f"import test_large; test_large.child({what!r}, {str(folder)!r}, {height}, {width})"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before, most = json.loads(done.stdout.splitlines()[-1])
    return most - before


@pytest.mark.row(18)
@pytest.mark.parametrize("what", ["prepare", "predict", "charts", "export"])
def test_memory_stays_bounded_and_does_not_grow_with_the_height(what, tmp_path, row):
    width, heights = (20_000, (2_500, 5_000 if what == "charts" else 20_000)) if SOAK else (5_000, (2_500, 5_000))
    found = [peak_mb(what, tmp_path / str(height), height, width) for height in heights]
    row.note(
        f"{what} {width} px wide: " + ", ".join(f"{h} rows {mb:.0f} MB" for h, mb in zip(heights, found, strict=True))
    )
    for height, mb in zip(heights, found, strict=True):
        with row.case(f"{what} {height} x {width}"):
            assert mb <= LIMIT_MB
    with row.case(f"{what} whatever the height"):
        assert found[1] <= 1.1 * found[0] or what == "export", found  # there GDAL fills its cache of 64 MB, no more
