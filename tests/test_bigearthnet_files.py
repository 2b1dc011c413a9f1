"""`sarfm.land.bigearthnet_files`: simulated patches of both editions, and what very many of them cost."""

import gc
import os
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio

from sarfm.datasets.catalog import open_dataset
from sarfm.datasets.entries import load_entry
from sarfm.land.bigearthnet import PATCH, V1, V2, published_contract
from sarfm.land.bigearthnet_classes import CLASSES_43, bigearthnet_tags
from sarfm.land.bigearthnet_files import AS_CORINE, COUNTRIES, standin, write_standins
from sarfm.patches.loading import CropDataset, Crops, StepSampler, make_loader
from sarfm.patches.prepare import Cut
from sarfm.patches.splits import Split
from sarfm.patches.store import open_store


def test_names_are_those_of_patches_and_each_is_one():
    patches = [standin(k) for k in range(20_000)]
    assert len({patch.name for patch in patches}) == 20_000 and all(PATCH.fullmatch(patch.name) for patch in patches)
    assert all(patch.name.startswith(f"{patch.acquisition}_{COUNTRIES[patch.country][0]}_") for patch in patches)
    shares = {part: np.mean([patch.part == part for patch in patches]) for part in ("train", "validation", "test")}
    assert shares == {"train": 0.5, "validation": 0.25, "test": 0.25}
    assert set(AS_CORINE.values()) <= set(CLASSES_43)


@pytest.mark.parametrize("edition", ["v1", "v2"])
def test_files_are_as_published(tmp_path, edition):
    write_standins(tmp_path, 4, edition, side_px=120, distinct=2, progress=False)
    files = sorted(tmp_path.rglob("*.tif"))
    assert len(files) == 8 and len({file.stat().st_ino for file in files}) == 4
    for file in files:
        with rasterio.open(file) as opened:
            assert opened.dtypes == ("float32",) and opened.shape == (120, 120) and opened.res == (10, 10)
            assert opened.tags()["simulated"] and np.isfinite(opened.read()).all()
    name = standin(3).name
    folder = tmp_path / {"v1": f"BigEarthNet-S1-v1.0/{name}", "v2": f"BigEarthNet-S1/{name[:32]}/{name}"}[edition]
    assert {path.name for path in folder.glob("*.tif")} == {f"{name}_VH.tif", f"{name}_VV.tif"}
    assert (folder / f"{name}_labels_metadata.json").exists() == (edition == "v1")


def test_both_editions_have_the_same_tags_and_parts(tmp_path):
    entry, folders = load_entry("bigearthnet_s1_v2"), {}
    for edition in ("v1", "v2"):
        folders[edition] = write_standins(tmp_path / edition, 20, edition, side_px=32, distinct=5, progress=False)
    one, other = V1.scenes(entry, folders["v1"]), V2.scenes(entry, folders["v2"])
    for name in other:
        first, second = V1.open_scene(entry, one[name]), V2.open_scene(entry, other[name])
        assert first.drop_attrs().equals(second.drop_attrs()) and first.attrs["part"] == second.attrs["part"]
        assert second.land_cover.values.any() or not bigearthnet_tags(other[name].listed.names).any()


# ---- very many ----------------------------------------------------------------------------------------------------


def anonymous_mb() -> float:
    """Read what Linux counts for this process beside mapped files, which it takes back when it wants, in MB."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def passed(work):
    """Do something; give its result, its processor time in s and its wall time in s."""
    began, clock = time.process_time(), time.perf_counter()
    return work(), time.process_time() - began, time.perf_counter() - clock


def one_epoch(folder: Path, patches: int, side: int, jobs: int) -> dict[str, float]:
    """Write patches, cut them and load each once; say what it cost."""
    found: dict[str, float] = {}
    write = lambda: write_standins(folder, patches, side_px=side, distinct=min(patches, 40), progress=False)
    _, _, found["write s"] = passed(write)
    scenes, found["find s"], _ = passed(lambda: open_dataset("bigearthnet_s1_v2", folder))
    assert len(scenes) == patches
    cut = Cut("bigearthnet_s1_v2", str(folder), channels=("vh", "vv"), patch_px=side)
    store, _, found["prepare s"] = passed(lambda: cut.store(jobs=jobs, progress=False))
    path, before = store.path, anonymous_mb()
    store, _, found["open s"] = passed(lambda: open_store(path))
    tables = [path / name for name in ("index.parquet", "scenes.parquet", "checksums.parquet")]
    found["bytes of a tile"] = sum(table.stat().st_size for table in tables) / patches
    parts, found["split s"], _ = passed(lambda: Split().parts(store))
    assert parts.value_counts().to_dict() == {"train": patches / 2, "val": patches / 4, "test": patches / 4}
    contract = published_contract().model_copy(update={"spacing_m": 10.0, "crop_px": side})
    rows = np.arange(patches)
    crops = CropDataset(store, rows, contract, Crops(side), ["land_cover"])
    loader = iter(make_loader(crops, 100, 0, StepSampler(patches // 100, 100, patches // 100)))
    seen, memory = np.zeros(patches, int), [before]

    def load():
        for k, batch in enumerate(loader):
            np.add.at(seen, batch["patch"].numpy(), 1)
            if k in (patches // 1000, patches // 100 - 1):
                memory.append(anonymous_mb())

    _, spent, _ = passed(load)
    assert (seen == 1).all(), "an epoch shows every patch once"
    return found | {"ms of an image": 1e3 * spent / patches, "MB more from a tenth to the end": memory[2] - memory[1]}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted on Linux only")
def test_an_epoch_over_some_hundred_patches(tmp_path, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "data"))
    found = one_epoch(tmp_path / "patches", 200, 32, 1)
    assert found["bytes of a tile"] < 400 and found["MB more from a tenth to the end"] < 20


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted on Linux only")
def test_an_epoch_over_a_hundred_thousand_patches(tmp_path, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "data"))
    found = one_epoch(tmp_path / "patches", 100_000, 120, min(2, os.cpu_count() or 1))
    print({name: round(number, 3) for name, number in found.items()})
    assert found["open s"] < 2 and found["ms of an image"] < 2 and found["bytes of a tile"] < 200
    assert found["MB more from a tenth to the end"] < 20
