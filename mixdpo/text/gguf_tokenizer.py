"""A tokenizer as llama.cpp's metadata in a GGUF file: the inverse of tokenizer.from_metadata, which reads it.

    tokenizer.ggml.tokens       the vocabulary by id, in GPT-2's alphabet; special and added tokens as they are written
    tokenizer.ggml.pre          llama.cpp's name of the pre-tokenizer, which must be one of GGUF_STEPS

A model can have more rows than its tokenizer has tokens; llama.cpp wants a name for each: [PAD0], [PAD1], ...
What is returned was read back and compared, so the file gives the same ids as the tokenizer.
"""

from mixdpo.config import InputError
from mixdpo.text.bpe import pattern_of
from mixdpo.text.tokenizer import CONTROL, GGUF_STEPS, UNUSED, USER_DEFINED, Tokenizer, from_metadata

NORMAL = 1


def to_metadata(tokenizer: Tokenizer, rows: int) -> dict:
    """Metadata for write_gguf. rows: those of the model's embedding. Raises: InputError if llama.cpp has no such
    tokenizer, or the model has too few rows."""
    if tokenizer.vocab > rows:
        raise InputError(f"has {tokenizer.vocab} tokens, and the model's embedding has {rows} rows; use the tokenizer "
                         "of the model", file=tokenizer.place)
    for model, pre in GGUF_STEPS:
        if pattern_of(GGUF_STEPS[model, pre][0], tokenizer.place)[0] == tokenizer.pattern:
            found = metadata_as(tokenizer, rows, model, pre)
            if same_ids(from_metadata(found, tokenizer.place, tokenizer.place), tokenizer):
                return found
    raise InputError(f"llama.cpp has no such tokenizer that is known here, wanted one like those of "
                     f"{', '.join(pre for _, pre in GGUF_STEPS)}; use --format hf, and convert each expert with "
                     "llama.cpp's convert_hf_to_gguf.py", file=tokenizer.place)


def metadata_as(tokenizer: Tokenizer, rows: int, model: str, pre: str) -> dict:
    """The metadata under llama.cpp's names of a model of tokenizer and a pre-tokenizer."""
    doc, added = tokenizer.doc, tokenizer.doc.get("added_tokens") or []
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    for name, i in doc["model"]["vocab"].items():
        tokens[i], types[i] = name, NORMAL
    for token in added:
        tokens[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in doc["model"]["merges"]]
    found = {"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
             "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges,
             "tokenizer.ggml.eos_token_id": tokenizer.eos,
             "tokenizer.ggml.add_bos_token": tokenizer.bos is not None}
    if tokenizer.bos is not None:
        found["tokenizer.ggml.bos_token_id"] = tokenizer.bos
    if tokenizer.chat_template:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids for every text, and the same text for all ids."""
    return all(getattr(a, name) == getattr(b, name)
               for name in ("vocabulary", "pattern", "prefix_space", "nfc", "eos", "bos", "vocab"))
