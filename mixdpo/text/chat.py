"""Chat: converts a conversation to ids. Messages are {"role": system, user or assistant, "content": text}.

A prompt is a conversation that ends with a user's turn, plus the opening of the assistant's turn. A response is the
content of the assistant's turn and the end-of-turn token. That token is a chat's EOS; a policy must learn to give it.

A tokenizer's chat template is a Jinja program that writes a conversation as text. The published ones of

    Qwen2, Qwen2.5, SmolLM2 <|im_start|> role \\n content <|im_end|> \\n, with a default system turn (ChatML)
    Qwen3                   ChatML; the last answer follows <think>\\n\\n</think>\\n\\n, the empty block; earlier ones
                            lose their thoughts
    SmolLM3                 ChatML; the system turn begins with a date and "/no_think"; each answer has the block
    Llama 3                 <|begin_of_text|>, then <|start_header_id|> role <|end_header_id|> \\n\\n content <|eot_id|>
    OLMo 2                  <|endoftext|>, then <|user|> \\n content \\n <|assistant|> \\n content <|endoftext|> \\n
    Mistral                 <s>, then [INST] content[/INST] content</s>; a system turn goes into the last user's turn

The program runs on placeholders in place of the contents, once for each sequence of roles. Its output shows the text
before, between and after the contents (`pieces`). Two probes show how it changes a content, for example that it strips
blanks (KEEP). So the template's own text and the contents are told apart: the name of a special token is that token in
the former and stays text in the latter. A message that quotes "<|im_end|>" does not end the turn. The text between two
special tokens is tokenised in one piece, as in the models' training. The program also writes each conversation and each
answer as they are; a different text is a fault of that line. Hence the ids equal those of transformers'
apply_chat_template(enable_thinking=False), with two exceptions. A response is tokenised separately from the opening
before it, as all responses are (preferences.py). A template that writes today's date gets its own fallback date, or
DATE if it has none, because cached ids must stay valid the next day.

Thinking is off. The empty block is a part of the opening, so training and generation both continue after it. An answer
with thoughts of its own cannot follow an empty block: it is a fault of its line.

Left out: tools, images, and templates that change a content in other ways than KEEP.
"""

import datetime
import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from mixdpo.config import InputError
from mixdpo.text.records import Fault

# sha256 of SmolLM2's template -> its default system turn. Used if jinja2, which is installed with torch, is missing.
KNOWN = {"872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788":
         "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
DATE = datetime.date(2025, 7, 8)                            # SmolLM3's release
HOLE = re.compile("\uf8f0(\\d+)\uf8f1")                     # a placeholder: a turn's number between private characters
ELSE = "use another model, or write strings instead of messages"


def without_thoughts(content: str) -> str:
    """The content after its last </think>, or all of it."""
    return content.split("</think>")[-1].lstrip("\n") if "</think>" in content else content


# How a template may write a content. Qwen3: `without_thoughts` for earlier answers, `lstrip` for the last.
KEEP: list[Callable[[str], str]] = [str, str.strip, str.rstrip, without_thoughts, lambda c: c.lstrip("\n"),
                                    lambda c: without_thoughts(c).lstrip("\n")]
PLAIN, THOUGHTS = "\n c \n", "\n <think>b</think>\n c \n"   # contents on which these differ


@dataclass(frozen=True)
class Template:
    """What a chat template does, in one tokenizer's ids."""

    write: Callable[[list[dict], bool], str]    # messages, True to open an answer -> text
    pieces: Callable[[tuple, bool], list[str]]  # roles, True to open an answer -> template texts and turns' numbers
    names: re.Pattern                           # finds the names of added tokens in template texts
    keep: dict[str, Callable[[str], str]]       # role -> content as the template writes it; "answer": the last turn
    end: int                                    # id at the end of an answer
    lead: str                                   # blanks before an answer, after the opening
    tail: str                                   # text after an answer, from the name of `end`

    def contents(self, messages: list[dict]) -> list[str]:
        """The contents of a prompt's messages as the template writes them."""
        return [self.keep[message["role"]](message["content"]) for message in messages]


@functools.cache
def template_of(tokenizer) -> Template:
    """The tokenizer's template. Raises: InputError if it has none, or one that `Template` cannot describe."""
    write, place = writer_of(tokenizer), getattr(tokenizer, "place", None)   # other tokenizer classes lack `place`

    @functools.lru_cache(1024)
    def pieces(roles: tuple, opening: bool) -> list[str]:
        marked = [{"role": role, "content": f"\uf8f0{n}\uf8f1"} for n, role in enumerate(roles)]
        found = HOLE.split(write(marked, opening))
        if sorted(found[1::2]) != sorted(map(str, range(len(roles)))):
            raise InputError("its chat template does not write the content of each turn exactly once: "
                             f"{''.join(found)!r}; {ELSE}", file=place)
        return found

    before, _, opening = pieces(("user",), True)
    same, _, given, _, tail = pieces(("user", "assistant"), False)
    longest_first = sorted(tokenizer.special, key=len, reverse=True)     # a regex takes the first alternative that fits
    names = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
    end = names.match(tail)
    if same != before or not given.startswith(opening) or given[len(opening):].strip() or not end:
        raise InputError(f"its chat template writes {given!r} before an answer and {tail!r} after it, wanted its "
                         f"opening {opening!r} before and a special token after; {ELSE}", file=place)
    keep = {"user": keep_of(write, pieces, ("user",), 0, place),
            "assistant": keep_of(write, pieces, ("user", "assistant", "user"), 1, place),
            "answer": keep_of(write, pieces, ("user", "assistant"), 1, place)}
    try:
        keep["system"] = keep_of(write, pieces, ("system", "user"), 0, place)
    except InputError:                          # no system turns: a fault of those lines that have one
        keep["system"] = str
    return Template(write, pieces, names, keep, tokenizer.special[end[0]], given[len(opening):], tail)


def keep_of(write: Callable, pieces: Callable, roles: tuple, n: int, place) -> Callable[[str], str]:
    """How the template writes the content of turn n. Raises: InputError if in no way of KEEP."""
    opening, texts, fit = roles[-1] == "user", [], []
    for probe in (PLAIN, THOUGHTS):
        contents = [probe if turn == n else "x" for turn in range(len(roles))]
        texts.append(write([{"role": role, "content": c} for role, c in zip(roles, contents)], opening))
        kept = [[keep(c) if turn == n else c for turn, c in enumerate(contents)] for keep in KEEP]
        fit.append([fill(pieces(roles, opening), each) == texts[-1] for each in kept])
    if not any(fit[0]):
        raise InputError(f"its chat template changes the content of a {roles[n]}'s turn: {PLAIN!r} becomes "
                         f"{texts[0]!r}; {ELSE}", file=place)
    return max(zip(KEEP, *fit), key=lambda each: each[1:])[0]           # the first that fits both, or only PLAIN


def writer_of(tokenizer) -> Callable[[list[dict], bool], str]:
    """The tokenizer's chat template as a function: messages, True to open an answer -> text. Without one, the special
    tokens decide: ChatML's or Llama 3's. Raises: InputError, as the function does."""
    jinja, special = getattr(tokenizer, "chat_template", None), getattr(tokenizer, "special", {})
    place = getattr(tokenizer, "place", None)
    if jinja:
        try:
            return jinja_writer(jinja, tokenizer.named, place)
        except ImportError:
            if (key := hashlib.sha256(jinja.encode()).hexdigest()) in KNOWN:
                return functools.partial(chatml, system=KNOWN[key])
            raise InputError("its chat template cannot be checked without jinja2; run `pip install jinja2`, or write "
                             "strings instead of messages", file=place) from None
    start = "" if getattr(tokenizer, "bos", None) is None else tokenizer.decode([tokenizer.bos])
    if "<|im_start|>" in special:
        return functools.partial(chatml, start=start)
    if "<|start_header_id|>" in special:
        return functools.partial(llama3, start=start)
    raise InputError("the tokenizer has no chat template, and no special tokens of ChatML (<|im_start|>) or Llama 3 "
                     "(<|start_header_id|>); use a chat model, or write strings instead of messages", file=place)


def chatml(messages: list[dict], opening: bool, start: str = "", system: str | None = None) -> str:
    """ChatML with a default system turn, if `system` is given."""
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join([start, *turns, "<|im_start|>assistant\n" * opening])


def llama3(messages: list[dict], opening: bool, start: str) -> str:
    """Llama 3's form."""
    head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    turns = [f"{head(m['role'])}{m['content'].strip()}<|eot_id|>" for m in messages]
    return "".join([start, *turns, head("assistant") * opening])


def jinja_writer(jinja: str, named: dict, place) -> Callable[[list[dict], bool], str]:
    """A Jinja chat template as a function, with thinking off. named: {"eos_token": name, ...}.
    Raises: InputError, as the function does; ImportError without jinja2."""
    from jinja2 import sandbox

    def raise_exception(message):
        raise ValueError(message)

    env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,       # transformers' settings
                                                extensions=["jinja2.ext.loopcontrols"])
    names = {"tools": None, "documents": None, "enable_thinking": False, "raise_exception": raise_exception} | named
    if "strftime_now is defined" not in jinja:
        names["strftime_now"] = DATE.strftime
    # transformers' {% generation %} marks the answers for its own use; it writes nothing.
    jinja = re.sub(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})",
                   lambda tag: tag[1] + ("endif" if tag[2] else "if true") + tag[3], jinja)
    render = None

    def write(messages, opening):
        nonlocal render
        try:
            render = render or env.from_string(jinja).render
            return render(messages=messages, add_generation_prompt=opening, **names)
        except Exception as error:                          # a template is a program: it may raise anything
            raise InputError(f"its chat template fails on a conversation: {type(error).__name__}: {error}; {ELSE}",
                             file=place) from error

    return write


def fill(pieces: list[str], contents: list[str]) -> str:
    """The text of a conversation."""
    return "".join(contents[int(piece)] if n % 2 else piece for n, piece in enumerate(pieces))


def encode_pieces(pieces: list[str], contents: list[str], tokenizer, encode: Callable[[str], list[int]]) -> list[int]:
    """The ids of a conversation. Adjacent text of template and contents is tokenised in one piece. encode: text ->
    ids, tokenizer.encode."""
    ids: list[int] = []
    text = ""
    for n, piece in enumerate(pieces):
        if n % 2:
            text += contents[int(piece)]
            continue
        first, *others = template_of(tokenizer).names.split(piece)      # text, then names and texts in turn
        text += first
        for name, after in zip(others[::2], others[1::2]):
            ids += [*encode(text), tokenizer.special[name]]
            text = after
    return ids + encode(text)


def encode_chat(messages: list[dict], tokenizer, max_prompt: int) -> tuple[list[int], int]:
    """-> a prompt of at most max_prompt ids, and the number of omitted turns. The conversation ends with a user's turn.

    If it is too long, the oldest turns are omitted, each in full; the system turn stays.
    Raises: Fault if the last turn alone is too long, or if the template refuses or changes the conversation."""
    template, system, ids = template_of(tokenizer), messages[:1] if messages[0]["role"] == "system" else [], []
    encode = functools.cache(tokenizer.encode)      # else the last turns are tokenised once for each omitted one
    for first in range(len(messages) - len(system)):
        kept = system + messages[len(system) + first:]
        try:
            pieces = template.pieces(tuple(message["role"] for message in kept), True)
            theirs = template.write(kept, True)
        except InputError as error:
            if first == 0:
                raise Fault("chat template", error.message, "change the turns, or remove the line") from None
            continue                            # Mistral's: the first turn must be a user's
        contents = template.contents(kept)
        if (ours := fill(pieces, contents)) != theirs:
            raise changed(theirs, ours)
        ids = encode_pieces(pieces, contents, tokenizer, encode)
        if len(ids) <= max_prompt:
            return ids, first
    raise Fault("turn too long", f"the last turn with the system turn and the answer's opening has {len(ids)} ids",
                f"raise max_prompt (now {max_prompt}), or remove the line")


def encode_answer(content: str, tokenizer) -> list[int]:
    """Ids of an assistant's turn after its opening, including the end-of-turn token. Raises: InputError; Fault if the
    template changes the content."""
    template, user = template_of(tokenizer), {"role": "user", "content": "x"}
    kept = template.keep["answer"](content)
    ours = template.write([user], True) + template.lead + kept + template.tail
    if (theirs := template.write([user, {"role": "assistant", "content": content}], False)) != ours:
        raise changed(theirs, ours)
    return [*tokenizer.encode(template.lead + kept), template.end]


def changed(theirs: str, ours: str) -> Fault:
    """The fault of a line that the template writes in a different way than its probes."""
    n = next((n for n, (a, b) in enumerate(zip(theirs, ours)) if a != b), min(len(theirs), len(ours)))
    near = slice(max(n - 20, 0), n + 40)
    return Fault("chat template", f"it writes {theirs[near]!r}, wanted {ours[near]!r}", "remove what it reads as a "
                 "command (<think>, /think, <tool_response>, a blank turn), or remove the line")


def ends(tokenizer) -> set[int]:
    """The ids that end a response: end-of-text, and end-of-turn if the tokenizer has a template."""
    try:
        return {tokenizer.eos, template_of(tokenizer).end}
    except InputError:
        return {tokenizer.eos}
