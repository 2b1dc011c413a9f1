"""Intervals, differences and tallies agree with what is written out by hand, on the same draws."""

import numpy as np
import pandas as pd
import pytest

from sarfm.evaluation.intervals import (
    batch_means,
    by_seed,
    difference,
    difference_table,
    interval,
    interval_table,
    intervals,
)
from sarfm.evaluation.scoring import score_of
from sarfm.evaluation.tallies import Tallies, load_tallies, save_tallies, stack
from sarfm.scenes.channels import Target
from sarfm.tasks.scores import class_scores
from sarfm.tasks.tasks import Classes

TASKS = {"label": Classes(Target("label", classes={0: "dry", 1: "flooded"}))}


def counted(shift=0, scenes=12, seeds=(0, 1, 2), classes=2):
    """Confusion matrices (seeds, scenes, K, K) of whole numbers, and the same as tallies."""
    rng = np.random.default_rng(7)
    matrices = rng.integers(1, 60, (len(seeds), scenes, classes, classes)) + shift * np.eye(classes, dtype=int)
    parts = []
    for seed, each in zip(seeds, matrices, strict=True):
        tallies = Tallies("run", seed)
        for k, matrix in enumerate(each):
            tallies.add(f"s{k:02d}", "label", matrix, matrix.sum())
        parts.append(tallies.table())
    return matrices, pd.concat(parts, ignore_index=True)


def drawn_by_hand(matrices, score, draws=1000, seed=0):
    """(draws,) the mean over seeds of a score, scenes drawn one by one as multinomial counts."""
    n = matrices.shape[1]
    often = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    found = []
    for times in often:
        sums = [sum(t * m for t, m in zip(times, each, strict=True)) for each in matrices]
        found.append(np.mean([score(s) for s in sums]))
    return np.array(found)


def iou_flooded(matrix):
    return matrix[1, 1] / (matrix[1].sum() + matrix[:, 1].sum() - matrix[1, 1])


def test_interval_is_the_bootstrap_written_out():
    matrices, table = counted()
    found = interval(table, score_of(TASKS, "iou_flooded"), draws=200)
    drawn = drawn_by_hand(matrices, iou_flooded, draws=200)
    assert np.isclose(found.value, np.mean([iou_flooded(m.sum(0)) for m in matrices]))
    np.testing.assert_allclose([found.low, found.high], np.quantile(drawn, [0.025, 0.975]))
    narrow = interval(table, score_of(TASKS, "iou_flooded"), draws=200, level=0.5)
    np.testing.assert_allclose([narrow.low, narrow.high], np.quantile(drawn, [0.25, 0.75]))


def test_difference_is_paired_and_written_out():
    (one, first), (two, second) = counted(shift=9), counted()
    found = difference(first, second, score_of(TASKS, "iou_flooded"), draws=200)
    drawn = drawn_by_hand(one, iou_flooded, 200) - drawn_by_hand(two, iou_flooded, 200)
    np.testing.assert_allclose([found.low, found.high], np.quantile(drawn, [0.025, 0.975]))
    each = [iou_flooded(a.sum(0)) - iou_flooded(b.sum(0)) for a, b in zip(one, two, strict=True)]
    assert np.isclose(found.value, np.mean(each)) and found.seeds_ahead == sum(e > 0 for e in each)


def test_order_of_rows_groups_and_pieces_change_nothing():
    _, table = counted()
    half = table.assign(sums=[s / 2 for s in table["sums"]])
    split = pd.concat([half, half.assign(group=1)]).sample(frac=1, random_state=3)
    score = score_of(TASKS, "mean_iou")
    np.testing.assert_allclose(interval(split, score, draws=50), interval(table, score, draws=50))


def test_units_are_what_is_drawn():
    """Scenes of one place stand and fall together: as many units as places, and a wider interval here."""
    matrices, table = counted(scenes=12)
    same = pd.concat([table.assign(scene=table["scene"] + str(k), place=table["scene"]) for k in range(4)])
    score = score_of(TASKS, "accuracy")
    by_scene, by_place = interval(same, score), interval(same, score, by="place")
    assert by_scene.value == by_place.value
    assert by_place.high - by_place.low > 1.6 * (by_scene.high - by_scene.low)
    np.testing.assert_allclose(by_place, interval(table, score))


def test_several_targets_share_their_draws():
    """Where one target is good as much as the other is bad, their mean is certain."""
    tallies = Tallies()
    for k in range(8):
        tallies.add(f"s{k}", "a", [5 * k, 100 - 5 * k], 100)
        tallies.add(f"s{k}", "b", [100 - 5 * k, 5 * k], 100)

    def right(sums):
        return sum(s[..., 0] / s.sum(-1) for s in sums.values()) / 2

    found = intervals(tallies.table(), {"both": right, "a": lambda sums: sums["a"][..., 0] / sums["a"].sum(-1)})
    np.testing.assert_allclose(found["both"], 0.5)
    assert found["a"].high - found["a"].low > 0.1


def test_interval_holds_what_it_promises():
    generator, score = np.random.default_rng(1), score_of(TASKS, "mean_iou")

    def sample(n):
        right = generator.binomial(400, generator.beta(16, 4, size=(n, 2)))
        table = pd.DataFrame({"scene": range(n)})
        sums = np.stack([right[:, 0], 400 - right[:, 0], 400 - right[:, 1], right[:, 1]], 1).astype(float)
        return table.assign(run="", seed=0, place="", target="label", group=0, n=800, sums=list(sums))

    truth = class_scores(stack(sample(50_000), "label").sum(0).reshape(2, 2))["mean_iou"]
    found = [interval(sample(60), score, draws=300, seed=k) for k in range(150)]
    assert 0.89 <= np.mean([low <= truth <= high for _, low, high in found]) <= 0.99


def test_one_scene_has_no_interval_and_seeds_are_followed():
    _, table = counted()
    score = score_of(TASKS, "accuracy")
    assert np.isnan(interval(table[table["scene"] == "s00"], score)[1:]).all()
    assert interval(table, score, seed=3) == interval(table, score, seed=3) != interval(table, score, seed=4)
    assert by_seed(table, score).index.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="level"):
        interval(table, score, level=95)


def test_tables_score_each_contestant_by_itself():
    tables = [counted(shift)[1].assign(fraction=0.1, contestant=name) for name, shift in (("a", 0), ("b", 5))]
    both, score = pd.concat(tables, ignore_index=True), score_of(TASKS, "mean_f1")
    found = interval_table(both, score, ["fraction", "contestant"]).set_index("contestant")
    np.testing.assert_allclose(found.loc["a", ["value", "low", "high"]].astype(float), interval(tables[0], score))
    assert np.isclose(found.loc["b", "spread"], by_seed(tables[1], score).std(ddof=1))
    row = difference_table(both, score, "b").iloc[0]
    np.testing.assert_allclose(row[["value", "low", "high"]].astype(float), difference(tables[1], tables[0], score)[:3])
    assert row["over"] == "a" and row["seeds"] == 3


def test_all_scores_at_once_are_each_by_itself():
    from sarfm.evaluation.intervals import score_table

    _, table = counted()
    found = score_table(table, TASKS, draws=150).set_index("score")
    for name in ("mean_iou", "iou_flooded", "accuracy", "weighted_f1"):
        ours = found.loc[name, ["value", "low", "high"]].astype(float)
        np.testing.assert_allclose(ours, interval(table, score_of(TASKS, name), draws=150))
    with pytest.raises(ValueError, match="Which run's is it"):
        score_table(table.assign(target="oil"), TASKS)


def test_histograms_of_tags_are_drawn_in_pieces():
    """Long tallies are resampled some draws at a time, with the same draws as short ones."""
    from sarfm.evaluation.intervals import _Drawn, how_often

    rng = np.random.default_rng(0)
    counts, often = rng.random((6, 60_000)), how_often(6, 200)
    score = lambda sums: sums["tags"][..., 0] / sums["tags"][..., 1]
    _, drawn = _Drawn(tuple(range(6)), (0,), [{"tags": counts}], often).score(score)
    whole = often @ counts[:, :2]
    np.testing.assert_allclose(drawn[:, 0], whole[:, 0] / whole[:, 1])


def test_what_cannot_be_compared_is_refused():
    _, table = counted()
    score = score_of(TASKS, "accuracy")
    with pytest.raises(ValueError, match="different scenes"):
        difference(table, table[table["scene"] != "s00"], score)
    with pytest.raises(ValueError, match="with the same"):
        difference(table, table[table["seed"] > 0], score)
    with pytest.raises(ValueError, match="others have"):
        interval(table[(table["scene"] != "s03") | (table["seed"] > 0)], score)
    with pytest.raises(ValueError, match="nothing to score"):
        interval(table[:0], score)
    with pytest.raises(ValueError, match="no contestant"):
        difference_table(table.assign(contestant="a", fraction=1), score, "b")
    with pytest.raises(ValueError, match="no column"):
        interval_table(table, score, "fraction")


def test_a_damaged_table_is_refused(tmp_path):
    _, table = counted()
    again = load_tallies(save_tallies(table, tmp_path / "t.parquet"))
    assert np.array_equal(stack(again, "label"), stack(table, "label"))
    for wrong, message in (
        (table.drop(columns="place"), "place"),
        (table.assign(sums=[s[: 4 - (k == 3)] for k, s in enumerate(table["sums"])]), "one number"),
        (table.assign(sums=[s * (np.nan if k == 3 else 1) for k, s in enumerate(table["sums"])]), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            save_tallies(wrong, tmp_path / "wrong.parquet")
    assert not (tmp_path / "wrong.parquet").exists()


def test_half_a_billion_pixels_lose_none():
    tallies = Tallies()
    for _ in range(20):
        tallies.add("all", "label", [25_000_001, 24_999_999], 50_000_000)
    assert tallies.table()["sums"][0].tolist() == [500_000_020, 499_999_980] and tallies.table()["n"][0] == 10**9


# means over batches


def test_means_over_batches_are_those_of_a_loop_over_batches():
    rng, tallies = np.random.default_rng(0), Tallies("run", 3)
    matrices = rng.integers(0, 40, (21, 2, 2))
    matrices[:4, 1] = 0  # the first batch has no flooded pixel
    for k, matrix in enumerate(matrices):
        tallies.add(f"s{k % 3}/{k:08d}", "label", matrix, matrix.sum())
    table = tallies.table().assign(contestant="net", fraction=0.1)
    found = batch_means(table, TASKS, batch=4).set_index("score")
    batches = [matrices[k : k + 4] for k in range(0, 21, 4)]
    scores = [class_scores(batch.sum(0)) for batch in batches]
    sizes = [len(batch) for batch in batches]
    assert sizes == [4] * 5 + [1] and (found["batches"] == 6).all() and (found["batch"] == 4).all()
    assert found.loc["mean_iou", "value"] == pytest.approx(np.average([s["mean_iou"] for s in scores], weights=sizes))
    pooled = class_scores(matrices.sum(0))["mean_iou"]
    assert abs(found.loc["mean_iou", "value"] - pooled) > 1e-3
    recall = [s["recall"][1] for s in scores]
    assert np.isnan(recall[0])  # a batch without the class has no recall of it, and isn't counted
    assert found.loc["recall_flooded", "value"] == pytest.approx(np.average(recall[1:], weights=sizes[1:]))
    assert found.loc["mean_iou", ["contestant", "fraction", "seed", "target"]].tolist() == ["net", 0.1, 3, "label"]
    whole = batch_means(table, TASKS, batch=100).set_index("score")
    assert whole.loc["mean_iou", "value"] == pytest.approx(pooled)


def test_means_over_batches_of_what_was_counted_as_a_whole_are_refused():
    table = counted()[1].assign(contestant="net", fraction=1.0)
    with pytest.raises(ValueError, match="'s00' was counted as a whole.*scoring.unit=patch"):
        batch_means(table, TASKS, 8)
    with pytest.raises(ValueError, match="at least 1 patch; got 0"):
        batch_means(table, TASKS, 0)
