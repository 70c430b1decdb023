"""Compile Triton's kernels for a GPU of a compute capability, such as 90; print what a thread takes as JSON.

Its own process: the tests' Triton interprets, which it decides when it is imported.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ossquant.runtime import expert_kernels
from ossquant.runtime.chosen import STEPS

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INTEGERS = {"chosen": "*i64", "weights": "*i64", "scales": "*i64", "outer": "*i64", "biases": "*i64",
            "share": "i32", "outputs": "i32", "groups": "i32"}  # fmt: skip
FLOATS = {"offsets": "*fp32", "values": "*fp32", "outer_values": "*fp32", "alpha": "fp32", "limit": "fp32"}


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, types of its arguments and constants."""
    formats = ("mxfp4", 32, False), ("double", 64, True), ("single", 64, False)
    other_dtypes = product(("fp16", "fp32"), (True,), formats[:1])
    for dtype, gated, (name, group, nested) in (*product(("bf16",), (True, False), formats), *other_dtypes):
        data = {"x": f"*{dtype}", "routing": f"*{dtype}", "out": f"*{dtype}" if gated else "*fp32"}
        constants = {"GROUP": group, "STEP": STEPS[group], "ROWS": expert_kernels.ROWS, "MXFP4": name == "mxfp4",
                     "NESTED": nested, "GATED": gated}  # fmt: skip
        yield f"{name} {dtype} {gated=}", expert_kernels.chosen_linear_kernel, INTEGERS | FLOATS | data, constants
    types = {"blocks": "*u8", "scales": "*u8", "decoded": "*bf16", "out": "*bf16", "groups": "i32"}
    yield "expand", expert_kernels.expand_mxfp4_kernel, types, {"GROUPS": expert_kernels.EXPANDED_GROUPS}


def machine_code(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> bytes:
    """What NVIDIA's assembler makes of a kernel, with pointers aligned as torch's are."""
    types = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(types.values()) if kind[0] == "*"}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    code: bytes = triton.compile(source, target=target, options={"num_warps": expert_kernels.WARPS}).asm["cubin"]
    return code


def main() -> None:
    """The argument is a compute capability without its point."""
    usage = {}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        for name, kernel, types, constants in variants():
            file.write_bytes(machine_code(kernel, types, constants, int(sys.argv[1])))
            command = [CUOBJDUMP, "-res-usage", file]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            fields = [word.partition(":") for word in told if word.startswith(("REG:", "STACK:", "LOCAL:"))]
            usage[name] = {field: int(value) for field, _, value in fields}
    typer.echo(json.dumps(usage))


if __name__ == "__main__":
    main()
