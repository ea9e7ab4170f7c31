"""Where the figures of a run can be watched while it trains, beside metrics.jsonl (--log).

    tensorboard     files in RUN/tensorboard; shown by `tensorboard --logdir RUN`
    wandb           Weights & Biases, project mixdpo or WANDB_PROJECT; WANDB_MODE=offline keeps all in RUN/wandb
    trackio         project mixdpo, in TRACKIO_DIR on this machine; shown by `trackio show --project mixdpo`

Figures have the names that trainers of DPO give them (NAMES), and the values of metrics.jsonl. A resumed run continues
its curves: a step that it repeats is not shown twice. The packages are the extra `log`; the one in use is imported.

A private run sends only the figures that its budget covers (COVERED), and not before it ends: the times at which its
steps end are not covered (private/dp_sgd.py). Left out: figures of single experts, and those of --validation.
"""

import dataclasses
import importlib
import json
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mixdpo.config import InputError, to_json, write_text

PROJECT = "mixdpo"
NAMES = {                           # name: that in metrics.jsonl, which metrics.py explains
    **{f"rewards/{name}": f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")},
    **{f"logps/{name}": f"logps/{name}" for name in ("chosen", "rejected")},
    "loss": "loss", "lr": "rate", "grad_norm": "grad_norm",
    "mixture/bound": "bound", "mixture/gap": "gap", "mixture/effective_experts": "effective_experts",
    "mixture/responsibility_entropy": "q_entropy", "mixture/gate_information": "gate_information"}
COVERED = ("lr", "grad_norm")       # of a private run; the norm is that of the gradient with noise
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Logger(NamedTuple):
    """Functions that send a run's figures."""

    send: Callable[[int, dict[str, float]], None]       # the figures of one step, by the names of NAMES
    flush: Callable[[], None]                           # before a checkpoint: what was sent survives the process
    close: Callable[[], None]                           # after the last step


NONE = Logger(lambda step, values: None, lambda: None, lambda: None)


def must_be_installed(log: str) -> None:
    """Raises: InputError unless the package that --log needs can be imported."""
    try:
        importlib.import_module(MODULES.get(log, "math"))
    except ImportError as error:
        raise InputError(f"got {log}, whose package cannot be imported ({error}); install the extra `log`: "
                         "pip install -e .[log]; or leave this option out", option="log") from None


def named(figures: dict, private: bool) -> dict[str, float]:
    """The figures of a step, a line of metrics.jsonl, that are sent."""
    return {name: figures[key] for name, key in NAMES.items() if not private or name in COVERED}


def logger_of(config, run: Path, t: int) -> Logger:
    """The logger of a run that has made t steps. Its `send` takes a line of metrics.jsonl. Raises: InputError."""
    if not config.log:
        return NONE
    open_logger = {"tensorboard": to_tensorboard, "wandb": to_wandb, "trackio": to_trackio}[config.log]
    if config.epsilon == math.inf:
        logger = open_logger(config, run, t)
        return logger._replace(send=lambda step, figures: logger.send(step, named(figures, False)))

    def close() -> None:
        logger = open_logger(config, run, 0)
        for line in (run / "metrics.jsonl").read_text().splitlines():
            figures = json.loads(line)
            logger.send(figures["step"], named(figures, True))
        logger.close()

    return NONE._replace(close=close)


def to_tensorboard(config, run: Path, t: int) -> Logger:
    """Readers hide earlier points of steps from purge_step on."""
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(str(run / "tensorboard"), purge_step=t + 1, flush_secs=10)

    def send(step: int, values: dict) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Logger(send, writer.flush, writer.close)


def to_wandb(config, run: Path, t: int) -> Logger:
    """Output of the console is not sent: it has more than NAMES."""
    import wandb
    try:
        made = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), id=identity(run, t), name=run.name,
                          dir=run, config=options_of(config), resume="allow", settings=wandb.Settings(console="off"))
    except wandb.Error as error:
        raise InputError(f"wandb: {error}", option="log") from None
    first = made.starting_step                          # it has those before
    return Logger(lambda step, values: made.log(values, step=step) if step >= first else None, lambda: None,
                  made.finish)


def to_trackio(config, run: Path, t: int) -> Logger:
    """The name, too, contains the identity, because trackio resumes by name."""
    import trackio
    made = trackio.init(PROJECT, f"{run.name}-{identity(run, t)}", config=options_of(config), resume="allow")
    first = made._next_step                             # it has those before
    return Logger(lambda step, values: made.log(values, step=step) if step >= first else None, lambda: None,
                  made.finish)


def options_of(config) -> dict:
    """The options of a run, as config.json has them."""
    return json.loads(to_json(dataclasses.asdict(config)))


def identity(run: Path, t: int) -> str:
    """What identifies a run among those of other folders and earlier ones of the same folder. A resumed run has it in a
    file."""
    path = run / "log-id"
    if t == 0 or not path.exists():
        write_text(path, uuid.uuid4().hex[:8])
    return path.read_text()
