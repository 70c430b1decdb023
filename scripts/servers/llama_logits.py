#!/usr/bin/env python3
"""Write llama.cpp's logits of some tokens; runs in the environment of llama-cpp-python.

llama_logits.py MODEL.gguf TOKENS.json OUTPUT.npy

With a cache in f32 (0 is ggml's number of that type) and without flash attention, so that the weights alone can make
a difference to fp32.
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main() -> None:
    """Write (tokens, vocabulary) logits."""
    model, given, output = sys.argv[1:]
    tokens = json.loads(Path(given).read_text())
    llama = Llama(
        model, n_ctx=len(tokens), n_batch=len(tokens), n_ubatch=len(tokens), n_threads=1, n_threads_batch=1,
        type_k=0, type_v=0, flash_attn=False, logits_all=True, verbose=False,
    )  # fmt: skip
    llama.eval(tokens)
    np.save(output, llama.scores[: len(tokens)])


if __name__ == "__main__":
    main()
