"""eval.py end to end on a tiny job folder, its figures done again by hand.
Docstrings name the faults that each test was seen to fail on."""

import json
import math
import sys
import types

import brute
import numpy as np
import pytest
import tinyjob
import torch

import eval as evaluation
import train
from data.report.job import read_job
from eval import EvalConfig, evaluate
from mixdpo.config import InputError
from mixdpo.evaluation import inputs
from mixdpo.evaluation.completions import CompletionTask, policy_rows
from mixdpo.evaluation.generate import Sampling
from mixdpo.files.atomic import read_tensors, write_tensors
from mixdpo.models.weights import load_model
from mixdpo.preferences import Pair
from mixdpo.runs.checkpoint import checkpoints
from mixdpo.runs.load_run import load_run
from mixdpo.text.tokenizer import load_tokenizer

MAX_NEW, PROMPTS = 6, ["mn", "o", "pmno", "nn", "po", "mmm", "opn"]


def score(texts, names, folder):
    """first: share of a..m; second: length, of the whole text."""
    of = {"first": lambda t: sum(c in "abcdefghijklm" for c in t) / len(t), "second": lambda t: len(t) / 100}
    return {name: [of[name](text) for text in texts] for name in names}


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """A job folder with three runs, evaluated: (folder, results, model directory)."""
    folder = tmp_path_factory.mktemp("job")
    model = tinyjob.make_model(folder / "reference")
    records = tinyjob.make_records(users=6, each=4)
    tinyjob.write(folder / "train.jsonl", records)
    held = tinyjob.make_records(users=8, each=2, seed=5)                    # u6 and u7 are new
    for record, scores in zip(held, ([[1, 0], [0, 1]], [[1, 0], [1, 0]], [[0, 0], [1, 0]])):
        record["scores"] = dict(zip(("first", "second"), scores))
    for n, record in enumerate(held):
        record["prompt"] = held[n % 6]["prompt"]                            # users share prompts, of one type too
    tinyjob.write(folder / "heldout.jsonl", held)
    tinyjob.write(folder / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    dataset = {"rewards": ["first", "second"], "annotators": ["second"], "max_new": MAX_NEW}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    common = dict(model=str(model), data=str(folder / "train.jsonl"), beta=0.5, epochs=3)
    runs = {
        "dpo": dict(experts=1),
        "mix-pair": dict(rank=0, weights="0.3,0.7", start_steps=5),
        "mix-user": dict(latent="user", sharing="models", start="linear", start_steps=5),
    }
    for name, options in runs.items():
        train.run(train.TrainConfig(out=str(folder / name), **common | tinyjob.small(**options)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "data.annotators.rewards", types.SimpleNamespace(score=score))
        patch.setattr(evaluation, "write_report", lambda home: None)
        results = evaluate(EvalConfig(dir=str(folder), batch=3))
    return folder, results, model


def slow_logp(model, head, prompt, response, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response]))[0] @ head.T / temperature
        logps = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return logps[torch.arange(len(response)), torch.tensor(response)].sum().item()


def slow_ratios(run, reference, prompt, response):
    """log pi_k - log pi_ref of one response, for every expert k."""
    base = slow_logp(reference, reference.unembedding, prompt, response)
    return [slow_logp(*run.experts.policy(k), prompt, response) - base for k in range(run.config.experts)]


def slow_se(values, prompts, users=None):
    """Prompt by prompt: the sum of its residuals, squared. With users two-way: V_prompts + V_users - V_both, no less
    than either."""
    def variance(names):
        sums = {p: sum(v - np.mean(values) for v, q in zip(values, names) if q == p) for p in names}
        return len(sums) / (len(sums) - 1) * sum(s**2 for s in sums.values()) / len(values) ** 2

    if users is None:
        return math.sqrt(variance(prompts))
    one, other = variance(prompts), variance(users)
    return math.sqrt(max(one, other, one + other - variance(list(zip(prompts, users)))))


def slow_heldout(job, name):
    """Everything about a run's held-out pairs in plain numbers: records, h (P,K), w (K,), table of q (G,K)."""
    folder, _, model = job
    run, reference, tokenizer = load_run(folder / name, "cpu", ""), load_model(model), load_tokenizer(model)
    records, h = tinyjob.lines(folder / "heldout.jsonl"), []
    for r in records:
        prompt = tokenizer.encode(r["prompt"])
        chosen, rejected = (tokenizer.encode(r[side]) + [tokenizer.eos] for side in ("chosen", "rejected"))
        ratios = zip(slow_ratios(run, reference, prompt, chosen), slow_ratios(run, reference, prompt, rejected))
        h.append([run.config.beta * (a - b) for a, b in ratios])
    return records, np.array(h), run.gate.log_w.exp().tolist(), run.table.exp().numpy()


def test_one_head_on_a_frozen_trunk_is_evaluated_and_exported(job, tmp_path, monkeypatch):
    """--experts 1 --train-trunk false, by hand. Faults: the trunk's unembedding for the head's, in margins, samples,
    KL or the exported model; a head that never learnt."""
    folder, _, model = job
    for name in ("heldout.jsonl", "prompts.jsonl", "dataset.json", "train.jsonl"):
        (tmp_path / name).write_text((folder / name).read_text())
    options = dict(experts=1, train_trunk=False, head_lr=0.1, beta=0.5, epochs=3)
    out = tinyjob.run(tmp_path, model, None, name="head", data=str(tmp_path / "train.jsonl"), **options)
    monkeypatch.setitem(sys.modules, "data.annotators.rewards", types.SimpleNamespace(score=score))
    monkeypatch.setattr(evaluation, "write_report", lambda home: None)
    got = evaluate(EvalConfig(dir=str(tmp_path)))["preferences"]["head"]
    h = slow_heldout((tmp_path, None, model), "head")[1][:, 0]
    assert abs(h).max() > 0.1
    assert got["by_pair"] == pytest.approx((-np.log1p(np.exp(-h))).tolist(), abs=1e-5)
    run, base, tokenizer = load_run(out, "cpu", ""), load_model(model), load_tokenizer(model)
    prompts = [Pair(tokenizer.encode(p), [], []) for p in PROMPTS]
    task = CompletionTask(base, prompts, Sampling(MAX_NEW, tokenizer.eos, seed=1, batch=128))
    row = policy_rows([run], task)["head"]
    kl = [slow_ratios(run, base, pair.prompt, ids)[0] for pair, ids in zip(prompts, row["ids"])]
    assert row["kl"].tolist() == pytest.approx(kl, abs=1e-4) and max(map(abs, kl)) > 1e-2
    evaluation.main([str(out), "--export", str(tmp_path / "export")])
    exported, (trunk, head) = load_model(tmp_path / "export" / "expert-0"), run.experts.policy(0)
    want = slow_logp(trunk, head, prompts[2].prompt, [97, 98])
    assert slow_logp(exported, exported.unembedding, prompts[2].prompt, [97, 98]) == pytest.approx(want)


@pytest.mark.parametrize("name", ["dpo", "mix-pair", "mix-user"])
def test_heldout_figures_by_hand(job, name):
    """Faults: margins against another reference; M5 under uniform w; a tie for a win; each user's own weights not used,
    or those of another user; pairs to compare runs by under other weights; accuracy of an annotator on all pairs; the
    gap with its sign turned; pairs of one prompt counted as independent, or prompts distinguished by their first token;
    own - other of another annotator; a type's standard errors without clusters; figures under users' own weights whose
    errors count prompts alone."""
    records, h, w, table = slow_heldout(job, name)
    got, users = job[1]["preferences"][name], [f"u{n}" for n in range(6)]   # in the training file's order
    own = [table[users.index(r["user"])].tolist() if name == "mix-user" and r["user"] in users else w for r in records]
    p, p_own = np.array(brute.marginal(w, h)), np.array(brute.marginal(own, h))
    assert (abs(h) > 0.01).any(), "the runs moved nowhere: nothing is compared"
    prompts, by_user = [r["prompt"] for r in records], [r["user"] for r in records]
    figures = {"accuracy_mbt": p > 0.5, "accuracy_own": p_own > 0.5,
               "log_likelihood": np.log(p), "log_likelihood_own": np.log(p_own)}
    for key, values in figures.items():
        assert got[key]["mean"] == pytest.approx(values.mean(), abs=1e-5), key
        se = slow_se(values, prompts, by_user if key.endswith("own") else None)
        assert got[key]["se"] == pytest.approx(se, abs=1e-5), key
        assert got[key]["n"] == 16, key
    assert got["prompts"] == len(set(prompts)) < 16
    assert got["by_pair"] == pytest.approx(np.log(p).tolist(), abs=1e-5)
    assert [got["prompt_of_pair"].index(n) for n in got["prompt_of_pair"]] == [prompts.index(q) for q in prompts]
    gap = [brute.kl(q, posterior) for q, posterior in zip(own, brute.posterior(own, h))]
    assert got["elbo_gap"]["mean"] == pytest.approx(np.mean(gap), abs=1e-5)
    assert got["elbo_gap"]["se"] == pytest.approx(slow_se(gap, prompts, by_user), abs=1e-5)
    for kind in ("first", "second"):
        mask = [r["annotator"] == kind for r in records]
        assert [a["mean"] for a in got["accuracy"][kind]] == pytest.approx((h[mask] > 0).mean(0).tolist()), kind
        of_kind = [q for q, keep in zip(prompts, mask) if keep]
        se = [slow_se(column, of_kind) for column in (h[mask] > 0).T]
        assert [a["se"] for a in got["accuracy"][kind]] == pytest.approx(se, abs=1e-5)
        users_of_kind = [u for u, keep in zip(by_user, mask) if keep]
        for what, values in (("accuracy", p_own > 0.5), ("log_likelihood", np.log(p_own))):
            found = got["types"][kind][what]
            assert found["mean"] == pytest.approx(values[mask].mean(), abs=1e-5)
            assert found["se"] == pytest.approx(slow_se(values[mask], of_kind, users_of_kind), abs=1e-5), what
        expert = 0 if name == "dpo" else got["own"].index(kind)
        found, right = got["types"][kind]["own_expert"], (h[mask] > 0)[:, expert]
        assert (found["mean"], found["se"]) == pytest.approx((right.mean(), slow_se(right, of_kind)), abs=1e-5)
        for k in np.flatnonzero([own == kind for own in got["own"]]):
            difference = (h[mask, k] > 0).mean() - (h[~np.array(mask), k] > 0).mean()
            assert got["own_other"][k]["mean"] == pytest.approx(difference)
    assert got["own"] == ([None] if name == "dpo" else [got["alignment_train"]["naming"][k] for k in "01"])
    assert [gap is None for gap in got["own_other"]] == [own is None for own in got["own"]]
    assert [a["mean"] for a in got["accuracy_all"]] == pytest.approx((h > 0).mean(0).tolist())
    assert got["weights"] == pytest.approx(w)
    if name == "mix-user":
        assert np.abs(np.array(own) - w).max() > 0.2 and not np.allclose(p, p_own)


def test_alignment_by_hand_and_beside_the_bayes_values(job):
    """Faults: truth from another unit; the Bayes value of single pairs for users;
    scores of the model for those of the annotators."""
    records, h, w, table = slow_heldout(job, "mix-user")
    train_side, held_side = (job[1]["preferences"]["mix-user"][f"alignment_{side}"] for side in ("train", "heldout"))
    truth = [n % 2 for n in range(6)]
    found = table.argmax(1).tolist()
    assert train_side["ari"] == pytest.approx(brute.adjusted_rand(found, truth))
    assert train_side["matched"] == pytest.approx(brute.best_matching(found, truth, 2))
    assert train_side["units"] == 6 and train_side["bayes_matched"] == train_side["bayes_ari"] == 1.0
    assert train_side["ari"] == 1.0, "the planted users are not found: naming cannot be tested"
    assert train_side["naming"] == {str(found[0]): "first", str(found[1]): "second"}
    found = np.array(brute.posterior(w, h)).argmax(1).tolist()
    truth = [int(r["annotator"] == "second") for r in records]
    assert held_side["ari"] == pytest.approx(brute.adjusted_rand(found, truth)) and held_side["units"] == 16
    # Of 16 pairs, 14 tell who judged. The first three have scores of their own:
    # one that tells, one on which both agree (1/2), one with a tie (2/3).
    assert held_side["bayes_matched"] == pytest.approx((14 + 1 / 2 + 2 / 3) / 16)


def test_every_row_is_its_heads_text_and_heads_are_sampled_on_the_same_seeds(job):
    """Faults (M13): the mixture draws another expert than it takes; sparse takes the least weight;
    a head samples from the shared trunk's own unembedding."""
    folder, results, _ = job
    samples = tinyjob.lines(folder / "samples.jsonl")
    assert [s["prompt"] for s in samples] == PROMPTS and set(samples[0]["texts"]) == set(results["policies"])
    for name in ("mix-pair", "mix-user"):
        heads = [[s["texts"][f"{name} head {k}"] for s in samples] for k in range(2)]
        assert heads[0] != heads[1]
        w = results["preferences"][name]["weights"]
        u = np.random.default_rng([1, 2**31]).random(len(PROMPTS))          # z = 0 where u < w_0
        want = [heads[int(u[n] >= w[0])][n] for n in range(len(PROMPTS))]
        assert [s["texts"][f"{name} mixture"] for s in samples] == want
        assert [s["texts"][f"{name} sparse"] for s in samples] == heads[int(w[1] > w[0])]
        assert any(u < w[0]) and any(u >= w[0])
    assert all(s["texts"][row].startswith(s["prompt"]) for s in samples for row in s["texts"])


def test_kl_of_every_row_by_hand(job):
    """Faults: KL of the reference not 0; the mixture's (M14) as the drawn head's;
    a head's under another head; divided by the length."""
    folder, results, model = job
    assert results["policies"]["reference"]["kl"] == {"mean": 0.0, "se": 0.0, "n": len(PROMPTS)}
    assert results["policies"]["reference"]["gain"]["mean"] == 0.0
    run = load_run(folder / "mix-pair", "cpu", "")
    reference, tokenizer = load_model(model), load_tokenizer(model)
    prompts = [Pair(tokenizer.encode(p), [], []) for p in PROMPTS]
    rows = policy_rows([run], CompletionTask(reference, prompts, Sampling(MAX_NEW, tokenizer.eos, seed=1, batch=128)))
    for mode in ("mixture", "sparse", "head 0", "head 1"):
        row = rows[f"mix-pair {mode}"]
        for n, (prompt, ids, z) in enumerate(zip(prompts, row["ids"], row["z"])):
            ratio = np.exp(slow_ratios(run, reference, prompt.prompt, ids))
            want = 0.3 * ratio[0] + 0.7 * ratio[1] if mode == "mixture" else ratio[z]
            assert row["kl"][n].item() == pytest.approx(math.log(want), abs=1e-4)
        assert results["policies"][f"mix-pair {mode}"]["kl"]["mean"] == pytest.approx(row["kl"].mean().item(), abs=1e-6)
        assert results["policies"][f"mix-pair {mode}"]["length"]["mean"] == np.mean([len(ids) for ids in row["ids"]])


@pytest.mark.parametrize("temperature", [0.5, 2.0, 0.0])
def test_kl_is_of_the_policy_that_was_sampled(job, temperature):
    """At another temperature than 1, by hand; greedy, log pi is 0 and KL is -log pi_ref, and the mixture's is what the
    experts that say the same weigh together. Faults: the untempered log-ratio of tempered samples; a tempered reference
    to compare with; the reference's own row at 0; an expert of a mixture that cannot have written it counted."""
    folder, _, model = job
    run, reference = load_run(folder / "mix-pair", "cpu", ""), load_model(model)
    tokenizer = load_tokenizer(model)
    prompts = [Pair(tokenizer.encode(p), [], []) for p in PROMPTS]
    if not temperature:
        with torch.no_grad():
            run.experts.W_k[1, ::2] *= -1                                   # else both heads say the same, greedily
    task = CompletionTask(reference, prompts, Sampling(MAX_NEW, tokenizer.eos, temperature, seed=1, batch=128))
    rows = policy_rows([run], task)
    heads = [run.experts.policy(k) for k in range(2)]
    for mode in ("reference", "mix-pair mixture", "mix-pair sparse", "mix-pair head 0", "mix-pair head 1"):
        row = rows[mode]
        for n, (prompt, ids) in enumerate(zip(prompts, row["ids"])):
            base = slow_logp(reference, reference.unembedding, prompt.prompt, ids)
            z = row["z"][n] if row["z"] else None
            if temperature:
                experts = [slow_logp(*head, prompt.prompt, ids, temperature) for head in heads]
                own = slow_logp(reference, reference.unembedding, prompt.prompt, ids, temperature)
            else:
                experts = [0.0 if rows[f"mix-pair head {k}"]["ids"][n] == ids else -math.inf for k in range(2)]
                own = 0.0
            mixed = 0.3 * math.exp(experts[0]) + 0.7 * math.exp(experts[1])
            want = own if z is None else math.log(mixed) if "mixture" in mode else experts[z]
            assert row["kl"][n].item() == pytest.approx(want - base, abs=1e-4), (mode, n)
    if not temperature:
        alike = [a == b for a, b in zip(rows["mix-pair head 0"]["ids"], rows["mix-pair head 1"]["ids"])]
        assert min(rows["reference"]["kl"]) > 0.1 and any(alike) and not all(alike)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.5])
def test_kl_is_on_average_the_kl_of_the_two_policies(job, temperature):
    """One new token, 1,500 samples, against the sum over the vocabulary. Faults: as above."""
    folder, _, model = job
    run, reference, tokenizer = load_run(folder / "dpo", "cpu", ""), load_model(model), load_tokenizer(model)
    prompt = tokenizer.encode("mn")
    sampling = Sampling(1, tokenizer.eos, temperature, seed=1, batch=1500)
    rows = policy_rows([run], CompletionTask(reference, [Pair(prompt, [], [])] * 1500, sampling))

    def next_logp(policy, head, at):
        with torch.no_grad():
            return torch.log_softmax((policy(torch.tensor([prompt]))[0, -1] @ head.T / at).double(), -1)

    base = next_logp(reference, reference.unembedding, 1.0)
    for name, policy in (("reference", (reference, reference.unembedding)), ("dpo", run.experts.policy(0))):
        logp = next_logp(*policy, temperature)
        exact, kl = float((logp.exp() * (logp - base)).sum()), rows[name]["kl"].double()
        spread = float((logp.exp() * (logp - base - exact) ** 2).sum().sqrt()) / math.sqrt(1500)
        assert abs(float(kl.mean()) - exact) <= 4 * spread + 1e-5, (name, float(kl.mean()), exact)


def test_rewards_are_those_of_the_texts(job):
    """Faults: scores in another order than the texts; `trained` the mean of all rewards; gain against no reference;
    values not a prompt each."""
    folder, results, _ = job
    samples = tinyjob.lines(folder / "samples.jsonl")
    base = [len(s["texts"]["reference"]) / 100 for s in samples]
    for name, row in results["policies"].items():
        texts = [s["texts"][name] for s in samples]
        want = np.array(list(score(texts, ["first", "second"], None).values())).T
        assert np.allclose(row["values"], want)
        assert [row["first"]["mean"], row["second"]["mean"]] == pytest.approx(want.mean(0).tolist())
        assert row["trained"]["mean"] == pytest.approx(want[:, 1].mean())
        assert row["gain"]["mean"] == pytest.approx((want[:, 1] - base).mean())
        assert row["gain"]["se"] == pytest.approx((want[:, 1] - base).std(ddof=1) / math.sqrt(len(PROMPTS)))


def test_nothing_depends_on_the_batch_and_one_run_can_be_evaluated_alone(job, monkeypatch):
    """Faults: a row's noise depends on its place in the batch; data looked for inside the run; the results of one run
    written over those of all."""
    folder, results, _ = job
    monkeypatch.setattr(evaluation, "write_report", lambda home: None)
    monkeypatch.setitem(sys.modules, "data.annotators.rewards", types.SimpleNamespace(score=score))
    kept = {path: path.read_text() for path in folder.glob("*.json*")}
    alone = evaluate(EvalConfig(dir=str(folder / "mix-user"), batch=64, limit=4))
    assert alone["asked"] == [{}] * 4
    for row in alone["policies"]:
        assert alone["policies"][row]["values"] == results["policies"][row]["values"][:4]
    assert len(alone["asked"]) == 4 < len(results["asked"]) == len(PROMPTS)
    assert np.allclose(results["policies"]["mix-pair mixture"]["w"], [[0.3, 0.7]] * len(PROMPTS))
    assert alone["preferences"] == {"mix-user": results["preferences"]["mix-user"]}
    assert kept == {path: path.read_text() for path in folder.glob("*.json*")}
    shown = read_job(folder / "mix-user")
    assert [run.name for run in shown.runs] == ["mix-user"] and len(shown.samples) == 4 and shown.dataset
    for name in ("results.json", "samples.jsonl"):
        (folder / "mix-user" / name).unlink()                               # other tests count its files


def test_results_are_written_as_returned_and_runs_are_left_as_they_were(job):
    """Fault: a run is changed by its evaluation."""
    folder, results, _ = job
    assert json.loads((folder / "results.json").read_text()).keys() == results.keys()
    files = {"config.json", "metrics.jsonl", "responsibilities.jsonl", "checkpoint"}
    for name in ("dpo", "mix-pair", "mix-user"):
        assert {p.name for p in (folder / name).iterdir()} == files


def test_what_is_refused(tmp_path, model_dir, job, monkeypatch):
    """Faults: an empty folder, an unfinished run, or runs of different lengths evaluated; --heldout or --prompts that
    are not there passed over in silence; nothing to evaluate on; a run on another model or file than it was trained
    on."""
    def refused(call) -> InputError:
        with pytest.raises(InputError) as error:
            call()
        return error.value

    assert refused(lambda: evaluate(EvalConfig(dir=str(tmp_path)))).file == tmp_path
    tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name="a")
    tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name="b", max_prompt=32)
    assert refused(lambda: evaluate(EvalConfig(dir=str(tmp_path)))).file == tmp_path / "b"
    path, = checkpoints(tmp_path / "b")
    tensors, state = read_tensors(path)
    write_tensors(path, tensors, state | {"finished": False})
    error = refused(lambda: evaluate(EvalConfig(dir=str(tmp_path / "b"))))
    assert error.file == tmp_path / "b" and "step 3" in error.message
    prompts = tmp_path / "prompts.jsonl"
    for line in ('{"prompt": ""}', '{"prompt": 3}', '{"text": "x"}', "[]", '{"prompt": '):
        prompts.write_text('{"prompt": "x"}\n\n' + line + "\n")
        error = refused(lambda: inputs.read_prompts(prompts, load_tokenizer(model_dir), 8, 0))
        assert (error.file, error.line) == (prompts, 3)
    prompts.write_text('{"prompt": "x"}\n{"prompt": [{"role": "user", "content": "x"}]}\n')
    assert refused(lambda: inputs.read_prompts(prompts, load_tokenizer(model_dir), 8, 0)).file == prompts
    for option, name, missing in (("heldout", "typo.jsonl", "typo.jsonl"), ("adapt", "typo.jsonl", "typo.jsonl"),
                                  ("prompts", "typo.jsonl", "typo.jsonl"),
                                  ("prompts", str(prompts), tmp_path / "dataset.json")):
        error = refused(lambda: evaluate(EvalConfig(dir=str(tmp_path / "a"), **{option: name})))
        assert error.option == option and str(error.file) == str(missing)
    assert refused(lambda: evaluate(EvalConfig(dir=str(tmp_path / "a")))).file == tmp_path
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "\n")
    error = refused(lambda: evaluate(EvalConfig(dir=str(tmp_path / "a"))))
    assert error.file == tmp_path / "a" and "a.jsonl" in error.message
    assert refused(lambda: evaluation.main([str(tmp_path / "nothing")])).file == tmp_path / "nothing"


def test_a_gate_gives_each_prompt_its_own_weights(job, tmp_path, monkeypatch):
    """Faults: the mean weights for all; weights of the training pairs in their order; features of prompt and response;
    an expert drawn by the mean weights, or by another prompt's."""
    folder, _, model = job
    for name in ("train.jsonl", "heldout.jsonl", "prompts.jsonl", "dataset.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    options = dict(gate="linear", gate_lr=0.5, gate_features="mean", epochs=4, beta=0.5)
    out = train.run(train.TrainConfig(out=str(tmp_path / "moe"), data=str(tmp_path / "train.jsonl"), model=str(model),
                                      **tinyjob.small(**options)))
    monkeypatch.setattr(evaluation, "write_report", lambda home: None)
    monkeypatch.setitem(sys.modules, "data.annotators.rewards", types.SimpleNamespace(score=score))
    got, run = evaluate(EvalConfig(dir=str(tmp_path))), load_run(out, "cpu", "")
    reference, tokenizer = load_model(model), load_tokenizer(model)

    def w(text):
        with torch.no_grad():
            f = (reference(torch.tensor([tokenizer.encode(text)]))[0].mean(0) - run.gate.mean) / run.gate.scale
            return torch.softmax(run.gate.W @ f + run.gate.b, 0).tolist()

    records = tinyjob.lines(tmp_path / "heldout.jsonl")
    by_pair, h = [w(r["prompt"]) for r in records], []
    assert np.std(by_pair, axis=0).min() > 0.02, "weights that hardly differ test nothing"
    for r in records:
        prompt = tokenizer.encode(r["prompt"])
        sides = (tokenizer.encode(r[side]) + [tokenizer.eos] for side in ("chosen", "rejected"))
        chosen, rejected = (slow_ratios(run, reference, prompt, side) for side in sides)
        h.append([0.5 * (a - b) for a, b in zip(chosen, rejected)])
    figures = got["preferences"]["moe"]
    assert figures["log_likelihood"]["mean"] == pytest.approx(np.log(brute.marginal(by_pair, h)).mean(), abs=1e-4)
    assert figures["weights"] == pytest.approx(np.mean(by_pair, axis=0).tolist(), abs=1e-4)
    u, texts = np.random.default_rng([1, 2**31]).random(len(PROMPTS)), tinyjob.lines(tmp_path / "samples.jsonl")
    for n, prompt in enumerate(PROMPTS):
        drawn, likely = int(u[n] >= w(prompt)[0]), int(np.argmax(w(prompt)))
        assert texts[n]["texts"]["moe mixture"] == texts[n]["texts"][f"moe head {drawn}"]
        assert texts[n]["texts"]["moe sparse"] == texts[n]["texts"][f"moe head {likely}"]


def test_types_disagree_where_their_scores_order_responses_differently():
    """Catches: a reward that is nobody's type counted, a tie taken for disagreement, one type alone."""
    from mixdpo.evaluation.heldout import disagree

    pair = Pair([1], [2], [3], scores={"a": [1, 0], "b": [0.2, 0.9], "c": [0.5, 0.5]})
    assert disagree(pair, {"a", "b"}) and disagree(pair, {"a", "b", "c"})
    assert not disagree(pair, {"a", "c"}) and not disagree(pair, {"b"})
    assert not disagree(Pair([1], [2], [3]), {"a", "b"})


def test_a_file_of_ties_has_nothing_to_predict(tmp_path):
    """Catches: a traceback of max() for a held-out file whose lines are all ties, which train.py accepts."""
    from types import SimpleNamespace

    from letters import Letters

    from mixdpo.evaluation.heldout import margins_of

    path = tmp_path / "ties.jsonl"
    tinyjob.write(path, [{"prompt": "m", "ranking": [["aa", "bb"]]}, {"prompt": "n", "ranking": [["aa", "cb"]]}])
    run = SimpleNamespace(config=train.TrainConfig("", "", ""), experts=SimpleNamespace(dtype=torch.float32))
    with pytest.raises(InputError) as caught:
        next(margins_of([run], [], Letters(), str(path), tmp_path))
    assert caught.value.file == str(path)


def test_units_that_were_never_drawn_have_no_expert():
    """In a private run a user may be drawn by no step; its responsibilities are then NaN. Catches: such users counted
    as expert 0's, which made a perfect assignment one by chance."""
    from mixdpo.evaluation.heldout import alignment

    pairs = [Pair([n], [2], [3], user=str(n), annotator=kind) for n, kind in enumerate("aabbaaa")]
    log_q = torch.tensor([[0.1, 0.9]] * 2 + [[0.9, 0.1]] * 2 + [[math.nan] * 2] * 3).log()
    found = alignment(log_q, [[n] for n in range(7)], pairs)
    assert found == {"ari": 1.0, "matched": 1.0, "naming": {"0": "b", "1": "a"}, "units": 4}


def test_each_type_is_answered_by_its_own_expert(monkeypatch):
    """Three types, two experts: experts are named by training groups, a type without one has NaN, DPO answers all.
    Catches: expert 0 for every type, a type's pairs answered by the expert that does best on them."""
    from types import SimpleNamespace

    from mixdpo.evaluation import heldout

    kinds = ["a", "b", "c"] * 4
    pairs = [Pair([n], [2], [3], annotator=kind, scores={k: [int(k == kind), int(k != kind)] for k in "abc"})
             for n, kind in enumerate(kinds)]
    h = torch.tensor([[1.0, -1.0] if kind == "b" else [-1.0, 1.0] for kind in kinds])
    train = {"naming": {"0": "b", "1": "a"}, "ari": 1.0}
    monkeypatch.setattr(heldout, "alignment", lambda log_q, units, of: train)
    config = SimpleNamespace(experts=2, latent="pair", gate="fixed")
    run = SimpleNamespace(config=config, table=None, plan=SimpleNamespace(units=[], pairs=[]))
    found = heldout.preference_figures(run, pairs, h, torch.full((12, 2), 0.5).log())
    own = {kind: of["own_expert"]["mean"] for kind, of in found["types"].items()}
    assert own["a"] == own["b"] == 1.0 and own["c"] != own["c"], "NaN"
    config.experts = 1
    alone = heldout.preference_figures(run, pairs, h[:, :1], torch.zeros(12, 1))
    assert {kind: of["own_expert"]["mean"] for kind, of in alone["types"].items()} == {"a": 0.0, "b": 1.0, "c": 0.0}


def test_evaluation_and_adaptation_take_choices_as_noisy_as_training_did(tmp_path, model_dir):
    """The posterior of the training users is the last E-step's, in evaluation and in adaptation. Catches: margins
    without --label-noise's flips, under which the same pairs are more certain."""
    from mixdpo.evaluation.adaptation import weights_after
    from mixdpo.evaluation.heldout import margins_of
    from mixdpo.mixture import e_step
    from mixdpo.preferences import groups

    out = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(each=4), latent="user", label_noise=0.3, beta=2.0,
                      weights="0.4,0.6", epochs=3, head_lr=5e-2)
    run, reference, tokenizer = load_run(out, "cpu", ""), load_model(model_dir), load_tokenizer(model_dir)
    (_, pairs, h, log_w), = margins_of([run], [reference], tokenizer, tmp_path / "run.jsonl", tmp_path / "cache")
    assert h.abs().max() <= math.log(0.7 / 0.3) + 1e-5 and h.abs().max() > 0.3
    units = groups(pairs, "user")
    group = torch.tensor([g for i in range(len(pairs)) for g, unit in enumerate(units) if i in unit])
    assert torch.allclose(e_step(log_w, h, group)[1], run.table, atol=1e-4)
    for g, unit in enumerate(units):
        assert torch.allclose(weights_after(log_w, h, unit, unit[:1])[0], run.table[g], atol=1e-4)


@pytest.mark.parametrize("gate", ["user", "prompt-user"])
@pytest.mark.parametrize("place", [0, -1], ids=["first in the file", "last in the file"])
def test_a_user_of_context_pairs_alone_is_a_user_like_all_others(gate, place, tmp_path, model_dir):
    """Without --estep context such pairs are trained on. Catches: no row of the gate, or one that was never trained,
    for such a user; the rows of the others moved by one."""
    records = tinyjob.make_records(users=4, each=3)
    context_only = [r | {"user": "context", "context": True} for r in tinyjob.make_records(users=1, each=2, seed=3)]
    records = context_only + records if place == 0 else records + context_only
    out = tinyjob.run(tmp_path, model_dir, records, gate=gate, gate_lr=0.5, epochs=3)
    tinyjob.write(tmp_path / "heldout.jsonl", records)
    run, reference, tokenizer = load_run(out, "cpu", ""), load_model(model_dir), load_tokenizer(model_dir)
    (_, pairs, _, log_w), = evaluation.margins_of([run], [reference], tokenizer, tmp_path / "heldout.jsonl",
                                                  tmp_path / "cache")
    assert run.gate.E.shape[0] == 1 + 5 and all(run.gate.E.abs().sum(1) > 0), "every row learns"
    if gate == "user":
        for user, row in (("context", 1 if place == 0 else 5), ("u0", 2 + place), ("u3", 5 + place)):
            own = torch.stack([log_w[n] for n, p in enumerate(pairs) if p.user == user])
            assert torch.allclose(own, torch.log_softmax(run.gate.E[row], -1).expand_as(own), atol=1e-6), user


def test_a_user_whom_no_step_drew_has_the_gates_weights():
    """Catches: NaN for responsibilities of a user who took part in no step (--experts 1 --latent user --epsilon)."""
    from mixdpo.evaluation.heldout import user_weights

    pairs = [Pair([1], [2], [3], user=user) for user in "abc"]
    run = types.SimpleNamespace(config=types.SimpleNamespace(latent="user"), table=torch.tensor([[-0.5, -1.0],
                                                                                             [math.nan, math.nan]]),
                                plan=types.SimpleNamespace(pairs=pairs, units=[[0], [1]]))
    log_w = torch.tensor([[-2.0, -3.0]] * 3)
    assert user_weights(run, pairs, log_w).tolist() == [[-0.5, -1.0], [-2.0, -3.0], [-2.0, -3.0]]


def refuse_constants(name):
    raise AssertionError(f"{name} is not JSON")


def test_no_json_file_holds_nan_and_the_report_reads_null(tmp_path, model_dir):
    """A run with fewer experts than types, and a single user of one type, has figures without a number. Catches: bare
    NaN or Infinity in results.json, config.json or metrics.jsonl; a reader that takes null for a number."""
    tmp_path = tmp_path / "job"
    tmp_path.mkdir()
    records = tinyjob.make_records(users=6, each=3)
    for n, record in enumerate(records):
        record["annotator"] = "abc"[n % 3]
        record["scores"] = {kind: [float(kind == "abc"[n % 3]), float(kind != "abc"[n % 3])] for kind in "abc"}
    tinyjob.run(tmp_path, model_dir, records, latent="user", epochs=2)
    tinyjob.run(tmp_path, model_dir, records, name="dpo", experts=1, data=str(tmp_path / "run.jsonl"))
    tinyjob.write(tmp_path / "heldout.jsonl", [r for r in records if r["annotator"] != "c" or r["user"] == "u2"])
    evaluate(EvalConfig(dir=str(tmp_path)))
    files = [*tmp_path.glob("*.json"), *tmp_path.glob("*/config.json"), *tmp_path.glob("*/metrics.jsonl")]
    assert len(files) >= 5
    for path in files:
        for line in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            json.loads(line, parse_constant=refuse_constants)
    assert '"se": null' in (tmp_path / "results.json").read_text()
    text = (tmp_path / "report.md").read_text()
    assert "nan" not in text and "| – |" in text


@pytest.mark.parametrize("option, value", [
    ("batch", -1), ("max_new", -3), ("limit", -1), ("seed", -1), ("temperature", -1.0),
    ("temperature", math.nan), ("temperature", math.inf), ("max_new", 400)])
def test_what_evaluation_cannot_use_is_refused_before_anything_is_lost(job, option, value, monkeypatch):
    """Catches: a traceback, or the inverse order of logits, a prompt left out; figures computed, or samples.jsonl taken
    away, before."""
    folder, _, _ = job
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    monkeypatch.setattr(evaluation, "margins_of", None)                     # a call of it is a TypeError
    with pytest.raises(InputError) as error:
        evaluate(EvalConfig(dir=str(folder), **{option: value}))
    assert error.value.option == option
    if (option, value) != ("max_new", 400):
        with pytest.raises(InputError) as error:
            evaluation.compare(EvalConfig(dir=str(folder), judge="llm:x", **{option: value}))
        assert error.value.option == option
    assert before == {path: path.read_bytes() for path in folder.glob("*.json*")} and folder / "samples.jsonl" in before


def test_an_evaluation_that_fails_or_completes_nothing_leaves_the_samples_of_before(job, tmp_path, monkeypatch):
    """Catches: samples.jsonl taken away before its successor is there; older samples shown as of this evaluation."""
    folder, _, _ = job
    for name in ("train.jsonl", "heldout.jsonl", "prompts.jsonl", "dataset.json", "samples.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr(evaluation, "write_report", lambda home: None)
    monkeypatch.setattr(inputs, "find_runs", lambda home: [folder / "dpo"])
    monkeypatch.setitem(sys.modules, "data.annotators.rewards", types.SimpleNamespace(score=lambda *_: 1 / 0))
    before = (tmp_path / "samples.jsonl").read_bytes()
    with pytest.raises(ZeroDivisionError):
        evaluate(EvalConfig(dir=str(tmp_path)))
    assert (tmp_path / "samples.jsonl").read_bytes() == before and not (tmp_path / "results.json").exists()
    (tmp_path / "prompts.jsonl").write_text("")
    with pytest.raises(InputError) as error:
        evaluate(EvalConfig(dir=str(tmp_path)))
    assert error.value.file == tmp_path / "prompts.jsonl"
    (tmp_path / "prompts.jsonl").unlink()
    evaluate(EvalConfig(dir=str(tmp_path)))
    assert (tmp_path / "samples.jsonl").read_bytes() == before and not read_job(tmp_path).samples


def test_runs_stand_by_name_and_older_ones_are_read(job, tmp_path, capsys):
    """Catches: an order that the last write decides; a run from before an option existed, or with one that is no more,
    that cannot be evaluated or reported, or is read without a word."""
    import os
    import shutil

    folder, results, _ = job
    for name in ("mix-user", "mix-pair", "dpo"):
        shutil.copytree(folder / name, tmp_path / name)
    os.utime(tmp_path / "dpo" / "checkpoint")
    assert [path.name for path in inputs.find_runs(tmp_path)] == ["dpo", "mix-pair", "mix-user"]
    assert list(results["preferences"]) == ["dpo", "mix-pair", "mix-user"]
    path = tmp_path / "mix-pair" / "config.json"
    options = json.loads(path.read_text())
    del options["robust"], options["label_noise"]
    path.write_text(json.dumps(options | {"noise_seed_of_old": 3}))
    capsys.readouterr()
    run = load_run(tmp_path / "mix-pair", "cpu", "")
    assert (run.config.robust, run.config.label_noise, run.config.weights) == (0.0, 0.0, "0.3,0.7")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(path))]
    assert len(notes) == 2 and "robust" in notes[0] and "label_noise" in notes[0] and "noise_seed_of_old" in notes[1]
    from data.report.job import read_run

    assert read_run(tmp_path / "mix-pair").config["label_noise"] == 0.0 and not capsys.readouterr().out


@pytest.mark.parametrize("latent", ["pair", "user"])
def test_the_report_counts_marked_pairs_among_the_units(latent, tmp_path, model_dir):
    """Units by type, in the order of the run's responsibilities. Caught: pairs that the file marks as context left out,
    where they are pairs like all others, so that types stand beside other units' responsibilities."""
    from data.report.job import read_run

    records = [r | {"context": n in (0, 6, 12, 4)} for n, r in enumerate(tinyjob.make_records())]   # all of u0
    run = read_run(tinyjob.run(tmp_path, model_dir, records, latent=latent, epochs=1))
    assert run.units == [r["annotator"] for r in (records if latent == "pair" else records[:6])]
    assert len(run.units) == len(tinyjob.tensors(tmp_path / "run")["table"])


def test_what_an_evaluation_leaves_out_is_said(tmp_path, model_dir, monkeypatch, capsys):
    """Faults: one unfinished run that stops the evaluation of a folder, or is skipped without a word; an evaluation
    that replaces another silently; context pairs that are counted as such where they are pairs like all others; a
    traceback for a bad dataset.json."""
    import train
    from mixdpo.config import Stopped

    records = [record | {"context": n == 0} for n, record in enumerate(tinyjob.make_records())]
    tinyjob.run(tmp_path, model_dir, records, name="done")
    assert "18 pairs: 18 to train on, 0 for context; " in capsys.readouterr().out
    real = train.step

    def stops(state, *rest):
        if state.t == 2:
            raise Stopped
        return real(state, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, "step", stops)
        tinyjob.run(tmp_path, model_dir, records, name="half", save_minutes=0.0)
    names, rows = ("heldout.jsonl", "new.jsonl"), tinyjob.make_records(seed=3)
    heldout, new = (tinyjob.write(tmp_path / name, rows) for name in names)
    evaluate(EvalConfig(dir=str(tmp_path), heldout=heldout, adapt=new))
    printed = capsys.readouterr().out
    assert "half: is unfinished (step 2)" in printed and "It is skipped" in printed and "this replaces" not in printed
    evaluate(EvalConfig(dir=str(tmp_path), heldout=heldout))
    assert "this replaces the earlier evaluation" in capsys.readouterr().out
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(InputError) as error:
        evaluate(EvalConfig(dir=str(tmp_path), heldout=heldout))
    assert error.value.file == tmp_path / "dataset.json"


def test_runs_that_keep_their_model_frozen_share_it(tmp_path):
    """Faults: a copy of the model in memory for each run; a run that trained its trunk is given another's, or changes
    the reference."""
    model, records = tinyjob.make_model(tmp_path / "model"), tinyjob.make_records()
    runs = {"adapters": {"sharing": "lora"}, "dpo": {"sharing": "lora", "experts": 1}, "heads": {"train_trunk": False},
            "trained": {"experts": 1}, "models": {"sharing": "models"}}
    for name, options in runs.items():
        (tmp_path / "job").mkdir(exist_ok=True)
        tinyjob.run(tmp_path, model, records, name=f"job/{name}", **options)
    tinyjob.write(tmp_path / "job" / "heldout.jsonl", records)
    found = inputs.read_inputs(EvalConfig(dir=str(tmp_path / "job")))
    reference, = found.references
    places = {p.data_ptr() for p in reference.parameters()}
    shared = {run.name: sum(p.data_ptr() in places for p in run.experts.parameters()) for run in found.runs}
    count = len(places)
    assert shared == {"adapters": count, "dpo": count, "heads": count, "trained": 0, "models": 0}
    for p, q in zip(reference.parameters(), load_model(model).parameters()):
        assert torch.equal(p, q)
    alone = load_run(tmp_path / "job" / "adapters", "cpu", "").experts.state_dict()
    assert all(torch.equal(x, alone[name]) for name, x in found.runs[0].experts.state_dict().items())


def test_prompts_that_repeat_another_one_are_named(tmp_path, model_dir, capsys):
    """Prompts that are equal after they are shortened repeat each other too."""
    for texts, limit, words in ((["a", "b", "a", "xxxxa", "a"], 0, "2 of 5"), (["a", "b", "a"], 2, ""),
                                (["a12345678", "b12345678", "c"], 0, "1 of 3")):
        tinyjob.write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts])
        assert len(inputs.read_prompts(tmp_path / "prompts.jsonl", load_tokenizer(model_dir), 8, limit)[0]) == (
            limit or len(texts))
        printed = capsys.readouterr().out
        assert (f"{words} prompts" in printed) if words else not printed
