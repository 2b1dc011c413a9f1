"""What a comparison says of saved labels: known factors are found, bounds are said, intervals hold what they promise."""

import numpy as np
import pandas as pd
import pytest

from sarfm.evaluation.label_saving import (
    bounded,
    draw_seeds,
    label_saving,
    monotone,
    needed_labels,
    saving_words,
)
from sarfm.evaluation.scoring import lower_is_better, score_of
from sarfm.evaluation.tallies import Tallies
from sarfm.scenes.channels import Target
from sarfm.tasks.tasks import Number

AMOUNTS = (1.0, 3.0, 10.0, 30.0, 100.0)


def accuracy(sums):
    """(...) share of right pixels."""
    return sums["cover"][..., 0] / sums["cover"][..., 1]


def contest(curves, seeds=(0,), scenes=6, amounts=AMOUNTS, noise=0.0, luck=0.0, pixels=1000, rng=None):
    """Tallies of contestants whose accuracy is a function of log10 of their labels, exact without noise."""
    rng, parts = rng or np.random.default_rng(0), []
    hard = rng.normal(0, noise, scenes)
    for who, curve in curves.items():
        for seed in seeds:
            for labelled in amounts:
                chance = (curve(np.log10(labelled)) + hard + rng.normal(0, luck)).clip(0, 1)
                right = rng.binomial(pixels, chance) if noise else pixels * chance
                tallies = Tallies("", seed)
                for k, n in enumerate(right):
                    tallies.add(f"s{k:03d}", "cover", [n, pixels], pixels)
                parts.append(tallies.table().assign(contestant=who, labelled=labelled))
    return pd.concat(parts, ignore_index=True)


def shifted(times, slope=0.2, start=0.3):
    """Two curves, the first with the scores that the second has with `times` as many labels."""
    return {
        "pretrained": lambda x: start + slope * (x + np.log10(times)),
        "scratch": lambda x: start + slope * x,
    }


@pytest.mark.parametrize("times", [1.7, 4.0, 9.5])
def test_a_curve_shifted_by_a_factor_is_found_at_every_number_of_labels(times):
    found = label_saving(contest(shifted(times)), accuracy, draws=20)
    reached = found["labelled"] * times <= 100
    np.testing.assert_allclose(found["times"][reached], times, rtol=1e-9)
    np.testing.assert_allclose(found["times_low"][reached], times, rtol=1e-9)  # scenes alike: nothing to be unsure of
    assert np.isinf(found["needed"][~reached]).all() and (~reached).any()


def test_errors_are_read_upside_down():
    table = contest(shifted(4))
    wrong = lambda sums: 1 - accuracy(sums)
    one, other = label_saving(table, accuracy, draws=20), label_saving(table, wrong, lower_is_better=True, draws=20)
    np.testing.assert_allclose(one["times"], other["times"])
    np.testing.assert_allclose(one["value"], 1 - other["value"])
    assert label_saving(table, wrong, draws=20)["times"].iloc[0] != one["times"].iloc[0]


def test_an_error_of_the_house_goes_through_from_its_name():
    task = {"height": Number(Target("height", "number", units="m"))}
    parts = []
    for who, shift in (("pretrained", 10.0), ("scratch", 1.0)):
        for labelled in AMOUNTS:
            tallies, missed = Tallies(), 5 - np.log10(labelled * shift)
            for k in range(4):
                tallies.add(f"s{k}", "height", [9, 0, 9 * missed, 9 * missed**2, 0, 9], 9)
            parts.append(tallies.table().assign(contestant=who, labelled=labelled))
    table, name = pd.concat(parts), "height.rmse"
    found = label_saving(table, score_of(task, name), lower_is_better=lower_is_better(name), draws=20)
    np.testing.assert_allclose(found["times"][:3], 10, rtol=1e-6)
    assert found["value"].iloc[0] == pytest.approx(4)


def test_what_is_not_measured_is_a_bound():
    better = label_saving(contest(shifted(1000)), accuracy, draws=20)
    assert np.isinf(better["needed"]).all() and np.isinf(better["times_low"]).all()
    words = saving_words(better.iloc[2])
    assert words == (
        "pretrained with 10 % of the labels is better than scratch with 100 %: > 10 × fewer labels [> 10, > 10], "
        "more than 90 % saved"
    )
    assert saving_words(better.iloc[4]).endswith("is better than scratch with 100 %: > 1 × fewer labels [> 1, > 1]")
    worse = label_saving(contest(shifted(1 / 1000)), accuracy, draws=20)
    assert (worse["needed"] == 0).all()
    words = saving_words(worse.iloc[2])
    assert words == (
        "pretrained with 10 % of the labels is no better than scratch with 1 %: no label saved, ≤ 0.1 × [≤ 0.1, ≤ 0.1]"
    )


def test_fewer_than_one_is_no_saving():
    row = label_saving(contest(shifted(0.5)), accuracy, draws=20).iloc[2]
    assert row["times"] == pytest.approx(0.5) and "no label saved, 0.5 ×" in saving_words(row)
    row = label_saving(contest(shifted(8)), accuracy, draws=20).iloc[0]
    assert saving_words(row, "ours", "theirs").startswith(
        "ours with 1 % of the labels scores as theirs with 8 % [8, 8]: 8 ×"
    )
    assert saving_words(row).endswith("8 × fewer labels [8, 8], 88 % saved")


def test_isotonic_regression_is_the_one_written_out():
    rng = np.random.default_rng(3)

    def pooled(values):  # max over starts of the min over ends of means
        n = len(values)
        return [max(min(np.mean(values[i : j + 1]) for j in range(k, n)) for i in range(k + 1)) for k in range(n)]

    for row in rng.normal(size=(20, 6)):
        np.testing.assert_allclose(monotone(row), pooled(row))


def test_a_flat_curve_counts_against_the_saving():
    scores = np.array([0.2, 0.5, 0.5, 0.5])
    assert needed_labels([1, 10, 30, 100], scores, 0.5) == pytest.approx(10)
    assert needed_labels([1, 10, 30, 100], scores, 0.5000001) == np.inf


def test_interval_is_the_bootstrap_written_out():
    rng = np.random.default_rng(5)
    table = contest(shifted(3), seeds=(0, 1, 2), scenes=9, noise=0.05, luck=0.02, rng=rng)
    found = label_saving(table, accuracy, draws=60, seed=4).iloc[1]
    often = np.random.default_rng(4).multinomial(9, np.full(9, 1 / 9), size=60)
    weights = draw_seeds(3, 60, 4)
    right = {
        key: np.stack([sums[0] for sums in part.sort_values("scene")["sums"]])
        for key, part in table.groupby(["contestant", "labelled", "seed"])
    }
    needed = []

    def score(who, labelled, times, weight):
        return sum(w * (times @ right[who, labelled, s]) / (9 * 1000) for s, w in enumerate(weight))

    for draw in zip(often, weights, strict=True):
        curve = np.array([score("scratch", a, *draw) for a in AMOUNTS])
        curve = [max(min(curve[i : j + 1].mean() for j in range(k, 5)) for i in range(k + 1)) for k in range(5)]
        wanted = score("pretrained", 3.0, *draw)
        inside = 10 ** np.interp(wanted, curve, np.log10(AMOUNTS))
        needed.append(0.0 if wanted <= curve[0] else np.inf if wanted > curve[-1] else inside)
    ordered = np.sort(needed)
    low, high = ordered[int(np.ceil(0.025 * 60)) - 1], ordered[int(np.ceil(0.975 * 60)) - 1]
    np.testing.assert_allclose([found["needed_low"], found["needed_high"]], [low, high], rtol=1e-9)
    np.testing.assert_allclose(found["times_low"], low / 3)


def test_luck_of_seeds_and_of_scenes_widens_the_interval():
    width = lambda **options: np.log(
        label_saving(contest(shifted(3), rng=np.random.default_rng(1), **options), accuracy, draws=300)
        .iloc[1][["times_high", "times_low"]]
        .astype(float)
    ).agg(lambda ends: ends.iloc[0] - ends.iloc[1])
    plain = width(seeds=(0, 1, 2), scenes=30, noise=0.01)
    assert width(seeds=(0, 1, 2), scenes=30, noise=0.01, luck=0.03) > 1.5 * plain


def test_intervals_hold_the_truth_as_often_as_they_promise():
    """80 contests with luck of scenes and of three seeds; 95 % of draws inside. Binomially, 80 × 0.95 is 76 ± 1.9."""
    held, beyond = 0, 0
    for k in range(80):
        rng = np.random.default_rng([9, k])
        table = contest(shifted(4), seeds=(0, 1, 2), scenes=25, noise=0.06, luck=0.015, pixels=200, rng=rng)
        row = label_saving(table, accuracy, draws=100, seed=k).iloc[2]  # 10 %, as scratch with 40 %
        held += row["times_low"] <= 4 <= row["times_high"]
        beyond += np.isinf(row["times_high"])
    assert 70 <= held <= 80, held
    assert beyond < 32


def test_numbers_of_labels_may_have_different_seeds():
    table = contest(shifted(3), seeds=(0, 1, 2), luck=0.01)
    fewer = table[(table["labelled"] < 30) | (table["seed"] < 2)]
    assert list(label_saving(fewer, accuracy, draws=50)["seeds"]) == [3, 3, 3, 2, 2]


def test_other_scenes_are_refused():
    table = contest(shifted(3), seeds=(0, 1))
    lacking = table[~((table["contestant"] == "scratch") & (table["scene"] == "s000"))]
    with pytest.raises(ValueError, match="different scenes: 6 and 5"):
        label_saving(lacking, accuracy, draws=10)
    lacking = table[~((table["labelled"] == 3) & (table["scene"] == "s001"))]
    with pytest.raises(ValueError, match="numbers of labels were scored on different scenes"):
        label_saving(lacking, accuracy, draws=10)
    with pytest.raises(ValueError, match="nobody named unet"):
        label_saving(table, accuracy, other="unet")
    with pytest.raises(ValueError, match="one number of labels"):
        label_saving(table[table["labelled"] == 1], accuracy)
    with pytest.raises(ValueError, match="neither better nor worse"):
        lower_is_better("cover.share_water")


def test_a_score_that_is_unknown_saves_nothing():
    table = contest(shifted(3))
    row = label_saving(table, lambda sums: accuracy(sums) * np.nan, draws=10).iloc[0]
    assert np.isnan(row["times"]) and "no score to compare" in saving_words(row)
    assert bounded(np.nan, 1, 100) == "unknown"


def test_the_figure_draws_each_saving_and_its_factor():
    from sarfm.viz.figures import show_fractions

    found = label_saving(contest(shifted(6)), accuracy, draws=20)
    points = pd.DataFrame(
        {"contestant": who, "share": a / 100, "labels": a, "score": curve(np.log10(a)), "low": 0.2, "high": 0.9}
        for who, curve in shifted(6).items()
        for a in AMOUNTS
    )
    ax = show_fractions(points, "score", fraction="share", saving=found).axes[0]
    said = [text.get_text() for text in ax.texts if text.get_text()]
    assert said == ["6 × [6, 6]"] * 3 + ["> 3.3 × [> 3.3, > 3.3]"]  # none at 100 %
    assert [text.get_text() for text in ax.get_xticklabels()] == [f"{a:g} %\n{a:g}" for a in AMOUNTS]
