"""Probes of frozen features are what is written down: lines, neighbours, nothing seen of what is held out, one number each time."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from sarfm.evaluation.contestants import PROBES, Bodies, Cell, Head, Trials, choose_tasks, grid, search
from sarfm.evaluation.counting import Scoring
from sarfm.evaluation.features import FeatureMemory, Features, image_keys
from sarfm.evaluation.intervals import difference_table, training_table
from sarfm.evaluation.predict import predict_scene
from sarfm.evaluation.probes import Probe, Probing, collect_samples, fit_probe, token_labels
from sarfm.evaluation.readouts import Samples, fit_logistic, fit_ridge, fit_scale, nearest_answer, standardise, unit
from sarfm.evaluation.scoring import score_of
from sarfm.evaluation.unseen import load_predictor
from sarfm.models.kinds import build_encoder
from sarfm.models.weights import load_model, save_model
from sarfm.patches.contract import InputContract
from sarfm.patches.prepare import Cut
from sarfm.patches.splits import Split
from sarfm.patches.store import restore
from sarfm.scenes.channels import Target
from sarfm.tasks.predictor import Predictor
from sarfm.tasks.tasks import Classes, Number, Tags
from sarfm.train.steps import Recipe

COVER = Classes(Target("cover", classes={0: "water", 1: "forest", 2: "town"}))
HEIGHT = Number(Target("height", "number", units="m"))
WATER = Number(Target("water", "number", of="tile", units="%", limits=(0, 100)))
USES = Tags(Target("uses", "tags", of="tile", classes={0: "port", 1: "field"}))
KIND = Classes(Target("kind", of="tile", classes={0: "calm", 1: "rough"}))
TASKS = {task.target.name: task for task in (COVER, HEIGHT, WATER, USES, KIND)}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_encoder("vit-nano", 2, 8).eval()


def batches(patches=32, seed=0, side=32, noise=0.4):
    """Batches of all kinds of targets, all read off brightness."""
    draw, found = torch.Generator().manual_seed(seed), []
    for first in range(0, patches, 8):
        blocks = torch.randint(0, 3, (8, 4, 4), generator=draw)
        truth = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :side, :side]
        image = truth[:, None].float().repeat(1, 2, 1, 1) - 1 + noise * torch.randn(8, 2, side, side, generator=draw)
        share = (truth == 0).flatten(1).float().mean(1)
        found.append(
            {
                "image": image,
                "patch": torch.arange(first, first + 8),
                "target_cover": truth,
                "target_height": 10.0 * truth,
                "target_water": 100 * share,
                "target_uses": torch.stack([share > 0.3, share < 0.4], 1).long(),
                "target_kind": (share > 0.33).long(),
            }
        )
    return found


def headline(probe, parts):
    """The headline of each task over some batches."""
    sums = {}
    for batch in parts:
        decided, truths = probe.decide(probe(batch["image"], batch.get("valid"))), probe.truths(batch)
        for name, task in probe.tasks.items():
            sums[name] = sums.get(name, 0) + task.tally(decided[name], truths[name]).sum(0).numpy()
    return {name: float(probe.tasks[name].scores(total)[probe.tasks[name].headline]) for name, total in sums.items()}


# ---- readouts against what is written out -----------------------------------------------------------------------


@pytest.mark.parametrize(("n", "width"), [(300, 10), (20, 50)])
def test_ridge_is_least_squares_with_rows_for_the_penalty(n, width):
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(2, 3, (n, width)), rng.normal(size=(n, 2)), rng.uniform(0.1, 2, n)
    penalty, share = 0.05, weight / weight.sum()
    line = fit_ridge(x, y, weight, [1.0, penalty])[1]
    root = np.sqrt(share)[:, None]
    design = np.block([[root * x, root], [np.sqrt(penalty) * np.eye(width), np.zeros((width, 1))]])
    solved = np.linalg.lstsq(design, np.concatenate([root * y, np.zeros((width, 2))]), rcond=None)[0]
    np.testing.assert_allclose(line.weight, solved[:-1].T, atol=1e-9)
    np.testing.assert_allclose(line.bias, solved[-1], atol=1e-9)


def test_logistic_regression_has_no_slope_left():
    """At the solution the gradient, written out by hand, is zero; with shares, weights and unknown tags."""
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(200, 5)).astype(np.float32), rng.uniform(0.2, 1, 200)
    shares, penalty = rng.dirichlet([0.5] * 3, 200), 0.02
    line = fit_logistic(x, shares, weight, [penalty])[0]
    scores = x @ line.weight.T + line.bias
    chance = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    share = (weight / weight.sum())[:, None]
    np.testing.assert_allclose((share * (chance - shares)).T @ x + penalty * line.weight, 0, atol=2e-4)
    np.testing.assert_allclose((share * (chance - shares)).sum(0), 0, atol=2e-4)
    tags = (rng.random((200, 2)) < 0.4).astype(np.float32)
    tags[:50, 0] = np.nan
    line = fit_logistic(x, tags, weight, [penalty], tags=True)[0]
    wrong = 1 / (1 + np.exp(-(x @ line.weight.T + line.bias))) - tags
    np.testing.assert_allclose((share * np.nan_to_num(wrong)).T @ x + penalty * line.weight, 0, atol=2e-4)


def test_neighbours_are_those_of_brute_force():
    rng = np.random.default_rng(2)
    bank, asked = rng.normal(size=(60, 7)), rng.normal(size=(25, 7))
    labels = rng.random((60, 3))
    labels[rng.random((60, 3)) < 0.2] = np.nan
    given = [torch.tensor(v, dtype=torch.float32) for v in (asked, bank, labels)]
    found = nearest_answer(unit(given[0]), unit(given[1]), given[2], 9, 0.1).numpy()
    for row, one in zip(found, asked, strict=True):
        cosine = bank @ one / np.linalg.norm(bank, axis=1) / np.linalg.norm(one)
        near = sorted(range(60), key=lambda k: -cosine[k])[:9]
        for column in range(3):
            pairs = [(np.exp(cosine[k] / 0.1), labels[k, column]) for k in near if np.isfinite(labels[k, column])]
            expected = sum(w * v for w, v in pairs) / sum(w for w, _ in pairs)
            np.testing.assert_allclose(row[column], expected, rtol=2e-4)


def test_shares_of_tokens_are_counted_by_hand():
    rng = np.random.default_rng(3)
    truth = torch.from_numpy(rng.choice([0, 1, 2, 255], (2, 20, 28)))
    labels, known = token_labels(COVER, truth, (3, 4), 8)  # padded to 24 x 32
    for k, row, column in np.ndindex(2, 3, 4):
        block = truth[k, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].numpy()
        seen = block[block != 255]
        assert known[k, 4 * row + column].item() == pytest.approx(len(seen) / 64)
        expected = [np.mean(seen == c) for c in range(3)]
        np.testing.assert_allclose(labels[k, 4 * row + column].numpy(), expected, atol=1e-6)


# ---- the probe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "statistics", "class"])
@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_every_kind_of_target_is_read(encoder, kind, pooling):
    probe = Probe(encoder, TASKS, kind, pooling).eval()
    train, val = (collect_samples(probe, batches(64, seed), 64, 1500) for seed in (0, 1))
    tried = fit_probe(probe, train, val)
    found = headline(probe, batches(32, 2))
    assert min(found[name] for name in ("cover", "height")) > 0.75, found
    if pooling != "class":  # that of fresh weights says little
        assert min(found.values()) > (0.6 if kind == "linear" else 0.35), found
    assert (tried.groupby("task")["chosen"].sum() == 1).all()


def test_a_linear_probe_is_a_linear_head_with_these_weights(encoder):
    tasks = {"cover": COVER, "kind": KIND}
    probe = Probe(encoder, tasks).eval()
    samples = collect_samples(probe, batches(), 32, 500)
    fit_probe(probe, samples, probing=Probing(penalties=(0.01,)))
    head = Predictor(encoder, tasks, "linear", frozen=True).eval()
    for name in tasks:
        weight = head.classify[name].weight
        weight.data = probe.readouts[name].weight.view(weight.shape)
        head.classify[name].bias.data = probe.readouts[name].bias
    image = batches(8, 3)[0]["image"][:, :, :28, :30]
    valid = torch.ones(8, 28, 30, dtype=torch.bool)
    valid[:, :20, :9] = False
    for name, output in head(image, valid).items():
        if name == "cover":  # a tile is the mean of what was observed, the head's of all
            torch.testing.assert_close(probe(image, valid)[name], output, atol=1e-4, rtol=1e-4)
    whole = head(batches(8, 3)[0]["image"])
    torch.testing.assert_close(probe(batches(8, 3)[0]["image"])["kind"], whole["kind"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_nothing_is_known_of_what_is_held_out(encoder, kind):
    """Mean and deviation are of the training part: another validation part changes the choice, never the readout."""
    one = Probing(penalties=(0.01,), neighbours=(7,))
    states = []
    for shift in (0.0, 1000.0):
        probe = Probe(encoder, {"kind": KIND}, kind).eval()
        train, val = (collect_samples(probe, batches(32, seed), 32, 100) for seed in (0, 1))
        val = {
            name: each._replace(features=each.features + shift, labels=each.labels[::-1].copy())
            for name, each in val.items()
        }
        fit_probe(probe, train, val, one)
        states.append({k: v.clone() for k, v in probe.readouts.state_dict().items()})
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    x = train["kind"].features
    if kind == "knn":
        np.testing.assert_allclose(states[0]["kind.mean"], x.mean(0), rtol=1e-4, atol=1e-5)
    else:
        line = fit_logistic(standardise(x, fit_scale(x)), train["kind"].labels, train["kind"].weight, [0.01])[0]
        np.testing.assert_allclose(states[0]["kind.weight"] @ x.T, (line.weight / fit_scale(x).std) @ x.T, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_noise_is_read_as_noise(encoder, kind):
    """Labels by a coin, 96 tiles tested: right in a half, give or take three standard deviations."""
    flip = torch.Generator().manual_seed(4)
    noisy = lambda seed: [b | {"target_kind": torch.randint(0, 2, (8,), generator=flip)} for b in batches(96, seed)]
    probe = Probe(encoder, {"kind": KIND}, kind).eval()
    fit_probe(probe, *(collect_samples(probe, noisy(seed), 96, 100) for seed in (0, 1)))
    right = np.mean([(probe.decide(probe(b["image"]))["kind"] == b["target_kind"]).float().mean() for b in noisy(2)])
    assert abs(right - 0.5) < 3 * 0.5 / 96**0.5


def test_what_is_chosen_is_best_on_val_and_of_equals_the_smoothest(encoder):
    probe = Probe(encoder, {"water": WATER}).eval()
    train, val = (collect_samples(probe, batches(16, seed), 16, 100) for seed in (0, 1))
    tried = fit_probe(probe, train, val, scores={"water": "rmse"})
    assert tried.loc[tried["chosen"], "score"].item() == tried["score"].min() > 0  # an error: the least
    blank = {"water": val["water"]._replace(labels=val["water"].labels * 0 + 5)}  # R² of a constant is unknown
    assert fit_probe(probe, train, blank)["chosen"].tolist() == [True, False, False, False, False]
    with pytest.raises(ValueError, match="no validation part to choose penalties"):
        fit_probe(probe, train)


def test_samples_don_t_depend_on_batches(encoder):
    probe = Probe(encoder, {"cover": COVER}).eval()
    whole = batches(32)
    single = [{k: v[j : j + 1] for k, v in b.items()} for b in whole for j in range(8)]
    one, other = (collect_samples(probe, parts, 32, 200, seed=3)["cover"] for parts in (whole, single))
    np.testing.assert_allclose(one.features, other.features, atol=1e-4)
    assert np.array_equal(one.labels, other.labels) and len(one.patch) == 32 * 6
    assert not np.array_equal(collect_samples(probe, whole, 32, 200, seed=4)["cover"].labels, one.labels)


def test_majority_and_shares_differ_only_where_tokens_are_mixed(encoder):
    probe = Probe(encoder, {"cover": COVER}).eval()
    shifted = [b | {"target_cover": b["target_cover"].roll(3, -1)} for b in batches(16)]
    shares, most = (collect_samples(probe, shifted, 16, 10**6, how)["cover"].labels for how in ("share", "majority"))
    assert set(np.unique(most)) == {0, 1} and (most.argmax(1) == shares.argmax(1)).all() and (shares != most).any()


# ---- features ------------------------------------------------------------------------------------------------------


class Counting(Features):
    """Count the images that the encoder sees."""

    seen = 0

    def extract(self, image, valid=None):
        self.seen += len(image)
        return super().extract(image, valid)


def test_features_are_computed_once_and_survive_the_process(encoder, tmp_path):
    features, image = Counting(encoder).eval(), batches(16)[0]["image"]
    valid = torch.ones(8, 32, 32, dtype=torch.bool)
    plain = features.extract(image, valid)
    features.seen, features.memory = 0, FeatureMemory(tmp_path)
    first = features.look(image, valid)
    features.memory = FeatureMemory(tmp_path)
    second = features.look(image.flip(0), valid)
    assert features.seen == 8
    for kind in plain:
        assert torch.equal(first[kind], plain[kind]) and torch.equal(second[kind], plain[kind].flip(0))
    valid[0, :8] = False  # the same pixels, less of them observed: another image
    features.look(image, valid)
    assert features.seen == 9 and image_keys(image, valid)[1:] != image_keys(image)[1:]
    (tmp_path / ".half.tmp.npy").write_bytes(b"a process was killed")
    assert len(FeatureMemory(tmp_path).places) == 9


def test_precision_of_a_run_doesn_t_change_features(encoder):
    features, image = Features(encoder).eval(), batches(8)[0]["image"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = features.extract(image)
    assert all(torch.equal(a, b) for a, b in zip(mixed.values(), features.extract(image).values(), strict=True))


# ---- as contestants ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    """A pretrained encoder's folder, and a function that makes trials on the embedded sample."""
    from sarfm.models.mae import MAE

    store = Cut(patch_px=48).store(progress=False)
    parts = Split(by="region").parts(store)
    contract = InputContract.fit(store, np.flatnonzero(parts == "train"), 8, crop_px=48)
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("pretrained")
    save_model(MAE(build_encoder("vit-nano", len(store.channels), 8)), folder, contract)

    def make(out, **options):
        bodies = Bodies(len(store.channels), folder)
        return Trials(
            out, store, parts, contract, choose_tasks(store), bodies, learn=Recipe(steps=2, batch_size=4, rate=1e-3), device="cpu", **options
        )  # fmt: skip

    return make


def test_probes_enter_the_comparison_with_fractions_and_seeds(contest, tmp_path):
    trials = contest(tmp_path, scoring=Scoring(draws=50))
    table = grid(trials, PROBES, [0.3, 1.0], [0, 1], {})
    assert set(table["contestant"]) == set(PROBES) and table["rate"].isna().all()
    assert table.groupby("fraction")["labels"].unique().map(list).to_dict() == {0.3: [5], 1.0: [18]}
    assert not (tmp_path / "features").exists()
    per = training_table(table, trials.tasks, ["fraction", "contestant"]).set_index(["contestant", "fraction", "seed"])
    score = per["cover.mean_iou"]
    assert len(score) == 16 and score.between(0, 1).all()
    assert score["linear_probe", 1.0, 0] == pytest.approx(
        score["linear_probe", 1.0, 1], abs=1e-6
    )  # all labels, one encoder
    assert score["linear_probe_random", 1.0, 0] != score["linear_probe_random", 1.0, 1]  # another encoder by seed
    ahead = difference_table(table, score_of(trials.tasks), "linear_probe", draws=50)
    assert len(ahead) == 6 and (ahead["low"] <= ahead["high"]).all()
    assert search(contest(tmp_path / "s"), ["scratch", "linear_probe"], [1e-3]).index.tolist() == ["scratch"]
    tried = pd.read_parquet(tmp_path / "cells/knn_probe-0.3-0/history.parquet")
    assert set(tried["value"]) == {5, 20, 100} and tried["chosen"].sum() == 1


def test_a_probe_gives_the_same_numbers_again(contest, tmp_path):
    tables = [grid(contest(tmp_path / name), ["linear_probe", "knn_probe"], [0.3], [0], {}) for name in "ab"]
    assert all(np.array_equal(a, b) for a, b in zip(*(table["sums"] for table in tables), strict=True))
    without = contest(tmp_path / "c", probing=Probing(memory_gb=0))
    again = grid(without, ["linear_probe", "knn_probe"], [0.3], [0], {})
    assert all(np.array_equal(a, b) for a, b in zip(tables[0]["sums"], again["sums"], strict=True))


def test_a_probe_is_saved_evaluated_and_predicts(contest, tmp_path):
    trials = contest(tmp_path)
    grid(trials, ["knn_probe", "linear_probe"], [1.0], [0], {})
    for who in ("knn_probe", "linear_probe"):
        model, contract = load_predictor(tmp_path / "models" / who)
        assert isinstance(model, Probe) and load_model(tmp_path / "models" / who)[0].kind == who.partition("_")[0]
        scene = restore(trials.store, trials.store.scenes.index[0])
        free = contract.model_copy(update={"spacing_m": None, "spacing_max_m": None})
        predicted = predict_scene(model, free, scene)["cover"]
        assert predicted.shape == scene["cover"].shape
        right = (predicted.values == scene["cover"].values)[
            np.isin(scene["cover"].values, predicted.flag_values)
        ].mean()
        assert right > 0.6, right


def test_the_encoder_sees_every_image_once(contest, tmp_path, monkeypatch):
    seen = []
    extract = Features.extract
    monkeypatch.setattr(Features, "extract", lambda self, i, v=None: (seen.append(len(i)), extract(self, i, v))[1])
    trials = contest(tmp_path)
    grid(trials, ["linear_probe", "knn_probe"], [0.3, 1.0], [0, 1], {})
    assert sum(seen) == len(trials.store.index) == 36


def test_held_out_labels_and_pixels_leave_no_trace(contest, tmp_path):
    """Trained with another test part, the model is the same to the bit."""
    states = []
    for name in ("a", "b"):
        trials = contest(tmp_path / name)
        if name == "b":
            trials.parts = trials.parts.where(trials.parts != "test", "")
            trials.parts.iloc[np.flatnonzero(trials.parts == "")[:1]] = "test"
        trials.run(Cell("linear_probe", 1.0, 0, float("nan")), keep=True)
        states.append(load_model(tmp_path / name / "models/linear_probe")[0].state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_who_can_t_be_probed_is_refused(contest, tmp_path, encoder):
    with pytest.raises(ValueError, match="linear_probe needs a pretraining run"):
        Bodies(2).check(["linear_probe"])
    trials = contest(tmp_path, probing=Probing(pooling="class"), head=Head(pair="difference"))
    assert trials.probing.pooling == "class" and dataclasses.asdict(trials.probing)["labels"] == "share"
    with pytest.raises(ValueError, match="no class token"):
        Probe(build_encoder("swin-nano", 2), {"kind": KIND}, pooling="class")
    with pytest.raises(ValueError, match="linear or knn"):
        Probe(encoder, TASKS, "tree")


def test_pairs_of_regions_are_drawn_as_stated():
    from sarfm.evaluation.region_pairs import Chips, pair_matrix, region_pairs

    rng = np.random.default_rng(6)
    x = rng.normal(size=(120, 4))
    regions = np.repeat(["a", "b", "c"], 40)
    slope = {"a": 1.0, "b": 1.0, "c": -1.0}
    share = np.array([slope[r] for r in regions]) * x[:, 0]
    chips = Chips(x, np.stack([share, np.full(120, 0.2)], 1), regions, ("wood", "none"))
    table = region_pairs(chips, labelled=15, repeats=6, penalty=1e-6)
    mean, spread = pair_matrix(table)
    assert mean.loc["a", "b"] == pytest.approx(1, abs=1e-3) and mean.loc["a", "c"] == pytest.approx(-1, abs=1e-3)
    assert table[table["class"] == "none"]["r"].isna().all() and spread.loc["a", "a"] < 1e-3
    assert len(table) == 6 * 9 * 2
    assert isinstance(Samples(x, x, x[:, 0], x[:, 0]), tuple)


@pytest.mark.soak
def test_two_sizes_of_tokens_are_compared_by_one_command(tmp_path, monkeypatch):
    """The sweep that comes with sarfm, with hardly any pretraining."""
    from sarfm.runs.parameters import notebook_path
    from sarfm.runs.sweeps import run_sweep

    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "data"))
    text = (notebook_path("pretrain").parent / "sweeps/patch_size_probe.yaml").read_text(encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(text.replace(": 200", ": 2"), encoding="utf-8")
    table = run_sweep(tmp_path / "tiny.yaml", tmp_path / "out", progress=False)
    assert list(table["status"]) == ["done"]
    scores = pd.read_parquet(tmp_path / "out/report/scores.parquet")
    sizes = {f"{who} patch_size={size}" for who in ("linear_probe", "knn_probe") for size in (16, 32)}
    assert sizes < set(scores["who"]) and scores.groupby("who")["labelled"].nunique().eq(2).all()
