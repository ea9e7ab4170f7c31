"""Chat: a conversation becomes ids. Messages are {"role": system, user or assistant, "content": text}.

    ChatML     <|im_start|> role \\n content <|im_end|> \\n
    Llama 3    <|begin_of_text|>, then  <|start_header_id|> role <|end_header_id|> \\n\\n content <|eot_id|>

A prompt is all turns up to a user's, and the opening of the assistant's turn. A response is that turn's content and the
token that ends a turn, which a policy must learn to say: it is a chat's EOS.

What stands between < and > are ids. They never come out of a text, so a message that quotes "<|im_end|>" ends nothing.
What stands between two of them is tokenised in one piece, as the models were trained; but a response is apart from the
opening before it, as all responses are (preferences.py). Blanks at the ends of a content are taken away by Llama 3's
template, and kept by ChatML's.

A model may have a system turn of its own for conversations without one: SmolLM2's is written out in its template, and
Llama 3.2's begins with two dates. One is today's; a cache of ids must not change overnight, so here it is the one that
the template itself falls back to.

Left out: tools, images, and templates of other forms, which are refused: a Jinja program is looked into, not run.
"""

import functools
import re
from dataclasses import dataclass

from mixdpo.config import InputError
from mixdpo.records import Fault

DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


@dataclass(frozen=True)
class Template:
    """How a turn is written, in one tokenizer's ids."""

    start: int                      # before the role
    middle: int | None              # behind it; None: nothing, role and content are one text
    gap: str                        # before the content
    end: int                        # of a turn
    after: str                      # behind it
    strip: bool                     # no blanks at the ends of a content
    system: str | None = None       # of conversations that have none
    dates: str = ""                 # before the content of every system turn

    def head(self, role: str, text: str, tokenizer) -> list[int]:
        """A turn without its end: start, role, gap and text."""
        if self.middle is None:
            return [self.start, *tokenizer.encode(role + self.gap + text)]
        return [self.start, *tokenizer.encode(role), self.middle, *tokenizer.encode(self.gap + text)]

    def content(self, text: str) -> str:
        return text.strip() if self.strip else text


@functools.cache
def template_of(tokenizer) -> Template:
    """The template that the tokenizer's special tokens are for. Raises: InputError if it has none that is known here,
    or a chat_template of another form."""
    ids, jinja = getattr(tokenizer, "special", {}), getattr(tokenizer, "chat_template", None) or ""
    known = [name for name in ("<|im_start|>", "<|start_header_id|>") if name in ids and (name in jinja or not jinja)]
    if not known:
        place = getattr(tokenizer, "place", "the tokenizer")                # any with encode, decode and eos will do
        raise InputError(f"{place}: has no chat template that is known here; wanted ChatML's (<|im_start|>) or Llama "
                         "3's (<|start_header_id|>): take a chat model, or write strings")
    if known[0] == "<|im_start|>":
        own = re.search(r"<\|im_start\|>system(?:\n|\\n)([^{}']+?)<\|im_end\|>", jinja)
        system = own[1].replace("\\n", "\n") if own else None
        return Template(ids[known[0]], None, "\n", ids["<|im_end|>"], "\n", False, system)
    dates = DATES if "Cutting Knowledge Date" in jinja else ""
    return Template(ids[known[0]], ids["<|end_header_id|>"], "\n\n", ids["<|eot_id|>"], "", True, "" if dates else None,
                    dates)


def encode_chat(messages: list[dict], tokenizer, max_prompt: int) -> tuple[list[int], int]:
    """A conversation up to a user's turn as a prompt of at most max_prompt ids, and how many turns were left out: the
    oldest ones, whole, but never the system's. Raises: Fault if the last turn alone is too long."""
    form, messages = template_of(tokenizer), list(messages)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else form.system
    start, after = [tokenizer.bos] * (tokenizer.bos is not None), tokenizer.encode(form.after)
    if system is not None:
        start += [*form.head("system", form.dates + form.content(system), tokenizer), form.end, *after]
    turns = [[*form.head(m["role"], form.content(m["content"]), tokenizer), form.end, *after] for m in messages]
    opening = form.head("assistant", "", tokenizer)
    room, first = max_prompt - len(start) - len(opening), 0
    while sum(map(len, turns[first:])) > room:
        first += 1
    if first == len(turns):
        needs = len(start + turns[-1] + opening)
        raise Fault("turn too long", f"the last turn, and what must stand around it, are {needs} ids",
                    f"raise max_prompt, which is {max_prompt}, or take the line out")
    return start + sum(turns[first:], []) + opening, first


def encode_answer(content: str, tokenizer) -> list[int]:
    """The assistant's turn behind its opening, the token that ends it among it."""
    form = template_of(tokenizer)
    return [*tokenizer.encode(form.content(content)), form.end]


def ends(tokenizer) -> set[int]:
    """The ids that end a response: of a text, and of a turn where there is a template."""
    try:
        return {tokenizer.eos, template_of(tokenizer).end}
    except InputError:
        return {tokenizer.eos}
