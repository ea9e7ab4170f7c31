"""Chat: converts a conversation to ids. Messages are {"role": system, user or assistant, "content": text}.

    ChatML     <|im_start|> role \\n content <|im_end|> \\n
    Llama 3    <|begin_of_text|>, then  <|start_header_id|> role <|end_header_id|> \\n\\n content <|eot_id|>

A prompt is a conversation that ends with a user's turn, plus the opening of the assistant's turn. A response is the
content of the assistant's turn and the end-of-turn token. That token is a chat's EOS; a policy must learn to give it.

Each name in <| |> is one special token. A text never gives a special token, so a message that quotes "<|im_end|>" does
not end the turn. The text between two special tokens is tokenised in one piece, as in the models' training. A response
is tokenised separately from the opening before it, as all responses are (preferences.py).

Models differ in three details: the start token, the default system turn, and whether blanks at the ends of a content
are kept. A tokenizer's chat template (a Jinja program) defines them. Here the template is run on a few short
conversations, and the details are read from its output. Then the form above must give the same text; otherwise it is an
error. So the ids equal those of transformers' apply_chat_template, with one exception: a template that writes today's
date gets its own fallback date, because cached ids must stay valid the next day.

Left out: tools, images, and templates of any other form.
"""

import functools
import hashlib
from dataclasses import dataclass, replace

from mixdpo.config import InputError
from mixdpo.text.records import Fault

# sha256 of SmolLM2's template -> its default system turn. Used if jinja2, which is installed with torch, is missing.
KNOWN = {"872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788":
         "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
# Conversations for which template and form must give the same text: with and without a system turn, blanks, <think>.
SYSTEM, ANSWER = {"role": "system", "content": " S "}, {"role": "assistant", "content": " <think>e</think> f\n"}
TURNS = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "<think>b</think> c "},
         {"role": "user", "content": "d "}]
PROBES = [TURNS[:1], TURNS, [SYSTEM, *TURNS], [SYSTEM, *TURNS[:1]]]


@dataclass(frozen=True)
class Template:
    """The form of a turn, in one tokenizer's ids."""

    bos: int | None                 # id before the conversation
    start: int                      # id before the role
    middle: int | None              # id after the role; None: no token, role and content are one text
    gap: str                        # text before the content
    end: int                        # id at the end of a turn
    after: str                      # text after the end of a turn
    strip: bool                     # True: blanks at the ends of a content are removed
    system: str | None = None       # content of the default system turn; None: no default system turn
    dates: str = ""                 # text before the content of every system turn

    def head(self, role: str, text: str, tokenizer) -> list[int]:
        """Ids of a turn without its end: start, role, gap and text."""
        if self.middle is None:
            return [self.start, *tokenizer.encode(role + self.gap + text)]
        return [self.start, *tokenizer.encode(role), self.middle, *tokenizer.encode(self.gap + text)]

    def content(self, text: str) -> str:
        """The content as the template writes it."""
        return text.strip() if self.strip else text


@functools.cache
def template_of(tokenizer) -> Template:
    """The tokenizer's template. Raises: InputError if the tokenizer has no special tokens of a known form, or if its
    chat_template gives a different text."""
    ids, jinja = getattr(tokenizer, "special", {}), getattr(tokenizer, "chat_template", None)
    known = [name for name in ("<|im_start|>", "<|start_header_id|>") if name in ids and (not jinja or name in jinja)]
    if not known:
        place = getattr(tokenizer, "place", None)                           # other tokenizer classes lack `place`
        raise InputError("the tokenizer has no supported chat template, wanted ChatML's (<|im_start|>) or Llama 3's "
                         "(<|start_header_id|>); use a chat model, or write strings instead of messages", file=place)
    if known[0] == "<|im_start|>":
        form = Template(tokenizer.bos, ids[known[0]], None, "\n", ids["<|im_end|>"], "\n", False)
    else:
        form = Template(tokenizer.bos, ids[known[0]], ids["<|end_header_id|>"], "\n\n", ids["<|eot_id|>"], "", True)
    return fit(form, jinja, tokenizer) if jinja else form


def fit(form: Template, jinja: str, tokenizer) -> Template:
    """The form with the details from the chat template. Raises: InputError if the two give different texts."""
    try:
        from jinja2 import sandbox
    except ImportError:
        if (key := hashlib.sha256(jinja.encode()).hexdigest()) in KNOWN:
            return replace(form, system=KNOWN[key])
        raise InputError("its chat template cannot be checked without jinja2; run `pip install jinja2`, or write "
                         "strings instead of messages", file=tokenizer.place) from None
    env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,       # transformers' settings
                                                extensions=["jinja2.ext.loopcontrols"])
    names = {"tools": None, "documents": None} | tokenizer.named
    try:
        render = env.from_string(jinja).render
        prompts = [render(messages=probe, add_generation_prompt=True, **names) for probe in PROBES]
        answers = [render(messages=[*probe, ANSWER], add_generation_prompt=False, **names) for probe in PROBES]
    except Exception as error:                              # a template is a program: it may raise anything
        raise InputError(f"its chat template fails on a conversation: {type(error).__name__}: {error}; use another "
                         "model, or write strings instead of messages", file=tokenizer.place) from error
    form = with_details(form, prompts[0], prompts[-1], tokenizer)
    for probe, prompt, answered in zip(PROBES, prompts, answers):
        start, turns, opening = parts_of(form, probe, tokenizer)
        ids = start + sum(turns, []) + opening
        answered_ids = ids + answer_of(form, ANSWER["content"], tokenizer)
        for ours, theirs in ((ids, prompt), (answered_ids, answered.removesuffix(form.after))):
            if (text := tokenizer.decode(ours)) != theirs:
                raise InputError(f"its chat template is neither ChatML's nor Llama 3's: it gives {theirs!r}, wanted "
                                 f"{text!r}; use another model, or write strings instead of messages",
                                 file=tokenizer.place)
    return form


def with_details(form: Template, plain: str, given: str, tokenizer) -> Template:
    """The form with the start token, default system turn, stripping and dates that the template's output shows.
    plain: the first probe as the template writes it; given: the last probe, which has a system turn."""
    opening, end = tokenizer.decode(form.head("system", "", tokenizer)), tokenizer.decode([form.end])
    own, system = (text.partition(opening)[2].partition(end)[0] if opening in text else None for text in (plain, given))
    form = replace(form, strip=PROBES[0][0]["content"] not in plain,
                   bos=tokenizer.special.get(plain.partition(tokenizer.decode([form.start]))[0]))
    dates = (system or "").removesuffix(form.content(SYSTEM["content"]))
    return replace(form, dates=dates, system=None if own is None else own.removeprefix(dates))


def parts_of(form: Template, messages: list[dict], tokenizer) -> tuple[list[int], list[list[int]], list[int]]:
    """A conversation's ids in three parts: start token and system turn; each later turn; the opening of the answer."""
    system, after = form.system, tokenizer.encode(form.after)
    if messages[0]["role"] == "system":
        system, messages = form.content(messages[0]["content"]), messages[1:]
    start = [] if form.bos is None else [form.bos]
    if system is not None:
        start += [*form.head("system", form.dates + system, tokenizer), form.end, *after]
    turns = [[*form.head(m["role"], form.content(m["content"]), tokenizer), form.end, *after] for m in messages]
    return start, turns, form.head("assistant", "", tokenizer)


def answer_of(form: Template, content: str, tokenizer) -> list[int]:
    """Ids of an answer's content and of the end of its turn."""
    return [*tokenizer.encode(form.content(content)), form.end]


def encode_chat(messages: list[dict], tokenizer, max_prompt: int) -> tuple[list[int], int]:
    """-> a prompt of at most max_prompt ids, and the number of omitted turns. The conversation ends with a user's turn.

    If it is too long, the oldest turns are omitted, each in full; the system turn stays.
    Raises: Fault if the last turn alone is too long."""
    start, turns, opening = parts_of(template_of(tokenizer), messages, tokenizer)
    room, first = max_prompt - len(start) - len(opening), 0
    while sum(map(len, turns[first:])) > room:
        first += 1
    if first == len(turns):
        needs = len(start + turns[-1] + opening)
        raise Fault("turn too long", f"the last turn with the system turn and the answer's opening has {needs} ids",
                    f"raise max_prompt (now {max_prompt}), or remove the line")
    return start + sum(turns[first:], []) + opening, first


def encode_answer(content: str, tokenizer) -> list[int]:
    """Ids of an assistant's turn after its opening, including the end-of-turn token. Raises: InputError."""
    return answer_of(template_of(tokenizer), content, tokenizer)


def ends(tokenizer) -> set[int]:
    """The ids that end a response: end-of-text, and end-of-turn if the tokenizer has a template."""
    try:
        return {tokenizer.eos, template_of(tokenizer).end}
    except InputError:
        return {tokenizer.eos}
