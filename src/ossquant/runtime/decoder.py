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
from ossquant.runtime.fixed_cache import CACHE, FixedCache, PromptCache
from ossquant.runtime.kernel_experts import KernelMlp

LEAST_SPAN = 1024  # slots that a graph's attention looks at; other graphs look at twice, four times, ... as many
TOLERANCE = 1e-3  # of logits, by norm: kernels may be chosen otherwise for a capture
_WARM_UPS = 2  # calls before a capture, in which libraries choose and load their kernels
ATTRIBUTE = "ossquant_decoder"  # of a model

# dynamic grows with what was said; static has fixed addresses, and on a GPU is decoded by CUDA graphs; auto is static
# where they can be
Cache = Literal["auto", "dynamic", "static"]
Compute = Callable[[], Tensor]
# makes of a computation on tensors at fixed addresses one that replays it; it may call it
Capture = Callable[[Compute], Compute]

logger = logging.getLogger(__name__)


class Decoder:
    """Computes single tokens of one sequence, for a model that lies on one device; with no capture each plainly."""

    def __init__(self, model: Any, max_model_len: int, capture: Capture | None) -> None:
        self.max_model_len, self._capture = max_model_len, capture
        self._reference = weakref.ref(model)  # which has this as an attribute
        self._modules = _identities(model)
        self._weights = _addresses(model)
        self._cache = self._new_cache(1)
        self._prompt: PromptCache | None = None
        self._replays: dict[int, Compute] = {}

    @property
    def _model(self) -> Any:
        return self._reference()

    @property
    def captures(self) -> bool:
        """Whether tokens are computed by replaying."""
        return self._capture is not None

    @property
    def obstacle(self) -> str:
        """Why it cannot stand in for the model as that is now; empty if it can."""
        if "forward" in vars(self._model):
            return "the model's forward was exchanged"
        if not self.captures:
            return ""
        if _identities(self._model) != self._modules:
            return "the model's parts were exchanged since it was loaded"
        if any(module._forward_hooks or module._forward_pre_hooks for module in self._model.modules()):
            return "the model has hooks, which a graph would not call"
        return ""

    @contextmanager
    def sequence(self, tokens: int) -> Iterator[PromptCache]:
        """Take the place of the model's forward, within, for what is computed with the cache: room for so many tokens.

        The prompt must have room; what follows makes more where there is too little.
        """
        cache = self._reserve(tokens)
        weights = _addresses(self._model)
        if weights != self._weights:
            self._replays.clear()
            self._weights = weights
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
        cache.position.zero_()
        span = 0
        while span < min(self.max_model_len, cache.capacity):
            span = min(span_of(span + 1), cache.capacity)
            self._replay_of(span, 0)

    def _reserve(self, tokens: int) -> FixedCache:
        """The cache, with room for so many tokens; a larger one than before has no graphs."""
        tokens = min(tokens, self._model.config.max_position_embeddings)
        if self._cache.capacity < tokens:
            self._replays.clear()
            self._cache = self._new_cache(tokens)
        return self._cache

    def _new_cache(self, tokens: int) -> FixedCache:
        model = self._model
        capacity = min(span_of(tokens), model.config.max_position_embeddings)
        return FixedCache(model.config, capacity, model.dtype, model.device)

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
        cache = self._cache
        if prompt.decoded is None:
            prompt.decoded = cache.take_prompt(prompt)
            cache.position.fill_(prompt.decoded)
        if prompt.decoded == cache.capacity:
            cache = self._cache = cache.grown(min(2 * cache.capacity, self._model.config.max_position_embeddings))
            self._replays.clear()
        cache.token.copy_(token)
        span = min(span_of(prompt.decoded + 1), cache.capacity)
        logits = self._replay_of(span, prompt.decoded)()
        cache.position.add_(1)
        prompt.decoded += 1
        return logits

    def _replay_of(self, span: int, position: int) -> Compute:
        if span not in self._replays:
            plain = functools.partial(self._compute, span)
            capture = self._capture
            self._replays[span] = plain if capture is None else self._checked(plain, capture, span, position)
        return self._replays[span]

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

    def _checked(self, plain: Compute, capture: Capture, span: int, position: int) -> Compute:
        """A replay, if for another token elsewhere it gives what the plain computation does; else the latter."""
        cache = self._cache
        other = position + 1 if position + 1 < span else position - 1
        with cache.elsewhere(other, self._model.config.vocab_size) as go:
            try:
                replay = capture(plain)
            except RuntimeError as error:
                logger.warning("decoding without a CUDA graph: %s", str(error).splitlines()[0])
                return plain
            go()
            expected = plain().float()
            distance = float((replay().float() - expected).norm() / expected.norm())
        if distance <= TOLERANCE:
            return replay
        logger.warning("decoding without a CUDA graph: its logits are off by %.1g here; please report it", distance)
        return plain


def attach_decoder(model: Any, max_model_len: int, announce: Callable[[str], None]) -> None:
    """Give a model that lies on one device its decoder; announce hears of CUDA graphs."""
    mlps = [layer.mlp for layer in model.model.layers]
    asks_nothing = all(isinstance(mlp, KernelMlp) or getattr(mlp.experts, "chosen", None) for mlp in mlps)
    capture = capture_cuda_graph if model.device.type == "cuda" and asks_nothing else None
    setattr(model, ATTRIBUTE, Decoder(model, max_model_len, capture))
    if capture:
        announce("tokens are decoded by CUDA graphs, each checked when it is captured")


@contextmanager
def decoding(model: Any, prompt_tokens: int, tokens: int, cache: Cache) -> Iterator[PromptCache | None]:
    """The cache to compute a sequence with, in all so many tokens at most; None is transformers' dynamic one.

    Raises UsageError if a static one was asked for and cannot be.
    """
    decoder: Decoder | None = getattr(model, ATTRIBUTE, None)
    obstacle = "not a model of load_model on one device" if decoder is None else decoder.obstacle
    if cache == "static" and obstacle:
        raise UsageError(f"cache 'static': {obstacle}", hint="use cache='auto'")
    if cache == "dynamic" or decoder is None or obstacle or (cache == "auto" and not decoder.captures):
        yield None
        return
    with decoder.sequence(min(tokens, max(prompt_tokens, decoder.max_model_len))) as prompt:
        yield prompt


def span_of(tokens: int) -> int:
    """How many slots attention looks at for so many tokens."""
    return max(LEAST_SPAN, 1 << (tokens - 1).bit_length())


def capture_cuda_graph(compute: Compute) -> Compute:
    """Capture what a computation launches on the current device."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            compute()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compute()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _forward_of(model: Any) -> Any:
    return functools.partial(type(model).forward, model)


def _identities(model: Any) -> list[int]:
    return [id(module) for module in model.modules()]


def _addresses(model: Any) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]
