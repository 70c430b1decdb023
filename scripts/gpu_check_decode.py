"""Decoding on a device: Triton's kernels against the plain way, and CUDA graphs against computing each token."""

import logging
import operator
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from gpu_check_case import Case, Findings, Setting, SkipCase
from ossquant.runtime import decoder
from ossquant.runtime.chosen import FEW_TOKENS
from ossquant.runtime.decode_kernels import TOLERANCE, Experts, chosen_experts, error_of
from ossquant.runtime.decoder import ATTRIBUTE, Cache
from ossquant.runtime.generate import continue_prompt, generate
from ossquant.runtime.kernels import every_mxfp4, expand_with_torch, expand_with_triton
from ossquant.runtime.load import DTYPES, load_model
from ossquant.runtime.warmup import warm_up

SCHEMES = ("mxfp4", "hybrid", "nf4", "fp4")
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
PROMPT, NEW_TOKENS = 1000, 60  # over the window, and from one graph to the next
LIMIT = 300.0  # Triton compiles


def cases() -> Iterator[Case]:
    """Every check of the part decode."""
    yield Case("decode/expand", "decode", LIMIT, check_expand)
    for scheme in SCHEMES:
        for dtype in ("float32", "bfloat16"):
            run = partial(check_kernels, scheme=scheme, dtype=dtype)
            yield Case(f"decode/kernels/{scheme}/{dtype}", "decode", LIMIT, run)
    for scheme in SCHEMES:
        for dtype in ("float32", "bfloat16"):
            run = partial(check_graphs, scheme=scheme, dtype=dtype)
            yield Case(f"decode/graphs/{scheme}/{dtype}", "decode", LIMIT, run)


def check_expand(setting: Setting) -> Findings:
    """MXFP4 expanded by Triton: the bits of torch's way for every pair of codes under every scale."""
    _need_gpu(setting)
    findings = Findings()
    blocks, scales = every_mxfp4(torch.device(setting.main_device))
    findings.holds("bits_equal", torch.equal(expand_with_triton(blocks, scales), expand_with_torch(blocks, scales)))
    return findings


def check_kernels(setting: Setting, scheme: str, dtype: str) -> Findings:
    """Each layer's experts by the kernels, for one token and for the most that they take."""
    _need_gpu(setting)
    findings, said = Findings(), list[str]()
    model, _ = _load(setting, scheme, dtype, said)
    findings.note("said", said)
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    findings.holds("used", all(layer.chosen is not None for layer in layers))
    for tokens in (1, FEW_TOKENS):
        errors = []
        for layer in layers:
            chosen, layer.chosen = chosen_experts(layer), None
            errors.append(float(error_of(layer, chosen, tokens)))
        findings.at_most(f"error_{tokens}", max(errors), TOLERANCE[DTYPES[dtype]])
    return findings


def check_graphs(setting: Setting, scheme: str, dtype: str) -> Findings:
    """The tokens of transformers' own cache, an answer, and what a token takes either way; every graph in use."""
    findings, said, warned = Findings(), list[str](), list[str]()
    model, tokenizer = _load(setting, scheme, dtype, said)
    findings.note("said", said)
    listener = logging.Handler()
    listener.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    decoder.logger.addHandler(listener)
    static: Cache = "static" if setting.dry else "auto"
    try:
        findings.note("warm_up_seconds", warm_up(model, tokenizer, cache=static))
        expected, findings.figures["seconds_dynamic"] = _continue(model, "dynamic")
        found, findings.figures["seconds_static"] = _continue(model, static)
        reply = generate(model, tokenizer, [{"role": "user", "content": QUESTION}], max_new_tokens=48, cache=static)
    finally:
        decoder.logger.removeHandler(listener)
    if dtype == "float32":
        findings.holds("tokens_equal", found == expected)
    findings.note("same_tokens", sum(map(operator.eq, found, expected)))  # in bf16 rounding may part them
    findings.holds("answers", reply.final == ANSWER)
    if not setting.dry:
        findings.holds("captures", getattr(model, ATTRIBUTE).capture is not None)
        findings.note("warned", warned)
        findings.holds("every_graph_is_used", not warned)
    return findings


def _load(setting: Setting, scheme: str, dtype: str, said: list[str]) -> tuple[Any, Any]:
    return load_model(
        setting.tiny, scheme=scheme, dtype=dtype, device_map=setting.main_device, kernels="own",
        announce=said.append,
    )  # fmt: skip


def _continue(model: Any, cache: Cache) -> tuple[list[int], float]:
    """Tokens after a random prompt, and the seconds that they took."""
    prompt = torch.randint(0, 600, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)
    started = time.perf_counter()
    tokens = continue_prompt(
        model, prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, cache=cache
    )
    return tokens[0, PROMPT:].tolist(), time.perf_counter() - started


def _need_gpu(setting: Setting) -> None:
    if setting.dry:
        raise SkipCase("Triton's kernels need a CUDA GPU")
