"""Remakes tokenizers.json beside this script: small byte-level BPEs trained by the tokenizers library, and its ids.

    python tests/golden/make_tokenizers.py          with tokenizers 0.23 installed

    {case: {"tokenizer": tokenizer.json as the library writes it, "config": tokenizer_config.json,
            "texts": [...], "ids": [[...], ...]}}

Ids are those of the library with special tokens in a text read as text, and none added around it. A text that a case's
alphabet cannot write (the library drops such bytes) is left out of that case. Imports nothing of mixdpo.
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

FILE = Path(__file__).parent / "tokenizers.json"

CORPUS = """The film isn't what we'd hoped for; it's what they'll remember, and I've said so since 1987.
Its 2 leads act well, the other 10 don't. Runtime: 123 minutes, 4567 cuts, 89,000 extras (12.5% of them awake).
She said "you're joking" and he'd laughed. We're told that that was the third, the thirteenth and the thirtieth time.
    An indented line, a\ttab,   three blanks.  Two.  And a naïve café façade: 中文电影很好, фильм хороший.
Banana bandana, aaaa aaaaaaa, ababab abcabcabc. !!! ... --- <br /><br /> http://example.org/?a=1&b=2
the theatre, there, then, these, other, others, another, mother, bother; in, ing, ring, string, strings, stringing
"""

TEXTS = [
    "", " ", "  ", "\n", " \n \n", "Hello world 12345", "the  theatre\n\n there   then", "trailing   ", "   leading",
    "a\tb\r\nc",
    "it's IT'S we'll WE'LL they're I'd I'm'd ''s", "1 22 333 4444 55555 6,789.0 a1b22c333", "x  1   2 \n 3",
    "½ Ⅷ ٣٤ ²",
    "naïve café façade nai\u0308ve cafe\u0301", "中文电影很好,фильм", "👍🏽 👨‍👩‍👧 ok",
    "<|endoftext|> <|stop|><|endoftext|>",
    "aaaaaaaaa ababababab abcabcabcab", "<br /><br />!!!...---", "\x00\x01\x1f\x7f",
    "\u00a0\u2003\u3000x\u0085y\u200bz",
    "don't stringing thethethe otherother", "<note> <note><note>+x<note>", "a" * 70 + " " * 40 + "\n" * 5,
    "\ufeffBOM \ufffd",
]

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")


def sequence(*steps):
    return pre_tokenizers.Sequence(list(steps))


def isolated(regex):
    return sequence(pre_tokenizers.Split(Regex(regex), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


# Name -> (pre-tokenizer, settings of train()).
CASES = {
    "gpt2": (pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
    "prefix": (pre_tokenizers.ByteLevel(add_prefix_space=True), {}),
    # As SmolLM2: special tokens first, and bytes that no text of the corpus held are not in the vocabulary.
    "digits": (sequence(pre_tokenizers.Digits(individual_digits=True),
                        pre_tokenizers.ByteLevel(add_prefix_space=False)),
               {"alphabet": [], "special": ["<|unused|>", "<|endoftext|>", "<|stop|>"]}),
    "numbers": (sequence(pre_tokenizers.Digits(individual_digits=False),
                         pre_tokenizers.ByteLevel(add_prefix_space=False)), {}),
    # As Llama-3, but with its ids in an order that is not the merges'.
    "split": (isolated(SPLIT), {"shuffle": True}),
    # A regex that leaves most of a text unmatched.
    "gaps": (isolated(r"\p{N}+|th"), {}),
    # As Qwen: composed first, and an added token that is no special one.
    "composed": (isolated(SPLIT), {"normalizer": normalizers.NFC(), "literal": ["<note>", "<note>+"]}),
}


def train(pre, alphabet=None, special=("<|endoftext|>",), shuffle=False, normalizer=None, literal=(), corpus=None,
          size=450):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=1, special_tokens=list(special), show_progress=False,
                                  initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus or CORPUS.splitlines(keepends=True), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in literal])
    doc = json.loads(tokenizer.to_str())
    if shuffle:
        names = [name for name in doc["model"]["vocab"] if name not in special]
        ids = [doc["model"]["vocab"][name] for name in names]
        random.Random(0).shuffle(ids)
        doc["model"]["vocab"] |= dict(zip(names, ids))
    return doc


def golden():
    found = {}
    for case, (pre, settings) in CASES.items():
        doc = train(pre, **settings)
        tokenizer = Tokenizer.from_str(json.dumps(doc))
        tokenizer.encode_special_tokens = True
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
        same = {text: tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text for text in TEXTS}
        kept = [(text, i) for text, i in zip(TEXTS, ids) if tokenizer.decode(i, skip_special_tokens=False)
                in (same[text], " " + same[text])]
        found[case] = {"tokenizer": doc, "config": {"eos_token": "<|endoftext|>"},
                        "texts": [text for text, _ in kept], "ids": [i for _, i in kept]}
        print(f"{case}: {len(doc['model']['vocab'])} tokens, {len(kept)} of {len(TEXTS)} texts")
    return found


if __name__ == "__main__":
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(value)}" for case, value in golden().items())
    FILE.write_text(f"{{\n{lines}\n}}\n")
