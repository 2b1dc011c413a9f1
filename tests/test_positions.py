"""Positions that are learnt: where they come from, what they compute, and that models without them stay as they were."""

import json

import pytest
import torch
from test_mae_reference import SMALL, TOLERANCE, in_our_layout, names, reference

from sarfm.models.kinds import build, build_encoder, describe
from sarfm.models.mae import MAE
from sarfm.models.masking import hide_highest, visible_count
from sarfm.models.tokens import learned_position, resample_position, sincos_position
from sarfm.models.vit import Encoder
from sarfm.models.weights import load_encoder, load_model, save_model
from sarfm.patches.contract import InputContract
from sarfm.train.optimizer import layer_numbers, parameter_groups

LEARNED = {"positions": "learned", "grid": (4, 4)}


def learned_pair(channels, decoder=(32, 2, 4)):
    """The reference with positions that learn, and ours with the same weights."""
    torch.manual_seed(channels)
    theirs = reference(channels, 32, 8, False, *SMALL.values(), decoder)
    tables = theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed
    for table in tables:
        table.requires_grad_()
    for parameter in theirs.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    ours = MAE(Encoder(channels, 8, **SMALL, **LEARNED), *decoder)
    source = dict(theirs.named_parameters())
    table = list(names(SMALL["depth"], decoder[1]))
    state = {name: in_our_layout([source[n] for n in many], name).detach() for many, name in table}
    state |= {
        f"{part}.positions": found.detach()[0] for part, found in zip(("encoder.embed", "decoder"), tables, strict=True)
    }
    ours.load_state_dict(state, strict=True)
    return theirs, ours, table, dict(zip(("encoder.embed.positions", "decoder.positions"), tables, strict=True))


@pytest.mark.parametrize("decoder", [(32, 2, 4), (32, 1, 4)])
@pytest.mark.parametrize("channels", [2, 12])
def test_loss_and_gradients_with_learned_positions_equal_the_reference(channels, decoder):
    theirs, ours, table, positions = learned_pair(channels, decoder)
    image, noise = torch.randn(3, channels, 32, 32), torch.rand(3, 16)
    expected = theirs(image, noise=noise)
    expected.loss.backward()
    loss, _ = ours.loss({"image": image, "hidden": hide_highest(noise, 0.75)})
    loss.backward()
    assert abs(loss.item() - expected.loss.item()) <= TOLERANCE
    source, mine = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert set(mine) == {name for _, name in table} | set(positions)
    for many, name in table:
        assert (in_our_layout([source[n].grad for n in many], name) - mine[name].grad).abs().max() <= TOLERANCE, name
    for name, theirs_table in positions.items():
        assert theirs_table.grad[0, 0].any()  # the class token's place learns too
        assert (theirs_table.grad[0] - mine[name].grad).abs().max() <= TOLERANCE, name


def test_positions_start_as_torchvision_s_and_are_interpolated_bicubically():
    torch.manual_seed(0)
    table = learned_position(256, (28, 28))
    assert table.shape == (785, 256) and abs(table.std().item() - 0.02) < 5e-4 and table.requires_grad
    finer = resample_position(table, (28, 28), 56, 56)
    by_hand = torch.nn.functional.interpolate(
        table[1:].T.reshape(1, 256, 28, 28), (56, 56), mode="bicubic", align_corners=False
    )
    assert torch.allclose(finer[1:], by_hand[0].flatten(1).T, atol=1e-6) and torch.equal(finer[0], table[0])
    assert resample_position(table, (28, 28), 28, 28) is table
    with pytest.raises(ValueError, match=r"belong to a grid.*\(28, 28\) for 448 px"):
        learned_position(8, None)


def test_an_encoder_with_learned_positions_takes_other_sizes_and_rectangles():
    encoder = Encoder(2, 8, 32, 2, 2, **LEARNED)
    for size in ((32, 32), (64, 24), (8, 80)):
        assert encoder(torch.randn(1, 2, *size)).shape == (1, size[0] * size[1] // 64, 32)
    model = MAE(encoder, 16, 1, 2)
    loss, _ = model.loss(model.draw({"image": torch.randn(2, 2, 48, 40)}))
    loss.backward()
    assert encoder.embed.positions.grad.any() and model.decoder.positions.grad.any()


def test_a_patch_that_is_hidden_leaves_no_trace_of_its_place_in_the_encoder():
    encoder = Encoder(1, 8, 32, 2, 2, **LEARNED)
    visible = torch.tensor([[0, 5, 9]])
    encoder(torch.randn(1, 1, 32, 32), visible=visible).square().mean().backward()
    touched = encoder.embed.positions.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == [0, 1, 6, 10]  # the class token's place, and one after each patch


def test_learned_positions_are_saved_and_loaded(tmp_path):
    model = MAE(Encoder(2, 8, 32, 2, 2, **LEARNED), 16, 1, 2)
    config = describe(model)
    assert config["encoder"]["positions"] == "learned" and config["encoder"]["grid"] == (4, 4)
    contract = InputContract(
        channels=["vv", "vh"],
        units="dB",
        quantity="sigma0",
        mean=[-12.0, -19.0],
        std=[4.0, 4.0],
        patch_size=8,
        crop_px=32,
    )
    save_model(model, tmp_path, contract)
    again, _ = load_model(tmp_path)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    image = torch.randn(1, 2, 48, 48)
    assert torch.equal(load_encoder(tmp_path)[0](image), model.encoder.eval()(image))
    fresh = build(json.loads(json.dumps(config)))  # as a file holds it
    assert fresh.decoder.positions.shape == (17, 16)


def test_models_of_before_are_what_they_were():
    model = MAE(Encoder(2, 8, 32, 2, 2, grid=(4, 4)), 16, 1, 2)
    config = describe(model)
    assert "positions" not in config["encoder"]  # a training that began before continues
    assert not [name for name in model.state_dict() if name.endswith("positions")]
    assert build(config).encoder.positions == "sincos"
    image, place = torch.zeros(1, 2, 32, 32), sincos_position(32, 4, 4)
    tokens, _ = model.encoder.embed(image)
    assert torch.equal(tokens[0, 1:], place + model.encoder.embed.project.bias)
    assert torch.equal(tokens[0, :1], model.encoder.embed.class_token[0])


def test_learned_positions_are_of_layer_zero_and_do_not_decay():
    model = MAE(Encoder(2, 8, 32, 3, 2, **LEARNED), 16, 1, 2)
    numbers, depth = layer_numbers(model)
    assert numbers["encoder.embed.positions"] == 0 and numbers["decoder.positions"] == depth + 1
    groups = {id(p): group for group in parameter_groups(model, 0.05, 0.5) for p in group["params"]}
    own = groups[id(model.encoder.embed.positions)]
    assert own["weight_decay"] == 0 and own["scale"] == 0.5**4
    (everything,) = parameter_groups(model, 0.05, decay_all=True)
    assert everything["weight_decay"] == 0.05 and len(everything["params"]) == len(list(model.parameters()))


def test_what_has_no_positions_to_choose_says_so():
    with pytest.raises(ValueError, match="swin-nano has no positions"):
        build_encoder("swin-nano", 2, positions="learned", grid=(4, 4))
    with pytest.raises(ValueError, match="sincos, learned; got 'rotary'"):
        Encoder(2, positions="rotary")
    with pytest.raises(ValueError, match="belong to a grid"):
        Encoder(2, positions="learned")


def test_the_published_arithmetic_of_785_tokens():
    assert visible_count(784, 0.751) + 1 == int(785 * 0.25) == 196
    assert 784 - visible_count(784, 0.751) == 589 and visible_count(784, 0.75) == 196
    with torch.device("meta"):
        model = MAE(
            Encoder(12, 16, positions="learned", grid=(28, 28)), decoder_depth=1, mask_ratio=0.751, decoder_width=512
        )
    assert model.encoder.embed.positions.shape == (785, 768) and model.decoder.positions.shape == (785, 512)
    assert model.decoder.head.out_features == 16 * 16 * 12 == 3072 and len(model.decoder.blocks) == 1
    assert model.decoder.heads == 16 and model.decoder.blocks[0].mlp.fc1.out_features == 2048 and not model.norm_pix
