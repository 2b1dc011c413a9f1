"""Attention maps and the number for emergent segmentation, held against plain computations."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sarfm.datasets.catalog import open_dataset
from sarfm.evaluation.attention import (
    SceneAttention,
    layer_attention,
    patch_grid,
    pick_heads,
    query_maps,
    rollout,
    top_mass,
)
from sarfm.evaluation.emergent import (
    PatchMasks,
    backscatter_maps,
    chance_overlaps,
    emergent_scores,
    encoder_maps,
    overlaps,
    patch_masks,
)
from sarfm.models.kinds import build_encoder
from sarfm.patches.contract import InputContract


def scene_and_contract(y=192, x=400):
    scene = open_dataset("borneo")["borneo"].isel(time=[0], y=slice(0, y), x=slice(0, x)).load()
    said = {k: scene["vv"].attrs[k] for k in ("units", "quantity")}
    numbers = {"mean": [-9.0, -15.0], "std": [3.0, 3.0]}
    return scene, InputContract(channels=["vv@0", "vh@0"], patch_size=8, crop_px=64, **said, **numbers)


# ---- the weights ------------------------------------------------------------------------------------------------------


def float64_weights(encoder, image, valid, layer):
    """Write a plain transformer's attention down from its matrices, token by token, in float64."""
    encoder = encoder.double()
    tokens, present = encoder.embed(image.double(), None, valid)
    keep = torch.ones(tokens.shape[:2], dtype=torch.bool) if present is None else present[:, 0, 0]
    for number, block in enumerate(encoder.blocks):
        x = F.layer_norm(tokens, tokens.shape[2:], block.norm1.weight, block.norm1.bias, 1e-6)
        q, k, v = (x @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, 2)
        width = q.shape[2] // block.attn.num_heads
        weights = []
        for head in range(block.attn.num_heads):
            part = slice(head * width, (head + 1) * width)
            score = q[..., part] @ k[..., part].transpose(1, 2) / width**0.5
            power = score.exp() * keep[:, None]
            weights.append(power / power.sum(2, keepdim=True))
        if number == layer:
            return torch.stack(weights, 1)
        tokens = block(tokens, present)


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("holes", [False, True])
def test_maps_are_those_of_the_matrices(layer, holes):
    torch.manual_seed(1)
    encoder = build_encoder("vit-nano", 2, 8).eval()
    image, valid = torch.randn(2, 2, 40, 24), torch.ones(2, 40, 24, dtype=torch.bool)
    if holes:
        valid[0, :16], image[0, :, :16] = False, 1e6
    table = layer_attention(encoder, image, valid, layer)
    slow = float64_weights(encoder, image.masked_fill(~valid[:, None], 0), valid, layer)
    assert table.grid == (5, 3) and table.first == 1 and torch.allclose(table.weights.double(), slow, atol=1e-5)
    shares = slow[:, :, 0, 1:] / slow[:, :, 0, 1:].sum(2, keepdim=True)
    assert torch.allclose(query_maps(table).flatten(2).double(), shares, atol=1e-5)
    asking = valid[:, ::8, ::8].flatten(1)
    for one in range(2):  # only patches that were observed ask
        mean = slow[one][:, 1:, 1:][:, asking[one]].mean(1)
        assert torch.allclose(
            query_maps(table, "received")[one].flatten(1).double(), mean / mean.sum(1, keepdim=True), atol=1e-5
        )


def test_windowed_weights_mix_values_as_the_layer_does():
    """Each layer of each stage, shifted ones too, on a map that no window divides and with a hole."""
    torch.manual_seed(2)
    encoder = build_encoder("swin-nano", 2).eval()
    image, valid = torch.randn(2, 2, 96, 160), torch.ones(2, 96, 160, dtype=torch.bool)
    valid[1, 20:, 60:] = False
    seen = []
    for stage, layers in enumerate(encoder.stages):
        for block in layers:

            def note(module, given, out, stage=stage):
                seen.append(
                    (
                        stage,
                        given[0].detach(),
                        given[1],
                        module.attend(module.norm1(given[0]), given[1]).detach(),
                        module,
                    )
                )

            block.register_forward_hook(note)
    encoder.features(image, valid)
    for number, (stage, x, _, mixed, block) in enumerate(list(seen)):
        weights = encoder.attention(image, valid, number).detach()
        assert (
            weights.shape[-1] == x.shape[1] * x.shape[2] and layer_attention(encoder, image, valid, number).first == 0
        )
        value = block.attn.qkv(block.norm1(x)).chunk(3, 3)[2].flatten(1, 2).unflatten(2, (block.attn.num_heads, -1))
        slow = block.attn.proj(torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)).unflatten(1, x.shape[1:3])
        there = F.max_pool2d(valid[:, None].float(), 4 * 2**stage)[:, 0] > 0
        assert torch.allclose(slow[there], mixed[there], atol=1e-4), (stage, number)


def test_tokens_before_the_patches_are_found():
    class Some:
        def __init__(self, *strides):
            self.maps = tuple((8, s) for s in strides)

    assert patch_grid(Some(16, 16), (448, 448), 784) == (28, 28)
    assert patch_grid(Some(16, 16), (448, 448), 784 + 5) == (28, 28)  # a class token and four registers
    assert patch_grid(Some(4, 8, 16, 32), (64, 96), 24) == (4, 6)
    assert patch_grid(Some(4, 8, 16, 32), (64, 96), 96) == (8, 12)
    with pytest.raises(ValueError, match="fits none of its strides"):
        patch_grid(Some(16), (64, 64), 12)


# ---- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mass", [0.2, 0.6, 0.9, 1.0])
def test_threshold_keeps_what_a_loop_keeps(mass):
    maps = torch.rand(40, 5, 7, generator=torch.Generator().manual_seed(3)) ** 2
    maps = maps / maps.sum((1, 2), keepdim=True)
    maps[0] = 1 / 35
    for one, kept in zip(maps.double().numpy(), top_mass(maps, mass).numpy(), strict=True):
        order, held, wanted = np.argsort(-one, axis=None), 0.0, set()
        for at in order:  # heaviest first, until the mass is held, or all of it
            if mass < 1 and held >= mass * one.sum() - 1e-9:
                break
            held += one.flat[at]
            wanted.add(int(at))
        assert kept.sum() == len(wanted) and one[kept].sum() >= mass * one.sum() - 1e-6
        assert one[kept].min() >= (one[~kept].max() if (~kept).any() else 0)


def test_rollout_of_one_layer_is_half_of_it_and_half_the_token():
    torch.manual_seed(4)
    encoder = build_encoder("vit-nano", 1, 8)
    encoder.blocks, encoder.depth = encoder.blocks[:1], 1
    image = torch.randn(1, 1, 24, 24)
    own = encoder.attention(image).mean(1)[0]
    assert torch.allclose(rollout(encoder.eval(), image).weights[0, 0], own / 2 + torch.eye(10) / 2, atol=1e-6)


def test_heads_are_picked_once_each():
    maps = torch.rand(6, 4, 4)
    chosen = pick_heads(maps / maps.sum((1, 2), keepdim=True), 9)
    assert sorted(chosen) == list(range(6))


# ---- scenes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 80), (57, 91)])
@pytest.mark.parametrize("encoder", ["vit-nano", "mixmim-nano"])
def test_maps_lie_on_the_scene(encoder, size):
    torch.manual_seed(5)
    scene, contract = scene_and_contract(*size)
    scene["vv"][0, 8:40, 16:48] = np.nan
    look = SceneAttention(build_encoder(encoder, 2, 8 if encoder == "vit-nano" else 1), contract, scene)
    found = look.dataset(mass=0.6, heads=[1, 3])
    assert found["attention"].shape == (2, *size) and list(found["head"].values) == [1, 3]
    assert found.rio.crs == scene.rio.crs and found.rio.bounds() == scene.rio.bounds()
    assert found.attrs["query"] == ("class" if encoder == "vit-nano" else "received") and look.stride_px == 8
    hole = np.zeros(size, bool)
    hole[8:40, 16:48] = True
    assert np.isnan(found["attention"].values[:, hole]).all() and np.isfinite(found["attention"].values[:, ~hole]).all()
    assert not found["kept"].values[:, hole].any()
    for number in (0, 5):
        row, column = divmod(number, look.table.grid[1])
        assert look.alike((row, column))[row, column] == pytest.approx(1, abs=1e-5)


def test_what_stands_where_nothing_was_observed_changes_no_map():
    scene, contract = scene_and_contract(64, 64)
    torch.manual_seed(6)
    encoder, maps = build_encoder("vit-nano", 2, 8), []
    for value in (np.nan, np.inf):
        scene["vv"][0, :24] = value
        look = SceneAttention(encoder, contract, scene)
        maps.append((look.maps().numpy(), look.alike((5, 5))))
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*maps, strict=True))


# ---- emergent segmentation ----------------------------------------------------------------------------------------------


def disks(n=24, side=64):
    """Draw bright disks at random places on speckle; the label is the disk."""
    generator = torch.Generator().manual_seed(7)
    rows, cols = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centre = torch.rand(n, 2, generator=generator) * 32 + 16
    label = ((rows - centre[:, 0, None, None]) ** 2 + (cols - centre[:, 1, None, None]) ** 2 < 196).to(torch.uint8)
    image = torch.randn(n, 1, side, side, generator=generator) + 3.0 * label[:, None]
    return image, torch.ones(n, side, side, dtype=torch.bool), label


def test_a_planted_object_is_found_by_brightness_and_not_by_masks_of_other_images():
    image, valid, label = disks()
    masks = patch_masks(backscatter_maps(8), image, valid, label, 2)
    scores = emergent_scores(masks, ["ground", "disk"]).set_index("class").loc["disk"]
    assert scores["iou"] > 0.5 and scores["above_low"] > 0.3 and scores["heads"] == [0]
    assert scores["swapped"] < scores["iou"] - 0.2 and scores["chance"] < 0.2


def test_scores_are_those_of_pixels_and_heads_chosen_by_hand():
    torch.manual_seed(8)
    image, valid, label = disks(6)
    masks = patch_masks(encoder_maps(build_encoder("vit-nano", 1, 8)), image, valid, label, 2, batch=4)
    kept = np.kron(masks.kept.reshape(6, 4, 8, 8), np.ones((8, 8))).astype(bool)
    truth = label.numpy() == 1
    both = (kept & truth[:, None]).sum((2, 3))
    either = (kept | truth[:, None]).sum((2, 3))
    assert np.array_equal(overlaps(masks).both[:, :, 1], both) and np.array_equal(
        overlaps(masks).either[:, :, 1], either
    )
    total = [0, 0]
    for one in range(6):  # every image is a fold
        others = [n for n in range(6) if n != one]
        head = (both[others].sum(0) / either[others].sum(0)).argmax()
        total = total[0] + both[one, head], total[1] + either[one, head]
    scores = emergent_scores(masks, ["ground", "disk"], share=(0.0, 1.0), folds=6)
    assert scores["iou"][1] == pytest.approx(total[0] / total[1])


def test_no_image_has_a_say_in_the_head_that_it_is_scored_with():
    """Of two heads each is right on one image only: chosen on the other image, both are wrong."""
    truth = np.zeros((2, 2, 4))
    truth[:, 0, :2] = truth[:, 1, 2:] = 1
    kept = np.zeros((2, 2, 4), bool)
    kept[0, 0, :2] = kept[1, 1, :2] = kept[0, 1, 2:] = kept[1, 0, 2:] = True
    scores = emergent_scores(PatchMasks(kept, truth, np.ones((2, 4), bool)), ["a", "b"])
    assert scores["iou"].tolist() == [0, 0] and scores["chance"].tolist() == [1 / 3, 1 / 3]


def test_chance_is_what_shuffled_patches_give():
    image, valid, label = disks(8)
    valid[:, :16] = False
    masks = patch_masks(backscatter_maps(8), image, valid, label, 2)
    generator, drawn = np.random.default_rng(9), []
    for _ in range(400):
        kept = np.zeros_like(masks.kept)
        for one in range(8):
            there = np.flatnonzero(masks.present[one])
            kept[one][:, there] = masks.kept[one][:, generator.permutation(there)]
        drawn.append(overlaps(PatchMasks(kept, masks.counts, masks.present)).both)
    expected = chance_overlaps(masks)
    assert np.allclose(np.mean(drawn, 0), expected.both, atol=5 * np.std(drawn, 0).max() / 20)


def test_one_group_is_refused():
    image, valid, label = disks(3)
    masks = patch_masks(backscatter_maps(8), image, valid, label, 2)
    with pytest.raises(ValueError, match="two groups"):
        emergent_scores(masks, ["ground", "disk"], ["a", "a", "a"])
