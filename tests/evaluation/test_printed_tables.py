"""mixdpo/evaluation/tables.py: what is printed, from figures written by hand. What each test catches stands in its
docstring."""

import math

import pytest

from mixdpo.evaluation.tables import NONE, all_tables, conclusions, evidence, pm, table, win_rate_tables


def figure(mean, se=0.01, n=8):
    return {"mean": mean, "se": se, "n": n}


def run(log_p, experts=2, kinds=("a", "b")):
    """A run's figures on four pairs of two prompts, with these log-likelihoods under the users' own weights."""
    mean = sum(log_p) / len(log_p)
    return {"types": {kind: {"accuracy": figure(0.6 + 0.1 * n)} for n, kind in enumerate(kinds)}, "experts": experts,
            "accuracy": {kind: [figure(0.5)] * experts for kind in kinds}, "accuracy_all": [figure(0.55)] * experts,
            "own": [None] * experts, "accuracy_mbt": figure(0.6), "accuracy_own": figure(0.7),
            "log_likelihood": figure(-0.7, n=4), "log_likelihood_own": figure(mean), "prompts": 2,
            "log_likelihood_calibrated": figure(mean),
            "by_pair_own": list(log_p), "prompt_of_pair": [0, 0, 1, 1], "user_of_pair_own": ["u", "v", "w", "x"],
            "type_of_pair": (kinds * 4)[:4], "trained_on": [*kinds],
            "effective_experts": 1.5, "alignment_train": {}, "alignment_heldout": {}}


def policy(rewards, base, kl):
    """A policy's figures from two rewards a prompt, of which the first is trained."""
    gain = [mine[0] - other[0] for mine, other in zip(rewards, base)]
    return {"good": figure(0.5), "long": figure(0.5), "trained": figure(sum(r[0] for r in rewards) / len(rewards)),
            "gain": figure(sum(gain) / len(gain)), "kl": figure(kl), "length": figure(6.0), "values": rewards}


def results(**parts):
    return {"preferences": {}, "adapt": {}, "policies": {}, "trained_rewards": ["good"]} | parts


def test_columns_are_aligned():
    """Catches: a heading of several lines at the top of its column instead of at its bottom; a number that does not end
    where its heading ends; widths from the headings alone."""
    got = table("title", ["name", "two\nlines", "n"], [["x", "1.0", "-10.5"], ["a longer name", "2", "3"]])
    assert got.splitlines() == ["", "title", "",
                                "                  two",
                                "name            lines       n",
                                "-----------------------------",
                                "x                 1.0   -10.5",
                                "a longer name       2       3"]


def test_a_cell_has_its_standard_error_where_there_is_one():
    """Catches: nan in a cell."""
    assert pm(figure(0.5, 0.01)) == "0.500 ± 0.010" and pm(figure(0.5, math.nan), 2, "+") == "+0.50"
    assert pm(figure(math.nan, math.nan)) == NONE
    assert evidence(figure(0.03, 0.01)) == "3.0 standard errors" and "chance" in evidence(figure(-0.01, 0.01))
    assert evidence(figure(0.1, math.nan)) == evidence(figure(0.0, 0.0)) == "no standard error"


def test_the_last_line_states_the_result():
    """Catches: another policy than the best; the difference of other rewards than the trained ones; of unpaired means;
    against another policy than DPO; no KL; keys of the results file among the words."""
    base = [[0.0, 5.0], [0.1, 5.0], [0.2, 5.0]]
    policies = {"reference": policy(base, base, 0.0), "dpo": policy([[0.3, 9.0], [0.4, 9.0], [0.5, 9.0]], base, 2.0),
                "mix mixture": policy([[0.5, 1.0], [0.5, 1.0], [0.8, 1.0]], base, 1.25),
                "mix head 0": policy([[0.2, 1.0], [0.2, 1.0], [0.2, 1.0]], base, 0.5)}
    last = conclusions(results(policies=policies)).splitlines()[-1]
    assert last.startswith("Result: mix mixture has the highest mean reward, 0.600 ± 0.010, at a KL of 1.25 ± 0.01 ")
    assert "+0.500 ± 0.010 against the reference (50.0 standard errors)" in last
    assert last.endswith("and +0.200 ± 0.058 against dpo (3.5 standard errors), whose KL is 2.00 ± 0.01 nats.")
    worse = {"reference": policies["reference"], "dpo": policy([[0, 0]] * 3, base, 1.0)}
    assert "no policy has a higher mean reward than the reference; the best is dpo" in conclusions(
        results(policies=worse))
    printed = all_tables(results(policies=policies))
    assert not any(key in printed for key in ("trained", "_", "values", "kl ")) and "gain over" in printed


def test_the_best_prediction_is_compared_pair_by_pair():
    """Under the users' weights. Catches: the run that is best under the gate's weights; a difference of means without
    pairs; a mixture compared with another mixture though DPO is there; a single run compared with nothing."""
    found = {"dpo": run([-0.7, -0.6, -0.7, -0.6], experts=1), "mix": run([-0.5, -0.4, -0.5, -0.4]),
             "mix-2": run([-0.52, -0.42, -0.52, -0.42])}
    line = conclusions(results(preferences=found)).strip().splitlines()[-1]
    assert line.startswith("Result: mix predicts held-out choices best, with a log-likelihood of -0.4500 ± 0.0100")
    assert "+0.2000 ± 0.0000 against dpo on the same pairs" in line
    better = found | {"dpo": run([-0.3, -0.2, -0.3, -0.2], experts=1)}
    assert "dpo predicts held-out choices best" in (sentence := conclusions(results(preferences=better)))
    assert "against mix on the same pairs" in sentence
    assert "better than a coin" in conclusions(results(preferences={"mix": found["mix"]}))
    for values, how in (([-0.8] * 4, "worse"), ([-0.6931] * 4, "no clearly better")):
        assert f"{how} than a coin" in conclusions(results(preferences={"mix": run(values)}))
    assert conclusions(results()).strip() == ""


def test_own_choices_are_compared_with_one_policy_and_with_known_types():
    """Two users of type a (pairs 0, 2) and two of b. Catches: a policy of one type as the policy for all; each type's
    choices by another type's policy; a choice at a half counted as right; unpaired errors; a sentence without a
    baseline."""
    found = {"only-a": run([-0.1, -2.0, -0.1, -2.0], 1) | {"trained_on": ["a"]},
             "dpo": run([-0.5, -2.0, -0.5, -0.5], 1), "mix": run([-0.5, -0.5, -0.5, -math.log(2)])}
    line = conclusions(results(preferences=found)).strip().splitlines()[0]
    assert line == ("Result: mix predicts 0.875 of the held-out choices under each user's weights, and dpo, one policy "
                    "for all, 0.750: the difference is +0.125 ± 0.375 (0.3 standard errors: this may be chance).")
    found["only-b"] = run([-2.0, -0.1, -2.0, -2.0], 1) | {"trained_on": ["b"]}
    line = conclusions(results(preferences=found)).strip().splitlines()[0]
    assert "One policy per known type predicts 0.750; the mixture's difference to it is +0.125" in line
    assert len(conclusions(results(preferences={"mix": found["mix"]})).strip().splitlines()) == 1


def test_every_table_is_printed_and_those_without_figures_are_not():
    """Catches: a curve that ends early shifted to the left; a title without a table; a single unnamed annotator as a
    type of its own."""
    point = {"users": 3, "accuracy": figure(0.6), "rise": figure(0.05)}
    curves = {"dpo": [point | {"shown": 0}], "mix": [point | {"shown": n} for n in (0, 1, 2)]}
    aligned = {"ari": 0.5, "matched": 0.75, "units": 24}
    found = {"mix": run([-0.5] * 4) | {"alignment_train": aligned}, "plain": run([-0.5] * 4, 1, ("all",))}
    text = all_tables(results(preferences=found, adapt={"adapt-new": curves}))
    rows = {tuple(line.split()[:2]): line.split() for line in text.splitlines() if line.startswith(("mix ", "plain "))}
    assert rows["mix", "training"][2:] == ["0.500", NONE, "0.750", NONE, "24"]
    assert rows["plain", "0"][2:] == [NONE, NONE, NONE, "0.550", "±", "0.010"]
    assert "0 pairs" in text and "1 pair " in text and "2 pairs" in text
    short = next(line for line in text.splitlines() if line.startswith("dpo"))
    assert short.split() == ["dpo", "0.600", "±", "0.010", NONE, NONE, "+0.050", "±", "0.010"]
    assert "a 0.600 ± 0.010" in text and "all 0." not in text
    assert all_tables(results()) == ""


def test_collapsed_mixtures_are_warned_of_before_the_result():
    """Catches: no column of active experts; a warning for a healthy run, for DPO, or after the result."""
    tested = {"slope": figure(0.1), "gain": figure(0.05), "over_best": figure(0.05), "best": 0, "active": [0, 1]}
    found = {"dpo": run([-0.7] * 4, experts=1) | {"collapse": {}},
             "mix": run([-0.5] * 4) | {"collapse": tested | {"verdict": "all active"}},
             "mix-4": run([-0.6] * 4, experts=4) | {"collapse": tested | {"verdict": "inactive experts"}}}
    table = next(part for part in all_tables(results(preferences=found)).split("\n\n") if "effective" in part)
    rows = [line for line in table.splitlines() if line.startswith(("mix", "dpo"))]
    last = {row.split()[0]: row.split("   ")[-1].strip() for row in rows}
    assert last == {"dpo": NONE, "mix": "2 of 2", "mix-4": "2 of 4"} and table.splitlines()[0].endswith("active")
    warning, *_, result = conclusions(results(preferences=found)).strip().splitlines()
    assert warning.startswith("warning: mix-4: only 2 of 4 experts") and result.startswith("Result: ")


@pytest.mark.parametrize("low, words", [(0.55, "win rate 0.700"), (0.4, "this may be chance")])
def test_win_rates_end_with_the_result(low, words):
    """Catches: an interval around one half taken for a win; NaN of nothing judged in a sentence."""
    found = {"against": "dpo", "prompts": 9, "columns": {
        "short": {"mix": {"rate": 0.7, "low": low, "high": 0.8, "wins": 6, "ties": 1, "losses": 2, "unjudged": 0},
                  "dull": {"rate": 0.2, "low": 0.1, "high": 0.3, "wins": 1, "ties": 1, "losses": 7, "unjudged": 0}},
        "long": {"mix": {"rate": math.nan, "low": math.nan, "high": math.nan, "wins": 0, "ties": 0, "losses": 0,
                         "unjudged": 9}}}}
    *_, first, second = win_rate_tables(found).splitlines()
    assert first.startswith("Result: by short, mix does best against dpo") and words in first
    assert second.startswith("warning: nothing was judged by long;") and "nan" not in win_rate_tables(found)
