"""Community Alignment: one annotator's conversation of up to four turns a row; each turn is the choice of the best of
four answers, with which the conversation continues.

Licence: CC-BY-4.0.

Citation: Zhang, Milli, Jusko, Smith, Amos et al. (2025), Cultivating Pluralism In Algorithmic Monoculture: The
Community Alignment Dataset, arXiv 2507.09650. Source: facebook/community-alignment-dataset on the Hugging Face hub.

Fields that are read, T in first, second, third, fourth and X in a, b, c, d:

    annotator_id                -> user
    assigned_lang               -> domain; the card says that an annotator may have used another language
    T_turn_prompt, T_turn_response_X
    T_turn_preferred_response   "response_a" to "response_d"

The chosen answer is the ranking, and the three others, whose order is not known, are the rest. The prompt of a later
turn is the conversation so far. A cell with "EMPTY STRING" is empty. A token "<|end_of_text|>" at
the end of a text is removed.

Checked in programs that read this set: all names, and "response_a". Not checked in a real row: the cells with "EMPTY
STRING"; one program alone removes "<|end_of_text|>".
"""

from data.convert.source import Row, Source, user_turn

TURNS, LETTERS, END = ("first", "second", "third", "fourth"), "abcd", "<|end_of_text|>"


def cell(source: Source, row: Row, name: str) -> str:
    """The text of a cell without its end token; "" if it is empty."""
    text = row.text(name)
    if text.rstrip().endswith(END):
        source.skip(f"the end token {END} of texts", row)
        text = text.rstrip().removesuffix(END)
    return "" if text.strip() in ("", "EMPTY STRING") else text


def convert(source: Source):
    """Yields the records of all turns of all rows."""
    for row in source.rows():
        user, domain, talk, gap, empty = row.user("annotator_id"), row.text("assigned_lang"), [], False, True
        for turn in TURNS:
            prompt = cell(source, row, f"{turn}_turn_prompt")
            answers = {letter: cell(source, row, f"{turn}_turn_response_{letter}") for letter in LETTERS}
            preferred = cell(source, row, f"{turn}_turn_preferred_response").removeprefix("response_")
            if not (prompt or preferred or any(answers.values())):
                gap = True                                                  # the end, or a missing turn before others
                continue
            empty = False
            if gap:
                source.skip("turns after one that is missing or cannot be followed", row)
                continue
            gap = not prompt or not answers.get(preferred)
            if gap:
                what = "a prompt" if not prompt else "a preferred answer" if preferred in answers else "a choice"
                source.skip(f"turns without {what}", row)
                continue
            talk = [*talk, user_turn(prompt)]
            others = [text for letter, text in answers.items() if letter != preferred]
            if user:
                yield from source.judgement(row, talk, [[answers[preferred]], others], rest=True, user=user,
                                            domain=domain)
            else:
                source.skip("turns without an annotator", row)
            talk = [*talk, {"role": "assistant", "content": answers[preferred]}]
        if empty:
            source.skip("rows without a turn", row)
