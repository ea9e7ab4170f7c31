"""Compiles every kernel for sm_90 without a GPU: `python tests/compile_kernels.py`. A line each: dtype, width,
experts, registers, bytes spilled and of stack (ptxas -v), bytes of shared memory, atomic instructions."""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mixdpo.fast import kernels

TARGET = GPUTarget("cuda", 90, 32)
COUNTS = ("N", "V", "span", "begin", "width")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOATS = ("top", "total", "chosen", "grad", "d_u", "d_A", "peak")


def sources(kernel, dtype: str, C: int, K: int, backward: bool, skip: bool):
    """The kernel with the types and constants of one call."""
    R = 16 if K > 1 else 0
    constants = {"C": C, "K": K, "KP": triton.next_power_of_2(K), "R": R, "RP": kernels.padded(R), "BLOCK": 1024,
                 "BACKWARD": backward, "SKIP": skip} | kernels.tiling(DTYPES[dtype], K)
    if not R:
        constants |= {"u": None, "A": None, "d_u": None, "d_A": None}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in COUNTS:
            signature[name] = "i32"
        else:
            special = {"targets": "*i64", "wanted": "*i8"}
            signature[name] = special.get(name, "*fp32" if name in FLOATS else f"*{dtype}")
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(kernel.arg_names) if signature[name][0] == "*"}
    return ASTSource(kernel, signature, constexprs=used, attrs=aligned)             # as torch's allocations are


def resources(compiled) -> tuple[int, int, int]:
    """Registers, bytes spilled and stack of the kernel, from ptxas -v on its PTX."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = max(folder.glob("ptxas*"), key=lambda path: len(path.name))     # ptxas-blackwell, where there are two
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "kernel.ptx"
        text.write_text(compiled.asm["ptx"])
        arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"]).group(1)
        said = subprocess.run([ptxas, "-v", f"--gpu-name={arch}", text, "-o", Path(work) / "out"], capture_output=True,
                              text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
                                     said).groups()
    return registers, int(stores) + int(loads), int(stack)


def main() -> None:
    for dtype in DTYPES:
        for C, K in ((768, 1), (768, 4), (2048, 4)):
            for skip in (False, True):
                report(kernels.forward_kernel, dtype, C, K, skip=skip)
                report(kernels.backward_kernel, dtype, C, K, skip=skip)
        for backward in (False, True):
            report(kernels.rows_kernel, dtype, 768, 1, backward)


def report(kernel, dtype: str, C: int, K: int, backward: bool = False, skip: bool = False) -> None:
    tile = kernels.tiling(DTYPES[dtype], K)
    how = {name: tile[name] for name in ("num_warps", "num_stages")} if kernel is not kernels.rows_kernel else {}
    compiled = triton.compile(sources(kernel, dtype, C, K, backward, skip), target=TARGET, options=how)
    registers, spilled, stack = resources(compiled)
    print(f"{kernel.__name__:<16}{dtype} C {C:<5} K {K}  registers {registers:<4} spilled {spilled:<4} "
          f"stack {stack:<4} shared {compiled.metadata.shared:<6} "
          f"atomics {len(re.findall(r'^.*[^a-z](?:atom|red)[.]', compiled.asm['ptx'], re.M))}", flush=True)


if __name__ == "__main__":
    main()
