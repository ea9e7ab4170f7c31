"""--log beside the packages themselves: what TensorBoard's reader, the file of Weights & Biases and trackio's database
hold is what metrics.jsonl says. Each docstring names the faults that its test was seen to fail on."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tinyjob

import train
from mixdpo.runs.loggers import COVERED, NAMES

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, tinyjob
from pathlib import Path
from mixdpo.config import Stopped
from mixdpo.runs import checkpoint
after, stop = checkpoint.Saver.after, int(sys.argv[1])

def stopping(self, t, *rest):
    if t % 2 == 0:
        self.save(t, *rest[1]())
    if t == stop:
        rest[1]()                                                           # all lines are on the disk
        raise Stopped("here")

checkpoint.Saver.after = stopping
folder, model, options = sys.argv[2:]
tinyjob.run(Path(folder), Path(model), tinyjob.make_records(each=6), **eval(options))
"""


def trained(tmp_path, model_dir, log, stop=0, **options):
    """Runs a job of 5 steps in a process of its own, which saves after each second step, and stops after step `stop`;
    nothing leaves this machine. -> the run's lines of metrics.jsonl."""
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1",
                                "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    words = [sys.executable, "-c", PROGRAM, str(stop), str(tmp_path), str(model_dir), repr({"log": log, **options})]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (stop == 0), done.stdout + done.stderr
    assert stop == 0 or "Stopped: here" in done.stderr, done.stderr
    return tinyjob.lines(tmp_path / "run" / "metrics.jsonl")


def of_tensorboard(tmp_path):
    """{(name, step): value} by TensorBoard's own reader; a step that is shown twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    reader.Reload()
    found = [((name, point.step), point.value) for name in reader.Tags()["scalars"] for point in reader.Scalars(name)]
    assert len(dict(found)) == len(found), "a step is shown twice"
    return dict(found)


def of_wandb(tmp_path):
    """{(name, step): value} from the file that an offline run leaves: records in blocks of 32 KiB (the format of
    LevelDB's log), each a message of wandb's own schema. Output of the console is an error."""
    from wandb.proto import wandb_internal_pb2

    path, = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    data, place, record, found = path.read_bytes(), 7, b"", {}
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        record, place = record + data[place + 7 : place + 7 + size], place + 7 + size
        if kind in (1, 4):                                                  # the last part of a record
            message = wandb_internal_pb2.Record.FromString(record)
            assert message.WhichOneof("record_type") not in ("output", "output_raw")
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in message.history.item}
            found |= {(name, row["_step"]): value for name, value in row.items() if not name.startswith("_")}
            record = b""
    return found


def of_trackio(tmp_path):
    """{(name, step): value} from trackio's database; a step that is there twice is an error, a second run too."""
    code = """
import json
from trackio.sqlite_storage import SQLiteStorage
run, = SQLiteStorage.get_runs("mixdpo")
print(json.dumps(SQLiteStorage.get_logs("mixdpo", run)))
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    rows = json.loads(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                                     check=True).stdout)
    assert len({row["step"] for row in rows}) == len(rows), "a step is there twice"
    return {(name, row["step"]): value for row in rows for name, value in row.items()
            if name not in ("step", "timestamp")}


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "trackio": of_trackio}


@pytest.fixture(params=READERS)
def log(request):
    return pytest.importorskip(request.param, reason=f"{request.param} is not installed (extra `log`)").__name__


def wanted(lines, names=tuple(NAMES)):
    """What a reader must find; TensorBoard keeps float32."""
    return {(name, line["step"]): float(np.float32(line[NAMES[name]])) for line in lines for name in names}


def test_each_figure_is_that_of_the_line(log, tmp_path, model_dir):
    """Catches: a step counted from 0; not seen to fail on: the last steps lost in a queue; output of the
    console that is sent, too."""
    lines = trained(tmp_path, model_dir, log)
    got = READERS[log](tmp_path)
    assert {key: float(np.float32(value)) for key, value in got.items()} == wanted(lines) and len(lines) == 5
    assert train.TrainConfig("", "", "").log == ""


def test_a_resumed_run_continues_its_curves(log, tmp_path, model_dir):
    """Stopped after step 3, with its checkpoint after step 2: step 3 is made again. Catches: a step that is shown
    twice; a second run; a curve that begins at the resume."""
    if log == "wandb":
        pytest.skip("wandb resumes on its server only")
    trained(tmp_path, model_dir, log, stop=3)
    lines = trained(tmp_path, model_dir, log)
    got = READERS[log](tmp_path)
    assert {key: float(np.float32(value)) for key, value in got.items()} == wanted(lines) and len(lines) == 5


def test_a_private_run_shows_only_what_is_covered(log, tmp_path, model_dir):
    """What it is for: the loss, or anything else that is computed from the data without noise, is not there."""
    lines = trained(tmp_path, model_dir, log, epsilon=8.0, batch=6)
    got = READERS[log](tmp_path)
    assert {key: float(np.float32(value)) for key, value in got.items()} == wanted(lines, COVERED) and len(lines) == 6


def test_a_new_run_in_an_old_folder_is_another(tmp_path, model_dir):
    """What it is for: a new run does not continue the old one's curves in trackio."""
    pytest.importorskip("trackio", reason="trackio is not installed (extra `log`)")
    first = trained(tmp_path, model_dir, "trackio")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    assert trained(tmp_path, model_dir, "trackio", seed=1) != first
    code = 'from trackio.sqlite_storage import SQLiteStorage\nprint(len(SQLiteStorage.get_runs("mixdpo")))'
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout == "2\n"
