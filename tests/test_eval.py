"""eval.py end to end on a tiny job folder, its figures done again by hand.
Docstrings name the faults that each test was seen to fail on."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch

import brute
import eval as evaluation
import tinyjob
import train
from data.job import read_job
from eval import EvalConfig, evaluate
from mixdpo.config import InputError
from mixdpo.preferences import Pair
from mixdpo.rundir import checkpoints
from mixdpo.tokenizer import load_tokenizer
from mixdpo.weights import load_model
from mixdpo.whole import read_tensors, write_tensors

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
        record["prompt"] = held[n % 9]["prompt"]                            # users share prompts
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
        patch.setitem(sys.modules, "data.annotators", types.SimpleNamespace(score=score))
        patch.setattr(evaluation, "write_report", lambda home: None)
        results = evaluate(EvalConfig(dir=str(folder), batch=3))
    return folder, results, model


def slow_logp(model, head, prompt, response):
    with torch.no_grad():
        logps = torch.log_softmax(model(torch.tensor([prompt + response]))[0] @ head.T, -1)[len(prompt) - 1 : -1]
    return logps[torch.arange(len(response)), torch.tensor(response)].sum().item()


def slow_ratios(run, reference, prompt, response):
    """log pi_k - log pi_ref of one response, for every expert k."""
    base = slow_logp(reference, reference.unembedding, prompt, response)
    return [slow_logp(*run.experts.policy(k), prompt, response) - base for k in range(run.config.experts)]


def slow_se(values, prompts):
    """Prompt by prompt: the sum of its residuals, squared."""
    sums = {p: sum(v - np.mean(values) for v, q in zip(values, prompts) if q == p) for p in prompts}
    return math.sqrt(len(sums) / (len(sums) - 1) * sum(s**2 for s in sums.values())) / len(values)


def slow_heldout(job, name):
    """Everything about a run's held-out pairs in plain numbers: records, h (P,K), w (K,), table of q (G,K)."""
    folder, _, model = job
    run, reference, tokenizer = evaluation.load_run(folder / name, "cpu", ""), load_model(model), load_tokenizer(model)
    records, h = tinyjob.lines(folder / "heldout.jsonl"), []
    for r in records:
        prompt = tokenizer.encode(r["prompt"])
        chosen, rejected = (tokenizer.encode(r[side]) + [tokenizer.eos] for side in ("chosen", "rejected"))
        ratios = zip(slow_ratios(run, reference, prompt, chosen), slow_ratios(run, reference, prompt, rejected))
        h.append([run.config.beta * (a - b) for a, b in ratios])
    return records, np.array(h), run.gate.log_w.exp().tolist(), run.table.exp().numpy()


@pytest.mark.parametrize("name", ["dpo", "mix-pair", "mix-user"])
def test_heldout_figures_by_hand(job, name):
    """Faults: margins against another reference; M5 under uniform w; a tie for a win; each user's own weights not used,
    or those of another user; pairs to compare runs by under other weights; accuracy of an annotator on all pairs; the
    gap with its sign turned; pairs of one prompt counted as independent, or prompts told apart by their first token;
    own - other of another annotator."""
    records, h, w, table = slow_heldout(job, name)
    got, users = job[1]["preferences"][name], [f"u{n}" for n in range(6)]   # in the training file's order
    own = [table[users.index(r["user"])].tolist() if name == "mix-user" and r["user"] in users else w for r in records]
    p, p_own = np.array(brute.marginal(w, h)), np.array(brute.marginal(own, h))
    assert (abs(h) > 0.01).any(), "the runs moved nowhere: nothing is compared"
    prompts = [r["prompt"] for r in records]
    figures = {"accuracy_mbt": p > 0.5, "accuracy_own": p_own > 0.5,
               "log_likelihood": np.log(p), "log_likelihood_own": np.log(p_own)}
    for key, values in figures.items():
        assert got[key]["mean"] == pytest.approx(values.mean(), abs=1e-5), key
        assert got[key]["se"] == pytest.approx(slow_se(values, prompts), abs=1e-5), key
        assert got[key]["n"] == 16, key
    assert got["prompts"] == len(set(prompts)) < 16
    assert got["by_pair"] == pytest.approx(np.log(p).tolist(), abs=1e-5)
    assert [got["prompt_of_pair"].index(n) for n in got["prompt_of_pair"]] == [prompts.index(q) for q in prompts]
    gap = [brute.kl(q, posterior) for q, posterior in zip(own, brute.posterior(own, h))]
    assert got["elbo_gap"]["mean"] == pytest.approx(np.mean(gap), abs=1e-5)
    for kind in ("first", "second"):
        mask = [r["annotator"] == kind for r in records]
        assert [a["mean"] for a in got["accuracy"][kind]] == pytest.approx((h[mask] > 0).mean(0).tolist()), kind
        of_kind = [q for q, keep in zip(prompts, mask) if keep]
        se = [slow_se(column, of_kind) for column in (h[mask] > 0).T]
        assert [a["se"] for a in got["accuracy"][kind]] == pytest.approx(se, abs=1e-5)
        for k in np.flatnonzero([own == kind for own in got["own"]]):
            apart = (h[mask, k] > 0).mean() - (h[~np.array(mask), k] > 0).mean()
            assert got["own_other"][k]["mean"] == pytest.approx(apart)
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
    run = evaluation.load_run(folder / "mix-pair", "cpu", "")
    reference, tokenizer = load_model(model), load_tokenizer(model)
    prompts, config = [Pair(tokenizer.encode(p), [], []) for p in PROMPTS], EvalConfig(dir=str(folder))
    rows = evaluation.policy_rows([run], reference, prompts, config, MAX_NEW, tokenizer.eos)
    for mode in ("mixture", "sparse", "head 0", "head 1"):
        row = rows[f"mix-pair {mode}"]
        for n, (prompt, ids, z) in enumerate(zip(prompts, row["ids"], row["z"])):
            ratio = np.exp(slow_ratios(run, reference, prompt.prompt, ids))
            want = 0.3 * ratio[0] + 0.7 * ratio[1] if mode == "mixture" else ratio[z]
            assert row["kl"][n].item() == pytest.approx(math.log(want), abs=1e-4)
        assert results["policies"][f"mix-pair {mode}"]["kl"]["mean"] == pytest.approx(row["kl"].mean().item(), abs=1e-6)
        assert results["policies"][f"mix-pair {mode}"]["length"]["mean"] == np.mean([len(ids) for ids in row["ids"]])


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
    monkeypatch.setitem(sys.modules, "data.annotators", types.SimpleNamespace(score=score))
    kept = {path: path.read_text() for path in folder.glob("*.json*")}
    alone = evaluate(EvalConfig(dir=str(folder / "mix-user"), batch=64, limit=4))
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
    with pytest.raises(InputError, match="no run in it"):
        evaluate(EvalConfig(dir=str(tmp_path)))
    tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name="a")
    tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name="b", max_prompt=32)
    with pytest.raises(InputError, match="lengths or dtype differ.*one at a time"):
        evaluate(EvalConfig(dir=str(tmp_path)))
    path, = checkpoints(tmp_path / "b")
    tensors, state = read_tensors(path)
    write_tensors(path, tensors, state | {"finished": False})
    with pytest.raises(InputError, match="b: stopped at step 3; finish it"):
        evaluate(EvalConfig(dir=str(tmp_path / "b")))
    for line in ('{"prompt": ""}', '{"prompt": 3}', '{"text": "x"}', "[]", '{"prompt": '):
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n\n' + line + "\n")
        with pytest.raises(InputError, match=r"prompts\.jsonl:3"):
            evaluation.read_prompts(tmp_path / "prompts.jsonl", load_tokenizer(model_dir), 8, 0)
    for options in ({"heldout": "typo.jsonl"}, {"prompts": "typo.jsonl"}, {"prompts": str(tmp_path / "prompts.jsonl")}):
        with pytest.raises(InputError, match="(typo.jsonl|dataset.json): no such file; --heldout and"):
            evaluate(EvalConfig(dir=str(tmp_path / "a"), **options))
    with pytest.raises(InputError, match="nothing to evaluate on; wanted heldout.jsonl"):
        evaluate(EvalConfig(dir=str(tmp_path / "a")))
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "\n")
    with pytest.raises(InputError, match="a: was trained with another data than lies in .*a.jsonl now"):
        evaluate(EvalConfig(dir=str(tmp_path / "a")))
    with pytest.raises(InputError, match="no run in it"):
        evaluation.main([str(tmp_path / "nothing")])


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
    monkeypatch.setitem(sys.modules, "data.annotators", types.SimpleNamespace(score=score))
    got, run = evaluate(EvalConfig(dir=str(tmp_path))), evaluation.load_run(out, "cpu", "")
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
    from mixdpo.heldout import disagree

    pair = Pair([1], [2], [3], scores={"a": [1, 0], "b": [0.2, 0.9], "c": [0.5, 0.5]})
    assert disagree(pair, {"a", "b"}) and disagree(pair, {"a", "b", "c"})
    assert not disagree(pair, {"a", "c"}) and not disagree(pair, {"b"})
    assert not disagree(Pair([1], [2], [3]), {"a", "b"})


def test_each_type_is_answered_by_its_own_expert(monkeypatch):
    """Three types, two experts: experts are named by training groups, a type without one has NaN, DPO answers all.
    Catches: expert 0 for every type, a type's pairs answered by the expert that does best on them."""
    from types import SimpleNamespace

    from mixdpo import heldout

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
