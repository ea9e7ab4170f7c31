"""mixdpo/text/chat.py on the real tokenizers that packages ship; tests/peers/test_tokenizers.py compares transformers.
What each test catches stands in its docstring."""

import sys

import pytest
from letters import Letters, write
from raising import raises_at

from mixdpo.preferences import read_preferences
from mixdpo.text.chat import encode_answer, encode_chat, ends, template_of
from mixdpo.text.records import Fault
from mixdpo.text.tokenizer import load_tokenizer

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
    """Catches: a missing or double default system turn, a missing end or line break, special ids from text."""
    own = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert encode_chat(USER, smollm2, 99) == ([1, *smollm2.encode(own), 2, *smollm2.encode("\n"), 1, *smollm2.encode(
        "user\nHow tall is K2?"), 2, *smollm2.encode("\n"), 1, *smollm2.encode("assistant\n")], 0)
    assert smollm2.decode(encode_chat(LONG, smollm2, 99)[0]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow tall is K2?<|im_end|>\n"
        "<|im_start|>assistant\n8,611 m.<|im_end|>\n"
        "<|im_start|>user\nAnd in feet?\n<|im_end|>\n<|im_start|>assistant\n")
    assert encode_answer(" 28,251", smollm2) == [*smollm2.encode(" 28,251"), 2]


def test_llama_3_by_hand(llama3):
    """Catches: no start token, blanks kept, end-of-text in place of end-of-turn, an extra system turn."""
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


def test_long_conversations_lose_their_oldest_turns(smollm2, llama3):
    """Catches: half a turn, a lost system turn or start token, one turn too many, a wrong count."""
    for tokenizer in (smollm2, llama3):
        full, none = encode_chat(LONG, tokenizer, 1000)
        assert none == 0 and encode_chat(LONG, tokenizer, len(full)) == (full, 0)
        one, two = ([LONG[0], *LONG[n:]] for n in (2, 3))
        assert encode_chat(LONG, tokenizer, len(full) - 1) == (encode_chat(one, tokenizer, 1000)[0], 1)
        shortest = encode_chat(two, tokenizer, 1000)[0]
        assert encode_chat(LONG, tokenizer, len(shortest)) == (shortest, 2)
        with raises_at(f"{len(shortest)} ids", len(shortest) - 1, kind=Fault):
            encode_chat(LONG, tokenizer, len(shortest) - 1)


def test_each_turn_is_tokenised_once(smollm2, monkeypatch):
    """A conversation of 201 turns, of which the last three fit. Catches: all later turns tokenised for each turn that
    is left out; in the server 256 KiB of messages then held up all other answers for twelve seconds."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"word {n} " * 20} for n in range(201)]
    wanted, encode, read = encode_chat(turns[-3:], smollm2, 999), smollm2.encode, []
    monkeypatch.setattr(smollm2, "encode", lambda text: read.append(len(text)) or encode(text))
    assert encode_chat(turns, smollm2, len(wanted[0])) == (wanted[0], 198)
    assert sum(read) < 2 * sum(len(turn["content"]) for turn in turns)


LOOP, OPEN = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
OWN = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n' + own + '<|im_end|>\n' }}{% endif %}"
END = OPEN + "{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = LOOP + TURN + END
HEAD3 = "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
END3 = OPEN + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
LLAMA3 = "{{ bos_token }}" + LOOP + HEAD3 + END3
SYSTEM3 = "{{ '<|start_header_id|>system<|end_header_id|>\n\n' + own + '<|eot_id|>' }}"
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA31 = ("{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = "
           "strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
           "{% set own = '' %}{% if messages[0]['role'] == 'system' %}{% set own = messages[0]['content'] | trim %}"
           "{% set messages = messages[1:] %}{% endif %}{% set own = 'Cutting Knowledge Date: December 2023\n"
           "Today Date: ' + date_string + '\n\n' + own %}" + SYSTEM3 + LOOP + HEAD3 + END3)
THOUGHTS = TURN.replace("m['content']", "m['content'].split('</think>')[-1].lstrip('\n')")
SAME = {    # (start token named in the configuration, template)
    "ChatML": (None, CHATML),
    "with bos_token": ("<|endoftext|>", "{{ bos_token }}" + CHATML),
    "Qwen2.5": (None, "{% set own = 'You are Qwen.' %}" + OWN + CHATML),
    "system in a variable, as LLaMA-Factory writes it":
        (None, "{% set own = 'Be kind.' %}{% if messages[0]['role'] == 'system' %}{% set own = messages[0]['content'] "
         "%}{% endif %}{{ '<|im_start|>system\n' + own + '<|im_end|>\n' }}{% for m in messages %}{% if m['role'] == "
         "'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}{% elif m['role'] "
         "== 'assistant' %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"),
    "system with an apostrophe": (None, '{% set own = "You\'re Q." %}' + OWN + CHATML),
    "system with braces": (None, "{% set own = 'Write {json}.' %}" + OWN + CHATML),
    "trim": (None, CHATML.replace("m['content']", "m['content'] | trim")),
    "a start token that the template does not write": ("<|begin_of_text|>", LLAMA3.replace("{{ bos_token }}", "")),
    "Llama 3": ("<|begin_of_text|>", LLAMA3),
    "Llama 3.1": ("<|begin_of_text|>", LLAMA31),
    "Llama 3 with a system of its own": ("<|begin_of_text|>", "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
                                         "{% set own = 'Be kind.' %}" + SYSTEM3 + "{% endif %}" + LOOP + HEAD3 + END3),
    "Llama 3 without trim": ("<|begin_of_text|>", LLAMA3.replace(" | trim", "")),
    "no line break behind a turn": (None, CHATML.replace("<|im_end|>\n", "<|im_end|>")),
    "other roles": (None, CHATML.replace("m['role']", "{'user': 'human', 'assistant': 'gpt'}.get(m['role'], m['role'])")
                    .replace("|>assistant", "|>gpt")),
    "an answer trimmed": (None, CHATML.replace("m['content']", "(m['content'] | trim if m['role'] == 'assistant' else "
                                                               "m['content'])")),
    "text before all turns": (None, "[gMASK]" + CHATML),
    "a blank before an answer": (None, CHATML.replace("m['content']", "(' ' if m['role'] == 'assistant' else '') + "
                                                                      "m['content']")),
    "thoughts taken out": (None, LOOP + THOUGHTS + END),
}
REFUSED = {
    "thoughts in the opening alone": CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"),
    "thoughts begun in the opening": CHATML.replace("assistant\n", "assistant\n<think>\n"),
    "text after the opening, before an answer": CHATML.replace(
        "m['content']", "('Sure: ' if m['role'] == 'assistant' else '') + m['content']"),
    "another start with an answer": "{{ '<|endoftext|>' if add_generation_prompt }}" + CHATML,
    "no end of an answer": CHATML.replace("<|im_end|>", ""),
    "a content changed": CHATML.replace("m['content']", "m['content'] | replace('c', 'C')"),
    "a content written twice": CHATML.replace("m['content']", "m['content'] + m['content']"),
    "the first turn alone": CHATML.replace("in messages", "in messages[:1]"),
    "not Jinja": "{% for <|im_start|>",
    "of no known form": "[INST] {{ messages[0]['content'] }} [/INST]",
}
CONVERSATIONS = [USER, LONG, LONG[1:], [{"role": "user", "content": "\n white  "}],
                 [{"role": "system", "content": " s\n"}, {"role": "user", "content": "\tu "}]]


@pytest.fixture
def written_by(smollm2, llama3, monkeypatch):
    """with_template(template, bos_token) -> the tokenizer whose special tokens the template names, with that one."""
    def with_template(jinja, bos=None):
        tokenizer = llama3 if "<|start_header_id|>" in jinja else smollm2
        monkeypatch.setattr(tokenizer, "chat_template", jinja)
        monkeypatch.setattr(tokenizer, "named", {"bos_token": bos} if bos else {})
        monkeypatch.delitem(tokenizer.__dict__, "key", raising=False)
        template_of.cache_clear()
        return tokenizer

    yield with_template
    template_of.cache_clear()


@pytest.mark.parametrize("name", SAME)
def test_a_template_of_one_of_these_forms_decides_the_details(written_by, name):
    """The text equals Jinja's. Catches: a default system turn left out, however the template writes it;
    blanks kept or removed against the template; a start token that the template does not write."""
    jinja2, (bos, jinja) = pytest.importorskip("jinja2"), SAME[name]
    tokenizer, program = written_by(jinja, bos), jinja2.Template(jinja, trim_blocks=True, lstrip_blocks=True)
    for messages in CONVERSATIONS:
        ids, left_out = encode_chat(messages, tokenizer, 999)
        wanted = program.render(messages=messages, add_generation_prompt=True, bos_token=bos)
        assert tokenizer.decode(ids) == wanted and left_out == 0
        rendered = program.render(messages=[*messages, {"role": "assistant", "content": " K2. "}], bos_token=bos)
        assert tokenizer.decode(ids + encode_answer(" K2. ", tokenizer)) == rendered.removesuffix("\n")
    assert sum(i == tokenizer.special.get(bos) for i in ids) == ("{{ bos_token }}" in jinja)


def test_the_longest_name_in_a_template_counts(written_by, monkeypatch):
    """Catches: <|im_start|> read as a shorter name that it begins with."""
    tokenizer = written_by(CHATML)
    wanted = encode_chat(USER, tokenizer, 99)
    monkeypatch.setattr(tokenizer, "special", {"<|im_": 17} | tokenizer.special)
    template_of.cache_clear()
    assert encode_chat(USER, tokenizer, 99) == wanted


def test_a_template_without_special_tokens(written_by, monkeypatch):
    """Catches: a KeyError in place of the error that names the template."""
    tokenizer = written_by(CHATML)
    monkeypatch.setattr(tokenizer, "special", {})
    with raises_at("special token", file=tokenizer.place):
        encode_chat(USER, tokenizer, 99)


def test_a_template_without_system_turns(written_by):
    """Catches: a conversation with one accepted; the others refused too."""
    tokenizer = written_by("{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHATML)
    assert tokenizer.decode(encode_chat(USER, tokenizer, 99)[0]).startswith("<|im_start|>user\nHow")
    with raises_at("none", kind=Fault):
        encode_chat(LONG, tokenizer, 99)


def test_dates_by_hand(written_by):
    """Catches: Llama 3.1's dates left out, or today's."""
    tokenizer = written_by(LLAMA31, "<|begin_of_text|>")
    assert tokenizer.decode(encode_chat(USER, tokenizer, 99)[0]).startswith(
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{DATES}<|eot_id|><|start_header_id|>user<")


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_of_another_form_is_refused(written_by, name):
    """Catches: a template that only looks like ChatML read as plain ChatML."""
    tokenizer = written_by(REFUSED[name])
    with raises_at(file=tokenizer.place):
        encode_chat(USER, tokenizer, 99)
    assert ends(tokenizer) == {tokenizer.eos}


def test_without_jinja2_only_smollm2s_template_is_known(written_by, smollm2, monkeypatch):
    """Catches: a template that nobody ran taken for ChatML; the default model refused."""
    own, wanted = smollm2.chat_template, encode_chat(LONG[1:], smollm2, 99)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert encode_chat(LONG[1:], written_by(own), 99) == wanted
    with raises_at("jinja2", file=smollm2.place):
        encode_chat(USER, written_by(CHATML), 99)


def test_a_tokenizers_key_holds_what_its_template_writes(written_by):
    """Catches: one cache of ids for two templates, or for two start tokens."""
    start = "{{ bos_token }}" + CHATML
    cases = [("", None), (CHATML, None), (start, None), (start, "<|endoftext|>")]
    assert len({written_by(jinja, bos).key for jinja, bos in cases}) == 4


def test_without_a_template_the_special_tokens_decide(written_by, llama3):
    """Catches: SmolLM2's sentence for every ChatML model, a start token lost."""
    tokenizer = written_by("")
    assert tokenizer.decode(encode_chat(USER, tokenizer, 99)[0]).startswith("<|im_start|>user\nHow")
    assert encode_chat(USER, llama3, 99)[0][0] == 128000


def test_what_ends_a_response(smollm2, llama3):
    """Catches: the end of a turn that is shown as part of the answer."""
    assert (ends(smollm2), ends(llama3), ends(Letters())) == ({2}, {128001, 128009}, {256})


def test_a_tokenizer_without_chat_is_no_fault_of_a_line(tmp_path):
    """Catches: a missing chat template reported as a fault of each line."""
    path = write(tmp_path, {"prompt": USER, "chosen": [{"role": "assistant", "content": "a"}],
                            "rejected": [{"role": "assistant", "content": "b"}]})
    with raises_at("chat template"):
        read_preferences(path, Letters(), 64, 16, drop=True)


def test_a_file_of_conversations(tmp_path, smollm2):
    """Catches: an answer tokenised with its opening, an end token lost or doubled, left-out turns not counted."""
    answer = [[{"role": "assistant", "content": text}] for text in ("28,251 feet.", "No idea.")]
    row, reports = {"prompt": LONG, "chosen": answer[0], "rejected": answer[1], "user": "u"}, []
    path = write(tmp_path, row, row | {"prompt": USER})
    prompt = encode_chat(LONG, smollm2, 1000)[0]
    pairs = read_preferences(path, smollm2, 1000, 16, report=reports.append)
    assert pairs[0].prompt == prompt and pairs[0].chosen == [*smollm2.encode("28,251 feet."), 2] and not reports
    assert pairs[1].prompt == encode_chat(USER, smollm2, 1000)[0] and pairs[0].rejected[-1] == 2
    pairs = read_preferences(path, smollm2, len(prompt) - 1, 16, report=reports.append)
    wanted = f"{path}: conversations whose oldest turns are removed to fit {len(prompt) - 1} ids: 1 (first: line 1)"
    assert reports == [wanted]
