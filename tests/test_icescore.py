"""The sea-ice score equals scikit-learn's, whatever is counted, in blocks, groups or pieces."""

import importlib.util

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sarfm.evaluation.tallies import Tallies
from sarfm.ice.score import (
    CLASSES,
    chart_scores,
    combine,
    combined_score,
    count_chart,
    pooled,
    r2_score,
    tally_chart,
    weighted_f1,
)


def charts(seed, classes, size=(40, 30), present=None):
    """A truth with a border of 255, and a prediction that is often right."""
    rng = np.random.default_rng(seed)
    present = classes if present is None else present
    truth = rng.choice(classes, present, replace=False)[rng.integers(0, present, size)].astype(np.uint8)
    prediction = np.where(rng.random(size) < 0.7, truth, rng.integers(0, classes, size)).astype(np.uint8)
    truth[:2] = 255
    return prediction, truth


def by_definition(prediction, truth):
    """R² and weighted F1 written out over lists of pixels."""
    there = truth != 255
    t, p = truth[there].astype(float), prediction[there].astype(float)
    r2 = 1 - ((t - p) ** 2).sum() / ((t - t.mean()) ** 2).sum() if len(set(t)) > 1 else np.nan
    f1 = 0.0
    for c in set(t):
        hits = ((t == c) & (p == c)).sum()
        f1 += (t == c).mean() * 2 * hits / ((t == c).sum() + (p == c).sum())
    return r2, f1


def test_the_combined_score_of_the_starter_kit():
    assert round(combine({"sic": 69.486, "sod": 83.712, "floe": 66.73}), 3) == 74.625
    assert round(combine({"sic": 0.69486, "sod": 0.83712, "floe": 0.6673}), 5) == 0.74625
    assert combine({"sod": 0.5}, {"sod": 1}) == 0.5
    with pytest.raises(ValueError, match="floe is missing"):
        combine({"sic": 1, "sod": 1})


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 12), present=st.integers(1, 12))
def test_scores_follow_their_definitions(seed, classes, present):
    prediction, truth = charts(seed, classes, present=min(present, classes))
    counts = count_chart(prediction, truth, classes)[0]
    r2, f1 = by_definition(prediction, truth)
    np.testing.assert_allclose(r2_score(counts), r2, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(weighted_f1(counts), f1, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="scikit-learn is a development dependency")
@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learn(seed):
    from sklearn import metrics

    for classes in (6, 7, 11):
        prediction, truth = charts(seed, classes, present=classes - seed)
        there = truth != 255
        counts = count_chart(prediction, truth, classes)[0]
        t, p = truth[there], prediction[there]
        assert abs(r2_score(counts) - metrics.r2_score(t, p)) < 1e-6
        assert abs(weighted_f1(counts) - metrics.f1_score(t, p, average="weighted", zero_division=0)) < 1e-6


def test_r2_equals_scikit_learn_on_many_pixels():
    from sklearn import metrics

    prediction, truth = charts(0, 11, (400, 500))
    there = truth != 255
    expected = metrics.r2_score(truth[there].astype(np.float64), prediction[there].astype(np.float64))
    assert abs(r2_score(count_chart(prediction, truth, 11)[0]) - float(expected)) < 1e-9


def test_half_a_billion_pixels_lose_no_digit():
    counts = np.full((11, 11), 10**9, np.int64)
    counts[np.arange(11), np.arange(11)] = 10**11
    assert np.isclose(r2_score(counts), r2_score(counts // 10**9), rtol=1e-12)


def test_stacks_are_scored_like_single_matrices():
    stack = np.stack([count_chart(*charts(k, 6), 6)[0] for k in range(4)])
    for score in (r2_score, weighted_f1):
        assert np.allclose(score(stack), [score(matrix) for matrix in stack])
        assert score(stack.reshape(2, 2, 6, 6)).shape == (2, 2)


def test_what_is_undefined_is_nan_and_what_is_empty_weighs_nothing():
    only_three = np.zeros((11, 11), int)
    only_three[3, 2:5] = 7
    assert np.isnan(r2_score(only_three)) and np.isclose(weighted_f1(only_three), 2 * 7 / (21 + 7))
    nothing = np.zeros((6, 6))
    assert np.isnan(r2_score(nothing)) and np.isnan(weighted_f1(nothing))
    some = count_chart(*charts(0, 6), 6)[0]
    assert np.isclose(weighted_f1(np.pad(some, (0, 5))), weighted_f1(some))
    assert np.isclose(r2_score(np.pad(some, (0, 5))), r2_score(some))


# counting


@pytest.mark.parametrize("rows", [1, 7, 40, 1000])
def test_blocks_change_nothing(rows):
    prediction, truth = charts(1, 7)
    groups = np.indices(truth.shape)[1] // 10 - 1  # -1, 0, 1
    expected = np.array([[((truth == t) & (prediction == p)).sum() for p in range(7)] for t in range(7)])
    assert np.array_equal(count_chart(prediction, truth, 7, rows=rows)[0], expected)
    counted = count_chart(prediction, truth, 7, groups, rows)
    inside = groups == 1
    expected = [[((truth == t) & (prediction == p) & inside).sum() for p in range(7)] for t in range(7)]
    assert counted.shape == (2, 7, 7) and counted[1].tolist() == expected
    assert counted.sum() == ((truth != 255) & (groups >= 0)).sum()


def test_arrays_that_are_not_in_memory_are_counted():
    import dask.array as da
    import xarray as xr

    prediction, truth = charts(2, 6)
    expected = count_chart(prediction, truth, 6)
    lazy = da.from_array(prediction, chunks=16), xr.DataArray(truth, dims=("y", "x"))
    assert np.array_equal(count_chart(*lazy, 6), expected)
    assert np.array_equal(count_chart(prediction.astype(np.int64), truth.astype(np.int16), 6), expected)


def test_what_is_no_class_is_refused():
    prediction, truth = charts(3, 6)
    with pytest.raises(ValueError, match=r"truth holds 5 in \d+ labelled pixels, expected class numbers in 0..4"):
        count_chart(prediction.clip(0, 4), truth, 5)
    missing = prediction.copy()
    missing[5, 5] = 255
    with pytest.raises(ValueError, match="prediction holds 255 in 1 labelled pixels"):
        count_chart(missing, truth, 6)
    missing[:2] = 255  # where there is no label, anything goes
    missing[5, 5] = 0
    count_chart(missing, truth, 6)
    with pytest.raises(ValueError, match="Round estimates"):
        count_chart(prediction.astype(np.float32), truth, 6)
    with pytest.raises(ValueError, match="-1..5"):
        count_chart(prediction.astype(int), np.where(truth == 255, -1, truth.astype(int)), 6)
    with pytest.raises(ValueError, match="different shapes"):
        count_chart(prediction[1:], truth, 6)
    with pytest.raises(ValueError, match="wider bins"):
        count_chart(prediction, truth, 6, np.full(truth.shape, 200))


def counted(scenes=6, pieces=1):
    counts = Tallies()
    for k in range(scenes):
        for chart, classes in CLASSES.items():
            both = charts(100 * k + classes, classes)
            for piece in range(pieces):
                part = [x[piece::pieces] for x in both]
                tally_chart(counts, f"scene {k}", chart, *part)
    return counts.table()


def test_pieces_of_a_scene_add_up():
    pd.testing.assert_frame_equal(counted(), counted(pieces=4))


def test_a_chart_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="Choose one of sic, sod, floe"):
        tally_chart(Tallies(), "a", "SIC", np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8))


# scores with intervals


def test_scores_are_those_of_the_pooled_pixels():
    found = chart_scores(counted(), draws=200)
    main = found[found["class"].isna()].set_index("chart")
    for chart, score in (("sic", 0), ("sod", 1), ("floe", 1)):
        both = [charts(100 * k + CLASSES[chart], CLASSES[chart]) for k in range(6)]
        pooled_pixels = [np.concatenate(part) for part in zip(*both, strict=True)]
        assert np.isclose(main.loc[chart, "value"], by_definition(*pooled_pixels)[score])
        assert main.loc[chart, "low"] <= main.loc[chart, "value"] <= main.loc[chart, "high"]
        assert main.loc[chart, "pixels"] == 6 * 38 * 30 and main.loc[chart, "scenes"] == 6
    wanted = combine(main["value"])
    assert np.isclose(main.loc["combined", "value"], wanted)
    assert np.isclose(combined_score({c: pooled(counted(), c) for c in CLASSES}), wanted)


def test_the_interval_is_over_scenes_not_over_rows():
    """A table split into groups, and one whose rows are shuffled, give the same intervals."""
    table = counted()
    halves = pd.concat([table, table.assign(group=1)])
    halves["sums"] = [3 * sums for sums in halves["sums"]]
    tripled = table.assign(sums=[6 * sums for sums in table["sums"]])
    a, b = chart_scores(halves.sample(frac=1, random_state=0)), chart_scores(tripled)
    pd.testing.assert_frame_equal(a, b)


def test_groups_and_joined_columns_split_the_table():
    table = counted().assign(service=lambda t: np.where(t["scene"] < "scene 3", "cis", "dmi"))
    found = chart_scores(table, by=["service", "group"], draws=50)
    alone = chart_scores(table[table["service"] == "dmi"], draws=50)
    part = found[(found["service"] == "dmi") & (found["group"] == 0)].drop(columns=["service", "group"])
    pd.testing.assert_frame_equal(part.reset_index(drop=True), alone)
    assert set(alone["scenes"]) == {3}
    with pytest.raises(ValueError, match="no column season"):
        chart_scores(table, by="season")


def test_one_set_of_scenes_is_drawn_for_all_charts():
    """Where one chart is good as much as the other is bad, the combination is certain."""
    counts, truth = Tallies(), np.repeat(np.uint8([0, 1]), 50)[None]
    for k in range(8):
        wrong = np.tile(np.arange(50) < 5 * k, 2)[None]
        tally_chart(counts, str(k), "sod", truth ^ wrong, truth)
        tally_chart(counts, str(k), "floe", truth ^ ~wrong, truth)
    found = chart_scores(counts.table(), draws=200, weights={"sod": 1, "floe": 1})
    main = found[found["class"].isna()].set_index("chart")
    assert np.allclose(main.loc["combined", ["value", "low", "high"]].astype(float), 0.5)
    assert main.loc["sod", "high"] - main.loc["sod", "low"] > 0.1


def test_one_scene_has_a_value_and_no_interval():
    found = chart_scores(counted(1))
    assert found["value"].notna().all() and found[["low", "high"]].isna().all(axis=None)


def test_one_chart_alone_is_scored_without_a_combination():
    table = counted()
    found = chart_scores(table[table["target"] == "sod"], draws=20)
    assert set(found["chart"]) == {"sod"} and len(found) == 1 + 6
    assert "combined" in set(chart_scores(table[table["target"] == "sod"], draws=20, weights={"sod": 1})["chart"])


def test_a_class_that_is_nowhere_has_f1_zero_and_no_pixel():
    counts = Tallies()
    for k in range(3):
        tally_chart(
            counts,
            str(k),
            "sod",
            *(np.clip(x, 0, 4) if i == 0 else np.where(x == 5, 4, x) for i, x in enumerate(charts(k, 6))),
        )
    row = chart_scores(counts.table(), draws=20).query("`class` == 5").iloc[0]
    assert row["value"] == 0 and row["pixels"] == 0 and np.isnan(row["low"])
