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

from sarfm.cli import main
from sarfm.io.files import read_json
from sarfm.runs.folders import read_run
from sarfm.runs.parameters import check_parameters, notebook_path, preset_names, read_preset

SWEEPS = notebook_path("pretrain").parent / "sweeps"
CUT = {"data.patch_px": 48, "data.stride_px": 48, "data.dataset": "SIMULATED"}
TINY = {
    "pretrain": {**CUT, "learn.steps": 4, "learn.batch_size": 4, "checkpoint_every": 2, "map_page": False},
    "finetune": {**CUT, "learn.steps": 3, "learn.batch_size": 2, "seeds": [0, 1], "scoring.draws": 50},
    "report": {"draws": 50},
}
LEFT_OUT = ("larger", "larger_finetuned", "larger_scratch", "ratios_finetuned", "baselines", "segformer", "brightness",
            "brightness_finetuned", "many_scales_finetuned", "frozen_random", "stage", "floe")  # fmt: skip


def tiny_sweep(name, path, dataset):
    """Write a sweep of sarfm's with tiny numbers and the first value of every list."""
    said = yaml.safe_load((SWEEPS / f"{name}.yaml").read_text())
    said["first"] = {n: s for n, s in said["first"].items() if n not in LEFT_OUT}
    for stage in [*said["first"].values(), said]:
        stage["parameters"] = stage.get("parameters", {}) | TINY[stage["notebook"]]
        if "data.dataset" in stage["parameters"]:
            stage["parameters"]["data.dataset"] = str(dataset)
        if "scoring.scales" in stage["parameters"]:
            stage["parameters"]["scoring.scales"] = stage["parameters"]["scoring.scales"][:2]
        lists = {n: v[: 2 if n == "learn_from" else 1] for n, v in stage.get("sweep", {}).items()}
        if "split.train_list" in lists:
            lists["split.train_list"] = ["pretrain_80" if stage["notebook"] == "pretrain" else "finetune_20"]
        if lists:
            stage["sweep"] = lists
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return path


def few_scenes(path):
    """Describe ten small scenes of the simulated data set."""
    from sarfm.io.files import carried

    said = yaml.safe_load((carried("data_catalogs") / "ai4arctic_simulated.yaml").read_text())
    said["simulate"] |= {"scenes": 10, "test": 2, "side_px": 500}
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
def test_a_sea_ice_sweep_is_killed_continues_and_reports(tmp_path, system, monkeypatch):
    entry = few_scenes(tmp_path / "few.yaml")
    sweep, out = tiny_sweep(f"ai4arctic_system{system}_small", tmp_path / "tiny.yaml", entry), tmp_path / "out"
    first = start(sweep, out, tmp_path / "data")
    until(lambda: list(out.glob("pretrain/*/model.json")), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = next(out.glob("pretrain/*/pretrain.ipynb"), None)
    before = done and done.stat().st_mtime_ns
    again = start(sweep, out, tmp_path / "data")
    said = again.communicate(timeout=PATIENCE_S)[0]
    assert again.returncode == 0, said + "".join(p.read_text() for p in out.rglob("run.log"))
    assert not done or done.stat().st_mtime_ns == before, "what is done is not done again"
    assert all(read_run(p.parent)["status"] == "done" for p in out.rglob("run.json"))

    report = out / "report"
    figures = {p.stem for p in (report / "figures").glob("*.png")}
    assert {"labels", "mask_ratios"} <= figures
    scores = pd.read_parquet(report / "scores.parquet")
    assert {"pretrained", "scratch", "frozen"} <= set(scores["contestant"])
    assert (scores["low"] <= scores["value"] + 1e-9).all() and set(scores["labelled"]) == {20.0}
    ratios = pd.read_parquet(report / "pretrainings.parquet")
    assert ratios["hh_contrast_kept"].notna().all() and ratios["settings.mask_ratio"].nunique() > 1
    differences = pd.read_parquet(report / "differences.parquet")
    assert "scratch" in set(differences["over"]) and set(differences.columns) >= {"labelled", "value", "sure"}
    run = next(out.glob("finetune/*/run.json")).parent
    tallies = pd.read_parquet(run / "tallies.parquet")
    assert tallies["group"].nunique() > 1, "pixels are counted by incidence angle"
    if system == 1:  # evaluate takes the list that the pretraining left over, which nobody named
        monkeypatch.setenv("SARFM_DATA", str(tmp_path / "data"))
        assert main(["evaluate", str(run), "--out", str(tmp_path / "scored"), "--quiet"]) == 0
        scored, own = (read_json(tmp_path / "scored/evaluate.json"), read_run(run)["metrics"]["sod.weighted_f1"])
        assert tallies["seed"].nunique() > 1 or scored["scores"]["weighted_f1"]["value"] == pytest.approx(own["value"])
    if system == 5:
        assert set(tallies["target"]) == {f"{t}{c}" for t in ("", "true_") for c in ("sic", "sod", "floe")}
        assert set(scores["learn_from"]) == {"target", "twin"} and len(pd.read_parquet(report / "scales.parquet"))


def test_pretraining_and_fine_tuning_share_no_scene(tmp_path):
    from sarfm.ice.lists import protocol_lists

    index = pd.DataFrame({"place": [f"s{k:03d}" for k in range(60)], "part": ["train"] * 50 + ["test"] * 10})
    lists = protocol_lists(index)
    for percent in (20, 40, 50, 60):
        assert not set(lists[f"pretrain_{100 - percent}"]) & set(lists[f"finetune_{percent}"])
    assert not (set(lists["train_100"]) | set(lists["val"])) & set(lists["test"])


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith(("system1_", "system5_"))])
def test_presets_are_sound(name):
    notebook = name.partition("_")[2]
    assert check_parameters(notebook, read_preset(name, notebook))["data"]["dataset"] == "ai4arctic_raw"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("notebook: finetune\nparameters: {learn.steps: 3}\n", "a preset of finetune"),
        ("parameters: {learn.steps: 3}\n", "expected notebook, and parameters as names"),
        ("notebook: pretrain\nparameters: {learn.stepps: 3}\n", "did you mean 'learn.steps'"),
        ("[1, 2]\n", "expected lines of `name: value`; got a list"),
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
    assert cli.main(["run", "pretrain", "--preset", "system5_pretrain", "-p", "learn.steps=7"]) == 0
    assert seen["learn.steps"] == 7 and seen["settings.norm_pix"] is True


def made_up_runs(folder):
    """Write what a small sweep leaves: pretrainings at two mask ratios, trials of several kinds, counts drawn at random."""
    import numpy as np

    from sarfm.evaluation.tallies import Tallies, save_tallies
    from sarfm.ice.charts import chart_targets
    from sarfm.io.files import write_json
    from sarfm.tasks.tasks import task_for

    draw, tasks = np.random.default_rng(0), {name: task_for(target) for name, target in chart_targets().items()}
    ratios = {"p75": 0.75, "p90": 0.9}
    for name, ratio in ratios.items():
        given = {
            "settings": {"mask_ratio": ratio},
            "encoder": "vit-nano",
            "split": {"by": "list", "train_list": "pretrain_80"},
        }
        scores = {
            "rmse": 2 + ratio,
            "rmse_of_the_mean": 4.0,
            "ssim": 0.5,
            "hh_contrast_kept": {"value": 1 - ratio, "low": 0, "high": 1},
        }
        write_json(
            folder / name / "run.json",
            {"notebook": "pretrain", "status": "done", "parameters": given, "metrics": scores},
        )
    trials = [
        ("pretrained", "p75", "target", tasks),
        ("pretrained", "p90", "target", tasks),
        ("scratch", "", "target", tasks),
    ]
    trials += [("scratch", "", "twin", tasks), ("scratch", "", "target", {"sod": tasks["sod"]})]
    for k, (who, before, learn_from, learnt) in enumerate(trials):
        counted = Tallies(who, 0)
        for scene in ("20180124T194759_dmi", "20190430T101830_cis", "20200718T211031_dmi"):
            for name, task in learnt.items():
                sums = draw.integers(1, 9, (task.target.size,) * 2) + 30 * np.eye(task.target.size)
                for target in (name, f"true_{name}"):
                    counted.add(f"{scene}@5x", target, sums, int(sums.sum()))
                    counted.add(f"{scene}@10x", target, sums.T, int(sums.sum()))
        table = counted.table()
        table["factor"] = table["scene"].str.extract(r"@(\d+)x")[0].astype(int)
        run = folder / f"trial{k}"
        save_tallies(table.assign(contestant=who, fraction=1.0, rate=1e-3, labelled=20.0), run / "tallies.parquet")
        write_json(
            run / "model.json", {"kind": "predictor", "config": {"tasks": {n: t.config() for n, t in learnt.items()}}}
        )
        given = {
            "pretrained": before and f"gone/{before}",
            "learn_from": learn_from,
            "encoder": "vit-nano",
            "seeds": [0],
        }
        given |= {"tasks": dict.fromkeys(learnt, "classes"), "twins": {name: f"true_{name}" for name in learnt}}
        given |= {
            "split": {"by": "list", "train_list": "" if before else "finetune_20"},
            "scoring": {"scales": [5, 10]},
        }
        write_json(run / "run.json", {"notebook": "finetune", "status": "done", "parameters": given, "metrics": {}})


def test_a_report_tells_trials_apart(tmp_path, monkeypatch):
    from sarfm.evaluation.report import read_trials
    from sarfm.runs.notebooks import run_notebook

    made_up_runs(tmp_path / "runs")
    trials, tasks, varying = read_trials(tmp_path / "runs")
    assert {"learn_from", "pretrain.settings.mask_ratio"} <= set(varying) and set(tasks) >= {"sic", "true_floe"}
    assert set(trials.loc[trials["run"] == "trial2", "pretrain.settings.mask_ratio"]) == {""}
    given = {"runs": str(tmp_path / "runs"), "draws": 50, "published": ["system1"]}
    run_notebook("report", given, tmp_path / "report", progress=False)
    table = pd.read_parquet(tmp_path / "report/scores.parquet")
    assert set(table["who"]) == {"pretrained mask_ratio=0.75", "pretrained mask_ratio=0.9", "scratch"}
    assert set(table["learn_from"]) == {"target", "twin"} and len(table) == 4, (
        "a run of one chart has no combined score"
    )
    leads = pd.read_parquet(tmp_path / "report/differences.parquet")
    assert len(leads) == 2 and set(leads["over"]) == {"scratch"} and (leads["low"] <= leads["high"]).all()
    assert set(pd.read_parquet(tmp_path / "report/scales.parquet")["factor"]) == {5, 10}
    assert pd.read_parquet(tmp_path / "report/published.parquet")["copied"].all()
    assert (tmp_path / "report/figures/mask_ratios.png").is_file()
