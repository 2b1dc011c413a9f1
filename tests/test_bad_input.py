"""What a user can get wrong: each refused with an error that names the file and says what to do, and nothing left behind."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from affine import Affine
from patience import PATIENCE_S

from sarfm.datasets.catalog import check, fetch, open_dataset
from sarfm.datasets.entries import load_entry
from sarfm.evaluation.pictures import reconstruct_scene
from sarfm.io.files import CorruptData
from sarfm.models.mae import MAE
from sarfm.models.masking import random_mask
from sarfm.models.vit import Encoder
from sarfm.models.weights import load_model, save_model
from sarfm.patches.contract import InputContract
from sarfm.patches.prepare import write_store
from sarfm.patches.store import restore
from sarfm.scenes.open import OpenQuestion, open_scene, save_scene
from sarfm.scenes.scene import make_scene


def files_in(folder: Path) -> set[str]:
    """Name everything below a folder."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def toy_scene(height: int = 40, width: int = 56, seed: int = 0) -> xr.Dataset:
    """Make a small VV/VH scene in dB."""
    noise = np.random.default_rng(seed).normal(size=(2, height, width)).astype(np.float32)
    transform = Affine(10, 0, 500_000, 0, -10, 600_000)
    bands = {"vv": noise[0] - 10, "vh": noise[1] - 17}
    return make_scene(bands, units="dB", quantity="sigma0", crs="EPSG:32650", transform=transform)


def toy_model(channels: int = 2) -> MAE:
    """Make the smallest masked autoencoder."""
    return MAE(Encoder(channels, 8, 16, 1, 2), 16, 1, 2)


def toy_contract(channels: tuple[str, ...] = ("vv", "vh"), units: str = "dB") -> InputContract:
    """Make the contract that the toy scene meets."""
    scale = {"mean": [-10.0, -17.0][: len(channels)], "std": [1.0] * len(channels)}
    return InputContract(
        channels=list(channels), quantity="sigma0", units=units, spacing_m=10.0, patch_size=8, crop_px=32, **scale
    )


def geotiff(path: Path, bands: list[np.ndarray], names: list[str], **tags: str) -> Path:
    """Write a GeoTIFF with named bands."""
    import rasterio

    form = dict(driver="GTiff", height=bands[0].shape[0], width=bands[0].shape[1], count=len(bands))
    place = dict(crs="EPSG:32650", transform=Affine(10, 0, 500_000, 0, -10, 600_000), nodata=float("nan"))
    with rasterio.open(path, "w", dtype="float32", **form, **place) as file:
        for number, (band, name) in enumerate(zip(bands, names, strict=True), 1):
            file.write(band.astype(np.float32), number)
            file.set_band_description(number, name)
        file.update_tags(**tags)
    return path


def test_truncated_geotiff(tmp_path):
    noise = np.random.default_rng(0).normal(-12, 2, (512, 512))
    path = geotiff(tmp_path / "cut_short.tif", [noise, noise - 7], ["VV", "VH"], units="dB sigma0")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CorruptData, match=r"cut_short\.tif"):
        open_scene(path).load()
    assert files_in(tmp_path) == {"cut_short.tif"}


def test_netcdf_without_units(tmp_path):
    path = tmp_path / "no_units.nc"
    xr.Dataset({"VV": (("y", "x"), np.ones((8, 8), np.float32))}).to_netcdf(path)
    with pytest.raises(OpenQuestion, match="units") as error:
        open_scene(path)
    assert "no_units.nc" in str(error.value) and "dB" in str(error.value)


def test_polarisation_that_is_not_there(tmp_path):
    noise = np.random.default_rng(0).normal(-12, 2, (16, 16))
    path = geotiff(tmp_path / "dual.tif", [noise, noise - 7], ["VV", "VH"], units="dB sigma0")
    with pytest.raises(ValueError, match="hh") as error:
        open_scene(path, channels=["hh"])
    assert "dual.tif" in str(error.value) and "vv" in str(error.value)


def test_scene_without_a_valid_pixel(tmp_path):
    empty = np.full((32, 32), np.nan)
    path = geotiff(tmp_path / "empty.tif", [empty, empty], ["VV", "VH"], units="dB sigma0")
    with pytest.raises(ValueError, match="valid|no data|NaN") as error:
        write_store({"empty": open_scene(path)}, tmp_path / "store.zarr", size=16, progress=False)
    assert "empty" in str(error.value)
    assert files_in(tmp_path) == {"empty.tif"}


def test_size_not_divisible_by_the_patch_is_padded(tmp_path):
    scene = toy_scene(45, 70)
    store = write_store({"odd": scene}, tmp_path / "store.zarr", size=32, progress=False)
    assert store.index["valid_fraction"].min() < 1
    xr.testing.assert_identical(restore(store, "odd")["vv"], scene["vv"])
    picture = reconstruct_scene(toy_model(), toy_contract(), scene, 0.75)
    assert picture["reconstruction"].shape == (2, 45, 70)
    assert bool(np.isfinite(picture["reconstruction"]).all())


def test_mask_ratio_of_one():
    with pytest.raises(ValueError, match=r"\(0, 1\).*got 1"):
        random_mask(2, 16, 1.0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("settings.mask_ratio=1.0", "settings.mask_ratio must be in (0, 1); got '1.0'"),
        ("settings.maskratio=0.5", "did you mean 'settings.mask_ratio'?"),
    ],
)
def test_run_refused_before_it_starts(tmp_path, given, says):
    sarfm = Path(sys.executable).with_name("sarfm")
    command = [sarfm, "run", "pretrain", "-p", given, "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 2
    assert says in done.stderr
    assert files_in(tmp_path) == set()


def test_checkpoint_whose_contract_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="channels"):
        save_model(toy_model(3), tmp_path / "model", toy_contract())
    assert files_in(tmp_path) == set()
    save_model(toy_model(), tmp_path / "model", toy_contract())
    model, contract = load_model(tmp_path / "model")
    with pytest.raises(ValueError, match=r"to_db\(\)"):
        reconstruct_scene(model, contract, toy_scene().sar.to_power(), 0.5)
    with pytest.raises(ValueError, match="vh"):
        reconstruct_scene(model, contract, toy_scene().drop_vars("vh"), 0.5)


def test_damaged_checkpoint(tmp_path):
    save_model(toy_model(), tmp_path, toy_contract())
    weights = tmp_path / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CorruptData, match=r"model\.safetensors"):
        load_model(tmp_path)


ENTRY = """
id: mine
title: Mine
files: [{path: FILE, url: "http://127.0.0.1:9/x", bytes: 3, sha256: "SHA"}]
read: {scenes: "{scene}.tif"}
"""


@pytest.mark.parametrize("hostile", ["../outside.tif", "/etc/passwd", "a/../../b"])
def test_catalogue_path_that_escapes(tmp_path, hostile):
    entry = tmp_path / "mine.yaml"
    entry.write_text(ENTRY.replace("FILE", hostile).replace("SHA", "0" * 64))
    with pytest.raises(ValueError, match=r"mine\.yaml") as error:
        load_entry(entry)
    assert hostile in str(error.value)
    assert files_in(tmp_path) == {"mine.yaml"}


def test_checksum_mismatch(tmp_path, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "data"))
    entry, folder = tmp_path / "mine.yaml", tmp_path / "files"
    folder.mkdir()
    (folder / "a.tif").write_bytes(b"bad")
    right = hashlib.sha256(b"yes").hexdigest()
    entry.write_text(ENTRY.replace("FILE", "a.tif").replace("SHA", right))
    report = check(entry, folder).set_index("file").loc["a.tif"]
    assert report["size_ok"] and not report["sha256_ok"] and not report["ok"]
    with pytest.raises((ValueError, OSError)):  # the wrong file is not taken for the right one
        fetch(entry, folder, progress=False)
    assert not (folder / "a.tif").exists() or (folder / "a.tif").read_bytes() == b"bad"


def test_missing_files_say_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="ombria") as error:
        next(iter(open_dataset("ombria", tmp_path).values()))
    assert "github.com/geodrak/OMBRIA" in str(error.value)


def test_nothing_half_written_under_the_final_name(tmp_path, monkeypatch):
    import sarfm.io.files

    def full(*_):
        raise OSError(28, "No space left on device")

    scene = toy_scene()
    save_scene(scene, tmp_path / "scene.nc")
    before = (tmp_path / "scene.nc").read_bytes()
    monkeypatch.setattr(sarfm.io.files.os, "fsync", full)
    with pytest.raises(OSError, match=r"scene\.nc"):
        save_scene(toy_scene(seed=1), tmp_path / "scene.nc")
    assert files_in(tmp_path) == {"scene.nc"} and (tmp_path / "scene.nc").read_bytes() == before


def test_invalid_pixels_change_nothing():
    model, generator = toy_model().eval(), torch.Generator().manual_seed(0)
    image, valid = torch.randn(2, 2, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool)
    valid[:, :12, :20] = False
    batch = model.draw({"image": image, "valid": valid}, generator)
    changed = {**batch, "image": torch.where(valid[:, None], image, torch.tensor(1e6))}
    assert torch.equal(model.loss(batch)[0], model.loss(changed)[0])
