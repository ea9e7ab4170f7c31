"""What a served run offers, against evaluation on files and against plain loops. Docstrings name the faults that each
test was seen to fail on."""

import json
import math
import shutil

import numpy as np
import pytest
import served_jobs
import tinyjob
import torch
from served_jobs import made, mixture, served  # noqa: F401

from mixdpo.config import InputError
from mixdpo.evaluation.heldout import margins_of
from mixdpo.evaluation.inputs import read_prompts
from mixdpo.models.weights import load_model
from mixdpo.runs.load_run import Unfinished, load_run
from mixdpo.runs.reference import load_references
from mixdpo.serving import policies
from mixdpo.serving.policies import ServedRun, choices, references_of, token_texts
from mixdpo.serving.trunks import RowLoRA
from mixdpo.text.tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "m"}]


def model_of(served, name):
    """A policy as evaluation has it: (model, unembedding)."""
    if name == "reference":
        return load_model(served.run.config.model), None
    return served.dpo.experts.policy(0) if name == "dpo" else served.run.experts.policy(int(name[-1]))


@torch.no_grad()
def slow_logps(served, name, prompt, completion):
    """One token at a time, each from a pass over the text before it."""
    model, head = model_of(served, name)
    head, found = model.unembedding if head is None else head, []
    for t, token in enumerate(completion):
        logits = model(torch.tensor([prompt + completion[:t]]))[0, -1] @ head.T
        found.append(torch.log_softmax(logits.double(), -1)[token].item())
    return found


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_against_loops(served):
    """Log-probs under every policy, and the posterior by enumeration: w_k times the product of the tokens before.
    Faults: log-probs shifted by one place; an adapter or a head of another expert; a posterior after the token in the
    place of the one before it; weights left out; the last one missing."""
    prompt, completion = [109, 110, 111], [98, 120, 97, 195, 100, 256, 99]
    log_w = torch.tensor([0.8, 0.2]).log()
    scores = served.scores(prompt, completion, log_w)
    assert list(scores.logps) == served.names == ["reference", "expert-0", "expert-1", "dpo"]
    want = {name: slow_logps(served, name, prompt, completion) for name in served.names}
    for name in served.names:
        assert scores.logps[name] == pytest.approx(want[name], abs=2e-4)
    sums = {round(sum(each), 2) for each in want.values()}
    assert len(sums) == 4, "policies must differ"
    assert len(scores.posterior) == len(completion) + 1
    for t, posterior in enumerate(scores.posterior):
        joint = [w * math.exp(sum(want[f"expert-{k}"][:t])) for k, w in enumerate((0.8, 0.2))]
        assert posterior == pytest.approx([each / sum(joint) for each in joint], abs=2e-4)
    totals = torch.tensor([sum(scores.logps[f"expert-{k}"]) for k in range(2)])
    assert scores.posterior[-1] == pytest.approx(torch.softmax(log_w + totals, -1).tolist(), abs=1e-5)
    assert "".join(scores.tokens) == served.tokenizer.decode(completion)


def test_scores_of_nothing_and_of_too_much(made):
    """Faults: a text beyond the context."""
    served, log_w = made.served("lora"), torch.tensor([0.25, 0.75]).log()
    empty = served.scores([97], [], log_w)
    assert empty.tokens == [] and all(each == [] for each in empty.logps.values())
    assert empty.posterior == [pytest.approx([0.25, 0.75])]
    served.scores([97], [98] * 63, log_w)
    for prompt, completion in (([97], [98] * 64), ([], [98])):
        with pytest.raises(ValueError, match="together"):
            served.scores(prompt, completion, log_w)


def test_texts_of_tokens_join_to_the_text(made):
    """Characters of several tokens, halves of characters, bytes that are none, special and unknown ids.
    Faults: each token decoded alone; an unfinished character dropped at the end."""
    tokenizer = made.served("heads").tokenizer
    rng = np.random.default_rng(0)
    texts = ["aé漢🙂b".encode(), b"\xf0\x9f\x99", b"\xff\xc3\x28\xe6\xbc", bytes(rng.integers(0, 256, 3000).tolist())]
    for text in texts:
        pieces = token_texts(tokenizer, text)
        assert len(pieces) == len(text) and "".join(pieces) == text.decode(errors="replace")
    assert token_texts(tokenizer, "é".encode()) == ["", "é"]
    for ids in ([97, 256, 195], [97, 9999, 98], []):
        assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


# --- as evaluation has it ---------------------------------------------------------------------------------------------


def held_out(run, path, records):
    """evaluation's margins and weights of records: h (P,K), log w (P,K)."""
    references, tokenizer = load_references(run.config, "cpu")
    _, pairs, h, log_w = next(margins_of([run], references, tokenizer, tinyjob.write(path, records), path.parent / "c"))
    return pairs, h, log_w


def test_margins_equal_evaluations(mixture, tmp_path):
    """Also of truncated texts. Faults: the end token left out; beta left out; the reference of another expert."""
    served, records = ServedRun.load(mixture), tinyjob.make_records(users=2, each=2, seed=7)
    records[0] |= {"prompt": "mnop" * 9, "chosen": "wxyz" * 5}
    records[1]["rejected"] = "é" * 9
    _, h, _ = held_out(served.run, tmp_path / "held.jsonl", records)
    for record, want in zip(records, h):
        got = served.margins(record["prompt"], record["chosen"], record["rejected"])
        assert got.dtype == torch.float32 and torch.allclose(got, want, atol=2e-4), (got, want)
        assert torch.allclose(served.margins(record["prompt"], record["rejected"], record["chosen"]), -want, atol=2e-4)
    assert len({round(x, 3) for x in h.flatten().tolist()}) == h.numel()


def test_margins_of_conversations_with_label_noise_and_several_references(tmp_path):
    """Faults: the response without the answer's end of turn; the noise left out; the first reference for all."""
    models = [tinyjob.make_model(tmp_path / name, seed=n, special=served_jobs.SPECIAL, scale=8.0, context=160)
              for n, name in enumerate("ab")]
    records = [r | {"prompt": [{"role": "user", "content": r["prompt"]}]}
               | {side: [{"role": "assistant", "content": r[side]}] for side in ("chosen", "rejected")}
               for r in tinyjob.make_records(users=6, each=4)]
    options = dict(sharing="models", start="none", label_noise=0.2, latent="user", max_prompt=90, max_response=20)
    run = tinyjob.run(tmp_path, ",".join(map(str, models)), records, name="chat", lr=0.02, beta=0.5, **options)
    served = ServedRun.load(run)
    assert served.dpo is None and len(served.trunks) == 3 and len(served.references) == 2
    _, h, log_w = held_out(served.run, tmp_path / "held.jsonl", records[:4])
    for record, want in zip(records, h):
        got = served.margins(record["prompt"], record["chosen"][0]["content"], record["rejected"][0]["content"])
        assert torch.allclose(got, want, atol=2e-4), (got, want)
    assert (h.abs() <= math.log(4) + 1e-6).all()                            # log((1 - 0.2) / 0.2)
    assert slow_logps_of_first(served) == pytest.approx(served.scores([97], [98, 99], log_w[0]).logps["reference"],
                                                        abs=2e-4)


def slow_logps_of_first(served):
    model = load_model(served.run.config.models[0])
    logps = torch.log_softmax(model(torch.tensor([[97, 98]]))[0] @ model.unembedding.T, -1)
    return [logps[0, 98].item(), logps[1, 99].item()]


def test_margins_refuse_what_training_refuses(made):
    """Faults: two equal responses; an empty one; prompt and response beyond the context."""
    served = made.served("frozen")
    for prompt, chosen, rejected, match in (
            ("m", "ab", "ab", "same ids"), ("m", "", "ab", "empty"), ("m", "a" * 12, "a" * 11, "first 10 ids"),
            ("", "a", "b", "empty"), ([], "a", "b", "roles"), ([{"role": [], "content": "a"}, *CHAT], "a", "b", "role"),
            (CHAT * 2, "a", "b" * 3, "turn too long")):
        with pytest.raises(InputError, match=match):
            served.margins(prompt, chosen, rejected)
    long = made.served("heads")
    long.max_prompt, before = 100, long.max_prompt
    with pytest.raises(InputError, match="context"):
        long.margins("m" * 62, "ab", "c")
    long.max_prompt = before


GATES = {"fixed": dict(weights="0.3,0.7"), "linear": {}, "mlp": dict(gate_features="mean"), "user": {},
         "prompt-user": {}, "random": {}, "domain": {}}


@pytest.mark.parametrize("gate", GATES)
def test_weights_equal_evaluations(tmp_path, model_dir, gate):
    """Of each gate, for a user and a domain that nobody knows. Faults: the weights of the first training user; the mean
    state for the last one; the domain of the first pair."""
    records = [r | {"domain": r["annotator"]} for r in tinyjob.make_records(users=6, each=2)]
    latent = dict(latent="user") if gate == "user" else {}
    run = tinyjob.run(tmp_path, model_dir, records, gate=gate, start="none", **latent, **GATES[gate],
                      **dict(gate_lr=0.3) if gate not in ("fixed", "random", "domain") else {}, epochs=4)
    served = ServedRun.load(run)
    new = [r | {"user": "nobody", "domain": "nowhere"} for r in tinyjob.make_records(users=2, each=2, seed=3)]
    pairs, _, want = held_out(served.run, tmp_path / "held.jsonl", new)
    for pair, row in zip(pairs, want):
        got = served.log_w(pair.prompt)
        assert got.shape == (2,) and got.dtype == torch.float32 and torch.allclose(got, row, atol=1e-4), (got, row)
    by_prompt = len({round(x, 3) for x in want[:, 0].tolist()}) > 1
    assert by_prompt == (gate in ("linear", "mlp", "prompt-user", "random"))
    assert (gate == "domain") <= (served.log_w([97]).exp().tolist() == pytest.approx([0.5, 0.5]))


def test_known_users(made, tmp_path, model_dir):
    """Faults: the row of another user; a user of a mixture of pairs; NaN for a user that no step drew."""
    served = made.served("models")
    for g, unit in enumerate(served.run.plan.units):
        assert torch.equal(served.known_user(served.run.plan.pairs[unit[0]].user), served.run.table[g])
    assert len({tuple(row) for row in served.run.table.tolist()}) > 1
    assert served.known_user("nobody") is None
    kept, served.run.table[1] = served.run.table[1].clone(), torch.nan
    assert served.known_user(served.run.plan.pairs[served.run.plan.units[1][0]].user) is None
    served.run.table[1] = kept
    of_pairs = ServedRun.load(tinyjob.run(tmp_path, model_dir, tinyjob.make_records(users=4, each=2)))
    assert of_pairs.known_user("u0") is None


def test_a_private_run_knows_no_user(tmp_path, model_dir):
    """A user of its data gets the answers of a stranger. Fault: the responsibilities of training users, which are
    computed without noise; GET /v1/users/NAME then tells who was trained on."""
    served = ServedRun.load(tinyjob.run(tmp_path, model_dir, tinyjob.make_records(users=8, each=2), latent="user",
                                        epsilon=8.0, privacy_unit="user", delta=0.01))
    assert "u0" in served.users and not served.run.table[served.users["u0"]].isnan().any()
    assert all(served.known_user(name) is None for name in served.users)


def test_prompts_are_encoded_as_in_evaluation(made, tmp_path):
    """Texts and conversations, long ones too, and what ends their answers. Faults: a prompt not truncated, or from the
    wrong end; the end of a text for a conversation."""
    served = made.served("frozen")
    texts = ["m", "mnop é", "abcdefghijklmnopqrst", " "]
    chats = [CHAT, [{"role": "system", "content": None}, *CHAT],
             [{"role": "user", "content": "x" * 80}, {"role": "assistant", "content": "y"}, *CHAT]]
    served.max_prompt, before = 64, served.max_prompt
    for kind, prompts in enumerate((texts, chats)):
        rows = [[{"role": m["role"], "content": m["content"] or ""} for m in p if m["content"]] if kind else p
                for p in prompts]
        tinyjob.write(tmp_path / "prompts.jsonl", [{"prompt": row} for row in rows])
        pairs, end = read_prompts(tmp_path / "prompts.jsonl", served.tokenizer, 64, 0)
        assert [served.encode(prompt) for prompt in prompts] == [(pair.prompt, end) for pair in pairs]
    served.max_prompt = before
    assert served.encode("abcdefghijklmnopqrst")[0] == list(b"ijklmnopqrst")
    for prompt in ("", 5, None, "a\ud800", [], ["x"], [{"role": "user"}], [{"role": ["user"], "content": "a"}, *CHAT],
                   [{"role": "assistant", "content": "a"}], [{"role": "user", "content": 5}]):
        with pytest.raises(InputError):
            served.encode(prompt)


def test_a_run_without_a_chat_template(tmp_path, model_dir):
    """Faults: chat is true; an error that is no InputError."""
    served = ServedRun.load(tinyjob.run(tmp_path, model_dir, tinyjob.make_records(users=2, each=2), experts=1))
    assert not served.chat and (served.K, served.names) == (1, ["reference", "expert-0"])
    assert served.encode("m") == ([109], tinyjob.EOS) and served.log_w([109]).tolist() == [0.0]
    assert served.scores([109], [98], torch.zeros(1)).posterior == [[1.0], [1.0]]
    with pytest.raises(InputError, match="chat template"):
        served.encode(CHAT)


# --- memory and dtype -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["heads", "lora", "models", "frozen"])
def test_weights_are_shared_in_float32_and_cast_in_bfloat16(made, tmp_path, kind):
    """Faults: a copy of every model; a cast that changes the run's own parameters; a run that computes in bfloat16 and
    is served so on a CPU, or in float32 on a GPU."""
    served = made.served(kind)
    own = {p.data_ptr() for p in [*served.run.experts.parameters(), *served.dpo.experts.parameters()]}
    own |= {p.data_ptr() for model in served.references for p in model.parameters()}
    for trunk in served.trunks:
        adapters = {id(p) for m in trunk.model.modules() if isinstance(m, RowLoRA) for p in (m.A, m.B)}
        assert all(p.data_ptr() in own for p in trunk.model.parameters() if id(p) not in adapters)
        assert not any(p.requires_grad for p in trunk.model.parameters())
    (tmp_path / "bf16").mkdir()
    path = served_jobs.make_folder(tmp_path / "bf16", kind, dtype="bfloat16")
    assert {p.dtype for trunk in ServedRun.load(path).trunks for p in trunk.model.parameters()} == {torch.float32}
    loaded = load_run(path, "cpu", "")                                      # as on a GPU
    low = ServedRun(loaded, references_of(loaded, "cpu"), load_tokenizer(loaded.config.models[0]), None)
    assert {p.dtype for p in low.run.experts.parameters()} == {torch.float32}
    assert {p.dtype for trunk in low.trunks for p in trunk.model.parameters()} == {torch.bfloat16}
    assert {policy.head.dtype for policy in low.policies.values()} == {torch.bfloat16}
    completion = [98, 120, 97, 100]
    got = low.scores([109, 110], completion, torch.zeros(2)).logps
    for name in low.names:
        want = slow_logps(low, name, [109, 110], completion)
        assert got[name] == pytest.approx(want, abs=0.5) and got[name] != pytest.approx(want, abs=1e-5)
    run = load_run(path, "cpu", "")
    for a, b in zip(run.experts.parameters(), low.run.experts.parameters()):
        assert torch.equal(a, b)


# --- which runs -------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_mixture_and_dpo(mixture, capsys):
    """Faults: the first run by name; DPO itself; two trunks where one is enough."""
    for path in (mixture, mixture.parent):
        served = ServedRun.load(path)
        assert (served.name, served.dpo.name) == (mixture.name, "dpo") and served.K == 2
        assert len(served.trunks) == {"heads": 3, "full": 3, "frozen": 1, "lora": 1, "models": 4}[mixture.name]
        assert (served.context, served.max_prompt, served.max_response, served.chat) == (64, 12, 10, True)
    assert ServedRun.load(str(mixture.parent / "dpo")).names == ["reference", "expert-0"]


def copied(source, target, **changes):
    """A copy of a run with changes in its config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_which_run_is_served(made, tmp_path, capsys):
    """Faults: DPO on other pairs, lengths or another dtype; `a-dpo` before `dpo`; the others not named; a run beside
    whose options cannot be read ends the program."""
    mixture = made.path("frozen")
    first, dpo = copied(mixture, tmp_path / "b"), mixture.parent / "dpo"
    copied(mixture, tmp_path / "c")
    (copied(mixture, tmp_path / "a") / "config.json").write_text("{")
    (copied(mixture, tmp_path / "a0") / "config.json").unlink()
    for name, changes in (("a1", dict(data="other.jsonl")), ("a2", dict(max_prompt=13)), ("a3", dict(dtype="bfloat16")),
                          ("a4", dict(columns="user=worker")), ("a5", dict(model="gpt2"))):
        copied(dpo, tmp_path / name, **changes)
    served = ServedRun.load(tmp_path)
    assert served.name == "b" and served.dpo is None
    assert "serving b" in (out := capsys.readouterr().out) and out.strip().endswith("serve it: c")
    copied(dpo, tmp_path / "a-dpo")
    assert ServedRun.load(tmp_path).dpo.name == "a-dpo"
    copied(dpo, tmp_path / "dpo")
    assert ServedRun.load(first).dpo.name == "dpo"
    for path in (tmp_path / "dpo" / "checkpoint").iterdir():
        path.write_bytes(path.read_bytes()[:100])                           # damaged
    assert ServedRun.load(first).dpo is None and "served without it" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "dpo")
    alone = tmp_path / "alone"
    alone.mkdir()
    copied(dpo, alone / "c"), copied(dpo, alone / "dpo")
    assert [path.name for path in choices(alone)] == ["dpo", "c"]
    assert (ServedRun.load(alone).names, ServedRun.load(alone).name) == (["reference", "expert-0"], "dpo")


def test_an_unfinished_run_is_skipped(made, tmp_path, monkeypatch, capsys):
    """Faults: it is served; it ends the program though there is another."""
    one, two = copied(made.path("frozen"), tmp_path / "a"), copied(made.path("frozen"), tmp_path / "b")
    load = policies.load_run

    def load_run(path, device, data_folder):
        if path == one:
            raise Unfinished("is unfinished", file=path)
        return load(path, device, data_folder)

    monkeypatch.setattr(policies, "load_run", load_run)
    assert ServedRun.load(tmp_path).name == "b" and "is unfinished" in capsys.readouterr().out
    shutil.rmtree(two)
    with pytest.raises(Unfinished):
        ServedRun.load(tmp_path)


def test_a_run_whose_files_changed_is_refused(tmp_path, model_dir):
    """load_run's own errors: data that changed or are gone, another model, no run. Faults: a traceback."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    run = tinyjob.run(tmp_path, model, tinyjob.make_records(users=2, each=2))
    data = tmp_path / "run.jsonl"
    text = data.read_text()
    data.write_text(text.replace("u0", "u9"))
    with pytest.raises(InputError, match="another data"):
        ServedRun.load(run)
    data.unlink()
    with pytest.raises(InputError, match="run.jsonl"):
        ServedRun.load(run)
    data.write_text(text)
    ServedRun.load(run)
    tinyjob.make_model(model, seed=5)
    with pytest.raises(InputError, match="another model"):
        ServedRun.load(run)
    with pytest.raises(InputError, match="no run"):
        ServedRun.load(tmp_path / "model")
