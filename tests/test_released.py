"""A file that somebody released: recognised by its hash, every key accounted for, the same numbers as its own plain form."""

import argparse
import hashlib
import re

import pytest
import torch
from torch.nn import functional as F

import sarfm.models.released as released
from sarfm.evaluation.contestants import Bodies
from sarfm.io.files import CorruptData
from sarfm.land.released import SARW
from sarfm.models.mixmim_weights import account, mixmim_encoder
from sarfm.models.weights import load_encoder
from sarfm.runs.inputs import check_inputs, check_model

SMALL = dict(width=32, depths=(1, 1, 2, 1), heads=(1, 2, 4, 8), windows=(8, 8, 8, 4))
BASE = dict(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), windows=(8, 8, 8, 4))
LARGE = BASE | dict(width=192, heads=(6, 12, 24, 48))
HUGE = BASE | dict(width=352, heads=(11, 22, 44, 88))


def positions(width, side):
    """Write down the published table of places: sines and cosines of the column, then of the row."""
    omega = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows = [
        torch.cat([f(place * omega) for place in (col, row) for f in (torch.sin, torch.cos)])
        for row in range(side)
        for col in range(side)
    ]
    return torch.stack(rows).float()[None]


def pairs(side):
    """Number the pairs of places in a window by how far they are apart."""
    places = [(y, x) for y in range(side) for x in range(side)]
    return torch.tensor(
        [[(a - c + side - 1) * (2 * side - 1) + b - d + side - 1 for c, d in places] for a, b in places]
    )


def shapes(width, depths, heads, windows, decoder=512, layers=8, head=0):
    """List the published tensors with their shapes, weights and biases apart from the formulas."""
    linear = lambda name, o, i: {f"{name}.weight": (o, i), f"{name}.bias": (o,)}
    norm = lambda name, d: {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    block = lambda name, d: (
        norm(f"{name}.norm1", d) | linear(f"{name}.attn.qkv", 3 * d, d) | linear(f"{name}.attn.proj", d, d)
        | norm(f"{name}.norm2", d) | linear(f"{name}.mlp.fc1", 4 * d, d) | linear(f"{name}.mlp.fc2", d, 4 * d)
    )  # fmt: skip
    found = {"patch_embed.proj.weight": (width, 2, 4, 4), "patch_embed.proj.bias": (width,)} | norm(
        "patch_embed.norm", width
    )
    for stage, (depth, number, side) in enumerate(zip(depths, heads, windows, strict=True)):
        d = width * 2**stage
        for k in range(depth):
            name = f"layers.{stage}.blocks.{k}"
            found |= block(name, d) | {f"{name}.attn.relative_position_bias_table": ((2 * side - 1) ** 2, number)}
        if stage < 3:
            found |= norm(f"layers.{stage}.downsample.norm", 4 * d) | {
                f"layers.{stage}.downsample.reduction.weight": (2 * d, 4 * d)
            }
    found |= norm("norm", 8 * width)
    if head:
        return found | linear("head", head, 8 * width)
    found |= {"mask_token": (1, 1, decoder), "decoder_pos_embed": (1, 16, decoder)} | linear(
        "decoder_embed", decoder, 8 * width
    )
    for k in range(layers):
        found |= block(f"decoder_blocks.{k}", decoder)
    return found | norm("decoder_norm", decoder) | linear("decoder_pred", 32 * 32 * 2, decoder)


def tensors(sizes, flat=False, **others):
    """Make the tensors of a published file; where `flat`, each of one number that is repeated."""
    generator = torch.Generator().manual_seed(0)
    one = lambda shape: torch.full((1,) * len(shape), 0.01).expand(shape)
    drawn = lambda shape: 0.2 * torch.randn(shape, generator=generator)
    found = {name: (one if flat else drawn)(shape) for name, shape in shapes(**sizes, **others).items()}
    found["absolute_pos_embed"] = positions(sizes["width"], 32)
    for stage, (depth, side) in enumerate(zip(sizes["depths"], sizes["windows"], strict=True)):
        index = pairs(side)
        found |= {f"layers.{stage}.blocks.{k}.attn.relative_position_index": index for k in range(depth)}
    return found


def plain_features(t, image, heads, windows):
    """Compute the last stage from the published tensors, as the method is written down."""
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"])
    linear = lambda x, name: F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))
    x = F.conv2d(image, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=4).permute(0, 2, 3, 1)
    x = norm(x, "patch_embed.norm") + t["absolute_pos_embed"].view(1, 32, 32, -1)
    for stage, (number, side) in enumerate(zip(heads, windows, strict=True)):
        for k in range(
            sum(re.fullmatch(rf"layers\.{stage}\.blocks\.\d+\.norm1\.bias", name) is not None for name in t)
        ):
            name = f"layers.{stage}.blocks.{k}"
            b, h, w, d = x.shape
            y = (
                norm(x, f"{name}.norm1")
                .view(b, h // side, side, w // side, side, d)
                .transpose(2, 3)
                .reshape(-1, side**2, d)
            )
            q, key, v = linear(y, f"{name}.attn.qkv").view(-1, side**2, 3, number, d // number).permute(2, 0, 3, 1, 4)
            bias = t[f"{name}.attn.relative_position_bias_table"][pairs(side)].permute(2, 0, 1)
            y = (q @ key.transpose(2, 3) * (d // number) ** -0.5 + bias).softmax(-1) @ v
            y = linear(y.transpose(1, 2).reshape(-1, side**2, d), f"{name}.attn.proj")
            x = x + y.view(b, h // side, w // side, side, side, d).transpose(2, 3).reshape(b, h, w, d)
            x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        if stage < 3:
            name = f"layers.{stage}.downsample"
            x = torch.cat([x[:, r::2, c::2] for c in (0, 1) for r in (0, 1)], -1)
            x = linear(norm(x, f"{name}.norm"), f"{name}.reduction")
    return norm(x, "norm").flatten(1, 2)


def test_an_encoder_from_published_tensors_computes_what_they_say():
    found = tensors(SMALL, decoder=64, layers=1)
    encoder, _ = mixmim_encoder(found)
    image = torch.randn(2, 2, 128, 128, generator=torch.Generator().manual_seed(1))
    expected = plain_features(found, image, SMALL["heads"], SMALL["windows"])
    with torch.no_grad():
        assert torch.allclose(encoder.eval()(image), expected, atol=2e-4), (encoder(image) - expected).abs().max()
    assert encoder.config()["window"] == [8, 8, 8, 4] and not encoder.shifted and encoder.sincos


@pytest.mark.parametrize("sizes", [BASE, LARGE], ids=["base", "large"])
def test_every_key_of_the_published_sizes_is_accounted_for(sizes):
    found = tensors(sizes, flat=True)
    where = account(list(found))
    assert len(where) == len(found)
    encoder, out = mixmim_encoder(found)
    used = {ours for ours in where.values() if ours not in ("compared", "the decoder", "the head")}
    fresh = {f"norms.{k}.{kind}" for k in range(3) for kind in ("weight", "bias")}
    assert used | fresh == set(encoder.state_dict()) and not used & fresh
    assert out.keys() == {"the decoder"} and "mask_token" in out["the decoder"]
    assert encoder.maps[-1] == (8 * sizes["width"], 32) and encoder.depth == 24


def test_the_largest_is_accounted_for_by_its_shapes():
    with torch.device("meta"):
        from sarfm.models.kinds import build_encoder

        ours = {name: tuple(tensor.shape) for name, tensor in build_encoder("mixmim-huge", 2, 4).state_dict().items()}
    theirs = shapes(**HUGE)
    for name, here in account(list(theirs)).items():
        if here in ours and not name.startswith("patch_embed.proj.weight"):
            assert ours[here] == theirs[name], name


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write a small file as training scripts do, and list it as if it had been released."""

    def write(found, name="SAR-W-MixMAE, BigEarthNet v2, pretrained", **beside):
        path = tmp_path / "checkpoint_64.pth"
        torch.save({"model": found, "epoch": 64, "scaler": {"scale": 1.0}, **beside}, path)
        digits = hashlib.sha256(path.read_bytes()).hexdigest()
        listed = next(f for f in SARW if f.name == name)
        known = [f for f in SARW if f is not listed] + [listed.__class__(**{**listed.__dict__, "sha256": digits})]
        monkeypatch.setattr(released, "released_files", lambda: known)
        return path

    return write


def test_a_released_file_is_loaded_with_its_contract(file):
    found = tensors(SMALL, decoder=64, layers=1)
    path = file(found, optimizer={"state": {0: {"exp_avg": torch.zeros(3)}}}, args=argparse.Namespace(lr=1e-3, gpu=0))
    with pytest.warns(UserWarning, match=r"the decoder \(\d+ tensors\) left out.*JSTARS"):
        encoder, contract = load_encoder(path)
    assert encoder(torch.zeros(1, 2, 128, 128)).shape == (1, 16, 256)
    assert contract.channels == ["vh", "vv"] and set(contract.units) == {"dB"} and contract.patch_size == 32
    assert contract.mean == [-19.1966, -12.5144] and contract.std == [5.4501, 5.0019] and contract.crop_px == 128
    check_inputs({"pretrained": str(path)})
    with pytest.warns(UserWarning, match="left out"):
        bodies = Bodies(1, path)
    assert bodies.contract == contract


@pytest.mark.parametrize("name, head", [("BigEarthNet v1, fine-tuned", 19), ("SEN12-FLOOD, fine-tuned", 2)])
def test_a_fine_tuned_file_says_that_its_head_was_left_out(file, name, head):
    path = file(tensors(SMALL, head=head), f"SAR-W-MixMAE, {name}")
    with pytest.warns(UserWarning, match=r"the head \(2 tensors\) left out"):
        _, contract = load_encoder(path)
    assert contract.mean == [-19.2309, -12.5951] and contract.std == [3.1672, 2.9644]
    assert contract.spacing_m == (10.0 if head == 2 else 9.375)


def test_unknown_files_are_refused_with_what_is_known(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": tensors(SMALL, decoder=64, layers=1)}, path)
    for ask in (load_encoder, check_model):
        with pytest.raises(ValueError, match=r"no released checkpoint(.|\n)*SAR-W-MixMAE, BigEarthNet v2, pretrained"):
            ask(str(path))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layers.0.blocks.0.gamma": torch.ones(3)}, "which it hasn't"),
        ({"norm.weight": None}, "nothing"),
        ({"layers.2.blocks.1.mlp.fc2.bias": torch.zeros(5)}, "not a whole"),
        ({"layers.3.downsample.norm.weight": torch.zeros(1024)}, "no place"),
        ({"absolute_pos_embed": positions(32, 32).flip(1)}, "formula"),
        ({"layers.0.blocks.0.attn.relative_position_index": pairs(8).T}, "formula"),
        ({"absolute_pos_embed": torch.zeros(1, 7, 32)}, "formula"),
    ],
)
def test_a_file_that_is_not_what_it_was_taken_for_is_refused(change, words):
    found = tensors(SMALL, decoder=64, layers=1) | change
    with pytest.raises(ValueError, match=words):
        mixmim_encoder({name: tensor for name, tensor in found.items() if tensor is not None})


def test_nothing_in_a_file_is_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (tmp_path / "run").touch, ()

    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"a": torch.ones(1)}, "args": Attack()}, path)
    with pytest.raises(CorruptData, match="without running it"):
        released.read_checkpoint(path)
    assert not (tmp_path / "run").exists()
    torch.save({"model": {}}, path)
    with pytest.raises(CorruptData, match="holds no model"):
        released.read_checkpoint(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptData, match="checkpoint"):
        released.read_checkpoint(path)
