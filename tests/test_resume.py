"""A training that is killed and continued is the training that wasn't, to the last bit."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE_S, until

SOAK = os.environ.get("SARFM_SOAK") == "1"  # the long form: `make soak`
STEPS = 300 if SOAK else 60  # of every training
MARK = f"resume-{os.getpid()}-{time.time_ns()}"  # in the environment of every process started here

TRAINING = '''
import os, sys, time, traceback
from multiprocessing import forkserver
from pathlib import Path

import lightning_fabric  # before the forks, so that each training need not import it
import numpy as np
import torch

from sarfm.patches.contract import InputContract
from sarfm.patches.loading import Crops, PatchDataModule
from sarfm.patches.prepare import open_store
from sarfm.models.dino import DINO
from sarfm.models.mae import MAE
from sarfm.models.vit import Encoder
from sarfm.train.trainer import fit
from sarfm.train.steps import Recipe, Training
import pandas as pd


class Slow:
    def stepped(self, step, steps):
        super().stepped(step, steps)
        print(step + 1, flush=True)
        time.sleep(self.pause)


class SlowMAE(Slow, MAE):
    pass


class SlowDINO(Slow, DINO):
    pass


class Watched(Training):
    def state(self, optimiser):
        print("saving", self.step, flush=True)
        return super().state(optimiser)


def train(folder, out, precision, workers, steps, pause, name):
    folder, out, workers, steps = Path(folder), Path(out), int(workers), int(steps)
    out.mkdir(exist_ok=True)
    store = open_store(folder / "store.zarr")
    split = pd.Series(["train"] * (len(store) - 2) + ["val"] * 2)
    contract = InputContract.fit(store, np.flatnonzero(split == "train"), 8)
    data = PatchDataModule(store, split, contract, crops=Crops(32, workers=workers), batch_size=4, steps_per_epoch=8, seed=3)
    torch.manual_seed(3)
    encoder = Encoder(2, patch_size=8, width=32, depth=2, heads=2, drop_path=0.2)
    if name == "dino":
        method = SlowDINO(encoder, 32, 16, 24, first_temperature=0.02, freeze_last=0.2)
        method.state_scale(contract)
    else:
        method = SlowMAE(encoder, decoder_width=32, decoder_depth=1, decoder_heads=2)
    method.pause = float(pause)
    recipe = Recipe(steps, batch_size=4, accumulate=2, rate=1e-3, warmup=4 / steps, seed=3, ema=0.99, precision=precision)
    task = Watched(method, recipe)
    history = fit(
        task, data, out=out, steps_per_epoch=4, device="cpu", progress=False, validation_batches=1,
    )
    columns = ["loss", "grad_norm", "learning_rate", "val_loss"]
    text = "\\n".join(" ".join(float(v).hex() for v in row) for row in history[columns].to_numpy())
    (out / "losses.txt").write_text(text)
    torch.save(list(task.state_dict().values()), out / "weights.pt")


def serve():
    """Fork a training for every line of arguments: the imports are paid once, those of the workers too."""
    torch.set_num_threads(1)
    forkserver.set_forkserver_preload(["sarfm.patches.loading"])
    forkserver.ensure_running()
    print("ready", flush=True)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            forkserver._forkserver.ensure_running = lambda: None  # its parent waits for it, not this child
            try:
                train(*line.split())
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print("pid", child, flush=True)
        print("ended", os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    serve()
'''


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    import numpy as np

    from sarfm.patches.prepare import write_store
    from sarfm.scenes.open import make_scene

    folder = tmp_path_factory.mktemp("resume")
    generator = np.random.default_rng(0)
    field = generator.normal(-12, 3, (2, 128, 128)).astype("float32")
    field[:, 40:50, 40:60] = np.nan
    scene = make_scene({"vv": field[0], "vh": field[1]}, units="dB", quantity="gamma0")
    write_store({"made": scene}, folder / "store.zarr", size=32, progress=False)
    (folder / "training.py").write_text(TRAINING)
    return folder


@pytest.fixture(scope="module")
def server(prepared):
    with open(prepared / "errors.txt", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(prepared / "training.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "SARFM_TEST_MARK": MARK},
        )
        assert process.stdout.readline() == "ready\n", (prepared / "errors.txt").read_text()[-3000:]
        yield process
        process.stdin.close()
        process.wait(timeout=PATIENCE_S)


def training(server, folder, out, precision, workers, kill=None, method="mae"):
    """Run a training to its end (give its exit status), or kill -9 it shortly after a step or inside a save."""
    pause = 0.005 if kill else 0
    server.stdin.write(f"{folder} {out} {precision} {workers} {STEPS} {pause} {method}\n")
    server.stdin.flush()
    child, killed = None, False
    for line in server.stdout:
        word, *rest = line.split()
        if word == "pid":
            child = int(rest[0])
        elif word == "ended":
            return int(rest[0])
        elif kill and not killed and (word == "saving") == kill[2] and int([word, *rest][-1]) >= kill[0]:
            time.sleep(kill[1])
            os.kill(child, signal.SIGKILL)
            killed = True
    raise AssertionError((folder / "errors.txt").read_text()[-3000:])


def outcome(out: Path) -> tuple[list[str], str]:
    """Read the losses of all steps as hexadecimal, and the checksum of the weights."""
    import torch

    digest = hashlib.sha256()
    for tensor in torch.load(out / "weights.pt"):
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return (out / "losses.txt").read_text().splitlines(), digest.hexdigest()


def kills_and_resumes(server, prepared, precision, workers, kills, row, method="mae"):
    whole, pieces = (prepared / f"{what}-{method}-{precision}-{workers}" for what in ("whole", "pieces"))
    run = lambda out, kill=None: training(server, prepared, out, precision, workers, kill, method)
    assert run(whole) == 0, (prepared / "errors.txt").read_text()[-3000:]
    draw = random.Random(7)
    for number, step in enumerate(sorted(draw.sample(range(5, STEPS - 4), kills))):
        saving = number % 3 == 2  # a third of the kills fall into the writing of a checkpoint
        kill = (step, draw.uniform(0, 0.008 if saving else 0.04), saving)
        with row.case(f"kill at step {step}"):
            status = run(pieces, kill)
            assert status == signal.SIGKILL, (prepared / "errors.txt").read_text()[-3000:]
    assert (pieces / "checkpoints" / "last.ckpt").exists()
    assert not list(pieces.rglob("*.pt"))
    assert run(pieces) == 0, (prepared / "errors.txt").read_text()[-3000:]
    (losses, weights), (expected_losses, expected_weights) = outcome(pieces), outcome(whole)
    assert len(losses) == STEPS
    assert losses == expected_losses
    assert weights == expected_weights


QUICK = [("32-true", 2, 6), ("bf16-mixed", 0, 3)]
LONG = [(precision, workers, 50) for precision in ("32-true", "bf16-mixed") for workers in (0, 2)]


@pytest.mark.slow
@pytest.mark.row(1)
@pytest.mark.parametrize(("precision", "workers", "kills"), LONG if SOAK else QUICK)
def test_killed_training_continues_bit_for_bit(server, prepared, precision, workers, kills, row):
    row.note(f"{kills} kills over {STEPS} steps, {precision}, {workers} workers")
    kills_and_resumes(server, prepared, precision, workers, kills, row)


@pytest.mark.slow
@pytest.mark.row(1)
@pytest.mark.parametrize(("precision", "kills"), [("32-true", 4), ("bf16-mixed", 2)])
def test_killed_self_distillation_continues_bit_for_bit(server, prepared, precision, kills, row):
    row.note(f"{kills} kills over {STEPS} steps of DINO, {precision}")
    kills_and_resumes(server, prepared, precision, 0, kills, row, "dino")


def marked() -> list[int]:
    """List the processes that carry this test's mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if MARK.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="lists processes through /proc, which Linux has")
def test_workers_leave_with_a_killed_training(server, prepared):
    before = set(marked())
    assert server.pid in before
    assert training(server, prepared, prepared / "left", "32-true", 2, (10, 0.0, False)) == signal.SIGKILL
    until(lambda: set(marked()) <= before, every_s=0.5)
