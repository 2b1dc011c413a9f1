"""Four seasons of VV, VH, their ratio and coherence, a percentage and a tag per tile: from files and one YAML to scores with intervals.

Everything goes through the run notebooks; what is simulated is small, and its truth is known: tree cover dims the seasonal
change of VH and keeps coherence low, so that a model which learns anything explains some of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from patience import PATIENCE_S

pytest.importorskip("sarfm.tasks", reason="there is no room for tasks yet")
pytest.importorskip("sarfm.runs.parameters", reason="run parameters are not in groups yet")
pytest.importorskip("sarfm.evaluation.tallies", reason="there is no table of tallies yet")

SEASONS = ["winter", "spring", "summer", "autumn"]
TAGS = ["forest", "settlement", "open land"]
ENTRY = """
id: four_seasons
title: Simulated tiles of four seasons
description: VV, VH, their ratio and coherence in four seasons, tree cover in percent, land cover, and tags of each tile.
license: CC0-1.0
providers:
  - {name: The tests of sarfm, roles: [producer]}
access: open
how_to_get: The tests write it.
readable: true
sensor: simulated
channels:
  vv: {units: dB, quantity: sigma0}
  vh: {units: dB, quantity: sigma0}
  vv_vh: {units: dB, quantity: ratio}
  coherence: {units: "1", quantity: coherence}
targets:
  tree_cover: {kind: number, units: "%", limits: [0, 100]}
  cover: {kind: classes, classes: {1: {name: open land}, 2: {name: forest}}}
  present: {kind: tags, of: tile, classes: {0: {name: forest}, 1: {name: settlement}, 2: {name: open land}}}
read:
  scenes: "{scene}.nc"
"""


def write_tile(path: Path, seed: int, side: int = 64) -> None:
    """Write one tile as a NetCDF file, its truth beside its channels."""
    draw = np.random.default_rng(seed)
    trees = np.repeat(np.repeat(draw.uniform(0, 100, (4, 4)), side // 4, 0), side // 4, 1)
    swing = np.cos(np.arange(4) / 4 * 2 * np.pi)[:, None, None] * (1 - trees / 100)
    noise = lambda scale: draw.normal(0, scale, (4, side, side))
    vh = -20 + 6 * trees / 100 + 2 * swing + noise(0.8)
    vv = -12 + 3 * trees / 100 + 2 * swing + noise(0.8)
    coherence = np.clip(0.8 - 0.6 * trees / 100 + noise(0.05), 0, 1)
    dims = ("season", "y", "x")
    arrays = {
        "vv": (dims, vv, {"units": "dB", "quantity": "sigma0"}),
        "vh": (dims, vh, {"units": "dB", "quantity": "sigma0"}),
        "vv_vh": (dims, vv - vh, {"units": "dB", "quantity": "ratio"}),
        "coherence": (dims, coherence, {"units": "1", "quantity": "coherence"}),
        "tree_cover": (("y", "x"), np.where(draw.random(trees.shape) < 0.05, np.nan, trees), {"units": "%"}),
    }
    arrays = {name: (d, np.asarray(values, "float32"), attrs) for name, (d, values, attrs) in arrays.items()}
    arrays["cover"] = (("y", "x"), np.where(trees > 40, 2, 1).astype("uint8"), {})
    arrays["present"] = (("tag",), np.array([(trees > 40).any(), seed % 2, (trees <= 40).any()], "uint8"), {})
    xr.Dataset(arrays, {"season": SEASONS, "tag": TAGS}).to_netcdf(path, engine="netcdf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write twelve tiles and the one YAML that describes them."""
    made = tmp_path_factory.mktemp("seasons")
    (made / "data").mkdir()
    for seed in range(12):
        write_tile(made / f"data/tile{seed:02d}.nc", seed)
    (made / "four_seasons.yaml").write_text(ENTRY)
    return made


def sarfm(folder: Path, *words: object) -> None:
    """Call the command line."""
    command = [sys.executable, "-c", "from sarfm.cli import main; raise SystemExit(main())", *map(str, words)]
    environment = os.environ | {"SARFM_DATA": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_from_files_and_a_yaml_to_scores_with_intervals(folder):
    given = {"data.dataset": folder / "four_seasons.yaml", "data.folder": folder / "data", "data.patch_px": 32}
    given |= {"data.stride_px": 32, "split.by": "scene", "encoder": "vit-nano", "learn.batch_size": 8}
    words = [word for name, value in given.items() for word in ("-p", f"{name}={value}")]
    sarfm(folder, "run", "pretrain", *words, "-p", "learn.steps=20", "--out", folder / "pretrain")
    learnt = ["-p", f"pretrained={folder / 'pretrain'}", "-p", 'data.targets=["tree_cover", "cover", "present"]']
    sarfm(folder, "run", "finetune", *words, *learnt, "-p", "learn.steps=60", "--out", folder / "finetune")
    sarfm(folder, "evaluate", folder / "finetune", "--out", folder / "evaluate")
    channels = json.loads((folder / "finetune/model.json").read_text())["contract"]["channels"]
    assert len(channels) == 16 and {c["at"] for c in channels} == set(SEASONS)
    scores = pd.read_parquet(folder / "evaluate/scores.parquet").set_index(["target", "score"])
    for target, score in [
        ("tree_cover", "r2"),
        ("tree_cover", "rmse"),
        ("cover", "mean_iou"),
        ("present", "map_macro"),
    ]:
        row = scores.loc[(target, score)]
        assert row["low"] <= row["value"] <= row["high"], (target, score)
    assert scores.loc[("tree_cover", "r2"), "value"] > 0
