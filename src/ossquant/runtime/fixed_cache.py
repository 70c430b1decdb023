"""Keys and values of one sequence at addresses that stay, so that a step of decoding can be captured and replayed."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GptOssForCausalLM
from transformers.cache_utils import DynamicLayer

from ossquant.errors import UsageError

SLIDING = "sliding_attention"
# the cache as an argument and in what comes out: transformers 5.24 renamed it
CACHE = "cache" if "cache" in inspect.signature(GptOssForCausalLM.forward).parameters else "past_key_values"


class FixedCache:
    """A slot for each token in full layers, a ring of the window in sliding ones.

    A prompt is computed with prompt_cache, which writes full layers in place; take_prompt then brings the rings up to
    date. From then on the model is called with this as its cache, for one token: token (1, 1) at position (1,).
    Attention looks at the first span slots of full layers.
    """

    def __init__(self, config: Any, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.capacity, self.dtype, self.device = config, capacity, dtype, device
        self.window = min(config.sliding_window, capacity)
        heads, head_dim = config.num_key_value_heads, config.head_dim
        with torch.inference_mode(False):
            # what was never written is multiplied by zero, and must not be NaN
            self.keys, self.values = (
                [torch.zeros(1, heads, self.slots(layer), head_dim, dtype=dtype, device=device)
                 for layer in range(config.num_hidden_layers)]
                for _ in range(2)
            )  # fmt: skip
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
            self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.span = capacity

    def grown(self, capacity: int) -> "FixedCache":
        """The same with more slots in full layers, at other addresses."""
        larger = FixedCache(self.config, capacity, self.dtype, self.device)
        for mine, its in ((self.keys, larger.keys), (self.values, larger.values)):
            for old, new in zip(mine, its, strict=True):
                new[:, :, : old.shape[2]] = old
        larger.position.copy_(self.position)
        larger.token.copy_(self.token)
        return larger

    def is_sliding(self, layer: int) -> bool:
        """Whether a layer sees the window alone."""
        return bool(self.config.layer_types[layer] == SLIDING)

    def slots(self, layer: int) -> int:
        """How many tokens a layer keeps."""
        return self.window if self.is_sliding(layer) else self.capacity

    def masks(self) -> dict[str, Tensor]:
        """What is added to scores (1, 1, 1, slots) by kind of layer: 0 where a token is, else the least number."""
        return {"full_attention": self._mask(self.span), SLIDING: self._mask(self.window)}

    def _mask(self, slots: int) -> Tensor:
        # a ring that was gone round is full: no slot is beyond position then
        beyond = torch.arange(slots, device=self.device) > self.position
        return torch.where(beyond, torch.finfo(self.dtype).min, 0.0).to(self.dtype).view(1, 1, 1, slots)

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store one token's keys and values (1, heads, 1, head_dim); returns what the layer looks at."""
        slot = self.position % self.window if self.is_sliding(layer) else self.position
        span = self.window if self.is_sliding(layer) else self.span
        both = self.keys[layer], self.values[layer]
        for kept, new in zip(both, (keys, values), strict=True):
            kept.index_copy_(2, slot, new)
        return both[0][:, :, :span], both[1][:, :, :span]

    def prompt_cache(self) -> "PromptCache":
        """An empty cache to compute a prompt with."""
        cache = PromptCache(config=self.config)
        for layer in range(self.config.num_hidden_layers):
            if not self.is_sliding(layer):
                cache.layers[layer] = _InPlace(self.keys[layer], self.values[layer])
        return cache

    def take_prompt(self, cache: "PromptCache") -> int:
        """Fill the rings with what a prompt's sliding layers kept, and forget what was before; returns its tokens."""
        tokens = cache.get_seq_length()
        for layer, kept in enumerate(cache.layers):
            sliding = self.is_sliding(layer)
            for mine in (self.keys[layer], self.values[layer]):
                # a slot that is not looked at is multiplied by zero, which NaN survives
                mine[:, :, 0 if sliding else tokens :] = 0
            if sliding and tokens:
                slots = torch.arange(tokens - kept.keys.shape[2], tokens, device=self.device) % self.window
                self.keys[layer].index_copy_(2, slots, kept.keys)
                self.values[layer].index_copy_(2, slots, kept.values)
        cache.layers.clear()
        self.position.fill_(tokens)
        return tokens

    def free(self) -> None:
        """Give the memory back, for another cache to take it."""
        self.keys, self.values = [], []

    @contextmanager
    def elsewhere(self, position: int, vocab_size: int) -> Iterator[Callable[[], None]]:
        """Give a function that moves on to another token at that position; afterwards all is as it was."""
        # a ring's slot that is written elsewhere is one that is still looked at
        kept = [tensor if self.is_sliding(layer) else tensor[:, :, position : position + 1]
                for layer, both in enumerate(zip(self.keys, self.values, strict=True)) for tensor in both]  # fmt: skip
        changed = [self.position, self.token, *kept]
        before = [tensor.clone() for tensor in changed]

        def move() -> None:
            self.position.fill_(position)
            self.token.add_(1).remainder_(vocab_size)

        try:
            yield move
        finally:
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(old)


class PromptCache(DynamicCache):
    """transformers' cache while a prompt is computed; once it is decoded only a count of tokens."""

    decoded: int | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens came."""
        return super().get_seq_length(layer_idx) if self.decoded is None else self.decoded


class _InPlace(DynamicLayer):
    """A layer that grows within memory that is there."""

    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._kept = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        keys, values = self._kept
        if end > keys.shape[2]:
            raise UsageError(
                f"{end} tokens go beyond the {keys.shape[2]} that were reserved", hint="shorten the prompt"
            )
        keys[:, :, begin:end] = key_states
        values[:, :, begin:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values
