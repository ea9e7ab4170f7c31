"""Comparisons of users: what was acknowledged is there, whole, under its own run; posteriors are M11's."""

import json
import math
import sqlite3
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from fakerun import make_tokenizer
from raising import raises_at

from mixdpo.mixture import e_step
from mixdpo.preferences import read_preferences
from mixdpo.serving.users import Comparison, NoRoom, Users, as_record, fingerprint, history, mean_weights


def comparison(n=0, prompt="p", log_likelihood=(-0.5, -1.5)):
    return Comparison(prompt, f"chosen {n}", f"rejected {n}", log_likelihood)


def open_users(folder, run="run-1", K=2, **limits):
    return Users(folder / "users.sqlite", run, K, **limits)


def test_comparisons_survive_and_keep_their_order(tmp_path):
    messages = [{"role": "user", "content": "grüße 🙂"}]
    given = [comparison(n, messages if n % 2 else "text", (-n / 7 - 0.1, -1e-9)) for n in range(5)]
    users = open_users(tmp_path)
    assert (tmp_path / "users.sqlite").stat().st_mode & 0o777 == 0o600
    assert [users.add("anna", each) for each in given] == [1, 2, 3, 4, 5] and users.add("bert", given[0]) == 1
    users.close()
    users = open_users(tmp_path)
    assert users.comparisons("anna") == given and users.comparisons("bert") == given[:1]
    assert users.log_likelihood("anna").tolist() == [[*each.log_likelihood] for each in given]
    assert users.comparisons("nobody") == [] and users.log_likelihood("nobody").shape == (0, 2)
    users.close()


def test_numbers_of_another_run_are_never_mixed_in(tmp_path):
    """Catches: a posterior under the margins of a run that was trained again."""
    first, second = open_users(tmp_path), open_users(tmp_path, "run-2", K=3)
    first.add("anna", comparison(1))
    assert second.comparisons("anna") == [] and second.log_likelihood("anna").shape == (0, 3)
    second.add("anna", comparison(2, log_likelihood=(-1.0, -2.0, -3.0)))
    assert first.comparisons("anna") == [comparison(1)] and second.log_likelihood("anna").tolist() == [[-1, -2, -3]]
    assert first.forget("anna") == 2 and second.comparisons("anna") == []   # a person, under every run
    first.close(), second.close()


def test_forgotten_texts_are_not_in_the_files(tmp_path):
    """Catches: a deletion that leaves the texts in free pages, or in a journal."""
    users = open_users(tmp_path)
    for n in range(30):
        users.add("anna", Comparison("p", f"SECRET{n}" * 300, "r", (-1.0, -1.0)))
        users.add("bert", comparison(n))
    assert b"SECRET7" in (tmp_path / "users.sqlite").read_bytes()
    assert users.forget("anna") == 30 and users.forget("anna") == 0
    assert not any(b"SECRET" in path.read_bytes() for path in tmp_path.iterdir())
    assert len(users.comparisons("bert")) == 30
    users.close()


def test_room_is_limited(tmp_path):
    users = open_users(tmp_path, most_users=2, most_comparisons=3)
    other = open_users(tmp_path, "run-2", most_users=2)
    for n in range(5):
        other.add(("x", "y")[n % 2], comparison(n))                         # another run's count for nothing
    for n in range(3):
        users.add("anna", comparison(n))
    for name, before in (("anna", 3), ("bert", 0), ("carl", None)):
        if before is not None and before < 3:
            users.add(name, comparison())
            continue
        with pytest.raises(NoRoom, match="2 users" if before is None else "3 comparisons"):
            users.add(name, comparison())
    users.forget("bert")
    assert users.add("carl", comparison()) == 1
    users.close(), other.close()


def test_a_full_file_refuses_and_stays_whole(tmp_path):
    """Catches: a file that grows until the disk is full; a row that is half there when it is."""
    users, added = open_users(tmp_path, most_bytes=64 * 4096), 0
    with pytest.raises(NoRoom, match="full"):
        for n in range(100):
            users.add("anna", Comparison("p", f"{n}" * 5000, "r", (-1.0, -1.0)))
            added += 1
    assert 10 < added == len(users.comparisons("anna")) and (tmp_path / "users.sqlite").stat().st_size <= 64 * 4096
    users.forget("anna")
    assert users.add("bert", Comparison("p", "x" * 5000, "r", (-1.0, -1.0))) == 1
    users.close()


def test_threads_share_the_file(tmp_path):
    """Catches: two comparisons with one number; a row that replaces another."""
    users, more = open_users(tmp_path), open_users(tmp_path)                # more: as of another process

    def work(n):
        for i in range(10):
            (users, more)[n % 2].add(("anna", "bert")[i % 2], comparison(100 * n + i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for m, name in enumerate(("anna", "bert")):
        texts = [each.chosen for each in more.comparisons(name)]
        assert sorted(texts) == sorted(f"chosen {100 * n + i}" for n in range(6) for i in range(m, 10, 2))
    users.close(), more.close()


def test_two_processes_take_turns(tmp_path):
    """Catches: a transaction that reads, finds that another one writes, and fails."""
    first, second = open_users(tmp_path), open_users(tmp_path)
    with first.transaction() as db:
        n = first.room(db, "anna")
        thread = threading.Thread(target=second.add, args=("anna", comparison(1)))
        thread.start()
        time.sleep(0.3)
        db.execute("INSERT INTO comparisons VALUES ('run-1', 'anna', ?, ?, 'chosen 0', 'rejected 0', '[-0.5, -1.5]')",
                   (n, '"p"'))
    thread.join()
    assert first.comparisons("anna") == [comparison(0), comparison(1)]
    first.close(), second.close()


def test_files_that_are_no_file_of_users_are_refused_and_unchanged(tmp_path):
    (tmp_path / "text").write_text("not a database, " * 100)
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE things (a)")
    with sqlite3.connect(tmp_path / "newer") as db:
        db.execute("PRAGMA user_version=99")
    for name in ("text", "other", "newer", "missing/users"):
        before = (tmp_path / name).read_bytes() if "/" not in name else b""
        with raises_at("--users", file=tmp_path / name):
            Users(tmp_path / name, "run", 2)
        assert "/" in name or (tmp_path / name).read_bytes() == before


def test_numbers_that_are_none_are_not_stored(tmp_path):
    users = open_users(tmp_path)
    for wrong in ((-1.0,), (-1.0, float("nan")), (-1.0, -float("inf"))):
        with pytest.raises(AssertionError):
            users.add("anna", comparison(log_likelihood=wrong))
    assert users.comparisons("anna") == []
    users.close()


def test_what_users_chose_is_a_file_of_preferences(tmp_path):
    """Catches: a download that train.py does not accept."""
    users, file = open_users(tmp_path), tmp_path / "prefs.jsonl"
    for n in range(3):
        users.add("anna", Comparison("Ein \u2028 Text\n", f"größer {n}", "kleiner", (-1.0, -1.0)))
    file.write_text("".join(json.dumps(as_record("anna", each)) + "\n" for each in users.comparisons("anna")))
    pairs = read_preferences(str(file), make_tokenizer(), 64, 64)
    assert [pair.user for pair in pairs] == ["anna"] * 3
    assert make_tokenizer().decode(pairs[2].chosen) == "größer 2<end>"
    chat = as_record("anna", Comparison([{"role": "user", "content": "x"}], "a", "b", (-1.0,)))
    assert chat["chosen"] == [{"role": "assistant", "content": "a"}] and chat["prompt"][0]["content"] == "x"
    users.close()


# --- posteriors


def test_the_history_is_the_posterior_after_each_comparison():
    """M11 by the E-step of mixture.py, for each number of comparisons."""
    generator = torch.Generator().manual_seed(0)
    log_w = torch.log_softmax(torch.randn(3, generator=generator), 0)
    h = 3 * torch.randn(6, 3, generator=generator, dtype=torch.float64)
    found = history(log_w, torch.nn.functional.logsigmoid(h))
    assert found.shape == (7, 3) and torch.allclose(found[0], log_w.double(), atol=1e-6)
    for n in range(1, 7):
        wanted = e_step(log_w.double().expand(n, -1), h[:n], torch.zeros(n, dtype=torch.int64))[1][0]
        assert torch.allclose(found[n], wanted, atol=1e-12)
    extreme = history(log_w, torch.full((1000, 3), -500.0))                 # sums beyond float32's exponent
    assert torch.allclose(extreme[-1], log_w.double(), atol=1e-6)


def test_weights_without_a_prompt():
    """Fault: the mean responsibilities of a private run, which are computed from its data without noise."""
    table = torch.tensor([[0.9, 0.1], [0.5, 0.5], [float("nan")] * 2]).log()
    def gate(kind, epsilon=math.inf, **fields):
        return SimpleNamespace(gate=SimpleNamespace(kind=kind, K=2, temperature=1.0, **fields), table=table,
                               config=SimpleNamespace(epsilon=epsilon))

    def weights(run):
        return mean_weights(run).exp().tolist()

    assert weights(gate("fixed", log_w=torch.tensor([0.2, 0.8]).log())) == pytest.approx([0.2, 0.8])
    assert weights(gate("user", E=torch.tensor([[1.0, 0.0], [5.0, 5.0]]))) == pytest.approx(
        torch.softmax(torch.tensor([1.0, 0.0]), 0).tolist())
    for kind in ("linear", "mlp", "prompt-user", "random", "domain"):
        assert weights(gate(kind)) == pytest.approx([0.7, 0.3])
    for kind in ("linear", "mlp", "random"):
        assert weights(gate(kind, epsilon=8.0)) == pytest.approx([0.5, 0.5])


def test_the_fingerprint_is_of_the_weights_and_the_options(tmp_path):
    from mixdpo.files.atomic import write_tensors

    found = []
    for name, value, facts in (("a", 1.0, {"step": 1}), ("b", 1.0, {"step": 1}), ("c", 2.0, {"step": 1}),
                               ("d", 1.0, {"step": 2})):
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        write_tensors(tmp_path / name / "checkpoint/00000001.safetensors", {"w": torch.tensor([value])}, facts)
        found.append(fingerprint(tmp_path / name))
    assert found[0] == found[1] and len({*found}) == 3
    with raises_at(file=tmp_path):
        fingerprint(tmp_path)
