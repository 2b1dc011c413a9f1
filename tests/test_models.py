"""What every model keeps to: any channels, any rectangle, no influence of what was not observed."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predictors import one_target, unet
from torch.nn import functional as F

from sarfm.models.kinds import build_encoder
from sarfm.models.mae import MAE
from sarfm.models.masking import block_mask, random_mask, split_mask, visible_count
from sarfm.models.neck import Neck
from sarfm.models.reconstruction import valid_statistics
from sarfm.models.sizes import encoder_size
from sarfm.models.tokens import pad_to_multiple, patchify, sincos_position, take_tokens, token_validity, unpatchify
from sarfm.models.vit import Block, DecoderAttention, DecoderBlock, Encoder, attended


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_mae(channels=2, patch_size=8, seed=0, **options):
    torch.manual_seed(seed)
    return MAE(Encoder(channels, patch_size, 32, 2, 2), 16, 2, 2, **options)


def with_gap(batch=2, channels=2, height=32, width=48, seed=0):
    """A batch with one patch without, and several with few, valid pixels."""
    image = torch.randn(batch, channels, height, width, generator=seeded(seed))
    valid = torch.rand(batch, height, width, generator=seeded(seed + 1)) > 0.2
    valid[:, :8, 8:16] = False
    valid[0, 16:, :20] = False
    return image, valid


# tokens


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 13),
    patch_size=st.integers(1, 7),
    rows=st.integers(1, 5),
    cols=st.integers(1, 5),
    batch=st.integers(1, 3),
)
def test_patchify_and_back_is_exact(channels, patch_size, rows, cols, batch):
    image = torch.randn(batch, channels, rows * patch_size, cols * patch_size)
    tokens = patchify(image, patch_size)
    assert tokens.shape == (batch, rows * cols, patch_size**2 * channels)
    assert torch.equal(unpatchify(tokens, patch_size, *image.shape[-2:]), image)
    row, col, channel = rows - 1, cols // 2, channels - 1
    one = image[0, channel, row * patch_size : (row + 1) * patch_size, col * patch_size : (col + 1) * patch_size]
    assert torch.equal(tokens[0, row * cols + col].view(patch_size, patch_size, channels)[:, :, channel], one)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="30 x 32 px.*pad_to_multiple"):
        patchify(torch.zeros(1, 2, 30, 32), 8)
    with pytest.raises(ValueError, match="got"):
        unpatchify(torch.zeros(1, 5, 64), 8, 16, 16)


def test_position_is_the_published_formula():
    rows, cols, width = 3, 5, 16
    place = sincos_position(width, rows, cols).numpy()
    omega = 1 / 10_000 ** (np.arange(width // 4) / (width // 4))
    for row, col in itertools.product(range(rows), range(cols)):
        expected = np.concatenate([np.sin(col * omega), np.cos(col * omega), np.sin(row * omega), np.cos(row * omega)])
        np.testing.assert_allclose(place[row * cols + col], expected, atol=1e-6)


def test_position_is_interpolated_over_the_trained_grid():
    assert torch.equal(sincos_position(16, 4, 6, grid=(4, 6)), sincos_position(16, 4, 6))
    fine = sincos_position(64, 12, 12, grid=(4, 4)).view(12, 12, 64)
    coarse = sincos_position(64, 4, 4).view(4, 4, 64)
    assert torch.allclose(fine[1::3, 1::3], coarse, atol=1e-6)  # the middle of three fine patches is the coarse one
    table = F.interpolate(coarse.permute(2, 0, 1)[None], size=(12, 12), mode="bilinear")[0].permute(1, 2, 0)
    slow = slice(8, 16)  # slow waves are nearly straight, so that linear interpolation agrees inside
    assert torch.allclose(fine[2:-2, 2:-2, slow], table[2:-2, 2:-2, slow], atol=0.02)


def test_an_encoder_takes_other_sizes_than_it_was_trained_on():
    encoder = Encoder(2, 8, 32, 2, 2, grid=(4, 4))
    for size in ((32, 32), (64, 24), (8, 80)):
        assert encoder(torch.randn(1, 2, *size)).shape == (1, size[0] * size[1] // 64, 32)


# masks


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"),
    [
        (1024, 0.75, 256),
        (576, 0.60, 230),
        (576, 0.65, 201),
        (576, 0.70, 172),
        (576, 0.75, 144),
        (576, 0.80, 115),
        (576, 0.85, 86),
        (576, 0.90, 57),
        (784, 0.75, 196),
    ],
)
def test_keep_counts(patches, ratio, kept):
    assert visible_count(patches, ratio) == kept
    side = math.isqrt(patches)
    for mask in (random_mask(3, patches, ratio, seeded()), block_mask(3, side, side, ratio, seeded())):
        assert mask.dtype is torch.bool and ((~mask).sum(dim=1) == kept).all()


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, 75, float("nan")])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(ValueError, match="mask ratio"):
        random_mask(1, 16, ratio)


def test_a_ratio_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="leaves none of 4 patches"):
        random_mask(1, 4, 0.9)


@pytest.mark.parametrize("draw", [random_mask, lambda b, n, *rest: block_mask(b, 8, n // 8, *rest)])
def test_masks_come_from_their_generator_alone(draw):
    state = torch.get_rng_state()
    first, again, other = (draw(4, 64, 0.75, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_patch_is_hidden_equally_often():
    for mask in (random_mask(4000, 24, 0.75, seeded()), block_mask(4000, 4, 6, 0.75, seeded(), None, 2)):
        assert (mask.float().mean(dim=0) - 0.75).abs().max() < 0.04


def test_blocks_are_hidden_together():
    neighbours = {}
    for name, mask in {
        "random": random_mask(200, 256, 0.5, seeded()),
        "block": block_mask(200, 16, 16, 0.5, seeded()),
    }.items():
        square = mask.view(-1, 16, 16)
        neighbours[name] = (square[:, :, 1:] == square[:, :, :-1]).float().mean()
    assert neighbours["random"] < 0.55 and neighbours["block"] > 0.8


def test_patches_without_data_are_hidden_first():
    valid = torch.ones(2, 16)
    valid[0, :5] = 0
    valid[1, :14] = 0
    for mask in (random_mask(2, 16, 0.5, seeded(), valid), block_mask(2, 4, 4, 0.5, seeded(), valid)):
        assert mask[0, :5].all() and mask.sum(dim=1).tolist() == [8, 8]
        assert not mask[1, 14:].any()  # too few hold data: all of those are seen


def test_split_mask_keeps_order_and_refuses_ragged_masks():
    mask = random_mask(5, 40, 0.6, seeded())
    visible, hidden = split_mask(mask)
    for row in range(5):
        assert visible[row].tolist() == [i for i in range(40) if not mask[row, i]]
        assert hidden[row].tolist() == [i for i in range(40) if mask[row, i]]
    mask[0] = ~mask[0]
    with pytest.raises(ValueError, match=r"in every tile, got \[16, 24\]"):
        split_mask(mask)


# encoder


def test_last_tokens_only_equals_all_tokens():
    torch.manual_seed(0)
    block, x = DecoderBlock(32, 4), torch.randn(2, 11, 32)
    plain = Block(32, 4)
    plain.load_state_dict(block.state_dict())
    present = attended(torch.rand(2, 11) > 0.3)
    for mask in (None, present):
        assert torch.allclose(block(x, mask, last=4), plain(x, mask)[:, -4:], atol=1e-6)


def test_plain_attention_in_bf16_agrees_with_the_fused_one():
    torch.manual_seed(0)
    attention, x = DecoderAttention(32, 4), torch.randn(2, 9, 32)
    present = attended(torch.rand(2, 9) > 0.3)
    for mask, last in itertools.product((None, present), (None, 3)):
        exact = attention(x, mask, last)
        with torch.autocast("cpu", torch.bfloat16):
            assert (attention(x, mask, last).float() - exact).abs().max() < 0.02


def test_absent_tokens_are_as_good_as_removed():
    image, valid = with_gap(batch=1)
    encoder = build_encoder("vit-nano", 2, 8)
    there = (token_validity(valid, 8) > 0)[0].nonzero()[:, 0][None]
    assert 0 < there.shape[1] < 24
    masked = take_tokens(encoder(image, valid), there)
    assert torch.allclose(masked, encoder(image, valid, there), atol=1e-5)


def test_invalid_values_change_no_output():
    image, valid = with_gap()
    hostile = image.masked_fill(~valid[:, None], float("nan"))
    other = image.masked_fill(~valid[:, None], 1e9)
    encoder = build_encoder("vit-nano", 2, 8)
    models = {
        "encoder": encoder,
        "upernet": one_target(encoder, 3).eval(),
        "linear": one_target(encoder, 3, "linear").eval(),
        "unet": unet(2, 3).eval(),
    }
    for name, model in models.items():
        outputs = [model(x, valid) for x in (image, hostile, other)]
        outputs = [o["label"] if isinstance(o, dict) else o for o in outputs]
        assert outputs[0].isfinite().all() and all(torch.equal(outputs[0], o) for o in outputs[1:]), name


def test_a_scene_without_any_data_gives_finite_tokens():
    encoder = build_encoder("vit-nano", 2, 8)
    image, valid = torch.full((1, 2, 16, 16), float("nan")), torch.zeros(1, 16, 16, dtype=torch.bool)
    assert encoder(image, valid).isfinite().all()


@pytest.mark.parametrize("size", [(16, 28), (32, 8)])
def test_attention_weights_are_those_of_the_ordinary_computation(size):
    torch.manual_seed(1)
    encoder = Encoder(1, 4, 32, 3, 2).eval()
    image, valid = torch.randn(2, 1, *size), torch.rand(2, *size) > 0.2
    valid[:, :4, :8] = False
    tokens, present = encoder.embed(image, None, valid)
    for layer, block in enumerate(encoder.blocks):
        weights = encoder.attention(image, valid, layer)
        assert weights.shape == (2, 2, tokens.shape[1], tokens.shape[1])
        assert torch.allclose(weights.sum(dim=3), torch.ones(weights.shape[:3]), atol=1e-6)
        assert not weights[:, :, :, 1:3].any()  # two patches without a valid pixel
        normed = block.norm1(tokens)
        query, key, value = (x.unflatten(2, (2, 16)).transpose(1, 2) for x in block.attn.qkv(normed).chunk(3, dim=2))
        score = torch.einsum("bhqd,bhkd->bhqk", query, key) / 4
        expected = score.masked_fill(~present, -torch.inf).softmax(dim=3)
        assert torch.allclose(weights, expected, atol=1e-6)
        mixed = torch.einsum("bhqk,bhkd->bqhd", weights, value).flatten(2)
        assert torch.allclose(block.attn.proj(mixed), block.attn(normed, present), atol=1e-5)  # by the fused form
        tokens = block(tokens, present)
    assert torch.equal(encoder.attention(image, valid), weights)
    with pytest.raises(ValueError, match="layer in -3..2, got 3"):
        encoder.attention(image, layer=3)


def test_every_parameter_belongs_to_a_layer():
    encoder = Encoder(1, 4, 32, 3, 2)
    found = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert set(found.values()) == {0, 1, 2, 3, 4} and found["embed.project.weight"] == found["embed.class_token"] == 0
    assert found["blocks.0.norm1.weight"] == 1 and found["blocks.2.mlp.fc2.bias"] == 3 and found["norm.bias"] == 4


def test_necks_give_four_resolutions_from_any_maps():
    for maps in ([(8, 16)] * 4, [(8, 4), (16, 8), (24, 16), (32, 32)], [(8, 4), (8, 8), (8, 8), (8, 8)]):
        neck = Neck(maps)
        features = [torch.randn(1, width, 64 // stride, 96 // stride) for width, stride in maps]
        assert [m.shape[2:] for m in neck(features)] == [(64 // s, 96 // s) for s in (4, 8, 16, 32)]
        assert [m.shape[1] for m in neck(features)] == list(neck.widths) and neck.strides_px == (4, 8, 16, 32)
    with pytest.raises(ValueError, match="four maps of .width, stride_px., fine to coarse"):
        Neck([(8, 32), (8, 16), (8, 8), (8, 4)])


def test_features_are_maps_of_four_layers():
    encoder = Encoder(1, 4, 32, 6, 2)
    maps = encoder.features(torch.randn(2, 1, 16, 28))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 7)] * 4
    one = encoder.features(torch.ones(1, 1, 16, 28), layers=[5])[0]
    assert torch.allclose(one.flatten(2).transpose(1, 2), encoder(torch.ones(1, 1, 16, 28)), atol=1e-6)


def test_encoders_are_known_by_name():
    sizes = {"vit-nano": 0.8e6, "vit-tiny": 5.4e6, "vit-small": 21.4e6, "vit-base": 85.6e6}
    for name, expected in sizes.items():
        count = sum(p.numel() for p in build_encoder(name, 2).parameters())
        assert abs(count / expected - 1) < 0.1, (name, count)
    assert encoder_size("vit-huge").settings["width"] == 1280 and encoder_size("swin-tiny").batch_size > 0
    with pytest.raises(ValueError, match="vit-huge"):
        build_encoder("vit-giant", 2)
    with pytest.raises(ValueError, match="expected 2 channels, got 3"):
        build_encoder("vit-nano", 2, 8)(torch.zeros(1, 3, 16, 16))


# MAE


@pytest.mark.parametrize("channels", [1, 2, 5, 12])
@pytest.mark.parametrize("size", [(32, 32), (24, 56)])
@pytest.mark.parametrize("masking", ["random", "block"])
def test_any_channels_any_rectangle(channels, size, masking):
    model = small_mae(channels, masking=masking)
    batch = model.draw({"image": torch.randn(2, channels, *size)}, seeded())
    loss, parts = model.loss(batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert parts["prediction"].shape == (2, int(batch["hidden"][0].sum()), 64 * channels)


def test_bf16_autocast_is_near_fp32():
    image, valid = with_gap()
    for options in ({}, {"norm_pix": True}):
        model = small_mae(**options)
        batch = model.draw({"image": image, "valid": valid}, seeded())
        exact = model.loss(batch)[0]
        with torch.autocast("cpu", torch.bfloat16):
            loss, parts = model.loss(batch)
        loss.backward()
        assert loss.dtype is torch.float32 and abs(loss - exact) < 0.02 * exact


@pytest.mark.parametrize("norm_pix", [False, True])
def test_invalid_values_change_neither_loss_nor_gradient_nor_picture(norm_pix):
    image, valid = with_gap()
    results = []
    for fill in (0.0, 7.0, float("nan"), float("inf")):
        model = small_mae(norm_pix=norm_pix)
        filled = image.masked_fill(~valid[:, None], fill)
        batch = model.draw({"image": filled, "valid": valid}, seeded())
        loss = model.loss(batch)[0]
        loss.backward()
        pictures = model.pictures(filled, valid, hidden=batch["hidden"])
        results.append((loss, model.encoder.embed.project.weight.grad, *pictures.values()))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))
    assert results[0][0].isfinite()


def test_the_loss_is_over_hidden_valid_pixels():
    image, valid = with_gap()
    model = small_mae()
    batch = model.draw({"image": image, "valid": valid}, seeded())
    loss, _ = model.loss(batch)
    pictures = model.pictures(image, valid, hidden=batch["hidden"])
    hidden = unpatchify(batch["hidden"][:, :, None].expand(-1, -1, 64).float(), 8, 32, 48).bool()[:, 0]
    counted = (hidden & valid)[:, None].expand_as(image)
    assert torch.equal(pictures["prediction"].isfinite(), counted)
    expected = ((pictures["prediction"] - image)[counted] ** 2).mean()
    assert torch.allclose(loss, expected, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"norm_pix": True}, {"error": "l1"}, {"missing": 255.0}])
def test_a_batch_that_says_nothing_of_holes_has_the_loss_of_one_without_holes(options):
    image, found = torch.randn(2, 2, 32, 48, generator=seeded()), []
    for valid in (None, torch.ones(2, 32, 48, dtype=torch.bool)):
        model = small_mae(**options)
        loss, parts = model.loss(model.draw({"image": image, "valid": valid}, seeded()))
        loss.backward()
        found.append((loss, parts["patch_loss"], model.encoder.embed.project.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_norm_pix_measures_valid_pixels_only():
    patches = torch.randn(2, 5, 96)
    mean, spread = valid_statistics(patches, torch.ones_like(patches))
    assert torch.allclose(mean, patches.mean(dim=-1, keepdim=True), atol=1e-6)
    assert torch.allclose(spread, (patches.var(dim=-1, keepdim=True) + 1e-6) ** 0.5, atol=1e-6)
    weight = (torch.rand(2, 5, 96) > 0.4).float()
    mean, spread = valid_statistics(patches * weight, weight)
    for tile, patch in itertools.product(range(2), range(5)):
        values = patches[tile, patch][weight[tile, patch] > 0]
        assert torch.allclose(mean[tile, patch, 0], values.mean(), atol=1e-6)
        assert torch.allclose(spread[tile, patch, 0], (values.var() + 1e-6) ** 0.5, atol=1e-6)
    assert all(s.isfinite().all() for s in valid_statistics(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)))


def test_a_zero_predictor_scores_one_with_norm_pix():
    model = small_mae(channels=1, norm_pix=True)
    for part in model.decoder.head.parameters():
        part.data.zero_()
    loss, _ = model.loss(model.draw({"image": 5 + 3 * torch.randn(4, 1, 64, 64)}, seeded()))
    assert abs(loss.item() - 63 / 64) < 1e-4  # the variance is the unbiased one of 64 pixels


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_prediction_gives_the_image_back(norm_pix, monkeypatch):
    image, valid = with_gap()
    model = small_mae(norm_pix=norm_pix)
    batch = model.draw({"image": image, "valid": valid}, seeded())
    target = model.loss(batch)[1]["target"]
    monkeypatch.setattr(model, "predict", lambda *_: target)
    pictures = model.pictures(image, valid, hidden=batch["hidden"])
    everywhere = valid[:, None].expand_as(image)
    assert torch.allclose(pictures["reconstruction"][everywhere], image[everywhere], atol=1e-5)
    assert pictures["reconstruction"][~everywhere].isnan().all()
    shown = pictures["masked"].isfinite()
    assert torch.equal(pictures["masked"][shown], image[shown])
    assert model.loss(batch)[0] == 0


def test_a_batch_without_hidden_data_has_no_loss_and_no_nan():
    model = small_mae()
    valid = torch.zeros(2, 32, 32, dtype=torch.bool)
    batch = model.draw({"image": torch.full((2, 2, 32, 32), float("nan")), "valid": valid}, seeded())
    loss, _ = model.loss(batch)
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_same_seed_gives_the_same_loss_and_another_mask_another():
    image = torch.randn(2, 2, 32, 32)
    losses = []
    for seed in (0, 0, 1):
        model = small_mae(seed=5)
        losses.append(model.loss(model.draw({"image": image}, seeded(seed)))[0].item())
    assert losses[0].hex() == losses[1].hex() and losses[0] != losses[2]


def test_unknown_options_are_refused():
    encoder = build_encoder("vit-nano", 2, 8)
    with pytest.raises(ValueError, match="Choose random or block"):
        MAE(encoder, masking="blocks")
    with pytest.raises(ValueError, match="decoder width divisible"):
        MAE(encoder, decoder_width=100, decoder_heads=16)
    with pytest.raises(ValueError, match="mask ratio"):
        MAE(encoder, mask_ratio=1.0)


class LooksAtTheDevice(MAE):
    """A method that asks the device for a number."""

    def draw(self, batch, generator=None):
        bool(batch["image"].isfinite().all())
        return super().draw(batch, generator)


def a_step(method, valid=True):
    """Draw, lose and learn on tensors without values: whoever asks for one is refused."""
    with torch.device("meta"):
        model = method(Encoder(2, 8, 32, 2, 2), 16, 2, 2, norm_pix=True)
        batch = {"image": torch.empty(3, 2, 32, 48)}
        if valid:
            batch["valid"] = torch.empty(3, 32, 48, dtype=torch.bool)
    for masking in ("random", "block"):
        model.masking = masking
        loss, parts = model.loss(model.draw(batch, seeded()))
        loss.backward()
        model.stepped(1, 10)
    assert loss.device.type == "meta" and parts["prediction"].shape == (3, 18, 128)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("valid", [True, False])
def test_a_step_asks_the_device_for_nothing(valid):
    a_step(MAE, valid)


def test_the_test_would_see_a_question():
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta"):
        a_step(LooksAtTheDevice)


def test_a_count_that_is_not_the_mask_s_is_refused():
    model = small_mae()
    batch = model.draw({"image": torch.randn(1, 2, 32, 32)}, seeded())
    assert batch["visible"] == 4
    with pytest.raises(ValueError, match="expected 4 visible patches of 16, the mask leaves 8"):
        model.loss(batch | {"hidden": random_mask(1, 16, 0.5, seeded())})


def test_a_batch_that_leaves_valid_out_is_one_that_is_whole():
    image, model = torch.randn(2, 2, 32, 32), small_mae()
    ones = torch.ones(2, 32, 32, dtype=torch.bool)
    for options in ({}, {"missing": 255.0}):
        model = small_mae(**options)
        losses = [model.loss(model.draw({"image": image, **more}, seeded()))[0] for more in ({}, {"valid": ones})]
        assert torch.equal(*losses)


# windowed


def windowed(channels=2):
    torch.manual_seed(0)
    return build_encoder("swin-nano", channels).eval()


@pytest.mark.parametrize(("channels", "size"), [(1, (32, 32)), (3, (96, 64)), (12, (32, 160))])
def test_a_windowed_encoder_takes_any_channels_and_rectangle(channels, size):
    encoder = windowed(channels)
    maps = encoder.features(torch.randn(2, channels, *size))
    assert [tuple(m.shape[1:]) for m in maps] == [(w, size[0] // s, size[1] // s) for w, s in encoder.maps]
    with pytest.raises(ValueError, match="divisible by the patch size 32"):
        encoder(torch.randn(1, channels, 48, 64))


def test_what_a_windowed_encoder_does_not_see_has_no_say():
    encoder, image = windowed(), torch.randn(1, 2, 96, 128)
    valid = torch.ones(1, 96, 128, dtype=torch.bool)
    valid[:, 40:, 50:] = False
    outputs = [encoder.features(image.masked_fill(~valid[:, None], f), valid) for f in (0.0, 1e6, float("nan"))]
    for other in outputs[1:]:
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(outputs[0], other, strict=True))
    whole = encoder.features(image.masked_fill(~valid[:, None], 0.0))
    assert not torch.allclose(whole[0][:, :, :8, :8], outputs[0][0][:, :, :8, :8]) or not torch.equal(
        whole[-1], outputs[0][-1]
    )  # zeros that are taken for data do have a say


def test_a_plain_swin_layer_is_timm_s():
    from timm.models.swin_transformer import SwinTransformerBlock

    from sarfm.models.windowed import WindowBlock, window_bias

    for shifted in (False, True):
        torch.manual_seed(0)
        ours = WindowBlock(32, 4, 4, shifted)
        theirs = SwinTransformerBlock(32, (12, 16), 4, window_size=4, shift_size=2 * shifted)
        theirs.load_state_dict(ours.state_dict())
        x, everywhere = torch.randn(2, 12, 16, 32), torch.ones(2, 12, 16, dtype=torch.bool)
        assert torch.allclose(ours(x, window_bias(everywhere, 4, ours.shift)), theirs(x), atol=1e-5)


def test_heads_and_layer_decay_take_a_windowed_encoder():
    encoder = windowed()
    for head in ("upernet", "linear"):
        model = one_target(encoder, 3, head, 16).train()
        logits = model(torch.randn(2, 2, 50, 70), torch.rand(2, 50, 70) > 0.1)["label"]
        assert logits.shape == (2, 3, 50, 70)
        logits.square().mean().backward()
    layers = {encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert layers == set(range(encoder.depth + 2))


# heads


@pytest.mark.parametrize("size", [(32, 32), (50, 61), (24, 8)])
def test_heads_give_logits_for_every_pixel_of_any_size(size):
    encoder = build_encoder("vit-nano", 3, 8)
    for model in (one_target(encoder, 5), one_target(encoder, 5, "linear"), unet(3, 5)):
        model.eval()
        logits = model(torch.randn(2, 3, *size), torch.rand(2, *size) > 0.1)["label"]
        assert logits.shape == (2, 5, *size) and logits.isfinite().all() and logits.dtype is torch.float32


def test_heads_train_through_to_the_encoder():
    for head in ("upernet", "linear"):
        model = one_target(build_encoder("vit-nano", 2, 8), 3, head)
        model(torch.randn(2, 2, 32, 32))["label"].square().mean().backward()
        assert model.encoder.embed.project.weight.grad.abs().sum() > 0
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing, missing


def test_padding_is_not_observed():
    image, valid = pad_to_multiple(torch.ones(1, 2, 5, 8), None, 4)
    assert image.shape == (1, 2, 8, 8) and valid.sum() == 40 and not valid[0, 5:].any()
    same, none = pad_to_multiple(image, None, 4)
    assert same is image and none is None


def test_one_tile_at_a_time_is_refused_by_batch_normalisation():
    model = one_target(build_encoder("vit-nano", 2, 8), 3)
    with pytest.raises(ValueError, match="at least 2 tiles"):
        model(torch.randn(1, 2, 32, 32))
    model.eval()(torch.randn(1, 2, 32, 32))


def test_unknown_heads_and_networks_are_refused():
    with pytest.raises(ValueError, match="upernet, linear"):
        one_target(build_encoder("vit-nano", 2, 8), 3, "setr")
    with pytest.raises(ValueError, match="resnet18"):
        unet(2, 3, "resnet1800")


def test_gradients_are_the_same_bits_every_time_with_several_threads():
    torch.manual_seed(0)
    model = MAE(build_encoder("vit-nano", 8, 8), 128, 2, 4)
    batch = model.draw({"image": torch.randn(32, 8, 48, 48)}, torch.Generator().manual_seed(1))
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        for _ in range(8):
            model.zero_grad()
            model.loss(batch)[0].backward()
            found.append({name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None})
    finally:
        torch.set_num_threads(threads)
    assert not [name for name in found[0] if not all(torch.equal(found[0][name], again[name]) for again in found)]
