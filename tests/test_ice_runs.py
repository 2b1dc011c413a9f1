"""The sea-ice sweeps that come with sarfm, made tiny: from simulated files to tables and figures, killed half-way and continued."""

import json
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from patience import PATIENCE_S, until

from sarfm.ice.tables import difference_table, read_trials
from sarfm.io.files import carried
from sarfm.runs.folders import read_run
from sarfm.runs.parameters import check_parameters, notebook_path, preset_names, read_preset

SWEEPS = notebook_path("pretrain").parent / "sweeps"
TINY = {
    "pretrain": {"scales": [2, 5], "patch_px": 48, "stride_px": 48, "steps": 4, "batch_size": 4, "checkpoint_every": 2},
    "icecharts": {"scales": [2, 5], "patch_px": 48, "stride_px": 48, "steps": 3, "batch_size": 2, "seeds": [0, 1]},
    "icereport": {},
}


def few_scenes(folder):
    """Write the entry of the simulated data set with few and small scenes."""
    entry = yaml.safe_load((carried("data_catalogs") / "ai4arctic_simulated.yaml").read_text())
    simulate = {"with": "ai4arctic", "scenes": 10, "test": 2, "side_px": 500, "seed": 0}
    folder.mkdir(exist_ok=True)
    (folder / "few.yaml").write_text(yaml.safe_dump(entry | {"simulate": simulate}, sort_keys=False))
    return folder / "few.yaml"


def tiny_sweep(name, path):
    """Write a sweep of sarfm's with tiny numbers, the first value of every list, and System 1's one scale among two."""
    said = yaml.safe_load((SWEEPS / f"{name}.yaml").read_text())
    for stage in [*said["first"].values(), said]:
        stage["parameters"] = stage.get("parameters", {}) | TINY[stage["notebook"]]
        if "train_scales" in stage["parameters"]:
            stage["parameters"]["train_scales"] = [5]
        if "test_scales" in stage["parameters"]:
            stage["parameters"]["test_scales"] = [5, 2]
        if stage["parameters"].get("encoder") == "vit-tiny":
            stage["parameters"]["encoder"] = "vit-nano"
        most = {"supervision": 2, "charts": 3, "model": 2}
        lists = {n: v[: most.get(n, 1)] for n, v in stage.get("sweep", {}).items()}
        lists |= (
            {"train_list": ["pretrain_80" if stage["notebook"] == "pretrain" else "finetune_20"]}
            if "train_list" in lists
            else {}
        )
        if lists:
            stage["sweep"] = lists
        if "dataset" in stage["parameters"]:
            stage["parameters"]["dataset"] = str(few_scenes(path.parent / "few"))
    left_out = ("larger", "larger_finetuned", "larger_scratch", "ratios_finetuned")
    said["first"] = {n: s for n, s in said["first"].items() if n not in left_out}
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return path


def start(sweep, out, data):
    """Start a sweep as the command line does, in a process group of its own."""
    environment = os.environ | {"SARFM_DATA": str(data), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        "from sarfm.cli import main; raise SystemExit(main())",
        "sweep",
        str(sweep),
        "--out",
        str(out),
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("system", [1, 5])
def test_a_sea_ice_sweep_is_killed_continues_and_reports(tmp_path, system):
    sweep, out = tiny_sweep(f"ai4arctic_system{system}_small", tmp_path / "tiny.yaml"), tmp_path / "out"
    first = start(sweep, out, tmp_path / "data")
    until(lambda: list(out.glob("pretrain/*/model.json")), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "few").rglob("*.nc")}
    again = start(sweep, out, tmp_path / "data")
    said = again.communicate(timeout=PATIENCE_S)[0]
    assert again.returncode == 0, said + "".join(p.read_text() for p in out.rglob("run.log"))
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "few").rglob("*.nc")} and len(made) == 20  # made once
    assert all(read_run(p.parent)["status"] == "done" for p in out.rglob("run.json"))

    report = out / "icereport"
    figures = {p.stem for p in (report / "figures").glob("*.png")}
    assert {"labels", "mask_ratios", "reconstructions"} <= figures and any(f.startswith("scene_") for f in figures)
    scores = pd.read_parquet(report / "scores.parquet")
    assert {"pretrained", "scratch"} <= set(scores["contestant"]) and (scores["low"] <= scores["value"] + 1e-9).all()
    ratios = pd.read_parquet(report / "ratios.parquet")
    assert ratios["hh_contrast_kept"].notna().all() and ratios["mask_ratio"].nunique() > 1
    trials = read_trials(out)
    differences = difference_table(out, trials, "sod" if system == 1 else "combined")
    assert len(differences) and set(differences.columns) >= {"labelled", "value", "low", "high", "sure"}
    for run in out.rglob("icecharts.ipynb"):
        text = run.read_text()
        assert '"output_type": "error"' not in text
    if system == 5:
        assert set(trials["learns"]) == {"charts", "truth"} and trials["charts"].nunique() == 4
        assert len(pd.read_parquet(report / "tasks.parquet")) and len(pd.read_parquet(report / "scales.parquet"))
        counts = pd.read_parquet(out / trials["run"].iloc[0] / "counts.parquet")
        assert set(counts["against"]) == {"charts", "truth"}


def test_pretraining_and_fine_tuning_share_no_scene(tmp_path):
    from sarfm.patches.splits import protocol_lists

    index = pd.DataFrame(
        {"scene": [f"s{k:03d}_{('cis', 'dmi')[k % 2]}@5x" for k in range(60)], "part": ["train"] * 50 + ["test"] * 10}
    )
    lists = protocol_lists(index)
    for percent in (20, 40, 50, 60):
        assert not set(lists[f"pretrain_{100 - percent}"]) & set(lists[f"finetune_{percent}"])
    assert not (set(lists["train_100"]) | set(lists["val"])) & set(lists["test"])


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_sound(name):
    notebook = name.partition("_")[2]
    assert check_parameters(notebook, read_preset(name, notebook))["dataset"] == "ai4arctic_raw"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("notebook: icecharts\nparameters: {steps: 3}\n", "a preset of icecharts"),
        ("parameters: {steps: 3}\n", "expected notebook and parameters"),
        ("notebook: pretrain\nparameters: {stepps: 3}\n", "did you mean 'steps'"),
        ("[1, 2]\n", "expected notebook and parameters"),
    ],
)
def test_presets_of_ones_own_are_checked(tmp_path, text, expected):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_preset(tmp_path / "mine.yaml", "pretrain")


def test_a_preset_lies_below_the_command_line(tmp_path, monkeypatch):
    from sarfm import cli

    seen = {}
    monkeypatch.setattr(
        cli, "run_notebook", lambda notebook, given, *rest: seen.update(given) or tmp_path / "run" / "x.ipynb"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"status": "done"}))
    assert cli.main(["run", "pretrain", "--preset", "system5_pretrain", "-p", "steps=7"]) == 0
    assert seen["steps"] == 7 and seen["norm_pix"] is True
