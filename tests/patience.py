"""How long a test waits: until the thing has happened. The limit only ends a test that hangs; a busy machine isn't a fault."""

import os
import subprocess
import time
from collections.abc import Callable

PATIENCE_S = 1800  # far beyond what anything here takes, on a machine that does ten other things too


def until(happened: Callable[[], object], process: subprocess.Popen | None = None, every_s: float = 0.05) -> object:
    """Wait for something, and give it; a process that ends without it is reported with what it said."""
    end = time.monotonic() + PATIENCE_S
    while not (found := happened()):
        if process is not None and process.poll() is not None and not (found := happened()):
            said = [pipe.read() for pipe in (process.stdout, process.stderr) if pipe]
            raise AssertionError(f"ended with {process.returncode} before it happened: {said}")
        if found:
            break
        assert time.monotonic() < end, f"nothing happened in {PATIENCE_S} s"
        time.sleep(every_s)
    return found


def allowed(seconds: float) -> float:
    """Stretch a limit that is promised of a machine with nothing else to do by how busy this one is."""
    return seconds * max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))


def fresh_locks() -> None:
    """Call first in a forked child: the lock of progress bars may have been held by another thread when it forked."""
    import threading

    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
