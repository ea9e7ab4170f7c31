"""Several processes train one model: `torchrun --standalone --nproc-per-node N train.py ...`, one process per GPU.

This file has all that is of torch.distributed: the group of processes, and the exchange of values between them. What
each process does is in parallel.py. With one process every function does nothing.

A process that ends closes its connections, which ends the others at their next exchange; torchrun ends what is left.
CUDA tensors travel by NCCL, others by gloo. Left out: nodes without a common file system.
"""

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from mixdpo.config import InputError, Stopped, to_json
from mixdpo.runs.log import environment

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
def joined(words: list[str]) -> Iterator[None]:
    """Within it this process is one of those that torchrun started, if it did. Only process 0 prints, and of an error
    in several processes only the first is shown. words: of the command line."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT, store=store, rank=number,
                            world_size=count)
    try:
        with silence() if number else contextlib.nullcontext():
            own = environment()
            must_agree({key: own[key] for key in ("revision", "torch", "python")} | {"command": words})
            yield
            dist.barrier()
    except BaseException as error:
        with contextlib.suppress(RuntimeError):                             # the store has ended, too
            if store.add("told", 1) > 1:
                time.sleep(1)                   # torchrun ends all when the first has ended: that one must speak first
                raise SystemExit(130 if isinstance(error, (Stopped, KeyboardInterrupt)) else 1) from None
        if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error):
            raise InputError(MISSING) from None
        raise
    dist.destroy_process_group()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Within it nothing is printed."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


def must_agree(facts: dict) -> None:
    """Raises: InputError unless `facts`, which JSON can hold, are equal in all processes; it names what differs."""
    found = everyone({key: to_json(value) for key, value in facts.items()})
    for number, other in enumerate(found):
        if differ := [key for key in found[0] if other[key] != found[0][key]]:
            what = "; ".join(f"{key} {other[key]:.200}, not {found[0][key]:.200}" for key in differ)
            raise InputError(f"process {number} differs from process 0: {what}. Start all processes with the same "
                             "program, command and files")


# --- the exchange of values -------------------------------------------------------------------------------------------


def everyone(value) -> list:
    """The values of all processes, in their order. value: anything that can be pickled; its tensors are on the CPU."""
    found = [value] * world()
    if world() > 1:
        dist.all_gather_object(found, value)
    return found


def from_first(make: Callable):
    """make() of process 0."""
    box = [make() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def first_alone(make: Callable):
    """make(), in process 0 before the others: files are fetched once."""
    made = make() if rank() == 0 else None
    everyone(None)
    return made if rank() == 0 else make()


def any_process(*flags: bool) -> list[bool]:
    """Whether each flag is set in any process."""
    found = torch.tensor(flags, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")
    if world() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool().tolist()


def summed(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sums of the processes' tensors, by one all-reduce for each dtype."""
    out: list = [None] * len(tensors)
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        places = [n for n, x in enumerate(tensors) if x.dtype == dtype]
        flat = torch.cat([tensors[n].reshape(-1) for n in places])
        dist.all_reduce(flat)
        for n, part in zip(places, flat.split([tensors[n].numel() for n in places])):
            out[n] = part.view_as(tensors[n])
    return out


def gathered(mine: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The rows of all processes, in their order: (n,D) -> (sum of counts,D). counts: the number of rows of each."""
    if not any(counts):
        return mine
    padded = mine.new_zeros(max(counts), mine.shape[1])
    padded[: len(mine)] = mine
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded)
    return torch.cat([rows[:n] for rows, n in zip(found, counts)])
