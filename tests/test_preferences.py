"""mixdpo/preferences.py and records.py: what each test catches stands in its docstring."""

import gzip
import json
from dataclasses import fields

import pytest
import torch

from mixdpo.config import InputError
from mixdpo.preferences import (
    Batch,
    Pair,
    batches,
    check_lengths,
    collate,
    data_key,
    groups,
    main,
    mark_context,
    read_preferences,
    response_positions,
    show,
)


class Letters:
    """One id a character, ids shifted so that `zero` has id 0, and "th" merged into 300: a tokenizer small enough to see through."""

    def __init__(self, eos=256, zero="\x00"):
        self.eos, self.shift = eos, ord(zero)

    def encode(self, text):
        if "~" in text:
            raise InputError(f"no token for '~' at position {text.index('~')}")
        ids = [300 if c == "\x01" else (ord(c) - self.shift) % 256 for c in text.replace("th", "\x01")]
        return [i + 1 for i in ids] if self.eos == 0 else ids  # 0 is then EOS and no character

    def decode(self, ids):
        ids = [i - 1 for i in ids] if self.eos == 0 else ids
        return "".join("th" if i == 300 else chr((i + self.shift) % 256) for i in ids)


GOOD = {"prompt": "He said", "chosen": " yes", "rejected": " no"}


def write(folder, *records, name="prefs.jsonl"):
    """A preference file: records are objects, or lines as they shall stand."""
    raw = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    path = folder / name
    (gzip.open(path, "wb") if name.endswith("gz") else open(path, "wb")).write(b"".join(line + b"\n" for line in raw))
    return path


def read(folder, *records, tokenizer=None, max_prompt=16, max_response=16, **options):
    return read_preferences(write(folder, *records), tokenizer or Letters(), max_prompt, max_response, **options)


def pair(prompt, chosen, rejected, **more):
    return Pair(list(prompt), list(chosen), list(rejected), **more)


# ---- text -> ids


def test_boundary_tokens_do_not_merge(tmp_path):
    """Caught: prompt and response tokenised as one text, where "...t" + "h..." becomes one token."""
    (one,) = read(tmp_path, {"prompt": "at", "chosen": "he", "rejected": "us"})
    assert (one.prompt, one.chosen) == ([97, 116], [104, 101, 256])


@pytest.mark.parametrize("room", [2, 3, 4, 5])
def test_eos_once_and_only_if_not_cut(tmp_path, room):
    """Caught: EOS doubled; EOS put back after a cut; EOS cut off a response that just fits; EOS not counted in max_response."""
    (one,) = read(tmp_path, {"prompt": "a", "chosen": "xyz", "rejected": "uvwuvw"}, max_response=room, report=str)
    assert one.chosen == [120, 121, 122, 256][:room]
    assert one.rejected == [117, 118, 119, 117, 118][:room]


def test_text_that_spells_eos_is_text(tmp_path):
    """Caught: a response that writes out EOS taken for finished, or text encoded into the id of EOS unseen."""
    (one,) = read(tmp_path, {"prompt": "a", "chosen": "x<eos>", "rejected": "y"})
    assert one.chosen == [ord(c) for c in "x<eos>"] + [256]
    with pytest.raises(AssertionError, match="line 1: text was encoded as EOS"):
        read(tmp_path, GOOD, tokenizer=Letters(eos=ord("y")))


def test_prompt_keeps_its_end_and_cuts_are_counted(tmp_path):
    """Caught: a prompt cut from the right; a cut that nobody is told of; the count per text instead of per line."""
    told = []
    first, second = read(tmp_path, GOOD, {**GOOD, "chosen": " yes, indeed"}, max_prompt=4, max_response=6, report=told.append)
    assert Letters().decode(first.prompt) == Letters().decode(second.prompt) == "said"
    path = tmp_path / "prefs.jsonl"
    assert told == [
        f"{path}: prompts cut to their last 4 ids: 2 (first: line 1)",
        f"{path}: pairs with a response cut to its first 6 ids, without EOS: 1 (first: line 2)",
    ]


def test_whole_pair_is_silent_and_complete(tmp_path):
    """Caught: optional fields lost or in each other's place; null taken for a value; a report with nothing to say."""
    extra = {"user": "ann", "annotator": "kind", "scores": {"length": [3, 2.5]}, "context": False}
    told = []
    one, two, three = read(tmp_path, {**GOOD, **extra}, "", {**GOOD, **dict.fromkeys(extra)}, GOOD, report=told.append)
    assert (one.user, one.annotator, one.scores, one.context) == ("ann", "kind", {"length": [3, 2.5]}, False)
    assert (two.user, two.annotator, two.scores, two.context) == (None, None, None, None)
    assert [p.line for p in (one, two, three)] == [1, 3, 4] and told == []


FAULTS = {
    "not JSON": '{"prompt": "a", "chosen": "b", "rej',
    "not UTF-8": b'{"prompt": "caf\xe9", "chosen": "b", "rejected": "c"}',
    "not an object": '["a", "b", "c"]',
    "missing field: rejected": {"prompt": "a", "chosen": "b"},
    "missing field: chosen, rejected": {"prompt": "a"},
    "wrong type: chosen is 3": {**GOOD, "chosen": 3},
    "wrong type: prompt is None": {**GOOD, "prompt": None},
    "wrong type: chosen is a list of messages; chat templates are not supported": {**GOOD, "chosen": [{"role": "user"}]},
    "wrong type: user is 17": {**GOOD, "user": 17},
    "wrong type: context is 1": {**GOOD, "context": 1},
    "wrong type: scores is ": {**GOOD, "scores": {"length": [1, float("nan")]}},
    "empty user": {**GOOD, "user": ""},
    "empty prompt": {**GOOD, "prompt": ""},
    "empty chosen": {**GOOD, "chosen": ""},
    "empty rejected": {**GOOD, "rejected": ""},
    "identical responses": {**GOOD, "rejected": " yes"},
    "identical after truncation: the first 16 ids": {**GOOD, "chosen": "x" * 16 + "a", "rejected": "x" * 16 + "b"},
    "no token for a character: no token for '~' at position 2": {**GOOD, "chosen": "ab~"},
    "lone surrogate: prompt has \\ud83d at position 1": '{"prompt": "a\\ud83d", "chosen": "b", "rejected": "c"}',
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_an_error_with_file_and_line(tmp_path, fault):
    """Caught: any one check taken out; a message without file, line or remedy."""
    with pytest.raises(InputError) as error:
        read(tmp_path, GOOD, FAULTS[fault])
    assert str(error.value).startswith(f"{tmp_path / 'prefs.jsonl'}:2: {fault}") and "; " in str(error.value)


def test_dropped_lines_are_counted_and_listed(tmp_path):
    """Caught: a silent drop; a kind or a line missing from the report; good lines dropped along."""
    told, kinds = [], [fault.partition(":")[0] for fault in FAULTS]
    pairs = read(tmp_path, GOOD, *FAULTS.values(), *FAULTS.values(), GOOD, drop=True, report=told.append)
    assert [p.line for p in pairs] == [1, 2 * len(FAULTS) + 2]
    expected = []
    for kind in dict.fromkeys(kinds):
        at = [i + 2 for i, other in enumerate(kinds * 2) if other == kind]
        expected.append(f"{tmp_path / 'prefs.jsonl'}: dropped, {kind}: {len(at)} (line {', '.join(map(str, at))})")
    assert told == expected


@pytest.mark.parametrize("drop", [False, True])
def test_unknown_field_is_named(tmp_path, drop):
    """Caught: a misspelt field that is ignored, or that empties the file when drops are asked for."""
    with pytest.raises(InputError, match=r":2: unknown field: 'usr', 'split'; known are prompt, .*take it out"):
        read(tmp_path, GOOD, {**GOOD, "usr": "ann", "split": "train"}, drop=drop)


def test_files_without_a_pair(tmp_path):
    """Caught: an empty list of pairs handed on from an empty file, an all-dropped one, a missing one, half a gzip file."""
    with pytest.raises(InputError, match="no pairs"):
        read(tmp_path)
    with pytest.raises(InputError, match="no pairs"):
        read(tmp_path, "{", drop=True, report=str)
    with pytest.raises(InputError, match="no such file"):
        read_preferences(tmp_path / "absent.jsonl", Letters(), 16, 16)
    packed = write(tmp_path, *[GOOD] * 99, name="prefs.jsonl.gz")
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a whole gzip file"):
        read_preferences(packed, Letters(), 16, 16)
    with pytest.raises(InputError, match="at least 1"):  # ids[-0:] is the whole prompt
        read(tmp_path, GOOD, max_prompt=0)


def test_lines_end_at_newlines_only(tmp_path):
    """Caught: splitlines() on U+2028; CRLF or a byte-order mark taken for text."""
    records = [json.dumps({**GOOD, "chosen": "a\u2028b"}, ensure_ascii=False).encode() + b"\r", GOOD]
    path = write(tmp_path, b"\xef\xbb\xbf" + records[0], records[1])
    assert [p.line for p in read_preferences(path, Letters(), 16, 16)] == [1, 2]


def test_packed_file_is_the_same_data(tmp_path):
    """Caught: a key of the packed bytes; a key that forgets part of the file."""
    plain, packed = write(tmp_path, GOOD, GOOD), write(tmp_path, GOOD, GOOD, name="prefs.jsonl.gz")
    assert read_preferences(plain, Letters(), 9, 9) == read_preferences(packed, Letters(), 9, 9)
    assert data_key(plain) == data_key(packed) != data_key(write(tmp_path, GOOD, name="other.jsonl"))


def test_pair_longer_than_the_model(tmp_path):
    """Caught: only one of the two responses looked at; off by one at the context's end."""
    pairs = [pair("abc", "d", "efg", line=8), pair("a", "b", "c", line=9)]
    check_lengths(pairs, 6)
    with pytest.raises(InputError, match=r"line 8: prompt \(3 ids\) and response \(3\) .* context of 5; choose"):
        check_lengths(pairs, 5)


# ---- units of the latent


PEOPLE = [pair([1], [2], [3], user=u, line=i + 1) for i, u in enumerate("babcabbccbbb")]


def test_groups_are_pairs_or_whole_users():
    """Caught: users sorted, or pooled only where their lines are neighbours; a line without a user let through."""
    assert groups(PEOPLE[:3], "pair") == [[0], [1], [2]]
    assert groups(PEOPLE[:6], "user") == [[0, 2, 5], [1, 4], [3]]
    with pytest.raises(InputError, match="line 7: no user .on 1 of 2 pairs"):
        groups([PEOPLE[0], pair([1], [2], [3], line=7)], "user")
    with pytest.raises(InputError, match="wanted 'pair' or 'user'"):
        groups(PEOPLE, "users")


def test_context_pairs_are_drawn_per_user():
    """Caught: one count over all users; the file's own word overwritten; always the first pairs; a user left without training pairs."""
    marked = mark_context(PEOPLE, 1, seed=0)
    assert [sum(marked[i].context for i in g) for g in groups(marked, "user")] == [1, 1, 1]
    assert marked == mark_context(PEOPLE, 1, seed=0) and PEOPLE[0].context is None
    assert len({tuple(p.context for p in mark_context(PEOPLE, 1, seed)) for seed in range(20)}) > 5
    said = [pair([1], [2], [3], user="a", context=c) for c in (True, False, None)] + PEOPLE
    assert [p.context for p in mark_context(said, 1, seed=0)[:3]] == [True, False, None]
    with pytest.raises(InputError, match="user 'a' has 2 pairs: 2 for context leave none .* at most 1"):
        mark_context(PEOPLE, 2, seed=0)


@pytest.mark.parametrize("size", [7, 8, 11, 100])
def test_batches_hold_whole_groups_and_drop_none(size):
    """Caught: the ragged last batch dropped; a batch overfull; a group in two batches; each group in a batch of its own."""
    units = groups(PEOPLE * 9, "pair")[:20] + [[0] * n for n in (7, 1, 3, 5)]
    made = batches(units, size, seed=1, epoch=0)
    assert sorted(g for batch in made for g in batch) == list(range(24))
    held = [sum(len(units[g]) for g in batch) for batch in made]
    assert max(held) <= size and all(h + len(units[after[0]]) > size for h, after in zip(held, made[1:]))


def test_batches_are_shuffled_by_seed_and_epoch():
    """Caught: no shuffle; the epoch or the seed left out of it; seed + epoch; the global generator used."""
    units = groups(PEOPLE * 4, "pair")
    orders = {(s, e): batches(units, 5, s, e) for s in (0, 1) for e in (0, 1)}
    assert len({str(order) for order in orders.values()}) == 4
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert batches(units, 5, 1, 1) == orders[1, 1] and torch.equal(state, torch.get_rng_state())


def test_group_larger_than_a_batch_is_named():
    """Caught: a user too large for a batch that is split or left out; a message without the size that fits."""
    with pytest.raises(InputError, match="user 'b' has 7 pairs, and a batch holds 6; choose a batch of 7 or more"):
        batches(groups(PEOPLE, "user"), 6, 0, 0, PEOPLE)


# ---- ids -> tensors


def positions_by_hand(pairs, index, T):
    """The oracle: every response token of the pairs, in loops and from the pairs alone."""
    return [
        (row * T + len(pairs[i].prompt) + t - 1, token, row)
        for b, i in enumerate(index)
        for row, response in ((2 * b, pairs[i].chosen), (2 * b + 1, pairs[i].rejected))
        for t, token in enumerate(response)
    ]


@pytest.mark.parametrize("tokenizer", [Letters(), Letters(eos=0), Letters(zero="e"), Letters(zero="d")])
def test_positions_of_every_response_token(tmp_path, tokenizer):
    """Caught: masks from ids, where pad == EOS leaves EOS untrained, or where 0 is a letter (also the prompt's or the
    response's last); positions one off; prompt tokens scored; chosen and rejected given the same length."""
    records = [GOOD, {"prompt": "Speed", "chosen": "e", "rejected": "red"}, {"prompt": "a", "chosen": "bee", "rejected": "d"}]
    pairs = read(tmp_path, *records, tokenizer=tokenizer)
    for index in ([0, 1, 2], [2], [1, 0]):
        batch = collate(pairs, index, "pair")
        where, targets, sequence = response_positions(batch)
        by_hand = positions_by_hand(pairs, index, batch.ids.shape[-1])
        assert list(zip(where.tolist(), targets.tolist(), sequence.tolist())) == by_hand
        ends = torch.stack([targets[sequence == n][-1] for n in range(2 * len(index))])
        assert (ends == tokenizer.eos).all()


def test_padding_shifts_nothing():
    """Caught: left padding; positions that depend on a longer neighbour; padding that is not zero."""
    pairs = [pair([5, 6], [7, 8], [9]), pair(range(20, 29), [1] * 30, [2] * 11)]
    alone, beside = collate(pairs, [0], "pair"), collate(pairs, [0, 1], "pair")
    assert alone.ids.tolist() == [[[5, 6, 7, 8], [5, 6, 9, 0]]] and beside.ids.shape == (2, 2, 39)
    assert torch.equal(beside.ids[:1, :, :4], alone.ids) and not beside.ids[0, :, 4:].any()
    in_row = [[(w % batch.ids.shape[-1], t) for w, t, s in zip(*map(torch.Tensor.tolist, response_positions(batch))) if s < 2]
              for batch in (alone, beside)]
    assert in_row[0] == in_row[1] == [(1, 7), (2, 8), (1, 9)]


def test_batch_says_which_pairs_and_whose():
    """Caught: pair numbers of the batch instead of the list; group not dense; context of the wrong pair; the annotator let in."""
    pairs = mark_context(PEOPLE, 1, seed=0)
    batch = collate(pairs, [3, 1, 7, 4], "user")  # users c a c a
    assert batch.pair.tolist() == [3, 1, 7, 4] and batch.group.tolist() == [0, 1, 0, 1]
    assert collate(pairs, [3, 1, 7, 4], "pair").group.tolist() == [0, 1, 2, 3]
    assert batch.context.tolist() == [pairs[i].context for i in (3, 1, 7, 4)] and batch.context.dtype == torch.bool
    assert [field.name for field in fields(Batch)] == ["ids", "start", "length", "group", "pair", "context"]
    moved = batch.to("meta")
    assert all(getattr(moved, field.name).device.type == "meta" for field in fields(Batch))


# ---- to look at


@pytest.mark.parametrize("eos", [256, 0])
def test_show_tells_the_parts_apart(tmp_path, eos):
    """Caught: EOS shown as padding where their ids are equal; a cut response shown as finished; raw control characters."""
    tokenizer = Letters(eos=eos)
    pairs = read(tmp_path, {"prompt": "a\n", "chosen": "b\x1b", "rejected": "cdefgh"}, tokenizer=tokenizer, max_response=5, report=str)
    batch = collate(pairs, [0], "pair")
    assert show(batch, tokenizer).splitlines() == [
        "pair 0 (group 0)",
        f"  chosen   prompt 'a\\n' response 'b\\x1b' EOS <{eos}> padding 0 x 2",
        "  rejected prompt 'a\\n' response 'cdefg'",
    ]
    legend, _, chosen, _ = show(batch, tokenizer, colour=True).splitlines()
    assert all(name in legend for name in ("prompt", "response", "EOS", "padding"))
    assert chosen == f"  chosen   \033[36ma\\n\033[0m\033[1;32mb\\x1b\033[0m\033[30;43m<{eos}>\033[0m\033[90m0 x 2\033[0m"
