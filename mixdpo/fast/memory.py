"""Saves memory: activations that are recomputed in backward; pages and compiled kernels that the process keeps.

    y = linear(activation(x))       autograd keeps x for the activation and activation(x) for the linear map. Here the
                                    second, the largest tensor of a block, is recomputed from the first. This saves
                                    23 % of a GPT-2's activation memory and costs 1 % of its time

A model's `checkpointing` recomputes entire blocks. Then this recomputation is turned off, as it saves nothing more.
"""

import ctypes
import os

import torch


def activated(linear, activation, *inputs, keep: bool = False):
    """linear(activation(*inputs)); backward recomputes the activation. keep: True stores it, as autograd does."""
    output = activation(*inputs)
    if keep or not torch.is_grad_enabled() or torch.compiler.is_compiling():        # the compiler decides by its rules
        return linear(output)
    fixed, address, size = [x.detach() for x in inputs], output.data_ptr(), output.numel()

    def pack(x):
        """Of the tensors that the linear map saves, the activation (perhaps reshaped) is replaced by its shape."""
        return x.shape if x.data_ptr() == address and x.numel() == size else x

    def unpack(x):
        return activation(*fixed).view(x) if isinstance(x, torch.Size) else x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return linear(output)


def tune_process() -> None:
    """Sets what the process keeps between steps. Call it before the first matrix product.

    Pages: the C library keeps freed memory. Returning it to the system, which clears it, costs up to a sixth of a step
    on a CPU. Without glibc this has no effect.
    Kernels: oneDNN, which computes bfloat16 products on a CPU, compiles a kernel for each new shape and keeps the last
    1,024: half a gigabyte after some dozens of steps of unequal lengths. Here it keeps 256; a step needs about 25.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                                   # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
