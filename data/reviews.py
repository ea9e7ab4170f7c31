"""Movie against book reviews: `python -m data.reviews --preset quick --data-folder FOLDER`.

Prompts are the first tokens of movie and of book reviews (texts/movies.py, texts/books.py), half each; those who
judge movies go by another reward than those who judge books (preset["domains"]). So the type of a pair can be read off
its prompt, by a gate that learns to. Evaluation prompts come in sets:

    held out      movie and book prompts of reviews that serve nothing else
    crossed       movie reviews that speak of books, book reviews that speak of films: the prompt begins with the first
                  sentence that has a word of the other domain (WORDS) among its first tokens
    other         electronics and kitchen, on which nothing was trained

Reviews stand in the order of a hash of seed and text. No text serves twice. The judge of sentiment is fitted on the
labelled ones that are left, of both domains.
"""

import hashlib
import re
from pathlib import Path

from data.annotators.sentiment import fit_sentiment, use_distilbert
from data.experiment.presets import REVIEWS
from data.experiment.simulated import FILES, DataSet, main, prompt_of
from data.experiment.stages import write_lines
from data.texts.books import OWN as OWN_BOOKS
from data.texts.books import load_products
from data.texts.movies import ARCHIVE, OWN, Review, load_reviews
from mixdpo.config import InputError, command, to_json

FILM = "film films movie movies cinema screen screenplay hollywood actor actors actress oscar".split()
BOOK = "book books novel novels author authors chapter chapters paperback pages".split()
WORDS = {"movie": BOOK, "book": FILM}                                       # of the other domain
OTHER = ("electronics", "kitchen")


def crossing(text: str, words: list[str], tokenizer) -> str | None:
    """The prompt that begins with the first sentence of `text` that has one of `words`, and has it; else None."""
    wanted = re.compile(rf"\b({'|'.join(words)})\b", re.IGNORECASE)
    for found in re.finditer(r"(?:^|(?<=[.!?] ))\S", text):
        sentence = re.split(r"(?<=[.!?]) ", text[found.start() :], maxsplit=1)[0]
        if wanted.search(sentence):
            prompt = prompt_of(text[found.start() :], tokenizer)
            return prompt if prompt and wanted.search(prompt) else None
    return None


def divide(domain: str, reviews: list[Review], preset: dict, tokenizer) -> tuple[dict[str, list[str]], list[Review]]:
    """Disjoint shares of one domain: "heldout", "train", "evaluate" and "crossed" (prompts), "reviews" (texts); and the
    reviews left. Raises: InputError if they are too few."""
    free = sorted(reviews, key=lambda r: hashlib.sha256(f"{preset['seed']}:{r.text}".encode()).digest())
    apart = preset["apart"]
    wanted = {"crossed": apart, "heldout": preset["heldout"] // 2, "train": preset["prompts"] // 2,
              "evaluate": (preset["evaluate"] - 4 * apart) // 2, "reviews": preset["reviews"] // 2}
    taken = {name: [] for name in wanted}
    for name, count in wanted.items():
        rest = []
        for review in free:
            made = None
            if len(taken[name]) < count:
                made = (review.text if name == "reviews" else crossing(review.text, WORDS[domain], tokenizer)
                        if name == "crossed" else prompt_of(review.text, tokenizer))
            if made:
                taken[name].append(made)
            else:
                rest.append(review)
        free = rest
        if len(taken[name]) < count:
            raise InputError(f"{len(reviews)} {domain} reviews give {len(taken[name])} for {name}, wanted {count}; "
                             "choose a smaller preset, or get more reviews", option="preset")
    return taken, free


def split(job: Path, preset: dict, tokenizer, distilbert: str | None, data: str | None) -> None:
    """Writes reviews.jsonl, the two files of prompts, evaluate.jsonl, the judge of sentiment, and split.json."""
    movies, counts = load_reviews(data)
    products, counts_of_products = load_products(data)
    parts, rest = {}, []
    for domain, reviews in (("movie", movies), ("book", products["books"])):
        parts[domain], left = divide(domain, reviews, preset, tokenizer)
        rest.append([r for r in left if r.label is not None])
    for name, file in FILES.items():
        write_lines(job / file, mixed({d: parts[d][name] for d in parts}))
    made = {d: [prompt_of(r.text, tokenizer) for r in products.get(d, [])] for d in OTHER}
    other = {d: [prompt for prompt in prompts if prompt][: preset["apart"]] for d, prompts in made.items()}
    held, crossed = ({d: parts[d][name] for d in parts} for name in ("evaluate", "crossed"))
    asked = [*mixed(held, "held out"), *mixed(crossed, "crossed"), *mixed(other, "other")]
    write_lines(job / "evaluate.jsonl", asked)
    texts = mixed({d: parts[d]["reviews"] for d in parts})
    write_lines(job / "reviews.jsonl", ({"text": row["prompt"]} for row in texts))
    fitted = [(r.text, r.label) for r in [*rest[1], *rest[0]]][: preset["judge_reviews"]]
    judge = use_distilbert(job, distilbert) if distilbert else fit_sentiment(fitted, job, preset["seed"])
    missing = [d for d in OTHER if not other[d]]
    facts = {"texts": {"movie": counts, "products": counts_of_products}, "judge_of_sentiment": judge,
             "taken": {d: {name: len(rows) for name, rows in shares.items()} for d, shares in parts.items()},
             "domains_left_out": missing}
    if missing:
        print(f"no reviews of {' and '.join(missing)} in {counts_of_products['source']}: these tests are left out")
    (job / "split.json").write_text(to_json(facts, indent=1) + "\n")
    print(to_json(facts))


def mixed(of: dict[str, list[str]], part: str = "") -> list[dict]:
    """{"prompt", "domain"} and maybe "set" of each domain by turns, as long as there are any."""
    rows = [(n, {"prompt": prompt, "domain": domain} | ({"set": part} if part else {}))
            for domain, prompts in of.items() for n, prompt in enumerate(prompts)]
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


DATASET = DataSet("reviews", REVIEWS, (OWN, ARCHIVE, *OWN_BOOKS),
                  ("seed", "prompts", "heldout", "evaluate", "apart", "reviews", "judge_reviews"), split,
                  "evaluate.jsonl")

if __name__ == "__main__":
    command(main, DATASET)
