"""Peers: other methods for heterogeneous preferences, with the same pairs, encoder and number of passes.

    DPO            minimise - log sigma(h)                                        one policy for all
    EM-DPO         E-phase: z_u = argmax_k [ log eta_k + sum_i log sigma(h_ik) ]  i: pairs of user u, or a single pair
                   M-phase: expert k is trained from the reference by DPO on the pairs of its users
    reward heads   h_k = theta_k . (f(y+) - f(y-)),  w(x) = softmax router(f(x))  f: the frozen encoder's mean states
                   minimise - log sum_k w_k sigma(h_k) + alpha sum_k w_k log w_k
    ours           Mix-DPO and MoE-DPO, by train.py
    soup           the mean of our experts' parameters                            one policy

EM-DPO follows Chidambaram et al. 2024 (arXiv 2405.15065), the reward heads follow the first stage of MiCRo (Shen et al.
2025, arXiv 2505.24846); NOTES lists the simplifications. Every policy, expert or DPO, is a full model, so methods
differ in training only.
"""

import copy
import math
import shutil
import time
from pathlib import Path

import torch
from torch import nn

from data.report.pictures import curves
from data.report.tables import NONE, in_ses
from data.studies.aggregate import by, over, pm_of, se_over, table_of
from data.studies.study import Study
from data.studies.worlds import OWN, STEPS, World, fit, judged, look, write
from mixdpo.dpo import mixture_accuracy
from mixdpo.evaluation.adaptation import weights_after
from mixdpo.evaluation.heldout import alignment, margins_of
from mixdpo.evaluation.statistics import adjusted_rand_index, mean_se
from mixdpo.experts import Heads
from mixdpo.fast.backward import minimise
from mixdpo.mixture import e_step, log_marginal
from mixdpo.preferences import read_preferences
from mixdpo.runs.load_run import load_run
from mixdpo.runs.options import TrainConfig
from mixdpo.runs.reference import Source, load_references, reference_of

WORLDS = {"two types of users": {"types": 2}, "two types, told by prompts": {"types": 2, "domains": True},
          "four types of users": {"types": 4}}
SEEDS = {"smoke": 1, "quick": 4, "full": 20}
PASSES, ROUNDS, STARTS = STEPS["epochs"], 5, 5      # STARTS: of the reward heads, as in our linear start
SHOWN = (0, 1, 2, 3, 5)                             # pairs of a new user that are shown; the rest are evaluated
# Best by held-out log-likelihood on eight other worlds; ALPHA depends on whether prompts reveal the type.
HEAD_RATE, ROUTER_RATE, ALPHA = 0.03, 0.01, {True: 0.0, False: 0.5}
MIX = {"start": "linear", "weights": "update"}      # weights are estimated, like eta of EM-DPO
MOE = {"start": "linear", "gate": "linear", "gate_features": "mean", "gate_lr": 0.05}
OURS = {  # key: whether prompts reveal the type; all methods are compared with the last entry
    False: {"Mix-DPO, random start": MIX | {"latent": "user", "start": "dirichlet"}, "Mix-DPO, no users": MIX,
            "MoE-DPO": {"start": "linear", "latent": "user", "gate": "user", "gate_lr": 0.05},
            "Mix-DPO": MIX | {"latent": "user"}},
    True: {"MoE-DPO, random start": MOE | {"start": "dirichlet"}, "Mix-DPO": MIX, "MoE-DPO": MOE},
}
EM, WHOLE, HEADS, SOUP = "EM-DPO", "EM-DPO, whole fits", "reward heads", "soup of ours"


def cells(preset: str) -> list[dict]:
    return [{"world": world, "seed": seed} for seed in range(SEEDS[preset]) for world in WORLDS]


def measure(cell: dict, folder: Path) -> dict:
    world = World(seed=cell["seed"], **WORLDS[cell["world"]])
    write(world, folder)
    *_, ours = ways = OURS[world.domains]
    methods = {"DPO": lambda: one_run(folder, "dpo", experts=1, seed=world.seed),
               EM: lambda: em_dpo(folder, world, "em", 1), WHOLE: lambda: em_dpo(folder, world, "em-whole", PASSES),
               HEADS: lambda: reward_heads(folder, world)}
    methods |= {name: lambda name=name: one_run(folder, name, experts=world.types, sharing="models", seed=world.seed,
                                                **ways[name]) for name in ways}
    methods |= {SOUP: lambda: soup(folder, ours)}
    found = {"truth": says(world, *truth(world))}
    one_run(folder, "warm", experts=1, epochs=1)                            # the first run of a process takes longer
    for name, train in methods.items():
        shutil.rmtree(folder / "cache", ignore_errors=True)                 # each computes its own reference
        began = time.process_time()
        answer = train()
        seconds = time.process_time() - began
        h, log_w, ari = answer(folder / "heldout.jsonl")
        found[name] = says(world, h, log_w) | {"seconds": seconds, "ari": ari}
    found[SOUP]["seconds"] += found[ours]["seconds"]
    return found


# ---- the methods. Each trains, and returns a function: file -> h, log w (P,K), ARIs of its assignments


def one_run(folder: Path, name: str, **options):
    path = fit(folder, name, **options)

    def answer(file: Path):
        found = look(path, file)
        run, several = found.run, found.run.config.experts > 1
        ari = [alignment(run.table, run.plan.units, run.plan.pairs)["ari"]] if several else []          # at the end
        return found.h, found.log_w, ari
    return answer


def em_dpo(folder: Path, world: World, name: str, epochs: int):
    """ROUNDS times: assign every unit to its likeliest expert (at first at random), then K runs of DPO."""
    K, of, lines = world.types, judged(world), (folder / "train.jsonl").read_text().splitlines(keepends=True)
    unit = torch.arange(len(lines)) if world.domains else torch.from_numpy(of.user)        # (N,) unit of each pair
    kind = torch.from_numpy(of.type[:: 1 if world.domains else world.each])                # (U,) true type of each unit
    z = torch.randint(K, kind.shape, generator=torch.Generator().manual_seed(world.seed))
    runs, ari, size = [None] * K, [], STEPS["batch"] // K                   # as many steps a pass as one run makes
    log_eta = torch.full((K,), -math.log(K))                                # of the experts, as the next E-phase has it
    for n in range(ROUNDS):
        if n > 0:                                                           # E-phase
            h = torch.cat([look(run, folder / "train.jsonl").h for run in runs], 1)        # (N,K)
            z = e_step(log_eta, h, unit)[1].argmax(1)                       # (U,)
        log_eta = torch.log((z.bincount(minlength=K) + 1) / (len(z) + K))   # + 1: an expert without units can recover
        ari.append(adjusted_rand_index(z.tolist(), kind.tolist()))
        for k in range(K):                                                  # M-phase
            own, part = [line for line, its in zip(lines, z[unit].tolist()) if its == k], f"{name}-{n}-{k}"
            if own:                                                         # an expert without units is unchanged
                (folder / f"{part}.jsonl").write_text("".join(own))
                runs[k] = fit(folder, part, experts=1, data=f"{part}.jsonl", epochs=epochs, batch=size, micro=size,
                              warmup=2 * epochs, seed=world.seed)           # a tenth of the steps, as in one run

    def answer(file: Path):
        h = torch.cat([look(run, file).h for run in runs], 1)
        return h, log_eta.expand_as(h), ari
    return answer


class RewardHeads(nn.Module):
    """K linear rewards and a router: x (P,C) chosen minus rejected, c (P,C) prompts -> h, log w (P,K)."""

    def __init__(self, x: torch.Tensor, c: torch.Tensor, experts: int):
        super().__init__()
        self.size, self.mean = x.square().mean(0).sqrt(), c.mean(0)
        self.deviation = c.std(0) * math.sqrt(c.shape[1])                   # prompts have length 1, about: gates.py
        self.theta = nn.Parameter(0.1 * torch.randn(experts, x.shape[1]))
        self.router = nn.Sequential(nn.Linear(c.shape[1], 128), nn.ReLU(), nn.Linear(128, experts))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x / self.size @ self.theta.T, torch.log_softmax(self.router((c - self.mean) / self.deviation), dim=-1)


def reward_heads(folder: Path, world: World):
    """Of STARTS random starts the one that ends with the least loss on the training pairs."""
    def states(file: Path):
        config = TrainConfig(str(file), str(folder / "model"), "")
        models, tokenizer = load_references(config, "cpu")
        pairs = read_preferences(file, tokenizer, config.max_prompt, config.max_response)
        ref = reference_of(Source(file, pairs, config), models, tokenizer, torch.float32, folder / "cache")
        return ref.features[:, 0] - ref.features[:, 1], ref.prompt[:, 1]

    def loss(heads, x, c):
        h, log_w = heads(x, c)
        return (ALPHA[world.domains] * (log_w.exp() * log_w).sum(1) - log_marginal(log_w, h)).mean()

    (x, c), tried = states(folder / "train.jsonl"), []
    torch.manual_seed(world.seed)
    for _ in range(STARTS):
        tried.append(heads := RewardHeads(x, c, world.types))
        optimizer = torch.optim.Adam([{"params": [heads.theta], "lr": HEAD_RATE},
                                      {"params": heads.router.parameters(), "lr": ROUTER_RATE}])
        for batch in (b for _ in range(PASSES) for b in torch.randperm(len(x)).split(STEPS["batch"])):
            minimise(loss(heads, x[batch], c[batch]), optimizer, math.inf)
    best = min(tried, key=lambda heads: loss(heads, x, c).item()).requires_grad_(False)
    return lambda file: (*best(*states(file)), [])


def soup(folder: Path, name: str):
    """The experts of a finished run as one model, the mean of their parameters."""
    run = load_run(folder / name, "cpu", "")
    mean = copy.deepcopy(run.experts.models[0])
    with torch.no_grad():
        for p, *own in zip(mean.parameters(), *(model.parameters() for model in run.experts.models)):
            p.copy_(torch.stack(own).mean(0))
    run.experts = Heads(mean, 1)

    def answer(file: Path):
        h = next(margins_of([run], *load_references(run.config, "cpu"), file, folder / "cache"))[2]     # (P,1)
        return h, torch.zeros_like(h), []
    return answer


def truth(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """True margins and weights, the upper bound of all methods except by chance."""
    of = judged(world, heldout=True)
    h = of.gaps(world.rewards())
    own_domain = torch.eye(world.types)[torch.from_numpy(of.domain)] > 0          # (P,K)
    w = torch.ones(h.shape) / world.types
    if world.domains:
        w = torch.where(own_domain, OWN, (1 - OWN) / (world.types - 1))
    return h, w.log().to(h)


# ---- figures on held-out pairs


def says(world: World, h: torch.Tensor, log_w: torch.Tensor) -> dict:
    """Log-likelihoods ll (M5) and ll_user (M11), nats a pair; accuracy and worst type's accuracy after five shown
    pairs, `blind` after none, `curve` by pairs shown. Users are consecutive blocks of world.each pairs."""
    kind, users = torch.from_numpy(judged(world, heldout=True).type), range(0, len(h), world.each)

    def after(shown: int, evaluated: range) -> tuple[torch.Tensor, torch.Tensor]:
        """log p of each user's pairs `evaluated` when its first `shown` are known; and which pairs these are."""
        index = [[a + i for i in evaluated] for a in users]
        w = torch.cat([weights_after(log_w, h, [*range(a, a + shown)], its) for a, its in zip(users, index)])
        return log_marginal(w, h[(every := torch.tensor(index).flatten())]), every

    def right(log_p: torch.Tensor, index: torch.Tensor) -> tuple[float, float]:
        r = mixture_accuracy(log_p)
        return r.mean().item(), min(r[kind[index] == t].mean().item() for t in range(world.types))

    log_p = log_marginal(log_w, h)
    if world.domains:
        ll_user, curve = log_p.mean().item(), [right(log_p, torch.arange(len(h)))]
    else:       # pair after pair, which is M11's chain; a router's w differs between a user's prompts, and has no other
        ll_user = sum(after(n, range(n, n + 1))[0].mean().item() for n in range(world.each)) / world.each
        curve = [right(*after(n, range(SHOWN[-1], world.each))) for n in SHOWN]
    return {"ll": log_p.mean().item(), "ll_user": ll_user, "blind": curve[0][0], "accuracy": curve[-1][0],
            "worst": curve[-1][1], "curve": [worst for _, worst in curve]}


# ---- the page


def cost(name: str, K: int) -> list[str]:
    """Passes over the pairs in training; passes of one policy over all pairs, forward and backward, and forward."""
    if name in (EM, WHOLE):
        passes = ROUNDS * (1 if name == EM else PASSES)
        return [str(passes), str(passes), str((ROUNDS - 1) * K)]
    if name == HEADS:
        return [f"{STARTS} x {PASSES}", "0", "0"]
    return {"truth": [NONE] * 3, "DPO": [str(PASSES)] * 2 + ["0"]}.get(name, [str(PASSES), str(PASSES * K), str(K)])


def less(found: list[dict], name: str, other: str, what: str) -> dict:
    """Mean paired difference over worlds."""
    return mean_se([f[name][what] - f[other][what] for f in found])


def stands(found: list[dict], name: str, other: str, what: str, it: str) -> str:
    """Where `name` is beside `other`, which the sentence calls `it`."""
    f = less(found, name, other, what)
    if not f["se"] > 0:
        return f"at a difference from {it} of ({f['mean']:+.3f})"                      # one world has no standard error
    t = f["mean"] / f["se"]
    word = "ahead of" if t > 2 else "behind" if t < -2 else "within two SEs of"
    return f"{word} {it} ({f['mean']:+.3f}, {t:+.1f} SEs)"


def tables(found: list[dict], what: dict[str, str], ours: str, K: int) -> list[str]:
    """Tables of all methods, mean over worlds ± SE, and of paired differences to ours."""
    reached, differences = [], []
    for name in found[0]:
        of = [f[name] for f in found]
        seconds = NONE if name == "truth" else f"{over(of, 'seconds')['mean']:.1f}"
        reached.append([name, *cost(name, K), seconds, *(pm_of(over(of, figure)) for figure in what)])
        if name != ours:
            gaps = [less(found, name, ours, figure) for figure in what]
            differences.append([name, *(f"{pm_of(gap, '+')} ({in_ses(gap)})" for gap in gaps)])
    return [table_of(["method", "passes", "policy passes", "read", "seconds", *what.values()], reached),
            table_of([f"less {ours}'s", *what.values()], differences)]


def reading(world: str, found: list[dict], ours: str, ll: str, domains: bool) -> str:
    """The text on one kind of world; names and words follow from the figures."""
    def mean(name: str, what: str) -> float:
        return over([f[name] for f in found], what)["mean"]

    peers = [name for name in found[0] if name not in ("truth", *OURS[domains])]
    best, fair = (max(peers, key=lambda name: mean(name, what)) for what in (ll, "worst"))
    ari = {name: mean_se([f[name]["ari"][-1] for f in found])["mean"] for name in (EM, WHOLE, ours)}
    later = mean_se([f[WHOLE]["ari"][-1] - f[EM]["ari"][-1] for f in found])
    text = (
        f"{world.capitalize()}: {ours} explains {'held-out choices' if domains else 'choices of new users'} with "
        f"{mean(ours, ll):.3f} nats a pair; the truth would with {mean('truth', ll):.3f}, DPO does with "
        f"{mean('DPO', ll):.3f}. Of the peers {best} explains them best, {stands(found, best, ours, ll, ours)}; for "
        f"the worst annotator {fair} is best, {mean(fair, 'worst'):.3f} against {mean(ours, 'worst'):.3f}, "
        f"{stands(found, fair, ours, 'worst', ours)}. EM-DPO at the same number of passes is "
        f"{stands(found, EM, ours, ll, ours)}, and "
        f"{stands(found, EM, [*OURS[domains]][0], ll, 'ours from a random start')}, which EM-DPO has too. With "
        f"{ROUNDS} times the passes it is {stands(found, WHOLE, EM, ll, 'where it was')}. The ARI of its last "
        f"assignment is {ari[EM]:.2f}, with whole fits {ari[WHOLE]:.2f}; {ours}'s is {ari[ours]:.2f}. ")
    if later["mean"] < -2 * se_over(later):
        text += "Experts that train longer learn a random assignment by heart, and the E-phase confirms it. "
    if max(ari[EM], ari[WHOLE]) < 0.1:
        text += "Units go to the expert that happened to train on them, not to that of their type. "
    text += f"The reward heads are {stands(found, HEADS, 'DPO', ll, 'DPO')}"
    if not domains:
        text += f", and {stands(found, HEADS, 'Mix-DPO, no users', ll, 'ours without users')}, which knows as much"
    return text + (f". The soup, one policy, is {stands(found, SOUP, 'DPO', ll, 'DPO')}, and for the worst annotator "
                   f"{stands(found, SOUP, 'DPO', 'worst', 'it')}.")


NOTES = (
    "Log-likelihood in nats a pair, of held-out pairs (M5) or of all choices of a new user (M11). Accuracy is of "
    f"what a new user gets when {SHOWN[-1]} of its pairs are known "
    f"(`mixdpo/evaluation/adaptation.py`), on its other pairs; the "
    "worst annotator is the type with the lowest accuracy. Means over worlds ± SE, differences in "
    "SEs in brackets. Passes are over the pairs, in training; policy passes those of one policy over all pairs, "
    "forward and backward; read, forward alone, for E-phases. The reference's pass is not counted, nor is our "
    f"linear start, {STARTS} starts on frozen features without a policy; both are in the seconds, of one core, much "
    "of which at this size is the start of a run: EM-DPO starts K in every round. EM-DPO and ours know which "
    "pairs belong to one user; where prompts reveal the type there are no users.\n\n"
    "What is simplified. EM-DPO: the published E-step keeps posteriors, by which the M-step weighs pairs; here each "
    "user is assigned to its likeliest expert, from a random assignment, and the last stage, one policy of least "
    "regret, is left out. Reward heads: MiCRo's first stage, linear heads and a router of 128 hidden units with a "
    f"bonus for its entropy (alpha {ALPHA[False]} as published, and {ALPHA[True]} where prompts tell the type, which "
    f"is better there); the best of {STARTS} starts by its loss; on mean states of a tiny model with random weights, "
    "not on a trained reward model. Its second stage, a router refitted on labelled contexts, is left out, as there "
    "are none: a user's shown pairs weigh heads as they weigh experts. Heads are rewards, not policies: they "
    "need a policy trained on them, which these figures do not include. Their rates are the best by "
    "held-out log-likelihood on eight other worlds; all policies have those of `data/studies/worlds.py`.")


def page(rows):
    parts, readings, shown, rounds = [], [], {}, {}
    for world, found in by(rows, "world").items():
        domains, K = WORLDS[world].get("domains", False), WORLDS[world]["types"]
        *_, ours = OURS[domains]
        of_users = {} if domains else {"ll_user": "of a new user (M11)", "blind": "accuracy, none shown"}
        what = {"ll": "log-likelihood (M5)"} | of_users | {
            "accuracy": "accuracy" if domains else f"accuracy, {SHOWN[-1]} shown", "worst": "worst annotator"}
        readings.append(reading(world, found, ours, "ll" if domains else "ll_user", domains))
        parts += [f"**{world.capitalize()}**", *tables(found, what, ours, K)]
        for name in (EM, WHOLE, ours):
            columns = [mean_se(column) for column in zip(*(f[name]["ari"] for f in found))]
            columns = columns * ROUNDS if name == ours else columns         # known at its end
            rounds.setdefault(world, {})[name] = [(n, f["mean"], se_over(f)) for n, f in enumerate(columns, 1)]
        for name in () if domains else ("truth", "DPO", EM, HEADS, SOUP, ours):
            columns = [mean_se(column) for column in zip(*(f[name]["curve"] for f in found))]
            shown.setdefault(world, {})[name] = [(n, f["mean"], se_over(f)) for n, f in zip(SHOWN, columns)]
    return "\n\n".join([*readings, *parts, NOTES]), {
        "shown": curves(shown, ("pairs shown", "accuracy of the worst annotator")),
        "rounds": curves(rounds, ("round", "ARI of the assignment"))}


STUDY = Study(
    "Peers: other methods on the same pairs",
    "DPO, EM-DPO with hard assignments, reward heads with a router, a soup of expert weights, Mix-DPO and MoE-DPO: on "
    f"the same 1,000 planted pairs, with the same encoder, {PASSES} passes over the pairs where nothing else is said. "
    "Who explains the choices of new people, who serves the worst annotator, and what does it take?",
    cells, measure, page)
