import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ossquant.runtime import kernels


def test_both_ways_of_expanding_equal_transformers() -> None:
    """On the host by numba, elsewhere by torch: the same bf16 as transformers' own dequantization."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (96, 6, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(60, 190, (96, 6), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.bfloat16)[0].t()
    assert torch.equal(kernels.dequantize_mxfp4(blocks, scales, torch.bfloat16), expected)
    assert torch.equal(kernels.expand_with_torch(blocks, scales), expected)
    assert torch.equal(kernels.dequantize_mxfp4(blocks, scales, torch.float32), expected.float())
