"""MixMAE computes what its plain formulation computes, and its weights are the published ones."""

import math

import pytest
import torch
from timm.models.swin_transformer import window_partition, window_reverse
from torch.nn import functional as F

from sarfm.models.kinds import build, build_encoder, build_method, describe
from sarfm.models.mixmae import MixMAE
from sarfm.models.pixel_weights import backscatter_weights
from sarfm.models.sizes import encoder_size
from sarfm.models.tokens import patchify, sincos_position
from sarfm.models.windowed import SwinEncoder
from sarfm.patches.contract import InputContract


def small(channels=2, **options):
    torch.manual_seed(0)
    sizes = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4}
    return build_method("mixmae", build_encoder("mixmim-nano", channels, 4), sizes | options).double()


def plain_layer(layer, x, m, side):
    """Attend in windows with a mask of -1e30 between tokens of different images, as the method is written down."""
    batch, height, width, _ = x.shape
    windows = window_partition(layer.norm1(x), (side, side)).flatten(1, 2)
    of = window_partition(m.expand(batch, height, width, 1), (side, side)).flatten(1)  # (B*windows, n)
    attention = layer.attn
    q, k, v = attention.qkv(windows).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    score = (q * attention.scale) @ k.transpose(2, 3)
    table, index = attention.relative_position_bias_table, attention.relative_position_index
    score = score + table[index.flatten()].view(side**2, side**2, -1).permute(2, 0, 1)
    score = score.masked_fill((of[:, :, None] != of[:, None, :])[:, None], -1e30)
    mixed = attention.proj((score.softmax(3) @ v).transpose(1, 2).flatten(2)).unflatten(1, (side, side))
    x = x + window_reverse(mixed, (side, side), height, width)
    return x + layer.mlp(layer.norm2(x))


def plain_loss(model, image, hidden, weights=None):
    """Compute the loss as it is written down: both copies of all tokens through the decoder, then unmixed."""
    encoder, decoder, p = model.encoder, model.decoder, model.encoder.stride_px
    rows, cols = image.shape[2] // p, image.shape[3] // p
    at = lambda times: (
        hidden.view(1, rows, cols, 1).repeat_interleave(times, 1).repeat_interleave(times, 2).to(image.dtype)
    )
    h = encoder.embed(patchify(image, 4)).unflatten(1, (rows * 8, cols * 8))
    m = at(8)
    h = h * (1 - m) + h.flip(0) * m
    h = h + sincos_position(encoder.width, rows * 8, cols * 8).view(1, rows * 8, cols * 8, -1)
    for stage, (layers, side) in enumerate(zip(encoder.stages, encoder.window, strict=True)):
        if stage:
            h = encoder.merge[stage - 1](h)
        for layer in layers:
            h = plain_layer(layer, h, at(8 // 2**stage), side)
    z = decoder.embed(encoder.norms[-1](h).flatten(1, 2))  # (B, N, W)
    m, token = hidden.to(image.dtype).view(1, -1, 1), decoder.mask_token
    x = torch.cat([z * (1 - m) + token * m, z * m + token * (1 - m)]) + sincos_position(decoder.width, rows, cols)
    for block in decoder.blocks:
        q, k, v = block.attn.split_heads(block.attn.qkv(block.norm1(x)), 3)
        a = ((q * block.attn.scale) @ k.transpose(2, 3)).softmax(3) @ v
        x = x + block.attn.proj(a.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    first, second = decoder.head(decoder.norm(x)).chunk(2)
    unmixed = first * m + second.flip(0) * (1 - m)
    target = patchify(image, p)
    if model.norm_pix:
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    error = (unmixed - target) ** 2
    return (error if weights is None else error * patchify(weights, p)).mean()


@pytest.mark.parametrize("batch, sides, ratio", [(2, (128, 128), 0.5), (3, (256, 128), 0.3), (1, (128, 128), 0.5)])
@pytest.mark.parametrize("weighting", ["none", "per_channel", "shared_power"])
def test_loss_and_gradients_are_those_of_the_plain_formulation(batch, sides, ratio, weighting, monkeypatch):
    model = small(mask_ratio=ratio, weights=weighting, weight_domain="zscore")
    exact = lambda x: x if x.is_floating_point() else x.double()
    monkeypatch.setattr(torch.Tensor, "float", exact)  # the decoder ends in float32; here all is float64
    image = torch.randn(batch, 2, *sides, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = model.draw({"image": image}, torch.Generator().manual_seed(2))
    assert drawn["hidden"].sum() == int(sides[0] * sides[1] / 32**2 * ratio)
    weights = None if weighting == "none" else backscatter_weights(image, maps=weighting)
    losses, gradients = [], []
    for loss in (model.loss(drawn)[0], plain_loss(model, image, drawn["hidden"], weights)):
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for _, p in model.named_parameters() if p.grad is not None]))
    assert math.isclose(*losses, rel_tol=1e-9)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-9), (gradients[0] - gradients[1]).abs().max()


def test_the_mask_covers_its_share_and_is_one_for_the_batch():
    model = small()
    image = torch.randn(4, 2, 128, 128)
    drawn = [model.draw({"image": image}, torch.Generator().manual_seed(k))["hidden"] for k in range(200)]
    assert all(hidden.shape == (16,) and hidden.sum() == 8 for hidden in drawn)
    share = torch.stack(drawn).double().mean(0)
    assert (share - 0.5).abs().max() < 4 * math.sqrt(0.25 / 200), "every cell is covered as often as another"


def test_weights_do_not_know_what_was_not_observed():
    db = torch.randn(2, 2, 32, 32) * 4 - 14
    valid = torch.rand(2, 32, 32) > 0.3
    for options in ({}, {"window_px": 5}, {"maps": "shared_weight"}):
        found = [
            backscatter_weights(db.masked_fill(~valid[:, None], v), valid, **options) for v in (0.0, 60.0, math.nan)
        ]
        assert found[0].equal(found[1]) and found[0].equal(found[2]) and found[0].isfinite().all()


def test_a_saved_mixmae_is_built_again():
    model = small(weights="shared_power", weight_scale=0.5).float()
    again = build(describe(model))
    again.load_state_dict(model.state_dict())
    image = torch.randn(2, 2, 128, 128)
    scale = InputContract(channels=["vh", "vv"], quantity="sigma0", units="dB", mean=[0, 0], std=[1, 1], patch_size=32)
    again.state_scale(scale)
    model.state_scale(scale)
    drawn = model.draw({"image": image}, torch.Generator().manual_seed(0))
    assert again.loss(drawn)[0] == model.loss(drawn)[0] and again.config() == model.config()


def test_masks_of_a_stage_are_made_once(monkeypatch):
    import sarfm.models.windowed as windowed

    calls = []
    made = windowed.window_mask
    monkeypatch.setattr(windowed, "window_mask", lambda *given: calls.append(given) or made(*given))
    model = MixMAE(build_encoder("mixmim-base", 2, 4), 64, 1, 4)
    model.loss(model.draw({"image": torch.randn(2, 2, 128, 128)}))
    assert len(calls) == 4, "24 layers in four stages"


@pytest.mark.parametrize("channels", [1, 3])
def test_any_channels_and_holes_and_bf16(channels):
    model = small(channels).float()
    image, valid = torch.randn(3, channels, 128, 160), torch.rand(3, 128, 160) > 0.4
    valid[0] = False
    drawn = model.draw({"image": image, "valid": valid})
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = model.loss(drawn)
    loss.backward()
    assert loss.isfinite() and parts["prediction"].shape == (3, 20, 32 * 32 * channels)
    pictures = model.eval().pictures(image, valid, torch.Generator().manual_seed(0), drawn["hidden"].expand(3, -1))
    assert pictures["reconstruction"].shape == image.shape
    assert pictures["reconstruction"].isnan().equal((~valid)[:, None].expand_as(image))
    assert F.mse_loss(pictures["reconstruction"][1].nan_to_num(), image[1]) > 0


@pytest.mark.parametrize("name, widths, heads", [
    ("mixmim-base", (128, 256, 512, 1024), (4, 8, 16, 32)),
    ("mixmim-large", (192, 384, 768, 1536), (6, 12, 24, 48)),
    ("mixmim-huge", (352, 704, 1408, 2816), (11, 22, 44, 88)),
])  # fmt: skip
def test_published_sizes_have_their_shapes(name, widths, heads):
    with torch.device("meta"):
        model = build_method("mixmae", build_encoder(name, 2, 4), {})
    encoder = model.encoder
    assert encoder.maps == tuple(zip(widths, (4, 8, 16, 32), strict=True)) and encoder.depths == (2, 2, 18, 2)
    assert [stage[0].attn.num_heads for stage in encoder.stages] == list(heads)
    assert [stage[0].attn.window_size for stage in encoder.stages] == [(8, 8)] * 3 + [(4, 4)]
    assert all(layer.shift == 0 for stage in encoder.stages for layer in stage)
    assert model.decoder.embed.weight.shape == (512, widths[-1]) and len(model.decoder.blocks) == 8
    assert model.decoder.head.weight.shape == (32 * 32 * 2, 512) and model.norm_pix and model.mask_ratio == 0.5


@pytest.mark.parametrize("batch", [2, 3])
def test_windows_of_224_px_compute_the_plain_formulation(batch, monkeypatch):
    settings = encoder_size("mixmim-base-224").settings
    assert settings["window"] == (14, 14, 14, 7)
    torch.manual_seed(0)
    small_one = settings | {"width": 16, "depths": (1, 1, 1, 1), "heads": (1, 2, 4, 8)}
    model = MixMAE(SwinEncoder(2, **small_one), 64, 1, 4).double()
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.is_floating_point() else x.double())
    image = torch.randn(batch, 2, 224, 224, dtype=torch.float64)
    drawn = model.draw({"image": image}, torch.Generator().manual_seed(0))
    assert drawn["hidden"].shape == (49,) and drawn["hidden"].sum() == 24
    with torch.no_grad():
        assert math.isclose(model.loss(drawn)[0], plain_loss(model, image, drawn["hidden"]), rel_tol=1e-9)


def trained(steps=6):
    """Train a small model a little, on a batch with a hole."""
    model = small(weights="per_channel", weight_domain="zscore").float()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    image, valid = torch.randn(3, 2, 128, 128), torch.ones(3, 128, 128, dtype=torch.bool)
    valid[1, :40] = False
    losses = []
    for step in range(steps):
        drawn = model.draw({"image": image, "valid": valid}, torch.Generator().manual_seed(step))
        loss, _ = model.loss(drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_a_fixed_small_run_repeats_to_the_bit_and_learns():
    (losses, state), (again, other) = trained(), trained()
    assert losses == again and losses[-1] < losses[0]
    assert all(torch.equal(state[name], other[name]) for name in state)
