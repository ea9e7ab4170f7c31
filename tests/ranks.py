"""Several processes as torchrun starts them, but forked, so torch is imported once. As with torchrun their store
belongs to the process that starts them and outlives each of them. The store has a thread, and a process that is forked
while a thread holds a lock waits for it for ever: so the store begins after all processes."""

import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  the first optimizer step imports it: here once, before the processes fork
import torch.distributed as dist
import torch.distributed.fsdp  # noqa: F401

DIGITS = 5      # of a port


class Group:
    """`count` processes that call work(rank); what they print is in the file `output`."""

    def __init__(self, count: int, work, output: Path):
        self.output, self.left, self.ended = output, {}, {}                 # rank by process; exit status by rank
        told, tell = os.pipe()
        for rank in range(count):
            child = os.fork()
            if not child:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.read(told, DIGITS).decode(),
                               "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
                only(work, rank, output)
            self.left[child] = rank
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        os.write(tell, f"{self.store.port:0{DIGITS}}".encode() * count)
        os.close(told), os.close(tell)

    def poll(self) -> None:
        """Notes which processes have ended; a signal's number is negative."""
        for child in list(self.left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                self.ended[self.left.pop(child)] = os.waitstatus_to_exitcode(status)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to one process, if it has not ended."""
        for child, its in self.left.items():
            if its == rank:
                os.kill(child, number)

    def wait(self, seconds: float) -> list[int]:
        """Waits for all -> exit statuses by rank. Those that have not ended after `seconds` are killed."""
        limit = time.monotonic() + seconds
        while self.left:
            self.poll()
            if time.monotonic() > limit:
                for rank in list(self.left.values()):
                    self.kill(rank)
            time.sleep(0.01)
        return [self.ended[rank] for rank in sorted(self.ended)]

    def printed(self) -> list[str]:
        """The lines that they have printed."""
        return self.output.read_text().splitlines()


def only(work, rank: int, output: Path) -> None:
    """Runs work(rank) in this forked process as a program does, and ends it."""
    status = 1
    try:
        torch.set_num_threads(1)
        torch.cuda.is_available = lambda: False
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        work(rank)
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
