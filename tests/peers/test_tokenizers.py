"""Our ids beside those of tokenizers, transformers and tiktoken's own GPT-2, live, on text made to break them; GGUF's
numbers beside the gguf package. The docstring of each test names faults that it was seen to fail on.
"""

import copy
import importlib.util
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from mixdpo.config import InputError
from mixdpo.files.fetch import asset
from mixdpo.models.gguf import read_gguf
from mixdpo.text.chat import encode_answer, encode_chat
from mixdpo.text.tokenizer import Tokenizer, _from_ranks, load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra `peers`)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
make_tokenizers = pytest.importorskip("tests.golden.make_tokenizers")
make_families = pytest.importorskip("tests.golden.make_families")

NAMES = ["gpt2", "smollm2", "llama-3.2-1b"]
CHARACTERS = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000]
CLASSES = {}
for character in CHARACTERS:
    CLASSES.setdefault(unicodedata.category(character), []).append(character)
BLANKS = [" ", "  ", "    ", "\n", "\n\n", "\t", " \n", "\r\n", "\u00a0", "\u2003", "\x0b", "\x0c", "\x1c", "\x85",
          "\u3000"]
WORDS = ["'s", "'S", "'ll", "'Re", "n't", "'d", "''", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|begin_of_text|>",
         "é", "e\u0301", "👍🏽", "👨‍👩‍👧", "中文", "日本語", "русский", "한국어", "ไทย", "عربي", "٣٤", "½", "²", "Ⅷ", "...", "--",
         "://", "_", "<br />", "the", " the", "The", "film", "don", "aaaa"]


def text(draw):
    """A few dozen characters: blanks, contractions, digits, special tokens' names, letters, and any code point."""
    pieces = []
    for _ in range(draw.randrange(1, 25)):
        kind = draw.randrange(6)
        pieces.append(draw.choice(BLANKS) if kind == 0 else draw.choice(WORDS) if kind < 3
                      else str(draw.randrange(10 ** draw.randrange(1, 10))) if kind == 3
                      else "".join(draw.choices("abcdefghijklmnopqrstuvwxyzABC", k=draw.randrange(1, 9))) if kind == 4
                      else draw.choice(CLASSES[draw.choice(list(CLASSES))]))
    return "".join(pieces)


def texts(count, seed=0):
    draw = random.Random(seed)
    return [text(draw) for _ in range(count)]


def ours(tokenizer, text):
    """Ids, or None for a text with a character that the vocabulary lacks."""
    try:
        return tokenizer.encode(text)
    except InputError as error:
        assert error.file == tokenizer.place
        return None


@pytest.fixture(scope="module", params=NAMES)
def real(request, tmp_path_factory):
    """(our tokenizer, the folder that it was saved to)."""
    try:
        tokenizer = load_tokenizer(request.param)
    except InputError as error:
        pytest.skip(f"the vocabulary of {request.param} is not at hand and could not be fetched: {error}")
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    return tokenizer, folder


def test_saved_tokenizers_give_the_same_ids_in_transformers(real):
    """Faults: the start token not read from the template; the end token not saved; special ids off by one."""
    tokenizer, folder = real
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    compared = 0
    for one in texts(4000):
        ids = ours(tokenizer, one)
        if ids is not None:
            assert theirs.encode(one, add_special_tokens=False, split_special_tokens=True) == ids, repr(one)
            assert theirs.decode(ids) == one == tokenizer.decode(ids)
            compared += 1
    assert compared > 3000
    assert theirs.eos_token_id == tokenizer.eos and len(theirs) == tokenizer.vocab
    start = theirs.encode("the film", add_special_tokens=True)
    assert start == [tokenizer.bos] * (tokenizer.bos is not None) + tokenizer.encode("the film")


JINJA = {                               # Llama 3's own, written anew; SmolLM2's comes with its vocabulary
    "llama 3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
               "m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
               "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama 3.2": "{{ bos_token }}{% set own = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' %}"
                 "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: "
                 "26 Jul 2024\n\n' + own + '<|eot_id|>' }}{% for m in messages if m['role'] != 'system' %}"
                 "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
                 "{% endfor %}{% if add_generation_prompt %}"
                 "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
}


@pytest.mark.parametrize("name", ["smollm2", *JINJA])
def test_conversations_as_apply_chat_template_writes_them(name, tmp_path):
    """Random turns, with a system's or without, and whole conversations with an answer. Names of special tokens are
    left out: theirs become special tokens, ours stay text. Faults: role and content tokenised apart; blanks at a
    content's ends kept, or taken away; a line break behind the last turn; dates stripped."""
    tokenizer = copy.copy(load_tokenizer("smollm2" if name == "smollm2" else "llama-3.2-1b"))
    if name in JINJA:
        tokenizer.config = tokenizer.config | {"chat_template": JINJA[name]}
    tokenizer.save(tmp_path)
    tokenizer, theirs = load_tokenizer(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    draw, sample = random.Random(0), [one for one in texts(6000, seed=5) if "<|" not in one and ours(tokenizer, one)]
    roles = {True: ["system", "user"], False: ["user", "assistant", "user"]}
    for n in range(600):
        messages = [{"role": role, "content": draw.choice(sample)} for role in roles[n % 2 == 0]]
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ids, left_out = encode_chat(messages, tokenizer, 10000)
        assert ids == wanted and left_out == 0, messages
        answer = {"role": "assistant", "content": draw.choice("Aa1") + draw.choice(sample)}       # no blank begins it
        wanted = theirs.apply_chat_template([*messages, answer], return_dict=False)
        ours_whole = ids + encode_answer(answer["content"], tokenizer)
        assert ours_whole == wanted[: len(ours_whole)] and theirs.decode(wanted[len(ours_whole) :]) in ("", "\n")


@pytest.fixture(scope="module", params=make_families.FAMILIES)
def family(request, tmp_path_factory):
    """(name, folder): a vocabulary trained on random text, with the structure of the family's published files."""
    folder, corpus = tmp_path_factory.mktemp("family"), [*texts(400, seed=30), *CODE] * 2
    make_families.write(folder, request.param, make_families.document(request.param, corpus, size=2000))
    return request.param, folder


CODE = ["def f(x: int) -> str:\n    return f'{x:>10}'  # 3.14\n", "for (int i = 0; i < 10; ++i) { a[i] += 0x1F; }\r\n",
        "<|im_start|>user\n<think>\n\n</think>\n\n<tool_call>[INST]</s>|||PHONE_NUMBER|||", "\t\t}\n\n\n\t} // end\n", "1234567890"]


def test_families_are_cut_as_the_library_cuts_them(family):
    """Random text joined with code, and every kind of character. Faults: NFC left out; digits in threes; names of added
    tokens that are not special read as text."""
    (_, folder), draw = family, random.Random(1)
    tokenizer, theirs = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    kinds = [f"a{c}b {c} 1{c}" for n, c in enumerate(CHARACTERS) if n < 0x3000 and n % 5 == 0 or n % 997 == 0]
    for one in [*(one + draw.choice(["", *CODE]) for one in texts(2000, seed=31)), *CODE, *kinds]:
        assert tokenizer.encode(one) == theirs.encode(one, add_special_tokens=False).ids, repr(one)


def test_families_have_the_published_pattern_and_templates(family):
    """Two of the sources at hand: transformers' own Qwen2, and the templates that trl holds. Fault: ours mistyped."""
    qwen2 = importlib.import_module("transformers.models.qwen2.tokenization_qwen2")
    assert make_families.QWEN == qwen2.PRETOKENIZE_REGEX
    if (published := published_template(family[0])) is None:
        pytest.skip("trl holds no template of this family")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(family[1])
    for messages in conversations(300, [one for one in texts(2000, seed=32) if "<|" not in one]):
        for whole in (messages, messages[:-1]):
            anew, own = (theirs.apply_chat_template(whole, tokenize=False, enable_thinking=False, chat_template=jinja,
                                                    add_generation_prompt=whole != messages)
                         for jinja in (make_families.FAMILIES[family[0]][3]["chat_template"], published))
            assert anew == own, whole


def published_template(name):
    """The published chat template that the package trl holds, or None."""
    file = {"Qwen2.5": "qwen2_5", "Qwen3": "qwen3", "Qwen3-2507": "qwen3_instruct_2507"}.get(name)
    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    return file and (folder / f"{file}.jinja").read_text()


ROLES = [["user"], ["system", "user"], ["user", "assistant", "user"], ["system", "user", "assistant", "user"],
         ["system", "user", "assistant", "user", "assistant", "user"]]


def conversations(count, sample, seed=0):
    """Random turns with an answer last. A fifth of the earlier answers have thoughts. No system turn is blank: SmolLM3
    writes its default instead, which is a fault of that line (tests/text/test_tokenizer_families.py)."""
    draw = random.Random(seed)
    for n in range(count):
        messages = [{"role": role, "content": draw.choice(sample)} for role in ROLES[n % len(ROLES)]]
        messages[0]["content"] += "." * (not messages[0]["content"].strip())
        for message in messages:
            if message["role"] == "assistant" and draw.random() < 0.2:
                message["content"] = f"<think>\n{draw.choice(sample)}\n</think>\n\n" + message["content"]
        # No blank begins an answer: it would be tokenised with the opening before it.
        yield [*messages, {"role": "assistant", "content": draw.choice("Aa1") + draw.choice(sample)}]


@pytest.mark.parametrize("published", [False, True])
def test_conversations_of_families_as_apply_chat_template_writes_them(family, published, tmp_path):
    """600 random conversations each, whole and up to the answer; with our templates and, where trl holds it, with the
    published one. Faults: no empty block in the opening, or one in the answer; thoughts of earlier answers kept; the
    default system turn left out; Mistral's system turn in its own place; text of two turns tokenised apart (OLMo 2).
    Mistral's template omits the system turn if an answer is the last turn; then only the answer is compared."""
    name, folder = family
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    if published:
        theirs.chat_template = published_template(name)
        if theirs.chat_template is None:
            pytest.skip("trl holds no template of this family")
    theirs.save_pretrained(tmp_path)
    tokenizer, sample = load_tokenizer(tmp_path), [one for one in texts(6000, seed=33) if "<|" not in one]
    for messages in conversations(600, sample):
        ids, left_out = encode_chat(messages[:-1], tokenizer, 100000)
        assert ids == make_families.apply(theirs, messages[:-1], True) and left_out == 0, messages
        answer, wanted = encode_answer(messages[-1]["content"], tokenizer), make_families.apply(theirs, messages, False)
        wanted = wanted[: len(wanted) - wanted[::-1].index(answer[-1])]      # without a line break after the last turn
        if name == "Mistral NeMo" and messages[0]["role"] == "system":
            assert answer == wanted[-len(answer) :], messages
        else:
            assert ids + answer == wanted, messages


def test_qwens_real_vocabulary():
    """151,643 ranks that the package dashscope ships, with transformers' pattern. Fault: digits in threes."""
    if (spec := importlib.util.find_spec("dashscope")) is None:
        pytest.skip("dashscope is not installed (pip install --no-deps dashscope==2.0.2)")
    ranks = load_tiktoken_bpe(str(Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"))
    added = {name: len(ranks) + n for n, name in enumerate(make_families.CHATML)}
    doc = _from_ranks(ranks, added, json.loads(make_families.isolated(make_families.QWEN).__getstate__()))
    doc["normalizer"] = {"type": "NFC"}
    tokenizer, theirs = Tokenizer(doc, make_families.IM_END, "qwen"), tokenizers.Tokenizer.from_str(json.dumps(doc))
    public = tiktoken.Encoding("qwen", pat_str=make_families.QWEN, mergeable_ranks=ranks, special_tokens={})
    theirs.encode_special_tokens = True
    assert tokenizer.encode("Hello world 123") == [9707, 1879, 220, 16, 17, 18] and tokenizer.eos == 151645
    for one in texts(2000, seed=34):
        ids = tokenizer.encode(one)
        assert ids == theirs.encode(one, add_special_tokens=False).ids, repr(one)
        assert ids == public.encode_ordinary(unicodedata.normalize("NFC", one)), repr(one)


def test_every_kind_of_character_is_cut_alike(real):
    """Each character below U+3000 and each 37th above, after a letter, before one, alone and after a digit.
    Fault: Python's own classes of characters in place of the regex's."""
    tokenizer, folder = real
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for one in [c for n, c in enumerate(CHARACTERS) if n < 0x3000 or n % 37 == 0]:
        ids = ours(tokenizer, f"a{one}b {one} 1{one}")
        wanted = theirs.encode(f"a{one}b {one} 1{one}", add_special_tokens=False).ids
        assert ids is None or ids == wanted, f"U+{ord(one):04X}"


def test_gpt2_is_tiktokens_own():
    """Their faster pattern, our ranks. Fault: a contraction lost from the pattern."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    tokenizer, ranks = load_tokenizer("gpt2"), load_tiktoken_bpe(str(asset("gpt2.tiktoken")))
    theirs = tiktoken.Encoding("r50k", pat_str=public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    for one in texts(3000, seed=1):
        assert theirs.encode_ordinary(one) == tokenizer.encode(one)


def test_llama3_as_transformers_converts_it(tmp_path):
    """Their conversion lists every split of every token as a merge. Faults: only a token's first rule kept; tokens that
    no merge reaches lost."""
    tokenizer = load_tokenizer("llama-3.2-1b")
    convert = importlib.import_module("transformers.convert_slow_tokenizer")
    converter = convert.TikTokenConverter(
        str(asset("llama3.tokenizer")), pattern=tokenizer.doc["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"],
        extra_special_tokens=[token["content"] for token in tokenizer.doc["added_tokens"]])
    converter.converted().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>"}))
    again, ranks = load_tokenizer(tmp_path), load_tiktoken_bpe(str(asset("llama3.tokenizer")))
    assert again.vocabulary.ranks == tokenizer.vocabulary.ranks == ranks
    theirs = tiktoken.Encoding("llama3", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens={})
    for one in texts(500, seed=2):
        assert again.encode(one) == tokenizer.encode(one) == theirs.encode_ordinary(one)


@pytest.mark.parametrize("case", make_tokenizers.CASES)
def test_newly_trained_tokenizers(case, tmp_path):
    """What the library trains on random text is never refused, and its ids are ours. Faults: as for golden files."""
    pre, settings = make_tokenizers.CASES[case]
    for seed in range(3):
        corpus = [one.replace("<|endoftext|>", "") for one in texts(400, seed=seed + 10)]
        doc = make_tokenizers.train(pre, corpus=corpus, size=900 + 700 * seed, **settings)
        (tmp_path / "tokenizer.json").write_text(json.dumps(doc))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
        tokenizer, theirs = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_str(json.dumps(doc))
        theirs.encode_special_tokens = True
        for one in [*texts(700, seed=seed + 20), *corpus]:
            ids = ours(tokenizer, one)
            assert ids is None or theirs.encode(one, add_special_tokens=False).ids == ids, repr(one)
            assert ids is None or theirs.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


def test_golden_files_are_what_the_library_gives_now():
    """Fault: a golden file edited by hand."""
    assert make_tokenizers.golden() == json.loads(make_tokenizers.FILE.read_text())
    assert make_families.golden() == json.loads(make_families.FILE.read_text())


def test_gguf_numbers_are_the_gguf_packages():
    """All 272 tensors of SmolLM2's file and its metadata. Faults: as in test_gguf.py."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    path = asset("smollm2")
    metadata, tensors = read_gguf(path)
    theirs = gguf.GGUFReader(path)
    assert [tensor.name for tensor in theirs.tensors] == list(tensors)
    for tensor in theirs.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(tensors[tensor.name].float32(), numbers.reshape(tensors[tensor.name].shape))
    for key, value in metadata.items():
        assert theirs.fields[key].contents() == value
