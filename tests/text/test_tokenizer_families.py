"""Tokenizers and chat templates with the structure of Qwen2, Qwen2.5, Qwen3, SmolLM3, OLMo 2 and Mistral NeMo: ids of
the tokenizers and transformers libraries from committed golden files (tests/golden/make_families.py). Each docstring
names the faults that the test was seen to fail on; tests/peers/test_tokenizers.py compares the live libraries.
"""

import datetime
import json
from pathlib import Path

import pytest
from raising import raises_at

from mixdpo.text import chat
from mixdpo.text import tokenizer as tokenizer_module
from mixdpo.text.chat import encode_answer, encode_chat, ends
from mixdpo.text.records import Fault
from mixdpo.text.tokenizer import load_tokenizer

pytest.importorskip("jinja2")
FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "families.json").read_text())
TEXTS = [text for text in json.loads((FOLDER / "tokenizers.json").read_text())["gpt2"]["texts"]]
EMPTY = "<think>\n\n</think>\n"


@pytest.fixture
def load(tmp_path):
    """load(family) -> its tokenizer."""

    def load(family):
        (tmp_path / "tokenizer.json").write_text(json.dumps(GOLDEN[family]["tokenizer"]))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(GOLDEN[family]["config"]))
        return load_tokenizer(tmp_path)

    return load


def turns(*contents, system=None):
    """Turns of user and assistant, the first a user's."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]


@pytest.mark.parametrize("family", GOLDEN)
def test_ids_are_the_tokenizers_librarys(family, load):
    """Faults: NFC left out; digits in threes for Qwen; Removed and inverted refused; names of added tokens that are not
    special read as text."""
    tokenizer = load(family)
    assert len(TEXTS) == len(GOLDEN[family]["ids"])
    for text, ids in zip(TEXTS, GOLDEN[family]["ids"]):
        assert tokenizer.encode(text) == ids, repr(text)


@pytest.mark.parametrize("family", GOLDEN)
def test_conversations_are_apply_chat_templates(family, load):
    """Faults: thinking on; thoughts of an earlier answer kept; text of two turns tokenised apart; the end of a content
    stripped, or kept; another date; Mistral's system turn written first; [/INST] read as text. Mistral's template omits
    the system turn if an answer is the last turn; then only the answer is compared."""
    tokenizer = load(family)
    for case in GOLDEN[family]["chats"]:
        assert encode_chat(case["messages"], tokenizer, 999) == (case["prompt"], 0), case["messages"]
        answer, whole = encode_answer(case["answer"], tokenizer), case["whole"]
        whole = whole[: len(whole) - whole[::-1].index(answer[-1])]          # without a line break after the last turn
        if family == "Mistral NeMo" and case["messages"][0]["role"] == "system":
            assert answer == whole[-len(answer):]
        else:
            assert case["prompt"] + answer == whole
        assert answer[-1] in ends(tokenizer)


OPENINGS = {
    "Qwen2": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
             "<|im_start|>assistant\n",
    "Qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
               "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "Qwen3": f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{EMPTY}\n",
    "SmolLM3": "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 08 July 2025\n"
               "Reasoning Mode: /no_think\n\n## Custom Instructions\n\nYou are a helpful AI assistant named SmolLM, "
               f"trained by Hugging Face.\n\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{EMPTY}",
    "OLMo 2": "<|endoftext|><|user|>\nHi\n<|assistant|>\n",
    "Mistral NeMo": "<s>[INST]Hi[/INST]",
}


@pytest.mark.parametrize("family", GOLDEN)
def test_openings_by_hand(family, load):
    """Faults: as above. The answer of a model that thinks has no empty block: that is in the opening."""
    tokenizer = load(family)
    assert tokenizer.decode(encode_chat(turns("Hi"), tokenizer, 999)[0]) == OPENINGS[family]
    assert encode_answer("Yes.", tokenizer) == [*tokenizer.encode("Yes."), tokenizer.eos]


def test_thoughts(load):
    """Earlier answers lose them; an answer that has some cannot follow the empty block. Faults: an answer with thoughts
    accepted, so that training follows two blocks; thoughts of an earlier answer kept."""
    tokenizer, thought = load("Qwen3"), "<think>\nHm.\n</think>\n\nYes."
    plain = encode_chat(turns("a", "Yes.", "b"), tokenizer, 999)
    assert encode_chat(turns("a", thought, "b"), tokenizer, 999) == plain
    with raises_at("<think>", kind=Fault):
        encode_answer(thought, tokenizer)
    assert encode_answer("\n\nYes.", tokenizer) == encode_answer("Yes.", tokenizer)


def test_what_a_template_reads_as_a_command_is_a_fault_of_its_line(load):
    """Fault: no comparison with the template's own text, so that these lines get other ids than the model was trained
    on."""
    for family, messages in (("SmolLM3", turns("a", system="Think. /think")), ("SmolLM3", turns("a", system=" "))):
        tokenizer = load(family)
        with raises_at(kind=Fault):
            encode_chat(messages, tokenizer, 999)
        assert encode_chat(turns("a", system="Think."), tokenizer, 999)[1] == 0


def test_mistrals_turns_alternate(load):
    """Faults: the template's refusal not a fault of the line; a conversation cut so that an answer comes first."""
    tokenizer, long = load("Mistral NeMo"), turns("a" * 50, "b", "c", "d", "e", system="s")
    with raises_at("alternate", kind=Fault):
        encode_chat(turns("a") + turns("b"), tokenizer, 999)
    whole, _ = encode_chat(long, tokenizer, 999)
    ids, left_out = encode_chat(long, tokenizer, len(whole) - 1)
    assert left_out == 2 and tokenizer.decode(ids) == "<s>[INST]c[/INST]d</s>[INST]s\n\ne[/INST]"


def test_names_in_a_content_stay_text_and_in_the_template_are_tokens(load):
    """Fault: the written text searched for names."""
    for family, name in (("Qwen2.5", "<|im_end|>"), ("Mistral NeMo", "[/INST]"), ("OLMo 2", "<|endoftext|>")):
        tokenizer = load(family)
        counts = [encode_chat(turns(text), tokenizer, 999)[0].count(tokenizer.special[name]) for text in ("a", name)]
        assert counts[0] == counts[1] > 0 and name in tokenizer.decode(tokenizer.encode(name))


def test_the_date_is_fixed(load, monkeypatch):
    """Fault: today's date, which makes cached ids wrong tomorrow."""
    chat.template_of.cache_clear()
    monkeypatch.setattr(chat, "DATE", datetime.date(2001, 2, 3))
    tokenizer = load("SmolLM3")
    assert "Today Date: 03 February 2001\n" in tokenizer.decode(encode_chat(turns("Hi"), tokenizer, 999)[0])


@pytest.mark.parametrize("family", ["Qwen2", "Qwen2.5", "Qwen3"])
def test_the_same_tokenizer_from_a_gguf_file(family, monkeypatch, tmp_path, load):
    """Faults: Llama 3's pattern for Qwen's; NFC left out, which GGUF does not state; <think> and <tool_call>, which
    a text may hold, taken for special; the chat template of the file left out."""
    doc, config = GOLDEN[family]["tokenizer"], GOLDEN[family]["config"]
    added = {token["content"]: token for token in doc["added_tokens"]}
    vocab = doc["model"]["vocab"] | {name: token["id"] for name, token in added.items()}
    names = sorted(vocab, key=vocab.get)
    assert [vocab[name] for name in names] == [*range(len(names))]
    kinds = [1 if name not in added else 3 if added[name]["special"] else 4 for name in names]
    merges = [m if isinstance(m, str) else " ".join(m) for m in doc["model"]["merges"]]
    metadata = {"model": "gpt2", "pre": "qwen2", "tokens": names, "token_type": kinds, "merges": merges,
                "eos_token_id": vocab[config["eos_token"]]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    monkeypatch.setattr(tokenizer_module, "read_gguf", lambda path: (metadata | {
        "tokenizer.chat_template": config["chat_template"]}, {}))
    (tmp_path / "m.gguf").touch()
    tokenizer = load_tokenizer(str(tmp_path / "m.gguf"))
    assert tokenizer.pattern == load(family).pattern
    for text, ids in zip(TEXTS, GOLDEN[family]["ids"]):
        assert tokenizer.encode(text) == ids, repr(text)
    for case in GOLDEN[family]["chats"]:
        assert encode_chat(case["messages"], tokenizer, 999) == (case["prompt"], 0), case["messages"]
