"""mixdpo/preferences.py: what each test catches stands in its docstring. Faulty files are test_records.py's."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from letters import GOOD, PEOPLE, Letters, pair, read
from raising import raises_at
from torch.nn.attention.flex_attention import create_block_mask

from mixdpo.fast.packing import compact_rows
from mixdpo.preferences import Batch, check_lengths, collate, encode_prompt, groups, rows_of
from mixdpo.text.records import suspicions

# ---- text -> ids


def test_boundary_tokens_do_not_merge(tmp_path):
    """Caught: prompt and response tokenised as one text, where "...t" + "h..." becomes one token."""
    (one,) = read(tmp_path, {"prompt": "at", "chosen": "he", "rejected": "us"})
    assert (one.prompt, one.chosen) == ([97, 116], [104, 101, 256])


@pytest.mark.parametrize("room", [2, 3, 4, 5])
def test_eos_once_and_only_if_not_cut(tmp_path, room):
    """Caught: EOS doubled; put back after a cut; cut off a response that just fits; not counted in max_response."""
    (one,) = read(tmp_path, {"prompt": "a", "chosen": "xyz", "rejected": "uvwuvw"}, max_response=room, report=str)
    assert one.chosen == [120, 121, 122, 256][:room]
    assert one.rejected == [117, 118, 119, 117, 118][:room]


def test_text_that_spells_eos_is_text(tmp_path):
    """Caught: a response that writes out the name of EOS taken for finished."""
    (one,) = read(tmp_path, {"prompt": "a", "chosen": "x<eos>", "rejected": "y"})
    assert one.chosen == [*b"x<eos>", 256]


def test_prompt_keeps_its_end_and_cuts_are_counted(tmp_path):
    """Caught: a prompt cut from the right; a cut that nobody is told of; the count per text instead of per line."""
    told = []
    records = [GOOD, {**GOOD, "chosen": " yes, indeed"}]
    first, second = read(tmp_path, *records, max_prompt=4, max_response=6, report=told.append)
    assert Letters().decode(first.prompt) == Letters().decode(second.prompt) == "said"
    path = tmp_path / "prefs.jsonl"
    assert told == [
        f"{path}: prompts truncated to their last 4 ids: 2 (first: line 1)",
        f"{path}: pairs with a response truncated to its first 6 ids, without EOS: 1 (first: line 2)",
    ]


def test_start_token_stays_before_the_prompt(tmp_path):
    """Caught: no start token for a model that wants one; it is cut off with the prompt's beginning, or not counted."""
    assert [encode_prompt("said", Letters(bos=257), n) for n in (5, 4, 1)] == [
        ([257, *b"said"], True),
        ([257, *b"aid"], False),
        ([257], False),
    ]
    (one,) = read(tmp_path, GOOD, tokenizer=Letters(bos=257))
    assert one.prompt == [257, *b"He said"] and one.chosen == [*b" yes", 256]
    with raises_at(option="max_prompt"):  # of an empty prompt nothing could be predicted
        read(tmp_path, GOOD, max_prompt=0)
    with raises_at(option="max_response"):
        read(tmp_path, GOOD, max_response=0)


def test_pair_longer_than_the_model(tmp_path):
    """Caught: only one of the two responses looked at; off by one at the context's end."""
    pairs = [pair("abc", "d", "efg", line=8), pair("a", "b", "c", line=9)]
    check_lengths(pairs, 6, "f.jsonl")
    with raises_at("(3 ids)", "(3)", 5, file="f.jsonl", line=8):
        check_lengths(pairs, 5, "f.jsonl")


class Chat(Letters):
    """Letters with a special token and an added one that a text may hold."""

    special, place = {"<|im_end|>": 400, "<tool>": 401}, "chat"
    vocabulary = SimpleNamespace(literal={"<tool>": 401})


SUSPECT = {
    "special token": [{**GOOD, "prompt": "He<|im_end|>"}, {**GOOD, "chosen": "<|im_end|>"},
                      {**GOOD, "chosen": "<|im_end|>", "rejected": "a<|im_end|>"}],
    "as a string": [{**GOOD, "prompt": '[{"role": "user"}]'}, {**GOOD, "chosen": "[{'content': 'a'}]"},
                    {**GOOD, "rejected": ' { "role" : "assistant"'}],
    "begin with the prompt": [{"prompt": "Q:\n", "chosen": "Q:\nyes", "rejected": " Q:\nno"}],
}
PLAIN = [GOOD, {**GOOD, "prompt": "a <tool> of [roles]"}, {**GOOD, "chosen": "He said so"}, {**GOOD, "prompt": " "},
         {**GOOD, "chosen": '["role"] {"a": {"role": 1}}'}]


@pytest.mark.parametrize("what", SUSPECT)
def test_what_looks_like_a_mistake_is_counted(tmp_path, what):
    """Catches: a text with the template applied already, one that holds the prompt again, messages written as a string:
    all trained on without a word; a line counted for each of its texts; good lines counted."""
    told, records = [], SUSPECT[what]
    pairs = read(tmp_path, *PLAIN, *records, tokenizer=Chat(), max_prompt=99, max_response=99, report=told.append)
    assert len(pairs) == len(PLAIN) + len(records), "they can be trained on as they stand"
    (line,) = told
    assert what in line and f": {len(records)} (first: line {len(PLAIN) + 1})" in line


def test_names_of_special_tokens_in_messages_are_counted_too():
    """Catches: messages whose content has the template applied already."""
    turns = {"prompt": [{"role": "user", "content": "He<|im_end|>"}], "chosen": [{"role": "assistant", "content": "{"}],
             "rejected": [{"role": "assistant", "content": '{"role": 1}'}]}
    (one,) = suspicions(turns, Chat())
    assert "special token" in one and suspicions(turns, Letters()) == []


# ---- units of the latent


def test_groups_are_pairs_or_whole_users():
    """Caught: users sorted, or pooled only where their lines are neighbours; a line without a user let through."""
    assert groups(PEOPLE[:3], "pair") == [[0], [1], [2]]
    assert groups(PEOPLE[:6], "user") == [[0, 2, 5], [1, 4], [3]]
    with raises_at("1 of 2", line=7):
        groups([PEOPLE[0], pair([1], [2], [3], line=7)], "user")
    with raises_at("users", option="latent"):
        groups(PEOPLE, "users")


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
    texts = [("He said", " yes", " no"), ("Speed", "e", "red"), ("a", "bee", "d")]
    pairs = read(tmp_path, *(dict(zip(GOOD, text)) for text in texts), tokenizer=tokenizer)
    for index in ([0, 1, 2], [2], [1, 0]):
        batch = collate(pairs, index)
        text = rows_of(batch)
        where, targets, sequence = text.where, text.targets, text.sequence
        by_hand = positions_by_hand(pairs, index, batch.ids.shape[-1])
        assert list(zip(where.tolist(), targets.tolist(), sequence.tolist())) == by_hand
        ends = torch.stack([targets[sequence == n][-1] for n in range(2 * len(index))])
        assert (ends == tokenizer.eos).all()


def test_a_shared_prompt_is_one_row_a_pair():
    """Caught: the rejected response's first token predicted by the chosen's last; positions that run on from one
    response to the other; a response that sees the other; padding seen, or nothing for it to see."""
    pairs = [pair([5, 6], [7, 8], [9]), pair([3], [1, 2, 4], [5, 6])]
    text = compact_rows(collate(pairs, [0, 1]), shared=True)
    assert text.ids.tolist() == [[5, 6, 7, 8, 9, 0], [3, 1, 2, 4, 5, 6]]
    assert text.window.positions.tolist() == [[0, 1, 2, 3, 2, 1], [0, 1, 2, 3, 1, 2]]
    assert text.token.tolist() == [2, 3, 4, 7, 8, 9, 10, 11] and text.where.tolist() == [1, 2, 1, 6, 7, 8, 6, 10]
    assert text.targets.tolist() == [7, 8, 9, 1, 2, 4, 5, 6] and text.sequence.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    seen = [[n for n in range(6) if row[n]] for row in text.window.mask[0, 0]]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1]]


@pytest.mark.parametrize("shared", [False, True])
def test_a_packed_row_holds_every_token_and_no_padding_between(shared):
    """Caught: a token lost or doubled, positions that run on from one text to the next, a text that sees another, a
    block of a GPU's attention left out that somebody sees."""
    pairs = [pair([5, 6], [7, 8], [9]), pair([3], [1, 2, 4], [5, 6]), pair([1, 1, 1], [2], [2, 3])]
    plain = compact_rows(collate(pairs, [0, 1, 2]), shared)
    text = compact_rows(collate(pairs, [0, 1, 2]), shared, packed=True)
    assert text.ids.shape == (1, 128) and torch.equal(text.targets, plain.targets)
    assert torch.equal(text.ids.flatten()[text.token], text.targets)
    used = int((text.window.row >= 0).sum())
    assert used == sum(len(p.prompt) * (1 if shared else 2) + len(p.chosen) + len(p.rejected) for p in pairs)
    place = torch.arange(128)
    seen = text.window.rule()(0, 0, place[:, None], place)
    assert torch.equal(seen[:used].sum(1) - 1, text.window.positions[0, :used])             # as many as stand before it
    assert not seen[:used, used:].any() and seen[used:].any(1).all()                        # no row of nothing: nan
    q, k, v = (torch.randn(1, heads, 128, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    blocks = create_block_mask(text.window.rule(), None, None, 128, 128, "cpu")
    with torch.no_grad():
        on_gpu = replace(text.window, blocks=blocks).attend(q, k, v)
        assert torch.allclose(on_gpu, text.window.attend(q, k, v), atol=1e-5)


def test_prompts_are_shared_where_that_saves_a_tenth():
    """Caught: short prompts shared, long ones not; the longest row not counted."""
    for prompt, shared in ((4, False), (6, True)):
        batch = collate([pair(range(prompt), [1] * 20, [2] * 20), pair([1], [1], [2])], [0, 1])
        assert (compact_rows(batch).window is not None) == shared


def test_padding_shifts_nothing():
    """Caught: left padding; positions that depend on a longer neighbour; padding that is not zero."""
    pairs = [pair([5, 6], [7, 8], [9]), pair(range(20, 29), [1] * 30, [2] * 11)]
    alone, beside = collate(pairs, [0]), collate(pairs, [0, 1])
    assert alone.ids.tolist() == [[[5, 6, 7, 8], [5, 6, 9, 0]]] and beside.ids.shape == (2, 2, 39)
    assert torch.equal(beside.ids[:1, :, :4], alone.ids) and not beside.ids[0, :, 4:].any()
    for batch in (alone, beside):
        text = rows_of(batch)
        where, targets = text.where[:3].tolist(), text.targets[:3].tolist()  # the first pair's
        assert [w % batch.ids.shape[-1] for w in where] == [1, 2, 1] and targets == [7, 8, 9]


def test_batch_says_which_pairs_and_whose():
    """Caught: pairs numbered within the batch; context of the wrong pair; the annotator let in."""
    pairs = [replace(p, context=i % 3 == 1) for i, p in enumerate(PEOPLE)]
    batch = collate(pairs, [3, 1, 7, 4], [0, 1, 0, 1])
    assert batch.pair.tolist() == [3, 1, 7, 4] and batch.group.tolist() == [0, 1, 0, 1]
    assert collate(pairs, [3, 1, 7, 4]).group.tolist() == [0, 1, 2, 3]
    assert batch.context.tolist() == [pairs[i].context for i in (3, 1, 7, 4)] and batch.context.dtype == torch.bool
    assert [field.name for field in fields(Batch)] == ["ids", "start", "length", "order", "group", "pair", "context",
                                                      "states"]
    assert batch.order.tolist() == [[0, 1]] * 4
    for shared in (True, False):
        moved = compact_rows(batch, shared).to("meta")
        parts = [getattr(moved, field.name) for field in fields(moved)]
        parts += [] if moved.window is None else [moved.window.positions, moved.window.mask]
        assert all(x.device.type == "meta" for x in parts if isinstance(x, torch.Tensor))
