"""Attention of one token over a cache, with gpt-oss' sinks, without a copy of keys for every query head."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "ossquant_decode"


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """query (1, heads, 1, d), key and value (1, kv heads, slots, d), mask (1, 1, 1, slots) that is added to scores.

    Scores are summed up in float32. Returns (1, 1, heads, d). Called as transformers calls its attention.
    """
    kv_heads = key.shape[1]
    grouped = query.view(kv_heads, -1, query.shape[-1])  # query heads that share keys are neighbours
    scores = (grouped @ key[0].transpose(1, 2)).float() * scaling + attention_mask.view(1, 1, -1).float()
    sinks = module.sinks.float().view(kv_heads, -1, 1)
    shares = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    attended = shares.to(value.dtype) @ value[0]
    return attended.reshape(1, 1, -1, query.shape[-1]), None


AttentionInterface.register(NAME, attend)
