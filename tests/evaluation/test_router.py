"""The client in docs/serving.md, executed as it stands there: its weights are the gate's, its posteriors the run's
table, its draws follow them, and its requests name the expert that was drawn. Each docstring names the faults that the
test was seen to fail on.
"""

import http.server
import json
import math
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mixdpo.evaluation.router import write_router
from mixdpo.gates import KINDS, READS_PROMPT, Gate
from mixdpo.plan import make_plan
from mixdpo.preferences import Pair
from mixdpo.runs.gate_inputs import gate_inputs, known_pairs
from mixdpo.runs.load_run import Run
from train import TrainConfig

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text().partition("### The client")[2]
CLIENT, READER = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
K, D = 3, 7
USERS = ["anna", "bob", "zoë", "dan"]


def client():
    """The names that the client's file defines."""
    names = {"__name__": "client"}
    exec(compile(CLIENT, "docs/serving.md", "exec"), names)
    return names


def run_of(kind, folder, latent="pair", epsilon=math.inf):
    """(a run whose gate has parameters far from their start, features of its eight pairs' prompts (8,D))."""
    rng = np.random.default_rng(3)
    pairs = [Pair([1], [2, 0], [3, 0], user=USERS[n % 4], domain="fbh"[n % 3], line=n) for n in range(8)]
    config = TrainConfig(data="", model="m", out="", experts=K, latent=latent, gate=kind, gate_features="mean",
                         weights="0.6,0.3,0.1" if kind == "fixed" else "uniform", epsilon=epsilon, max_prompt=21)
    plan, features = make_plan(pairs, config), torch.from_numpy(rng.normal(2, 3, (8, D))).float()
    inputs = gate_inputs(kind, pairs, features, known_pairs(plan))
    gate = Gate(kind, K, inputs, torch.tensor([0.6, 0.3, 0.1]).log(), unit_rows=epsilon < math.inf)
    with torch.no_grad():
        for p in gate.parameters():
            p.add_(torch.from_numpy(rng.normal(size=p.shape)).float())
    table = torch.log_softmax(torch.from_numpy(rng.normal(0, 3, (len(plan.units), K))).float(), 1)
    return Run("run", config, None, gate, plan, table, folder), features


def router(run, folder, ports=(8000,) * K, start=1):
    write_router(run, folder, list(ports), start)
    return client()["Router"](folder)


def weights_of(run, pair, features):
    """w (K,) by the gate itself."""
    inputs = gate_inputs(run.gate.kind, [pair], features[None], known_pairs(run.plan))
    with torch.no_grad():
        return run.gate(inputs)[0].exp().double().numpy()


@pytest.mark.parametrize("epsilon", [math.inf, 8.0], ids=["", "private"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_clients_weights_are_the_gates(kind, epsilon, tmp_path):
    """Of known and unknown users, domains and prompts, to 1e-6. Faults: a linear gate without its scale, or with the
    scale of the features' length; the gelu of tanh; no bias; the generic user's row for a known one, the first user's
    row for an unknown one; features that a private gate scales left as they are; a domain unknown read as the first."""
    if epsilon < math.inf and kind not in ("fixed", "linear", "mlp", "random"):
        pytest.skip("a private run has no such gate")
    run, features = run_of(kind, tmp_path, epsilon=epsilon)
    served = router(run, tmp_path)
    assert served.facts["gate"] == kind and served.facts["features"] == ("mean" if kind in READS_PROMPT else None)
    assert served.facts["prompt"] == {"tokens": 21, "start": 1}
    seen = []
    for n in range(8):
        for user, domain in ((USERS[n % 4], "fbh"[n % 3]), ("eve", "x"), (None, None)):
            pair = Pair([1], [2, 0], [3, 0], user=user, domain=domain)
            got = served.weights(domain if kind == "domain" else user, features[n].numpy())
            np.testing.assert_allclose(got, weights_of(run, pair, features[n]), atol=1e-6)
            assert got.sum() == pytest.approx(1, abs=1e-12)
            seen.append(tuple(got))
    assert len(set(seen)) >= {"fixed": 1, "domain": 4, "user": 5}.get(kind, 8)          # the comparison says something
    assert served.facts["users"] == []                                      # each pair has a type of its own


@pytest.mark.parametrize("kind", ["fixed", "user"])
def test_known_users_have_their_posterior(kind, tmp_path):
    """The row of the run's table (M11), to 1e-6, by name; others the gate's weights. Faults: rows by number, not by
    name; the gate's weights for a known user; a user that no step drew served by NaN."""
    run, features = run_of(kind, tmp_path, latent="user")
    run.table[2] = math.nan
    served, tensors = router(run, tmp_path), load_file(tmp_path / "router.safetensors")
    assert served.facts["users"] == ["anna", "bob", "dan"]
    assert np.array_equal(tensors["posterior"], run.table[[0, 1, 3]].numpy())
    for n, user in ((0, "anna"), (1, "bob"), (3, "dan")):
        np.testing.assert_allclose(served.weights(user), run.table[n].exp().numpy(), atol=1e-6)
    for user in ("zoë", "eve", None):
        want = weights_of(run, Pair([1], [2, 0], [3, 0], user=user), features[0])
        np.testing.assert_allclose(served.weights(user), want, atol=1e-6)


def test_a_private_run_names_nobody(tmp_path):
    """Its responsibilities are computed without noise. Fault: users' posteriors written."""
    run, _ = run_of("fixed", tmp_path, latent="user", epsilon=8.0)
    served = router(run, tmp_path)
    assert served.facts["users"] == [] and set(served.tensors) == {"b"}
    assert not any(user in path.read_text(errors="replace") for user in USERS for path in tmp_path.iterdir())


@pytest.mark.parametrize("name, where", [(None, "w"), ("bob", "q")])
def test_draws_follow_the_weights(name, where, tmp_path, monkeypatch):
    """10,000 seeds: chi-square of the named experts against w, with two degrees of freedom, is below 27.6 (probability
    1e-6). Faults: uniform draws; the most likely expert; the weights of another user; the name of the next expert."""
    run, _ = run_of("fixed", tmp_path, latent="user")
    served, names = router(run, tmp_path), []

    class Answer:
        def read(self):
            return b'{"choices": [{"text": ""}]}'

    def urlopen(request):
        names.append(json.loads(request.data)["model"])
        return Answer()

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    drawn = [served.complete("x", seed, name)[0] for seed in range(10_000)]
    assert names == [f"expert-{k}" for k in drawn]
    want = 10_000 * (run.table[1] if where == "q" else run.gate.log_w).exp().double().numpy()
    chi = float(((np.bincount(drawn, minlength=K) - want) ** 2 / want).sum())
    assert chi < 27.6, f"chi-square {chi:.1f}: drawn {np.bincount(drawn, minlength=K)}, want {want}"


def test_the_request_reaches_the_server_of_its_expert(tmp_path):
    """Over HTTP, one port an expert. Faults: the first port for all; the seed left out; no content type, without which
    a server reads a form; another temperature than 1 unless asked."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.server.server_port, self.path, self.headers["Content-Type"], body))
            answer = json.dumps({"choices": [{"text": f"by {body['model']}"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(K)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        ports = [server.server_port for server in servers]
        served = router(run_of("fixed", tmp_path)[0], tmp_path, ports)
        for seed in range(20):
            k, text = served.complete("Thé film", seed, max_tokens=5)
            assert text == f"by expert-{k}" and seen[-1] == (
                ports[k], "/v1/completions", "application/json",
                {"model": f"expert-{k}", "prompt": "Thé film", "seed": seed, "temperature": 1.0, "max_tokens": 5})
        served.complete("x", 0, temperature=0.5)
        assert seen[-1][3]["temperature"] == 0.5 and len({port for port, *_ in seen}) > 1
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def test_the_client_is_short_and_needs_two_packages():
    """Catches: a client that has grown, or that needs torch for weights that need no model."""
    assert len(CLIENT.splitlines()) <= 40
    packages = {line.split()[1] for line in CLIENT.splitlines() if line.startswith("from ")}
    assert packages == {"pathlib", "safetensors.numpy"}
    assert {line for line in CLIENT.splitlines() if line.startswith("import ")} == {
        "import json, math, sys, urllib.request", "import numpy as np"}
