"""What the design promises, measured: `make bench` prints a table and writes bench.json.

Times are CPU time of one process on one thread: both sides once per round in random order, the baseline twice. A
measurement whose baseline disagrees with itself (`aa`) by more than 3 % is repeated, and dropped after several tries.
Operations, modules and memory are counted, not timed. `python tests/bench.py FILE NAME ...` measures only these rows.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
import xarray as xr
import zarr
from predictors import one_target
from test_mae_reference import pair, reference
from test_mixmae import plain_loss
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sarfm.evaluation.counting import count_piece
from sarfm.evaluation.intervals import score_table
from sarfm.evaluation.predict import predict_scene
from sarfm.evaluation.tallies import Tallies
from sarfm.evaluation.tiles import tile_starts
from sarfm.ice.charts import chart_targets
from sarfm.io.files import write_json
from sarfm.models.checkpointing import KeptBytes, set_checkpointing
from sarfm.models.kinds import build_encoder
from sarfm.models.mae import MAE
from sarfm.models.masking import hide_highest
from sarfm.models.mixmae import MixMAE
from sarfm.patches.contract import InputContract
from sarfm.patches.prepare import write_store
from sarfm.scenes.channels import Target
from sarfm.scenes.open import make_scene
from sarfm.tasks.predictor import Predictor
from sarfm.tasks.tasks import Classes, task_for

TRIES = 5
CHANNELS = (3, 12)


def timed(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Measure the CPU seconds of two calls, and how much the second agrees with itself."""
    calls = {"ours": ours, "theirs": theirs, "again": theirs}
    for call in calls.values():
        call()
    for _ in range(TRIES):
        seconds = {name: [] for name in calls}
        for _ in range(rounds):
            for name in random.sample(list(calls), len(calls)):
                start = time.process_time()
                calls[name]()
                seconds[name].append(time.process_time() - start)
        found = {name: median(values) for name, values in seconds.items()}
        aa = found["theirs"] / found["again"]
        if 0.97 <= aa <= 1.03:
            each = [a / b for a, b in zip(seconds["theirs"], seconds["ours"], strict=True)]
            spread = float(np.subtract(*np.quantile(each, [0.75, 0.25])))
            return {"ours": found["ours"], "theirs": found["theirs"], "spread": spread, "aa": aa}
    raise RuntimeError(f"the baseline disagreed with itself by more than 3 % in {TRIES} tries")


def row(name: str, unit: str, ours: float, theirs: float, faster: bool = False, spread: float = 0, aa: float = 1):
    """Make a row: ours over theirs, or, where `faster`, theirs over ours."""
    ratio = theirs / ours if faster else ours / theirs
    numbers = {"ratio": ratio, "ours": ours, "theirs": theirs, "spread": spread, "aa": aa}
    return {"name": name, "unit": unit} | {key: float(f"{value:.4g}") for key, value in numbers.items()}


def per_item(found: dict[str, float], items: int, scale: float = 1e3) -> dict[str, float]:
    """Give the times of one item, in milliseconds."""
    return found | {side: found[side] / items * scale for side in ("ours", "theirs")}


# ---- training --------------------------------------------------------------------------------------------------------


def training_steps(
    channels: int, precision: torch.dtype, size: int = 224, images: int = 8, decoder: tuple[int, int, int] = (512, 8, 16),
    norm_pix: bool = True,
) -> tuple[Callable[[], float], Callable[[], float]]:  # fmt: skip
    """Give one step, forward and backward, of our and of the published ViT-B/16 with the same weights and noise."""
    theirs, ours, _ = pair(channels, norm_pix, size, 16, dict(width=768, depth=12, heads=12), decoder)
    image, noise = torch.randn(images, channels, size, size), torch.rand(images, (size // 16) ** 2)
    batch = {"image": image, "hidden": hide_highest(noise, 0.75)}
    autocast = lambda: torch.autocast("cpu", precision, enabled=precision is not torch.float32)

    def step_ours() -> float:
        ours.zero_grad()
        with autocast():
            loss, _ = ours.loss(batch)
        loss.backward()
        return loss.item()

    def step_theirs() -> float:
        theirs.zero_grad()
        with autocast():
            loss = theirs(image, noise=noise).loss
        loss.backward()
        return loss.item()

    return step_ours, step_theirs


def mae_steps() -> Iterator[dict]:
    """A training step: ViT-B/16, 224 px, batches of 8."""
    for precision, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for channels in CHANNELS:
            found = per_item(timed(*training_steps(channels, precision), rounds=5), 8)
            yield row(f"mae_step_{name}_c{channels}", "CPU ms per image", **found, faster=True)


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEASONS = dict(channels=12, size=448, images=2, decoder=(512, 1, 16), norm_pix=False)  # Allen et al. 2023


def seasonal_steps() -> Iterator[dict]:
    """A training step on twelve channels: ViT-B/16, 448 px, a decoder of one layer, batches of 2; time and memory."""
    for name, precision in PRECISIONS.items():
        ours, theirs = training_steps(precision=precision, **SEASONS)
        losses, allowed = (ours(), theirs()), 1e-5 if name == "fp32" else 1e-2
        if abs(losses[0] - losses[1]) > allowed * losses[1]:
            raise RuntimeError(f"the losses differ in {name}: {losses[0]} and transformers' {losses[1]}")
        found = per_item(timed(ours, theirs, rounds=5), SEASONS["images"])
        yield row(f"mae_step_{name}_448_c12", "CPU ms per image", **found, faster=True)
        yield row(f"mae_kept_mb_{name}_448_c12", "MB kept for the backward pass", *kept_by_steps(precision))


def kept_by_steps(precision: torch.dtype) -> list[float]:
    """Count what a step of ours and of transformers' keeps for its backward pass, in MB: weights are the same."""
    theirs, ours, _ = pair(12, False, 448, 16, dict(width=768, depth=12, heads=12), SEASONS["decoder"])
    image, noise, found = torch.randn(2, 12, 448, 448), torch.rand(2, 784), []
    batch = {"image": image, "hidden": hide_highest(noise, 0.75)}
    for model, step in ((ours, lambda: ours.loss(batch)[0]), (theirs, lambda: theirs(image, noise=noise).loss)):
        with torch.autocast("cpu", precision, enabled=precision is not torch.float32), KeptBytes(model) as kept:
            step()
        found.append(kept.total / 1e6)
    return found


PRODUCTS = ("_linear_pointwise", "aten::bmm", "aten::mm", "aten::addmm", "flash_attention")  # of matrices, as named


def product_share(step: Callable[[], object], times: int = 5) -> float:
    """Measure which part of a step's time on the CPU goes into products of matrices, by PyTorch's own profiler."""
    shares = []
    for _ in range(times):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            step()
        events = [(e.key, e.self_cpu_time_total) for e in found.key_averages()]
        products = sum(spent for name, spent in events if any(product in name for product in PRODUCTS))
        shares.append(products / sum(spent for _, spent in events))
    return median(shares)


def mixmae_steps(images: int = 8) -> Iterator[dict]:
    """A training step of MixMAE-Base on two channels of 128 px, over the method as it is written down, on the same layers."""
    torch.manual_seed(0)
    model = MixMAE(build_encoder("mixmim-base", 2, 4))
    image = torch.randn(images, 2, 128, 128)
    drawn = model.draw({"image": image}, torch.Generator().manual_seed(0))
    losses = {"ours": lambda: model.loss(drawn)[0], "plain": lambda: plain_loss(model, image, drawn["hidden"])}

    def step(whose: str) -> float:
        model.zero_grad()
        loss = losses[whose]()
        loss.backward()
        return loss.item()

    ours, plain = partial(step, "ours"), partial(step, "plain")
    if abs(ours() - plain()) > 1e-5 * plain():
        raise RuntimeError(f"the losses differ: {ours()} and {plain()} of the plain formulation")
    found = per_item(timed(ours, plain, rounds=7), images)
    yield row("mixmae_step_fp32_128_c2", "CPU ms per image", **found, faster=True)
    share = product_share(ours)
    print(f"mixmae_step_fp32_128_c2: {share:.1%} of the step in products of matrices; 84 % is promised")
    yield row("mixmae_product_share", "of the step, of 0.84", share, 0.84)


def checkpointed_step(model, batch: dict, precision: torch.dtype, kept: dict[bool, float], again: bool) -> None:
    """Make a step, and note how many MB it keeps for the backward pass."""
    model.zero_grad()
    set_checkpointing(model, again)
    with torch.autocast("cpu", precision, enabled=precision is not torch.float32), KeptBytes(model) as held:
        loss, _ = model.loss(batch)
    loss.backward()
    kept[again] = held.total / 1e6


def checkpointing() -> Iterator[dict]:
    """A step that computes its layers again in the backward pass over a plain one: bytes kept, and CPU time."""
    torch.manual_seed(0)
    grid = {"positions": "learned", "grid": (28, 28)}
    body = lambda: build_encoder("vit-base", 12, 16, **grid)
    land = {"land": Classes(Target("land", classes={k: f"class {k}" for k in range(11)}))}
    generator, image = torch.Generator().manual_seed(0), torch.randn(2, 12, 448, 448)
    learners = {
        "mae": (lambda: MAE(body(), 512, 1, 16, mask_ratio=0.751), {"image": image}),
        "setr": (lambda: Predictor(body(), land, "setr-pup-half"),
                 {"image": image, "target_land": torch.randint(0, 11, (2, 448, 448))}),
    }  # fmt: skip
    for name, (make, items) in learners.items():
        for precision_name, precision in PRECISIONS.items():
            model, kept = make(), {}
            step = partial(checkpointed_step, model, model.draw(items, generator), precision, kept)
            found = per_item(timed(partial(step, True), partial(step, False), rounds=3), 2)
            yield row(f"checkpointing_mb_{name}_{precision_name}", "MB kept per image", kept[True] / 2, kept[False] / 2)
            yield row(f"checkpointing_time_{name}_{precision_name}", "CPU ms per image", **found)


def checkpointing_peak() -> Iterator[dict]:
    """Peak memory of one step that computes its layers again, over a plain one, each in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        return print("checkpointing_peak: measured on Linux only")
    for name in ("mae", "mixmae"):
        grown = [measured(f"step_peak({name!r}, {again})") for again in (True, False)]
        yield row(f"checkpointing_peak_mb_{name}", "MB over the model", *grown)


def step_peak(name: str, again: bool) -> None:
    """Print the memory before a step and the most during it, in MB, as Linux counts them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name == "mae":
        model, image = MAE(build_encoder("vit-base", 12, 16), 512, 1, 16), torch.randn(2, 12, 448, 448)
    else:
        model, image = MixMAE(build_encoder("mixmim-base", 2, 4)), torch.randn(16, 2, 128, 128)
    set_checkpointing(model, again)
    batch = model.draw({"image": image}, torch.Generator().manual_seed(0))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model.loss(batch)[0].backward()
    print(before, resident("VmHWM"))


def mae_flops() -> Iterator[dict]:
    """Operations of a training step, counted by PyTorch."""
    for channels in CHANNELS:
        theirs = reference(channels, 224, 16, True, 768, 12, 12, (512, 8, 16))
        ours = MAE(build_encoder("vit-base", channels), norm_pix=True)
        image = torch.randn(8, channels, 224, 224)
        with FlopCounterMode(display=False) as mine:
            ours.loss(ours.draw({"image": image}))[0].backward()
        with FlopCounterMode(display=False) as published:
            theirs(image).loss.backward()
        counted = [counter.get_total_flops() / 8e9 for counter in (mine, published)]
        yield row(f"mae_flops_c{channels}", "GFLOP per image", *counted)


# ---- reading ---------------------------------------------------------------------------------------------------------


def crops(patches: int = 400, side: int = 256, crop: int = 224) -> Iterator[dict]:
    """Random crops of two float32 bands out of 256 px patches, from the page cache."""
    rng = np.random.default_rng(0)
    width = side * int(patches**0.5)
    bands = {name: rng.normal(-12, 3, (width, width)).astype("float32") for name in ("vv", "vh")}
    scene = make_scene(bands, units="dB", quantity="sigma0", nodata="none")
    with tempfile.TemporaryDirectory() as folder:
        store = write_store({"scene": scene}, Path(folder) / "store.zarr", size=side, progress=False)
        np.save(Path(folder) / "patches.npy", np.stack([store.read(k) for k in range(len(store))]))
        xr.Dataset({name: (("y", "x"), values) for name, values in bands.items()}).to_netcdf(
            Path(folder) / "scene.nc", engine="netcdf4", encoding={name: {"zlib": True} for name in bands}
        )
        mapped = np.load(Path(folder) / "patches.npy", mmap_mode="r")
        stored = zarr.open_array(store.path / "image", mode="r")
        opened = xr.open_dataset(Path(folder) / "scene.nc", engine="netcdf4", cache=False)
        places = [(k, *rng.integers(0, side - crop, 2)) for k in rng.permutation(len(store))]

        def several(read: Callable[[int, int, int], object], items: int) -> Callable[[], object]:
            return lambda: [read(*place) for place in random.sample(places, items)] and None

        ours = lambda k, y, x: np.array(store.read(k)[:, y : y + crop, x : x + crop])
        corner = store.index[["row", "col"]].to_numpy()

        def windowed(k: int, y: int, x: int) -> np.ndarray:
            y, x = corner[k] + (y, x)
            return opened.isel(y=slice(y, y + crop), x=slice(x, x + crop)).to_array().values

        others = {
            "memmap": (lambda k, y, x: np.array(mapped[k, :, y : y + crop, x : x + crop]), 100, False),
            "zarr_python": (lambda k, y, x: stored[k, :, y : y + crop, x : x + crop], 100, True),
            "netcdf": (windowed, 5, True),
        }
        for name, (theirs, items, faster) in others.items():
            found = per_item(timed(several(ours, items), several(theirs, items), rounds=9), items)
            yield row(f"crop_vs_{name}", "CPU ms per crop", **found, faster=faster)
        opened.close()


# ---- predicting ------------------------------------------------------------------------------------------------------


class Same(torch.nn.Module):
    """Answer every tile with the same scores of eleven classes: a model that costs nothing."""

    tasks = {"tenths": Classes(Target("tenths", classes={k: f"{k}/10" for k in range(11)}))}

    def forward(self, image: torch.Tensor, valid: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"tenths": image[:, :1].repeat(1, 11, 1, 1)}


def plain_scene(side: int) -> tuple[xr.Dataset, InputContract]:
    """Make a scene of noise and the contract that fits it."""
    bands = {n: np.random.default_rng(0).normal(-12, 3, (side, side)).astype("float32") for n in ("vv", "vh")}
    contract = dict(channels=["vv", "vh"], units="dB", quantity="sigma0", mean=[-12.0, -12.0], std=[3.0, 3.0])
    scene = make_scene(bands, units="dB", quantity="sigma0", nodata="none")
    return scene, InputContract(**contract, patch_size=16, crop_px=224)


def prediction() -> Iterator[dict]:
    """A scene in tiles of 224 px that overlap by half, over its model alone: ViT-S/16 with a linear head."""
    scene, contract = plain_scene(1008)
    model = one_target(build_encoder("vit-small", 2, 16), 11, "linear").eval()
    tiles = len(tile_starts(1008, 224, 112)) ** 2
    image, valid = torch.randn(8, 2, 224, 224), torch.ones(8, 224, 224, dtype=torch.bool)

    @torch.inference_mode()
    def alone() -> None:
        for _ in range(tiles // 8):
            model(image, valid)

    assert tiles % 8 == 0
    found = per_item(timed(lambda: predict_scene(model, contract, scene), alone, rounds=3), tiles)
    yield row("predict_overhead", "CPU ms per tile", **found)


def sliding_window(side: int = 5000) -> Iterator[dict]:
    """A scene in tiles of 224 px, half overlap, eleven classes, a model that costs nothing: MONAI's sliding window.

    Both blend scores with a weight per pixel and end with the class of every pixel; MONAI is spared the softmax and the
    probability of the class that sarfm computes as well.
    """
    try:
        from monai.inferers import SlidingWindowInferer
    except ImportError:
        return print("sliding_window: MONAI is not installed (uv pip install monai)")
    inferer = SlidingWindowInferer((224, 224), sw_batch_size=8, overlap=0.5, mode="gaussian")
    scene, contract = plain_scene(1568)  # 13 x 13 tiles; memory is measured at full size
    tiles, model = len(tile_starts(1568, 224, 112)) ** 2, Same()

    @torch.inference_mode()
    def theirs() -> None:
        inferer(contract.apply(scene)[0][None], lambda image: model(image, None)["tenths"]).argmax(1)

    ours = lambda: predict_scene(model, contract, scene)
    found = per_item(timed(ours, theirs, rounds=7), tiles)
    yield row("sliding_window_speed", "CPU ms per tile", **found, faster=True)
    print("sliding_window_speed: 1.1 is promised")
    grown = [measured(f"peak({side}, {name!r})") for name in ("ours", "monai")]
    yield row("sliding_window_peak_mb", "MB over the input", *grown)


def measured(call: str) -> float:
    """Give by how many MB memory grew at most during a call in a process of its own, which prints before and most."""
    found = subprocess.run(
        [sys.executable, "-c", f"import bench; bench.{call}"], check=True, capture_output=True, text=True,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    before, after = map(float, found.stdout.split()[-2:])
    return after - before


def memory() -> Iterator[dict]:
    """Peak memory of predicting 5,000 x 5,000 px into eleven classes, over the process with its input."""
    if not Path("/proc/self/clear_refs").exists():
        return print("predict_peak_mb: measured on Linux only")
    yield row("predict_peak_mb", "MB over the input", measured("peak()"), 400.0)


def resident(what: str) -> float:
    """Read what Linux counts for this process, in MB: VmRSS now, VmHWM at most."""
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(what)) / 1024


def peak(side: int = 5000, whose: str = "ours") -> None:
    """Print the memory before a prediction and the most during it, in MB, as Linux counts them."""
    scene, contract = plain_scene(side)
    if whose == "monai":
        from monai.inferers import SlidingWindowInferer

        inferer = SlidingWindowInferer((224, 224), sw_batch_size=8, overlap=0.5, mode="gaussian")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far, while the scene was made, is forgotten
    before = resident("VmRSS")
    if whose == "monai":
        with torch.inference_mode():
            inferer(contract.apply(scene)[0][None], lambda image: Same()(image, None)["tenths"]).argmax(1)
    else:
        predict_scene(Same(), contract, scene)
    print(before, resident("VmHWM"))


# ---- scoring ---------------------------------------------------------------------------------------------------------

CHARTS = {"sic": 11, "sod": 6, "floe": 7}


def chart_pair(scene: int, chart: str, side: int, block: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Make a chart and a prediction of it, block by block: blocky truth, a tenth unlabelled, two thirds right."""
    rng, classes = np.random.default_rng((scene, *chart.encode())), CHARTS[chart]
    truth = rng.integers(0, classes, (side // block, side // block), dtype=np.uint8).repeat(block, 0).repeat(block, 1)
    predicted = truth.copy()
    for rows in range(0, side, block):
        wrong = rng.random((block, side), np.float32) < 0.33
        predicted[rows : rows + block][wrong] = rng.integers(0, classes, int(wrong.sum()), dtype=np.uint8)
        truth[rows : rows + block][rng.random((block, side), np.float32) < 0.1] = 255
    return predicted, truth


def ice_score(scenes: int = 20, side: int = 5000, subset: int = 2) -> Iterator[dict]:
    """The combined score of 20 scenes of 5,000 x 5,000, streaming, and scikit-learn on 2 of them, concatenated.

    scikit-learn needs the pixels of all scenes at once, as int64: 20 scenes would take some 30 GB. So it gets two, and
    times and memory are given per scene and as they are.
    """
    found = {}
    for whose, number in (("ours", scenes), ("sklearn", subset), ("ours", subset)):
        done = subprocess.run(
            [sys.executable, "-c", f"import bench; bench.score({whose!r}, {number}, {side})"], check=True,
            capture_output=True, text=True, cwd=Path(__file__).parent,
        )  # fmt: skip
        found[whose, number] = dict(zip(("seconds", "mb", "score"), map(float, done.stdout.split()[-3:]), strict=True))
    ours, theirs, same = (found[key] for key in (("ours", scenes), ("sklearn", subset), ("ours", subset)))
    if abs(same["score"] - theirs["score"]) > 1e-6:
        raise RuntimeError(f"the scores differ: {same['score']} and scikit-learn's {theirs['score']}")
    print(f"ice_score: {scenes} scenes {ours}, scikit-learn on {subset} {theirs}")
    each = ours["seconds"] / scenes, theirs["seconds"] / subset
    yield row("ice_score_speed", "CPU s per scene", *each, faster=True)
    yield row("ice_score_peak_mb", f"MB, {scenes} scenes against {subset}", ours["mb"], theirs["mb"])


def score(whose: str, scenes: int, side: int) -> None:
    """Print CPU seconds without making the charts, MB over the imports, and the combined score."""
    from sklearn.metrics import f1_score, r2_score

    tasks = {name: task_for(target) for name, target in chart_targets().items()}
    counts, held, seconds = Tallies(), {chart: ([], []) for chart in CHARTS}, 0.0
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for scene in range(scenes):
        for chart in CHARTS:
            predicted, truth = chart_pair(scene, chart, side)
            start = time.process_time()
            if whose == "ours":
                for k in range(0, side, 256):  # in bands, as a scene is predicted
                    count_piece(counts, tasks[chart], str(scene), chart, predicted[k : k + 256], truth[k : k + 256])
            else:
                seen = truth != 255
                held[chart][0].append(truth[seen])
                held[chart][1].append(predicted[seen])
            seconds += time.process_time() - start
    start = time.process_time()
    if whose == "ours":
        table = score_table(counts.table(), tasks, draws=1)
        combined = float(table.loc[table["score"] == "combined", "value"].iloc[0])
    else:
        parts = []
        for chart in CHARTS:
            truth, predicted = (np.concatenate(v) for v in held[chart])
            if chart == "sic":
                parts.append(r2_score(truth.astype(np.int64), predicted.astype(np.int64)))
            else:
                parts.append(f1_score(truth, predicted, average="weighted"))
        combined = (2 * parts[0] + 2 * parts[1] + parts[2]) / 5
    print(seconds + time.process_time() - start, resident("VmHWM") - before, combined)


def imports() -> Iterator[dict]:
    """Importing the package and its command line: seconds, and none of the heavy modules."""
    heavy = ["torch", "timm", "xarray", "zarr", "rasterio", "matplotlib", "ipywidgets"]
    code = "import time, sys; t = time.process_time(); import sarfm, sarfm.cli; t = time.process_time() - t; print(t); "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    runs = [subprocess.check_output([sys.executable, "-c", code], text=True).split("\n") for _ in range(7)]
    if loaded := {lines[1] for lines in runs} - {"[]"}:
        raise RuntimeError(f"importing sarfm loads {loaded}")
    yield row("import_seconds", "CPU s, of 0.15", median(float(lines[0]) for lines in runs), 0.15)


PARTS: list[Callable[[], Iterator[dict]]] = [
    imports, mae_flops, crops, memory, prediction, sliding_window, ice_score, mae_steps, seasonal_steps, mixmae_steps,
    checkpointing, checkpointing_peak,
]  # fmt: skip


def main(path: Path, wanted: list[str]) -> None:
    """Measure the chosen parts, or all, and write them."""
    if unknown := set(wanted) - {part.__name__ for part in PARTS}:
        raise SystemExit(f"no {', '.join(unknown)}; there are {', '.join(part.__name__ for part in PARTS)}")
    torch.set_num_threads(1)
    rows = []
    for part in PARTS:
        if not wanted or part.__name__ in wanted:
            for measured in part():
                rows.append(measured)
                print(f"{measured['name']:<22}{measured['ratio']:>8.3f}", flush=True)
    write_json(path, rows)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "bench.json"), sys.argv[2:])
