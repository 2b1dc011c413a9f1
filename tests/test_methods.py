"""The table of methods: values by hand, intervals over what was really repeated, data sets kept apart, the run that writes it."""

import numpy as np
import pandas as pd
import pytest

from sarfm.evaluation.methods import BENCH, RANDOM, bench_rows, method_and_readout, method_table, trials_by_data
from sarfm.evaluation.tallies import Tallies, save_tallies
from sarfm.io.files import write_json
from sarfm.runs.notebooks import run_notebook
from sarfm.scenes.channels import Target
from sarfm.tasks.tasks import Classes, Number

TASKS = {
    "flood": Classes(Target("flood", classes={0: "dry", 1: "wet"})),
    "height": Number(Target("height", "number", units="m", limits=(0, 40))),
}
SCENES = 12


def write_run(root, name, given, tables=None, tasks=TASKS):
    """A finished run, with what it counted."""
    kind = "pretrain" if tables is None else "finetune"
    write_json(root / name / "run.json", {"notebook": kind, "status": "done", "parameters": given})
    if tables is not None:
        save_tallies(pd.concat(tables, ignore_index=True), root / name / "tallies.parquet")
        config = {"tasks": {target: task.config() for target, task in tasks.items()}}
        write_json(root / name / "model.json", {"kind": "predictor", "config": config})


def counted(contestant, seed, wrong, error, targets=("flood", "height")):
    """Tallies of scenes of 100 pixels, `wrong` (n,) of 20 wet ones missed, heights off by `error` (n,) metres."""
    tallies = Tallies("", seed)
    for k, (w, e) in enumerate(zip(wrong, error, strict=True)):
        if "flood" in targets:
            tallies.add(f"s{k:02d}", "flood", [80, 0, w, 20 - w], 100)
        if "height" in targets:  # sums of 1, error, |error|, error², truth - 20, (truth - 20)²
            tallies.add(f"s{k:02d}", "height", [100, 100 * e, 100 * abs(e), 100 * e**2, 0, 2500], 100)
    about = {"contestant": contestant, "fraction": 1.0, "labelled": 100.0, "labels": 50, "factor": 1}
    return tallies.table().assign(**about)


@pytest.fixture
def sweep(tmp_path):
    """Two methods, two pretrainings and two choices of labels of each, and random weights."""
    rng, root = np.random.default_rng(0), tmp_path / "runs"
    about = {"data": {"dataset": "bigearthnet_sample"}, "encoder": "vit-nano", "patch_size": 8}
    hard, truth = rng.integers(0, 4, SCENES), {}
    for method, worse in (("mae", 1), ("dino", 3)):
        for number in (0, 1):
            learn = {"learn": {"seed": number, "steps": 10}, "method": method}
            write_run(root, f"{method}/{number}", about | learn)
            wrong = {seed: hard + worse + rng.integers(0, 3, SCENES) for seed in (0, 1)}
            error = {seed: worse + rng.normal(0, 0.3, SCENES) for seed in (0, 1)}
            tables = [counted("pretrained", seed, wrong[seed], error[seed]) for seed in (0, 1)]
            write_run(root, f"from_{method}/{number}", about | {"pretrained": f"x/{method}/{number}"}, tables)
            truth |= {(method, number, seed): (wrong[seed], error[seed]) for seed in (0, 1)}
    for seed in (0, 1):
        truth["random", 0, seed] = hard + 6 + rng.integers(0, 3, SCENES), 5 + rng.normal(0, 0.3, SCENES)
    tables = [counted("scratch", seed, *truth["random", 0, seed]) for seed in (0, 1)]
    write_run(root, "from_nothing", about | {"pretrained": ""}, tables)
    return root, truth


def of(truth, method, score):
    """Mean over trainings, computed plainly."""
    found = []
    for (who, _, _), (wrong, error) in truth.items():
        if who == method:
            iou = (20 * SCENES - wrong.sum()) / (20 * SCENES)
            found.append(iou if score == "iou_wet" else np.sqrt((error**2).mean()))
    return np.mean(found)


def test_values_and_leads_are_those_of_a_plain_computation(sweep):
    root, truth = sweep
    trials, tasks = trials_by_data(root)["bigearthnet_sample"]
    table = method_table(trials, tasks, {"flood": "iou_wet", "height": "rmse"}, "mae", draws=400)
    assert len(table) == 6
    for row in table.itertuples():
        who = "random" if row.method == RANDOM else row.method
        assert row.value == pytest.approx(of(truth, who, row.score))
        assert row.low < row.value < row.high
        if who != "random":
            sign = -1 if row.score == "rmse" else 1
            lead = sign * (of(truth, who, row.score) - of(truth, "random", row.score))
            assert row.ahead == pytest.approx(lead) and lead > 0 and row.sure
            assert (row.trainings, row.pretrainings) == (4, 2)
    changed = table.set_index(["target", "method"])["changed"]
    assert changed["flood", "mae"] == "" and changed["flood", "dino"] == changed["flood", RANDOM] == "algorithm"


def test_a_method_that_is_random_weights_leads_by_nothing(sweep):
    root, truth = sweep
    given = {"data": {"dataset": "bigearthnet_sample"}, "encoder": "vit-nano", "patch_size": 8, "pretrained": "x/mae/0"}
    for name in ("from_mae/0", "from_mae/1"):
        tables = [counted("pretrained", seed, *truth["random", 0, seed]) for seed in (0, 1)]
        write_run(root, name, given | {"pretrained": f"x/mae/{name[-1]}"}, tables)
    trials, tasks = trials_by_data(root)["bigearthnet_sample"]
    row = (
        method_table(trials, tasks, {"flood": "iou_wet"}, draws=200).set_index(["target", "method"]).loc["flood", "mae"]
    )
    assert row["ahead"] == row["ahead_low"] == row["ahead_high"] == 0 and not row["sure"]  # the same labels are drawn


def test_luck_of_pretraining_widens_an_interval_as_the_number_of_pretrainings_says(sweep):
    root, _ = sweep
    given = {"data": {"dataset": "bigearthnet_sample"}, "encoder": "vit-nano", "patch_size": 8}
    for number, wrong in enumerate((2, 10)):  # scenes alike, labels alike: only pretrainings differ
        tables = [counted("pretrained", seed, np.full(SCENES, wrong), np.ones(SCENES)) for seed in range(4)]
        write_run(root, f"from_mae/{number}", given | {"pretrained": f"x/mae/{number}"}, tables)
    trials, tasks = trials_by_data(root)["bigearthnet_sample"]
    row = (
        method_table(trials, tasks, {"flood": "iou_wet"}, draws=200).set_index(["target", "method"]).loc["flood", "mae"]
    )
    assert (row["low"], row["high"]) == (0.5, 0.9)  # one of two pretrainings is drawn, never a mean of eight trainings


def test_targets_of_one_name_are_kept_apart_by_data_set_and_refused_within_one(sweep):
    root, _ = sweep
    other = {"flood": Classes(Target("flood", classes={0: "land", 1: "ice"}))}
    given = {"data": {"dataset": "ombria"}, "encoder": "vit-nano", "patch_size": 8, "pretrained": ""}
    tables = [counted("scratch", 0, np.ones(SCENES), np.ones(SCENES), ("flood",))]
    write_run(root, "elsewhere", given, tables, other)
    found = trials_by_data(root)
    assert found["ombria"][1]["flood"].target.names == ["land", "ice"]
    assert found["bigearthnet_sample"][1]["flood"].target.names == ["dry", "wet"]
    write_run(root, "elsewhere", given | {"data": {"dataset": "bigearthnet_sample"}}, tables, other)
    with pytest.raises(ValueError, match="flood means something else"):
        trials_by_data(root)


def test_networks_have_no_readout_and_nothing_that_was_pretrained():
    assert method_and_readout("unet", "mae") == ("unet", "fine-tuned")
    assert method_and_readout("frozen_random", "mae") == (RANDOM, "frozen")
    assert method_and_readout("pretrained", "") == (RANDOM, "fine-tuned")


def test_the_run_writes_table_figure_and_rows_that_merge(sweep, tmp_path):
    root, truth = sweep
    out = tmp_path / "compare"
    run_notebook("compare", {"runs": str(root), "out": str(out), "scores.flood": "iou_wet", "draws": 50})
    rows = pd.read_csv(out / "results.csv")
    assert list(rows.columns) == BENCH and len(rows) == 20
    trials, tasks = trials_by_data(root)["bigearthnet_sample"]
    again = bench_rows(trials, tasks, "bigearthnet_sample", {"flood": "iou_wet"}, draws=50)
    pd.testing.assert_frame_equal(rows, again, check_exact=False)
    wrong, _ = truth["dino", 1, 0]
    one = rows[(rows["seed"] == 1000) & (rows["model"] == "vit-nano/8 dino") & (rows["metric_name"] == "flood.iou_wet")]
    assert one["metric_value"].item() == pytest.approx(1 - wrong.sum() / 20 / SCENES)
    assert (out / "figures" / "methods.png").is_file()
    with pytest.raises(Exception, match="scores names fire"):
        run_notebook("compare", {"runs": str(root), "out": str(tmp_path / "no"), "scores.fire": "iou_wet"})
