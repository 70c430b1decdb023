"""Load a checkpoint over two devices that refuse each other's tensors, and print what comes out as JSON.

The second is torch's lazy backend, which every build of torch has: its tensors live beside the CPU's, and an
operation on both is an error, as with a GPU. bitsandbytes has no kernels for it, so attention stays in bf16.
"""

import json
import sys
from typing import Any

import torch
import torch._lazy.ts_backend
import typer

from ossquant.runtime.load import load_model, placement


def chunk(tensor: torch.Tensor, chunks: int, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """Stand in for the lazy backend's own, whose parts are of no device."""
    size = -(-tensor.shape[dim] // chunks)
    begins = range(0, tensor.shape[dim], size)
    return tuple(tensor.narrow(dim, begin, min(size, tensor.shape[dim] - begin)) for begin in begins)


def main() -> None:
    """Arguments: a checkpoint; from how many tokens experts on the host are streamed, or 'measured'."""
    checkpoint, stream_from = sys.argv[1:]
    torch._lazy.ts_backend.init()
    torch.chunk = chunk
    ids = torch.arange(5, 105)[None]
    arguments: dict[str, Any] = {"scheme": "mxfp4", "dtype": "float32"}
    with torch.no_grad():
        one, _ = load_model(checkpoint, device_map="cpu", **arguments)
        expected = one(ids).logits
        here = {"": "lazy:0", "model.layers.0.mlp.experts": "cpu", "model.layers.2.mlp.experts": "cpu"}
        plan: list[str] = []
        two, _ = load_model(checkpoint, device_map=here, announce=plan.append, **arguments)
        experts = [two.model.layers[layer].mlp.experts for layer in (0, 2)]
        for hook in (hook for each in experts for hook in each._forward_pre_hooks.values()):
            hook.below = hook.below if stream_from == "measured" else int(stream_from)
        computed_on: set[str] = set()
        for each in experts:
            each.register_forward_pre_hook(lambda module, args: computed_on.add(args[0].device.type))
        found = two(ids.to("lazy")).logits.cpu()
    typer.echo(
        json.dumps(
            {
                "plan": plan[0],
                "host": [line for line in plan if line.startswith("experts ")],
                "bytes": dict(placement(two).bytes_by_device),
                "computed_on": sorted(computed_on),
                "error": float((found - expected).abs().max() / expected.abs().max()),
                "same_tokens": bool((found.argmax(-1) == expected.argmax(-1)).all()),
            }
        )
    )


if __name__ == "__main__":
    main()
