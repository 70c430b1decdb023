"""Triton's part of decoding: a token goes through its experts without the host having to know which they are.

Weights are read where they lie, by tables of their addresses, and multiplied as they are expanded. Only Triton's own
words are used here, so that its interpreter runs the same source on a CPU.
"""

import triton
import triton.language as tl

ROWS = 8  # outputs of one program
WARPS = 4
EXPANDED_GROUPS = 64  # blocks of MXFP4 that one program expands


@triton.jit
def _power_of_two(exponent):
    """2 ** (exponent - 127) of bytes; 255 stands for no number."""
    bits = exponent.to(tl.uint32)
    # 2 ** -127 has no exponent field of its own
    bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def chosen_linear_kernel(
    x, chosen, routing, weights, scales, outer, offsets, biases, values, outer_values, out,
    share, outputs, groups, alpha, limit,
    GROUP: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
    MXFP4: tl.constexpr, NESTED: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Multiply the input of a slot with the matrix of its expert; a program is ROWS outputs of one slot.

    x (slots / share, groups * GROUP); chosen, routing (slots,). out (slots, outputs / 2) if GATED, by gpt-oss' SwiGLU
    over gates in even and ups in odd rows; else (slots, outputs), multiplied by routing. weights, scales, outer,
    biases: an address for each expert, int64; offsets: a float for each. A scale stands for GROUP weights of a row:
    MXFP4's is an exponent, bitsandbytes' a float or, if NESTED, a byte whose own scale, at outer, stands for 256.
    values: what the 16 codes mean; outer_values: what the bytes do.
    """
    WORDS: tl.constexpr = GROUP // 8  # eight codes in 32 bits
    slot = tl.program_id(1)
    expert = tl.load(chosen + slot)
    weight = tl.load(weights + expert).to(tl.pointer_type(tl.uint32))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_there = row < outputs
    word = tl.arange(0, WORDS)
    inputs = x + (slot // share) * groups * GROUP
    total = tl.zeros((ROWS, STEP), tl.float32)
    for begin in range(0, groups, STEP):
        group = begin + tl.arange(0, STEP)
        group_there = group < groups
        there = row_there[:, None] & group_there[None, :]
        block = row[:, None] * groups + group[None, :]
        codes = tl.load(weight + block[:, :, None] * WORDS + word[None, None, :], mask=there[:, :, None], other=0)
        inputs_of_words = inputs + group[None, :, None] * GROUP + word[None, None, :] * 8
        product = tl.zeros((ROWS, STEP, WORDS), tl.float32)
        for position in tl.static_range(8):
            # MXFP4 begins a byte with its low half, bitsandbytes with its high one
            code = (codes >> 4 * (position if MXFP4 else position ^ 1)) & 15
            factor = tl.load(inputs_of_words + position, mask=group_there[None, :, None], other=0)
            product += tl.load(values + code) * factor.to(tl.float32)
        if MXFP4:
            exponent = tl.load(scales + expert).to(tl.pointer_type(tl.uint8))
            scale = _power_of_two(tl.load(exponent + block, mask=there, other=0))
        elif NESTED:
            byte = tl.load(tl.load(scales + expert).to(tl.pointer_type(tl.uint8)) + block, mask=there, other=0)
            of_bytes = tl.load(outer + expert).to(tl.pointer_type(tl.float32))
            scale = tl.load(outer_values + byte.to(tl.int32)) * tl.load(of_bytes + block // 256, mask=there, other=0)
            scale += tl.load(offsets + expert)
        else:
            scale = tl.load(tl.load(scales + expert).to(tl.pointer_type(tl.float32)) + block, mask=there, other=0)
        total += tl.where(there, tl.sum(product, axis=2) * scale, 0.0)
    bias = tl.load(biases + expert).to(tl.pointer_type(x.dtype.element_ty))
    result = tl.sum(total, axis=1) + tl.load(bias + row, mask=row_there, other=0).to(tl.float32)
    if not GATED:
        result *= tl.load(routing + slot).to(tl.float32)
    else:
        gate, up = tl.split(tl.reshape(result, (ROWS // 2, 2)))
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        result = (up + 1) * gate / (1 + tl.exp(-gate * alpha))
        row = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        outputs = outputs // 2
        row_there = row < outputs
    tl.store(out + slot * outputs + row, result.to(out.dtype.element_ty), mask=row_there)


@triton.jit
def expand_mxfp4_kernel(blocks, scales, decoded, out, groups, GROUPS: tl.constexpr):
    """Expand MXFP4 by a table; a program is GROUPS blocks.

    blocks (groups, 16) and scales (groups,) uint8; decoded (256 scales, 16 codes) and out (groups, 32) of one dtype.
    """
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    there = group < groups
    byte = tl.arange(0, 16)
    pair = tl.load(blocks + group[:, None] * 16 + byte[None, :], mask=there[:, None], other=0).to(tl.int32)
    of_scale = decoded + tl.load(scales + group, mask=there, other=0).to(tl.int32)[:, None] * 16
    both = tl.join(tl.load(of_scale + (pair & 15)), tl.load(of_scale + (pair >> 4)))
    element = tl.arange(0, 32)
    tl.store(out + group[:, None] * 32 + element[None, :], tl.reshape(both, (GROUPS, 32)), mask=there[:, None])
