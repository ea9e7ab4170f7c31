"""Requests of OpenAI's API, checked: the fields of a body -> a dataclass.

    Ask             POST /v1/completions and /v1/chat/completions
    Choice          POST /v1/users/ID/preferences
    Query           POST /api/weights and /api/score

A field that OpenAI's API has and this server has not is accepted with the value that changes nothing; any other value,
and any other field, is an error that names it.
"""

from dataclasses import dataclass

from mixdpo.serving.bodies import Fields, Refused, shown, wrong

STOPS, STOP_LENGTH = 4, 256         # stop sequences of a request, and characters of each
COLDEST = 0.001                     # the lowest temperature above 0
TOP = 20                            # alternatives of a token
MESSAGES = 256                      # messages of a conversation
MOST, SEED = 2**31, 2**63 - 1       # tokens of an answer; the largest seed
NEUTRAL: dict[str, tuple] = {       # of both endpoints: field -> values without an effect, besides null
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},)}
NEUTRAL_TEXT: dict[str, tuple] = {"echo": (False,), "suffix": ("",)}
NEUTRAL_CHAT: dict[str, tuple] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",), "verbosity": ("medium",), "web_search_options": (), "moderation": (),
    "safety_identifier": (), "prompt_cache_key": (), "prompt_cache_options": (), "prompt_cache_retention": ()}
NEUTRAL_MESSAGE = ("name", "refusal", "annotations", "audio", "tool_calls", "function_call", "tool_call_id")
SHARED = ("model", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "n", "user", "stream",
          "stream_options")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Ask:
    """A checked request for completions."""

    chat: bool
    model: str
    prompt: str | list[dict]        # a text, or messages with "role" and "content"
    max_tokens: int | None          # None: as many as the server chooses
    temperature: float
    top_p: float
    seed: int | None                # None: the server draws one
    stop: tuple[str, ...]
    logprobs: int | None            # alternatives of each token; None: no log-probs
    n: int
    user: str                       # "": nobody
    stream: bool
    usage: bool                     # whether a stream ends with the numbers of tokens

    @property
    def prompt_field(self) -> str:
        """The field of the body that holds the prompt."""
        return "messages" if self.chat else "prompt"


@dataclass(frozen=True)
class Choice:
    """A checked comparison."""

    prompt: str | list[dict]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Query:
    """A prompt, and perhaps a completion of it and a user."""

    prompt: str | list[dict]
    completion: str | None
    user: str


def read_completion(body: dict, most: int) -> Ask:
    """The body of /v1/completions. most: choices of a request. Raises: Refused."""
    fields = Fields(body)
    prompt = fields.take("prompt", str, "send one text; a list of prompts or of tokens is not supported")
    if prompt is None:
        raise Refused(400, "prompt is missing; send a text", "prompt")
    logprobs = fields.integer("logprobs", 0, TOP)
    return read_shared(fields, False, prompt, logprobs, most, NEUTRAL | NEUTRAL_TEXT, ("prompt", *SHARED))


def read_chat(body: dict, most: int) -> Ask:
    """The body of /v1/chat/completions. most: choices of a request. Raises: Refused."""
    fields = Fields(body)
    prompt = read_messages(fields.left.pop("messages", None), "messages")
    logprobs, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, TOP)
    if top is not None and not logprobs:
        raise Refused(400, "top_logprobs has no effect without logprobs; send logprobs: true", "top_logprobs")
    other = fields.integer("max_completion_tokens", 1, MOST)                # the newer name
    if other is not None:
        if fields.left.get("max_tokens") is not None:
            raise Refused(400, "max_tokens and max_completion_tokens are both given; send one of them", "max_tokens")
        fields.left["max_tokens"] = other
    known = ("messages", *SHARED, "top_logprobs", "max_completion_tokens")
    return read_shared(fields, True, prompt, (top or 0) if logprobs else None, most, NEUTRAL | NEUTRAL_CHAT, known)


def read_shared(fields: Fields, chat: bool, prompt, logprobs: int | None, most: int, neutral: dict, known: tuple
                ) -> Ask:
    """The fields that both endpoints have."""
    n, stream = fields.integer("n", 1, most, 1), fields.flag("stream")
    ask = Ask(chat, fields.text("model"), prompt, fields.integer("max_tokens", 1, MOST),
              read_temperature(fields), fields.real("top_p", 0, 1, 1.0, above=True),
              fields.integer("seed", 0, SEED), read_stop(fields), logprobs, n, fields.user(), stream,
              read_stream_options(fields, stream))
    if not chat:
        neutral = neutral | {"best_of": (n,)}
    for name, values in neutral.items():
        refuse_effect(name, fields.left.pop(name, None), values)
    fields.finish(known)
    return ask


def read_temperature(fields: Fields) -> float:
    """0 for the most likely tokens, or a number that logits can be divided by."""
    value = fields.real("temperature", 0, 2, 1.0)
    if 0 < value < COLDEST:
        raise wrong("temperature", value, f"send 0, or a number of at least {COLDEST} and at most 2")
    return value


def read_stop(fields: Fields) -> tuple[str, ...]:
    """A text, or a list of them."""
    wanted = f"send a text of 1 to {STOP_LENGTH} characters, or a list of at most {STOPS}"
    value = fields.take("stop", (str, list), wanted, [])
    texts = [value] if isinstance(value, str) else value
    for text in texts:
        if not isinstance(text, str) or not 1 <= len(text) <= STOP_LENGTH:
            raise wrong("stop", text, wanted)
    if len(texts) > STOPS:
        raise Refused(400, f"stop: got {len(texts)} texts; {wanted}", "stop")
    return tuple(texts)


def read_stream_options(fields: Fields, stream: bool) -> bool:
    """Whether the stream ends with the numbers of tokens."""
    options = fields.take("stream_options", dict, 'send {"include_usage": true or false}')
    if options is None:
        return False
    if not stream:
        raise Refused(400, "stream_options has no effect without stream; send stream: true", "stream_options")
    inner = Fields(options)
    usage = inner.flag("include_usage")
    refuse_effect("include_obfuscation", inner.left.pop("include_obfuscation", None), (False,))
    inner.finish(("include_usage",))
    return usage


def refuse_effect(name: str, value, neutral: tuple) -> None:
    """Raises: Refused if a field that is not supported has a value with an effect."""
    if value is None or any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutral):
        return
    usual = f", or send {shown(neutral[0])}" if neutral and isinstance(neutral[0], str | int | float) else ""
    raise Refused(400, f"{name} is not supported: got {shown(value)}; leave it out{usual}", name, "unsupported_field")


# --- conversations ----------------------------------------------------------------------------------------------------


def read_messages(value, param: str) -> list[dict]:
    """A conversation as {"role", "content"} of system, user and assistant. Raises: Refused."""
    wanted = f'send a list of 1 to {MESSAGES} messages {{"role", "content"}}'
    if not isinstance(value, list) or not 1 <= len(value) <= MESSAGES:
        got = f"{len(value)} messages" if isinstance(value, list) else shown(value)
        raise Refused(400, f"{param}: got {got}; {wanted}", param)
    return [read_message(message, f"{param}[{n}]") for n, message in enumerate(value)]


def read_message(message, param: str) -> dict:
    """One message. A content may be a list of parts that are texts."""
    if not isinstance(message, dict):
        raise wrong(param, message, 'send {"role", "content"}')
    fields = Fields(message)
    role = fields.take("role", str, "send a text")
    if role not in ROLES:
        raise wrong(f"{param}.role", role, f"send one of {', '.join(ROLES)}")
    content = fields.left.pop("content", None)
    if isinstance(content, list):
        content = "".join(read_part(part, f"{param}.content[{n}]") for n, part in enumerate(content))
    if not isinstance(content, str):
        raise wrong(f"{param}.content", content, "send a text")
    for name in NEUTRAL_MESSAGE:
        refuse_effect(f"{param}.{name}", fields.left.pop(name, None), ([],))
    fields.finish(("role", "content"))
    return {"role": ROLES[role], "content": content}


def read_part(part, param: str) -> str:
    if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text" \
            or not isinstance(part["text"], str):
        raise wrong(param, part, 'send {"type": "text", "text": ...}; images, sound and files are not supported')
    return part["text"]


def read_prompt(fields: Fields) -> str | list[dict]:
    """The field `prompt`: a text, or messages."""
    value = fields.left.pop("prompt", None)
    if value is None:
        raise Refused(400, "prompt is missing; send a text, or a list of messages", "prompt")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong("prompt", value, "send a text, or a list of messages")
    return read_messages(value, "prompt")


# --- the server's own endpoints ---------------------------------------------------------------------------------------


def read_choice(body: dict) -> Choice:
    """The body of /v1/users/ID/preferences. Raises: Refused."""
    fields = Fields(body)
    found = Choice(read_prompt(fields), fields.text("chosen"), fields.text("rejected"))
    fields.finish(("prompt", "chosen", "rejected"))
    if found.chosen == found.rejected:
        raise Refused(400, "chosen and rejected are equal; send two different texts", "rejected")
    return found


def read_query(body: dict, completion: bool) -> Query:
    """The body of /api/weights, or, with a completion, of /api/score. Raises: Refused."""
    fields = Fields(body)
    found = Query(read_prompt(fields), fields.text("completion") if completion else None, fields.user())
    fields.finish(("prompt", *["completion"] * completion, "user"))
    return found
