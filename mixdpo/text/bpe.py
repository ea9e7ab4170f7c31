"""Byte-level BPE: tokenizer.json's vocabulary, merge rules and pre-tokenizer as what tiktoken can run, and back.

tokenizer.json   merge rules in order: of all adjacent pairs in a piece that a rule joins, join the one with the first
                 rule, until none is left. Ids are a table of their own, in any order.
tiktoken         a rank for each token: of all adjacent pairs whose joined bytes are a token, join the one of the lowest
                 rank. A piece that is a token as a whole is taken as it is.

The two agree on every text if each token t, when its bytes stand alone, is at last joined from two parts that one of
its rules names. For when x and y with x + y = t are about to be joined in any text, no join so far has crossed the ends
of t, so the joins between them are those that t goes through alone. A token that alone gets stuck at three parts or
more is never joined at all: it can only be met as a whole piece (tokenizer.json's `ignore_merges`). `read_vocabulary`
checks this for every token, and refuses a file for which tiktoken's ids would be others.

Left out: all that is not byte-level BPE, and pre-tokenizers other than those of GPT-2, SmolLM2, Llama-3 and their kin:
each is refused by its name.
"""

import math
from dataclasses import dataclass

from mixdpo.config import InputError

# GPT-2 writes bytes as characters: the 188 that Latin-1 can print as themselves, the other 68 as U+0100 and onwards.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTER = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(HIDDEN)}
# Back again through Latin-1, whose codes are the bytes; characters outside the alphabet go where Latin-1 cannot follow.
TO_LATIN1 = dict.fromkeys(HIDDEN, "\uffff") | {ord(character): byte for byte, character in CHARACTER.items()}

# How text is cut into pieces before any merge: contractions, letters, digits, the rest, and white space, whose last
# blank before a word belongs to the word.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same where digits were cut out first: the text before a digit ends there, so its white space stays together.
DIGITS_PATTERN = r"%s|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# tokenizer.json's pre-tokenizers for these three.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SMOLLM_STEPS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
LLAMA3_STEPS = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
    BYTE_LEVEL | {"use_regex": False}]}


@dataclass(frozen=True)
class Vocabulary:
    ranks: dict     # bytes -> rank, what tiktoken runs on
    ids: dict       # rank -> id; where ids rise with the merges, ranks are ids
    names: dict     # id -> bytes, of everything that has an id: what decoding needs
    literal: dict   # text -> id: added tokens that are not special; met in a text before anything else


def to_bytes(name):
    """A token as tokenizer.json writes it -> its bytes; None if it is not written in GPT-2's alphabet."""
    try:
        return name.translate(TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return None


def to_name(token):
    return "".join(map(CHARACTER.__getitem__, token))


def split(ranks, token):
    """The parts that a token's bytes, alone, end as before the join that makes the token: two, if there is one."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], math.inf), i) for i in range(len(parts) - 1))
        if rank == math.inf:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def merges_of(ranks):
    """bytes -> rank to merge rules "left right" in order; tokens that no merge can reach have none."""
    in_order = sorted((token for token in ranks if len(token) > 1), key=ranks.get)
    return [" ".join(map(to_name, parts)) for token in in_order if len(parts := split(ranks, token)) == 2]


def document(vocab, special, steps, merges, ignore_merges):
    """tokenizer.json as a dict, as the tokenizers library reads it.

    vocab: name -> id, special tokens included; special: names of those; steps: the pre-tokenizer.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": vocab[name], "content": name} | flags for name in sorted(special, key=vocab.get)],
        "normalizer": None, "pre_tokenizer": steps, "post_processor": None, "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges},
    }


def pattern_of(steps, place):
    """tokenizer.json's pre_tokenizer -> (pattern for tiktoken, add_prefix_space)."""
    steps = steps["pretokenizers"] if steps and steps["type"] == "Sequence" else [steps] if steps else []
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel":
        prefix, own_regex = steps[-1]["add_prefix_space"], steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own_regex:
            return GPT2_PATTERN, prefix
        if kinds == ["Digits", "ByteLevel"] and own_regex and not prefix:
            return DIGITS_PATTERN % (r"\p{N}" if steps[0]["individual_digits"] else r"\p{N}+"), False
        if kinds == ["Split", "ByteLevel"] and not own_regex and not prefix:
            regex = steps[0]["pattern"].get("Regex")
            if regex and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
                # What the regex leaves between its matches is a piece as well; tiktoken alone would drop it.
                return rf"{regex}|(?:(?!{regex})[\s\S])+", False
    settings = "; ".join(", ".join(f"{key} {value!r}" for key, value in step.items()) for step in steps) or "none"
    raise InputError(f"this pre-tokenizer is not supported: {settings}. Wanted: ByteLevel; Digits, ByteLevel; or Split "
                     "(Regex, Isolated, not inverted), ByteLevel without regex; a prefix space with the first only",
                     file=place)


def read_vocabulary(model, added, place):
    """tokenizer.json's model and added_tokens -> Vocabulary. Raises InputError where tiktoken's ids would be others."""
    unsupported = {key: model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix",
                                               "byte_fallback") if model.get(key)}
    if model["type"] != "BPE" or unsupported:
        raise InputError(f"model {model['type']} {unsupported or ''} is not supported; wanted byte-level BPE",
                         file=place)
    vocab, whole = model["vocab"], bool(model.get("ignore_merges"))
    special = {token["content"] for token in added if token["special"]}
    written = {name: to_bytes(name) for name in vocab if name not in special}
    names = {vocab[name]: token if token is not None else name.encode() for name, token in written.items()}
    names |= {token["id"]: token["content"].encode() for token in added}

    rules = _rules(model["merges"], written, special, place)
    ids = {token: vocab[name] for name, token in written.items() if token is not None and len(token) == 1}
    ids |= {token: vocab[to_name(token)] for token in rules}
    if whole:                                           # tokens without a rule are met as whole pieces
        ids |= {token: vocab[name] for name, token in written.items() if token is not None and token not in ids}
    in_order = [ids[token] for token in rules]
    rising = all(a < b for a, b in zip(in_order, in_order[1:]))
    ranks = dict(ids) if rising else {token: rank for rank, token in enumerate(ids)}

    for token, parts in _unreachable(ranks, rules):
        if len(parts) == 2:
            raise InputError(f"token {to_name(token)!r} would be joined from {to_name(parts[0])!r} and "
                             f"{to_name(parts[1])!r}, for which there is no merge; these merges cannot be run by rank",
                             file=place)
        if not whole:
            del ranks[token]                            # no text leads to it, and tiktoken must not take it as a piece
    literal = {token["content"]: token["id"] for token in added if not token["special"]}
    return Vocabulary(ranks, {rank: ids[token] for token, rank in ranks.items()}, names, literal)


def _rules(merges, written, special, place):
    """token -> the pairs that join to it, the tokens in the order of their first rule."""
    rules, latest = {}, None
    for number, merge in enumerate(merges, 1):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        parts = [written.get(name) for name in pair]
        if "".join(pair) in special:
            raise InputError(f"merge {number}, {merge!r}, makes a special token, which text must never give; take that "
                             "merge out, or the token out of added_tokens", file=place)
        if len(parts) != 2 or None in parts or "".join(pair) not in written:
            raise InputError(f"merge {number}, {merge!r}, is not two tokens of the vocabulary that make a third",
                             file=place)
        token = parts[0] + parts[1]
        if token == latest or token not in rules:       # a rule that comes back later never acts: the first ones did
            rules.setdefault(token, []).append(tuple(parts))
        latest = token
    return rules


def _unreachable(ranks, rules):
    """Yields (token, parts it ends as when alone) for tokens that do not end as the two parts of one of their rules."""
    left, right = {}, {}        # token -> what stands at its left, right end while it is joined alone, byte first
    last = {}                   # token -> the highest rank joined on the way: when it is whole, seen from outside
    for token in sorted(ranks, key=lambda token: (len(token), ranks[token])):       # parts before what they make
        if len(token) == 1:
            left[token], right[token], last[token] = (token,), (token,), -1
            continue
        pairs = rules.get(token, ())
        parts = pairs[0] if len(pairs) == 1 else (None, None)
        if parts[0] not in last or parts[1] not in last or not _meet(ranks, last, right[parts[0]], left[parts[1]]):
            parts = tuple(split(ranks, token))
        if parts in pairs:
            left[token], right[token] = left[parts[0]] + (token,), right[parts[1]] + (token,)
            last[token] = max(ranks[token], last[parts[0]], last[parts[1]])
        else:
            yield token, parts


def _meet(ranks, last, ends, starts):
    """True if two tokens side by side are each joined whole before anything is joined across their border.

    Then split(ranks, ends[-1] + starts[-1]) is these two, seen without splitting. False also where ranks tie.
    ends, starts: what stands left and right of the border, from the single byte to the whole token.
    """
    i = j = 0
    while i + 1 < len(ends) or j + 1 < len(starts):
        next_end = last[ends[i + 1]] if i + 1 < len(ends) else math.inf
        next_start = last[starts[j + 1]] if j + 1 < len(starts) else math.inf
        if ranks.get(ends[i] + starts[j], math.inf) <= min(next_end, next_start) or next_end == next_start:
            return False
        i, j = (i + 1, j) if next_end < next_start else (i, j + 1)
    return True
