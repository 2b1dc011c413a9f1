"""Splits divide places, never patches; label subsets are nested."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from sarfm.ice.lists import balanced_order, protocol_lists
from sarfm.patches.splits import (
    Split,
    assert_disjoint,
    label_counts,
    label_subset,
    lists_of,
    make_split,
    split_by_block,
    split_by_region,
    split_by_scene,
)


def an_index(scenes=1, height=200, width=400, size=64, stride=16):
    """Lay out patches without a store."""
    rows = [
        (s, r, c)
        for s in range(scenes)
        for r in range(0, height - size + 1, stride)
        for c in range(0, width - size + 1, stride)
    ]
    index = pd.DataFrame(rows, columns=["scene", "row", "col"]).assign(height=size, width=size)
    index["scene"] = index["place"] = index["scene"].map("{:04d}".format)
    index["factor"] = 1
    index.insert(0, "patch", np.arange(len(index)))
    return index


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("gap", [0, 16])
def test_regions_share_no_pixel_and_keep_the_gap(axis, gap):
    index = an_index(scenes=2, height=500, width=500)
    split = split_by_region(index, axis=axis, gap_px=gap)
    start, length = ("col", "width") if axis == "x" else ("row", "height")
    ends = [
        (index[start][split == part].min(), (index[start] + index[length])[split == part].max())
        for part in ("train", "val", "test")
    ]
    assert ends[0][1] + gap <= ends[1][0] and ends[1][1] + gap <= ends[2][0]
    assert set(split) == {"train", "val", "test", ""}
    covered = np.zeros((3, 500), bool)
    for k, part in enumerate(("train", "val", "test")):
        for p in index[split == part].itertuples():
            covered[k, getattr(p, start) : getattr(p, start) + getattr(p, length)] = True
    assert (covered.sum(0) <= 1).all()
    assert_disjoint(index, split)


def test_scenes_stay_whole_and_every_part_has_one():
    for scenes in (3, 4, 10, 33):
        index = an_index(scenes, 64, 128)
        split = split_by_scene(index, seed=1)
        assert (split.groupby(index["scene"]).nunique() == 1).all() and set(split) == {"train", "val", "test"}
        assert split.equals(split_by_scene(index, seed=1))
    assert not split.equals(split_by_scene(index, seed=2))


def test_blocks_are_contiguous_and_dates_stay_together():
    index = an_index(100, 64, 64)
    by_scene = split_by_block(index, blocks=20).to_numpy()
    assert (by_scene[1:] != by_scene[:-1]).sum() <= 19 and set(by_scene) == {"train", "val", "test"}
    dated = pd.concat([index.assign(scene=index["scene"] + f", date {t}") for t in range(2)], ignore_index=True)
    for split in (split_by_block(dated), split_by_scene(dated)):
        assert (split.groupby(dated["place"]).nunique() == 1).all()


def test_label_subsets_are_nested_and_seeded():
    index, rows = an_index(), np.arange(5, 105)
    subsets = [label_subset(index, rows, f, seed=3) for f in (0.01, 0.1, 0.5, 1.0)]
    assert [len(s) for s in subsets] == [1, 10, 50, 100]
    for small, large in pairwise(subsets):
        assert set(small) <= set(large) <= set(rows)
    assert not np.array_equal(subsets[1], label_subset(index, rows, 0.1, seed=4))
    assert np.array_equal(subsets[1], label_subset(index, rows[::-1], 0.1, seed=3))


def test_overlap_between_parts_is_found():
    index = an_index()
    split = split_by_region(index)
    stray = split.copy()
    stray[index.index[(split == "")][0]] = "val"
    with pytest.raises(ValueError, match="share pixels"):
        assert_disjoint(index, stray)
    dates = pd.concat([index.assign(scene=f"a, date {t}") for t in range(2)], ignore_index=True)
    dates["patch"] = np.arange(len(dates))
    leak = pd.Series(np.where(dates["scene"] == "a, date 0", "train", "test"))
    with pytest.raises(ValueError, match="share pixels"):
        assert_disjoint(dates, leak)


def test_make_split_knows_its_kinds_and_refuses_empty_parts():
    index = an_index(20)
    for kind in ("region", "scene", "block"):
        assert (make_split(index, kind) == "train").any()
    with pytest.raises(ValueError, match="region, scene, event, block"):
        make_split(index, "random")
    with pytest.raises(ValueError, match=r"no patch for \['val'\]"):
        make_split(an_index(), "region", fractions={"train": 0.65, "val": 0.1, "test": 0.25})
    with pytest.raises(ValueError, match="got 1; split by region"):
        make_split(an_index(), "scene")
    for fractions in ({"train": 0.5}, {"train": 1.2, "val": -0.2}, {"train": 0.5, "holdout": 0.5}):
        with pytest.raises(ValueError, match="sum to 1"):
            make_split(an_index(), "region", fractions=fractions)
    with pytest.raises(ValueError, match="from 1 to the 1 scenes"):
        split_by_block(an_index(), blocks=20)
    with pytest.raises(ValueError, match="fraction"):
        label_subset(an_index(), [1], 0)
    with pytest.raises(ValueError, match="axis is"):
        split_by_region(an_index(), axis="time")


# ---- scales and lists ----------------------------------------------------------------------------------------------


def several_scales(scenes=4, factors=(2, 3, 5), height=1000, width=1303, size=32):
    """Lay out patches of scenes at several scales."""
    tables = []
    for factor in factors:
        table = an_index(scenes, height // factor, width // factor, size, size // 2)
        tables.append(table.assign(scene=table["scene"] + f", {factor} times coarser", factor=factor))
    index = pd.concat(tables, ignore_index=True)
    index["patch"] = np.arange(len(index))
    return index


def test_scales_of_a_place_stay_together():
    index = several_scales()
    place = index["place"]
    for split in (split_by_scene(index), split_by_block(index, blocks=4)):
        assert (split.groupby(place).nunique() == 1).all()
        assert_disjoint(index, split)
    for axis in "xy":
        for gap in (0, 7):
            region = split_by_region(index, axis=axis, gap_px=gap)
            assert set(region) == {"train", "val", "test", ""}
            assert_disjoint(index, region)


def test_a_leak_between_scales_is_found():
    index = several_scales(1)
    by_scale = index["factor"].map({2: "train", 3: "", 5: "test"})
    with pytest.raises(ValueError, match="share pixels"):
        assert_disjoint(index, by_scale)
    fine = (index["factor"] == 2) & ((index["col"] + 32) * 2 <= 300)
    coarse = (index["factor"] == 5) & (index["col"] * 5 >= 300)  # to the right of them, though col is smaller
    assert_disjoint(index, pd.Series(np.select([fine, coarse], ["train", "test"], "")))
    coarse = (index["factor"] == 5) & (index["col"] * 5 >= 200)
    with pytest.raises(ValueError, match="share pixels"):
        assert_disjoint(index, pd.Series(np.select([fine, coarse], ["train", "test"], "")))


def ice_index(train=513, test=20, factors=(2, 5)):
    """List scenes as AI4Arctic names them, at two scales."""
    names = [f"2019{k:04d}T101830_{'cis' if k % 8 < 3 else 'dmi'}" for k in range(train + test)]
    parts = ["train"] * train + ["test"] * test
    rows = [(f"{n}, {f}", n, p, n[-3:], f) for n, p in zip(names, parts, strict=True) for f in factors]
    return pd.DataFrame(rows, columns=["scene", "place", "part", "service", "factor"])


def ice_counts(index, seed=0):
    """Make up how many pixels of each class each scene holds."""
    places = sorted(set(index["place"]))
    columns = [(chart, code) for chart, n in (("sic", 11), ("sod", 6), ("floe", 7)) for code in range(n)]
    g = np.random.default_rng(seed)
    counts = g.poisson(np.exp(3 * g.normal(size=(len(places), 24)) - np.arange(24) % 7))
    return pd.DataFrame(counts, places, pd.MultiIndex.from_tuples(columns, names=["label", "code"]))


def test_lists_have_the_numbers_of_the_paper():
    index = ice_index()
    lists = protocol_lists(index, ice_counts(index))
    sizes = {name: len(scenes) for name, scenes in lists.items()}
    assert (sizes["train_100"], sizes["val"], sizes["test"]) == (493, 20, 20)
    assert [sizes[f"pretrain_{p}"] for p in (20, 40, 60, 80)] == [98, 197, 295, 394]
    assert [sizes[f"finetune_{p}"] for p in (20, 40, 60, 80)] == [98, 197, 295, 394]
    assert [sizes[f"finetune_{p}"] for p in ("01", "05", "10")] == [6, 24, 51]
    assert [sizes[f"pretrain_{p}"] for p in (99, 95, 90)] == [487, 469, 442]
    assert sum(name.endswith("cis") for name in lists["val"]) == 10
    order = sorted(lists["train_100"])
    np.random.seed(0)  # noqa: NPY002 (the source draws so)
    np.random.shuffle(order)  # noqa: NPY002
    assert lists["pretrain_40"] == order[:197] and lists["finetune_60"] == order[-295:]
    for x in (20, 40, 60, 80):
        assert not set(lists[f"pretrain_{100 - x}"]) & set(lists[f"finetune_{x}"])
    assert len({*lists["pretrain_80"], *lists["finetune_20"]}) == 492  # one of 493 stays unused
    for small, large in pairwise(["finetune_20", "finetune_40", "finetune_60", "finetune_80", "train_100"]):
        assert set(lists[small]) < set(lists[large])
    for small, large in pairwise(["finetune_01", "finetune_05", "finetune_10", "train_100"]):
        assert set(lists[small]) < set(lists[large])
    for few in (1, 5, 10):
        pair = lists[f"finetune_{few:02d}"] + lists[f"pretrain_{100 - few}"]
        assert sorted(pair) == lists["train_100"]
    for x, y in ((50, 50), (80, 20), (90, 10), (95, 5)):
        pair = lists[f"system1_pretrain_{x}"] + lists[f"system1_finetune_{y:02d}"]
        assert sorted(pair) == lists["train_100"]
    used = set(lists["train_100"])
    assert not used & set(lists["val"]) and not used & set(lists["test"]) and not set(lists["val"]) & set(lists["test"])
    assert lists == protocol_lists(index.sample(frac=1, random_state=1), ice_counts(index))


def test_lists_of_few_scenes_and_validation_of_ones_own():
    index = ice_index(24, 6)
    lists = protocol_lists(index, ice_counts(index))
    assert len(lists["val"]) == 2 and {n[-3:] for n in lists["val"]} == {"cis", "dmi"} and len(lists["test"]) == 6
    assert len(lists["finetune_01"]) == 3 and len(lists["finetune_20"]) == 4
    own = sorted(lists["train_100"])[:5]
    assert protocol_lists(index, val=own)["val"] == own and "finetune_01" not in protocol_lists(index)
    assert protocol_lists(index, val=0)["val"] == []
    with pytest.raises(ValueError, match="aren't there, or are for testing"):
        protocol_lists(index, val=lists["test"][:1])
    with pytest.raises(ValueError, match="scenes to train on"):
        protocol_lists(index, val=24)


def test_balance_finds_what_is_rare():
    index = ice_index(100, 0)
    counts = ice_counts(index) * 0 + 1
    rare = counts.index[37]
    counts.loc[rare, ("sod", 5)] = 1000
    counts[("floe", 3)] = 0  # nobody has it
    order = balanced_order(counts, list(counts.index), 10)
    assert len(order) == len(set(order)) == 12  # whole rounds of three
    assert balanced_order(counts, list(counts.index), 4) == order[:6]
    counts[("sod", 5)] = 0
    counts.loc[rare, ("sod", 5)] = 1
    assert rare in balanced_order(counts, list(counts.index), 6)
    assert len(balanced_order(counts, list(counts.index), 1000)) == 100


def test_labels_are_counted_once_at_the_coarsest_scale(tmp_path):
    from sarfm.patches.prepare import write_store
    from sarfm.patches.scales import downscale
    from sarfm.scenes.open import make_scene

    g = np.random.default_rng(0)
    values = g.normal(-12, 3, (2, 200, 170)).astype(np.float32)
    values[0, :30, :40] = np.nan
    codes = g.choice(np.array([0, 1, 7, 255], np.uint8), (200, 170))
    labels = {"sod": (codes, {0: "water", 1: "new ice", 7: "old ice"}), "snow": (codes // 2, {0: "no", 3: "yes"})}
    scene = make_scene({"hh": values[0], "hv": values[1]}, units="dB", quantity="sigma0", labels=labels)
    store = write_store(
        {"a": scene, "b": scene}, tmp_path / "s.zarr", size=32, stride=20, edge="shift", scales=[2, 3], progress=False,
    )  # fmt: skip
    counts, coarse = label_counts(store), downscale(scene, 3)
    seen = coarse["sod"].to_numpy()[coarse["valid"].to_numpy()]
    assert counts["sod"].loc["b"].to_dict() == {c: int((seen == c).sum()) for c in (0, 1, 7)}
    assert list(counts.index) == ["a", "b"] and list(counts["snow"].columns) == [0, 3]
    assert list(label_counts(store, ["snow"]).columns) == [("snow", 0), ("snow", 3)]
    with pytest.raises(ValueError, match=r"has no classes of pixels \['floe'\]; it holds \['sod', 'snow'\]"):
        label_counts(store, ["floe"])


def test_split_by_list():
    index = several_scales(10)
    lists = {"few": ["0003"], "val": ["0005"], "test": ["0008", "0009"]}
    split = make_split(index, "list", lists=lists, train_list="few")
    assert set(index["scene"][split == "train"]) == {f"0003, {f} times coarser" for f in (2, 3, 5)}
    assert split[split != ""].nunique() == 3 and (split[index["scene"] == "0000, 2 times coarser"] == "").all()
    assert set(make_split(index, "list", lists={"few": ["0003"]}, train_list="few")) == {"train", ""}
    with pytest.raises(ValueError, match=r"no list 'many'; there are \['few', 'test', 'val'\]"):
        make_split(index, "list", lists=lists, train_list="many")
    with pytest.raises(ValueError, match="few and test share 1 scenes"):
        make_split(index, "list", lists=lists | {"few": ["0003", "0008"]}, train_list="few")
    with pytest.raises(ValueError, match="1 listed scenes aren't in the store"):
        make_split(index, "list", lists=lists | {"val": ["0077"]}, train_list="few")


def test_a_split_reads_the_entrys_default_and_finds_lists_by_the_data_set(tmp_path, monkeypatch):
    from importlib.metadata import EntryPoint

    from sarfm.patches import splits
    from sarfm.patches.prepare import write_store
    from sarfm.scenes.open import make_scene

    noise = np.random.default_rng(0).normal(-9, 2, (64, 64))
    scene = make_scene({"vv": noise}, units="dB", quantity="sigma0")
    scenes = {f"s{k}": scene for k in range(4)}
    open_it = lambda name, **stated: write_store(scenes, tmp_path / name, size=32, progress=False, **stated)
    lists = {"by": "list", "lists": {"test": ["s0"], "val": ["s1"], "few": ["s3"]}, "train_list": "few"}
    stated, plain, named = open_it("a.zarr", split=lists), open_it("b.zarr"), open_it("c.zarr", dataset="mine")
    parts = Split().parts(stated)
    assert parts.groupby(stated.index["place"]).first().to_dict() == {
        "s0": "test",
        "s1": "val",
        "s2": "",
        "s3": "train",
    }
    assert set(Split(fractions=(0.5, 0.0, 0.5)).parts(plain)) == {"train", "test"}
    assert Split(by="scene").parts(stated).equals(split_by_scene(stated.index, dict(train=0.5, val=0.25, test=0.25)))
    with pytest.raises(ValueError, match="nobody makes lists of scenes for the data set 'mine'"):
        Split(by="list").parts(named)
    point = EntryPoint("mine", "test_splits:made_lists", "sarfm.splits")
    monkeypatch.setattr(splits, "entry_points", lambda group: [point] if group == "sarfm.splits" else [])
    assert lists_of(named, 3) == {"train_100": ["s2"], "seed": ["s3"]}
    assert Split(by="list").parts(named).groupby(named.index["place"]).first().to_dict()["s2"] == "train"


def made_lists(store, seed):
    """Make lists as an installed package would."""
    return {"train_100": ["s2"], "seed": [f"s{seed}"]}


def test_scales_that_are_not_learnt_from_take_no_part(tmp_path):
    from sarfm.patches.prepare import write_store
    from sarfm.scenes.open import make_scene

    noise = np.random.default_rng(0).normal(-9, 2, (128, 128))
    scene = make_scene({"vv": noise}, units="dB", quantity="sigma0")
    store = write_store({"a": scene}, tmp_path / "s.zarr", size=16, scales=[1, 2], progress=False)
    every, fine = Split(by="region").parts(store), Split(by="region", scales=[1]).parts(store)
    assert set(store.index["factor"][fine != ""]) == {1} and (fine == every)[store.index["factor"] == 1].all()
