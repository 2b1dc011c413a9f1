"""What a spawned worker of `test_faults.py` runs: a module of its own, so that it imports little."""

import hashlib
import os
import random


def read_crops(store, right, crops, queue):
    """Read crops in a worker; count the wrong ones."""
    draw = random.Random(os.getpid())
    picks = [draw.randrange(len(right)) for _ in range(crops)]
    queue.put(sum(hashlib.sha256(store.read(k).tobytes()).hexdigest() != right[k] for k in picks))
