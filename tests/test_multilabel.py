"""Multi-label fine-tuning as published: layers, loss, scores, which weights are kept, presets, runs on real patches, and files elsewhere."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn import metrics as sk

from sarfm.cli import main
from sarfm.datasets.catalog import open_dataset
from sarfm.datasets.entries import load_entry
from sarfm.evaluation.contestants import Bodies, Cell, Head, Trials, choose_tasks
from sarfm.evaluation.counting import Scoring
from sarfm.evaluation.predict import predict_scene
from sarfm.evaluation.report import load_published
from sarfm.evaluation.tiles import Tiling
from sarfm.evaluation.unseen import count_images, interval_scores, labels_to_score, scoreable
from sarfm.io.files import carried, read_json
from sarfm.land.bigearthnet import PUBLISHED
from sarfm.land.bigearthnet_files import write_standins
from sarfm.models.kinds import build_encoder
from sarfm.models.sizes import encoder_size
from sarfm.models.weights import load_model
from sarfm.models.windowed import SwinEncoder
from sarfm.patches.contract import InputContract
from sarfm.patches.loading import Crops
from sarfm.patches.prepare import Cut
from sarfm.patches.splits import Split
from sarfm.runs.folders import model_folder
from sarfm.runs.parameters import check_parameters, read_preset
from sarfm.tasks.choices import RULES, SIX, WEIGHTED, is_better
from sarfm.tasks.losses import tag_loss
from sarfm.tasks.predictor import Predictor
from sarfm.tasks.tasks import task_for
from sarfm.train.optimizer import layer_numbers, parameter_groups
from sarfm.train.steps import Recipe

DEPTHS = (2, 2, 18, 2)  # of MixMIM's stages


@pytest.fixture(scope="module")
def base():
    """Make MixMIM-Base, but slim, with a head of 19 tags."""
    assert encoder_size("mixmim-base").settings["depths"] == DEPTHS
    encoder = SwinEncoder(2, 4, 16, DEPTHS, (1, 2, 4, 8), (8, 8, 8, 4), shifted=False, sincos=True)
    return Predictor(encoder, {"land_cover": task_for(load_entry("bigearthnet_s1_v2").target("land_cover"))})


# ---- layers -------------------------------------------------------------------------------------------------------


def published_number(name: str) -> int:
    """Number a parameter by its name, as the published table says: 24 blocks over all stages, 25 numbers."""
    if not name.startswith("encoder."):
        return 24
    part, *rest = name.removeprefix("encoder.").split(".")
    if part == "embed":
        return 0
    if part == "norms":
        return 24
    blocks = [number for stage, depth in enumerate(DEPTHS) for number in [sum(DEPTHS[:stage]) + depth]]
    if part == "merge":
        last_of_stage = blocks[int(rest[0])] - 1  # counted from 0
        return last_of_stage + 1
    return sum(DEPTHS[: int(rest[0])]) + int(rest[1]) + 1


def test_layers_are_numbered_as_published(base):
    numbers, depth = layer_numbers(base, "last_block")
    assert depth == 24 and numbers == {name: published_number(name) for name, _ in base.named_parameters()}
    merges = {name.split(".")[2]: n for name, n in numbers.items() if ".merge." in name}
    assert merges == {"0": 2, "1": 4, "2": 22}
    assert {n for name, n in numbers.items() if name.startswith("encoder.embed")} == {0}
    ours, _ = layer_numbers(base, "mae")
    assert {n for name, n in ours.items() if ".merge.0" in name} == {3}


def test_rates_of_layers_are_as_published(base):
    groups = parameter_groups(base, 0.05, 0.7, "last_block")
    named = {id(p): name for name, p in base.named_parameters()}
    scales = {named[id(p)]: (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, parameter in base.named_parameters():
        assert scales[name][0] == pytest.approx(0.7 ** (25 - published_number(name))), name
        assert scales[name][1] == (0.05 if parameter.ndim > 1 else 0), name
    assert max(scale for scale, _ in scales.values()) == pytest.approx(0.7)
    assert min(scale for scale, _ in scales.values()) == pytest.approx(0.7**25)


# ---- loss and scores ----------------------------------------------------------------------------------------------


def test_heads_begin_near_zero_and_branches_are_skipped_as_published(base):
    said = preset("system3_multilabel")
    head = Head(tile=said["head.tile"], tile_std=said["head.tile_std"], drop_path=said["head.drop_path"])
    small = SwinEncoder(2, **encoder_size("mixmim-nano").settings)
    target = load_entry("bigearthnet_s1_v2").target("land_cover")
    model = head.on(small, {"land_cover": task_for(target)})
    last = next(m for m in model.classify.modules() if isinstance(m, torch.nn.Linear))
    assert last.weight.std().item() == pytest.approx(2e-5, rel=0.1) and not last.bias.any()
    drops = [
        m.drop_prob for n, m in model.encoder.named_modules() if n.endswith("drop_path2") and hasattr(m, "drop_prob")
    ]
    assert max(drops) == pytest.approx(0.1) and sorted(drops) == drops
    image = torch.randn(2, 2, 64, 64)
    plain = small.eval().features(image)[-1]
    assert model.encoder.eval().features(image)[-1].equal(plain)
    assert not model.encoder.train().features(image)[-1].equal(plain)


def test_the_loss_is_multilabel_soft_margin():
    g = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(7, 19, generator=g) * 3, (torch.rand(7, 19, generator=g) < 0.2).long()
    theirs = torch.nn.MultiLabelSoftMarginLoss()(logits.double(), truth.double())
    assert tag_loss(logits.double(), truth).item() == pytest.approx(theirs.item(), abs=1e-6)


def test_six_scores_are_those_of_scikit_learn():
    task = task_for(load_entry("bigearthnet_s1_v2").target("land_cover"))
    g = np.random.default_rng(0)
    truth = g.random((600, 19)) < np.linspace(0.02, 0.6, 19)
    given = np.floor(1000 / (1 + np.exp(-g.normal(size=truth.shape) - 2 * truth + 1))) / 1000 + 0.0005
    given[:, 3] = g.integers(0, 499, 600) / 1000 + 0.0005  # never given
    sums = task.tally(torch.from_numpy(given), torch.from_numpy(truth).long()).sum(0).numpy()
    found, decided = task.scores(sums), given >= 0.5
    for over in ("macro", "micro"):
        assert found[f"map_{over}"] == pytest.approx(sk.average_precision_score(truth, given, average=over), abs=1e-9)
        assert found[f"f1_{over}"] == pytest.approx(sk.f1_score(truth, decided, average=over), abs=1e-12)
        expected = sk.precision_score(truth, decided, average=over, zero_division=0)
        assert found[f"precision_{over}"] == pytest.approx(expected, abs=1e-12)


def test_tags_that_never_occur_are_left_out_of_the_macro_averages():
    task = task_for(load_entry("bigearthnet_s1_v2").target("land_cover"))
    truth = torch.zeros(4, 19, dtype=torch.long)
    truth[:2, 0] = 1
    given = torch.full((4, 19), 0.1)
    given[:3, 0] = 0.9
    found = task.scores(task.tally(given, truth).sum(0).numpy())
    assert found["precision_macro"] == pytest.approx(2 / 3) and found["precision_micro"] == pytest.approx(2 / 3)
    assert found["f1_macro"] == pytest.approx(0.8) and np.isnan(found["precision"][1])


# ---- which weights are kept ---------------------------------------------------------------------------------------


def test_rules_are_the_published_ones():
    assert dict(WEIGHTED) == {"f1_macro": 1.3, "f1_micro": 1.1, "map_macro": 1.2, "precision_macro": 1.2}
    draw, kept = np.random.default_rng(0), {}
    rows = [dict(zip(SIX, draw.random(6), strict=True)) for _ in range(200)]
    for rule in RULES:
        best = None
        for row in rows:
            best = row if is_better(row, best, rule) else best
        kept[rule] = best
    weighted = lambda r: 1.3 * r["f1_macro"] + 1.1 * r["f1_micro"] + 1.2 * r["map_macro"] + 1.2 * r["precision_macro"]
    plain = lambda r: r["f1_macro"] + r["f1_micro"] + r["map_macro"] + r["precision_macro"]
    assert kept["weighted_sum"] == max(rows, key=weighted) and kept["plain_sum"] == max(rows, key=plain)
    assert kept["score"] == max(rows, key=lambda r: r["map_macro"])
    low, high = dict.fromkeys(SIX, 0.0), dict.fromkeys(SIX, 0.5)
    assert is_better(high | {"map_micro": 0.0}, low, "most_best")
    four_of_six = low | dict.fromkeys(SIX[:4], 1.0)
    assert is_better(four_of_six, high, "most_best") and not is_better(
        low | dict.fromkeys(SIX[:2], 1.0), high, "most_best"
    )
    assert is_better(low | dict.fromkeys([n for n in SIX if "macro" in n], 1.0), high, "most_best")
    assert not is_better(low | dict.fromkeys([n for n in SIX if "micro" in n], 1.0), high, "most_best")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Cut the sample that is carried, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARFM_DATA", str(tmp_path_factory.mktemp("data")))
        store = Cut("bigearthnet_sample", channels=("vh", "vv"), patch_px=120).store(progress=False)
    parts = Split().parts(store)
    return store, parts, InputContract.fit(store, np.flatnonzero(parts == "train"), 32, crop_px=96)


def trials(prepared, out, keep, steps=6, **learn):
    """State a small comparison on the sample."""
    store, parts, contract = prepared
    recipe = Recipe(steps=steps, batch_size=4, rate=1e-3, warmup=0, **learn)
    return Trials(
        out, store, parts, contract, choose_tasks(store), Bodies(2, encoder="mixmim-nano", patch_size=4, crop_px=96), Head(),
        recipe, Crops(crop_px=96), Scoring(unit="patch", score="land_cover.map_macro"), checkpoint_every=2, keep=keep, device="cpu",
    )  # fmt: skip


CELL = Cell("scratch", 1.0, 0, 1e-3)


@pytest.mark.parametrize("keep", ["score", "most_best"])
def test_the_weights_that_score_best_are_kept(prepared, tmp_path, keep):
    work = trials(prepared, tmp_path, keep)
    counted = work.run(CELL, keep=True)
    table = pd.read_parquet(tmp_path / CELL.folder("cells") / "validation.parquet")
    assert table["step"].tolist() == [2, 4, 6] and set(SIX) <= set(table) and table["kept"][0]
    best = None
    for row in table.to_dict("records"):
        assert row["kept"] == is_better(row, best, keep)
        best = row if row["kept"] else best
    last = trials(prepared, tmp_path / "last", "last").run(CELL)
    assert len(counted) == len(last) == 7
    assert not (tmp_path / "last" / CELL.folder("cells") / "validation.parquet").exists()


def test_a_training_that_was_killed_keeps_what_it_would_have_kept(prepared, tmp_path, monkeypatch):
    whole = trials(prepared, tmp_path / "whole", "score")
    whole.run(CELL, keep=True)
    from sarfm.evaluation import contestants

    killed, calls = trials(prepared, tmp_path / "killed", "score"), []
    score = contestants.Keeper.__call__

    def dies(self, training):
        calls.append(training.step)
        if len(calls) == 2:
            raise KeyboardInterrupt  # after the checkpoint of step 4, before its scores
        score(self, training)

    monkeypatch.setattr(contestants.Keeper, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.run(CELL, keep=True)
    monkeypatch.setattr(contestants.Keeper, "__call__", score)
    killed.run(CELL, keep=True)
    read = lambda out: pd.read_parquet(out / CELL.folder("cells") / "validation.parquet")
    pd.testing.assert_frame_equal(read(tmp_path / "whole"), read(tmp_path / "killed"))
    weights = [(tmp_path / run / "models/scratch/model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_rules_of_tags_are_refused_for_other_targets(tmp_path):
    with pytest.raises(ValueError, match="which tags have; the scores lack f1_macro"):
        is_better({"mean_iou": 0.5}, None, "weighted_sum")
    with pytest.raises(ValueError, match="the rule is one of"):
        is_better({}, None, "best")


def test_a_fraction_of_the_labels_is_contained_in_a_larger_one(prepared, tmp_path):
    work, held = trials(prepared, tmp_path, "last"), set()
    for fraction, count in {0.125: 2, 0.25: 3, 0.5: 6, 1.0: 12}.items():
        rows = set(work.labelled(Cell("scratch", fraction, 0, 1e-3)).tolist())
        assert len(rows) == count and held <= rows
        held = rows


# ---- presets and copied numbers -----------------------------------------------------------------------------------


# ---------------------------------------------------------------- patches elsewhere


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Write patches of version 2 that no run has seen."""
    return write_standins(tmp_path_factory.mktemp("elsewhere"), 10, seed=4, progress=False)


def binned(given):
    """Round probabilities as tallies do, to a thousandth."""
    return np.floor(np.asarray(given, float) * 1000)


@pytest.mark.parametrize("tile_px", [120, 64])
def test_tags_of_patches_elsewhere_are_scored_as_by_hand(prepared, elsewhere, tile_px):
    contract = prepared[2].model_copy(update={"patch_size": 8, "crop_px": 120})
    entry = load_entry("bigearthnet_s1_v2")
    torch.manual_seed(0)
    model = Predictor(
        build_encoder("vit-nano", 2, 8), {"land_cover": task_for(entry.target("land_cover"))}, tile="mean"
    )
    line = next(m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 19)
    torch.nn.init.normal_(line.weight, std=0.3)
    labels = labels_to_score(entry, model.tasks)
    scenes, refused = scoreable(entry, elsewhere, contract, list(labels.values()))
    assert labels == {"land_cover": "land_cover"} and len(scenes) == 10 and refused.empty
    table = count_images(model, contract, scenes, labels, Tiling(tile_px), progress=False)
    found = interval_scores(table, model.tasks, draws=10).set_index(["class", "score"])["value"]
    truth = np.stack([scene["land_cover"].values for scene in scenes.values()])
    if tile_px == 120:
        with torch.inference_mode():
            logits = [model.eval()(*(p[None] for p in contract.apply(s)))["land_cover"] for s in scenes.values()]
        given = torch.cat(logits).sigmoid().numpy()
    else:
        made = [predict_scene(model, contract, scene, Tiling(64)) for scene in scenes.values()]
        given = np.stack([[float(layer.mean()) for layer in maps.data_vars.values()] for maps in made])
    there = np.flatnonzero(truth.any(0))
    each = [sk.average_precision_score(truth[:, k], binned(given[:, k])) for k in there]
    assert found["", "map_macro"] == pytest.approx(np.mean(each), abs=5e-3)
    assert found["", "f1_micro"] == pytest.approx(sk.f1_score(truth, given > 0.5, average="micro"), abs=1e-9)


@pytest.mark.soak
def test_a_multi_label_run_is_evaluated_and_predicts_elsewhere(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "data"))
    given = {"data.dataset": "bigearthnet_sample", "data.patch_px": 120, "data.stride_px": 120, "crops.crop_px": 120}
    given |= {
        "encoder": "vit-nano",
        "patch_size": 8,
        "head.tile": "mean",
        "contestants": ["scratch"],
        "fractions": [1.0],
    }
    given |= {"seeds": [0], "learn.steps": 4, "learn.batch_size": 8, "scoring.unit": "patch", "device": "cpu"}
    run("run", "finetune", "--out", tmp_path / "fine", **given)
    run("evaluate", tmp_path / "fine", "--out", tmp_path / "own")
    tables = [pd.read_parquet(tmp_path / name / "scores.parquet") for name in ("fine", "own")]
    assert tables[1].set_index("score")["value"]["map_macro"] == pytest.approx(
        tables[0].set_index("score")["value"]["map_macro"]
    )
    run("evaluate", tmp_path / "fine", "--images", elsewhere, "--out", tmp_path / "there", dataset="bigearthnet_s1_v2")
    assert read_json(tmp_path / "there/evaluate.json")["scored"] == 10
    assert len(list((tmp_path / "there/figures").glob("worst-*.png"))) == 6
    where = {"data_folder": str(elsewhere), "maps": False}
    run("predict", tmp_path / "fine", "--scenes", "bigearthnet_s1_v2", "--out", tmp_path / "predict", **where)
    tags = pd.read_parquet(tmp_path / "predict/tags.parquet").set_index("scene").drop(columns="target")
    model, contract = load_model(model_folder(tmp_path / "fine", ""))
    for name, scene in open_dataset("bigearthnet_s1_v2", elsewhere).items():
        with torch.inference_mode():
            made = model.eval()(*(part[None] for part in contract.apply(scene)))["land_cover"].sigmoid()[0]
        assert list(tags.columns) == model.tasks["land_cover"].target.names
        np.testing.assert_allclose(tags.loc[name], made, atol=1e-5)


def run(*words, **parameters):
    """Call the command line, and take no failure."""
    given = [f"{n}={json.dumps(v) if not isinstance(v, str) else v}" for n, v in parameters.items()]
    assert main([*map(str, words), *(w for pair in given for w in ("-p", pair)), "--quiet"]) == 0


def preset(name: str) -> dict:
    """Read a preset's parameters."""
    return yaml.safe_load((carried("run_notebooks") / f"presets/{name}.yaml").read_text())["parameters"]


def test_learning_rates_are_the_published_base_rates_for_their_batches():
    pretrain, tune = preset("system3_pretrain"), preset("system3_multilabel")
    assert (
        pretrain["learn.batch_size"] == 8 * 256
        and pretrain["learn.rate"] == pytest.approx(1.5e-4 * 2048 / 256) == 1.2e-3
    )
    assert tune["learn.batch_size"] == 8 * 128 and tune["learn.rate"] == pytest.approx(5e-4 * 1024 / 256) == 2e-3
    assert tune["learn.floor"] * tune["learn.rate"] == pytest.approx(1e-6)
    assert (
        tune["learn.warmup"] * tune["learn.epochs"] == 5 and pretrain["learn.warmup"] * pretrain["learn.epochs"] == 40
    )
    assert (tune["learn.layer_decay"], tune["learn.convention"]) == (0.7, "last_block")
    assert sorted(tune["fractions"]) == [0.125, 0.25, 0.5, 1]
    assert (tuple(pretrain["mean"]), tuple(pretrain["std"])) == PUBLISHED["v2"] and pretrain["data.channels"] == [
        "vh",
        "vv",
    ]


def test_the_pretraining_that_stops_early_has_the_rates_of_the_long_one():
    pretrain = preset("system3_pretrain")
    short = Recipe(
        steps=640, warmup=pretrain["learn.warmup"], floor=pretrain["learn.floor"], rate=pretrain["learn.rate"]
    )
    long = Recipe(steps=10240, warmup=40 / 1024, floor=0.0, rate=1.2e-3)
    for step in (0, 100, 399, 400, 500, 639):
        assert short.rate_at(step) == pytest.approx(long.rate_at(step), rel=1e-3)


@pytest.mark.parametrize("name", ["system3_pretrain", "system3_multilabel"])
def test_presets_are_sound(name):
    notebook = {"system3_pretrain": "pretrain", "system3_multilabel": "finetune"}[name]
    assert check_parameters(notebook, read_preset(name, notebook))["data"]["dataset"] == "bigearthnet_s1_v2_128px"


def test_the_published_table_is_marked_as_copied():
    table = load_published("system3")
    assert table["copied"].all() and table["source"].str.contains("copied, other harness").all()
    ours = table[table["of"] == "SAR-W-MixMAE"].set_index(["contestant", "labelled"])
    assert ours.loc[("pretrained", 100), ["map_macro", "map_micro", "f1_macro", "f1_micro"]].tolist() == [
        0.7141,
        0.8391,
        0.6443,
        0.7384,
    ]
    assert ours.loc[("scratch", 12.5), "map_macro"] == 0.5268 and len(ours) == 8
