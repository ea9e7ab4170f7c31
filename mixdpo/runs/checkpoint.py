"""What a run keeps on disk to go on from: checkpoint/00000042.safetensors holds the state after step 42.

No pickle: tensors are safetensors, facts are JSON (files/atomic.py). Batches, noise and starts are functions of (seed,
step), so there is no random state to keep. A run that is resumed from any checkpoint ends as an uninterrupted run does,
to the bit.
"""

import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from mixdpo.config import InputError, Stopped, to_json
from mixdpo.experts import Models
from mixdpo.files.atomic import Damaged, read_tensors, write_tensors
from mixdpo.gates import Gate
from mixdpo.runs.distributed import any_process, complete, everyone, placed, rank, reshard

# --- files ------------------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, the newest first."""
    return sorted((run / "checkpoint").glob("*.safetensors"), reverse=True)


def save_checkpoint(run: Path, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> None:
    """Writes the checkpoint of state["step"] atomically; then only the newest `keep` stay."""
    (run / "checkpoint").mkdir(exist_ok=True)
    for left in [*(run / "checkpoint").glob("*.part"), *(run / "checkpoint").glob(".tmp*")]:      # of a killed process;
        left.unlink()                                                       # .tmp*: made by safetensors
    write_tensors(run / "checkpoint" / f"{state['step']:08d}.safetensors", tensors, state)
    keep_newest(run, keep)


def keep_newest(run: Path, count: int) -> None:
    """Removes all checkpoints but the newest `count`."""
    for old in checkpoints(run)[count:]:
        old.unlink()


def load_checkpoint(run: Path, config: dict) -> tuple[dict[str, torch.Tensor], dict] | None:
    """The newest checkpoint that is intact, or None if there is no checkpoint. A damaged one is reported and skipped.
    Raises: InputError if all are damaged, or if another configuration wrote it, naming the options that differ."""
    for path in checkpoints(run):
        try:
            tensors, state = read_tensors(path)
            break
        except Damaged as damaged:
            print(f"warning: {damaged}; it is skipped")
    else:
        if checkpoints(run):
            raise InputError(f"has damaged checkpoints only; remove {run} and start again", file=run / "checkpoint")
        return None
    differ = [k for k in config if to_json(state["config"].get(k)) != to_json(config[k])]   # a list is like a tuple
    if differ:
        what = "; ".join(f"{k} has changed" if k.endswith("_key") else
                         f"{k}: there {state['config'].get(k)!r}, now {config[k]!r}" for k in differ)
        raise InputError(f"is the checkpoint of another configuration ({what}); use another --out, or the same options "
                         "to resume", file=path)
    return tensors, state


# --- a loop that can be stopped --------------------------------------------------------------------------------------


class Stop:
    """Within it, SIGINT and SIGTERM set `requested`, and the loop ends after its step. A second signal stops at once.
    If another process of the run has got a first one, `requested` is set too. In another thread than the main one,
    signals stay as they are. name: of what is stopped."""

    def __init__(self, name: str = ""):
        self.name = name

    def check(self, message: str | None = None) -> None:
        """Raises: Stopped if a stop was requested."""
        if self.requested:
            raise Stopped(f"{self.name}: {message or 'stopped before its first step'}")

    def __enter__(self):
        self.requested, self.asked, main = False, False, threading.current_thread() is threading.main_thread()
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM) if main}
        return self

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt("stopped at once")
        self.requested = self.asked = True
        print("\nstopping after this step; a second signal stops at once", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@dataclass
class Saver:
    """The checkpoints of a loop: saves when one is due and when the user asks to stop."""

    folder: Path
    stop: Stop
    minutes: float                  # between checkpoints
    keep: int = 1                   # newest checkpoints that stay
    before: Callable = lambda t: None                   # called after each step t, before its checkpoint
    saved: float = field(default_factory=time.monotonic)

    def after(self, t: int, total: int, snapshot) -> None:
        """To be called after step t of `total`. snapshot(): the tensors and facts that a checkpoint holds.
        Raises: Stopped if the user asked for it; the state is saved then."""
        self.before(t)
        if t < total:
            due = time.monotonic() - self.saved > 60 * self.minutes
            self.stop.requested, due = any_process(self.stop.requested, due)            # all stop after the same step
            self.check(t, total, snapshot)
            if due:
                tensors, facts = snapshot()
                self.save(t, tensors, facts, self.keep)

    def check(self, t: int, total: int, snapshot) -> None:
        """The same between steps, where the state is still that after step t."""
        if self.stop.requested and t:
            tensors, facts = snapshot()
            self.save(t, tensors, facts, self.keep)
        self.stop.check(f"stopped and saved after step {t} of {total}" if t else None)

    def save(self, t: int, tensors: dict[str, torch.Tensor], facts: dict, keep: int = 1) -> None:
        """Writes the checkpoint of step t; only the newest `keep` stay. All processes wait until it is written."""
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(self.folder, tensors, {"step": t} | facts, keep)
        everyone(None)
        self.saved = time.monotonic()


# --- tensors ----------------------------------------------------------------------------------------------------------


def trained_state(experts: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that can differ from the reference, as "experts." and their names, for safetensors. Sharded ones
    are complete in process 0 alone."""
    reshard(experts)                                                        # what is gathered must not be written from
    return {f"experts.{name}": complete(p.detach()).contiguous() for name, p in own_parameters(experts)}


def own_parameters(experts: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are trained, and those of experts that --freeze keeps (runs/init_experts.py)."""
    return [(name, p) for name, p in experts.named_parameters() if p.requires_grad or getattr(p, "frozen", False)]


@torch.no_grad()
def load_state(experts: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copies a saved state back. Raises: InputError naming every tensor that is missing, extra or of another shape."""
    if isinstance(experts, Models):
        for k, model in [*experts.models.named_children()]:
            if model.config.tied and f"experts.models.{k}.lm_head.weight" in tensors:      # from --init-experts
                untie(experts, int(k))
    own = {f"experts.{name}": p for name, p in own_parameters(experts)}
    others = tuple(f"experts.models.{k}." for k in getattr(experts, "elsewhere", []))      # expert parallelism
    state = {name: x for name, x in tensors.items() if name.startswith("experts.") and not name.startswith(others)}
    wrong = sorted(set(own) ^ set(state)) + [n for n in set(own) & set(state) if own[n].shape != state[n].shape]
    if wrong:
        raise InputError(f"has tensors that do not fit this configuration: {', '.join(wrong[:8])}; resume with the "
                         "configuration that wrote it", file=path)
    for name, p in own.items():
        p.copy_(placed(state[name], p))


@torch.no_grad()
def untie(experts: Models, k: int) -> nn.Module:
    """Gives model k a separate unembedding that starts as a copy of its embedding; returns the model."""
    old = experts.models.get_submodule(str(k))
    new = type(old)(dataclasses.replace(old.config, tied=False)).to(old.unembedding.device)
    new.load_state_dict(old.state_dict() | {"lm_head.weight": old.unembedding})
    experts.models.add_module(str(k), new)
    return new


def gate_state(gate: Gate) -> dict[str, torch.Tensor]:
    """All that gate(inputs) depends on, as "gate." and a name, for safetensors."""
    return {f"gate.{name}": value.detach().contiguous() for name, value in gate.state_dict().items()}


def load_gate(gate: Gate, tensors: dict[str, torch.Tensor]) -> None:
    """Copies a saved state back."""
    gate.load_state_dict({n.removeprefix("gate."): value for n, value in tensors.items() if n.startswith("gate.")})
