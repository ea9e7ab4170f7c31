"""What users have chosen: comparisons in one SQLite file, and the posteriors over experts that follow from them.

A row is one comparison: its texts and log sigma(h_k) of its K margins (M4), under the run that computed them. The run's
fingerprint is a part of the key, so numbers of another run, or of the same run trained again, are never mixed in.

    log q_{u,k} = log w_k + sum_i log sigma(h_ik), normalised        (M11) i: the comparisons of user u

Each write is one transaction in SQLite's rollback mode, and `add` returns when it is on the disk: a process that is
killed loses nothing that was acknowledged and leaves nothing half written. Deleted texts are overwritten with zeros.
"""

import contextlib
import hashlib
import json
import math
import os
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from mixdpo.config import InputError
from mixdpo.files.atomic import KEY
from mixdpo.runs.checkpoint import checkpoints

VERSION = 1
TABLE = """CREATE TABLE IF NOT EXISTS comparisons (
    run TEXT NOT NULL, user TEXT NOT NULL, number INTEGER NOT NULL,
    prompt TEXT NOT NULL, chosen TEXT NOT NULL, rejected TEXT NOT NULL, log_likelihood TEXT NOT NULL,
    PRIMARY KEY (run, user, number)) WITHOUT ROWID"""
COUNT_USERS = """WITH RECURSIVE found(user) AS (
    SELECT min(user) FROM comparisons WHERE run = :run UNION ALL
    SELECT (SELECT min(user) FROM comparisons WHERE run = :run AND user > found.user) FROM found WHERE user IS NOT NULL)
    SELECT count(user) FROM found"""                    # count(DISTINCT user), a search a user instead of a read a row
PAGE = 4096                         # bytes of a page of the file
WAIT = 10.0                         # seconds that a write waits for another process


class NoRoom(Exception):
    """A limit of the file is reached. The message is a sentence that says which one, and what to do."""


@dataclass(frozen=True)
class Comparison:
    """One choice of a user."""

    prompt: str | list[dict]            # a text, or messages
    chosen: str
    rejected: str
    log_likelihood: tuple[float, ...]   # log sigma(h_k) of the K experts, nats


class Users:
    """The comparisons of all users under one run. Threads may share it, and processes may share the file.

    run: the run's fingerprint; K: experts. most_users and most_comparisons (of a user) count those of this run,
    most_bytes is the size of the file. Raises: InputError if the file is not of this program or cannot be opened.
    """

    def __init__(self, file: Path, run: str, K: int, most_users: int = 10_000, most_comparisons: int = 1000,
                 most_bytes: int = 2**30):
        self.run, self.K, self.most_users, self.most_comparisons = run, K, most_users, most_comparisons
        self.lock = threading.Lock()
        try:
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))          # a new file is for its owner alone
            self.db = sqlite3.connect(file, timeout=WAIT, isolation_level=None, check_same_thread=False)
            self.prepare(most_bytes)
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"cannot be used as the file of users ({error}); choose another place with --users FILE",
                             file=file) from None

    def prepare(self, most_bytes: int) -> None:
        """Sets the modes, and makes the table in a new file."""
        for pragma in ("journal_mode=DELETE", "synchronous=EXTRA", "secure_delete=ON", f"page_size={PAGE}",
                       f"max_page_count={most_bytes // PAGE}"):
            self.db.execute(f"PRAGMA {pragma}").fetchall()
        with self.transaction() as db:
            found = db.execute("PRAGMA user_version").fetchone()[0]
            tables = {name for name, in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if found != VERSION and (found or tables):
                raise sqlite3.DatabaseError("it is a database of another program or of another version")
            db.execute(TABLE)
            db.execute(f"PRAGMA user_version={VERSION}")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All statements within it have an effect, or none has. When it ends, they are on the disk."""
        with self.lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise

    def add(self, user: str, comparison: Comparison) -> int:
        """Stores a comparison -> how many the user has now. Raises: NoRoom."""
        assert len(comparison.log_likelihood) == self.K and all(map(math.isfinite, comparison.log_likelihood)), \
            f"got log sigma(h) {comparison.log_likelihood}, want {self.K} finite numbers"
        try:
            with self.transaction() as db:
                n = self.room(db, user)
                db.execute("INSERT INTO comparisons VALUES (?, ?, ?, ?, ?, ?, ?)", (
                    self.run, user, n, json.dumps(comparison.prompt), comparison.chosen, comparison.rejected,
                    json.dumps(comparison.log_likelihood)))
                return n + 1
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            raise NoRoom("the server's file of comparisons is full; delete users that are not needed") from None

    def room(self, db: sqlite3.Connection, user: str) -> int:
        """How many comparisons the user has. Raises: NoRoom if there is no place for one more."""
        n, = db.execute("SELECT count(*) FROM comparisons WHERE run = ? AND user = ?", (self.run, user)).fetchone()
        if n >= self.most_comparisons:
            raise NoRoom(f"the user {user} has {n} comparisons, which is the most; delete the user to start again")
        if n == 0:
            users, = db.execute(COUNT_USERS, {"run": self.run}).fetchone()
            if users >= self.most_users:
                raise NoRoom(f"the server has {users} users, which is the most; delete users that are not needed")
        return n

    def comparisons(self, user: str) -> list[Comparison]:
        """The user's comparisons, the oldest first."""
        with self.lock:
            rows = self.db.execute("SELECT prompt, chosen, rejected, log_likelihood FROM comparisons "
                                   "WHERE run = ? AND user = ? ORDER BY number", (self.run, user)).fetchall()
        return [Comparison(json.loads(prompt), chosen, rejected, tuple(json.loads(numbers)))
                for prompt, chosen, rejected, numbers in rows]

    def log_likelihood(self, user: str) -> torch.Tensor:
        """log sigma(h) of the user's n comparisons: (n,K) float64."""
        with self.lock:
            rows = self.db.execute("SELECT log_likelihood FROM comparisons WHERE run = ? AND user = ? ORDER BY number",
                                   (self.run, user)).fetchall()
        return torch.tensor([json.loads(numbers) for numbers, in rows], dtype=torch.float64).view(-1, self.K)

    def forget(self, user: str) -> int:
        """Deletes the user under every run -> how many comparisons there were."""
        with self.transaction() as db:
            return db.execute("DELETE FROM comparisons WHERE user = ?", (user,)).rowcount

    def close(self) -> None:
        with self.lock:
            self.db.close()


def as_record(user: str, comparison: Comparison) -> dict:
    """A comparison as a line of a preference file, which train.py reads (text/records.py)."""
    chosen, rejected = comparison.chosen, comparison.rejected
    if isinstance(comparison.prompt, str):
        return {"prompt": comparison.prompt, "chosen": chosen, "rejected": rejected, "user": user}
    answers = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {"prompt": comparison.prompt, **dict(zip(("chosen", "rejected"), answers)), "user": user}


# --- posteriors -------------------------------------------------------------------------------------------------------


def history(log_w: torch.Tensor, log_likelihood: torch.Tensor) -> torch.Tensor:
    """log q after 0, 1, .. n comparisons (M11): (K,), (n,K) -> (n+1,K) float64; the last row is the posterior."""
    evidence = torch.cat([log_likelihood.new_zeros(1, len(log_w)), log_likelihood.cumsum(0)])
    return torch.log_softmax(log_w.double() + evidence, dim=-1)


def mean_weights(run) -> torch.Tensor:
    """log w (K,) float64 of a run (load_run.Run) for a new user whose prompt is not known: fixed weights, or those of a
    user gate's generic user, or else the mean responsibilities of the training units, which a trained gate's mean
    weights equal at its optimum (M9). A private run has uniform weights in place of the last, which are computed from
    the data without noise."""
    gate = run.gate
    if gate.kind == "fixed":
        return torch.log_softmax(gate.log_w.detach().double().cpu(), dim=-1)
    if gate.kind == "user":
        return torch.log_softmax(gate.E[0].detach().double().cpu() / gate.temperature, dim=-1)
    if run.config.epsilon < math.inf:
        return torch.full((gate.K,), -math.log(gate.K), dtype=torch.float64)
    log_q = run.table[~run.table.isnan().any(1)].double().cpu()             # (G,K)
    return torch.log_softmax(log_q.logsumexp(0), dim=-1)


def fingerprint(run: Path) -> str:
    """A name for the numbers of the run in this folder: it differs if a weight or an option differs. It is the sha256
    that the newest checkpoint holds of itself. Raises: InputError if there is no checkpoint."""
    if not (found := checkpoints(run)):
        raise InputError("has no checkpoint; wanted a directory that train.py wrote", file=run)
    with safe_open(found[0], framework="pt") as file:
        sha256 = json.loads(file.metadata()[KEY])[0]
    return hashlib.sha256(sha256.encode()).hexdigest()[:32]
