"""Fingerprint: which checkpoint it is, told from samples of every tensor, without reading all of it."""

import hashlib
import json
from collections.abc import Iterator

from ossquant.checkpoint.reader import Checkpoint

SAMPLES = 128  # of a tensor: one for each expert of the 120b
SAMPLE_BYTES = 4096


def fingerprint(checkpoint: Checkpoint) -> str:
    """The SHA-256, in hex, of config.json, every tensor's name, dtype and shape, and SAMPLES pieces of its bytes.

    A fine-tune has the names and sizes of its source, so bytes are looked at: all of small tensors, evenly spaced
    pieces of large ones. It tells models apart; `verify` finds a flipped bit. Raises CheckpointError.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    buffer = memoryview(bytearray(SAMPLE_BYTES))
    for name, tensor in sorted(checkpoint.stored.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for begin in _begins(tensor.nbytes):
            view = buffer[: min(SAMPLE_BYTES, tensor.nbytes - begin)]
            checkpoint.read_into(name, view, begin)
            digest.update(view)
    return digest.hexdigest()


def _begins(nbytes: int) -> Iterator[int]:
    """Where samples begin: one behind the other, or evenly spaced, the last one at the end."""
    if nbytes <= SAMPLES * SAMPLE_BYTES:
        yield from range(0, nbytes, SAMPLE_BYTES)
    else:
        yield from ((nbytes - SAMPLE_BYTES) * sample // (SAMPLES - 1) for sample in range(SAMPLES))
