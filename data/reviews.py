"""Movie against book reviews: `python -m data.reviews --preset quick --data-folder FOLDER`.

Prompts are the first tokens of movie and of book reviews (texts/movies.py, texts/books.py), half each. Judges of movies
follow another reward than judges of books (preset["domains"]), so a gate can learn a pair's type from its prompt.
Evaluation prompts come in sets:

    held out      movie and book prompts of reviews that are used for nothing else
    crossed       movie reviews that mention books, and book reviews that mention films: the prompt begins with the
                  first sentence that has a word of the other domain (WORDS) among its first tokens
    other         electronics and kitchen, domains without training data

Reviews are sorted by a hash of seed and text. No text is used twice. The judge of sentiment is fitted on the remaining
labelled reviews of both domains.
"""

import hashlib
import re
from pathlib import Path

from data.annotators.sentiment import describe_judge, fit_sentiment, use_distilbert
from data.experiment.presets import REVIEWS
from data.experiment.simulated import FILES, DataSet, main, prompt_of
from data.experiment.stages import write_lines
from data.texts.books import OWN as OWN_BOOKS
from data.texts.books import load_products
from data.texts.movies import ARCHIVE, OWN, Review, load_reviews
from mixdpo.config import InputError, command, to_json, write_text

FILM = "film films movie movies cinema screen screenplay hollywood actor actors actress oscar".split()
BOOK = "book books novel novels author authors chapter chapters paperback pages".split()
WORDS = {"movie": BOOK, "book": FILM}                                       # words of the other domain
OTHER = ("electronics", "kitchen")


def crossing(text: str, words: list[str], tokenizer) -> str | None:
    """The prompt that begins with the first sentence of `text` with one of `words`; None if the prompt has no such
    word.
    """
    wanted = re.compile(rf"\b({'|'.join(words)})\b", re.IGNORECASE)
    for found in re.finditer(r"(?:^|(?<=[.!?] ))\S", text):
        sentence = re.split(r"(?<=[.!?]) ", text[found.start() :], maxsplit=1)[0]
        if wanted.search(sentence):
            prompt = prompt_of(text[found.start() :], tokenizer)
            return prompt if prompt and wanted.search(prompt) else None
    return None


def divide(domain: str, reviews: list[Review], preset: dict, tokenizer) -> tuple[dict[str, list[str]], list[Review]]:
    """Disjoint shares of one domain, "heldout", "train", "evaluate", "crossed" (prompts) and "reviews" (texts); and the
    other reviews. Raises: InputError if there are too few reviews."""
    free = sorted(reviews, key=lambda r: hashlib.sha256(f"{preset['seed']}:{r.text}".encode()).digest())
    other = preset["apart"]                                                 # prompts in each set that is not held out
    wanted = {"crossed": other, "heldout": preset["heldout"] // 2, "train": preset["prompts"] // 2,
              "evaluate": (preset["evaluate"] - 4 * other) // 2, "reviews": preset["reviews"] // 2}
    taken = {name: [] for name in wanted}
    for name, count in wanted.items():
        rest = []
        for review in free:
            text = None
            if len(taken[name]) < count:
                text = (review.text if name == "reviews" else crossing(review.text, WORDS[domain], tokenizer)
                        if name == "crossed" else prompt_of(review.text, tokenizer))
            if text:
                taken[name].append(text)
            else:
                rest.append(review)
        free = rest
        if len(taken[name]) < count:
            raise InputError(f"{len(reviews)} {domain} reviews give {len(taken[name])} for {name}; wanted {count}; "
                             "choose a smaller preset, or get more reviews", option="preset")
    return taken, free


def split(job: Path, preset: dict, tokenizer, distilbert: str | None, data: str | None) -> str:
    """Writes reviews.jsonl, the files of prompts, evaluate.jsonl, the judge of sentiment and split.json. Returns a
    summary."""
    movies, counts = load_reviews(data)
    products, counts_of_products = load_products(data)
    parts, rest = {}, []
    for domain, reviews in (("movie", movies), ("book", products["books"])):
        parts[domain], left = divide(domain, reviews, preset, tokenizer)
        rest.append([r for r in left if r.label is not None])
    for name, file in FILES.items():
        write_lines(job / file, mixed({d: parts[d][name] for d in parts}))
    found = {d: [prompt_of(r.text, tokenizer) for r in products.get(d, [])] for d in OTHER}
    other = {d: [prompt for prompt in prompts if prompt][: preset["apart"]] for d, prompts in found.items()}
    held, crossed = ({d: parts[d][name] for d in parts} for name in ("evaluate", "crossed"))
    prompts = [*mixed(held, "held out"), *mixed(crossed, "crossed"), *mixed(other, "other")]
    write_lines(job / "evaluate.jsonl", prompts)
    texts = mixed({d: parts[d]["reviews"] for d in parts})
    write_lines(job / "reviews.jsonl", ({"text": row["prompt"]} for row in texts))
    fitted = [(r.text, r.label) for r in [*rest[1], *rest[0]]][: preset["judge_reviews"]]
    judge = use_distilbert(job, distilbert) if distilbert else fit_sentiment(fitted, job, preset["seed"])
    missing = [d for d in OTHER if not other[d]]
    facts = {"texts": {"movie": counts, "products": counts_of_products}, "judge_of_sentiment": judge,
             "taken": {d: {name: len(rows) for name, rows in shares.items()} for d, shares in parts.items()},
             "domains_left_out": missing}
    if missing:
        print(f"warning: {counts_of_products['source']} has no reviews of {' and '.join(missing)}, so the evaluation "
              f"leaves these domains out; put {OWN_BOOKS[0]} into the data folder")
    write_text(job / "split.json", to_json(facts, indent=1) + "\n")
    return (f"{preset['prompts']} train, {preset['heldout']} held-out and {len(prompts)} evaluation prompts, "
            f"{len(texts)} reviews for fine-tuning; {describe_judge(judge)}")


def mixed(of: dict[str, list[str]], part: str = "") -> list[dict]:
    """Lines {"prompt", "domain"} of the domains in turn; with part also "set"."""
    rows = [(n, {"prompt": prompt, "domain": domain} | ({"set": part} if part else {}))
            for domain, prompts in of.items() for n, prompt in enumerate(prompts)]
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


DATASET = DataSet("reviews", REVIEWS, (OWN, ARCHIVE, *OWN_BOOKS),
                  ("seed", "prompts", "heldout", "evaluate", "apart", "reviews", "judge_reviews"), split,
                  "evaluate.jsonl")

if __name__ == "__main__":
    command(main, DATASET)
