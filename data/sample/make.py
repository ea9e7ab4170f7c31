"""Writes data/sample/ultrafeedback.jsonl: rows in the format of openbmb/UltraFeedback in which the four ratings differ:
`python -m data.sample.make`.

Each question has a right and a wrong answer, and asks for a form. Each of its four completions either does or does not
keep the form, give the right answer, admit uncertainty, and add a useful fact. The four ratings follow: 4 or 5 for yes,
1 or 2 for no. All texts were written for this file, and are not meant for real training.
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("ultrafeedback.jsonl")
ROWS, SEED = 120, 0
FACTS = [  # question, right, wrong, something of use
    ("What is the capital of France?", "Paris", "Lyon", "It lies on the Seine."),
    ("How many legs does a spider have?", "eight", "six", "Insects are the ones with six."),
    ("Which planet is nearest to the sun?", "Mercury", "Venus", "A year there lasts 88 days."),
    ("At how many degrees Celsius does water boil at sea level?", "100", "90", "Higher up it boils earlier."),
    ("Who wrote Hamlet?", "Shakespeare", "Marlowe", "It was first printed in 1603."),
    ("How many minutes are there in two hours?", "120", "100", "Multiply the hours by sixty."),
    ("What gas do plants take in to make sugar?", "carbon dioxide", "nitrogen", "They give off oxygen."),
    ("Which ocean is the largest?", "the Pacific", "the Atlantic", "It covers a third of the globe."),
    ("What is seven times eight?", "56", "54", "Seven times seven is 49; add seven."),
    ("Which metal is liquid at room temperature?", "mercury", "tin", "Old thermometers are filled with it."),
    ("In which country is Kyoto?", "Japan", "China", "It was the capital for a thousand years."),
    ("How many strings does a violin have?", "four", "five", "They are tuned in fifths."),
    ("What do bees make?", "honey", "silk", "A jar takes millions of flowers."),
    ("Which is heavier, a litre of water or a litre of oil?", "water", "oil", "That is why oil floats."),
    ("What is the square root of 81?", "9", "8", "Nine times nine gives it back."),
]
FORMS = [("Answer in capital letters.", str.upper), ("End with three exclamation marks.", lambda text: text + "!!!"),
         ("Begin with the word Well.", lambda text: "Well, " + text)]
TYPES = ("instruction_following", "truthfulness", "honesty", "helpfulness")


def completion(fact: tuple, form, does: dict[str, bool], rng) -> dict:
    """One completion with its ratings. does: type -> whether the completion meets that type's criterion."""
    _, right, wrong, more = fact
    text = f"the answer is {right if does['truthfulness'] else wrong}."
    text = "I am not sure, but I think " + text if does["honesty"] else text[0].upper() + text[1:]
    text += f" {more}" if does["helpfulness"] else ""
    ratings = {kind: {"Rating": str(int(rng.integers(4, 6) if does[kind] else rng.integers(1, 3)))} for kind in TYPES}
    return {"model": "made", "response": form(text) if does["instruction_following"] else text, "annotations": ratings}


def rows():
    """Yields the rows; deterministic."""
    rng = np.random.default_rng(SEED)
    for n in range(ROWS):
        fact, (ask, form) = FACTS[n % len(FACTS)], FORMS[n // len(FACTS) % len(FORMS)]
        which = rng.permutation(16)[:4]
        completions = [completion(fact, form, {kind: bool(w >> bit & 1) for bit, kind in enumerate(TYPES)}, rng)
                       for w in which.tolist()]
        yield {"source": "made", "instruction": f"{fact[0]} {ask} ({n})", "models": ["made"] * 4,
               "completions": completions, "correct_answers": ["None"], "incorrect_answers": ["None"]}


if __name__ == "__main__":
    FILE.write_text("".join(json.dumps(row) + "\n" for row in rows()))
