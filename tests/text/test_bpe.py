"""bpe.py: merges by rule and by rank, each applied here one by one, on random vocabularies. Each docstring names the
faults that the test was seen to fail on.
"""

import random

from raising import raises_at

from mixdpo.config import InputError
from mixdpo.text import bpe
from mixdpo.text.tokenizer import Tokenizer, _from_ranks

EOT = "<|endoftext|>"


def by_rule(merges, text):
    """tokenizer.json's definition: merge the adjacent pair whose rule comes first; on a tie the leftmost."""
    rule = {}
    for number, merge in enumerate(merges):
        rule.setdefault(tuple(merge.split(" ")), number)
    parts = list(text)
    while True:
        found = [(rule[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in rule]
        if not found:
            return parts
        i = min(found)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def by_rank(rank, text):
    """tiktoken's: of all adjacent pairs that make a token, merge the one of lowest rank; on a tie the leftmost."""
    if text in rank:
        return [text]
    parts = list(text)
    while True:
        found = [(rank[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in rank]
        if not found:
            return parts
        i = min(found)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def random_merges(draw, count):
    """Random rules over the letters a, b, c in random order; training would give few of these lists."""
    tokens, merges = ["a", "b", "c"], []
    while len(merges) < count:
        pair = draw.choice(tokens[:12]), draw.choice(tokens[:12])
        if " ".join(pair) not in merges and len("".join(pair)) <= 7:
            merges.append(" ".join(pair))
            tokens.append("".join(pair))
    if draw.random() < 0.5:
        i = draw.randrange(len(merges))
        merges.insert(draw.randrange(len(merges)), merges.pop(i))
    return merges


def build(vocab, merges, ignore_merges):
    vocab = vocab | {EOT: len(vocab)}
    doc = bpe.document(vocab, [EOT], bpe.BYTE_LEVEL, merges, ignore_merges)
    return Tokenizer(doc, {"eos_token": EOT}, "random")


def test_a_token_with_rules_that_are_not_adjacent_is_refused():
    """abc by a bc or, three rules later, by ab c; alone it comes about by the later rule. On abcd the rule for cd comes
    first, which no rank of abc can express. Fault: a token's later rules treated like its first ones."""
    merges = ["a b", "a bc", "c d", "b c", "ab c"]
    names = ["a", "b", "c", "d", "ab", "abc", "cd", "bc"]
    assert by_rule(merges, "abcd") == ["ab", "cd"] != by_rank({name: n for n, name in enumerate(names)}, "abcd")
    with raises_at("'abc'", file="random"):
        build({name: n for n, name in enumerate(names)}, merges, False)


def test_rules_run_by_rank_give_the_rules_ids():
    """400 random lists of merges: either every text has the ids that the rules give, or the list is refused, and then
    the rules do not lead to the token that is named. Faults: no check of the parts; a token that no text reaches left
    to tiktoken; merges across the border of two parts, or ties there, ignored; parts complete at their own rank."""
    draw = random.Random(0)
    texts = ["".join(draw.choice("abc") for _ in range(draw.randrange(1, 14))) for _ in range(60)]
    accepted = refusals = unreachable = 0
    for _ in range(400):
        merges = random_merges(draw, draw.randrange(2, 9))
        names = ["a", "b", "c", *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
        shuffled = draw.sample(range(len(names)), len(names)) if draw.random() < 0.5 else range(len(names))
        vocab = dict(zip(names, shuffled))
        try:
            tokenizer = build(vocab, merges, False)
        except InputError as error:
            token = error.message.split("'")[1]
            places = [n for n, merge in enumerate(merges) if merge.replace(" ", "") == token]
            scattered = places != list(range(places[0], places[-1] + 1))    # it has rules at several ranks
            assert by_rule(merges, token) != [token] or scattered
            refusals += 1
            continue
        accepted += 1
        unreachable += len(tokenizer.vocabulary.ranks) < len(names)
        for text in [*texts, *names]:
            wanted = [vocab[part] for part in by_rule(merges, text)]
            assert tokenizer.encode(text) == wanted, f"{merges}: {text}: {tokenizer.encode(text)}, wanted {wanted}"
    assert min(accepted, refusals, unreachable) > 20, f"{accepted} accepted, {refusals} refused, {unreachable} short"


def test_ranks_saved_as_rules_give_the_ranks_ids():
    """400 random rank tables, with tokens that only occur as pieces and parts of higher rank. What is written as rules
    and read back gives the ids of the ranks. Faults: rules from merges of lower rank only; ignore_merges never set."""
    draw = random.Random(1)
    texts = ["".join(draw.choice("abc") for _ in range(draw.randrange(1, 14))) for _ in range(60)]
    with_pieces = 0
    for _ in range(400):
        names = ["a", "b", "c"]
        names += draw.sample([x + y + z for x in "abc" for y in "abc" for z in ("", "a", "b", "ca", "cb")], 6)
        ranks = {name.encode(): rank for rank, name in enumerate(names)}
        doc = _from_ranks(ranks, {EOT: len(ranks)}, bpe.BYTE_LEVEL)
        with_pieces += doc["model"]["ignore_merges"]
        tokenizer = Tokenizer(doc, {"eos_token": EOT}, "random")
        for text in texts:
            wanted = [names.index(part) for part in by_rank({n: i for i, n in enumerate(names)}, text)]
            assert tokenizer.encode(text) == wanted, f"{names}: {text}: {tokenizer.encode(text)}, wanted {wanted}"
    assert with_pieces > 20
