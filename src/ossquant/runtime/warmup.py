"""Take the cost of a first request out of it, before readiness is told.

torch, oneDNN and bitsandbytes choose, load and repack at first use, and weights that were mapped are read then. None
of that outlives the process; only what numba and Triton compiled is kept on disk. CUDA graphs, where they can be, are
captured for every length up to the max_model_len that the model was loaded for.
"""

import time
from typing import Any

import torch

from ossquant.memory.transformers import PREFILL_CHUNK
from ossquant.runtime.decoder import ATTRIBUTE, Cache
from ossquant.runtime.generate import continue_prompt, generate, stop_tokens

NEW_TOKENS = 4
SEED = 0


def warm_up(model: Any, tokenizer: Any, *, cache: Cache = "auto") -> float:
    """Prefill a full chunk and answer a short question, a few tokens each; returns seconds.

    The chunk is of random tokens, so that they go through nearly every expert. Weights and the random numbers of
    later replies stay as they are.
    """
    started = time.perf_counter()
    length = min(PREFILL_CHUNK, model.config.max_position_embeddings - NEW_TOKENS)
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(0, model.config.vocab_size, (1, length), generator=generator).to(model.device)
    continue_prompt(
        model, prompt, cache=cache, do_sample=False, max_new_tokens=NEW_TOKENS,
        eos_token_id=stop_tokens(model, tokenizer),
    )  # fmt: skip
    generate(model, tokenizer, [{"role": "user", "content": "Hello"}], max_new_tokens=NEW_TOKENS, cache=cache)
    decoder = getattr(model, ATTRIBUTE, None)
    if decoder and decoder.capture and cache != "dynamic" and not decoder.obstacle(model):
        decoder.warm_up()
    return time.perf_counter() - started
