"""Log-probs of pairs in which each different text is computed once, against those of each pair."""

import dataclasses
import itertools

import pytest
import small
import torch

from mixdpo.experts import pair_logp
from mixdpo.fast import texts
from mixdpo.fast.texts import RESPONSES, batches_of_texts, logp_of_pairs, texts_of
from mixdpo.preferences import Pair, collate

SHARINGS = {"heads": dict(experts=2), "lora": dict(experts=2, sharing="lora"),
            "models": dict(experts=2, sharing="models"), "one": dict(experts=1)}


def repeated():
    """11 pairs of 9 different texts: four prompts, one with 6 responses, two that share a response's ids."""
    found = small.pairs(4)
    some = [Pair(found[n].prompt, found[n].chosen, found[n].rejected) for n in range(4)]
    first = some[0]
    more = [Pair(first.prompt, [7, 7 + n, 0], [9, 9 + n, 0]) for n in range(2)]
    turned = [Pair(p.prompt, p.rejected, p.chosen) for p in (some[1], some[2], more[0])]
    return [*some[:3], *more, *turned, Pair(first.prompt, more[0].chosen, more[1].rejected),
            Pair(some[3].prompt, first.chosen, some[3].rejected), some[0]]


def different(pairs):
    return {text for pair in pairs for text in texts_of(pair)}


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_equals_the_log_probs_of_each_pair(sharing, size):
    """Catches: the log-prob of another response of the row, of the other expert, of a text with the same response but
    another prompt; a last batch that is lost; results in the order of rows."""
    experts, pairs = small.experts(**SHARINGS[sharing]), repeated()
    with torch.no_grad():
        want = torch.cat([pair_logp(experts, collate(pairs, [n])) for n in range(len(pairs))])
    got = logp_of_pairs(experts, pairs, size=size)
    assert got.shape == want.shape and not got.requires_grad and got.dtype == torch.float32
    assert torch.allclose(got, want, atol=2e-5) and want.std() > 1


def test_rankings_and_pairs():
    """Rankings of four and of two together: a missing response has log-prob 0, as in pair_logp.
    Catches: sides of a shorter ranking filled with those of a longer one."""
    experts, two = small.experts(experts=2), dataclasses.replace(small.pairs(1)[0], sides=4)
    four = Pair(two.prompt, [3, 4, 0], two.chosen, more=([5, 0], [6, 6, 0]), order=(0, 1, 2, 3), sides=4)
    pairs = [dataclasses.replace(two, order=(0, 1)), four]
    with torch.no_grad():
        want = pair_logp(experts, collate(pairs, [0, 1]))
    got = logp_of_pairs(experts, pairs)
    assert got.shape == (2, 2, 4) and torch.allclose(got, want, atol=2e-5)


def test_each_text_passes_once(monkeypatch):
    """Catches: a text in two rows; more responses in a row than RESPONSES; batches beyond their size."""
    seen, real = [], pair_logp

    def counted(experts, batch, *args, **kwargs):
        seen.append(batch)
        return real(experts, batch, *args, **kwargs)

    monkeypatch.setattr(texts, "pair_logp", counted)
    experts, pairs, known, calls = small.experts(experts=2), repeated(), {}, []
    first = logp_of_pairs(experts, pairs, lambda *call: calls.append(call), size=2, known=known)
    of_batches = [of for _, of in batches_of_texts(itertools.chain(*map(texts_of, pairs)), 2)]
    assert sorted(text for of in of_batches for text, _, _ in of) == sorted(different(pairs))
    assert set(known) == different(pairs)
    assert all(len(of) <= 4 for of in of_batches) and max(r for of in of_batches for _, _, r in of) == RESPONSES - 1
    rows = sum(len(batch.ids) for batch in seen)
    assert rows == sum(-(-len([t for t in different(pairs) if t[0] == prompt]) // RESPONSES)
                       for prompt in {t[0] for t in different(pairs)})
    assert calls[-1] == (len(different(pairs)),) * 2 and [done for done, _ in calls] == sorted({d for d, _ in calls})
    seen.clear()
    assert torch.equal(logp_of_pairs(experts, pairs[3:], known=known), first[3:]) and not seen


def test_temperature_and_states():
    """Catches: a temperature that is not passed on; a pass through the trunk for pairs whose states are known."""
    experts, pairs = small.experts(experts=2, train_trunk=False), small.pairs(5)
    with torch.no_grad():
        want = pair_logp(experts, collate(pairs, range(5)), temperature=0.5)
        hot = pair_logp(experts, collate(pairs, range(5)))
    assert torch.allclose(logp_of_pairs(experts, pairs, temperature=0.5), want, atol=2e-5)
    assert (want - hot).abs().max() > 0.1
    from mixdpo.runs.reference import compute_reference
    with_states = compute_reference(small.model(), pairs, torch.float32).with_states(pairs)
    assert all(pair.states is not None for pair in with_states)
    calls = []
    got = logp_of_pairs(experts, with_states, lambda *call: calls.append(call), size=2, temperature=0.5)
    assert torch.allclose(got, want, atol=2e-5) and calls == [(2, 5), (4, 5), (5, 5)]
