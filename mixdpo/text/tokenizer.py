"""Text to token ids and back: GPT-2, SmolLM2, Llama-3 and any byte-level-BPE tokenizer.json; tiktoken does the merges.

Every source is first converted to tokenizer.json's form and read from there. So there is one way from text to ids, and
a saved tokenizer equals the loaded one. A text never gives a special token: the name of a special token in a text is
ordinary characters. Added tokens that are not special are recognised in a text, as their authors intended.

Left out: special tokens around a text (the caller adds end-of-text), truncation, padding, offsets.
"""

import base64
import functools
import hashlib
import json
import re
import unicodedata
from pathlib import Path

import tiktoken

from mixdpo.config import InputError, reading, write_text
from mixdpo.files.fetch import asset
from mixdpo.files.hub import resolve
from mixdpo.models.gguf import read_gguf
from mixdpo.text.bpe import (
    BYTE_LEVEL,
    LLAMA3_STEPS,
    QWEN_STEPS,
    SMOLLM_STEPS,
    document,
    merges_of,
    pattern_of,
    read_vocabulary,
    to_name,
)

# (tokenizer.ggml.model, tokenizer.ggml.pre) of a GGUF file -> its pre-tokenizer, and what else differs from the usual.
GGUF_STEPS: dict[tuple[str, str], tuple[dict, dict]] = {
    ("gpt2", "smollm"): (SMOLLM_STEPS, {}), ("gpt2", "gpt-2"): (BYTE_LEVEL, {}),
    ("gpt2", "qwen2"): (QWEN_STEPS, {"normalizer": {"type": "NFC"}}), ("gpt2", "llama-bpe"): (LLAMA3_STEPS, {})}
# llama.cpp's types of special tokens, of added ones that a text may hold, and of numbers without a token.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


class Tokenizer:
    """encode and decode. eos: id of end-of-text; bos: id that starts a text, or None; vocab: 1 + highest id.

    doc: tokenizer.json as a dict; config: tokenizer_config.json, with eos_token; place: its file or name, for errors.
    Raises: InputError if this code cannot reproduce the tokenizer's ids.
    """

    def __init__(self, doc, config, place):
        added, normalizer = doc.get("added_tokens") or [], doc.get("normalizer")
        self.vocabulary = read_vocabulary(doc["model"], added, place)
        self.pattern, self.prefix_space = pattern_of(doc.get("pre_tokenizer"), place)
        if normalizer not in (None, {"type": "NFC"}):
            raise InputError(f"normalizer {normalizer['type']} is not supported, wanted none or NFC; use another "
                             "tokenizer", file=place)
        self.nfc = normalizer is not None
        _refuse_flags(added, self.nfc, place)
        self.doc, self.config, self.place = doc, config, place
        self.special, self.chat_template = {t["content"]: t["id"] for t in added}, _template_of(config)  # for chat.py
        named = {key: value for key, value in config.items() if key.endswith("_token")}     # for the chat template
        self.named = {key: v["content"] if isinstance(v, dict) else v for key, v in named.items() if v is not None}
        self.eos, self.bos = self._id_of(config["eos_token"]), self._id_of(_first_of_template(doc))
        self.vocab = max(self.vocabulary.names) + 1
        try:
            self._bpe = tiktoken.Encoding(place, pat_str=self.pattern, mergeable_ranks=self.vocabulary.ranks,
                                          special_tokens={})
        except BaseException as error:                      # tiktoken's panics do not derive from Exception
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            raise InputError(f"tiktoken cannot read the pattern {self.pattern!r}, or two tokens have the same id: "
                             f"{error}; use another tokenizer", file=place) from None
        self._writable = bytes(token[0] for token in self.vocabulary.ranks if len(token) == 1)
        self._lengths = {i: len(self.vocabulary.names[i]) for i in self.vocabulary.ids.values()}
        literal = sorted(self.vocabulary.literal, key=len, reverse=True)    # a regex takes the first alternative
        self._literal = re.compile(f"({'|'.join(map(re.escape, literal))})") if literal else None

    def _id_of(self, name):
        """The id of a token in tokenizer_config.json's form: a name, or a dict with `content`. None gives None."""
        name = name["content"] if isinstance(name, dict) else name
        if name is None:
            return None
        found = self.special.get(name, self.doc["model"]["vocab"].get(name))
        if found is None:
            raise InputError(f"the special token {name!r} is not in the vocabulary; use the tokenizer files of one "
                             "model", file=self.place)
        return found

    def encode(self, text):
        """-> list of ids. Raises: InputError with the character, and its position, that the vocabulary lacks."""
        if self._literal is None:
            return self._encode(text)
        ids = []
        for n, piece in enumerate(self._literal.split(text)):       # odd n: an added token
            ids += [self.vocabulary.literal[piece]] if n % 2 else self._encode(piece)
        return ids

    def _encode(self, text):
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if self.prefix_space and text and not text.startswith(" "):
            text = " " + text
        try:
            data = text.encode()
        except UnicodeEncodeError as error:                 # tiktoken would replace the character without an error
            self._refuse(text, error.start)
        unwritable = data.translate(None, self._writable)   # bytes without a token, at which tiktoken panics
        if unwritable:
            self._refuse(text, next(n for n, character in enumerate(text) if unwritable[0] in character.encode()))
        try:
            ranks = self._bpe.encode_ordinary(text)
        except BaseException as error:                      # tiktoken's panics do not derive from Exception
            if type(error).__name__ != "PanicException":
                raise
            raise InputError(f"tiktoken cannot cut this text of {len(text)} characters into pieces: it fails at "
                             "several 100,000 blanks in a row (shorten them), and at a pattern that matches the "
                             "empty string (use another tokenizer)", file=self.place) from None
        ids = list(map(self.vocabulary.ids.__getitem__, ranks))
        written = sum(map(self._lengths.__getitem__, ids))
        if written != len(data):
            raise InputError(f"the pre-tokenizer drops a part of this text: {len(data) - written} bytes; use another "
                             f"tokenizer, or remove the text: {text[:60]!r}", file=self.place)
        return ids

    def _refuse(self, text, n):
        raise InputError(f"character {text[n]!r} (U+{ord(text[n]):04X}) at position {n} has no token in this "
                         f"vocabulary; remove it from the text: {text[max(n - 20, 0):n + 20]!r}", file=self.place)

    def decode(self, ids):
        """Ids -> text. Bytes that are not UTF-8 and ids without a token give U+FFFD; special tokens give their names.
        Never raises."""
        names = self.vocabulary.names
        return b"".join(names.get(i, b"\xef\xbf\xbd") for i in ids).decode(errors="replace")

    @functools.cached_property
    def key(self):
        """sha256 of everything that determines ids; two tokenizers with the same key give the same ids."""
        merged = [(rank, self.vocabulary.ids[rank], token.hex()) for token, rank in self.vocabulary.ranks.items()]
        parts = [[(i, token) for _, i, token in sorted(merged)], self.pattern, self.prefix_space, self.nfc, self.eos,
                 self.bos, sorted(self.vocabulary.literal.items()), self.vocab,
                 self.chat_template and [self.chat_template, self.named]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def save(self, directory):
        """Writes tokenizer.json and tokenizer_config.json, which load_tokenizer and transformers read.
        Raises: OSError."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in (("tokenizer.json", self.doc), ("tokenizer_config.json", self.config)):
            write_text(directory / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _refuse_flags(added, nfc, place):
    """Raises: InputError if an added token needs more than an exact match in the text."""
    for token in added:
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]
        flags += ["normalized"] if nfc and token.get("normalized") else []
        if flags and not token["special"]:
            raise InputError(f"added token {token['content']!r} with {', '.join(flags)} is not supported; use another "
                             "tokenizer", file=place)


def _template_of(config):
    """The chat template, a Jinja program, or None. If there are several with names: the one named `default`."""
    jinja = config.get("chat_template")
    return jinja if not isinstance(jinja, list) else {each["name"]: each["template"] for each in jinja}.get("default")


def _first_of_template(doc):
    """The special token that tokenizer.json's post-processor adds before a text, or None."""
    post = doc.get("post_processor") or {}
    for step in post.get("processors", [post]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None


def load_tokenizer(name_or_directory, data=None):
    """-> Tokenizer of "gpt2", "smollm2", "llama-3.2-1b", a directory with tokenizer.json, or a .gguf file.

    Instead of tokenizer.json a directory may have GPT-2's older files, vocab.json and merges.txt. data: a local folder
    that is searched before anything is fetched; it may hold a model directory of that name. Files that have not
    changed are not read again: the caller shares the tokenizer with earlier ones. Raises: InputError.
    """
    if data is not None and (Path(data) / name_or_directory / "tokenizer.json").is_file():
        name_or_directory = Path(data) / name_or_directory
    if name_or_directory in NAMES:
        file, read = NAMES[name_or_directory]
        path = asset(file, data)
        return _read_once(read, path, (_stamp(path),))
    path = resolve(name_or_directory, data)             # a name on the hub: its local folder
    if path.suffix == ".gguf" and path.is_file():
        return _read_once(_from_gguf, path, (_stamp(path),))
    if not path.is_dir():
        raise InputError(f"no such tokenizer; wanted a directory, a .gguf file or one of {', '.join(NAMES)}", file=path)
    texts = [file for file in path.iterdir() if file.suffix in (".json", ".txt", ".jinja")]
    return _read_once(_from_directory, path, tuple(sorted(map(_stamp, texts))))


def _stamp(file):
    """What changes if the file does."""
    facts = file.stat()
    return file.name, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _read_once(read, path, stamps):
    """read(path), or what it returned for files with these stamps."""
    return read(path)


def _from_directory(path):
    with reading(path, "its tokenizer files do not have transformers' format: save them again"):
        doc = _document_of(path)
        return Tokenizer(doc, _config_of(path, doc), str(path))


def _document_of(directory):
    if (directory / "tokenizer.json").is_file():
        return _read_json(directory / "tokenizer.json")
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        file = directory / "tokenizer_config.json"
        kind = str(file.is_file() and _read_json(file).get("tokenizer_class") or "GPT2Tokenizer")
        if not kind.startswith("GPT2"):
            raise InputError(f"vocab.json and merges.txt of a {kind} do not say how it cuts a text; copy the model's "
                             "tokenizer.json there", file=directory)
        return _from_merges(directory)
    raise InputError("has neither tokenizer.json nor vocab.json and merges.txt; copy the model's files there, or run "
                     "transformers' AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)", file=directory)


def _read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:         # also for bytes that are not UTF-8
        raise InputError(f"is not JSON ({error}); it is truncated or damaged, fetch it again", file=path) from None
    if not isinstance(value, dict):
        raise InputError(f"holds a {type(value).__name__}, wanted an object; fetch it again", file=path)
    return value


def _config_of(directory, doc):
    """tokenizer_config.json with eos_token; if that is missing, it is taken from the model's configuration."""
    file = directory / "tokenizer_config.json"
    config = _read_json(file) if file.is_file() else CONFIG
    if (jinja := directory / "chat_template.jinja").is_file():
        config = config | {"chat_template": jinja.read_text(encoding="utf-8")}
    if config.get("eos_token"):
        return config
    for path in (directory / "generation_config.json", directory / "config.json"):
        eos = _read_json(path).get("eos_token_id") if path.is_file() else None
        eos = eos[0] if isinstance(eos, list) else eos
        for name, i in {token["content"]: token["id"] for token in doc.get("added_tokens") or []}.items():
            if i == eos:
                return config | {"eos_token": name}
    raise InputError("no file names the end-of-text token; add \"eos_token\": \"NAME\" to tokenizer_config.json",
                     file=directory)


def _from_merges(directory):
    """tokenizer.json from GPT-2's older files: vocab.json, and merges.txt with one rule per line."""
    vocab = _read_json(directory / "vocab.json")
    merges = [line for line in (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
              if line and not line.startswith("#version")]
    made = {merge.replace(" ", "") for merge in merges}
    return document(vocab, [name for name in vocab if name not in made and len(name) > 1], BYTE_LEVEL, merges, False)


def _read_ranks(path):
    """{bytes: rank} from tiktoken's file format. Each line: the token in base64, a blank, the rank."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _from_ranks(ranks, special, steps):
    """tokenizer.json from tiktoken's ranks. special: {name: id}; steps: the pre-tokenizer."""
    merges = merges_of(ranks)
    single = sum(len(token) == 1 for token in ranks)
    vocab = {to_name(token): rank for token, rank in ranks.items()} | special
    return document(vocab, special, steps, merges, ignore_merges=len(merges) + single < len(ranks))


def _gpt2(path):
    doc = _from_ranks(_read_ranks(path), {"<|endoftext|>": 50256}, BYTE_LEVEL)
    return Tokenizer(doc, CONFIG | {"eos_token": "<|endoftext|>"}, "gpt2")


def _smollm2(path):
    return _from_gguf(path, "smollm2")


def _from_gguf(path, place=None):
    return from_metadata(read_gguf(path)[0], path, place or str(path))


def from_metadata(metadata, path, place):
    """-> Tokenizer of a GGUF file's metadata; path: the file. The inverse: gguf_tokenizer.py. Raises: InputError."""
    kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind not in GGUF_STEPS:
        raise InputError(f"tokenizer {' '.join(map(str, kind))} is not supported, wanted one of "
                         f"{', '.join(' '.join(known) for known in GGUF_STEPS)}; give a directory with tokenizer.json",
                         file=path)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    added = [token for token, number in zip(tokens, types) if number in (CONTROL, USER_DEFINED)]
    steps, more = GGUF_STEPS[kind]
    vocab = {token: i for i, (token, number) in enumerate(zip(tokens, types)) if number != UNUSED}
    doc = document(vocab, added, steps, metadata["tokenizer.ggml.merges"], ignore_merges=kind[1] == "llama-bpe") | more
    for token in doc["added_tokens"]:
        token["special"] = types[token["id"]] == CONTROL
    config = CONFIG | {"eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]]}
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    if metadata.get("tokenizer.ggml.add_bos_token", kind[1] == "llama-bpe"):
        config["bos_token"] = tokens[metadata["tokenizer.ggml.bos_token_id"]]
        doc["post_processor"] = _starting_with(config["bos_token"], metadata["tokenizer.ggml.bos_token_id"])
    return Tokenizer(doc, config, place)


def _starting_with(bos, number):
    """The post-processor of tokenizer.json that puts a start token before a text."""
    return {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}}}


def _llama3(path):
    """Llama 3.2's tokenizer. Of its 256 special tokens eight have names; the others are reserved and numbered."""
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id", 7: "end_header_id",
             8: "eom_id", 9: "eot_id", 10: "python_tag"}
    reserved = [n for n in range(256) if n not in named]
    special = {f"<|{name}|>": 128000 + n for n, name in named.items()}
    special |= {f"<|reserved_special_token_{k}|>": 128000 + n for k, n in enumerate(reserved)}
    doc = _from_ranks(_read_ranks(path), special, LLAMA3_STEPS)
    bos = "<|begin_of_text|>"
    doc["post_processor"] = _starting_with(bos, special[bos])
    return Tokenizer(doc, CONFIG | {"eos_token": "<|end_of_text|>", "bos_token": bos}, "llama-3.2-1b")


# name: its asset (files/fetch.py), and what reads it
NAMES = {"gpt2": ("gpt2.tiktoken", _gpt2), "smollm2": ("smollm2", _smollm2),
         "llama-3.2-1b": ("llama3.tokenizer", _llama3)}
