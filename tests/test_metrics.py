"""Scores against scikit-learn and scikit-image, intervals against what they promise, tables against pandas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sarfm.evaluation.metrics import reconstruction_scores
from sarfm.evaluation.report import collect_runs, flatten_metrics, fold_table, load_published
from sarfm.io.files import write_json
from sarfm.scenes.channels import Target
from sarfm.tasks.scores import class_scores as scores
from sarfm.tasks.tasks import Classes


def confusion(prediction, truth, classes):
    """Count as a task does."""
    task = Classes(Target("label", classes={k: f"class {k}" for k in range(classes)}))
    return task.tally(torch.tensor(prediction)[None], torch.tensor(truth)[None])[0].view(classes, classes).numpy()


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_confusion_and_scores_agree_with_scikit_learn(classes):
    from sklearn import metrics as reference

    generator = np.random.default_rng(classes)
    truth = generator.integers(0, classes, 5000)
    prediction = np.where(generator.random(5000) < 0.6, truth, generator.integers(0, classes, 5000))
    truth[:100] = 255
    counts = confusion(prediction, truth, classes)
    there = truth != 255
    true, predicted = truth[there], prediction[there]
    np.testing.assert_array_equal(counts, reference.confusion_matrix(true, predicted, labels=range(classes)))
    found = scores(counts)
    for ours in ("iou", "f1", "precision", "recall"):
        theirs = getattr(reference, f"{ours.replace('iou', 'jaccard')}_score")
        np.testing.assert_allclose(found[ours], theirs(true, predicted, average=None), rtol=1e-12)
        np.testing.assert_allclose(np.mean(found[ours]), theirs(true, predicted, average="macro"), rtol=1e-12)
    for number in range(classes):
        negative, positive = reference.confusion_matrix(true == number, predicted == number)[0]
        np.testing.assert_allclose(found["false_alarm"][number], positive / (negative + positive), rtol=1e-12)
    np.testing.assert_allclose(found["mean_iou"], found["iou"].mean())
    np.testing.assert_allclose(found["mean_f1"], found["f1"].mean())
    np.testing.assert_allclose(found["accuracy"], reference.accuracy_score(true, predicted), rtol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_unlabelled_pixels_and_order_do_not_matter(seed, classes):
    generator = np.random.default_rng(seed)
    truth, prediction = generator.integers(0, classes, (2, 200))
    counts = confusion(prediction, truth, classes)
    order = generator.permutation(200)
    np.testing.assert_array_equal(confusion(prediction[order], truth[order], classes), counts)
    more_truth, more = np.append(truth, np.full(50, 255)), np.append(prediction, generator.integers(0, classes, 50))
    np.testing.assert_array_equal(confusion(more, more_truth, classes), counts)
    assert counts.sum() == 200


def test_absent_classes_have_no_score():
    found = scores(np.diag([5, 3, 0]))
    assert np.isnan(found["iou"][2]) and found["mean_iou"] == 1.0
    stray = scores([[5, 0, 1], [0, 3, 0], [0, 0, 0]])
    assert stray["iou"][2] == 0 and np.isclose(stray["mean_iou"], (5 / 6 + 1) / 2)  # two classes, whatever is called
    assert np.isnan(scores(np.zeros((2, 2)))["mean_iou"])
    assert np.isnan(scores(np.zeros((2, 2)))["accuracy"])


def test_scores_of_a_stack_are_the_scores_of_each():
    stack = np.random.default_rng(0).integers(0, 50, (6, 3, 3))
    together = scores(stack)
    for k, counts in enumerate(stack):
        for name, value in scores(counts).items():
            np.testing.assert_allclose(together[name][k], value)


def test_labels_that_are_no_class_are_refused():
    with pytest.raises(ValueError, match=r"class numbers in 0\.\.1 or 255; found 3"):
        confusion(np.array([0, 1]), np.array([0, 3]), 2)


def test_reconstruction_scores_agree_with_scikit_image():
    from skimage.metrics import structural_similarity

    generator = np.random.default_rng(0)
    original, made = generator.normal(-12, 3, (2, 40, 40))
    hidden = np.ones((40, 40), bool)
    found = reconstruction_scores(original, made, hidden)
    whole = structural_similarity(original, made, data_range=30.0, full=True)[1][3:-3, 3:-3].mean()
    assert np.isclose(found["ssim"], whole)
    assert np.isclose(found["mse_db"], ((original - made) ** 2).mean()) and found["pixels"] == 1600
    both = reconstruction_scores(np.stack([original, made]), np.stack([made, made]), hidden)
    assert np.isclose(both["mse_db"], found["mse_db"] / 2) and np.isclose(both["ssim"], (whole + 1) / 2)


def test_only_hidden_valid_pixels_count():
    generator = np.random.default_rng(0)
    original, made = generator.normal(-12, 3, (2, 40, 40))
    hidden = generator.random((40, 40)) < 0.5
    original[:5] = np.nan
    before = reconstruction_scores(original, made, hidden)
    changed = made.copy()
    changed[:5] = 1e6
    assert reconstruction_scores(original, changed, hidden) == before
    wild = np.where(hidden, made, made + 50)
    assert np.isclose(reconstruction_scores(original, wild, hidden)["mse_db"], before["mse_db"])
    nothing = reconstruction_scores(original, made, np.zeros_like(hidden))
    assert nothing["pixels"] == 0 and np.isnan(nothing["mse_db"]) and np.isnan(nothing["ssim"])
    assert np.isnan(reconstruction_scores(original[5:9], made[5:9], hidden[5:9])["ssim"])


def test_runs_become_a_table(tmp_path):
    for seed in (0, 1):
        metrics = {"iou": {"value": 0.5 + 0.1 * seed, "low": 0.4, "high": 0.7}, "seed": 9}
        write_json(
            tmp_path / "a" / str(seed) / "run.json",
            {"status": "done", "parameters": {"seed": seed}, "metrics": metrics},
        )
    write_json(tmp_path / "b" / "run.json", {"status": "running", "parameters": {"seed": 2}})
    table = collect_runs(tmp_path)
    assert list(table["run"]) == ["a/0", "a/1", "b"] and list(table["seed"]) == [0, 1, 2]
    assert list(table["iou"][:2]) == [0.5, 0.6] and table["metric_seed"][0] == 9
    folded = fold_table(table, "status", "iou")
    assert folded["n"].tolist() == [2] and np.isclose(folded["spread"][0], np.std([0.5, 0.6], ddof=1))
    assert np.isclose(folded["mean"].iloc[0], 0.55) and np.isclose(folded["spread"].iloc[0], 0.0707, atol=1e-3)
    assert flatten_metrics({"a": {"value": 1, "low": 0, "high": 2}}) == {"a": 1, "a_low": 0, "a_high": 2}
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        collect_runs(tmp_path / "nothing")


def test_published_numbers_say_that_they_are_copied(tmp_path):
    table = load_published("system1")
    assert table["copied"].all() and table["source"].str.len().min() > 20 and len(table) == 10
    assert table.set_index(["contestant", "labelled"])["value"]["pretrained", 50] == 0.7946
    path = tmp_path / "mine.yaml"
    path.write_text("title: a\nsource: b\ncolumns: [x, value]\nrows: [[1, 2], [3]]\n")
    with pytest.raises(ValueError, match="Mend it"):
        load_published(path)
    path.write_text("title: a\n")
    with pytest.raises(ValueError, match="lacks"):
        load_published(path)
    with pytest.raises(FileNotFoundError, match="system1"):
        load_published("nobody")
