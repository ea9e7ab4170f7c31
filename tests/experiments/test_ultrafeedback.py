"""data/ultrafeedback.py, its committed sample, and the download of a hub's files, from a server on this machine. What
each test catches stands in its docstring."""

import hashlib
import http.server
import json
import threading
from collections import Counter

import pytest
import tinyjob
from raising import raises_at

from data import ultrafeedback
from data.experiment import judged
from data.experiment.presets import ULTRAFEEDBACK
from data.sample import make
from data.ultrafeedback import TYPES, item_of, load
from mixdpo.config import InputError
from mixdpo.files import fetch


def completion(text, *ratings):
    return {"response": text, "annotations": {kind: {"Rating": r} for kind, r in zip(TYPES, ratings)}}


def test_a_type_goes_by_its_rating():
    """Catches: ratings compared as strings, one type's rating for another's, ties always to the first, a missing rating
    taken for the lowest, a coin that another run throws otherwise."""
    two = [completion("a", "5", "1", "3", "3"), completion("b", "1", "10", "3", "4")]
    counts, firsts, others, first = Counter(), Counter(), Counter(), Counter()
    for number in range(200):
        item = item_of({"instruction": "do", "completions": two}, 0, number, counts)
        assert item == item_of({"instruction": "do", "completions": two}, 0, number, Counter())
        assert item.prefers.keys() == {*TYPES} and item.messages == [{"role": "user", "content": "do"}]
        assert (item.answers[item.prefers["helpfulness"]], item.answers[item.prefers["honesty"]]) == ("a", "b")
        assert item.answers[item.prefers["truthfulness"]] == "b" and item.conflict
        assert item.answers == ("b", "a"), "4.5 against 3 in the mean"
        firsts[item.prefers["instruction_following"]] += 1
    assert 70 < firsts[0] < 130 and {k: n for k, n in counts.items() if n} == {"ties": 200}
    five = [completion("c", "N/A", "9", "9", "9"), *two, completion("d", "5", "1", "3", "2"),
            completion("e", "4", "4", "5", "5")]
    for number in range(200):
        item = item_of({"instruction": "do", "completions": five}, 0, number, others)
        first[item.answers[0]] += 1
        others[item.answers[1]] += 1
    assert 70 < first["b"] < 130 and first["b"] + first["e"] == 200, "equally good"
    assert others["c"] == 0 and others["completions without all ratings"] == 200
    assert min(others["a"], others["d"]) > 40 and others["b"] + others["e"] > 40, "any of the others"
    assert item_of({"instruction": " ", "completions": two}, 0, 0, counts) is None
    assert item_of({"instruction": "do", "completions": two[:1]}, 0, 0, counts) is None
    assert counts["fewer than two rated completions, or no instruction"] == 2


def test_the_sample_is_what_its_script_makes():
    """Catches: a sample edited by hand, ratings that do not part."""
    assert [json.loads(line) for line in make.FILE.read_text().splitlines()] == list(make.rows())
    items, facts = load(str(make.FILE.parent), {"seed": 0})
    assert len(items) == make.ROWS and facts["source"] == ["ultrafeedback.jsonl"]
    assert 0.7 < sum(i.conflict for i in items) / len(items) < 0.95


def test_a_damaged_line_is_named(tmp_path):
    """Catches: a line passed over in silence."""
    good = make.FILE.read_text().splitlines()[0]
    for bad in ("{", '{"instruction": "x"}', '[]', good.replace('"Rating": "', '"Rating": "x')):
        (tmp_path / "flan.jsonl").write_text(f"{good}\n{bad}\n")
        with raises_at(file=tmp_path / "flan.jsonl", line=2):
            load(str(tmp_path), {"seed": 0})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine: resolve/main/FILE redirects to blob/FILE, and names the blob's size and sum."""
    body = make.FILE.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self):
            self.server.seen.append(f"{self.command} {self.path}")
            resolve = self.path.startswith(f"/datasets/{ultrafeedback.REPOSITORY}/resolve/main/")
            if not resolve and not self.path.startswith("/blob/"):
                return self.send_error(404)
            self.send_response(302 if resolve else 200)
            if resolve and self.server.names:
                self.send_header("X-Linked-Size", str(len(body)))
                self.send_header("X-Linked-Etag", f'"{hashlib.sha256(body).hexdigest()}"')
            if resolve:
                self.send_header("Location", "/blob/" + self.path.rpartition("/")[2])
            self.send_header("Content-Length", "0" if resolve else str(len(body)))
            self.end_headers()
            if self.command == "GET" and not resolve:
                self.wfile.write(body[:-1] + b"?" if self.server.alters else body)

        do_GET = do_HEAD = answer

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.names, server.alters = [], True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "HUB", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()


def test_files_come_from_the_hub_once(hub, tmp_path):
    """Catches: a sum asked of where the redirect leads, a file fetched again, one of the six left out."""
    items, facts = load(None, {"seed": 0})
    assert facts["source"] == [*ultrafeedback.FILES] and len(items) == 6 * make.ROWS
    assert len(hub.seen) == 6 * 3 and hub.seen[0].startswith("HEAD /datasets/openbmb/UltraFeedback/resolve/main/evol")
    load(None, {"seed": 0})
    assert len(hub.seen) == 6 * 3
    (tmp_path / "cache" / "openbmb--UltraFeedback" / "flan.jsonl").write_text("altered")
    load(None, {"seed": 0})
    assert len(hub.seen) == 6 * 3 + 3


def test_an_altered_file_or_a_hub_that_names_no_sum(hub, tmp_path):
    """Catches: a transfer that is used although its sum is another; a file that nobody can check."""
    hub.alters = True
    with raises_at("altered", file="evol_instruct.jsonl"):
        load(None, {"seed": 0})
    hub.names = False
    with pytest.raises(InputError) as error:
        load(None, {"seed": 0})
    assert error.value.file.endswith("/evol_instruct.jsonl") and "X-Linked-Size" in error.value.message
    assert not (tmp_path / "cache" / "openbmb--UltraFeedback" / "evol_instruct.jsonl").exists()


def test_a_whole_tiny_job_of_four_types(tmp_path, monkeypatch):
    """Catches: fewer experts than types, conflicts alone that are not alone, a table without a type."""
    special = ("<|im_end|>", "<|im_start|>")
    model = tinyjob.make_model(tmp_path / "model", context=256, special=special)
    small = {"users": 1, "max_prompt": 128, "train": {"epochs": 1, "batch": 8, "micro": 8, "dtype": "float32"}}
    runs = {name: ULTRAFEEDBACK["smoke"]["runs"][name] for name in ("dpo", "mixture")}
    monkeypatch.setitem(ULTRAFEEDBACK, "tiny", ULTRAFEEDBACK["smoke"] | small | {"runs": runs, "max_response": 60})
    words = f"--preset tiny --model {model} --out {tmp_path / 'job'} --data-folder {make.FILE.parent}".split()
    judged.main(ultrafeedback.DATASET, [*words, "--conflicts", "true"])
    results = json.loads((tmp_path / "job" / "results.json").read_text())["preferences"]
    facts = json.loads((tmp_path / "job" / "dataset.json").read_text())
    assert results["mixture"]["experts"] == 4 and set(results["dpo"]["types"]) == {*TYPES}
    assert results["dpo"]["conflicts"]["n"] == 24, "every held-out pair is a conflict"
    assert all(part["conflicts"] == part["items"] for part in facts["parts"].values())
    assert facts["left_out"]["all types agree"] > 0
    head = "| run | helpfulness | honesty | instruction_following | truthfulness | worst type | greatest regret |"
    assert head in (tmp_path / "job" / "report.md").read_text()
