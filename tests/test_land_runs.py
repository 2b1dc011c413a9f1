"""The sweep of seasonal land, made tiny: pretrained on some regions, fine-tuned inside and outside of them, and reported apart."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from patience import PATIENCE_S

from sarfm.evaluation.report import read_trials
from sarfm.io.files import carried
from sarfm.runs.folders import read_run
from sarfm.runs.parameters import notebook_path

SWEEPS = notebook_path("pretrain").parent / "sweeps"
SMALL = {"with": "land", "pretrain": 4, "train": 8, "val": 2, "test": 3, "size_px": 32, "seed": 0}
CUT = {"data.patch_px": 32, "data.stride_px": 32}
TINY = {
    "pretrain": {**CUT, "learn.steps": 4, "learn.batch_size": 4, "checkpoint_every": 2},
    "finetune": {**CUT, "learn.steps": 2, "learn.batch_size": 2, "seeds": [0], "tried_rates": [0.001], "scoring.draws": 50},
    "report": {"draws": 50},
}  # fmt: skip


KEPT = ("pretrain", "inside_few", "outside", "tree_cover")


def tiny_sweep(folder):
    """Write the sweep with tiny numbers, some of its stages, and without the U-Net, whose encoder needs time."""
    said = yaml.safe_load((SWEEPS / "land_small.yaml").read_text())
    said["first"] = {name: said["first"][name] for name in KEPT}
    entry = yaml.safe_load((carried("data_catalogs") / "land_simulated.yaml").read_text())
    (folder / "land_simulated.yaml").write_text(yaml.safe_dump(entry | {"simulate": SMALL}))
    for stage in [*said["first"].values(), said]:
        stage["parameters"] |= TINY[stage["notebook"]]
        if "data.dataset" in stage["parameters"]:
            stage["parameters"]["data.dataset"] = str(folder / "land_simulated.yaml")
        if "sweep" in stage:
            stage["sweep"] = {"tasks": stage["sweep"]["tasks"]}
            stage["parameters"]["contestants"] = ["pretrained", "scratch"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    return folder / "tiny.yaml"


@pytest.mark.soak
def test_inside_and_outside_are_trained_and_reported_apart(tmp_path):
    command = [sys.executable, "-c", "from sarfm.cli import main; raise SystemExit(main())", "sweep"]
    command += [str(tiny_sweep(tmp_path)), "--out", str(tmp_path / "out")]
    environment = os.environ | {"SARFM_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    logs = "".join(path.read_text() for path in (tmp_path / "out").rglob("run.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs

    trials, _, varying = read_trials(tmp_path / "out")
    assert "split.test_list" in varying and not {"tuning_fraction", "tried_rates"} & set(varying)
    for part, places in trials.groupby("split.test_list")["place"]:
        region = part.removesuffix("_test")
        assert places.nunique() == SMALL["test"] and all(place.startswith(f"{region}/") for place in places)
    counted = trials.groupby(["target", "split.test_list", "contestant", "fraction", "seed"]).size()
    assert len(counted) == 2 * 2 * (1 + 2) and set(counted) == {SMALL["test"]}, "no training is counted twice"

    pretrained = json.loads((tmp_path / "out/pretrain/model.json").read_text())["contract"]
    assert len(pretrained["channels"]) == 12 and read_run(tmp_path / "out/pretrain")["status"] == "done"
    for report in ("report", "tree_cover"):
        scores = pd.read_parquet(tmp_path / "out" / report / "scores.parquet")
        asked = ["contestant", "labelled", "split.test_list"]
        assert len(scores) == 2 * (1 + 2) and not scores.duplicated(asked).any(), "one row for each, and none pooled"
