"""The sea-ice score equals scikit-learn's, whatever is counted, in bands, groups or pieces."""

import numpy as np
import pandas as pd
import pytest
from predictors import confusion
from sklearn import metrics

from sarfm.evaluation.counting import count_piece
from sarfm.evaluation.intervals import score_table, score_tables
from sarfm.evaluation.scoring import find_score, score_of
from sarfm.evaluation.tallies import Tallies, stack
from sarfm.ice.charts import chart_targets
from sarfm.ice.score import SCORES, combine, combined, scene_columns
from sarfm.tasks.scores import r2_of_classes, weighted_f1
from sarfm.tasks.tasks import Classes, task_for

TASKS = {name: task_for(target) for name, target in chart_targets().items()}
SIZES = {"sic": 11, "sod": 6, "floe": 7}


def charts(seed, classes, shape=(38, 30), present=None):
    """A prediction that is right in two of three pixels, and a truth of which a tenth is unlabelled."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, present or classes, shape).astype(np.uint8)
    wrong = rng.integers(0, classes, shape).astype(np.uint8)
    prediction = np.where(rng.random(shape) < 0.67, truth, wrong)
    truth[rng.random(shape) < 0.1] = 255
    return prediction, truth


def counted(scenes=6, pieces=1):
    counts = Tallies()
    for k in range(scenes):
        for chart, classes in SIZES.items():
            both = charts(100 * k + classes, classes)
            for piece in range(pieces):
                count_piece(counts, TASKS[chart], f"scene {k}", chart, *[x[piece::pieces] for x in both])
    return counts.table()


def main(table):
    found = score_table(table, TASKS, draws=200).set_index(["target", "score"])
    return found.loc[[("", "combined"), *[s for s in SCORES.items() if s[0] in set(table["target"])]]]


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learn(seed):
    for classes in (6, 7, 11):
        prediction, truth = charts(seed, classes, present=classes - seed)
        there = truth != 255
        counts = confusion(prediction, truth, classes)
        t, p = truth[there].astype(int), prediction[there].astype(int)
        assert abs(r2_of_classes(counts) - metrics.r2_score(t, p)) < 1e-6
        assert abs(weighted_f1(counts) - metrics.f1_score(t, p, average="weighted", zero_division=0)) < 1e-6


def test_half_a_billion_pixels_lose_no_digit():
    counts = np.full((11, 11), 10**9, np.int64)
    counts[np.arange(11), np.arange(11)] = 10**11
    assert np.isclose(r2_of_classes(counts), r2_of_classes(counts // 10**9), rtol=1e-12)


def test_what_is_undefined_is_nan_and_what_is_empty_weighs_nothing():
    only_three = np.zeros((11, 11), int)
    only_three[3, 2:5] = 7
    assert np.isnan(r2_of_classes(only_three)) and np.isclose(weighted_f1(only_three), 2 * 7 / (21 + 7))
    nothing = np.zeros((6, 6))
    assert np.isnan(r2_of_classes(nothing)) and np.isnan(weighted_f1(nothing))
    some = confusion(*charts(0, 6), 6)
    assert np.isclose(weighted_f1(np.pad(some, (0, 5))), weighted_f1(some))
    assert np.isclose(r2_of_classes(np.pad(some, (0, 5))), r2_of_classes(some))


def test_bands_and_groups_count_every_pixel_once():
    prediction, truth = charts(1, 7)
    groups = np.indices(truth.shape)[1] // 10 - 1  # -1, 0, 1
    whole, parts = Tallies(), Tallies()
    count_piece(whole, TASKS["floe"], "a", "floe", prediction, truth)
    for rows in (slice(0, 7), slice(7, 38)):
        count_piece(parts, TASKS["floe"], "a", "floe", prediction[rows], truth[rows], groups[rows])
    assert np.array_equal(whole.table()["sums"][0].reshape(7, 7), confusion(prediction, truth, 7))
    grouped = parts.table().set_index("group")
    for group in (0, 1):
        here = np.where(groups == group, truth, 255)
        assert np.array_equal(grouped.loc[group, "sums"].reshape(7, 7), confusion(prediction, here, 7))
    assert set(grouped.index) == {0, 1} and grouped["n"].sum() == ((truth != 255) & (groups >= 0)).sum()


def test_what_is_no_class_is_refused():
    prediction, truth = charts(3, 6)
    five = Classes(chart_targets()["sod"].__class__("sod", classes={k: f"{k}" for k in range(5)}))
    with pytest.raises(ValueError, match=r"labels of sod are class numbers in 0\.\.4 or 255; found 5"):
        count_piece(Tallies(), five, "a", "sod", prediction.clip(0, 4), truth)
    with pytest.raises(ValueError, match="different shapes"):
        count_piece(Tallies(), TASKS["sod"], "a", "sod", prediction[1:], truth)


def test_what_is_not_predicted_is_not_counted():
    prediction, truth = charts(3, 6)
    prediction[5:9] = 255
    table = Tallies()
    count_piece(table, TASKS["sod"], "a", "sod", prediction, truth)
    assert table.table()["n"][0] == ((truth != 255) & (prediction != 255)).sum()


def test_pieces_of_a_scene_add_up():
    pd.testing.assert_frame_equal(counted(), counted(pieces=4))


def test_scores_are_those_of_the_pooled_pixels():
    found = main(counted())
    for chart, score in SCORES.items():
        both = [charts(100 * k + SIZES[chart], SIZES[chart]) for k in range(6)]
        p, t = (np.concatenate([x.ravel() for x in part]) for part in zip(*both, strict=True))
        t, p = t[t != 255].astype(int), p[t != 255].astype(int)
        expected = metrics.r2_score(t, p) if score == "r2" else metrics.f1_score(t, p, average="weighted")
        row = found.loc[(chart, score)]
        assert np.isclose(row["value"], expected) and row["low"] <= row["value"] <= row["high"]
        assert row["n"] == len(t) and row["units"] == 6
    values = {chart: found.loc[(chart, score), "value"] for chart, score in SCORES.items()}
    assert np.isclose(
        found.loc[("", "combined"), "value"], (2 * values["sic"] + 2 * values["sod"] + values["floe"]) / 5
    )


def test_the_interval_is_over_scenes_not_over_rows():
    """A table split into groups, and one whose rows are shuffled, give the same intervals."""
    table = counted()
    halves = pd.concat([table, table.assign(group=1)])
    halves["sums"] = [3 * sums for sums in halves["sums"]]
    tripled = table.assign(sums=[6 * sums for sums in table["sums"]])
    shuffled, whole = main(halves.sample(frac=1, random_state=0)), main(tripled)
    np.testing.assert_allclose(shuffled[["value", "low", "high"]], whole[["value", "low", "high"]])


def test_joined_columns_split_the_table():
    table = counted().assign(service=lambda t: np.where(t["scene"] < "scene 3", "cis", "dmi"))
    found = score_tables(table, TASKS, ["service"], draws=50)
    alone = score_table(table[table["service"] == "dmi"], TASKS, draws=50)
    part = found[found["service"] == "dmi"].drop(columns="service").reset_index(drop=True)
    pd.testing.assert_frame_equal(part, alone)
    assert set(alone["units"]) == {3}
    with pytest.raises(ValueError, match=r"no column \['season'\]"):
        score_tables(table, TASKS, "season")


def test_one_set_of_scenes_is_drawn_for_all_charts():
    """Where one chart is good as much as the other is bad, the combination is certain."""
    counts, truth = Tallies(), np.repeat(np.uint8([0, 1]), 50)[None]
    for k in range(8):
        wrong = np.tile(np.arange(50) < 5 * k, 2)[None]
        count_piece(counts, TASKS["sod"], str(k), "sod", truth ^ wrong, truth)
        count_piece(counts, TASKS["floe"], str(k), "floe", truth ^ ~wrong, truth)
    from sarfm.evaluation.intervals import intervals

    f1 = {chart: score_of({chart: TASKS[chart]}, "weighted_f1") for chart in ("sod", "floe")}
    both = lambda sums: combine({c: f({c: sums[c]}) for c, f in f1.items()}, {"sod": 1, "floe": 1})
    found = intervals(counts.table(), {"both": both, "sod": lambda sums: f1["sod"]({"sod": sums["sod"]})}, draws=200)
    np.testing.assert_allclose(found["both"], 0.5)
    assert found["sod"].high - found["sod"].low > 0.1


def test_the_combined_score_needs_all_charts():
    assert find_score(TASKS) == ("", "combined") and combined({"sod": TASKS["sod"]}) == {}
    twins = {f"true_{name}": task for name, task in TASKS.items()}
    assert set(combined({**TASKS, **twins})) == {"combined", "combined_truth"}
    with pytest.raises(ValueError, match="floe is missing"):
        combine({"sic": 0.9, "sod": 0.8})
    table = counted()
    alone = score_table(table[table["target"] == "sod"], {"sod": TASKS["sod"]}, draws=20)
    assert set(alone["target"]) == {"sod"}


def test_the_truth_beneath_is_scored_by_its_own_sums():
    table = counted()
    truth = table.assign(target="true_" + table["target"], sums=[np.roll(s, 1) for s in table["sums"]])
    twins = {**TASKS, **{f"true_{name}": task for name, task in TASKS.items()}}
    found = score_table(pd.concat([table, truth]), twins, draws=20).set_index(["target", "score"])["value"]
    parts = {c: (r2_of_classes if s == "r2" else weighted_f1)(stack(truth, f"true_{c}").sum(0).reshape(SIZES[c], -1)) for c, s in SCORES.items()}  # fmt: skip
    assert (
        np.isclose(found["", "combined_truth"], combine(parts)) and found["", "combined"] != found["", "combined_truth"]
    )


def test_service_and_season_stand_in_the_name():
    assert scene_columns("20180124T194759_dmi") == {"service": "dmi", "season": "winter"}
    assert scene_columns("20181231T235959_cis@5x") == {"service": "cis", "season": "autumn"}
    assert scene_columns("20200401T000000_cis") == {"service": "cis", "season": "spring"}
    assert scene_columns("before_0012") == {}
