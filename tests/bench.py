"""What the design promises, measured: `make bench` writes bench.json.

Times are CPU time of one process on one thread: all variants once per round in random order, the baseline twice; a
measurement whose baseline disagrees with itself by more than 3 % is repeated. FLOPs are counted, not timed.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import zarr
from test_mae_reference import reference
from torch.utils.flop_counter import FlopCounterMode

from sarfm.data.patches import write_store
from sarfm.data.scenes import make_scene
from sarfm.models.mae import MAE
from sarfm.models.vit import Encoder

ROUNDS, TRIES = 9, 10


def import_seconds(module: str) -> float:
    """Measure the CPU time of one import in a fresh interpreter, above that of starting it."""
    code = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
    run = lambda: float(
        subprocess.run([sys.executable, "-c", code.format(module)], check=True, capture_output=True).stdout
    )
    return round(median(run() for _ in range(5)), 3)


def compare(variants: dict[str, Callable[[int], object]], items: int) -> dict[str, float]:
    """Measure the CPU milliseconds per item of every variant; the first one is the baseline."""
    baseline = next(iter(variants))
    entered = [*variants, baseline + " again"]
    for _ in range(TRIES):
        rounds: dict[str, list[float]] = {name: [] for name in entered}
        for _ in range(ROUNDS):
            for name in random.sample(entered, len(entered)):
                call, start = variants[name.removesuffix(" again")], time.process_time()
                for item in random.sample(range(items), items):
                    call(item)
                rounds[name].append((time.process_time() - start) / items * 1000)
        found = {name: median(values) for name, values in rounds.items()}
        if 0.97 <= found[baseline] / found[baseline + " again"] <= 1.03:
            return {name: found[name] for name in variants}
    raise SystemExit(f"{baseline} disagreed with itself by more than 3 % in {TRIES} tries; nothing was recorded")


def crops(patches: int = 100, crop: int = 224) -> dict[str, float]:
    """Read crops of two float32 bands out of 256 px patches, shuffled, from the page cache."""
    side = 256 * int(patches**0.5)
    rng = np.random.default_rng(0)
    bands = {name: rng.normal(-12, 3, (side, side)).astype("float32") for name in ("vv", "vh")}
    scene = make_scene(bands, units="dB", quantity="sigma0", nodata="none")
    with tempfile.TemporaryDirectory() as folder:
        store = write_store({"scene": scene}, Path(folder) / "store.zarr", size=256, stride=256, progress=False)
        np.save(Path(folder) / "patches.npy", np.stack([store.read(k) for k in range(len(store))]))
        mapped = np.load(Path(folder) / "patches.npy", mmap_mode="r")
        stored = zarr.open_array(store.path / "image", mode="r")
        ms = compare(
            {
                "memory map": lambda k: np.array(mapped[k, :, :crop, :crop]),
                "sarfm": lambda k: np.array(store.read(k)[:, :crop, :crop]),
                "zarr-python": lambda k: stored[k, :, :crop, :crop],
            },
            len(store),
        )
    return {
        "crop_ms": round(ms["sarfm"], 4),
        "crop_vs_memmap": round(ms["sarfm"] / ms["memory map"], 2),
        "crop_vs_zarr_python": round(ms["zarr-python"] / ms["sarfm"], 2),
    }


def step_flops(channels: int, batch: int = 8) -> float:
    """Count our operations per training step as a fraction of the published implementation's: ViT-B/16, 224 px."""
    sizes = dict(width=768, depth=12, heads=12)
    theirs = reference(channels, 224, 16, norm_pix=True, decoder=(512, 8, 16), **sizes)
    ours = MAE(Encoder(channels, 16, **sizes), norm_pix=True)
    image = torch.randn(batch, channels, 224, 224)
    with FlopCounterMode(display=False) as published:
        theirs(pixel_values=image).loss.backward()
    with FlopCounterMode(display=False) as counted:
        ours.loss(ours.draw({"image": image}, torch.Generator().manual_seed(0)))[0].backward()
    return round(counted.get_total_flops() / published.get_total_flops(), 4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {"import_seconds": {name: import_seconds(name) for name in ("sarfm", "sarfm.cli", "sarfm.models.mae")}}
    results |= crops() | {f"mae_flops_c{c}": step_flops(c) for c in (3, 12)}
    results["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__, "zarr": zarr.__version__}
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "bench.json")
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    print(path.read_text(encoding="utf-8"))
