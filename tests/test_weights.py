"""A saved model comes back exactly, or not at all."""

import json
import shutil

import pytest
import torch
from predictors import one_target, unet
from safetensors.torch import load_file, save_file

from sarfm.io.files import CorruptData, sha256
from sarfm.models.kinds import build_encoder
from sarfm.models.mae import MAE
from sarfm.models.weights import load_encoder, load_model, save_model
from sarfm.patches.contract import InputContract


def contract(channels=("vv", "vh"), patch_size=8):
    scale = {"mean": [-10.0] * len(channels), "std": [3.0] * len(channels)}
    return InputContract(
        channels=list(channels), quantity="gamma0", units="dB", spacing_m=10.0, patch_size=patch_size, **scale
    )


def make(kind):
    torch.manual_seed(0)
    if kind == "unet":
        return unet(2, 3)
    encoder = build_encoder("vit-nano", 2, 8)
    return MAE(encoder, 64, 1, 4, norm_pix=True) if kind == "mae" else one_target(encoder, 3, "linear")


@pytest.fixture(scope="module")
def saved_mae(tmp_path_factory):
    return save_model(make("mae"), tmp_path_factory.mktemp("mae"), contract())


@pytest.fixture
def folder(saved_mae, tmp_path):
    return shutil.copytree(saved_mae, tmp_path / "model")


def edit(folder, change):
    card = json.loads((folder / "model.json").read_text())
    change(card)
    (folder / "model.json").write_text(json.dumps(card))


def resign(folder):
    """Make the checksum true again, as a careless hand would."""
    edit(folder, lambda card: card.update(sha256=sha256(folder / "model.safetensors")))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    resign(folder)


@pytest.mark.parametrize("kind", ["mae", "segmenter", "unet"])
def test_a_model_comes_back_exactly(kind, tmp_path):
    model = make(kind).eval()
    save_model(model, tmp_path, contract())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    again, its_contract = load_model(tmp_path, kind="mae" if kind == "mae" else "predictor")
    assert its_contract == contract() and again.config() == model.config() and not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_encoder_comes_alone(folder):
    encoder, its_contract = load_encoder(folder)
    whole, _ = load_model(folder)
    image = torch.randn(1, 2, 16, 24)
    assert torch.equal(encoder(image), whole.encoder(image)) and its_contract.channels == ["vv", "vh"]


def test_a_file_of_the_encoder_alone_serves_only_load_encoder(folder):
    def drop(tensors):
        for name in [n for n in tensors if not n.startswith("encoder.")]:
            del tensors[name]

    rewrite(folder, drop)
    load_encoder(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit.*decoder.*got nothing.*load_encoder"):
        load_model(folder)


@pytest.mark.row(10)
@pytest.mark.parametrize("position", [0, 9, 2000, -1])
def test_a_flipped_bit_is_found(folder, position):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
    for load in (load_model, load_encoder):
        with pytest.raises(CorruptData, match=r"model\.safetensors is damaged.*sha256"):
            load(folder)


@pytest.mark.row(10)
@pytest.mark.parametrize("size", [0, 7, 100, -1, -5000])
def test_a_truncated_file_is_refused_even_when_signed(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptData, match="sha256"):
        load_model(folder)
    resign(folder)
    with pytest.raises(CorruptData, match=r"model\.safetensors is not a readable safetensors"):
        load_model(folder)


@pytest.mark.row(9)
@pytest.mark.parametrize(
    "header",
    [
        (1 << 30).to_bytes(8, "little") + b"{}",
        b"\xff" * 8,
        (2).to_bytes(8, "little") + b"{}" + b"tail",
        (4).to_bytes(8, "little") + b"not{",
    ],
)
def test_hostile_headers_are_refused(folder, header):
    (folder / "model.safetensors").write_bytes(header)
    resign(folder)
    with pytest.raises(CorruptData, match="safetensors"):
        load_model(folder)


@pytest.mark.row(9)
def test_tensors_of_another_shape_or_type_are_named(folder):
    rewrite(folder, lambda t: t.update({"decoder.mask_token": t["decoder.mask_token"][:, :, :32].contiguous()}))
    with pytest.raises(ValueError, match=r"expected \(1, 1, 64\).*for decoder.mask_token, got \(1, 1, 32\)"):
        load_model(folder)
    rewrite(folder, lambda t: t.update({"decoder.mask_token": torch.zeros(1, 1, 64, dtype=torch.float16)}))
    with pytest.raises(ValueError, match=r"mask_token, got .*float16"):
        load_model(folder)
    rewrite(folder, lambda t: t.update({"decoder.mask_token": torch.zeros(1, 1, 64), "extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match="expected nothing for extra"):
        load_model(folder)


def test_a_contract_that_does_not_fit_is_refused(folder, tmp_path):
    for wrong, said in ((contract(["vv"]), "2 channels.*names 1"), (contract(patch_size=16), "8 px.*says 16")):
        with pytest.raises(ValueError, match=said):
            save_model(make("mae"), tmp_path / "new", wrong)
        assert not (tmp_path / "new").exists()
        edit(folder, lambda card, wrong=wrong: card.update(contract=wrong.model_dump(mode="json")))
        with pytest.raises(ValueError, match=rf"model\.json.*{said}"):
            load_model(folder)


def test_another_kind_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="expected a model of kind 'predictor', got 'mae'"):
        load_model(folder, kind="predictor")
    save_model(make("unet"), tmp_path / "unet", contract())
    with pytest.raises(ValueError, match="predictor, which has no encoder"):
        load_encoder(tmp_path / "unet")
    edit(folder, lambda card: card.update(kind="os.system"))
    with pytest.raises(ValueError, match=r"no kind of model 'os\.system'"):
        load_model(folder)


def test_a_damaged_card_is_refused(folder):
    edit(folder, lambda card: card["config"].update(surprise=1))
    with pytest.raises(ValueError, match="does not describe a mae.*surprise"):
        load_model(folder)
    edit(folder, lambda card: card["config"].pop("surprise"))
    edit(folder, lambda card: card["contract"]["channels"][0].update(std=0.0))
    with pytest.raises(CorruptData, match=r"model\.json holds no valid input contract"):
        load_model(folder)
    edit(folder, lambda card: card.pop("contract"))
    with pytest.raises(CorruptData, match=r"model\.json.*contract"):
        load_model(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(CorruptData, match=r"model\.json"):
        load_model(folder)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.json.*save_model"):
        load_model(tmp_path)


def test_saving_again_replaces_the_model(folder):
    model = make("segmenter")
    save_model(model, folder, contract())
    assert load_model(folder)[0].config() == model.config()


@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_a_model_on_a_windowed_encoder_comes_back(head, tmp_path):
    torch.manual_seed(0)
    model = one_target(build_encoder("swin-nano", 2), 3, head, 16).eval()
    save_model(model, tmp_path, contract(patch_size=32))
    again, _ = load_model(tmp_path)
    image = torch.randn(1, 2, 40, 64)
    assert torch.equal(model(image)["label"], again(image)["label"]) and again.config() == model.config()
    assert load_encoder(tmp_path)[0].config() == model.encoder.config()


def test_a_kind_that_nobody_registers_is_neither_saved_nor_imported(folder, tmp_path):
    class Unregistered(MAE):
        def config(self):
            return {name: value for name, value in super().config().items() if name != "kind"}

    with pytest.raises(ValueError, match="Unregistered is of no registered kind.*entry point"):
        save_model(Unregistered(build_encoder("vit-nano", 2, 8), 64, 1, 4), tmp_path / "new", contract())
    edit(folder, lambda card: card["config"]["encoder"].update(kind="os:system"))
    with pytest.raises(ValueError, match="no kind of model 'os:system'. Installed packages register .*mae"):
        load_model(folder)
