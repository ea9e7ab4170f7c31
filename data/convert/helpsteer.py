"""HelpSteer2 and HelpSteer3: a prompt and two answers with one overall preference, or ratings of single answers. Who
judged is not published, so records have no user; a type can be inferred for each pair, not for each person.

Licence: CC-BY-4.0.

Citation: Wang, Dong, Delalleau, Zeng, Shen et al. (2024), HelpSteer2: Open-source dataset for training top-performing
reward models, arXiv 2406.08673; Wang et al. (2024), HelpSteer2-Preference, arXiv 2410.01257; Wang et al. (2025),
HelpSteer3-Preference, arXiv 2505.11475. Source: nvidia/HelpSteer2 and nvidia/HelpSteer3 on the Hugging Face hub.

Fields that are read, in three kinds of files:

    HelpSteer3, preference/     context[] {role, content}, response1, response2, overall_preference; domain -> domain
    HelpSteer2, preference/     prompt, response_1, response_2, preference_strength, split
    HelpSteer2, train, validation   prompt, response, helpfulness: two rows in succession have the same prompt, and the
                                answer with the higher helpfulness is preferred

A preference is from -3 (the first answer is much better) to 3 (the second is); 0 is a tie. Other values, such as -100
(neither answer can be used), are left out. --split NAME takes rows of one split (HelpSteer2's preferences; default:
all). A prompt of HelpSteer2 with several turns, divided by "<extra_id_1>User" and "<extra_id_1>Assistant", becomes
messages.

Checked in the cards and in programs that read these sets: all names and values. -100 is known from single annotators'
preferences, which are not read; not checked in a real row: whether it occurs as a preference of the two answers.
"""

import re

from data.convert.source import Row, Source, messages_of, user_turn


def turns_of(prompt: str) -> list[dict]:
    """HelpSteer2's prompt as messages."""
    parts = re.split(r"\s*<extra_id_1>(User|Assistant)\n", prompt)
    return [user_turn(parts[0])] + [{"role": role.lower(), "content": text}
                                    for role, text in zip(parts[1::2], parts[2::2])]


def rated(row: Row) -> tuple[str, str, float | None]:
    """The prompt, the answer and its helpfulness in a row that rates one answer."""
    return row.text("prompt"), row.text("response"), row.number_of("helpfulness")


def judged(source: Source, row: Row, prompt: list[dict], answers: list[str], preference: float | None, **more: str):
    """The record of a preference from -3, the first answer, to 3, the second."""
    if preference is None or not -3 <= preference <= 3:
        source.skip("rows without a preference from -3 to 3", row)
    else:
        first, second = answers
        ranking = [[first], [second]] if preference < 0 else [[second], [first]]
        ranking = ranking if preference else [[first, second]]
        yield from source.judgement(row, prompt, ranking, **more)


def convert(source: Source, split: str = ""):
    """Yields the record of each row, or of two rows with the same prompt."""
    waiting: Row | None = None                                              # a rated answer without its partner so far
    for row in source.rows():
        if split and row.text("split") != split:
            source.skip(f"rows of another split than {split}", row)
        elif "context" in row.fields:
            answers = [row.text("response1"), row.text("response2")]
            yield from judged(source, row, messages_of(row, "context"), answers, row.number_of("overall_preference"),
                              domain=row.text("domain"))
        elif "response_1" in row.fields:
            answers = [row.text("response_1"), row.text("response_2")]
            yield from judged(source, row, turns_of(row.text("prompt")), answers, row.number_of("preference_strength"))
        elif waiting is None or rated(waiting)[0] != rated(row)[0]:
            rated(row)                                                      # raises if a field is missing
            if waiting:
                source.skip("rated answers without a second one to the same prompt", waiting)
            waiting = row
        else:
            (prompt, first, x), (_, second, y) = rated(waiting), rated(row)
            preference = None if x is None or y is None else float((y > x) - (y < x))
            yield from judged(source, row, turns_of(prompt), [first, second], preference)
            waiting = None
    if waiting:
        source.skip("rated answers without a second one to the same prompt", waiting)
