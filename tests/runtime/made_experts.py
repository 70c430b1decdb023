"""A layer's MXFP4 experts with random weights, small enough for tests."""

import torch
from transformers import GptOssConfig

from ossquant.runtime.experts import NativeMxfp4Experts

HIDDEN, EXPERTS = 64, 9


def make_experts(kind: type[NativeMxfp4Experts] = NativeMxfp4Experts) -> NativeMxfp4Experts:
    """The same weights every time."""
    config = GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=3
    )
    experts, generator = kind(config), torch.Generator().manual_seed(0)
    for name, parameter in experts.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=generator)
        else:
            low, high = (0, 256) if name.endswith("blocks") else (122, 128)
            parameter.data.random_(low, high, generator=generator)
    return experts
