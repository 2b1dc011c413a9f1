"""Embeddings of scenes: vectors, stores that go on, and exact search."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
import xarray as xr
from sklearn.metrics import balanced_accuracy_score, silhouette_samples

from sarfm.evaluation.distances import DISTANCES, correlation, distance_to, errors_by_distance
from sarfm.evaluation.embeddings import Chips, chip_starts, embed_scene, embedding_vectors, open_embeddings
from sarfm.evaluation.features import Features
from sarfm.evaluation.readouts import Scale
from sarfm.evaluation.search import Directions, find_alike
from sarfm.evaluation.separation import READERS, given_regions, region_separation, silhouettes
from sarfm.models.kinds import build_encoder
from sarfm.patches.contract import InputContract


def contract(side=32):
    said = {"units": "dB", "quantity": "sigma0", "mean": [-9.0, -15.0], "std": [3.0, 3.0]}
    return InputContract(channels=["vv", "vh"], patch_size=8, crop_px=side, **said)


def scene(height=100, width=75, seed=0):
    generator = np.random.default_rng(seed)
    said = {"units": "dB", "quantity": "sigma0"}
    values = {
        name: xr.DataArray(generator.normal(-12, 3, (height, width)).astype(np.float32), dims=("y", "x"), attrs=said)
        for name in ("vv", "vh")
    }
    place = {"y": 5e6 - 10.0 * np.arange(height), "x": 4e5 + 10.0 * np.arange(width)}
    values["valid"] = (("y", "x"), np.ones((height, width), bool))
    return xr.Dataset(values, coords=place, attrs={"title": "noise"}).rio.write_crs(32633)


def encoder_features(pooling="mean"):
    torch.manual_seed(0)
    return Features(build_encoder("vit-nano", 2, 8), ("tile",), pooling).eval()


def files_of(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("pooling", ["mean", "class", "statistics"])
def test_a_vector_is_that_of_its_window(tmp_path, pooling):
    features, noise = encoder_features(pooling), scene()
    noise["vv"][:20, :20] = np.nan
    store = embed_scene(features, contract(), noise, tmp_path / "a.zarr", Chips(stride_px=24, least=0.3, batch=3))
    image, valid = contract().apply(noise)
    starts = chip_starts(100, 32, 24), chip_starts(75, 32, 24)
    assert store["embedding"].shape[:2] == tuple(map(len, starts))
    for row, y in enumerate(starts[0]):
        for column, x in enumerate(starts[1]):
            part, seen = torch.zeros(1, 2, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool)
            window = image[:, y : y + 32, x : x + 32]
            part[0, :, : window.shape[1], : window.shape[2]] = window
            seen[0, : window.shape[1], : window.shape[2]] = valid[y : y + 32, x : x + 32]
            assert store["valid_fraction"][row, column] == pytest.approx(float(seen.float().mean()))
            found = store["embedding"][row, column].values
            if seen.float().mean() < 0.3:
                assert np.isnan(found).all()
            else:
                assert np.allclose(found, features.extract(part, seen)["tile"][0], atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("after", [0, 1, 5, 9])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path, int8, after):
    features, chips, calls = encoder_features(), Chips(stride_px=8, int8=int8, batch=4), []
    embed_scene(features, contract(), scene(), tmp_path / "whole.zarr", chips)
    extract = features.extract

    def dies(image, valid=None):
        calls.append(1)
        if len(calls) > 1 + after:
            raise KeyboardInterrupt
        return extract(image, valid)

    features.extract = dies
    with pytest.raises(KeyboardInterrupt):
        embed_scene(features, contract(), scene(), tmp_path / "killed.zarr", chips)
    features.extract = extract
    assert not (tmp_path / "killed.zarr").exists()
    embed_scene(features, contract(), scene(), tmp_path / "killed.zarr", chips)
    assert files_of(tmp_path / "killed.zarr") == files_of(tmp_path / "whole.zarr")


def test_a_store_of_other_weights_or_a_damaged_row_is_not_gone_on_with(tmp_path):
    chips = Chips(stride_px=16)
    whole = embed_scene(encoder_features(), contract(), scene(), tmp_path / "a.zarr", chips).load()
    (tmp_path / "a.zarr").rename(tmp_path / "b.zarr.partial")
    chunk = tmp_path / "b.zarr.partial" / "embedding" / "c" / "2" / "0" / "0"
    damaged = bytearray(chunk.read_bytes())
    damaged[40] ^= 255
    chunk.write_bytes(bytes(damaged))
    again = embed_scene(encoder_features(), contract(), scene(), tmp_path / "b.zarr", chips)
    assert np.array_equal(embedding_vectors(again), embedding_vectors(whole), equal_nan=True)
    (tmp_path / "b.zarr").rename(tmp_path / "c.zarr.partial")
    torch.manual_seed(1)
    other = Features(build_encoder("vit-nano", 2, 8), ("tile",))
    third = embed_scene(other, contract(), scene(), tmp_path / "c.zarr", chips)
    assert not np.allclose(embedding_vectors(third)[0], embedding_vectors(whole)[0])


def test_search_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(2)
    values = torch.nn.functional.normalize(torch.randn(501, 12, generator=generator), dim=1)
    known = np.arange(501) % 5 != 0
    values[~known] = 0
    bank = Directions(values, known, Scale(np.zeros(12), np.ones(12)))
    for block in (7, 100, 9999):
        place, cosine = find_alike(bank, values[[1, 2]], 9, block)
        for row, number in enumerate((1, 2)):
            slow = sorted((-float(values[number] @ values[k]), k) for k in range(501) if known[k])[:9]
            assert place[row].tolist() == [k for _, k in slow]
            assert np.allclose(cosine[row], [-c for c, _ in slow], atol=1e-6)


EMBED_IN_CHILD = """
import json, resource, sys, time
import torch, xarray as xr
sys.path.insert(0, sys.argv[1])
from test_embeddings import contract, large_features
from sarfm.evaluation.embeddings import embed_scene

features, inside = large_features(), [0.0, 0.0]
extract = features.extract

def timed(image, valid=None):
    begin = time.perf_counter(), time.process_time()
    found = extract(image, valid)
    inside[0] += time.perf_counter() - begin[0]
    inside[1] += time.process_time() - begin[1]
    return found

features.extract = timed
wide = contract(224).model_copy(update={"patch_size": 16})
scene = xr.open_zarr(sys.argv[2], decode_coords="all", consolidated=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter(), time.process_time()
embed_scene(features, wide, scene, sys.argv[3])
took = time.perf_counter() - begin[0], time.process_time() - begin[1]
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"wall_s": took[0], "cpu_s": took[1], "wall": inside[0] / took[0], "cpu": inside[1] / took[1], "grew_mb": (most - before) / 1024, "peak_mb": most / 1024}))
"""


def large_features():
    torch.manual_seed(0)
    return Features(build_encoder("vit-small", 2, 16), ("tile",)).eval()


def large_scene(path, side):
    """Write a scene of one tile of noise again and again, a little brighter from band to band, as Zarr."""
    noise = scene(1000, 1000)
    for row in range(0, side, 1000):
        band = noise.isel(x=np.arange(side) % 1000)
        band["vv"] = band["vv"] + np.float32(row / 2000)
        band["vv"].attrs |= noise["vv"].attrs
        band = band.assign_coords(x=4e5 + 10.0 * np.arange(side), y=5e6 - 10.0 * (row + np.arange(1000)))
        encoding = {n: {"chunks": (1000, 1000)} for n in ("vv", "vh", "valid")}
        if row:
            band.drop_vars("spatial_ref").to_zarr(path, append_dim="y", consolidated=False)
        else:
            band.to_zarr(path, encoding=encoding, consolidated=False)


@pytest.mark.soak
def test_a_large_scene_is_embedded_in_bounded_memory_most_of_the_time_in_the_model_and_survives_kill_9(tmp_path):
    large_scene(tmp_path / "scene.zarr", 10_000)
    here = str(Path(__file__).parent)
    ask = lambda out: [sys.executable, "-c", EMBED_IN_CHILD, here, str(tmp_path / "scene.zarr"), str(tmp_path / out)]
    told = json.loads(subprocess.run(ask("whole.zarr"), check=True, capture_output=True, text=True).stdout)
    print(told)
    assert open_embeddings(tmp_path / "whole.zarr").sizes["row"] == 45
    assert told["grew_mb"] < 600 and told["cpu"] > 0.9, told
    killed = subprocess.Popen(ask("killed.zarr"), stdout=subprocess.DEVNULL)
    rows = tmp_path / "killed.zarr.partial" / "valid_fraction" / "c"
    while not (rows / "11").is_dir():
        assert killed.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    killed.kill()  # SIGKILL
    killed.wait()
    assert not (tmp_path / "killed.zarr").exists()
    again = json.loads(subprocess.run(ask("killed.zarr"), check=True, capture_output=True, text=True).stdout)
    print(again)
    assert again["cpu_s"] < 0.95 * told["cpu_s"], "it went on instead of beginning anew"
    assert files_of(tmp_path / "killed.zarr") == files_of(tmp_path / "whole.zarr")


@pytest.mark.parametrize("kind", DISTANCES)
def test_distance_is_that_of_scipy(kind):
    generator = np.random.default_rng(4)
    reference = (generator.normal(size=(60, 6)) @ generator.normal(size=(6, 6)) + 3).astype(np.float32)
    tiles = (generator.normal(size=(9, 6)) * 4).astype(np.float32)
    x, within = ((v - reference.mean(0)) / reference.std(0) for v in (tiles, reference))
    inverse = np.linalg.inv(0.8 * within.T @ within / 60 + 0.2 * np.eye(6))
    slow = {
        "centroid": [scipy.spatial.distance.euclidean(v, np.zeros(6)) for v in x],
        "mahalanobis": [scipy.spatial.distance.mahalanobis(v, np.zeros(6), inverse) for v in x],
        "nearest": np.sort(scipy.spatial.distance.cdist(x, within), 1)[:, :3].mean(1),
    }
    found = distance_to(tiles, reference, kind, shrinkage=0.2, neighbours=3)
    assert np.allclose(found, np.array(slow[kind]) / 6**0.5, rtol=1e-4)
    assert np.allclose(distance_to(1000 * tiles, 1000 * reference, kind, 0.2, 3), found, rtol=1e-3), "no unit counts"


def test_correlation_is_that_of_scipy_and_its_interval_draws_whole_regions():
    generator = np.random.default_rng(5)
    region = np.repeat(list("abcdefgh"), 25)
    level = np.repeat(generator.normal(size=8), 25)
    x, y = level + 0.1 * generator.normal(size=200), level**3 + 0.1 * generator.normal(size=200)
    tiles, regions = correlation(x, y), correlation(x, y, region)
    for found in (tiles, regions):
        assert found.pearson.value == pytest.approx(scipy.stats.pearsonr(x, y)[0])
        assert found.spearman.value == pytest.approx(scipy.stats.spearmanr(x, y)[0])
    draws = np.random.default_rng(0).multinomial(8, np.full(8, 1 / 8), size=1000)  # by hand, region by region
    rows = [np.concatenate([np.flatnonzero(region == n) for n, k in zip("abcdefgh", d, strict=True) for _ in range(k)]) for d in draws]  # fmt: skip
    slow = np.quantile([scipy.stats.spearmanr(x[r], y[r])[0] for r in rows], [0.025, 0.975])
    assert np.allclose(regions.spearman[1:], slow) and (tiles.units, regions.units) == (200, 8)
    assert np.ptp(regions.spearman[1:]) > 2 * np.ptp(tiles.spearman[1:])
    assert np.isnan(correlation(x, y, np.zeros(200)).spearman.low), "one region says nothing of others"


def test_distances_and_errors_that_cannot_be_compared_are_refused():
    x = np.arange(9.0).reshape(9, 1)
    for wrong, what in (
        (lambda: distance_to(x, x, "cosine"), "cosine"),
        (lambda: distance_to(x * np.nan, x), "finite"),
        (lambda: distance_to(x, x, "nearest", neighbours=10), "1 to 9 neighbours"),
        (lambda: correlation(x[:, 0], x[:, 0] * np.nan), "not finite"),
        (lambda: correlation(x[:2, 0], x[:2, 0]), "3 tiles"),
        (lambda: errors_by_distance(x[:, 0], x[:, 0], 10), "2 to 9 bins"),
    ):
        with pytest.raises(ValueError, match=what):
            wrong()


@pytest.mark.parametrize("reader", READERS)
def test_regions_apart_are_told_and_regions_alike_are_at_chance(reader):
    generator = np.random.default_rng(6)
    names = np.repeat(["far", "here", "there"], [50, 90, 70])
    noise, way = generator.normal(size=(210, 10)), np.eye(3, 10)[np.unique(names, return_inverse=True)[1]]
    alike, apart = (region_separation(noise + step * way, names, reader) for step in (0, 6))
    assert alike.accuracy.low < alike.chance == 1 / 3 < alike.accuracy.high and abs(alike.silhouette.value) < 0.05
    assert apart.accuracy.value > 0.97 and apart.silhouette.low > 0.1
    given = given_regions(noise + 2 * way, names, reader)
    found = region_separation(noise + 2 * way, names, reader)
    assert found.accuracy.value == pytest.approx(balanced_accuracy_score(names, given))
    assert found.accuracy.low < found.accuracy.value < found.accuracy.high
    assert np.allclose(silhouettes(noise + way, names), silhouette_samples(noise + way, names))


def test_a_tile_that_is_asked_has_no_say():
    generator = np.random.default_rng(7)
    noise = generator.normal(size=(120, 200))  # more features than tiles: what is learnt from is always right
    names = generator.permutation(np.repeat(["a", "b"], 60))
    for reader in READERS:
        assert (given_regions(noise, names, reader) == names).mean() < 0.65
    with pytest.raises(ValueError, match="at least 5 tiles"):
        given_regions(noise, np.repeat(["a", "b"], [117, 3]))
