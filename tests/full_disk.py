"""Write everything that sarfm writes on a disk that is full, and report as JSON what was said and what is left.

Called by `test_faults.py` in a process of its own: `full_disk.py FOLDER tmpfs|limit`. On a small file system the rest of the
room is filled up; elsewhere the size of a single file is limited.
"""

import hashlib
import json
import os
import resource
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from test_catalog import Server
from test_runs import write_toy

from sarfm.io.download import download
from sarfm.io.files import sha256, unpack, write_json
from sarfm.models.mae import MAE
from sarfm.models.vit import Encoder
from sarfm.models.weights import save_model
from sarfm.patches.contract import InputContract
from sarfm.patches.prepare import write_store
from sarfm.runs.folders import RunFolder
from sarfm.runs.notebooks import run_notebook
from sarfm.scenes.open import make_scene, save_scene
from sarfm.train.checkpoints import save_checkpoint

PARAMETERS = 'out: str = "runs/toy"  # folder of the run\nsize: int = 4  # lines printed, >= 0'


@contextmanager
def room(folder: Path, how: str, megabytes: float) -> Iterator[None]:
    """Leave so much room on the disk, or allow files of that size."""
    if how == "limit":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return
    disk, filler = os.statvfs(folder), folder / "filler"
    filler.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - int(megabytes * 1e6))))
    try:
        yield
    finally:
        filler.unlink()


def state(path: Path) -> dict[str, str]:
    """Hash a file, or every file of a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.name if p == path else p.relative_to(path).as_posix(): sha256(p) for p in files}


def random_bytes(seed: int, size: int = 3_000_000) -> bytes:
    """Make bytes that no compression shrinks."""
    return np.random.default_rng(seed).bytes(size)


def a_scene(seed: int, pixels: int = 800):
    """Make a scene of noise."""
    field = np.random.default_rng(seed).normal(-10, 3, (2, pixels, pixels)).astype("float32")
    return make_scene({"vv": field[0], "vh": field[1]}, units="dB", quantity="gamma0")


def run_folder(path: Path) -> RunFolder:
    """Make a run folder without the record that a new one writes."""
    run = RunFolder.__new__(RunFolder)
    run.path = path.parent
    return run


def checkpoint(path: Path, seed: int) -> None:
    save_checkpoint({"w": torch.full((1_000_000,), float(seed))}, path)


def record(path: Path, seed: int) -> None:
    write_json(path, [seed] * 400_000)


def scene(path: Path, seed: int) -> None:
    save_scene(a_scene(seed), path)


def model(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    scale = {"mean": [-10.0] * 2, "std": [3.0] * 2}
    contract = InputContract(channels=["vv", "vh"], quantity="gamma0", units="dB", patch_size=8, **scale)
    save_model(MAE(Encoder(2, 8, 192, 2, 2), 64, 1, 2), path.parent, contract)


def figure(path: Path, seed: int) -> None:
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(figsize=(9, 9))
    axes.imshow(np.random.default_rng(seed).random((900, 900)))
    run_folder(path.parent).figure(made, path.stem)
    plt.close(made)


def table(path: Path, seed: int) -> None:
    run_folder(path).save_table(pd.DataFrame({"x": np.random.default_rng(seed).random(300_000)}), path.stem)


def store(path: Path, seed: int) -> None:
    kept = {"a": a_scene(0, 200)}
    if seed == 0:
        write_store(kept, path, size=64, progress=False)
    else:
        write_store({"b": a_scene(1, 1024)}, path.with_name("other.zarr"), size=64, shard_mb=16, progress=False)


def fetched(path: Path, seed: int) -> None:
    content = random_bytes(seed)
    server = Server(content=content)
    try:
        download(server.url, path, len(content), hashlib.sha256(content).hexdigest(), progress=False)
    finally:
        server.shutdown()
        server.server_close()


def unpacked(path: Path, seed: int) -> None:
    archive = path.parents[1] / f"{seed}.zip"
    if not archive.exists():  # both are made while there is room
        for k in range(2):
            with zipfile.ZipFile(archive.with_name(f"{k}.zip"), "w") as file:
                file.writestr("inside.bin", random_bytes(k))
    unpack(archive, path.parent)


def notebook(path: Path, seed: int) -> None:
    toy, out = path.parents[1] / "toy.ipynb", path.parent / f"run{seed}"
    write_toy(toy, PARAMETERS, ['print(("x" * 99 + "\\n") * size)', "run.finish({})"])
    if seed == 0:
        run_notebook(toy, {"size": 1}, path.parent, progress=False)
    else:
        run_notebook(toy, {"size": 30_000}, out, progress=False)


WRITERS: dict[
    Callable[[Path, int], None], tuple[str, float]
] = {  # to the file that must survive, and the room left, MB
    checkpoint: ("last.ckpt", 1),
    record: ("run.json", 0.5),
    scene: ("scene.nc", 1),
    model: ("model.safetensors", 1),
    figure: ("figures/map.png", 0.1),
    table: ("history.parquet", 1),
    store: ("a.zarr", 4),
    fetched: ("a.bin", 1),
    unpacked: ("inside.bin", 1),
    notebook: ("toy.ipynb", 0.5),
}


def main(folder: Path, how: str) -> None:
    """Write each thing when there is room, then another version when there is none."""
    for write, (name, megabytes) in WRITERS.items():
        path = folder / write.__name__ / name
        path.parent.mkdir(parents=True)
        write(path, 0)
        before, told = state(path), ""
        with room(folder, how, megabytes):
            try:
                write(path, 1)
            except (OSError, RuntimeError, ValueError) as error:
                told = f"{type(error).__name__}: {error}"
        left = [p.name for p in path.parent.rglob("*") if ".tmp" in p.name or p.name.startswith(".unpack")]
        found = {"name": write.__name__, "told": told, "intact": state(path) == before, "left": left}
        print(json.dumps(found), flush=True)
        shutil.rmtree(path.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
