"""Peak memory of one variant's step, in a new process.

    python -m tests.bench.memory NAME DIRECTORY SIZES DEVICE        prints one JSON line

On a CPU the numbers are resident set sizes of the process, from Linux's /proc/self/status; the high-water mark (VmHWM)
is reset just before the measured step. On a CUDA device they come from the allocator. In MB (10^6 bytes):

    level       memory before the measured step, after two warm-up steps. It contains the model, the optimizer's state,
                a gradient for every trained parameter, the interpreter, the libraries and their scratch space, cached
                reference log-probs, and the reference model if the variant has one
    peak        the maximum during one step from there
    step        peak - level: the additional memory of a step, without gradients that it returns; this is compared
    state       computed, not measured: weight, gradient and AdamW's two moments of every trained parameter

Gradients are allocated as zeros before that step, and nothing frees them before they are used. So the difference is
activations, logits and temporaries only. A second step starts without gradients, as the timed steps do; `freed` is its
peak - level. It may be negative: if gradients are allocated while activations are freed, the peak is lower than the sum
of the two.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

# Every freed block above 64 KiB returns to the system, so resident memory is live memory. Too slow for measuring time.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "PASSIVE"}
MB, ROOT = 1e6, Path(__file__).resolve().parents[2]


def measurable(device: str) -> bool:
    """True if memory can be measured: on CUDA always, on a CPU under Linux only."""
    return device == "cuda" or Path("/proc/self/clear_refs").exists()


def measure(name: str, directory: Path, sizes, device: str) -> dict[str, float]:
    """Runs this module in a new process and returns its figures."""
    words = [name, str(Path(directory).resolve()), json.dumps(asdict(sizes)), device]
    command = [sys.executable, "-m", "tests.bench.memory", *words]
    call = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert call.returncode == 0, f"{name}: the memory measurement ended with {call.returncode}:\n{call.stderr[-2000:]}"
    return json.loads(call.stdout.splitlines()[-1])


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / MB


def now(device: str) -> float:
    """Memory in use, after freeing unused memory."""
    import torch

    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated() / MB
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def peak_of(step, device: str) -> float:
    """The highest memory in use during one step."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / MB
    Path("/proc/self/clear_refs").write_text("5")                           # resets VmHWM to the present
    step()
    return resident("VmHWM")


def main(name: str, directory: str, sizes: str, device: str) -> None:
    import torch

    from tests.bench.parts import ROWS
    from tests.bench.variants import Sizes, make_setting

    setting = make_setting(Sizes(**json.loads(sizes)), Path(directory), device)
    made = ROWS[name].build(setting)
    for _ in range(2):
        made.step()
    for p in made.parameters:
        p.grad = torch.full_like(p, 0.0)                                    # written, hence resident
    level = now(device)
    kept, freed = (peak_of(made.step, device) - made.gradient / MB for _ in range(2))
    state = sum(4 * p.numel() * p.element_size() for p in made.parameters) / MB
    print(json.dumps({"level": level, "state": state, "step": kept - level, "freed": freed - level}))


if __name__ == "__main__":
    main(*sys.argv[1:])
