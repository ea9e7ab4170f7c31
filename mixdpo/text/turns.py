"""Turns: reads conversations as other programs write them, and finds where two of them part.

    [{"role": "user", "content": ...}, ...]         as the project's own; {"from": "human", "value": ...} is the same
    "\\n\\nHuman: ... \\n\\nAssistant: ..."             HH's transcripts

Two transcripts become a prompt and two answers. The prompt is what they have in common, in whole turns: a turn that
begins alike in both and ends differently belongs to the answers. Each answer must be one turn of the assistant.
Treatments: a message's other keys may be null, otherwise they are an error; a tool turn or a tool call is refused by
name. A system turn that is null or empty is removed by records.py.
HH's transcripts stay text, so they need no chat template: the prompt ends with "\\n\\nAssistant:".
"""

import re

from mixdpo.text.records import Fault, without_empty_system

ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
         "bot": "assistant", "model": "assistant", "assistant": "assistant", "system": "system"}
TOOLS = {"tool", "function", "function_call", "tool_call", "observation", "ipython", "tool_response"}
SPEAKER = re.compile(r"\n\n(?=(?:Human|Assistant):)")
HUMAN, ASSISTANT = "Human:", "Assistant:"
MORE = ("tool_calls", "function_call", "tool_call_id")  # keys of a message that has to do with tools


def read_turns(field: str, value) -> list[dict]:
    """Messages in the project's own form: role (user, assistant, system) and content. value: a list of messages, or one
    message. Raises: Fault; contents are checked by records.check_messages."""
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise Fault("wrong type", f"{field} is {value!r:.80}", "wanted a text or a list of messages")
    turns = []
    for n, message in enumerate(messages):
        given = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        role = given.pop("role", given.pop("from", None))
        role = role.lower() if isinstance(role, str) else None
        if tool := [f"the role {role!r}"] * (role in TOOLS) or [key for key in MORE if given.get(key)]:
            raise Fault("tool turn", f"{field}[{n}] has {tool[0]}", "tool turns are not supported: remove the line")
        given = {key: v for key, v in given.items() if key not in MORE}     # empty ones
        content = given.pop("content", given.pop("value", None))
        if role not in ROLES or given:
            raise Fault("wrong message", f"{field}[{n}] is {message!r:.80}",
                        'wanted {"role": ..., "content": ...} or {"from": ..., "value": ...} of a user, an assistant '
                        "or the system, without other keys")
        turns.append({"role": ROLES[role], "content": content})
    return turns


def split_turns(chosen: list[dict], rejected: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    """Two transcripts -> the prompt, and the two answers of one turn each. Raises: Fault."""
    shared = common(chosen, rejected)
    answers = chosen[shared:], rejected[shared:]
    check_answers([len(answer) for answer in answers], [turn["role"] for answer in answers for turn in answer],
                  "assistant")
    if not shared:
        raise Fault("no common prompt", "the transcripts begin with different turns", "wanted transcripts that begin "
                    "with the same turns")
    return chosen[:shared], *answers


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two transcripts in HH's form -> the prompt, and the two answers, as texts. Raises: Fault."""
    parts = []
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if not is_transcript(text):
            raise Fault("not a transcript", f"{field} is {text!r:.60}",
                        'wanted "\\n\\nHuman: ... \\n\\nAssistant: ..."')
        parts.append(SPEAKER.split(text))                                   # the first part is what stands before
    shared = common(*parts)
    answers = [part[shared:] for part in parts]
    check_answers(list(map(len, answers)), [turn.partition(":")[0] for part in answers for turn in part], "Assistant")
    prompt = "\n\n".join([*parts[0][:shared], ASSISTANT])
    first, second = (answer[0].removeprefix(ASSISTANT) for answer in answers)
    return prompt, first, second


def is_transcript(value) -> bool:
    """Whether a value is a text in HH's form."""
    return isinstance(value, str) and value.lstrip().startswith(HUMAN) and f"\n\n{ASSISTANT}" in value


def common(chosen: list, rejected: list) -> int:
    """The number of turns that two transcripts begin with alike."""
    most = min(len(chosen), len(rejected))
    return next((n for n in range(most) if chosen[n] != rejected[n]), most)


def check_answers(counts: list[int], roles: list[str], wanted: str) -> None:
    """counts: turns behind the common ones in each transcript. Raises: Fault unless both are one of the assistant."""
    if counts == [0, 0]:
        raise Fault("identical responses", "chosen and rejected are the same transcript", "remove the line")
    if counts != [1, 1]:
        raise Fault("not one answer each", f"behind the turns that they share, chosen has {counts[0]} turns and "
                    f"rejected {counts[1]}", "wanted transcripts that differ in their last turn only")
    if roles != [wanted, wanted]:
        raise Fault("wrong roles", f"the last turns are of {' and '.join(roles)}", "wanted answers of the assistant")


# ---- a prompt and two answers


def with_prompt(prompt, chosen, rejected, remarks: list[str]) -> tuple:
    """Prompt and answers, of which some may be messages, all as texts or all as messages. Raises: Fault."""
    if all(isinstance(text, str) for text in (prompt, chosen, rejected)):
        return prompt, chosen, rejected
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Fault("wrong type", "of chosen and rejected, one is a text and one is not", "wanted two texts or two "
                    "lists of messages")
    sides = [[{"role": "assistant", "content": side}] if isinstance(side, str) else read_turns(field, side)
             for field, side in (("chosen", chosen), ("rejected", rejected))]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else read_turns("prompt", prompt)
    if all(len(side) > 1 for side in sides):
        shared, *answers = split_turns(*sides)
        contents = [turn["content"] for turn in shared if turn["role"] == "user"]
        if turns not in (shared, sides[0]) and (not isinstance(prompt, str) or prompt not in contents):
            raise Fault("two prompts", f"the prompt is {prompt!r:.60}, but chosen and rejected begin with another",
                        "wanted the same conversation in both")
        return shared, *answers
    if turns and turns[-1]["role"] == "assistant":
        if turns[-1:] != sides[0]:
            raise Fault("trailing assistant turn", f"the prompt ends with the assistant's {turns[-1]['content']!r:.60}",
                        "wanted a prompt whose last turn is a user's")
        remarks.append("prompts that end with the chosen answer, which is removed from them")
        turns = turns[:-1]
    return turns, *sides


def with_system(system, prompt, chosen, rejected) -> tuple:
    """Prompt and answers with the column system in front. Raises: Fault."""
    if system in (None, ""):
        return prompt, chosen, rejected
    if not isinstance(system, str):
        raise Fault("wrong type", f"system is {system!r:.80}", "wanted a text")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        chosen, rejected = ([{"role": "assistant", "content": side}] for side in (chosen, rejected))
    if (prompt := without_empty_system(prompt)) and prompt[0]["role"] == "system":
        raise Fault("two system turns", "the column system and the first message", "wanted one of them")
    return [{"role": "system", "content": system}, *prompt], chosen, rejected
