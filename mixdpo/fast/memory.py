"""Memory: activations that backward makes again; pages and kernels that the process keeps.

    y = linear(activation(x))       autograd would keep x for the activation and activation(x) for the linear map; the
                                    second, the largest tensor of a block, is made again from the first: 23 % of a
                                    GPT-2's activations for a hundredth of its time

A block as a whole is made again with a model's `checkpointing`. Then this is off, for all of a block is.
"""

import ctypes
import os

import torch


def activated(linear, activation, *inputs, keep: bool = False):
    """linear(activation(*inputs)). keep: as autograd does it, both kept."""
    made = activation(*inputs)
    if keep or not torch.is_grad_enabled() or torch.compiler.is_compiling():        # a compiler decides for itself
        return linear(made)
    inputs, place, size = [x.detach() for x in inputs], made.data_ptr(), made.numel()

    def pack(x):
        """Of what the linear map wants kept, the activation, in whatever shape, is let go: its shape stays."""
        return x.shape if x.data_ptr() == place and x.numel() == size else x

    def unpack(x):
        return activation(*inputs).view(x) if isinstance(x, torch.Size) else x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return linear(made)


def steady() -> None:
    """Has a process keep what each step wants again, and no more; to be called before the first product.

    Pages: the C library keeps memory that is freed; to give it back to the system and have it cleared again takes up to
    a sixth of a step on a CPU. Where there is no glibc, nothing.
    Kernels: oneDNN, which multiplies in bfloat16 on a CPU, compiles one for every shape that it meets and keeps the
    last 1,024: half a gigabyte after some dozens of steps, no two of which have the same lengths. A step has about 25.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                                   # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
