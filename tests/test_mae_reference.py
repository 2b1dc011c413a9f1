"""The MAE computes what transformers' ViTMAEForPreTraining computes, with fewer operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sarfm.models.kinds import build_encoder
from sarfm.models.mae import MAE
from sarfm.models.masking import hide_highest
from sarfm.models.tokens import sincos_position
from sarfm.models.vit import Encoder

transformers = pytest.importorskip("transformers", reason="the reference implementation is a development dependency")

TOLERANCE = 1e-5


def reference(channels, size, patch_size, norm_pix, width=64, depth=3, heads=4, decoder=(32, 2, 4)):
    config = transformers.ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=size,
        patch_size=patch_size,
        num_channels=channels,
        decoder_hidden_size=decoder[0],
        decoder_num_hidden_layers=decoder[1],
        decoder_num_attention_heads=decoder[2],
        decoder_intermediate_size=4 * decoder[0],
        mask_ratio=0.75,
        norm_pix_loss=norm_pix,
        layer_norm_eps=1e-6,
    )
    return transformers.ViTMAEForPreTraining(config)


def block_names(theirs, ours):
    """Pairs of (their parameter names, our parameter name) for one layer; several of theirs are concatenated."""
    for kind in ("weight", "bias"):
        yield [f"{theirs}.attention.{part}_proj.{kind}" for part in "qkv"], f"{ours}.attn.qkv.{kind}"
        yield [f"{theirs}.attention.o_proj.{kind}"], f"{ours}.attn.proj.{kind}"
        yield [f"{theirs}.layernorm_before.{kind}"], f"{ours}.norm1.{kind}"
        yield [f"{theirs}.layernorm_after.{kind}"], f"{ours}.norm2.{kind}"
        yield [f"{theirs}.mlp.fc1.{kind}"], f"{ours}.mlp.fc1.{kind}"
        yield [f"{theirs}.mlp.fc2.{kind}"], f"{ours}.mlp.fc2.{kind}"


def names(depth, decoder_depth):
    yield ["vit.embeddings.cls_token"], "encoder.embed.class_token"
    yield ["decoder.mask_token"], "decoder.mask_token"
    for kind in ("weight", "bias"):
        yield [f"vit.embeddings.patch_embeddings.projection.{kind}"], f"encoder.embed.project.{kind}"
        yield [f"vit.layernorm.{kind}"], f"encoder.norm.{kind}"
        yield [f"decoder.decoder_embed.{kind}"], f"decoder.embed.{kind}"
        yield [f"decoder.decoder_norm.{kind}"], f"decoder.norm.{kind}"
        yield [f"decoder.decoder_pred.{kind}"], f"decoder.head.{kind}"
    for i in range(depth):
        yield from block_names(f"vit.layers.{i}", f"encoder.blocks.{i}")
    for i in range(decoder_depth):
        yield from block_names(f"decoder.decoder_layers.{i}", f"decoder.blocks.{i}")


def in_our_layout(tensors, name):
    joined = torch.cat(tensors)
    # their convolution reads (channel, row, column); our linear layer reads (row, column, channel)
    return joined.permute(0, 2, 3, 1).flatten(1) if name == "encoder.embed.project.weight" else joined


def place(table, side):
    """Give their fixed position table our values; some versions of transformers leave a fresh one at zero."""
    ours = sincos_position(table.shape[2], side, side)
    theirs = table.data[0, 1:]
    assert not theirs.any() or torch.allclose(theirs, ours, atol=1e-6)
    theirs.copy_(ours)


SMALL = dict(width=64, depth=3, heads=4)


def pair(channels, norm_pix, size=32, patch_size=8, encoder=SMALL, decoder=(32, 2, 4)):
    torch.manual_seed(channels)
    theirs = reference(channels, size, patch_size, norm_pix, *encoder.values(), decoder)
    for parameter in theirs.parameters():
        if parameter.requires_grad:  # biases and norms that start at 0 and 1 would hide an exchange
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    place(theirs.vit.embeddings.position_embeddings, size // patch_size)
    place(theirs.decoder.decoder_pos_embed, size // patch_size)
    ours = MAE(Encoder(channels, patch_size, **encoder), *decoder, norm_pix=norm_pix)
    source = dict(theirs.named_parameters())
    table = list(names(encoder["depth"], decoder[1]))
    state = {ours_name: in_our_layout([source[n] for n in many], ours_name).detach() for many, ours_name in table}
    ours.load_state_dict(state, strict=True)
    return theirs, ours, table


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 12])
def test_loss_and_gradients_equal_the_reference(channels, norm_pix):
    theirs, ours, table = pair(channels, norm_pix)
    image, noise = torch.randn(3, channels, 32, 32), torch.rand(3, 16)
    expected = theirs(image, noise=noise)
    expected.loss.backward()
    hidden = hide_highest(noise, 0.75)
    assert torch.equal(hidden, expected.mask.bool())
    loss, parts = ours.loss({"image": image, "hidden": hidden})
    loss.backward()
    assert abs(loss.item() - expected.loss.item()) <= TOLERANCE
    index = parts["masked"][:, :, None].expand_as(parts["prediction"])
    assert (parts["prediction"] - expected.logits.gather(1, index)).abs().max() <= TOLERANCE
    source, mine = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert {name for _, name in table} == set(mine)
    for many, name in table:
        gradient = in_our_layout([source[n].grad for n in many], name)
        assert (gradient - mine[name].grad).abs().max() <= TOLERANCE, name


def flops(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize(("channels", "limit"), [(3, 0.97), (12, 0.95)])
def test_fewer_operations_than_the_reference(channels, limit):
    theirs = reference(channels, 224, 16, False, 768, 12, 12, (512, 8, 16))
    ours = MAE(build_encoder("vit-base", channels))
    image = torch.zeros(8, channels, 224, 224)
    batch = ours.draw({"image": image}, torch.Generator().manual_seed(0))
    ratio = flops(lambda: ours.loss(batch)[0].backward()) / flops(lambda: theirs(image).loss.backward())
    assert ratio <= limit, f"{ratio:.4f}"
