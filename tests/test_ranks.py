"""Two ranks take the steps of one process, and a rank that fails ends the run with its name."""

import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from patience import PATIENCE_S, allowed
from torch.utils.data import DataLoader

from sarfm.io.ranks import RankFailed, run_ranks
from sarfm.models.mae import MAE
from sarfm.models.vit import Encoder
from sarfm.patches.contract import InputContract
from sarfm.patches.loading import Crops, PatchDataModule
from sarfm.patches.prepare import open_store, write_store
from sarfm.scenes.open import make_scene
from sarfm.train import trainer
from sarfm.train.steps import Recipe, Training
from sarfm.train.trainer import fit, make_fabric, train_epochs

SOAK = os.environ.get("SARFM_SOAK") == "1"  # the long form: `make soak`
STEPS, EVERY = 12, 4
CASES = {
    "fp32": {},
    "accumulated": {"accumulate": 2, "ema": 0.9},
    "bf16": {"precision": "bf16-mixed", "scene": "whole"},
    "blocks": {"masking": "block"},
}


class Known(MAE):
    """Say in a file which process trains as which rank."""

    def stepped(self, step, steps):
        if step == 0:
            Path(self.folder, f"pid-{os.environ.get('RANK', 'alone')}").write_text(str(os.getpid()))


def made(folder: Path, case: str, **other) -> tuple[Training, PatchDataModule]:
    """Make the same training and the same data in every process; a part of the scene is empty, so counts differ."""
    options = {"batch_size": 4} | CASES[case] | other
    store = open_store(folder / f"{options.pop('scene', 'holes')}.zarr")
    parts = pd.Series(["train"] * (len(store) - 3) + ["val"] * 3)
    contract = InputContract.fit(store, np.flatnonzero(parts == "train"), 8)
    torch.manual_seed(3)
    encoder = Encoder(2, patch_size=8, width=32, depth=2, heads=2)
    method = Known(encoder, 32, 1, 2, masking=options.pop("masking", "random"))
    method.folder = folder
    training = Training(method, Recipe(STEPS, rate=1e-3, warmup=1 / 3, seed=3, **options))
    each = EVERY * training.recipe.accumulate
    size = training.recipe.batch_size
    return training, PatchDataModule(
        store, parts, contract, crops=Crops(32, min_valid=0.0), batch_size=size, steps_per_epoch=each, seed=3
    )


def several(link, folder):
    """Train all cases, one after the other, in the same two ranks; note who writes a checkpoint."""
    torch.set_num_threads(1)
    save = trainer.save_checkpoint
    for case in CASES:
        training, data = made(folder, case)
        path = folder / case / "last.ckpt"
        trainer.save_checkpoint = lambda *saved, case=case: link.tell(("wrote", case, link.rank)) or save(*saved)
        fabric = make_fabric("cpu", link.ranks, PATIENCE_S)
        train_epochs(training, data, fabric, path, EVERY, 2, None, lambda: None, None)
        weights = [value.clone() for value in training.trained().state_dict().values()]
        link.tell(("history", case, training.history.frame(), weights))
    stop(link, torch.distributed.new_group(timeout=timedelta(seconds=3)))


def stop(link, group=None):
    """Let rank 1 stop for ever in one of its steps."""
    if group is None:
        make_fabric("cpu", link.ranks, timeout_s=3)
    for step in range(5):
        link.tell(("stopping", time.monotonic()))
        if step == 3 and link.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        torch.distributed.all_reduce(torch.ones(1), group=group)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    field = np.random.default_rng(0).normal(-12, 3, (2, 128, 128)).astype("float32")
    for name in ("whole", "holes"):
        scene = make_scene({"vv": field[0], "vh": field[1]}, units="dB", quantity="gamma0")
        write_store({"made": scene}, folder / f"{name}.zarr", size=32, progress=False)
        field[:, 30:90, 40:70] = np.nan
    return folder


@pytest.fixture(scope="module")
def told(folder):
    """Train all cases in two ranks, of which one stops in the end: what rank 0 told, then the error and its seconds."""
    return stopped(several, folder)


def stopped(work, *arguments):
    heard = []
    with pytest.raises(RankFailed) as raised:
        run_ranks(work, arguments, 2, heard.append, timeout_s=3)
    return [*heard, (raised.value, time.monotonic() - heard[-1][1])]


def alone(folder, case, **other):
    """Train in this process."""
    training, data = made(folder, case, **other)
    out = folder / f"{case}-alone-{len(other)}"
    how = {"steps_per_epoch": EVERY, "device": "cpu", "progress": False, "validation_batches": 2}
    return fit(training, data, out=out, **how), training.trained().state_dict().values()


def history_of(told, case):
    """Find what the ranks told of a case: history and weights."""
    return next(message[2:] for message in told[:-1] if message[:2] == ("history", case))


@pytest.mark.parametrize("case", ["fp32", "accumulated", "blocks"])
def test_two_ranks_take_the_steps_of_one_process(folder, told, case):
    (expected, weights), (history, there) = alone(folder, case), history_of(told, case)
    assert list(history) == list(expected) and len(history) == STEPS
    assert "val_loss" in history and history["loss"].nunique() == STEPS
    for name in expected:
        limit = 1e-4 if name == "grad_norm" else 1e-5
        np.testing.assert_allclose(history[name], expected[name], rtol=limit, err_msg=name)
    for here, other in zip(weights, there, strict=True):
        if here.ndim > 1:  # the gradient of a key's bias is rounding alone, and Adam makes whole steps of it
            torch.testing.assert_close(other, here, rtol=0, atol=2e-5)


def test_two_ranks_in_bf16(folder, told):
    """Products of a batch are rounded to bf16 once, those of its halves once each: so one process gets halves too."""
    history, _ = history_of(told, "bf16")
    halves, _ = alone(folder, "bf16", batch_size=2, accumulate=2)
    np.testing.assert_allclose(history["loss"], halves["loss"], rtol=1e-5)
    undivided, _ = alone(folder, "bf16")
    np.testing.assert_allclose(history["loss"], undivided["loss"], rtol=1e-3)
    np.testing.assert_allclose(history["loss"][0], undivided["loss"][0], rtol=1e-5)


def test_only_rank_0_writes(told):
    wrote = [message[1:] for message in told[:-1] if message[0] == "wrote"]
    assert wrote == [(case, 0) for case in CASES for _ in range(STEPS // EVERY)]


@pytest.mark.slow
@pytest.mark.row(1)
def test_a_killed_rank_ends_the_run_with_its_name_and_the_run_continues(folder, told, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, killed, shown = folder / "killed", [], []

    def kill(training):
        shown.append((training.step, training.training))
        if not killed:
            killed.append(time.monotonic())
            os.kill(int((folder / "pid-1").read_text()), signal.SIGKILL)

    how = {"out": out, "steps_per_epoch": EVERY, "device": "cpu", "progress": False}
    how |= {"validation_batches": 2, "on_epoch": kill, "timeout_s": PATIENCE_S}
    training, data = made(folder, "fp32", devices=2)
    with pytest.raises(RankFailed, match=r"rank 1 of 2 \(process \d+\) was killed"):
        fit(training, data, **how)
    assert time.monotonic() - killed[0] < allowed(10)
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["last.ckpt"]
    whole, weights = history_of(told, "fp32")
    training, data = made(folder, "fp32", devices=2 if SOAK else 1)
    if SOAK:
        pd.testing.assert_frame_equal(fit(training, data, **how), whole)  # to the bit
        assert all(map(torch.equal, training.trained().state_dict().values(), weights))
    else:
        with pytest.warns(UserWarning, match="ran with 2 devices and continues with 1"):
            history = fit(training, data, **how)
        pd.testing.assert_frame_equal(history[:4], whole[:4])
        np.testing.assert_allclose(history["loss"], whole["loss"], rtol=1e-5)
    assert shown == [(4, False), (8, False), (12, False)]


@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_after_the_timeout(told):
    *told, (error, seconds) = stopped(stop) if SOAK else told
    assert isinstance(error, RankFailed) and re.search(r"rank 1 of 2 \(process \d+\) didn't answer for 3 s", str(error))
    assert sum(message[0] == "stopping" for message in told) == 4
    assert 3 <= seconds < allowed(8)


def test_what_cannot_be_shared_is_refused_before_a_rank_starts(folder):
    how = {"out": folder / "refused", "steps_per_epoch": EVERY, "device": "cpu", "progress": False}
    training, data = made(folder, "fp32", batch_size=5, devices=3)
    with pytest.raises(ValueError, match="3 devices share a batch equally; it has 5 items"):
        fit(training, data, **how)
    with pytest.raises(ValueError, match="give a PatchDataModule"):
        fit(training, DataLoader(range(16), batch_size=4), **how)
    with pytest.raises(ValueError, match="devices is at least 1; got 0"):
        made(folder, "fp32", devices=0)
    data.batch_size = 6
    with pytest.raises(ValueError, match=r"batches of 5 items, the data give 6. Give the data batch_size=5"):
        fit(training, data, **how)
    assert not (folder / "refused").exists()
