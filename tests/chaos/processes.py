"""Runs of several processes, one of which is killed at a random moment. The others must end within LIMIT seconds with
at most one sentence, and a resumed run must end as an uninterrupted run of as many processes does, bit for bit.

The processes are forked; what torchrun does when one has ended, SIGTERM to the others, is done here.
"""

import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                # the tests' helpers

import tinyjob
from ranks import Group

import train
from mixdpo.config import command
from mixdpo.runs import checkpoint, distributed
from tests.chaos.kills import USER, state_of

LIMIT, NOTICED = 30.0, 0.1      # seconds: for the others to end; until torchrun has noticed that one has ended
CASES = {
    "two processes, own models, incremental": (2, USER | {"sharing": "models", "em": "incremental", "epochs": 4,
                                                          "variant": "monte-carlo", "draws": 2}),
    "three processes, shared trunk, sharded": (3, USER | {"epochs": 4, "shard": True}),
}


def job(folder: Path, name: str, options: dict):
    """The run as train.py's own command. It also keeps the last checkpoint before the finished one."""
    def joined(words) -> None:
        real = checkpoint.keep_newest
        checkpoint.keep_newest = lambda run, count: real(run, 2)
        with distributed.joined():
            train.run(train.TrainConfig(str(folder / "pairs.jsonl"), str(folder / "model"), str(folder / name),
                                        **tinyjob.small(save_minutes=0.0, **options)))

    return lambda rank: command(joined)


def killed(group: Group, victim: int, moment: float) -> tuple[bool, str | None]:
    """Kills process `victim` after `moment` seconds -> whether it had not ended before; what was not survived."""
    until = time.monotonic() + moment
    while group.left and time.monotonic() < until:
        group.poll()
        time.sleep(0.005)
    if not group.left:
        return False, None if not any(group.ended.values()) else f"ended with {group.ended}"
    group.kill(victim)
    time.sleep(NOTICED)
    group.poll()
    for rank in list(group.left.values()):
        group.kill(rank, signal.SIGTERM)
    began = time.monotonic()
    while group.left and time.monotonic() - began < LIMIT:
        group.poll()
        time.sleep(0.01)
    if group.left:
        group.wait(0)
        return True, f"processes were still there {LIMIT:.0f} s after process {victim} was killed"
    said = [line for line in group.printed() if "error: " in line or "Traceback" in line]
    return True, f"printed {said}" if len(said) > 1 or any("Traceback" in line for line in said) else None


def kills(count: int, number: int, report) -> None:
    """Kills processes until `count` kills are done. report(number of kills, failure or None) after each run."""
    rng, done, trial = random.Random(number), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder, wanted = Path(temporary), {}
        tinyjob.make_model(folder / "model")
        tinyjob.write(folder / "pairs.jsonl", tinyjob.make_records())
        for n, (name, (processes, options)) in enumerate(CASES.items()):
            began, group = time.monotonic(), Group(processes, job(folder, f"whole{n}", options), folder / f"{n}.txt")
            assert group.wait(300) == [0] * processes, f"{name}: failed: {group.printed()[-5:]}"
            wanted[name] = state_of(folder / f"whole{n}"), time.monotonic() - began
            assert any("optimizer." in key for key in wanted[name][0]), "no optimizer's state to compare"
        while done < count:
            for name, (processes, options) in CASES.items():
                trial += 1
                run, kills, again, wrong = folder / f"killed{trial}", 0, True, None
                began = time.monotonic()
                while again and wrong is None:
                    output = folder / f"killed{trial}-{kills}.txt"
                    group = Group(processes, job(folder, run.name, options), output)
                    moment = rng.uniform(0, 1.2 * wanted[name][1]) if kills < 6 else 600.0
                    again, wrong = killed(group, rng.randrange(processes), moment)
                    kills += again
                if not kills:                                               # moments are within the fastest run
                    wanted[name] = wanted[name][0], min(wanted[name][1], time.monotonic() - began)
                done += kills
                if wrong is None and state_of(run) != wanted[name][0]:
                    wrong = f"killed {kills} times, ended with other results"
                report(kills, wrong and f"{name}: {wrong}")
                shutil.rmtree(run, ignore_errors=True)
