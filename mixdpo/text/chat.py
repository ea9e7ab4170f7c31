"""Chat: a conversation becomes ids. Messages are {"role": system, user or assistant, "content": text}.

    ChatML     <|im_start|> role \\n content <|im_end|> \\n
    Llama 3    <|begin_of_text|>, then  <|start_header_id|> role <|end_header_id|> \\n\\n content <|eot_id|>

A prompt is all turns up to a user's, and the opening of the assistant's turn. A response is that turn's content and the
token that ends a turn, which a policy must learn to say: it is a chat's EOS.

What stands between < and > are ids. They never come out of a text, so a message that quotes "<|im_end|>" ends nothing.
What stands between two of them is tokenised in one piece, as the models were trained; but a response is apart from the
opening before it, as all responses are (preferences.py).

Models differ in three details: the start token, the system turn of conversations without one, and whether blanks at the
ends of a content are kept. A tokenizer's chat template (a Jinja program) decides them. It writes a few short
conversations; the details are read off, and the form above must then give the same text, or the template is refused.
So the ids are those of transformers' apply_chat_template, with one exception: a template that writes today's date gets
the date that it falls back to, because a cache of ids must not change overnight.

Left out: tools, images, and templates of any other form.
"""

import functools
import hashlib
from dataclasses import dataclass, replace

from mixdpo.config import InputError
from mixdpo.text.records import Fault

# SmolLM2's template, by its sha256, and its own system turn: known where jinja2, which comes with torch, is missing.
KNOWN = {"872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788":
         "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
# Conversations that template and form must write alike: with a system turn or without, with blanks and thoughts.
SYSTEM, ANSWER = {"role": "system", "content": " S "}, {"role": "assistant", "content": " <think>e</think> f\n"}
TURNS = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "<think>b</think> c "},
         {"role": "user", "content": "d "}]
PROBES = [TURNS[:1], TURNS, [SYSTEM, *TURNS], [SYSTEM, *TURNS[:1]]]


@dataclass(frozen=True)
class Template:
    """How a turn is written, in one tokenizer's ids."""

    bos: int | None                 # before the whole conversation
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
    or a chat_template that writes anything else."""
    ids, jinja = getattr(tokenizer, "special", {}), getattr(tokenizer, "chat_template", None)
    known = [name for name in ("<|im_start|>", "<|start_header_id|>") if name in ids and (not jinja or name in jinja)]
    if not known:
        place = getattr(tokenizer, "place", None)                           # any with encode, decode and eos will do
        raise InputError("the tokenizer has no chat template that is known here; wanted ChatML's (<|im_start|>) or "
                         "Llama 3's (<|start_header_id|>): take a chat model, or write strings", file=place)
    if known[0] == "<|im_start|>":
        form = Template(tokenizer.bos, ids[known[0]], None, "\n", ids["<|im_end|>"], "\n", False)
    else:
        form = Template(tokenizer.bos, ids[known[0]], ids["<|end_header_id|>"], "\n\n", ids["<|eot_id|>"], "", True)
    return fit(form, jinja, tokenizer) if jinja else form


def fit(form: Template, jinja: str, tokenizer) -> Template:
    """The form with the details that the chat template decides. Raises: InputError if the two write different texts."""
    try:
        from jinja2 import sandbox
    except ImportError:
        if (key := hashlib.sha256(jinja.encode()).hexdigest()) in KNOWN:
            return replace(form, system=KNOWN[key])
        raise InputError("its chat template is checked by running it, which needs jinja2: pip install jinja2, or write "
                         "strings", file=tokenizer.place) from None
    env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,       # as transformers sets it
                                                extensions=["jinja2.ext.loopcontrols"])
    names = {"tools": None, "documents": None} | tokenizer.named
    try:
        render = env.from_string(jinja).render
        prompts = [render(messages=probe, add_generation_prompt=True, **names) for probe in PROBES]
        wholes = [render(messages=[*probe, ANSWER], add_generation_prompt=False, **names) for probe in PROBES]
    except Exception as error:                              # a template is a program, and may raise anything
        raise InputError(f"its chat template fails on a conversation: {type(error).__name__}: {error}; take another "
                         "model, or write strings", file=tokenizer.place) from error
    form = with_details(form, prompts[0], prompts[-1], tokenizer)
    for probe, prompt, whole in zip(PROBES, prompts, wholes):
        start, turns, opening = parts_of(form, probe, tokenizer)
        ids = start + sum(turns, []) + opening
        answered = ids + answer_of(form, ANSWER["content"], tokenizer)
        for ours, theirs in ((ids, prompt), (answered, whole.removesuffix(form.after))):
            if (text := tokenizer.decode(ours)) != theirs:
                raise InputError(f"its chat template is neither ChatML's nor Llama 3's: it writes {theirs!r}, they "
                                 f"{text!r}; take another model, or write strings", file=tokenizer.place)
    return form


def with_details(form: Template, plain: str, given: str, tokenizer) -> Template:
    """The form with start token, system turn and stripping as in the first probe, written as `plain`, and the last one,
    which has a system turn, written as `given`."""
    opening, end = tokenizer.decode(form.head("system", "", tokenizer)), tokenizer.decode([form.end])
    own, system = (text.partition(opening)[2].partition(end)[0] if opening in text else None for text in (plain, given))
    form = replace(form, strip=PROBES[0][0]["content"] not in plain,
                   bos=tokenizer.special.get(plain.partition(tokenizer.decode([form.start]))[0]))
    dates = (system or "").removesuffix(form.content(SYSTEM["content"]))
    return replace(form, dates=dates, system=None if own is None else own.removeprefix(dates))


def parts_of(form: Template, messages: list[dict], tokenizer) -> tuple[list[int], list[list[int]], list[int]]:
    """A conversation's ids up to the first turn that is not the system's, of each turn, and of the answer's opening."""
    system, after = form.system, tokenizer.encode(form.after)
    if messages[0]["role"] == "system":
        system, messages = form.content(messages[0]["content"]), messages[1:]
    start = [] if form.bos is None else [form.bos]
    if system is not None:
        start += [*form.head("system", form.dates + system, tokenizer), form.end, *after]
    turns = [[*form.head(m["role"], form.content(m["content"]), tokenizer), form.end, *after] for m in messages]
    return start, turns, form.head("assistant", "", tokenizer)


def answer_of(form: Template, content: str, tokenizer) -> list[int]:
    return [*tokenizer.encode(form.content(content)), form.end]


def encode_chat(messages: list[dict], tokenizer, max_prompt: int) -> tuple[list[int], int]:
    """A conversation up to a user's turn as a prompt of at most max_prompt ids, and how many turns were left out: the
    oldest ones, whole, but never the system's. Raises: Fault if the last turn alone is too long."""
    start, turns, opening = parts_of(template_of(tokenizer), messages, tokenizer)
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
    return answer_of(template_of(tokenizer), content, tokenizer)


def ends(tokenizer) -> set[int]:
    """The ids that end a response: of a text, and of a turn where there is a template."""
    try:
        return {tokenizer.eos, template_of(tokenizer).end}
    except InputError:
        return {tokenizer.eos}
