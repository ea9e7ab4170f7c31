"""Records: reads the lines of a preference file and checks their fields and types.

Each line is one JSON object, which is one comparison:

    {"prompt": str, "chosen": str, "rejected": str}           required; or all three are lists of messages (chat.py):
        [{"role": "user", "content": str}, ...]               prompt: an optional system turn, then turns; last a user's
        [{"role": "assistant", "content": str}]               chosen and rejected: one turn each
    {"ranking": [[str, ...], ...]}                            more than two responses, or a tie, in place of chosen and
                                                              rejected: groups of equally good ones, the best first
    {"rest": [str, ...]}                                      beside a ranking: worse responses, in an unknown order
    {"user": str}                                             who judged; training may use it (M11: one type per user)
    {"domain": str}                                           the prompt's domain; only the domain gate uses it
    {"annotator": str, "scores": {name: [chosen, rejected]}}  the true type and rewards; evaluation only
    {"context": bool}                                         true: a pair for the E-step only, not for the M-step

Left out: repair of damaged or unknown fields; each is an error. So are a key that occurs twice in an object, and NaN
and Infinity, which are no JSON. Other shapes: shapes.py; other containers than JSON Lines: containers.py.
"""

import functools
import hashlib
import itertools
import json
import math
import re
import sys
from typing import Any

from mixdpo.config import InputError
from mixdpo.files.sources import data_files
from mixdpo.files.unpack import unpacked

LONGEST = 2**26  # largest line in bytes
LARGEST_TIE = 8  # equally good responses; the likelihood of n of them is a sum over 2^n sets
MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](role|content)["']\s*:""")  # a list of messages, written as a string
TEXTS, OPTIONAL = ("prompt", "chosen", "rejected"), ("user", "annotator", "scores", "context", "domain")
FIELDS = (*TEXTS, "ranking", "rest", *OPTIONAL)  # every name that the project's own format has
REST = 1000  # the place of responses that are worse than the ranked ones


class Fault(InputError):
    """A fault in one line. Dropped lines are counted by `kind`; `got` is the fault, `remedy` what to do."""

    def __init__(self, kind: str, got: str, remedy: str, file=None, line: int | None = None):
        super().__init__(f"{kind}: {got}; {remedy}", file, line)
        self.kind, self.got, self.remedy = kind, got, remedy


def lines(path):
    """Yields the lines of a file, unpacked if it is .gz or .zst, as bytes. Only a newline ends a line; U+2028 in a text
    does not.

    Raises: InputError if the file does not exist, if a packed file is damaged, or if a line is longer than LONGEST (a
    packed file may expand to any size).
    """
    with unpacked(path) as file:
        for number in itertools.count(1):
            if not (raw := file.readline(LONGEST + 1)):
                return
            if len(raw) > LONGEST:
                raise InputError(f"more than {LONGEST >> 20} MiB without a newline, wanted one object per line; "
                                 "split the line", file=path, line=number)
            yield raw


def parse_object(raw: bytes) -> dict:
    """One JSON object, such as a line. Raises: Fault."""
    usual = 'wanted {"prompt": ..., "chosen": ..., "rejected": ...} on one line'
    repeated: list[str] = []
    constants: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(name for name in found if names.count(name) > 1)
        return found

    def constant(name: str) -> float:
        constants.append(name)
        return float(name)

    try:
        record = json.loads(raw.strip().decode("utf-8-sig"), object_pairs_hook=unique,
                            parse_constant=constant)
    except UnicodeDecodeError as error:
        got = f"byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}"
        raise Fault("not UTF-8", got, "save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Fault("not JSON", str(error).replace("line 1 ", ""), usual) from None
    if not isinstance(record, dict):
        raise Fault("not an object", f"got a {type(record).__name__}", usual)
    if repeated:
        raise Fault("repeated key", ", ".join(map(repr, repeated)), "wanted each key once in an object: remove one")
    if constants:
        field = next(name for name, value in record.items() if not is_finite(value))
        raise Fault("wrong type", f"{field} is {record[field]!r:.80}", "NaN and Infinity are no JSON: write null, or "
                    "remove the field")
    return record


def is_finite(value) -> bool:
    """False if a parsed JSON value holds NaN or an infinity at any depth. No recursion: JSON's reader goes deeper."""
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, float) and not math.isfinite(part):
            return False
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return True


def read_record(raw: bytes) -> dict:
    """One line as a dict with known fields of the right types. Raises: Fault."""
    return check_record(parse_object(raw))


def check_record(record: dict) -> dict:
    """The record, if it has known fields of the right types. What is null and not required is removed: in Parquet every
    row has all names of the file, in "scores" too. Raises: Fault."""
    if unknown := [field for field in record if field not in FIELDS]:
        known = f"wanted some of {', '.join(FIELDS)}: rename or remove the field"
        raise Fault("unknown field", ", ".join(map(repr, unknown)), known)
    required = TEXTS if record.get("ranking") is None else ()
    record = {field: value for field, value in record.items() if value is not None or field in required}
    if isinstance(record.get("scores"), dict):
        record["scores"] = {name: value for name, value in record["scores"].items() if value is not None}
    if missing := [field for field in (TEXTS[:1] if "ranking" in record else TEXTS) if field not in record]:
        raise Fault("missing field", ", ".join(missing), f"wanted {', '.join(TEXTS)} in every line: add it")
    if "ranking" in record:
        check_ranking(record)
    elif "rest" in record:
        raise Fault("rest without a ranking", "a field rest", "wanted ranking in place of chosen and rejected")
    record["prompt"] = without_empty_system(record["prompt"])
    texts = texts_of(record)
    chat = [field for field, text in texts.items() if isinstance(text, list)]
    if chat and len(chat) < len(texts):
        raise Fault("wrong type", f"{', '.join(chat)}: messages, the others: text",
                    "wanted prompt and responses of the same type: all messages or all text")
    for field, text in texts.items():
        (check_messages if chat else check_string)(field, text)
    for field in record.keys() & {"user", "annotator", "domain"}:
        check_string(field, record[field])
    if not isinstance(record.get("context", False), bool):
        raise Fault("wrong type", f"context is {record['context']!r:.80}", "wanted true or false")
    scores = record.get("scores", {})
    if not (isinstance(scores, dict) and all(map(is_score, scores.values()))):
        raise Fault("wrong type", f"scores is {scores!r:.80}",
                    'wanted {"name": [chosen, rejected], ...}: finite numbers')
    return record


def placed(record: dict) -> list[tuple[int, Any]]:
    """The responses of a record with their places, the best first: 0, 1, ..., and REST."""
    groups = record["ranking"] if "ranking" in record else [[record["chosen"]], [record["rejected"]]]
    ranked = [(place, text) for place, group in enumerate(groups) for text in group]
    return ranked + [(REST, text) for text in record.get("rest", ())]


def texts_of(record: dict) -> dict[str, Any]:
    """Name -> text, or messages, of a record's prompt and responses."""
    if "ranking" not in record:
        return {field: record[field] for field in TEXTS}
    responses = {f"response {n}": text for n, (_, text) in enumerate(placed(record), 1)}
    return {"prompt": record["prompt"]} | responses


def check_ranking(record: dict) -> None:
    """Raises: Fault unless record["ranking"] is a list of groups, with two responses or more in all and in "rest"."""
    ranking, wanted = record["ranking"], 'wanted [["best"], ["second", "as good"], ["worst"]], two responses or more'
    rest = record.get("rest", [])
    if both := record.keys() & {"chosen", "rejected", "scores"}:
        raise Fault("two forms of a choice", f"ranking and {', '.join(sorted(both))}", "wanted one of them")
    if not isinstance(ranking, list) or not ranking or not all(isinstance(g, list) and g for g in ranking):
        raise Fault("wrong type", f"ranking is {ranking!r:.80}", wanted)
    if not isinstance(rest, list):
        raise Fault("wrong type", f"rest is {rest!r:.80}", 'wanted a list: ["worse", "also worse"]')
    if (count := len(placed(record))) < 2:
        raise Fault("too few responses", f"ranking has {count}", wanted)
    if (most := max(map(len, ranking))) > LARGEST_TIE:
        raise Fault("too many equal responses", f"a group of the ranking has {most}", f"wanted at most {LARGEST_TIE}")


def without_empty_system(prompt):
    """A prompt without its first message if that is a system turn whose content is null or empty: it is as if it were
    absent, so a chat template's default system turn holds."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    empty = isinstance(first, dict) and first.get("role") == "system" and first.get("content", "?") in (None, "")
    return prompt[1:] if empty else prompt


def check_string(field: str, value) -> None:
    """Raises: Fault unless `value` is a string that is not empty and has no lone surrogates (UTF-8 cannot encode
    them)."""
    if not isinstance(value, str):
        raise Fault("wrong type", f"{field} is {value!r:.80}", "wanted a string")
    if not value:
        raise Fault(f"empty {field}", "it is ''", "wanted at least one character: add text or remove the line")
    for position, character in enumerate(value):
        if "\ud800" <= character <= "\udfff":
            got = f"{field} has \\u{ord(character):04x} at position {position}"
            raise Fault("lone surrogate", got, "it is half of a character: write both halves or remove it")


def check_messages(field: str, messages: list) -> None:
    """Raises: Fault unless a chat template can write these messages: the turns of a prompt, or one answer."""
    wanted = "wanted [{\"role\": \"user\", \"content\": \"...\"}, ...]"
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise Fault("wrong message", f"{field}[{n}] is {message!r:.80}", wanted)
        check_string(f"{field}[{n}].content", message["content"])
        if not isinstance(message["role"], str):
            raise Fault("wrong roles", f"{field}[{n}].role is {message['role']!r:.80}", wanted)
    roles = [message["role"] for message in messages]
    if field != "prompt":                                                   # a response
        if roles != ["assistant"]:
            raise Fault("wrong roles", f"{field} has {roles}", "wanted one message with role assistant")
    elif roles[-1:] != ["user"] or not {*roles} <= {"system", "user", "assistant"} or "system" in roles[1:]:
        raise Fault("wrong roles", f"{field} has {roles}", "wanted messages of user and assistant, the last of a user; "
                    "one of system may come first (tool turns are not supported)")


def is_score(value) -> bool:
    """True if `value` is [chosen, rejected], two numbers that a float can hold; true and false are not numbers here."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) in (int, float) and abs(number) <= sys.float_info.max for number in value)
    )


def suspicions(record: dict, tokenizer) -> list[str]:
    """What looks like a mistake in a record that can be trained on as it stands."""
    plain = isinstance(record["prompt"], str)
    texts = list(texts_of(record).values())
    texts = texts if plain else [message["content"] for messages in texts for message in messages]
    names, found = special_names(tokenizer), []
    if names and any(map(names.search, texts)):
        found.append("lines with the name of a special token in a text, read as characters (to have a chat template "
                     "applied, write messages)")
    if plain and any(map(MESSAGES.match, texts)):
        found.append("lines with messages written as a string, read as text (write them as a list)")
    prompt = texts[0].strip()
    if plain and prompt and all(text.lstrip().startswith(prompt) for text in texts[1:]):
        found.append("lines of which all responses begin with the prompt, which is trained on as part of them (take "
                     "it out of them)")
    return found


@functools.cache
def special_names(tokenizer) -> re.Pattern | None:
    """Finds the names of special tokens in a text, where they are characters; None: there are no special tokens."""
    literal = tokenizer.vocabulary.literal if hasattr(tokenizer, "vocabulary") else ()   # those a text may hold as ids
    names = [re.escape(name) for name in getattr(tokenizer, "special", {}) if name not in literal]
    return re.compile("|".join(names)) if names else None


def data_key(named, columns: str = "") -> str:
    """sha256 of the (unpacked) bytes of all files that `named` stands for, of their containers and of the option
    columns: for the cache of reference log-probs, and to find out whether a run's data have changed."""
    found = []
    for source in data_files(named):
        key = hashlib.sha256()
        with unpacked(source.path) as file:
            while piece := file.read(1 << 20):
                key.update(piece)
        found.append((source.kind, key.hexdigest()))
    if columns or len(found) > 1 or found[0][0] != "lines":
        return hashlib.sha256(repr((sorted(columns.split(",")), found)).encode()).hexdigest()
    return found[0][1]
