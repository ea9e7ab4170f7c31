"""Byte-level BPE: converts tokenizer.json's vocabulary, merge rules and pre-tokenizer for tiktoken, and back.

The pre-tokenizer cuts a text into pieces; merges happen within a piece. The two programs choose merges differently:

tokenizer.json   has an ordered list of merge rules (left, right). Of all adjacent pairs with a rule, merge the pair
                 whose rule comes first; repeat until no pair has a rule. A separate table gives the ids, in any order.
tiktoken         has a rank for each token. Of all adjacent pairs whose concatenation is a token, merge the pair with
                 the lowest rank. A piece that is itself a token is not split at all.

They agree on every text under one condition: for each token t, tokenising the bytes of t alone ends with a merge of two
parts that are one of t's rules. Proof: suppose that x and y with x + y = t are about to be merged in some text. No
earlier merge crossed the ends of t. So the merges within t so far are the same as when t is tokenised alone. If
tokenising t alone stops at three parts or more, no text gives t by merges; t occurs only where a piece equals t
(tokenizer.json's `ignore_merges`). `read_vocabulary` checks the condition for every token. If tiktoken would give other
ids than tokenizer.json, that is an error.

Left out: models that are not byte-level BPE (SentencePiece's, as of Mistral 7B; WordPiece; Unigram), and pre-tokenizers
that differ from those of GPT-2, SmolLM2, Llama-3, Qwen and OLMo 2. Each is an error that names it.
"""

import math
from dataclasses import dataclass

from mixdpo.config import InputError

# GPT-2 writes bytes as characters: the 188 printable bytes of Latin-1 as themselves, the other 68 as U+0100 and up.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in PRINTABLE]
CHARACTER = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(HIDDEN)}
# The inverse goes through Latin-1, whose codes are the bytes. Characters outside GPT-2's alphabet become U+FFFF or stay
# as they are; Latin-1 cannot encode them, which is the error that `to_bytes` expects.
TO_LATIN1 = dict.fromkeys(HIDDEN, "\uffff") | {ord(character): byte for byte, character in CHARACTER.items()}

# The pattern that cuts a text into pieces: contractions, letters, digits, other characters, white space. The last blank
# before a word belongs to the word.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after digits were separated: white space before a digit is then at the end of a text, and stays one piece.
DIGITS_PATTERN = r"%s|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# tokenizer.json's pre-tokenizers for these patterns. Qwen's is Llama 3's with digits one by one.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SMOLLM_STEPS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
LLAMA3_STEPS, QWEN_STEPS = ({"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
    BYTE_LEVEL | {"use_regex": False}]} for pattern in (LLAMA3_PATTERN, LLAMA3_PATTERN.replace("{1,3}", "")))


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary that tiktoken can run."""

    ranks: dict     # bytes -> rank, for tiktoken
    ids: dict       # rank -> id; if the ids increase with the merges, each rank equals its id
    names: dict     # id -> bytes of every token, for decoding
    literal: dict   # text -> id of added tokens that are not special; they are searched in a text first


def to_bytes(name):
    """A token as in tokenizer.json -> its bytes; None if it has characters outside GPT-2's alphabet."""
    try:
        return name.translate(TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return None


def to_name(token):
    """Bytes -> the token as in tokenizer.json."""
    return "".join(map(CHARACTER.__getitem__, token))


def split(ranks, token):
    """The parts of a token's bytes, tokenised alone, before the last merge. Two parts: the last merge makes the token.
    More: the merges stop before. One: the token is a single byte."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], math.inf), i) for i in range(len(parts) - 1))
        if rank == math.inf:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def merges_of(ranks):
    """Ranks (bytes -> rank) -> merge rules "left right", in order. Tokens that merges cannot produce have no rule."""
    in_order = sorted((token for token in ranks if len(token) > 1), key=ranks.get)
    return [" ".join(map(to_name, parts)) for token in in_order if len(parts := split(ranks, token)) == 2]


def document(vocab, special, steps, merges, ignore_merges):
    """tokenizer.json as a dict, for the tokenizers library.

    vocab: name -> id, with special tokens; special: the names of the special tokens; steps: the pre-tokenizer.
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
    """tokenizer.json's pre_tokenizer -> (pattern for tiktoken, add_prefix_space). place: the file, for errors.
    Raises: InputError if the pre-tokenizer is not supported."""
    steps = steps["pretokenizers"] if steps and steps["type"] == "Sequence" else [steps] if steps else []
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel":
        prefix, own_regex = steps[-1]["add_prefix_space"], steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own_regex:
            return GPT2_PATTERN, prefix
        if kinds == ["Digits", "ByteLevel"] and own_regex and not prefix:
            return DIGITS_PATTERN % (r"\p{N}" if steps[0]["individual_digits"] else r"\p{N}+"), False
        if kinds == ["Split", "ByteLevel"] and not own_regex and not prefix:
            regex, way = steps[0]["pattern"].get("Regex"), (steps[0]["behavior"], steps[0]["invert"])
            if regex and way == ("Isolated", False):
                # Text between two matches of the regex is a piece too; tiktoken alone would drop it.
                return rf"{regex}|(?:(?!{regex})[\s\S])+", False
            if regex and way == ("Removed", True):      # OLMo 2: both programs drop it; a text that has some is refused
                return regex, False
    settings = "; ".join(", ".join(f"{key} {value!r}" for key, value in step.items()) for step in steps) or "none"
    raise InputError(f"this pre-tokenizer is not supported: {settings}. Wanted: ByteLevel; Digits, ByteLevel; or Split "
                     "(Regex; Isolated, or Removed and inverted), ByteLevel without regex; a prefix space with the "
                     "first only. Use another tokenizer", file=place)


def read_vocabulary(model, added, place):
    """tokenizer.json's model and added_tokens -> Vocabulary. place: the file, for errors.
    Raises: InputError if the model is not supported, or if tiktoken would give other ids."""
    unsupported = {key: model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix",
                                               "byte_fallback") if model.get(key)}
    if model["type"] != "BPE" or unsupported:
        kind = f"SentencePiece's {model['type']}" if "byte_fallback" in unsupported else model["type"]  # Mistral 7B
        raise InputError(f"model {kind} {unsupported or ''} is not supported, wanted byte-level BPE; use a model with "
                         "one: Qwen, SmolLM, Llama 3, OLMo 2, or Mistral from NeMo on", file=place)
    vocab, ignore_merges = model["vocab"], bool(model.get("ignore_merges"))
    special = {token["content"] for token in added if token["special"]}
    written = {name: to_bytes(name) for name in vocab if name not in special}
    names = {vocab[name]: token if token is not None else name.encode() for name, token in written.items()}
    names |= {token["id"]: token["content"].encode() for token in added}

    rules = _rules(model["merges"], written, special, place)
    ids = {token: vocab[name] for name, token in written.items() if token is not None and len(token) == 1}
    ids |= {token: vocab[to_name(token)] for token in rules}
    if ignore_merges:                                   # tokens without a rule occur as pieces
        ids |= {token: vocab[name] for name, token in written.items() if token is not None and token not in ids}
    in_order = [ids[token] for token in rules]
    rising = all(a < b for a, b in zip(in_order, in_order[1:]))
    ranks = dict(ids) if rising else {token: rank for rank, token in enumerate(ids)}

    for token, parts in _unreachable(ranks, rules):
        if len(parts) == 2:
            raise InputError(f"tiktoken would merge token {to_name(token)!r} from {to_name(parts[0])!r} and "
                             f"{to_name(parts[1])!r}, for which tokenizer.json has no merge; use another tokenizer: "
                             "these merges cannot be expressed as ranks", file=place)
        if not ignore_merges:
            del ranks[token]                            # no text gives it; tiktoken must not take a piece as this token
    literal = {token["content"]: token["id"] for token in added if not token["special"]}
    return Vocabulary(ranks, {rank: ids[token] for token, rank in ranks.items()}, names, literal)


def _rules(merges, written, special, place):
    """{token: its merge rules, as pairs of bytes}. The tokens are in the order of their first rule."""
    rules, latest = {}, None
    for number, merge in enumerate(merges, 1):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        parts = [written.get(name) for name in pair]
        if "".join(pair) in special:
            raise InputError(f"merge {number}, {merge!r}, makes a special token, which no text may produce; remove the "
                             "merge, or remove the token from added_tokens", file=place)
        if len(parts) != 2 or None in parts or "".join(pair) not in written:
            raise InputError(f"merge {number}, {merge!r}: wanted two tokens of the vocabulary whose concatenation is "
                             "a third; the file is damaged, fetch it again", file=place)
        token = parts[0] + parts[1]
        if token == latest or token not in rules:       # a later rule for the same token never applies: skip it
            rules.setdefault(token, []).append(tuple(parts))
        latest = token
    return rules


def _unreachable(ranks, rules):
    """Yields (token, parts) for each token that, tokenised alone, does not end with a merge by one of its rules.
    parts: as in `split`."""
    left, right = {}, {}        # token -> the parts at its left, right end while it is tokenised alone, in order
    last = {}                   # token -> the highest rank among the merges that make it: the time when it is complete
    for token in sorted(ranks, key=lambda token: (len(token), ranks[token])):       # parts before their concatenation
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
    """True if two adjacent tokens are each complete before any merge crosses the border between them.

    Then split(ranks, ends[-1] + starts[-1]) is these two tokens; this test finds it faster. False also if ranks tie.
    ends, starts: the parts to the left and to the right of the border, from the single byte to the complete token.
    """
    i = j = 0
    while i + 1 < len(ends) or j + 1 < len(starts):
        next_end = last[ends[i + 1]] if i + 1 < len(ends) else math.inf
        next_start = last[starts[j + 1]] if j + 1 < len(starts) else math.inf
        if ranks.get(ends[i] + starts[j], math.inf) <= min(next_end, next_start) or next_end == next_start:
            return False
        i, j = (i + 1, j) if next_end < next_start else (i, j + 1)
    return True
