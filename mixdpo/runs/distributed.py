"""Several processes train one model: `torchrun --standalone --nproc-per-node N train.py ...`, one process per GPU.

This file has all that is of torch.distributed: the group of processes, the exchange of tensors, and sharded parameters.
What each process does is in parallel.py. With one process every function does nothing.

A process that ends closes its connections, which ends the others at their next exchange; torchrun ends what is left.
CUDA tensors travel by NCCL, others by gloo. Left out: nodes without a common file system.
"""

import contextlib
import datetime
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from mixdpo.config import InputError, Stopped
from mixdpo.fast.optimizer import is_sharded

TIMEOUT = datetime.timedelta(minutes=30)        # longest wait for another process
MISSING = ("another process of this run has ended, or did not answer in time; run the same command again to resume "
           "from the newest checkpoint")


def rank() -> int:
    """The number of this process, from 0. Process 0 alone locks, writes and prints."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within it this process is one of those that torchrun started, if it did. Only process 0 prints, and of an error
    in several processes only the first is shown."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT, store=store, rank=number,
                            world_size=count)
    try:
        with silence() if number else contextlib.nullcontext():
            yield
            dist.barrier()
    except BaseException as error:
        with contextlib.suppress(RuntimeError):                             # the store has ended, too
            if not isinstance(error, SystemExit) and store.add("told", 1) > 1:
                time.sleep(1)                   # torchrun ends all when the first has ended: that one must speak first
                raise SystemExit(130 if isinstance(error, (Stopped, KeyboardInterrupt)) else 1) from None
        if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error):
            raise InputError(MISSING) from None
        raise
    dist.destroy_process_group()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Within it nothing is printed."""
    with open(os.devnull, "w") as none, contextlib.redirect_stdout(none), contextlib.redirect_stderr(none):
        yield


# --- the exchange of values -------------------------------------------------------------------------------------------


def everyone(value) -> list:
    """The values of all processes, in their order. value: anything that can be pickled; its tensors are on the CPU."""
    found = [value] * world()
    if world() > 1:
        dist.all_gather_object(found, value)
    return found


def any_process(*flags: bool) -> list[bool]:
    """Whether each flag is set in any process."""
    if world() == 1:
        return [*flags]
    found = torch.tensor(flags, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool().tolist()


def summed(tensors: list[torch.Tensor], group=None) -> list[torch.Tensor]:
    """The sums of the tensors of all processes, or of a group, by one all-reduce for each dtype."""
    out: list = [None] * len(tensors)
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        places = [n for n, x in enumerate(tensors) if x.dtype == dtype]
        flat = torch.cat([tensors[n].reshape(-1) for n in places])
        dist.all_reduce(flat, dist.ReduceOp.SUM, group)
        for n, part in zip(places, flat.split([tensors[n].numel() for n in places])):
            out[n] = part.view_as(tensors[n])
    return out


def gathered(mine: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The rows of all processes, in their order: (n,D) -> (sum of counts,D). counts: the number of rows of each."""
    padded = mine.new_zeros(max(counts), mine.shape[1])
    padded[: len(mine)] = mine
    found = [torch.empty_like(padded) for _ in counts]
    if padded.numel():
        dist.all_gather(found, padded)
    return torch.cat([rows[:n] for rows, n in zip(found, counts)])


# --- sharded parameters -----------------------------------------------------------------------------------------------


def shard(models: list) -> None:
    """Divides the parameters, gradients and moments of these models among the processes (FSDP2). A block's parameters
    are gathered when it computes; those outside of blocks, the unembedding too, from the forward pass to the end of the
    backward pass. Gradients are summed."""
    from torch.distributed.fsdp import fully_shard  # half a second, which other runs save

    for model in models:
        blocks = next(part for part in model.children() if isinstance(part, torch.nn.ModuleList))
        for part in (*blocks, model):
            fully_shard(part)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)                    # gloo has no other


def reshard(experts: torch.nn.Module) -> None:
    """Frees what a pass without gradient has gathered: then experts.parameters() are those that the optimizer has."""
    parts: Any = experts.modules()
    for part in parts:
        if hasattr(part, "reshard"):
            part.reshard()


def complete(x: Any) -> torch.Tensor:
    """x, or all of a sharded x: in process 0 on the CPU, elsewhere nothing."""
    full = x.full_tensor() if is_sharded(x) else x
    return x if full is x else full.cpu() if rank() == 0 else torch.empty(0)


def placed(value: torch.Tensor, p: Any) -> torch.Tensor:
    """A copy of `value` on the device of p, sharded as p is."""
    if not is_sharded(p):
        return value.to(p.device).clone()
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
