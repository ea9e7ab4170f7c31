"""Several processes as torchrun starts them, but forked: torch is imported once. Their store is the parent's, as it is
torchrun's, so it outlives any of them."""

import os
import signal
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def start(count: int, work, output: Path) -> dict[int, int]:
    """Starts work(rank) in `count` processes, which print into the file `output` -> rank by process number."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    found = {}
    for rank in range(count):
        child = os.fork()
        if child:
            found[child] = rank
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                       "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
        end(work, rank, output)
    STORES[tuple(found)] = store                                            # as long as the processes live
    return found


STORES: dict = {}


def end(work, rank: int, output: Path) -> None:
    """Runs work(rank) in this forked process, and ends it."""
    status = 1
    try:
        torch.set_num_threads(1)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        import sys
        sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
        work(rank)
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def wait(processes: dict[int, int], seconds: float) -> dict[int, int]:
    """Waits for all processes -> exit status by rank, negative for a signal. After `seconds` those that are left are
    killed."""
    left, found, limit = dict(processes), {}, time.monotonic() + seconds
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                found[left.pop(child)] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            for child in left:
                os.kill(child, signal.SIGKILL)
            limit = float("inf")
        time.sleep(0.01)
    STORES.pop(tuple(processes), None)
    return found
