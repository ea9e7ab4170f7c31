"""Memory that a step does not need: the same numbers, fewer bytes."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from mixdpo.fast.memory import activated
from mixdpo.models.gpt2 import gelu
from mixdpo.models.llama import swiglu
from tests import small
from tests.allocations import sizes


@pytest.mark.parametrize("activation", [gelu, swiglu])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_activation_made_again_changes_no_bit(activation, dtype):
    """Values and gradients, twice in a row. Catches: another input's activation, a shape lost, a gradient that goes
    through what was made again, a parameter taken for the activation."""
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, 8, dtype=dtype, requires_grad=True) for _ in range(1 + (activation is swiglu))]
    linear, found = nn.Linear(8, 8).to(dtype), []
    for keep in (True, False, False):
        y = activated(linear, activation, *(x * 2 for x in inputs), keep=keep)
        found.append([y, *torch.autograd.grad(y.square().sum(), [*inputs, *linear.parameters()])])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_a_model_keeps_for_backward(family):
    """A large activation fewer in each block, and with checkpointing one small tensor a block. Catches: an activation
    kept after all, by the linear map or by what would make it again; checkpointing that keeps what it makes again."""
    model, ids = small.model(family, context=512), torch.randint(small.VOCAB, (16, 512))
    blocks = model.h if family == "gpt2" else model.layers
    inner = blocks[0].mlp.c_fc.out_features if family == "gpt2" else blocks[0].mlp.up_proj.out_features
    unit = ids.numel() * 4 / 2**20                                          # MiB of a column of states
    lean = sizes(model, ids)[-1]
    plain = [block.mlp.forward for block in blocks]
    for block, forward in zip(blocks, plain):
        block.mlp.forward = partial(call_with_keep, forward)
    assert sizes(model, ids)[-1] - lean == pytest.approx(len(blocks) * inner * unit, rel=0.01)
    for block in blocks:
        del block.mlp.forward
    model.checkpointing = True
    assert sizes(model, ids)[-1] < (len(blocks) + 5) * model.config.width * unit


def call_with_keep(forward, x, keep):
    return forward(x, True)


def test_pages_are_kept():
    """In a process of its own: once they are kept, a block that is freed and wanted again costs no page faults, of
    which there is one for 4 KiB. By malloc itself: torch aligns its blocks, and one may not fit where one was before.
    Catches: a parameter of mallopt that is refused, large blocks that go to the system even so."""
    code = """
import ctypes, resource, sys
from mixdpo.fast.memory import tune_process
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == "kept":
    tune_process()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**26)                                              # 64 MiB: 16,384 pages of 4 KiB
    libc.memset(block, 1, 2**26)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[1:]))
"""
    found = {}
    for how in ("given back", "kept"):
        run = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True)
        found[how] = int(run.stdout)
    if found["given back"] < 30:
        pytest.skip("this system's pages are large, or its C library keeps them anyway")
    assert found["kept"] < found["given back"] / 10
