"""Evaluation of files never seen: right scores for what can be scored, a named reason for what can't, nothing else touched."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from predictors import one_target

from sarfm import cli
from sarfm.datasets.entries import load_entry
from sarfm.evaluation.predict import predict_scene
from sarfm.evaluation.unseen import (
    candidates,
    count_images,
    image_scores,
    interval_scores,
    labels_to_score,
    load_predictor,
    other_files,
    report,
    scoreable,
    trained_on,
)
from sarfm.io.files import write_json
from sarfm.models.kinds import build_encoder
from sarfm.models.mae import MAE
from sarfm.models.weights import load_model, save_model
from sarfm.patches.contract import InputContract
from sarfm.scenes.channels import Target
from sarfm.tasks.predictor import Predictor
from sarfm.tasks.tasks import Classes, Number

LAYOUT = """
id: pairs
title: Made-up flood pairs
crs: none
channels: {vv: {units: "1", quantity: digital_number, nodata: 255}}
targets: {flood: {description: flooded, classes: {0: {name: not flooded}, 1: {name: flooded}}}}
read:
  scenes: "{time}/{scene}.png"
  times: [before, after]
  targets: {flood: "mask/{scene}.png"}
  recode: {flood: {255: 1}}
"""
CONTRACT = InputContract(
    channels=["vv@0", "vv@1"],
    quantity="digital_number",
    units="1",
    mean=[100, 85],
    std=[50, 50],
    patch_size=8,
    crop_px=16,
)

TASKS = {"flood": Classes(Target("flood", classes={0: "not flooded", 1: "flooded"}))}


def write_pairs(folder, names, seed=0):
    """Write before, after and mask, 24 × 32 px, a few pixels unobserved."""
    generator = np.random.default_rng(seed)
    for name in names:
        flooded = generator.random((3, 4)).repeat(8, 0).repeat(8, 1) < 0.4
        before = generator.gamma(4, 25, flooded.shape).clip(0, 254)
        after = generator.gamma(4, np.where(flooded, 8, 25)).clip(0, 254)
        before[0, :3], after[5, 5] = 255, 255
        for part, values in (("before", before), ("after", after), ("mask", 255 * flooded)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(values)).save(folder / part / f"{name}.png")
    return folder


def write_run(folder, data):
    """Write what a fine-tuning run leaves: a model with its contract, and the parameters."""
    torch.manual_seed(0)
    model = Predictor(build_encoder("vit-nano", 2, 8), TASKS, "linear").eval()
    with torch.no_grad():  # untrained, it calls about half of the pixels flooded
        scores = model(torch.randn(4, 2, 16, 16))["flood"]
        model.classify["flood"].bias[1] += (scores[:, 0] - scores[:, 1]).median()
    save_model(model, folder, CONTRACT)
    learnt = {"data": {"dataset": str(data / "pairs.yaml"), "folder": "", "dates": "channels"}}
    learnt |= {"split": {"by": "block", "fractions": [0.5, 0.25, 0.25], "seed": 0}}
    write_json(folder / "run.json", {"notebook": "finetune", "status": "done", "parameters": learnt})
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data set of 10 pairs, and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("home")
    write_pairs(folder / "data", [f"{k:02}" for k in range(10)], seed=9)
    (folder / "data" / "pairs.yaml").write_text(LAYOUT)
    write_run(folder / "run", folder / "data")
    return folder


@pytest.fixture(scope="module")
def entry(home):
    return load_entry(home / "data" / "pairs.yaml")


def content(folder):
    """Every file with its checksum."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def by_hand(matrix):
    """Scores of "flooded" from [[tn, fp], [fn, tp]], as the textbooks write them."""
    (tn, fp), (fn, tp) = matrix
    return {
        "share": (tp + fn) / (tp + fn + fp + tn),
        "iou": tp / (tp + fp + fn),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "false_alarm": fp / (fp + tn),
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
    }


def matrix_of(run, images, entry, name):
    """Count one image from the files themselves: pixels observed on both dates."""
    model, contract = load_model(run)
    scene = scoreable(entry, images, contract)[0][name]
    called = predict_scene(model, contract, scene)["flood"].values
    before, after, mask = (np.array(Image.open(images / p / f"{name}.png")) for p in ("before", "after", "mask"))
    seen = (before != 255) & (after != 255)
    truth = mask == 255
    return np.array([[np.sum(seen & (truth == t) & (called == c)) for c in (0, 1)] for t in (0, 1)])


# ---- the whole of it, once through the command line ---------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(home, tmp_path_factory):
    """First nothing can be scored; then all but two images are mended, and the same command is given again."""
    folder = tmp_path_factory.mktemp("elsewhere")
    images = write_pairs(folder / "images", ["a", "b", "c", "d", "e"])
    masks = {path: path.read_bytes() for path in sorted((images / "mask").iterdir())}
    for path in masks:
        path.write_text("not an image")
    words = ["evaluate", str(home / "run"), "--images", str(images), "--out", str(folder / "out"), "--quiet"]
    words += ["-p", "draws=200", "-p", "worst=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        codes, said = [cli.main(words)], [json.loads((folder / "out" / "evaluate.json").read_text())]
        left = sorted(path.name for path in (folder / "out").iterdir())
        stopped = (folder / "out" / "evaluate.running.ipynb").read_text()
        for path, was in masks.items():
            path.write_bytes(was)
        (images / "after" / "b.png").unlink()
        (images / "before" / "d.png").write_bytes((images / "before" / "d.png").read_bytes()[:200])
        (images / "mask" / "f.tif").touch()
        before = content(images)
        codes.append(cli.main(words))
    said.append(json.loads((folder / "out" / "evaluate.json").read_text(), parse_constant=pytest.fail))  # no NaN
    return {
        "folder": folder,
        "images": images,
        "codes": codes,
        "said": said,
        "left": left,
        "before": before,
        "stopped": stopped,
    }


def test_nothing_to_score_fails_and_says_why(asked):
    said = asked["said"][0]
    assert asked["codes"][0] == 1 and said["scored"] == 0 and said["scores"] == said["classes"] == {}
    assert [row["file"] for row in said["refusals"]] == [f"mask/{name}.png" for name in "abcde"]
    assert asked["left"] == ["evaluate.json", "evaluate.running.ipynb", "not_scored.parquet", "run.json"]
    assert "all 5 scenes were refused" in asked["stopped"]


def test_mended_files_are_scored_and_the_others_named(asked):
    said, out = asked["said"][1], asked["folder"] / "out"
    assert asked["codes"][1] == 0
    assert [(row["scene"], row["file"]) for row in said["refusals"]] == [("b", "after/b.png"), ("d", "before/d.png")]
    assert "missing" in said["refusals"][0]["reason"] and "cut off" in said["refusals"][1]["reason"]
    assert sorted(row["scene"] for row in said["images"]) == ["a", "c", "e"]
    assert said["other_files"] == ["mask/f.tif"] and said["trained_on"] == []
    made = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    figures = {f"figures/worst-{k}.png" for k in (1, 2)}
    assert made == figures | {
        "evaluate.ipynb",
        "evaluate.json",
        "index.html",
        "not_scored.parquet",
        "run.json",
        "scores.parquet",
        "tallies.parquet",
    }, "something is missing, or half-written"
    for name in figures:
        Image.open(out / name).verify()
    assert content(asked["images"]) == asked["before"], "the images were touched"


def test_scores_are_those_of_the_textbooks(asked, home, entry):
    said = asked["said"][1]
    each = np.stack([matrix_of(home / "run", asked["images"], entry, name) for name in ("a", "c", "e")])
    whole = each.sum(0)
    assert whole.sum() == 3 * (24 * 32 - 4) and (whole > 20).all(), "a test that no mistake could fail"
    flooded = said["classes"]["flooded"]
    assert flooded.keys() == by_hand(whole).keys()
    for score, value in by_hand(whole).items():
        assert np.isclose(flooded[score]["value"], value, rtol=1e-12), score
    for score, value in by_hand(whole[::-1, ::-1]).items():
        assert np.isclose(said["classes"]["not flooded"][score]["value"], value, rtol=1e-12), score
    means = [np.mean([by_hand(m)[score] for m in (whole, whole[::-1, ::-1])]) for score in ("iou", "f1")]
    expected = dict(zip(("mean_iou", "mean_f1", "accuracy"), [*means, np.trace(whole) / whole.sum()], strict=True))
    assert {
        name: np.isclose(said["scores"][name]["value"], value) for name, value in expected.items()
    } == dict.fromkeys(expected, True)
    often = np.random.default_rng(0).multinomial(3, [1 / 3] * 3, size=200)  # images, not pixels, are drawn
    drawn = [by_hand(np.tensordot(times, each, 1))["iou"] for times in often]
    assert np.allclose([flooded["iou"]["low"], flooded["iou"]["high"]], np.quantile(drawn, [0.025, 0.975]))
    wrong = {name: 1 - np.trace(m) / m.sum() for name, m in zip("ace", each, strict=True)}
    assert [row["scene"] for row in said["images"]] == sorted(wrong, key=wrong.get, reverse=True)
    for row in said["images"]:
        by_itself = by_hand(each["ace".index(row["scene"])])
        assert row["classes"]["flooded"] == pytest.approx({n: by_itself[n] for n in ("iou", "f1", "false_alarm")})


def test_the_json_holds_what_a_script_needs(asked, home):
    said = asked["said"][1]
    assert said["model"] == str(home / "run") and said["dataset"] == "pairs" and said["label"] == "flood"
    assert len(said["sha256"]) == 64 and said["folder"] == str(asked["images"]) and said["draws"] == 200
    assert (said["scored"], said["not_scored"]) == (len(said["images"]), len(said["refusals"])) == (3, 2)
    for scores in (said["scores"], *said["classes"].values()):
        assert all(s.keys() == {"value", "low", "high"} and s["low"] <= s["high"] for s in scores.values())
    record = json.loads((asked["folder"] / "out" / "run.json").read_text())
    assert record["status"] == "done" and record["metrics"]["iou_flooded"] == said["classes"]["flooded"]["iou"]
    counted = pd.read_parquet(asked["folder"] / "out" / "tallies.parquet")
    assert sum(map(sum, counted["sums"])) == counted["n"].sum() == sum(row["pixels"] for row in said["images"])
    scores = pd.read_parquet(asked["folder"] / "out" / "scores.parquet").set_index(["target", "score"])
    assert scores.loc[("flood", "iou_flooded"), "value"] == said["classes"]["flooded"]["iou"]["value"]


def test_the_command_line_prints_scores_and_refusals(asked):
    lines = "\n".join(cli._scores(asked["said"][1] | {"trained_on": ["a"]}))
    assert "flooded: iou 0." in lines and "false_alarm" in lines and "  after/b.png: missing" in lines
    assert "scored 3 images, not scored 2:" in lines and "trained on 1 of the images" in lines


# ---- refused before a kernel starts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere", "--images", "images"], "there is no nowhere/model.json"),
        (["run", "--images", "gone"], "there is no folder gone"),
        (["pretrained", "--images", "images"], "predicts no target"),
        (["run", "--images", "images", "--out", "images/out"], "into the folder of the images"),
        (["run", "--images", "images", "--out", "run"], "holds a run with other parameters"),
        (["run", "--images", "images", "-p", "images=x"], "given twice"),
        (["run", "--images", "images", "-p", "drawz=2"], "did you mean 'draws'"),
        (["run", "--images", "images", "-p", "overlap=1.0"], "in [0, 1)"),
    ],
)
def test_what_is_obviously_wrong_is_one_message(home, tmp_path, monkeypatch, capsys, words, expected):
    write_pairs(tmp_path / "images", ["a"])
    write_run(tmp_path / "run", home / "data")
    save_model(MAE(build_encoder("vit-nano", 2, 8), 64, 1, 4), tmp_path / "pretrained", CONTRACT)
    monkeypatch.chdir(tmp_path)
    before = content(tmp_path)
    assert cli.main(["evaluate", *words]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.startswith("sarfm: ") and "Traceback" not in said
    assert content(tmp_path) == before, "something was left behind"


def test_an_evaluation_is_repeated_and_another_one_refused(home, tmp_path, monkeypatch, capsys):
    images, out, asked = write_pairs(tmp_path / "images", ["a"]), tmp_path / "out", []

    def stand_in(notebook, given, folder, *_):
        assert not (folder / "evaluate.ipynb").exists(), "a finished evaluation would have been taken for this one"
        values = cli.check_parameters(notebook, {**given, "out": str(folder)})
        record = {"notebook": "evaluate", "parameters": values, "timings_s": {"this_attempt": 1}}
        write_json(folder / "run.json", record)
        write_json(folder / "evaluate.json", report(pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), {"trained_on": []}))
        (folder / "evaluate.ipynb").touch()
        asked.append(given)
        return folder / "evaluate.ipynb"

    monkeypatch.setattr(cli, "run_notebook", stand_in)
    words = ["evaluate", str(home / "run"), "--images", str(images), "--out", str(out)]
    assert [cli.main(words), cli.main(words)] == [0, 0] and len(asked) == 2
    assert cli.main([*words, "-p", "seed=1"]) == 2 and "seed=0, now 1" in capsys.readouterr().err and len(asked) == 2
    assert cli.main(words[:4]) == 0 and (home / "run" / "evaluate-images" / "evaluate.ipynb").exists()


# ---- every kind of damage -----------------------------------------------------------------------------------------


def resize(path, size):
    Image.open(path).resize(size, Image.Resampling.NEAREST).save(path)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path):
    outside = path.parents[1].with_name("outside.png")
    path.rename(outside)
    path.symlink_to(outside)


def unknown_code(path):
    Image.fromarray(np.uint8(np.array(Image.open(path)) // 255 * 7)).save(path)


DAMAGE = {  # scene: file, what is done to it, what is said about it
    "01": ("before/01.png", lambda path: path.unlink(), "missing beside after/01.png, mask/01.png"),
    "02": ("mask/02.png", lambda path: path.unlink(), "missing beside before/02.png, after/02.png"),
    "03": ("after/03.png", lambda path: resize(path, (32, 20)), "20 × 32 px (rows × columns), the others 24 × 32"),
    "04": ("mask/04.png", lambda path: resize(path, (16, 24)), "24 × 16 px (rows × columns), the others 24 × 32"),
    "05": ("after/05.png", lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut off or altered"),
    "06": ("before/06.png", lambda path: path.write_bytes(b""), "cut off or altered"),
    "07": ("mask/07.png", lambda path: path.write_text("hello"), "cut off or altered"),
    "08": ("before/08.png", flip, "cut off or altered"),
    "09": ("mask/09.png", unknown_code, "holds the codes [7] in"),
    "10": ("after/10.png", lambda path: Image.new("L", (32, 24), 255).save(path), "no pixel is both observed"),
    "11": ("after/11.png", link, "a link leads out of the folder"),
    "12": ("mask/12.png", link, "a link leads out of the folder"),
    "13": ("after/13.png", lambda path: Image.new("RGB", (32, 24)).save(path), "hold 1, 3 bands"),
}


def test_every_kind_of_damage_is_named_with_its_file(tmp_path, entry):
    images = write_pairs(tmp_path / "images", [f"{k:02}" for k in range(16)])
    for file, spoil, _ in DAMAGE.values():
        spoil(images / file)
    (images / "before" / "14.png").unlink()
    (images / "after" / "14.png").unlink()  # only a mask is left
    before = content(images)
    scenes, refused = scoreable(entry, images, CONTRACT)
    assert list(scenes) == ["00", "15"] and list(refused["scene"]) == [*DAMAGE, "14"]
    said = refused.set_index("scene")
    for scene, (file, _, reason) in DAMAGE.items():
        assert file in said["file"][scene] and reason in said["reason"][scene], (scene, *said.loc[scene])
    assert said["file"]["14"] == "before/14.png, after/14.png"
    assert not said["reason"].str.contains(str(tmp_path)).any(), "the path of a machine"
    assert set(said["file"][[s for s in DAMAGE if s not in ("10", "13")]]) == {
        file for scene, (file, _, _) in DAMAGE.items() if scene not in ("10", "13")
    }, "more than the damaged file is blamed"
    assert content(images) == before
    model, _ = load_model(write_run(tmp_path / "run", tmp_path))
    table = count_images(model, CONTRACT, scenes, {"flood": "flood"})
    assert len(table) == 2 and table["n"].sum() == 2 * (24 * 32 - 4)


# ---- what was seen before, and what is left alone -----------------------------------------------------------------


def test_images_that_were_trained_on_are_found_under_any_name(home, entry, tmp_path):
    data, parts = home / "data", ("before", "after", "mask")
    write_pairs(tmp_path, ["new"], seed=5)
    for number, name in enumerate(["00", "03", "04", "09"]):  # train, val, test, train
        for part in parts:
            (tmp_path / part / f"copy{number}.png").write_bytes((data / part / f"{name}.png").read_bytes())
    learnt = json.loads((home / "run" / "run.json").read_text())["parameters"]
    found = candidates(entry, tmp_path, ["flood"])[0]
    from sarfm.patches.splits import split_by_block

    index = pd.DataFrame({"place": [f"{k:02}" for k in range(10)], "factor": 1, "patch": 0})
    train = set(index["place"][split_by_block(index, 10) == "train"])
    expected = [f"copy{k}" for k, name in enumerate(["00", "03", "04", "09"]) if name in train]
    assert 0 < len(expected) < 4 and trained_on(found, learnt) == expected
    assert trained_on(found, learnt | {"split": {"by": "region"}}) == ["copy0", "copy1", "copy2", "copy3"]
    assert trained_on(found, {**learnt, "data": {**learnt["data"], "folder": str(tmp_path / "gone")}}) is None
    assert trained_on(found, {}) is None


def test_files_that_are_part_of_no_image_are_listed(entry, tmp_path):
    write_pairs(tmp_path, ["a"])
    (tmp_path / "before" / "b.jpg").touch()
    (tmp_path / "notes.txt").touch()
    assert other_files(entry, tmp_path, ["flood"]) == ["before/b.jpg", "notes.txt"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        candidates(entry, tmp_path / "gone", ["flood"])


# ---- edges --------------------------------------------------------------------------------------------------------


def test_one_image_has_no_interval_and_absent_classes_no_score(tmp_path):
    fixed = {"run": "", "seed": 0, "place": "a", "target": "wet", "group": 0, "n": 100}
    table = pd.DataFrame([{"scene": "a", "sums": [90.0, 10.0, 0.0, 0.0], **fixed}])
    tasks = {"wet": Classes(Target("wet", classes={0: "dry", 1: "wet"}))}
    found, listed = interval_scores(table, tasks), image_scores(table, tasks)
    none = pd.DataFrame(columns=["scene", "file", "reason"])
    said = json.loads(json.dumps(report(found, listed, none, {}), allow_nan=False))
    assert said["classes"]["wet"]["recall"] == {"value": None, "low": None, "high": None}
    assert said["classes"]["wet"]["false_alarm"] == {"value": 0.1, "low": None, "high": None}
    assert said["images"][0]["classes"]["wet"]["iou"] == 0.0 and said["refusals"] == []


def test_each_date_can_be_scored_by_itself(entry, tmp_path):
    images = write_pairs(tmp_path / "images", ["a", "b"])
    (images / "after" / "b.png").write_bytes(b"")
    contract = CONTRACT.model_copy(
        update={"channels": ["vv"], "units": ["1"], "quantity": ["digital_number"], "mean": [100.0], "std": [50.0]}
    )
    torch.manual_seed(0)
    model = one_target(build_encoder("vit-nano", 1, 8), 2, "linear").eval()
    scenes, refused = scoreable(entry, images, contract, times="scenes")
    assert list(scenes) == ["a@0", "a@1"] and list(refused["file"]) == ["after/b.png"]
    table = count_images(model, contract, scenes, {"label": "flood"}, progress=False)
    assert table["n"].tolist() == [24 * 32 - 3, 24 * 32 - 1]


def test_labels_and_models_that_do_not_fit_are_refused(entry, home, tmp_path):
    assert labels_to_score(entry) == labels_to_score(entry, TASKS) == {"flood": "flood"}
    assert labels_to_score(entry, {"water": TASKS["flood"]}, "flood") == {"water": "flood"}
    with pytest.raises(ValueError, match="has the targets \\['flood'\\]; got 'ice'"):
        labels_to_score(entry, TASKS, "ice")
    with pytest.raises(ValueError, match="the model predicts water; name the one to compare with"):
        labels_to_score(entry, {"water": TASKS["flood"]})
    with pytest.raises(ValueError, match="describes no target"):
        labels_to_score(entry.model_copy(update={"targets": {}}))
    three = Target("ice", classes={0: "a", 1: "b", 2: "c"})
    with pytest.raises(ValueError, match="predicts 2 classes, ice has 3 classes"):
        load_predictor(home / "run", {"flood": three})
    narrow = CONTRACT.model_copy(update={"units": ["dB", "dB"]})
    write_pairs(tmp_path, ["a"])
    scenes, refused = scoreable(entry, tmp_path, narrow)
    assert not scenes and "the model takes 'dB'" in refused["reason"][0]


def test_several_targets_are_scored_beside_each_other():
    depth = Number(Target("depth", "number", units="m", limits=(0, 10)))
    fixed = {"run": "", "seed": 0, "place": "", "group": 0, "n": 10}
    rows = [{"scene": s, "target": "flood", "sums": [6.0, 1, 1, 2.0 + k]} for k, s in enumerate("ab")]
    rows += [{"scene": s, "target": "depth", "sums": [10.0, 1, 5, 9, 20 + k, 80]} for k, s in enumerate("ab")]
    table, tasks = pd.DataFrame([row | fixed for row in rows]), {**TASKS, "depth": depth}
    said = report(interval_scores(table, tasks, 50), image_scores(table, tasks), pd.DataFrame(), {})
    assert said["classes"].keys() == {"flood: not flooded", "flood: flooded"}
    assert np.isclose(said["scores"]["depth: rmse"]["value"], 0.9**0.5) and "flood: mean_iou" in said["scores"]
    assert said["images"][0]["classes"]["flood: flooded"].keys() == {"iou", "f1", "false_alarm"}
