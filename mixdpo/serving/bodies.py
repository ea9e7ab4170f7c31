"""Bodies of requests: bytes of somebody unknown -> one JSON object whose values are safe to use.

    read_object     bytes -> dict. JSON as RFC 8259 defines it, UTF-8, and stricter: each key once in an object, no NaN
                    or Infinity, no number beyond float64, no integer above 64 bits, no null character, no half of a
                    surrogate pair, at most DEPTH brackets deep
    Fields          reads the fields of an object one by one; `finish` names those that nobody read

Each fault is one Refused, whose message says what is wrong and what is expected.
"""

import json
import math
import re

DEPTH = 16                          # nested brackets; an OpenAI request has five
LARGEST = 2**63                     # integers lie below it, and above its negative
SHOWN = 60                          # characters of a wrong value that a message repeats
TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
         429: "rate_limit_error"}   # OpenAI's words by status; other 4xx are the first, 5xx are "server_error"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Refused(Exception):
    """A request that is not served. status: of HTTP; message: one sentence; param: the field; code: a word for
    programs; headers: further headers of the answer."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    @property
    def body(self) -> dict:
        """The answer in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else TYPES.get(self.status, TYPES[400])
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def busy() -> Refused:
    return Refused(429, "the server has more requests than it can hold; wait and send this one again",
                   code="queue_full", headers={"Retry-After": "2"})         # seconds; an answer takes about as long


def stopping() -> Refused:
    return Refused(503, "the server stops; send the request again later", headers={"Retry-After": "10"})


def wrong(param: str, got, wanted: str) -> Refused:
    """A field with an unusable value. wanted: the end of the sentence."""
    return Refused(400, f"{param}: got {shown(got)}; {wanted}", param)


def shown(value) -> str:
    """A JSON value as a message repeats it: short, printable ASCII."""
    text = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else ascii(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_object(raw: bytes) -> dict:
    """The JSON object in a body. Raises: Refused with status 400."""
    if not raw.strip():
        raise Refused(400, "the body is empty; send a JSON object")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}; send JSON in "
                      "UTF-8") from None
    if depth(text) > DEPTH:
        raise Refused(400, f"the body has more than {DEPTH} brackets within each other; send a flatter object")
    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_int=integer,
                           parse_float=number)
    except json.JSONDecodeError as error:
        raise Refused(400, f"the body is not JSON: {error.msg} at character {error.pos}; send a JSON object") from None
    if not isinstance(found, dict):
        raise Refused(400, f"the body is {shown(found)}; send a JSON object")
    check_texts(found)
    return found


def depth(text: str) -> int:
    """The largest number of open brackets outside of strings. Text that is not JSON may give any number."""
    deepest = level = 0
    for mark in re.findall(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', text, re.DOTALL):
        level += 1 if mark in "[{" else -1 if mark in "]}" else 0
        deepest = max(deepest, level)
    return deepest


def unique(pairs: list[tuple[str, object]]) -> dict:
    """An object whose keys all differ."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise Refused(400, f"the key {shown(name)} occurs twice in an object; send it once")
        found[name] = value
    return found


def no_constant(name: str):
    raise Refused(400, f"the body holds {name}, which is not JSON; send a number")


def integer(digits: str) -> int:
    if len(digits) > 20 or not -LARGEST <= int(digits) < LARGEST:
        raise Refused(400, f"the body holds the integer {shown(digits)}; send integers of at most 64 bits")
    return int(digits)


def number(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise Refused(400, f"the body holds the number {shown(digits)}; send numbers below 1.8e308")
    return value


def check_texts(value) -> None:
    """Raises: Refused if a string, or a key, at any depth cannot be a text."""
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, list):
        for part in value:
            check_texts(part)
    elif isinstance(value, dict):
        for name, part in value.items():
            check_text(name)
            check_texts(part)


def check_text(text: str) -> None:
    if "\x00" in text:
        raise Refused(400, "a text in the body holds a null character (U+0000); remove it")
    if (half := re.search("[\ud800-\udfff]", text)) is not None:
        raise Refused(400, f"a text in the body holds U+{ord(half[0]):04X}, one half of a surrogate pair; send "
                      "complete characters")


# --- fields -----------------------------------------------------------------------------------------------------------


class Fields:
    """Reads an object. A field that is null counts as absent. All methods raise Refused with status 400."""

    def __init__(self, found: dict):
        self.left = dict(found)

    def take(self, name: str, kind: type | tuple[type, ...], wanted: str, default=None):
        """The field's value, which is of the type `kind` (true and false are no numbers), or the default."""
        value = self.left.pop(name, None)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
            raise wrong(name, value, wanted)
        return value

    def flag(self, name: str) -> bool:
        return self.take(name, bool, "send true or false", False)

    def text(self, name: str) -> str:
        """A text that must be there."""
        value = self.take(name, str, "send a text")
        if value is None:
            raise Refused(400, f"{name} is missing; send a text", name)
        return value

    def integer(self, name: str, low: int, high: int, default=None):
        """An integer of at least `low` and at most `high`, or the default."""
        wanted = f"send a whole number of at least {low} and at most {high}"
        value = self.take(name, int, wanted, None)
        if value is not None and not low <= value <= high:
            raise wrong(name, value, wanted)
        return default if value is None else value

    def real(self, name: str, low: float, high: float, default: float, above: bool = False) -> float:
        """A number of at least `low` (above: more than `low`) and at most `high`, or the default."""
        wanted = f"send a number {'above' if above else 'of at least'} {low} and at most {high}"
        value = self.take(name, (int, float), wanted, default)
        if not low <= value <= high or above and value == low:
            raise wrong(name, value, wanted)
        return float(value)

    def user(self, name: str = "user") -> str:
        """The name of a user, or ""."""
        value = self.take(name, str, "send a text", "")
        return check_name(value, name) if value else value

    def finish(self, known: tuple[str, ...]) -> None:
        """Raises: Refused if a field is left, with its name and the known ones."""
        if self.left:
            name = next(iter(self.left))
            raise Refused(400, f"unknown field {shown(name)}; this endpoint reads {', '.join(known)}",
                          name if NAME.fullmatch(name) else None, "unknown_field")


def check_name(name: str, param: str = "user") -> str:
    """The name of a user. Raises: Refused unless it has 1 to 64 characters of [A-Za-z0-9._-]."""
    if not NAME.fullmatch(name):
        raise wrong(param, name, "send a name of 1 to 64 characters, each a letter, a digit, or one of . _ -")
    return name
