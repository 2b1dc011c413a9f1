"""Loading: every item a pure function of (seed, k), the same from any number of workers, exact after a resume."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from sarfm.patches.contract import InputContract
from sarfm.patches.loading import CropDataset, Crops, PatchDataModule, StepSampler, augment_square, class_table
from sarfm.patches.prepare import restore, write_store
from sarfm.patches.splits import make_split
from sarfm.scenes.channels import UNKNOWN, Target
from sarfm.scenes.open import make_scene
from sarfm.train.trainer import set_epoch


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    g = np.random.default_rng(0)
    vv = g.normal(-10, 3, (160, 300)).astype(np.float32)
    vv[:, :40] = np.nan
    vv[:70, :90] = np.nan
    label = g.choice(np.array([10, 20, 95, 77], np.uint8), (160, 300))
    scene = make_scene(
        {"vv": vv, "vh": vv - 7},
        units="dB",
        quantity="gamma0",
        labels={"cover": (label, {10: "trees", 20: "shrubs", 95: "mangroves"})},
    )
    return write_store(
        {"a": scene}, tmp_path_factory.mktemp("s") / "s.zarr", size=64, stride=16, progress=False, shard_mb=0.5
    )


@pytest.fixture(scope="module")
def contract(store):
    return InputContract.fit(store, range(len(store)), patch_size=8)


def same(a, b):
    """Compare two samples or batches to the bit."""
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.row(16)
def test_items_are_functions_of_seed_and_number(store, contract):
    rows = np.arange(len(store))
    first, second = (CropDataset(store, rows, contract, Crops(48), ["cover"], seed=7) for _ in range(2))
    order = [5, 10_000, 0, 99_999_999, 5, 3]
    for k in order:
        assert same(first[k], second[k])
    assert all(same(first[k], second[k]) for k in reversed(order))
    other = CropDataset(store, rows, contract, Crops(48), ["cover"], seed=8)
    assert not any(same(first[k], other[k]) for k in range(20))
    assert len({first[k]["image"].numpy().tobytes() for k in range(500)}) >= 497  # 500 of 260,000 windows


@pytest.mark.parametrize("area", [(), (0.2, 1.0)])
def test_crops_are_turned_or_lie_as_they_are_in_the_same_places(store, contract, area):
    rows = np.arange(len(store))
    turned, plain = (
        CropDataset(store, rows, contract, Crops(48, area, symmetries=how), ["cover"], seed=7) for how in (True, False)
    )
    windows = [(turned._window(k), plain._window(k)) for k in range(40)]
    assert all(a[:5] == b[:5] and b.symmetry == 0 for a, b in windows) and len({a.symmetry for a, _ in windows}) == 8
    for k, (window, _) in enumerate(windows[:10]):
        expected = augment_square(plain[k]["image"].numpy(), window.symmetry)
        assert np.array_equal(turned[k]["image"].numpy(), expected)


def test_the_seed_draws_the_windows_too(store, contract):
    one, two = (CropDataset(store, [50], contract, Crops(24), seed=s) for s in (1, 2))
    assert not any(same(one[k], two[k]) for k in range(10))


def test_every_pass_shows_every_patch_once(store, contract):
    crops = CropDataset(store, np.arange(10, 40), contract, Crops(48))
    passes = [[crops.patch_of(30 * p + k) for k in range(30)] for p in range(3)]
    assert all(sorted(p) == list(range(10, 40)) for p in passes) and passes[0] != passes[1]


def test_a_crop_holds_the_pixels_of_its_patch(store, contract):
    crops = CropDataset(store, np.arange(len(store)), contract, Crops(40), ["cover"], seed=1)
    for k in range(30):
        item = crops[k]
        image = contract.normalise(store.read(item["patch"]), store.read(item["patch"], "valid"))
        label = store.read(item["patch"], "target_cover")
        found = False
        for symmetry in range(8):
            got = item["image"].numpy()
            back = next(
                c
                for c in range(8)
                if np.array_equal(
                    augment_square(augment_square(np.arange(6).reshape(2, 3), symmetry), c), np.arange(6).reshape(2, 3)
                )
            )
            got, mask = augment_square(got, back), augment_square(item["target_cover"].numpy(), back)
            for top in range(25):
                for left in range(25):
                    if np.array_equal(image[:, top, left : left + 40], got[:, 0]) and np.array_equal(
                        image[:, top : top + 40, left : left + 40], got
                    ):
                        codes = label[top : top + 40, left : left + 40]
                        classes = np.select([codes == 10, codes == 20, codes == 95], [0, 1, 2], UNKNOWN)
                        seen = mask != UNKNOWN
                        assert np.array_equal(mask[seen], classes[seen])
                        found = True
        assert found, k


def test_types_and_ignored_labels(store, contract):
    item = CropDataset(store, np.arange(len(store)), contract, Crops(48), ["cover"])[0]
    assert (
        item["image"].dtype == torch.float32
        and item["valid"].dtype == torch.bool
        and item["target_cover"].dtype == torch.int64
    )
    assert item["image"].shape == (2, 48, 48) and item["target_cover"].shape == item["valid"].shape == (48, 48)
    assert set(item["target_cover"].unique().tolist()) == {0, 1, 2, UNKNOWN}  # 77 has no meaning
    assert (item["target_cover"][~item["valid"]] == UNKNOWN).all() and (item["image"][:, ~item["valid"]] == 0).all()
    assert "target_cover" not in CropDataset(store, [3], contract, Crops(48))[0]


@pytest.mark.row(5)
def test_invalid_windows_are_redrawn(store, contract):
    crops = CropDataset(store, np.arange(len(store)), contract, Crops(24), seed=2)
    assert min(float(crops[k]["valid"].float().mean()) for k in range(400)) >= 0.5
    empty = store.index["patch"][store.index["valid_fraction"] == 0].to_numpy()
    assert len(empty) and not set(empty) & {crops[k]["patch"] for k in range(400)}
    with pytest.raises(ValueError, match="valid pixels to draw from"):
        CropDataset(store, empty, contract, Crops(24))


def test_validation_is_the_centre_in_order(store, contract):
    crops = CropDataset(store, [5, 9], contract, Crops(32), ["cover"], augment=False)
    assert [crops[k]["patch"] for k in range(2)] == [5, 9]
    image = contract.normalise(store.read(5), store.read(5, "valid"))
    assert np.array_equal(crops[0]["image"].numpy(), image[:, 16:48, 16:48])
    with pytest.raises(IndexError):
        crops[2]


def test_codes_become_classes():
    table = class_table(Target("flood", classes={255: "flooded", 0: "dry"}))
    assert table[[0, 255]].tolist() == [0, 1] and table[7] == UNKNOWN and len(table) == 256
    assert class_table(Target("far", classes={300: "x", -1: "y", 5: "z"}))[[5, 44, 255]].tolist() == [
        1,
        UNKNOWN,
        UNKNOWN,
    ]


def test_the_eight_symmetries_are_eight():
    square = np.arange(9).reshape(3, 3)
    assert len({augment_square(square, k).tobytes() for k in range(8)}) == 8
    assert np.array_equal(augment_square(square, 0), square)


def test_steps_are_handed_out_in_order_and_from_any_epoch():
    sampler = StepSampler(steps=11, batch=3, epoch_steps=4)
    whole = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
        whole += list(sampler)
    assert whole == list(range(33))
    resumed = StepSampler(steps=11, batch=3, epoch_steps=4)
    resumed.set_epoch(2)
    assert list(resumed) == whole[24:]


def module(store, contract, **changes):
    """Make a data module with small numbers."""
    split = make_split(store.index, "region", fractions={"train": 0.5, "val": 0.25, "test": 0.25})
    arguments = dict(crops=Crops(48), batch_size=4, steps_per_epoch=5, targets=["cover"], seed=3)
    return PatchDataModule(store, split, contract, **{**arguments, **changes})


@pytest.mark.row(16)
def test_workers_change_nothing(store, contract):
    alone, helped = module(store, contract), module(store, contract, crops=Crops(48, workers=2))
    for name in ("train_dataloader", "val_dataloader"):
        a, b = getattr(alone, name)(), getattr(helped, name)()
        for epoch in range(2):
            for loader in (a, b):
                if hasattr(loader.sampler, "set_epoch"):
                    loader.sampler.set_epoch(epoch)
            batches = list(zip(a, b, strict=True))
            assert batches and all(same(x, y) for x, y in batches)


def test_parts_do_not_mix_and_labels_can_be_few(store, contract):
    data = module(store, contract, train_rows=[0, 1, 20])
    seen = {int(p) for batch in data.train_dataloader() for p in batch["patch"]}
    assert seen <= {0, 1, 20} and not seen & set(data.rows("test"))
    assert sum(len(b["patch"]) for b in data.test_dataloader()) == len(data.rows("test"))


def test_epochs_go_on_where_the_last_one_ended(store, contract):
    data = module(store, contract)
    loader, crops = data.train_dataloader(), data.dataset("train")
    seen = []
    for epoch in range(3):
        set_epoch(loader, epoch)
        seen += [batch["image"].sum().item() for batch in loader]
    wanted = [sum(crops[4 * s + k]["image"].double().sum().item() for k in range(4)) for s in range(15)]
    assert np.allclose(seen, wanted, atol=0.5) and len(set(seen)) == 15


WRONG = {
    "crop": (dict(crops=Crops(96)), "from 1 to the patch size 64"),
    "target": (dict(targets=["ice"]), r"has no target \['ice'\]; it holds"),
    "text": (dict(targets="cover"), r"Write \['cover'\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments(store, contract, case):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        CropDataset(store, [1], contract, **{"crops": Crops(48), **change})
    with pytest.raises(ValueError, match="Prepare a store that fits"):
        CropDataset(store, [1], contract.model_copy(update={"channels": ["hh", "hv"]}), Crops(48))
    with pytest.raises(ValueError, match="at least 1"):
        StepSampler(0, 1, 1)


# ---- several labels, several scales, resized crops -----------------------------------------------------------------


@pytest.fixture(scope="module")
def scales(tmp_path_factory):
    g = np.random.default_rng(0)
    hh = g.normal(-14, 3, (320, 300)).astype(np.float32)
    hh[:40, :60] = np.nan
    charts = {name: g.integers(0, k + 1, (320, 300)).astype(np.uint8) for name, k in (("sic", 11), ("sod", 6))}
    charts = {n: (np.where(c == c.max(), 255, c), {k: f"c{k}" for k in range(c.max())}) for n, c in charts.items()}
    scene = make_scene({"hh": hh, "hv": hh - 8}, units="dB", quantity="sigma0", labels=charts, attrs={"spacing_m": 40})
    scenes = {"a": scene, "b": scene}
    return write_store(scenes, tmp_path_factory.mktemp("m") / "m.zarr", size=32, scales=[2, 4, 8], progress=False)


def ice_crops(scales, crop=24, targets=("sic", "sod"), augment=True, seed=0, **options):
    """Draw crops from the store of three scales."""
    rows = np.arange(len(scales))
    contract = InputContract.fit(scales, rows, patch_size=8)
    return CropDataset(scales, rows, contract, Crops(crop, **options), targets, augment, seed)


def test_several_labels(scales):
    crops, one = ice_crops(scales, seed=4), ice_crops(scales, targets=["sod"], seed=4)
    item = crops[3]
    assert set(item) == {"image", "valid", "target_sic", "target_sod", "patch"}
    assert set(one[3]) == set(item) - {"target_sic"}
    assert crops.targets["sod"].names == [f"c{k}" for k in range(6)] and crops.targets["sic"].size == 11
    assert set(torch.unique(item["target_sic"]).tolist()) <= {*range(11), UNKNOWN}
    assert item["target_sod"].max() == UNKNOWN
    twice = CropDataset(scales, crops.rows, crops.contract, Crops(24), {"stage": "sod", "again": "sod"}, seed=4)
    assert torch.equal(one[3]["target_sod"], twice[3]["target_stage"])
    assert torch.equal(twice[3]["target_stage"], twice[3]["target_again"])
    with pytest.raises(ValueError, match=r"has no target \['floe'\]"):
        ice_crops(scales, targets=["sic", "floe"])


def test_every_spacing_is_equally_likely(scales):
    crops = ice_crops(scales, balance="spacing", seed=1)
    spacing = scales.index["spacing_m"].to_numpy()
    assert np.unique(spacing, return_counts=True)[1].tolist() == [50, 18, 8]  # 80, 160 and 320 m
    drawn = np.array([crops.patch_of(k) for k in range(6000)])
    shares = np.unique(spacing[drawn], return_counts=True)[1] / 6000
    assert np.abs(shares - 1 / 3).max() < 0.03
    assert all(spacing[crops[k]["patch"]] == spacing[drawn[k]] for k in range(300))  # redrawn from the same spacing
    again = ice_crops(scales, balance="spacing", seed=1)
    assert all(same(crops[k], again[k]) for k in (5999, 3, 40))
    with pytest.raises(ValueError, match="balance is 'spacing'"):
        ice_crops(scales, balance="scale")


def test_resized_crops_are_torchs_and_leak_nothing():
    from sarfm.patches.loading import resize_crop

    g = np.random.default_rng(0)
    for height, width, side in ((20, 31, 24), (40, 40, 24), (13, 13, 32), (7, 60, 16)):
        image, valid = g.normal(size=(2, height, width)).astype(np.float32), g.random((height, width)) < 0.97
        classes = {"mask": g.integers(0, 9, (height, width)).astype(np.uint8)}
        out, kept, labels = resize_crop(np.where(valid, image, np.float32(0)), valid, classes, side)
        assert out.dtype == np.float32 and out.shape == (2, side, side) and labels["mask"].shape == (side, side)
        theirs = torch.nn.functional.interpolate(
            torch.from_numpy(np.where(valid, image, 0))[None], (side, side), mode="bicubic"
        )[0].numpy()
        assert np.abs(out - theirs)[:, kept].max() < 5e-5 and (out[:, ~kept] == 0).all()
        poisoned = np.where(valid, image, np.float32(1e9))  # if anything leaked, it would show
        assert np.array_equal(resize_crop(poisoned, valid, {}, side)[0], out)
        nearest = torch.nn.functional.interpolate(
            torch.from_numpy(classes["mask"])[None, None], (side, side), mode="nearest-exact"
        )
        assert np.array_equal(labels["mask"], nearest[0, 0])
    square = g.normal(size=(2, 16, 16)).astype(np.float32)
    assert resize_crop(square, np.ones((16, 16), bool), {}, 16)[0] is square


def test_resized_windows_have_the_share_of_the_area(scales):
    crops = ice_crops(scales, resized_area=(0.2, 0.6), seed=2)
    windows = [crops._window(k) for k in range(300)]
    shares = np.array([w.height * w.width / 32**2 for w in windows])
    assert 0.17 < shares.min() and shares.max() < 0.66 and shares.std() > 0.08
    assert all(0.7 < w.height / w.width < 1.43 and w.top + w.height <= 32 and w.left + w.width <= 32 for w in windows)
    item = crops[7]
    assert item["image"].shape == (2, 24, 24) and item["target_sod"].shape == item["valid"].shape == (24, 24)
    assert (item["image"][:, ~item["valid"]] == 0).all()
    assert same(item, ice_crops(scales, resized_area=(0.2, 0.6), seed=2)[7])
    calm = ice_crops(scales, resized_area=(0.2, 0.6), augment=False)
    assert np.array_equal(calm[0]["image"], ice_crops(scales, augment=False)[0]["image"])
    with pytest.raises(ValueError, match="resized_area is the smallest and largest share"):
        ice_crops(scales, resized_area=(0.5, 1.5))


def test_min_valid_reaches_the_crops(scales):
    rows = np.arange(len(scales))
    split, contract = pd.Series("train", rows), InputContract.fit(scales, rows, patch_size=8)
    options = dict(batch_size=8, steps_per_epoch=30, targets=["sic"])
    crops = Crops(24, (0.4, 1.0), balance="spacing")
    whole = PatchDataModule(scales, split, contract, crops=dataclasses.replace(crops, min_valid=1.0), **options)
    assert all(bool(batch["valid"].all()) for batch in whole.train_dataloader())
    some = PatchDataModule(scales, split, contract, crops=crops, **options)
    assert not all(bool(batch["valid"].all()) for batch in some.train_dataloader())


@pytest.mark.row(16)
def test_workers_change_nothing_with_all_options(scales):
    rows = np.arange(len(scales))
    split = pd.Series(np.where(rows % 3 == 0, "val", "train"))
    contract = InputContract.fit(scales, rows, patch_size=8)
    options = dict(batch_size=4, steps_per_epoch=6, targets=["sic", "sod"], seed=3)
    loaders = [
        PatchDataModule(
            scales, split, contract, crops=Crops(24, (0.3, 1), balance="spacing", workers=w), **options
        ).train_dataloader()
        for w in (0, 2)
    ]
    assert all(same(a, b) for a, b in zip(*loaders, strict=True))


# ---- numbers and targets of a tile ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Tiles with a percentage in cells of 16 px, codes of two bytes, a number and tags of the whole tile."""
    scenes, g = {}, np.random.default_rng(0)
    for k in range(3):
        percent = np.repeat(np.repeat(g.integers(0, 101, (5, 6)), 16, 0), 16, 1).astype(np.float32)
        percent[:16, :16], percent[40:50, 40:50] = 255, np.nan  # outside the limits, and not stated
        ground = Target("ground", classes={1000: "a", 2000: "b"})
        labels = {
            "percent": (percent, Target("percent", kind="number", units="%", limits=(0, 100))),
            "ground": (g.choice(np.array([1000, 2000, 3000], np.int16), (80, 96)), ground),
            "mass": (np.float32(k * 10.5), Target("mass", kind="number", of="tile", units="Mg/ha")),
            "tags": (np.array([k % 2, 1, 0], np.uint8), Target("tags", "tags", "tile", {3: "x", 5: "y", 9: "z"})),
        }
        vv = g.normal(-10, 3, (80, 96)).astype(np.float32)
        vv[60:, 80:] = np.nan
        scenes[f"s{k}"] = make_scene({"vv": vv}, units="dB", quantity="sigma0", labels=labels)
    store = write_store(scenes, tmp_path_factory.mktemp("n") / "n.zarr", size=64, stride=32, progress=False)
    return scenes, store


def test_numbers_and_tiles_are_stored_as_a_loss_takes_them(numbers):
    scenes, store = numbers
    assert store.targets["percent"].limits == (0, 100) and store.targets["tags"].names == ["x", "y", "z"]
    for p in store.index.itertuples():
        scene, box = scenes[p.scene], np.s_[p.row : p.row + p.height, p.col : p.col + p.width]
        percent = scene["percent"].values[box]
        wanted = np.where((percent >= 0) & (percent <= 100), percent, np.nan)
        got = store.read(p.patch, "target_percent")
        assert got.dtype == np.float32 and np.array_equal(got[: p.height, : p.width], wanted, equal_nan=True)
        assert np.isnan(got[p.height :]).all() and np.isnan(got[:, p.width :]).all()
        mass, tags = store.read(p.patch, "target_mass"), store.read(p.patch, "target_tags")
        assert mass.shape == () and mass == np.float32(int(p.scene[1:]) * 10.5)
        assert tags.shape == (3,) and tags.tolist() == scene["tags"].values.tolist()
        assert store.read(p.patch, "target_tags", np.s_[3:5, 0:9]).shape == (3,)
    back = restore(store, "s1")
    assert np.array_equal(back["ground"], scenes["s1"]["ground"]) and back["ground"].dtype == np.int16
    assert back["mass"].item() == 10.5 and back["tags"].values.tolist() == [1, 1, 0]
    assert back["mass"].attrs == scenes["s1"]["mass"].attrs and np.isnan(back["percent"].values[:16, :16]).all()
    assert len(store.verify()) == 0


def test_crops_of_numbers_are_cut_turned_and_never_averaged(numbers):
    scenes, store = numbers
    contract = InputContract.fit(store, range(len(store)), patch_size=8)
    every = ["percent", "ground", "mass", "tags"]
    plain = CropDataset(store, range(len(store)), contract, Crops(40), every, seed=3)
    zoomed = CropDataset(store, range(len(store)), contract, Crops(40, resized_area=(0.3, 1)), every, seed=3)
    for crops in (plain, zoomed):
        for k in range(40):
            item, window = crops[k], crops._window(k)
            patch = item["patch"]
            place = [((np.arange(40) + 0.5) * n / 40).astype(int) for n in (window.height, window.width)]
            nearest = lambda a, w=window, r=place: augment_square(a[w.place][r[0]][:, r[1]], w.symmetry)
            valid = item["valid"].numpy()
            percent = np.where(valid, nearest(store.read(patch, "target_percent")), np.nan)
            assert np.array_equal(item["target_percent"].numpy(), percent, equal_nan=True)
            ground = nearest(store.read(patch, "target_ground"))
            wanted = np.select([~valid, ground == 1000, ground == 2000], [UNKNOWN, 0, 1], UNKNOWN)
            assert np.array_equal(item["target_ground"].numpy(), wanted)
            number = int(store.index["scene"][patch][1:])
            assert item["target_mass"].item() == np.float32(number * 10.5) and item["target_mass"].ndim == 0
            assert item["target_tags"].tolist() == [number % 2, 1, 0]
    batch = next(iter(torch.utils.data.DataLoader(zoomed, batch_size=4)))
    shapes = {name: tuple(batch[f"target_{name}"].shape) for name in every}
    assert shapes == {"percent": (4, 40, 40), "ground": (4, 40, 40), "mass": (4,), "tags": (4, 3)}
    types = [batch[f"target_{name}"].dtype for name in every]
    assert types == [torch.float32, torch.int64, torch.float32, torch.int64]


def test_windows_are_drawn_where_something_is_known(tmp_path):
    percent = np.full((64, 64), np.nan, np.float32)
    percent[:30, :30] = 40
    target = Target("percent", kind="number", units="%")
    scene = make_scene(
        {"vv": np.zeros((64, 64)) - 9.0}, units="dB", quantity="sigma0", labels={"percent": (percent, target)}
    )
    store = write_store({"a": scene}, tmp_path / "s.zarr", size=64, progress=False)
    contract = InputContract.fit(store, [0], patch_size=8, mean=[-9], std=[1])
    crops = CropDataset(store, [0], contract, Crops(16), ["percent"])
    assert all(bool(crops[k]["target_percent"].isfinite().any()) for k in range(20))
    assert all(
        set(crops[k]["target_percent"][crops[k]["target_percent"].isfinite()].tolist()) == {40} for k in range(20)
    )
