"""System 2's published settings as presets, its claims as a table, and a small comparison by the same parameters."""

import pandas as pd
import pytest
import torch

from sarfm.evaluation.report import load_published
from sarfm.models.kinds import build_encoder, build_method
from sarfm.models.weights import load_model
from sarfm.runs.notebooks import run_notebook
from sarfm.runs.parameters import check_parameters, preset_names, read_preset
from sarfm.train.steps import Recipe

PRESETS = {"system2_pretrain": "pretrain", "system2_vegetation": "finetune", "system2_landcover": "finetune"}


def parameters(name):
    return check_parameters(PRESETS[name], read_preset(name, PRESETS[name]))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_what_was_published_of_the_optimiser_and_the_crops(name):
    assert name in preset_names()
    said = parameters(name)
    recipe = Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in said["learn"].items()}).over(3000)
    assert {recipe.rate_at(step) for step in range(0, recipe.steps, 997)} == {1.5e-4} and recipe.warmup_steps == 0
    assert recipe.betas == (0.9, 0.999) and recipe.weight_decay == 0.01 and recipe.decay_all
    assert (
        recipe.layer_decay == 1 and recipe.precision == "32-true" and recipe.clip_norm == 0 and recipe.batch_size == 8
    )
    assert recipe.steps == (75 if name == "system2_pretrain" else 100) * 3000 / 8
    optimiser, plain = recipe.optimiser(torch.nn.Linear(2, 2)), torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    (own,), (usual,) = optimiser.param_groups, plain.param_groups
    assert {k: own[k] for k in ("betas", "eps", "weight_decay")} == {
        k: usual[k] for k in ("betas", "eps", "weight_decay")
    }
    assert said["data"]["patch_px"] == said["crops"]["crop_px"] == 448 and not said["crops"]["symmetries"]
    assert said["crops"]["resized_area"] == ([0.08, 1.0] if name == "system2_pretrain" else [])
    assert said["data"]["dataset"] == "m3leo_s1grd"


def test_the_pretraining_preset_makes_the_published_model():
    said = parameters("system2_pretrain")
    with torch.device("meta"):
        body = build_encoder(said["encoder"], 12, said["patch_size"], said["drop_path"], said["positions"], (28, 28))
        model = build_method(said["method"], body, said["settings"])
    image = torch.zeros(1, 12, 448, 448)
    drawn = model.draw({"image": image})
    assert drawn["visible"] == 195 and drawn["hidden"].sum() == 589
    assert body.embed.positions.shape == (785, 768) and (body.depth, body.heads) == (12, 12)
    assert (model.decoder.width, model.decoder.depth, model.decoder.heads) == (512, 1, 16)
    assert model.decoder.head.out_features == 3072 and not model.norm_pix and model.error == "mse"


def test_the_fine_tuning_presets_choose_the_published_heads():
    trees, land = (parameters(name) for name in ("system2_vegetation", "system2_landcover"))
    assert trees["head"]["tile"] == "tokens" and trees["head"]["tile_elu"]
    assert trees["losses"] == {"tree_cover_mean": "rmse"} and trees["tasks"] == {"tree_cover_mean": "number"}
    assert (
        land["head"]["head"] == "setr-pup-half" and land["head"]["width"] == 256 and land["head"]["legacy_logits_act"]
    )
    assert land["tasks"] == {"land_cover": "classes"}
    for said in (trees, land):
        assert said["fractions"] == [0.001, 0.01, 0.1, 1.0] and said["contestants"] == ["pretrained", "scratch"]
        assert said["scoring"]["batch"] == 8 and said["scoring"]["unit"] == "patch" and said["seeds"] == [42]


def test_the_claims_are_marked_as_copied_and_are_no_scores():
    table = load_published("system2")
    assert table["copied"].all() and "no table of scores is public" in table["source"].iloc[0]
    saved = table.set_index(["task", "region"])["value"].to_dict()
    assert saved == {
        ("tree cover", "Europe"): 0.9, ("tree cover", "South America"): 0.9,
        ("land cover", "Europe"): 0.6, ("land cover", "South America"): 0.9,
    }  # fmt: skip


def test_random_features_enter_a_comparison_like_any_network(tmp_path):
    given = {
        "contestants": ["scratch", "rcf"], "positions": "learned", "crops.symmetries": False, "learn.epochs": 1.5,
        "learn.batch_size": 6, "learn.checkpoint_layers": True, "head.head": "setr-pup-half", "head.width": 8,
        "scoring.batch": 4, "scoring.unit": "patch", "scoring.draws": 20,
    }  # fmt: skip
    run_notebook("finetune", given, tmp_path / "f", progress=False)
    means = pd.read_parquet(tmp_path / "f/batch_means.parquet")
    assert (
        set(means["contestant"]) == {"scratch", "rcf"} and set(means["batch"]) == {4} and set(means["batches"]) == {3}
    )
    history = pd.read_parquet(tmp_path / "f/history.parquet")
    assert len(history) == 2 * 5  # 1.5 passes over 18 patches in steps of 6
    scratch, features = (load_model(tmp_path / "f/models" / who)[0] for who in ("scratch", "rcf"))
    assert scratch.encoder.positions == "learned" and scratch.encoder.grid == (6, 6)
    assert features.network.weight.shape == (128, 8, 3, 3)
    expected = torch.randn(128, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(features.network.weight, expected) and (features.network.spread != 1).all()
