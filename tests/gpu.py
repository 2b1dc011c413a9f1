"""What can only be seen on a GPU, in one JSON file: agreement with the CPU, speeds, utilisation, memory, the run notebooks.

`tests/gpu.sh` calls it; every part is written as soon as it is known, and a part that fails says so while the others run.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from sarfm.io.files import write_json
from sarfm.models.kinds import build_encoder
from sarfm.models.mae import MAE

SECONDS = float(os.environ.get("GPU_SECONDS", 480)) - 30  # after these no further part begins
began = time.monotonic()


# ---- what is read off the device ----------------------------------------------------------------------------------


def settle(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def watched(device: torch.device, into: dict) -> Iterator[None]:
    """Note a block's seconds, the GPU's mean utilisation in %, and the peak of its memory in MB."""
    seen, done = [], threading.Event()

    def sample() -> None:
        while not done.wait(0.2):
            asked = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
            seen.append([float(v) for v in subprocess.check_output(asked, text=True).splitlines()[0].split(",")])

    watcher = threading.Thread(target=sample)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        watcher.start()
    start = time.perf_counter()
    try:
        yield
        settle(device)
    finally:
        into["seconds"] = time.perf_counter() - start
        done.set()
        if device.type == "cuda":
            watcher.join()
            into["peak_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
            into |= {"utilisation": mean(u for u, _ in seen), "used_mb": max(m for _, m in seen)} if seen else {}


@contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """Let a step fail that waits for the device: it keeps the GPU idle."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- parts --------------------------------------------------------------------------------------------------------


def machine(device: torch.device, dry: bool) -> dict:
    """Say where this was measured."""
    found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"gpu": about.name, "memory_gb": about.total_memory / 1e9, "cuda": torch.version.cuda}
        found |= {"bf16": torch.cuda.is_bf16_supported(), "capability": list(torch.cuda.get_device_capability(device))}
    return found


def made(size: str, device: torch.device, channels: int = 2, token_px: int = 16) -> MAE:
    """Build the same model for every device."""
    torch.manual_seed(0)
    return MAE(build_encoder(size, channels, token_px), norm_pix=True).to(device)


def images(count: int, side: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Make the same images for every device, a corner of them unobserved."""
    image = torch.randn(count, 2, side, side, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(count, side, side, dtype=torch.bool)
    valid[:, : side // 4, : side // 5] = False
    return {"image": image.to(device), "valid": valid.to(device)}


def agreement(device: torch.device, dry: bool) -> dict:
    """Loss and gradients of a step in fp32, on the CPU and here: 1e-4 of the largest."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    size, cpu = "vit-nano" if dry else "vit-tiny", torch.device("cpu")
    batch, found = made(size, cpu).draw(images(4, 64, cpu), torch.Generator().manual_seed(2)), []
    for where in (cpu, device):
        model = made(size, where)
        there = {n: v.to(where) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
        loss, _ = model.loss(there)
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients))
    (theirs, expected), (ours, gradients) = found
    worst = max(float((gradients[n] - g).abs().max() / g.abs().max().clamp_min(1e-12)) for n, g in expected.items())
    result = {"loss": ours, "loss_difference": abs(ours - theirs) / abs(theirs), "worst_gradient": worst}
    assert result["loss_difference"] < 1e-5 and worst < 1e-3, result
    return result


def steps(device: torch.device, dry: bool) -> dict:
    """Speeds of a pretraining step, fp32 and bf16, and that it never waits for the device."""
    cases = [("vit-nano", 8)] if dry else [("vit-nano", 256), ("vit-base", 128)]
    return {
        f"{size} {kind}": speed(device, size, batch, kind, dry) for size, batch in cases for kind in ("fp32", "bf16")
    }


def speed(device: torch.device, size: str, batch_size: int, kind: str, dry: bool) -> dict:
    """Measure one model in one precision."""
    torch.backends.cuda.matmul.allow_tf32 = True
    model, batch = made(size, device), images(batch_size, 32 if dry else 224, device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator(device).manual_seed(2)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16"):
            loss, _ = model.loss(model.draw(batch, generator))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    for _ in range(1 if dry else 10):
        step()
    settle(device)
    result = {"batch": batch_size, "waits": ""}
    try:
        with no_synchronisation(device):
            step()
    except RuntimeError as error:
        result["waits"] = str(error)
    count = 2 if dry else 100 if size == "vit-nano" else 40
    with watched(device, result):
        for _ in range(count):
            step()
    return result | {
        "ms_per_step": 1e3 * result["seconds"] / count,
        "images_per_s": count * batch_size / result["seconds"],
    }


def pretraining(device: torch.device, dry: bool) -> dict:
    """The run notebook by papermill, in a kernel of its own, and what its record says."""
    asked = {
        "learn.steps": 4 if dry else 600,
        "learn.batch_size": 4 if dry else 64,
        "checkpoint_every": 2 if dry else 200,
    }
    asked |= {"device": str(device), "learn.precision": "bf16-mixed" if device.type == "cuda" else "32-true"}
    asked |= {"data.stride_px": 48 if dry else 8, "encoder": "vit-nano" if dry else "vit-small"}
    asked["crops.workers"] = 0 if dry else 4
    return launched("pretrain", asked, device, ("loss_first", "loss_last", "rmse"))


def launched(notebook: str, asked: dict, device: torch.device, numbers: tuple[str, ...]) -> dict:
    """Run a notebook as the command line does."""
    result: dict = {}
    with tempfile.TemporaryDirectory() as folder, watched(device, result):
        pairs = [word for name, value in asked.items() for word in ("-p", f"{name}={json.dumps(value).strip(chr(34))}")]
        command = [sys.executable, "-c", "from sarfm.cli import main; raise SystemExit(main())", "run", notebook]
        done = subprocess.run([*command, *pairs, "--out", f"{folder}/run"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        record = json.loads(Path(folder, "run/run.json").read_text())
    metrics = record["metrics"]
    return result | {
        "status": record["status"],
        **{n: metrics[n] for n in numbers if n in metrics},
        "timings": record.get("timings"),
    }


def prediction(device: torch.device, dry: bool) -> dict:
    """A scene's classes, here and on the CPU: speed, memory, and the share of pixels that agree."""
    from predictors import one_target
    from test_predict import contract, scene

    from sarfm.evaluation.predict import predict_scene
    from sarfm.evaluation.tiles import Tiling

    torch.manual_seed(0)
    model = one_target(build_encoder("vit-nano" if dry else "vit-small", 2, 8), 3).eval()
    result: dict = {}
    side = 96 if dry else 4000
    with watched(device, result):
        predict_scene(model, contract(), scene(side, side), Tiling(device=str(device)))
    small = scene(96, 96) if dry else scene(512, 512)
    here, there = (
        predict_scene(model, contract(), small, Tiling(device=where), probabilities=True)
        for where in (str(device), "cpu")
    )
    classes = [name for name, layer in here.items() if layer.dtype == np.uint8]
    result["agreeing"] = min(float(np.mean(here[name].values == there[name].values)) for name in classes)
    result["mpx_per_s"] = side**2 / 1e6 / result["seconds"]
    assert result["agreeing"] > 0.999, result
    return result


PARTS: list[Callable[[torch.device, bool], dict]] = [machine, agreement, steps, pretraining, prediction]


def main() -> int:
    """Measure all parts into one file; the status says whether one failed."""
    words = [w for w in sys.argv[1:] if w != "--dry"]
    dry, path = "--dry" in sys.argv[1:], Path(words[0] if words else "gpu.json")
    if not dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; tests/gpu.sh --dry goes the same way on the CPU")
    device, found = torch.device("cpu" if dry else "cuda"), {}
    for part in PARTS:
        if time.monotonic() - began > SECONDS:
            found[part.__name__] = {"failed": "no time left"}
            continue
        try:
            found[part.__name__] = part(device, dry)
        except Exception:  # the others shall still be seen: the machine is lent for minutes
            found[part.__name__] = {"failed": traceback.format_exc()[-3000:]}
        write_json(path, found)
        print(part.__name__, json.dumps(found[part.__name__], default=str)[:2000], flush=True)
    return int(any("failed" in result for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
