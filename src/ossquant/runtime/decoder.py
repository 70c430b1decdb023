"""Decode one token at a time from a fixed cache, by a CUDA graph where that can be: one launch a token for a thousand.

A graph replays what it has seen, so what it was captured from may ask the device nothing, which experts are chosen
included. Each graph is held against the plain computation, with inputs it has not seen, before it is used.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ossquant.errors import UsageError
from ossquant.runtime import sink_attention
from ossquant.runtime.cuda_graphs import Capture, Compute, CudaGraphs
from ossquant.runtime.fixed_cache import CACHE, FixedCache, PromptCache
from ossquant.runtime.hub_experts import KernelMlp
from ossquant.runtime.kernels import check_alive, first_line

LEAST_SPAN = 1024  # slots that a graph's attention looks at; other graphs look at twice, four times, ... as many
LEAST_SLOTS = 2  # one to try a graph in beside the one where it was captured
# of logits, by norm: kernels may be chosen otherwise for a capture; another token's are off by more than 1
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
ATTRIBUTE = "ossquant_decoder"  # of a model

# dynamic grows with what was said; static has fixed addresses, and on a GPU is decoded by CUDA graphs; auto is static
# where they can be
Cache = Literal["auto", "dynamic", "static"]

logger = logging.getLogger(__name__)


class Decoder:
    """Computes single tokens of one sequence at a time, for a model on one device; without a capture each plainly."""

    def __init__(self, model: Any, max_model_len: int, capture: Capture | None) -> None:
        self.max_model_len = max_model_len
        self.capture = capture
        self._reference = weakref.ref(model)  # which has this as an attribute
        self._modules = _identities(model)
        self._addresses = _addresses(model)
        self._cache = self._new_cache(1)
        self._prompt: PromptCache | None = None
        self._replays: dict[int, Compute] = {}

    @property
    def _model(self) -> Any:
        return self._reference()

    def obstacle(self, model: Any) -> str:
        """Why it cannot stand in for a model as that is now; empty if it can."""
        if model is not self._model:
            return "the model is a copy of the one that was loaded"
        if "forward" in vars(model):
            return "the model's forward was exchanged"
        if self.capture is None:
            return ""
        if _identities(model) != self._modules:
            return "the model's parts were exchanged since it was loaded"
        if any("forward" in vars(module) for module in model.modules()):
            return "the forward of a part of the model was exchanged"
        if any(map(has_hooks, model.modules())):
            return "the model has hooks, which a graph would not call"
        return ""

    @contextmanager
    def sequence(self, tokens: int) -> Iterator[PromptCache]:
        """Take the place of the model's forward, within, for what is computed with the cache: room for so many tokens.

        The prompt must have room; what follows makes more where there is too little.
        """
        cache = self._reserve(tokens)
        addresses = _addresses(self._model)
        if addresses != self._addresses:
            self._replays.clear()
            self._addresses = addresses
        self._prompt = cache.prompt_cache()

        @functools.wraps(self._model.forward)  # generate looks at its signature
        def forward(*args: Any, **arguments: Any) -> Any:
            return self._forward(*args, **arguments)

        self._model.forward = forward
        try:
            yield self._prompt
        finally:
            del self._model.forward
            self._prompt = None

    def warm_up(self) -> None:
        """Capture every graph that a sequence of max_model_len tokens will need."""
        cache = self._reserve(self.max_model_len)
        span = 0
        while span < min(self.max_model_len, cache.capacity):
            span = min(span_of(span + 1), cache.capacity)
            cache.position.fill_(span - 2)
            self._logits_of(span, span - 2)

    def _reserve(self, tokens: int) -> FixedCache:
        """The cache, with room for so many tokens; another one than before has no graphs."""
        model, cache = self._model, self._cache
        tokens = min(tokens, model.config.max_position_embeddings)
        if cache.capacity < tokens or (cache.dtype, cache.device) != (model.dtype, model.device):
            self._replays.clear()
            cache.free()
            self._cache = self._new_cache(tokens)
        return self._cache

    def _new_cache(self, tokens: int) -> FixedCache:
        model = self._model
        longest = min(max(tokens, self.max_model_len, LEAST_SLOTS), model.config.max_position_embeddings)
        return FixedCache(model.config, min(span_of(tokens), longest), model.dtype, model.device)

    def _forward(self, *args: Any, **arguments: Any) -> Any:
        """The model's, but for a single token of the sequence."""
        token: Tensor | None = arguments.get("input_ids", args[0] if args else None)
        prompt = arguments.get(CACHE)
        if not isinstance(prompt, PromptCache) or prompt is not self._prompt:
            return _forward_of(self._model)(*args, **arguments)
        if token is None or token.shape != (1, 1):
            if prompt.decoded is not None:
                raise UsageError("a sequence goes on one token at a time", hint="use cache='dynamic'")
            return _forward_of(self._model)(*args, **arguments)
        return CausalLMOutputWithPast(logits=self._step(token, prompt), **{CACHE: prompt})

    def _step(self, token: Tensor, prompt: PromptCache) -> Tensor:
        """The logits (1, 1, vocab) of the token that follows what prompt counts."""
        if prompt.decoded is None:
            prompt.decoded = self._cache.take_prompt(prompt)
        if prompt.decoded == self._cache.capacity:
            self._grow()
        cache = self._cache
        cache.token.copy_(token)
        logits = self._logits_of(min(span_of(prompt.decoded + 1), cache.capacity), prompt.decoded)
        cache.position.add_(1)
        prompt.decoded += 1
        return logits

    def _grow(self) -> None:
        longest = self._model.config.max_position_embeddings
        if self._cache.capacity == longest:
            raise UsageError(f"the model's context of {longest} tokens is full", hint="shorten the conversation")
        self._replays.clear()
        self._cache = self._cache.grown(min(2 * self._cache.capacity, longest))

    def _logits_of(self, span: int, position: int) -> Tensor:
        """The logits of the cache's token at its position, which is given for the host to know."""
        if span not in self._replays and self.capture is not None:
            self._capture(self.capture, span, position)
        replay = self._replays.get(span)
        return replay() if replay else self._compute(span)

    def _capture(self, capture: Capture, span: int, position: int) -> None:
        """Keep a replay, if for another token elsewhere it gives what the plain computation does; else no others."""
        other = position + 1 if position + 1 < span else position - 1
        try:
            with self._cache.elsewhere(other, self._model.config.vocab_size) as go:
                replay = capture(functools.partial(self._compute, span))
                go()
                found = replay().float().clone()  # first, for the other to find nothing that it should have stored
                expected = self._compute(span).float()
        except Exception as error:  # noqa: BLE001  compilers, libraries and the driver each have errors of their own
            check_alive(self._model.device, "CUDA graphs", "never")
            self._give_up(first_line(error))
            return
        distance = float((found - expected).norm() / expected.norm())
        if distance <= TOLERANCE[self._model.dtype]:
            self._replays[span] = replay
        else:
            self._give_up(f"its logits are off by {distance:.1g} here; please report it")

    def _give_up(self, reason: str) -> None:
        # torch's allocator cannot be trusted with a capture after one that failed
        self.capture = None
        logger.warning("decoding without a CUDA graph: %s", reason)

    @torch.inference_mode()
    def _compute(self, span: int) -> Tensor:
        """Logits (1, 1, vocab) of the cache's token at its position, from what lies at fixed addresses alone."""
        cache, config = self._cache, self._model.config
        cache.span = span
        implementation, config._attn_implementation = config._attn_implementation, sink_attention.NAME
        try:
            output = _forward_of(self._model)(
                input_ids=cache.token, attention_mask=cache.masks(), position_ids=cache.position[None],
                use_cache=True, **{CACHE: cache},
            )  # fmt: skip
        finally:
            config._attn_implementation = implementation
        logits: Tensor = output.logits
        return logits


def attach_decoder(model: Any, max_model_len: int, announce: Callable[[str], None]) -> None:
    """Give a model that lies on one device its decoder; announce hears of CUDA graphs."""
    mlps = [layer.mlp for layer in model.model.layers]
    asks_nothing = all(isinstance(mlp, KernelMlp) or getattr(mlp.experts, "chosen", None) for mlp in mlps)
    capture = CudaGraphs(model.device) if model.device.type == "cuda" and asks_nothing else None
    setattr(model, ATTRIBUTE, Decoder(model, max_model_len, capture))
    if capture:
        announce("tokens are decoded by CUDA graphs, each checked when it is captured")


@contextmanager
def decoding(model: Any, prompt_tokens: int, tokens: int, cache: Cache) -> Iterator[PromptCache | None]:
    """The cache to compute a sequence with, in all so many tokens at most; None is transformers' dynamic one.

    One sequence of a model at a time: it computes in the model's name. Raises UsageError if a static cache was asked
    for and cannot be.
    """
    decoder: Decoder | None = getattr(model, ATTRIBUTE, None)
    obstacle = "not a model of load_model on one device" if decoder is None else decoder.obstacle(model)
    if cache == "static" and obstacle:
        raise UsageError(f"cache 'static': {obstacle}", hint="use cache='auto'")
    if cache == "dynamic" or decoder is None or (cache == "auto" and decoder.capture is None):
        yield None
    elif obstacle:
        logger.warning("decoding without CUDA graphs: %s", obstacle)
        yield None
    else:
        with decoder.sequence(min(tokens, max(prompt_tokens, decoder.max_model_len))) as prompt:
            yield prompt


def span_of(tokens: int) -> int:
    """How many slots attention looks at for so many tokens."""
    return max(LEAST_SPAN, 1 << (tokens - 1).bit_length())


def has_hooks(module: Any) -> bool:
    """Whether a module has hooks but those with which transformers can record what it gives."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def _forward_of(model: Any) -> Any:
    return functools.partial(type(model).forward, model)


def _identities(model: Any) -> list[int]:
    return [id(module) for module in model.modules()]


def _addresses(model: Any) -> list[int]:
    return [tensor.data_ptr() for tensors in (model.parameters(), model.buffers()) for tensor in tensors]
