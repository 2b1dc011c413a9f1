"""Pairs of images in windows: the model held against a plain formulation, and a whole run from simulated files to a folder elsewhere."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from sarfm.cli import main
from sarfm.datasets.catalog import open_dataset
from sarfm.evaluation.contestants import Head
from sarfm.evaluation.predict import open_prediction
from sarfm.evaluation.tallies import load_tallies
from sarfm.flood.simulated_files import simulate_dataset
from sarfm.io.files import carried, read_json
from sarfm.models.kinds import build_encoder
from sarfm.models.networks import build_network
from sarfm.models.weights import load_model
from sarfm.patches.contract import InputContract
from sarfm.runs.folders import model_folder, read_run
from sarfm.runs.parameters import check_parameters, read_preset
from sarfm.scenes.channels import Target
from sarfm.tasks.predictor import Predictor, build_predictor
from sarfm.tasks.tasks import Classes

FLOODING = {"flooding": Classes(Target("flooding", of="tile", classes={0: "not flooded", 1: "flooded"}))}
WINDOW = {"vit-nano": (8, 32), "mixmim-nano": (4, 64)}  # patch and window, px


def classifier(name, tile="change", **options):
    """Make a pair classifier of two channels."""
    torch.manual_seed(0)
    patch, window = WINDOW[name]
    return Head(pair="difference", tile=tile, window_px=window, **options).on(build_encoder(name, 2, patch), FLOODING)


@pytest.mark.parametrize("tile", ["change", "largest_change"])
@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize("name", list(WINDOW))
def test_the_model_is_that_of_the_paper_written_out_window_by_window(name, grid, tile):
    model, side = classifier(name, tile).eval(), WINDOW[name][1]
    image = torch.randn(2, 4, grid[0] * side, grid[1] * side)
    layer = model.classify["flooding"]
    with torch.inference_mode():
        got = model(image)["flooding"]
        for k in range(2):
            changes = []
            for row in range(grid[0]):
                for col in range(grid[1]):
                    window = image[k, :, row * side : (row + 1) * side, col * side : (col + 1) * side]
                    before, after = (model.encoder.features(half[None])[-1].double() for half in window.chunk(2))
                    changes.append((before.mean((2, 3)) - after.mean((2, 3))).abs()[0])
            together = torch.stack(changes).mean(0) if tile == "change" else torch.stack(changes).max(0).values
            wanted = layer.weight.double() @ together + layer.bias.double()
            assert torch.allclose(got[k].double(), wanted, atol=1e-5)


@pytest.mark.parametrize("name", list(WINDOW))
def test_the_last_map_is_the_encoder_s_last_normalised_output(name):
    encoder = build_encoder(name, 2, WINDOW[name][0]).eval()
    top = encoder.features(torch.randn(1, 2, 64, 64))[-1][0].flatten(1)
    assert top.mean(0).abs().max() < 1e-4 and (top.std(0, correction=0) - 1).abs().max() < 1e-2  # LayerNorm, fresh


def test_no_observation_at_either_date_is_no_change_and_leaks_nothing():
    model = classifier("vit-nano").eval()
    valid = torch.rand(2, 64, 64) > 0.3
    valid[:, :32, :32] = False  # a window that nobody saw
    image = torch.randn(2, 4, 64, 64)
    found = [model(image.masked_fill(~valid[:, None], fill), valid)["flooding"] for fill in (0.0, 1e9, float("nan"))]
    assert found[0].isfinite().all() and all(torch.equal(found[0], other) for other in found)
    top = model.maps(image, valid)[-1]
    assert top[:, :, :4, :4].abs().max() < 1e-5 < top[:, :, 4:].abs().max()


@pytest.mark.parametrize("body", [*WINDOW, "unet"])
def test_it_learns_is_built_again_and_refuses_other_sizes(body):
    if body == "unet":
        model = Head(pair="difference", tile="change", window_px=64).on(build_network("unet", 2), FLOODING)
    else:
        model = classifier(body)
    side = model.window_px
    batch = {
        "image": torch.randn(3, 4, 2 * side, side),
        "target_flooding": torch.tensor([0, 1, 255], dtype=torch.uint8),
    }
    loss, terms = model.loss(batch)
    loss.backward()
    assert all(w.grad is not None and w.grad.isfinite().all() and w.grad.any() for w in model.classify.parameters())
    assert loss.isfinite() and "accuracy_flooding" in terms
    again = build_predictor(json.loads(json.dumps(model.config())))
    again.load_state_dict(model.state_dict())
    image = batch["image"][:1]
    assert torch.equal(again.eval()(image)["flooding"], model.eval()(image)["flooding"])
    with pytest.raises(ValueError, match=f"whole windows of {side} px, got {side} x {side * 3 // 2} px"):
        model(torch.randn(1, 4, side, side * 3 // 2))


def test_windows_serve_maps_as_well():
    torch.manual_seed(0)
    tasks = {"flood": Classes(Target("flood", classes={0: "dry", 1: "flooded"}))}
    encoder = build_encoder("vit-nano", 1, 8)
    model = Predictor(encoder, tasks, "linear", pair="difference", window_px=32).eval()
    image = torch.randn(1, 2, 64, 96)
    joined = model.maps(image)[-1]
    alone = model.maps(image[:, :, 32:, 64:])[-1]
    assert torch.allclose(joined[:, :, 4:, 8:], alone, atol=1e-5) and model(image)["flood"].shape == (1, 2, 64, 96)


def test_a_pair_s_contract_gives_the_same_number_for_the_same_backscatter():
    one = InputContract(
        channels=["vh", "vv"], units="dB", quantity="sigma0", mean=[-19, -12], std=[5, 4], patch_size=4, crop_px=128
    )
    both = one.of_pair(512)
    assert both.channels == ["vh@0", "vv@0", "vh@1", "vv@1"] and both.mean == [-19, -12] * 2 and both.crop_px == 512
    fitted = InputContract(
        channels=["vv@0", "vv@1"], units="dB", quantity="sigma0", mean=[-10, -14], std=[3, 5], patch_size=4
    ).of_pair()
    assert (
        fitted.mean == [-12, -12]
        and np.allclose(fitted.std, np.sqrt((9 + 4 + 25 + 4) / 2))
        and fitted.of_pair() == fitted
    )
    with pytest.raises(ValueError, match="same channels of two dates"):
        InputContract(
            channels=["vv@0", "vh@1"], units="dB", quantity="sigma0", mean=[-10, -14], std=[3, 5], patch_size=4
        ).of_pair()


def test_the_preset_is_sound():
    asked = check_parameters("finetune", read_preset("system3_flood", "finetune"))
    assert asked["head"]["window_px"] == 128 and asked["scoring"]["score"] == "flooding.recall_flooded"


# ---------------------------------------------------------------- from files to a folder elsewhere

SMALL = {
    "data.patch_px": 64, "data.stride_px": 64, "crops.crop_px": 64, "crops.workers": 0, "head.window_px": 32, "contestants": ["pretrained", "scratch"],
    "learn.epochs": 0, "learn.steps": 6, "learn.batch_size": 4, "learn.devices": 1, "learn.precision": "32-true", "checkpoint_every": 6, "scoring.draws": 20, "device": "cpu",
}  # fmt: skip


def run(*words, **parameters):
    """Call the command line, and take no failure."""
    given = [
        f"{name}={json.dumps(value) if not isinstance(value, str) else value}" for name, value in parameters.items()
    ]
    assert main([*map(str, words), *(w for pair in given for w in ("-p", pair)), "--quiet"]) == 0


def small_entry(path, name, **change):
    """Copy an entry with other numbers."""
    path.write_text(yaml.safe_dump(yaml.safe_load((carried("data_catalogs") / f"{name}.yaml").read_text()) | change))
    return path


@pytest.fixture
def flood_runs(tmp_path, monkeypatch):
    """Pretrain on single images, and fine-tune on pairs of simulated files."""
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "data"))
    made = {"with": "flood", "sequences": 6, "images": 3, "size_px": 64, "seed": 0}
    entry = small_entry(tmp_path / "flood_simulated.yaml", "flood_simulated", simulate=made)
    cut = {"data.dataset": str(entry), "data.patch_px": 64, "data.stride_px": 64, "crops.crop_px": 32, "device": "cpu"}
    learn = {"learn.steps": 4, "learn.batch_size": 4, "checkpoint_every": 4, "encoder": "vit-nano", "patch_size": 8}
    pretrained = tmp_path / "pretrain"
    run(
        "run",
        "pretrain",
        "--out",
        pretrained,
        **cut,
        **learn,
        **{"data.dates": "scenes", "split.by": "list", "map_page": False},
    )
    fine = {"data.dataset": str(entry), "pretrained": str(pretrained)} | SMALL
    run("run", "finetune", "--preset", "system3_flood", "--out", tmp_path / "finetune", **fine)
    return tmp_path


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*leaves out")
def test_a_pair_classifier_is_tuned_evaluated_and_predicts_elsewhere(flood_runs):
    folder = flood_runs / "finetune"
    model, contract = load_model(model_folder(folder, ""))
    assert contract.channels == ["vv@0", "vh@0", "vv@1", "vh@1"] and contract.mean[:2] == contract.mean[2:]
    assert model.encoder.channels == 2 and contract.crop_px == 64 and model.window_px == 32
    assert read_run(folder)["metrics"].keys() >= {"pretrained@1", "scratch@1"}
    tallies = load_tallies(folder / "tallies.parquet")
    sums = np.stack(list(tallies[tallies["contestant"] == "pretrained"]["sums"])).sum(0).reshape(2, 2)
    scores = pd.read_parquet(folder / "scores.parquet")
    own = scores[(scores["contestant"] == "pretrained") & (scores["target"] == "flooding")].set_index("score")["value"]
    assert own["recall_flooded"] == pytest.approx(sums[1, 1] / sums[1].sum())
    assert own["accuracy"] == pytest.approx(np.trace(sums) / sums.sum())
    if sums[:, 1].sum():
        assert own["precision_flooded"] == pytest.approx(sums[1, 1] / sums[:, 1].sum(), nan_ok=True)

    run("evaluate", folder, "--out", flood_runs / "own")
    again = pd.read_parquet(flood_runs / "own/scores.parquet").set_index("score")["value"]
    assert again["recall_flooded"] == pytest.approx(own["recall_flooded"])

    elsewhere = simulate_dataset(flood_runs / "elsewhere", 3, 3, 64, seed=9, progress=False).parent
    found = open_dataset(
        small_entry(flood_runs / "unseen.yaml", "flood_simulated", simulate=None, access="open", id="unseen"), elsewhere
    )
    run(
        "evaluate",
        folder,
        "--images",
        elsewhere,
        "--out",
        flood_runs / "there",
        dataset=str(flood_runs / "unseen.yaml"),
    )
    table = load_tallies(flood_runs / "there/tallies.parquet")
    truth = {name: int(scene["flooding"]) for name, scene in found.items()}
    assert set(table["scene"]) == set(truth)
    for name, counts in zip(table["scene"], table["sums"], strict=True):
        image, valid = contract.apply(found[name])
        with torch.inference_mode():
            said = int(model.eval()(image[None], valid[None])["flooding"].argmax())
        assert np.asarray(counts).reshape(2, 2)[truth[name], said] == 1 and np.sum(counts) == 1
    assert read_json(flood_runs / "there/evaluate.json")["classes"]["flooded"]["recall"]

    given = {"data_folder": str(elsewhere), "maps": False}
    run("predict", folder, "--scenes", flood_runs / "unseen.yaml", "--out", flood_runs / "predict", **given)
    done = pd.read_parquet(flood_runs / "predict/scenes.parquet")
    assert set(done["status"]) == {"done"} and len(done) == len(truth)
    name, store = done[["scene", "store"]].iloc[0]
    made = open_prediction(flood_runs / "predict" / store)["flooding"].values
    image, valid = contract.apply(found[name])
    assert set(np.unique(made[made != 255])) == {int(model(image[None], valid[None])["flooding"].argmax())}


# ---------------------------------------------------------------- maps of pairs, in folders before, after and mask

PAIR_FOLDER = """
id: my_floods
title: Flood pairs
license: CC0-1.0
crs: none
spacing_m: 10
channels: {vv: {units: "1", quantity: digital_number, nodata: 0}}
targets: {flood: {classes: {0: {name: dry}, 1: {name: flooded}}}}
split: {by: block, blocks: 10}
read: {scenes: "{time}/{scene}.png", times: [before, after], targets: {flood: "mask/{scene}.png"}, recode: {flood: {255: 1}}}
"""


def write_pairs(folder, count, seed):
    """Write pairs of grey images, of which a corner darkens, with their masks."""
    draw = np.random.default_rng(seed)
    for k in range(count):
        wet = np.zeros((32, 32), bool)
        wet[: draw.integers(8, 24), : draw.integers(8, 24)] = True
        before, after = (draw.integers(120, 200, (32, 32), dtype=np.uint8) for _ in range(2))
        images = {"before": before, "after": np.where(wet, after // 4, after), "mask": np.uint8(255 * wet)}
        for kind, pixels in images.items():
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{k:04d}.png")
    (folder / "my_floods.yaml").write_text(PAIR_FOLDER)
    return folder / "my_floods.yaml"


@pytest.mark.soak
def test_a_map_of_pairs_is_tuned_evaluated_and_predicts_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("SARFM_DATA", str(tmp_path / "data"))
    entry, folder = write_pairs(tmp_path / "pairs", 20, 0), tmp_path / "finetune"
    fine = {"data.patch_px": 32, "data.stride_px": 32, "contestants": ["scratch"], "head.head": "linear", "head.pair": "difference",
            "head.window_px": 16, "learn.steps": 80, "learn.rate": 0.003, "checkpoint_every": 80, "scoring.score": "flood.iou_flooded", "scoring.draws": 20,
            "encoder": "vit-nano", "patch_size": 4, "device": "cpu"}  # fmt: skip
    run("run", "finetune", "--out", folder, **fine, **{"data.dataset": str(entry)})
    model, contract = load_model(model_folder(folder, ""))
    assert model.encoder.channels == 1 and contract.channels == ["vv@0", "vv@1"] and len(set(contract.mean)) == 1
    elsewhere = write_pairs(tmp_path / "elsewhere", 3, 5)
    run("evaluate", folder, "--images", elsewhere.parent, "--out", tmp_path / "there")
    sums = np.stack(list(load_tallies(tmp_path / "there/tallies.parquet")["sums"])).sum(0).reshape(2, 2)
    assert sums.sum() == 3 * 32 * 32 and sums[1, 1] / (sums.sum() - sums[0, 0]) > 0.5, sums
    run("predict", folder, "--scenes", elsewhere, "--out", tmp_path / "predict", maps=False)
    counts = np.zeros((2, 2), int)
    for name, scene in open_dataset(elsewhere).items():
        made = open_prediction(tmp_path / f"predict/{name}.zarr")["flood"].values
        np.add.at(counts, (scene["flood"].values, made), 1)
    assert np.array_equal(counts, sums), "predict and evaluate say the same"
