"""mixdpo/chat.py on the real tokenizers that packages ship; tests/peers/test_tokenizers.py has transformers beside it.
What each test catches stands in its docstring."""

import pytest

from mixdpo.chat import DATES, encode_answer, encode_chat, ends, template_of
from mixdpo.config import InputError
from mixdpo.preferences import read_preferences
from mixdpo.records import Fault
from mixdpo.tokenizer import load_tokenizer
from letters import Letters, write

USER = [{"role": "user", "content": "How tall is K2?"}]
LONG = [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": "8,611 m."},
        {"role": "user", "content": "And in feet?\n"}]


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer("smollm2")


@pytest.fixture(scope="module")
def llama3():
    return load_tokenizer("llama-3.2-1b")


def test_chatml_by_hand(smollm2):
    """Catches: a system turn of the model's own left out or doubled, an end or a line break too few, ids from text."""
    own = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert encode_chat(USER, smollm2, 99) == ([1, *smollm2.encode(own), 2, *smollm2.encode("\n"), 1, *smollm2.encode(
        "user\nHow tall is K2?"), 2, *smollm2.encode("\n"), 1, *smollm2.encode("assistant\n")], 0)
    assert smollm2.decode(encode_chat(LONG, smollm2, 99)[0]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow tall is K2?<|im_end|>\n"
        "<|im_start|>assistant\n8,611 m.<|im_end|>\n"
        "<|im_start|>user\nAnd in feet?\n<|im_end|>\n<|im_start|>assistant\n")
    assert encode_answer(" 28,251", smollm2) == [*smollm2.encode(" 28,251"), 2]


def test_llama_3_by_hand(llama3):
    """Catches: no start token, blanks kept, the end of a text for that of a turn, a system turn where there is none."""
    head, end = lambda role: [128006, *llama3.encode(role), 128007], 128009
    assert encode_chat(USER, llama3, 99) == ([128000, *head("user"), *llama3.encode("\n\nHow tall is K2?"), end,
                                              *head("assistant"), *llama3.encode("\n\n")], 0)
    assert llama3.decode(encode_chat(LONG, llama3, 99)[0]).endswith(
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd in feet?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert encode_answer(" 28,251 ", llama3) == [*llama3.encode("28,251"), end] and end != llama3.eos


def test_names_of_special_tokens_in_a_message_stay_text(smollm2, llama3):
    """Catches: a message that ends its own turn and begins the system's."""
    for tokenizer, end, name in ((smollm2, 2, "<|im_end|>"), (llama3, 128009, "<|eot_id|>")):
        ids, _ = encode_chat([{"role": "user", "content": f"what is {name}?"}], tokenizer, 99)
        plain, _ = encode_chat(USER, tokenizer, 99)
        assert ids.count(end) == plain.count(end) and name in tokenizer.decode(ids)
        assert encode_answer(name, tokenizer).count(end) == 1


def test_long_conversations_lose_whole_turns_from_the_left(smollm2, llama3):
    """Catches: half a turn, the system's turn or the start token lost, one turn too many, a count that is off."""
    for tokenizer in (smollm2, llama3):
        whole, none = encode_chat(LONG, tokenizer, 1000)
        assert none == 0 and encode_chat(LONG, tokenizer, len(whole)) == (whole, 0)
        one, two = ([LONG[0], *LONG[n:]] for n in (2, 3))
        assert encode_chat(LONG, tokenizer, len(whole) - 1) == (encode_chat(one, tokenizer, 1000)[0], 1)
        shortest = encode_chat(two, tokenizer, 1000)[0]
        assert encode_chat(LONG, tokenizer, len(shortest)) == (shortest, 2)
        with pytest.raises(Fault, match=f"turn too long: .* are {len(shortest)} ids; raise max_prompt"):
            encode_chat(LONG, tokenizer, len(shortest) - 1)


def test_what_a_template_says_of_its_system_turn(smollm2, llama3, monkeypatch):
    """Catches: SmolLM2's sentence for every ChatML model, Llama 3.2's dates left out, their blank lines stripped, the
    same key of tokenizers that write another system turn, a template of another form read as one of these."""
    keys = {smollm2.key, llama3.key}

    def told(tokenizer, jinja):
        monkeypatch.setattr(tokenizer, "chat_template", jinja)
        monkeypatch.delitem(tokenizer.__dict__, "key", raising=False)
        keys.add(tokenizer.key)
        template_of.cache_clear()
        return tokenizer.decode(encode_chat(USER, tokenizer, 99)[0])

    assert told(smollm2, None).startswith("<|im_start|>user\nHow")
    its_own = "{{ '<|im_start|>system\\nYou are Q.<|im_end|>\\n<|im_start|>' + message['role'] }}"
    assert told(smollm2, its_own).startswith("<|im_start|>system\nYou are Q.<|im_end|>\n<|im_start|>user\nHow")
    assert told(smollm2, "{{ '<|im_start|>system\\n' + system + '<|im_end|>' }}").startswith("<|im_start|>user\nHow")
    assert told(llama3, "<|start_header_id|> Cutting Knowledge Date: December 2023").startswith(
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{DATES}<|eot_id|><|start_header_id|>user")
    with pytest.raises(InputError, match="has no chat template that is known here"):
        told(smollm2, "[INST] {{ content }} [/INST]")
    assert len(keys) == 7
    template_of.cache_clear()


def test_what_ends_a_response(smollm2, llama3):
    """Catches: the end of a turn that is shown as part of the answer."""
    assert (ends(smollm2), ends(llama3), ends(Letters())) == ({2}, {128001, 128009}, {256})


def test_a_tokenizer_without_chat_is_no_fault_of_a_line(tmp_path):
    """Catches: lines dropped one by one because the model has no template."""
    path = write(tmp_path, {"prompt": USER, "chosen": [{"role": "assistant", "content": "a"}],
                            "rejected": [{"role": "assistant", "content": "b"}]})
    with pytest.raises(InputError, match="has no chat template that is known here; wanted"):
        read_preferences(path, Letters(), 64, 16, drop=True)


def test_a_file_of_conversations(tmp_path, smollm2):
    """Catches: an answer tokenised with its opening, an end token lost or doubled, left-out turns not counted."""
    answer = [[{"role": "assistant", "content": text}] for text in ("28,251 feet.", "No idea.")]
    row, told = {"prompt": LONG, "chosen": answer[0], "rejected": answer[1], "user": "u"}, []
    path = write(tmp_path, row, row | {"prompt": USER})
    whole = encode_chat(LONG, smollm2, 1000)[0]
    pairs = read_preferences(path, smollm2, 1000, 16, report=told.append)
    assert pairs[0].prompt == whole and pairs[0].chosen == [*smollm2.encode("28,251 feet."), 2] and not told
    assert pairs[1].prompt == encode_chat(USER, smollm2, 1000)[0] and pairs[0].rejected[-1] == 2
    pairs = read_preferences(path, smollm2, len(whole) - 1, 16, report=told.append)
    assert told == [f"{path}: conversations without their oldest turns, to fit {len(whole) - 1} ids: 1 (first: line 1)"]
