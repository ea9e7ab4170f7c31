"""mixdpo/evaluation/served.py: the rows of own reward on a tiny job, their figures done again by hand.
What each test catches stands in its docstring."""

import copy
import dataclasses
import json
import math
import sys
import types

import numpy as np
import pytest
import tinyjob
import torch
from test_eval import slow_logp, slow_ratios

import eval as evaluation
import train
from eval import EvalConfig, evaluate
from mixdpo import config as configs
from mixdpo.config import InputError
from mixdpo.evaluation import frontier, served
from mixdpo.evaluation import in_context as in_context_module
from mixdpo.evaluation.completions import CompletionTask, all_scores, with_utilities
from mixdpo.evaluation.generate import Sampling, generate
from mixdpo.evaluation.heldout import margins_of
from mixdpo.evaluation.statistics import mean_se
from mixdpo.models.weights import load_model
from mixdpo.preferences import Pair
from mixdpo.runs.load_run import load_run
from mixdpo.text.tokenizer import load_tokenizer

MAX_NEW, PROMPTS = 6, ["mn", "o", "pmno", "nn", "po"]
UTILITIES = {"first": {"letters": 1.0}, "second": {"letters": -0.5, "length": 2.0}}
TYPES = ["first", "second"]


def score(texts, names, folder):
    of = {"letters": lambda t: sum(c in "abcdefghijklm" for c in t) / len(t), "length": lambda t: len(t) / 100}
    return {name: [of[name](text) for text in texts] for name in names}


def utility(kind, text):
    """Of one text for a type, by hand."""
    letters, length = (score([text], [name], None)[name][0] for name in ("letters", "length"))
    return letters if kind == "first" else 2.0 * length - 0.5 * letters


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job of two types: DPO on all pairs and on those of one type, a mixture of users, one of adapters, a gate on
    prompts; evaluated at strength 1 and, instead of a KL, at strength 0.5."""
    folder = tmp_path_factory.mktemp("served")
    model, records = tinyjob.make_model(folder / "reference"), tinyjob.make_records(users=6, each=4)
    tinyjob.write(folder / "train.jsonl", records)
    tinyjob.write(folder / "train-first.jsonl", [r for r in records if r["annotator"] == "first"])
    new = tinyjob.make_records(users=4, each=6, seed=7)
    tinyjob.write(folder / "adapt-new.jsonl", [r | {"user": f"new-{r['user']}"} for r in new])
    tinyjob.write(folder / "heldout.jsonl", records[:4])
    tinyjob.write(folder / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    dataset = {"rewards": ["letters", "length"], "annotators": TYPES, "utilities": UTILITIES, "max_new": MAX_NEW}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    runs = {
        "dpo": dict(experts=1),
        "dpo-first": dict(experts=1, data="train-first.jsonl", epochs=9, lr=3e-3),
        "mixture": dict(latent="user", rank=0, weights="0.3,0.7", start="linear", estep="context", context=2),
        "adapters": dict(latent="user", sharing="lora", lr=train.TrainConfig.lr, shared_rank=1, head_lr=3e-2, epochs=6),
        "moe": dict(gate="linear", gate_lr=0.5),
    }
    for name, own in runs.items():
        options = dict(model=str(model), beta=0.5, epochs=3, out=str(folder / name)) | tinyjob.small(**own)
        options["data"] = str(folder / own.get("data", "train.jsonl"))
        train.run(train.TrainConfig(**options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "data.annotators.rewards", types.SimpleNamespace(score=score))
        patch.setattr(evaluation, "write_report", lambda home: None)
        patch.setattr(served, "strength_for", lambda kl, reached: kl if kl == 0.5 else None)
        results = evaluate(EvalConfig(dir=str(folder), batch=3, kl=(0.5,)))
    return folder, results, model


def half_way(experts, reference):
    """Full heads and trunk, or one model: half-way from the reference to the experts."""
    experts, base = copy.deepcopy(experts), dict(reference.named_parameters())
    with torch.no_grad():
        for name, p in experts.named_parameters():
            if name == "W_k":
                p.copy_((p + reference.unembedding) / 2)
            else:
                p.copy_((p + base[name.removeprefix("trunk.")]) / 2)
    return experts


def by_hand(job, name, strength):
    """Of a run: the run, and its completions' utilities (K,N,T) over the reference's, log-ratios (K,N,K), lengths
    (K,N)."""
    folder, _, model = job
    run = load_run(folder / name, "cpu", "")
    if strength == 0.5:
        run.experts = half_way(run.experts, load_model(model))
    return run, *completed_by_hand(job, run)


def utilities(prompts, ids, tokenizer):
    """Of each prompt and its completion, for each type: (N,T)."""
    assert not any(t in (tokenizer.bos, tokenizer.eos) for prompt in prompts for t in prompt)
    texts = [tokenizer.decode(prompt + [t for t in y if t != tokenizer.eos]) for prompt, y in zip(prompts, ids)]
    return np.array([[utility(kind, text) for kind in TYPES] for text in texts])


def completed_by_hand(job, run):
    reference, tokenizer = load_model(job[2]), load_tokenizer(job[2])
    prompts, sampling = [tokenizer.encode(p) for p in PROMPTS], Sampling(MAX_NEW, tokenizer.eos, seed=1)
    base = utilities(prompts, generate(reference, prompts, sampling, reference.unembedding), tokenizer)
    gain, ratio, length = [], [], []
    for k in range(run.experts.K):
        ids = generate(run.experts.policy(k)[0], prompts, sampling, run.experts.policy(k)[1])
        gain.append(utilities(prompts, ids, tokenizer) - base)
        ratio.append([slow_ratios(run, reference, prompt, y) for prompt, y in zip(prompts, ids)])
        length.append([len(y) for y in ids])
    return np.array(gain), np.array(ratio), np.array(length)


def figures(gain, ratio, length, q, kinds):
    """Mean over types of the mean over their users; q (U,K) or (U,N,K) probabilities. gain and KL by prompt, length."""
    K, N, _ = gain.shape
    by_type = {kind: [] for kind in kinds}
    for of_user, kind in zip(q, kinds):
        rows = of_user if np.ndim(of_user) == 2 else [of_user] * N
        own = [sum(rows[n][k] * gain[k, n, TYPES.index(kind)] for k in range(K)) for n in range(N)]
        kl = [sum(rows[n][k] * math.log(sum(rows[n][j] * math.exp(ratio[k, n, j]) for j in range(K)))
                  for k in range(K) if rows[n][k] > 0) for n in range(N)]
        by_type[kind].append((own, kl, [sum(rows[n][k] * length[k, n] for k in range(K)) for n in range(N)]))
    own, kl, long = ([np.mean([row[part] for row in rows], axis=0) for rows in by_type.values()] for part in range(3))
    return np.mean(own, axis=0), np.mean(kl, axis=0), np.mean(long), dict(zip(by_type, own))


def row_of(job, run, users, strength):
    found = [r for r in job[1]["own_reward"] if (r["run"], r["users"], r["strength"]) == (run, users, strength)]
    assert len(found) == 1, (run, users, strength, len(found))
    return found[0]


def compare(row, want, kinds):
    gain, kl, length, by_type = want
    assert row["gain_by_prompt"] == pytest.approx(gain.tolist(), abs=1e-5)
    assert row["gain"]["mean"] == pytest.approx(gain.mean(), abs=1e-5) and row["gain"]["n"] == len(PROMPTS)
    assert row["kl_by_prompt"] == pytest.approx(kl.tolist(), abs=2e-4)
    assert row["kl"] == pytest.approx(kl.mean(), abs=2e-4)
    assert row["length"] == pytest.approx(length, abs=1e-6)
    assert list(row["types"]) == kinds
    for kind in kinds:
        assert row["types"][kind] == pytest.approx(mean_se(by_type[kind]), abs=1e-5)


def test_who_is_served_what(job):
    """Caught: a row too many or too few; a run of one type served to all; unknown users of DPO; the rows of a strength
    left out; results without them; a soup of heads, or of one expert; a row without its run's options; the options of
    the mixture for its soup, which has one expert."""
    folder, results, _ = job
    rows = {(row["run"], row["users"]) for row in results["own_reward"]}
    known = {"known users", "known users, sparse", *(f"new users, {n} pairs known" for n in (0, 1, 2))}
    assert rows == {("dpo", "all users"), ("dpo-first", "type first"), ("moe", "unknown users"),
                    *((run, kind) for run in ("mixture", "adapters") for kind in ("unknown users", *known)),
                    ("adapters-soup", "all users"), ("in-context", "in context")}
    assert len(results["own_reward"]) == 2 * len(rows) - 2                  # examples and soups have one strength
    assert {row["strength"] for row in results["own_reward"]} == {0.5, 1.0}
    for row in results["own_reward"]:
        of = {"adapters-soup": "adapters", "in-context": "adapters"}.get(row["run"], row["run"])
        saved = dataclasses.asdict(configs.load(train.TrainConfig, folder / of / "config.json"))
        assert row["config"] == saved | ({"experts": 1} if row["run"] == "adapters-soup" else {}), row["run"]
    assert json.loads((folder / "results.json").read_text())["own_reward"] is not None


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_one_policy_by_hand(job, strength):
    """DPO on all pairs serves both types; on the pairs of one type that type only. Caught: utilities without their
    weights, or of the other type; a gain over nothing; completions of the whole strength at half of it, or sampled with
    other random numbers than the reference's; a type served by DPO of another; no standard error for one type."""
    _, gain, ratio, length = by_hand(job, "dpo", strength)
    row = row_of(job, "dpo", "all users", strength)
    compare(row, figures(gain, ratio, length, [[1.0]] * 2, TYPES), TYPES)
    assert row["gain"]["se"] == pytest.approx(mean_se(gain[0].mean(1))["se"], abs=1e-6)
    assert abs(gain).max() > 0.01 and abs(ratio).max() > 0.01
    _, gain, ratio, length = by_hand(job, "dpo-first", strength)
    row = row_of(job, "dpo-first", "type first", strength)
    compare(row, figures(gain, ratio, length, [[1.0]], ["first"]), ["first"])
    assert abs(gain[..., 0]).max() > 0.01
    assert row["gain"]["se"] == pytest.approx(mean_se(gain[0, :, 0])["se"], abs=1e-6)


def test_a_soup_by_hand(job):
    """One policy for all, whose parameters are the mean of the experts'. Caught: one of the experts; the mean of their
    log-probs; factors averaged, and not their products; a soup of the experts at half of their strength; the
    mixture's completions, which have its name's beginning."""
    reference = load_model(job[2])
    models = [load_run(job[0] / "adapters", "cpu", "").experts.policy(k)[0] for k in range(2)]
    with torch.no_grad():
        for p, *own in zip(reference.parameters(), *(model.parameters() for model in models), strict=True):
            p.copy_((own[0] + own[1]) / 2)
    policy = types.SimpleNamespace(K=1, policy=lambda k: (reference, reference.unembedding))
    run = types.SimpleNamespace(config=types.SimpleNamespace(experts=1), experts=policy)
    gain, ratio, length = completed_by_hand(job, run)
    row = row_of(job, "adapters-soup", "all users", 1.0)
    compare(row, figures(gain, ratio, length, [[1.0]] * 2, TYPES), TYPES)
    assert abs(ratio).max() > 0.01
    alone = [row_of(job, "adapters", f"{kind} users", 1.0)["kl"] for kind in ("known", "unknown")]
    assert min(abs(kl - ratio.mean()) for kl in alone) > 1e-3, "a soup that is like the mixture tests nothing"


def test_users_served_in_context_by_hand(job):
    """For each type and prompt four choices of one of its users, drawn from all of the user's, each prompt and chosen
    response, with an empty line behind. Caught: the rejected response; the token that ends a response left in; the user
    of another type; a type's gain for all types; the reference's KL to itself under one prompt; texts with the examples
    in them scored; prompts that share their draws."""
    row, reference, tokenizer = row_of(job, "in-context", "in context", 1.0), load_model(job[2]), load_tokenizer(job[2])
    records = tinyjob.lines(job[0] / "train.jsonl")
    prompts, sampling = [tokenizer.encode(p) for p in PROMPTS], Sampling(MAX_NEW, tokenizer.eos, seed=1)
    base = utilities(prompts, generate(reference, prompts, sampling, reference.unembedding), tokenizer)
    gain, kl, lengths = [], [], []
    for t, kind in enumerate(TYPES):
        users, longer = list(dict.fromkeys(r["user"] for r in records if r["annotator"] == kind)), []
        for n, text in enumerate(PROMPTS):
            rng = np.random.default_rng([1, 41, t, n])
            user = users[rng.integers(len(users))]
            own = [r for r in records if r["user"] == user]
            shown = [own[i] for i in rng.permutation(len(own))[:4]]
            longer.append(tokenizer.encode("".join(r["prompt"] + r["chosen"] + "\n\n" for r in shown) + text))
        ids = generate(reference, longer, sampling, reference.unembedding)
        gain.append(utilities(prompts, ids, tokenizer)[:, t] - base[:, t])
        kl.append([slow_logp(reference, reference.unembedding, long, y)
                   - slow_logp(reference, reference.unembedding, prompt, y)
                   for long, prompt, y in zip(longer, prompts, ids)])
        lengths += map(len, ids)
    want = np.mean(gain, axis=0), np.mean(kl, axis=0), np.mean(lengths), dict(zip(TYPES, gain))
    compare(row, want, TYPES)
    assert row["gain"]["se"] == pytest.approx(mean_se(want[0])["se"], abs=1e-6) and abs(np.array(kl)).max() > 0.1


def in_context(pairs, context=64, temperature=1.0, examples=4):
    """What served_in_context gives on the pairs, at the first prompt that a policy would see: None, or the prompts."""
    config = types.SimpleNamespace(context=context)
    task = CompletionTask(types.SimpleNamespace(config=config, unembedding=None), [Pair([9], [], [])],
                          Sampling(3, 0, temperature))
    tokenizer, seen = types.SimpleNamespace(bos=7, eos=0, encode=lambda text: [8]), []

    def sample(policies, task, *rest):
        seen.extend(pair.prompt for pair in task.prompts)
        return [[[1, 0]] * len(task.prompts)], torch.zeros(1, len(task.prompts))

    def logp(model, pairs, dtype):
        return types.SimpleNamespace(logp=torch.zeros(len(list(pairs)), 1, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_context_module, "sample", sample)
        patch.setattr(in_context_module, "compute_reference", logp)
        found = in_context_module.served_in_context(pairs, TYPES, examples, task, tokenizer,
                                                    lambda ids: torch.zeros(1, 2), torch.zeros(1, 2), torch.float32)
    return found and seen


def test_in_context_needs_users_of_each_type_and_room():
    """Caught: users of fewer pairs, or a type without users, which would end with a traceback; a prompt longer than the
    context; the start token once an example; a KL at another temperature than that of sampling."""
    pairs = [Pair([7, 2], [3 + n % 2, 0], [5, 0], user=f"u{n % 2}", annotator=TYPES[n % 2]) for n in range(8)]
    shown = [7, *[2, 3, 8] * 4, 9], [7, *[2, 4, 8] * 4, 9]
    assert in_context(pairs) == [*shown] == in_context(pairs, context=len(shown[0]) + 3)
    assert in_context(pairs, context=len(shown[0]) + 2) is None
    assert in_context(pairs[:7]) is None                                    # u1 has three
    assert in_context([pair for pair in pairs if pair.annotator == "first"]) is None
    assert in_context(pairs, examples=0) is None and len(in_context(pairs, examples=2)[0]) == 8
    assert in_context(pairs, temperature=0.5) is None                       # the log-probs are at temperature 1


def test_examples_in_context_are_of_a_run_with_all_types(monkeypatch):
    """Caught: examples from the first run by name; if it is a policy for one known type, the baseline in context was
    missing without a word."""
    shown = []
    plans = [types.SimpleNamespace(pairs=[Pair([1], [2], [3], annotator=kind) for kind in of])
             for of in (TYPES[:1], TYPES)]
    runs = [types.SimpleNamespace(plan=plan, experts=types.SimpleNamespace(dtype=torch.float32)) for plan in plans]
    monkeypatch.setattr(served, "prompt_features", lambda *_: None)
    monkeypatch.setattr(served, "rows_of_runs", lambda *_: [])
    monkeypatch.setattr(served, "served_in_context", lambda pairs, *_: shown.extend(pair.annotator for pair in pairs))
    task = CompletionTask(None, [Pair([9], [], [])], Sampling(3, 0))
    tokenizer = types.SimpleNamespace(bos=None, decode=str)
    inputs = types.SimpleNamespace(runs=runs, dataset={"annotators": TYPES, "rewards": TYPES}, tokenizer=tokenizer)
    scores = lambda texts: dict.fromkeys(TYPES, [0.0] * len(texts))  # noqa: E731
    assert served.own_reward_rows(inputs, task, {"reference": [[1]]}, EvalConfig(""), {}, scores) == []
    assert shown == TYPES


def test_pairs_without_users_have_no_row_in_context():
    """Caught: an evaluation that ends with an error, once everything is computed, because some pairs name no user."""
    pairs = [Pair([7, 2], [3, 0], [5, 0], annotator=TYPES[n % 2]) for n in range(8)]
    assert in_context(pairs) is None
    named = [dataclasses.replace(pair, user=f"u{n % 2}") for n, pair in enumerate(pairs)]
    assert in_context([*named, *pairs]) == in_context(named) is not None


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_known_and_unknown_users_by_hand(job, strength):
    """Caught: another user's responsibilities; sparse weights of the least likely expert; the gate's weights counted
    once a user; all users of one type; types weighted by their number of users."""
    run, gain, ratio, length = by_hand(job, "mixture", strength)
    q, kinds = run.table.exp().numpy(), [run.plan.pairs[unit[0]].annotator for unit in run.plan.units]
    assert sorted(kinds) == ["first"] * 3 + ["second"] * 3 and np.ptp(q[:, 0]) > 0.2
    compare(row_of(job, "mixture", "known users", strength), figures(gain, ratio, length, q, kinds), TYPES)
    best = np.eye(2)[q.argmax(1)]
    compare(row_of(job, "mixture", "known users, sparse", strength), figures(gain, ratio, length, best, kinds), TYPES)
    unknown = figures(gain, ratio, length, [[0.3, 0.7]] * 2, TYPES)
    compare(row_of(job, "mixture", "unknown users", strength), unknown, TYPES)
    compare(row_of(job, "mixture", "new users, 0 pairs known", strength), unknown, TYPES)


def test_weights_of_each_prompt_by_hand(job):
    """A gate on prompts. Caught: the mean weights for all prompts; weights of another prompt."""
    run, gain, ratio, length = by_hand(job, "moe", 1.0)
    reference, tokenizer = load_model(job[2]), load_tokenizer(job[2])
    w = []
    for text in PROMPTS:
        with torch.no_grad():
            f = (reference(torch.tensor([tokenizer.encode(text)]))[0][-1] - run.gate.mean) / run.gate.scale
            w.append(torch.softmax(run.gate.W @ f + run.gate.b, 0).tolist())
    assert np.std(w, axis=0).min() > 0.01
    compare(row_of(job, "moe", "unknown users", 1.0), figures(gain, ratio, length, [w] * 2, TYPES), TYPES)


def test_new_users_by_hand(job):
    """After n known pairs each new user is served under its posterior; a user's pairs in the order of the adaptation
    curve. Caught: other pairs than the curve's; the posterior of another user; evidence without the weights."""
    folder, _, model = job
    run, gain, ratio, length = by_hand(job, "mixture", 1.0)
    (_, pairs, h, _), = margins_of([run], [load_model(model)], load_tokenizer(model), folder / "adapt-new.jsonl",
                                   folder / "cache")
    order, users = np.random.default_rng([1, 31]), sorted({pair.user for pair in pairs})
    seen = [order.permutation([i for i, pair in enumerate(pairs) if pair.user == user]).tolist() for user in users]
    for n in (1, 2):
        q = []
        for own in seen:
            like = [w * math.prod(1 / (1 + math.exp(-float(h[i, k]))) for i in own[:n])
                    for k, w in enumerate((0.3, 0.7))]
            q.append([x / sum(like) for x in like])
        kinds = [pairs[own[0]].annotator for own in seen]
        row = row_of(job, "mixture", f"new users, {n} pairs known", 1.0)
        compare(row, figures(gain, ratio, length, q, kinds), TYPES)
        assert np.ptp(q, axis=0).max() > 1e-3


def test_each_strength_begins_at_the_experts(job):
    """One run alone, at 0.2 and then at 0.5, has the rows of 1 and 0.5 of the evaluation of all. Caught: experts left
    at a strength, so that the next one is a part of it; rows that depend on the other runs."""
    folder, results, _ = job
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "data.annotators.rewards", types.SimpleNamespace(score=score))
        patch.setattr(evaluation, "write_report", lambda home: None)
        patch.setattr(served, "strength_for", lambda kl, reached: kl)
        alone = evaluate(EvalConfig(dir=str(folder / "mixture"), batch=64, limit=3, kl=(0.2, 0.5)))
    whole, rows = ([row for row in found["own_reward"] if row["run"] == "mixture"] for found in (results, alone))
    rows = {(row["users"], row["strength"]): row for row in rows}
    assert {strength for _, strength in rows} == {0.2, 0.5, 1.0} and len(whole) == len(rows) * 2 / 3
    for row in whole:
        found = rows[row["users"], row["strength"]]
        for name in ("gain_by_prompt", "kl_by_prompt"):
            assert found[name] == pytest.approx(row[name][:3], abs=1e-5), (name, row["users"], row["strength"])
    for name, row in alone["policies"].items():
        assert row["values"] == results["policies"][name]["values"][:3]


def test_policies_with_the_kl_that_was_asked_for(job):
    """Caught: the KL of one expert, or of unknown users, for that of the users who are served; a run that is carried
    beyond its own KL; rows without their target."""
    folder, results, _ = job
    whole = row_of(job, "adapters", "known users", 1.0)["kl"]
    asked = (0.2 * whole, 0.6 * whole, 2.0 * whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "data.annotators.rewards", types.SimpleNamespace(score=score))
        patch.setattr(evaluation, "write_report", lambda home: None)
        found = evaluate(EvalConfig(dir=str(folder / "adapters"), kl=asked))["own_reward"]
    rows = {row["target"]: row for row in found if (row["run"], row["users"]) == ("adapters", "known users")}
    assert list(rows) == [None, asked[1], asked[0]] and rows[None]["strength"] == 1.0
    assert rows[asked[1]]["kl"] == pytest.approx(asked[1], rel=0.5)
    assert rows[asked[0]]["strength"] < rows[asked[1]]["strength"] < 1 and rows[asked[0]]["kl"] < rows[asked[1]]["kl"]
    assert [row["target"] for row in found if row["run"] == "adapters-soup"] == [None]


def test_policies_with_the_kl_of_the_baseline(job):
    """A mixture that goes farther than DPO has a point where DPO ends. Caught: the comparison there made on a straight
    line between two points that are far apart, below what the mixture gains; a point for the baseline itself."""
    folder, results, _ = job
    whole, ended = row_of(job, "adapters", "known users", 1.0)["kl"], []
    end = served.end_of_baseline
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "data.annotators.rewards", types.SimpleNamespace(score=score))
        patch.setattr(evaluation, "write_report", lambda home: None)
        patch.setattr(served, "end_of_baseline", lambda *given: ended.append(end(*given)) or 0.4 * whole)
        found = evaluate(EvalConfig(dir=str(folder), kl=(0.1 * whole,)))["own_reward"]
    assert ended == [pytest.approx(row_of(job, "dpo", "all users", 1.0)["kl"], abs=1e-4)]
    rows = {row["target"]: row for row in found if (row["run"], row["users"]) == ("adapters", "known users")}
    assert list(rows) == [None, 0.1 * whole, "baseline"]
    assert 0 < rows["baseline"]["strength"] < 1 and rows["baseline"]["kl"] != whole     # KL of five prompts is noisy
    frontiers = {m.name: m for m in frontier.methods({"own_reward": found})}
    assert [p.target for p in frontiers["adapters"].points] == [None, 0.1 * whole, "baseline"]


def test_where_the_baseline_ends():
    """Caught: a soup, or a policy for one type, for the baseline; a row more at a KL that was asked for; none."""
    runs = [types.SimpleNamespace(name=name) for name in ("dpo", "dpo-first", "far")]
    rows = {name: [{"users": users, "kl": kl}] for name, users, kl in (
        ("dpo", "all users", 2.0), ("dpo-first", "type first", 9.0), ("soup", "all users", 8.0),
        ("far", "all users", 3.0))}
    assert served.end_of_baseline(rows, runs, [1.0, 4.0]) == 3.0
    assert served.end_of_baseline(rows, runs, [1.0, 3.2]) is None is served.end_of_baseline(rows, runs[1:2], [1.0])
    rows["dpo"][0]["kl"] = -0.01
    assert served.end_of_baseline(rows, runs[:1], [1.0]) is None


@pytest.mark.parametrize("kl", [(0.0,), (1.0, 1.0), (0.5, -1.5), (math.inf,), (math.nan,)])
def test_a_kl_that_no_policy_has_is_refused(job, kl):
    """Caught: the reference as a row of its own; a row twice."""
    with pytest.raises(InputError) as error:
        evaluate(EvalConfig(dir=str(job[0]), kl=kl))
    assert error.value.option == "kl"


def test_no_rows_without_a_reward_for_each_type(job):
    """Caught: KeyError where dataset.json names types that no reward or utility is of; rows for some types only."""
    inputs = types.SimpleNamespace(dataset={"annotators": ["first", "other"], "rewards": ["first"]}, tokenizer=None,
                                   runs=[])
    task = CompletionTask(None, [], Sampling(1, 0))
    assert served.own_reward_rows(inputs, task, {"reference": []}, EvalConfig(""), {}, None) == []
    inputs.dataset = {"rewards": ["first"]}
    assert served.own_reward_rows(inputs, task, {"reference": []}, EvalConfig(""), {}, None) == []


def test_the_judges_of_a_domain_score_its_prompts():
    """Caught: the judges of another domain; their sum for their mean."""
    found = {"a": [1.0, 2.0, 3.0], "b": [10.0, 20.0, 30.0], "c": [100.0, 200.0, 300.0]}
    judges = {"x": ["a", "b"], "y": ["c"]}
    assert served.own_scores(found, ["x", "y", "x"], judges) == [5.5, 200.0, 16.5]


def test_prompts_of_a_domain_without_judges_have_no_own_reward():
    """Caught: KeyError at a prompt of another domain; completions or log-ratios of another prompt; an order of prompts
    other than the task's; the reference's completions of all prompts."""
    prompts = [Pair([n], [], [], domain="xzyz"[n]) for n in range(4)]
    task, ratio = CompletionTask(None, prompts, Sampling(1, 0)), torch.arange(16.0).view(2, 4, 2)
    done = {"run": ([[[10], [11], [12], [13]], [[20], [21], [22], [23]]], ratio), "reference": [[0], [1], [2], [3]]}
    few, found = served.judged_prompts(task, done, {"x": ["a"], "y": ["b"]})
    assert [p.domain for p in few.prompts] == ["x", "y"] and few.sampling == task.sampling
    assert found["reference"] == [[0], [2]] and found["run"][0] == [[[10], [12]], [[20], [22]]]
    assert torch.equal(found["run"][1], ratio[:, [0, 2]])


def test_each_text_is_scored_once():
    """Caught: a text scored again; the score of another text; an order of texts other than asked; an empty list."""
    seen = []

    def score(texts, names, folder):
        seen.extend(texts)
        return {"length": [float(len(text)) for text in texts], "a": [float(text.count("a")) for text in texts]}

    scores = all_scores(score, {"rewards": ["length", "a"], "utilities": {"u": {"length": 1.0, "a": 2.0}}}, None)
    assert scores(["aa", "b", "aa"]) == {"length": [2.0, 1.0, 2.0], "a": [2.0, 0.0, 2.0], "u": [6.0, 1.0, 6.0]}
    assert scores(["ccc", "b"]) == {"length": [3.0, 1.0], "a": [0.0, 0.0], "u": [3.0, 1.0]}
    assert scores(["b"])["u"] == [1.0] and seen == ["aa", "b", "ccc"]


def test_utilities_are_weighted_sums():
    """Caught: weights left out; a reward lost; types that see each other's weights."""
    scores = {"a": [1.0, 2.0], "b": [10.0, 20.0]}
    got = with_utilities(scores, {"u": {"a": 2.0, "b": -1.0}, "v": {"b": 0.5}})
    assert got == scores | {"u": [-8.0, -16.0], "v": [5.0, 10.0]}
    assert with_utilities(scores, {}) == scores and scores == {"a": [1.0, 2.0], "b": [10.0, 20.0]}


def stub(table=((0.9, 0.1), (0.2, 0.8)), kinds=("first", "second"), new={}):
    """A run of two experts with the users of `table`, what it completes, and whom it serves: three prompts."""
    pairs = [Pair([1], [2], [3], user=f"u{n}", annotator=kind) for n, kind in enumerate(kinds)]
    run = types.SimpleNamespace(name="run", config=types.SimpleNamespace(experts=2, latent="user"),
                                plan=types.SimpleNamespace(units=[[n] for n in range(len(kinds))], pairs=pairs),
                                table=torch.tensor(table).log())
    generator = torch.Generator().manual_seed(0)
    values, ratio = (torch.randn(2, 3, 2, generator=generator) for _ in range(2))
    completed = served.Completed(values, ratio, torch.tensor([[4.0, 9.0, 2.0], [7.0, 1.0, 8.0]]))
    return run, completed, served.Users(TYPES, [], torch.zeros(0), new, torch.zeros(3, 2))


def test_lengths_are_those_of_the_texts_that_are_served(monkeypatch):
    """Each prompt has weights of its own, and one type has more users. Caught: the mean weights times the mean lengths;
    a type that counts by its number of users, unlike in the gain; the length of one expert."""
    w = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    monkeypatch.setattr(served, "weights", lambda *_: w.log())
    table = ((1.0, 0.0), (0.2, 0.8), (0.4, 0.6))
    run, completed, users = stub(table, ("first", "second", "second"))
    rows, length = served.served_rows(run, completed, users), completed.length
    assert rows["unknown users"]["length"] == pytest.approx(float((w.T * length).sum(0).mean()))
    each = [sum(q * float(long.mean()) for q, long in zip(row, length)) for row in table]
    assert rows["known users"]["length"] == pytest.approx((each[0] + (each[1] + each[2]) / 2) / 2)
    assert rows["known users, sparse"]["length"] == pytest.approx(float(length.mean()))


@pytest.mark.parametrize("names", [["first", "first"], [None, None], ["first", "stranger"]], ids=str)
def test_new_users_of_some_types_only_have_no_row(names):
    """Caught: an evaluation that ends with a traceback, once everything is computed, because the file of new users has
    no user of some type, or does not say the types."""
    run, completed, users = stub(new={"run": {1: (torch.zeros(2, 2) - math.log(2), names)}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "weights", lambda *_: torch.zeros(3, 2) - math.log(2))
        assert set(served.served_rows(run, completed, users)) == {"unknown users", "known users", "known users, sparse"}
