"""IMDb: `python -m data.imdb --preset quick` on movie reviews (experiment/simulated.py, texts/movies.py).

Reviews for fine-tuning, train prompts and held-out prompts are disjoint by text. The judge of sentiment is fitted on
labelled reviews that are not used for prompts. If fewer than 5,000 of them are left, reviews of train prompts are
added, but never reviews of held-out prompts.
"""

import hashlib
from pathlib import Path

from data.annotators.sentiment import describe_judge, fit_sentiment, use_distilbert
from data.experiment.presets import IMDB
from data.experiment.simulated import FILES, DataSet, main, prompt_of
from data.experiment.stages import write_lines
from data.texts.movies import ARCHIVE, OWN, Review, load_reviews
from mixdpo.config import command, to_json, write_text

JUDGE_LEAST = 5000  # labelled reviews that the judge of sentiment needs to reach its accuracy


def divide(reviews: list[Review], preset: dict, tokenizer) -> tuple[dict[str, list[tuple]], list[Review], float]:
    """Disjoint shares "heldout", "train", "reviews": [(review, prompt or None)]; the other reviews; the scale of the
    shares.

    Reviews are sorted by a hash of seed and text, so the order of the source does not matter. Held-out prompts come
    from the test split, train prompts from the train split, texts for fine-tuning from reviews without a label, as long
    as there are enough. If all reviews are too few, every share is scaled down by the same factor.
    """
    place = {r.text: hashlib.sha256(f"{preset['seed']}:{r.text}".encode()).digest() for r in reviews}
    free = sorted(reviews, key=lambda r: place[r.text])
    wanted = {"heldout": preset["heldout"], "train": preset["prompts"], "reviews": preset["reviews"]}
    first = {"heldout": "test", "train": "train", "reviews": "unsup"}
    scale, taken = min(1.0, 0.97 * len(free) / sum(wanted.values())), {}     # some reviews are too short for a prompt
    for name, count in wanted.items():
        free.sort(key=lambda r: r.split != first[name])                     # stable sort
        taken[name], looked_at = [], 0
        while len(taken[name]) < int(scale * count) and looked_at < len(free):
            review = free[looked_at]
            prompt = None if name == "reviews" else prompt_of(review.text, tokenizer)
            if prompt or name == "reviews":
                taken[name].append((review, prompt))
            looked_at += 1
        free = free[looked_at:]
    return taken, sorted(free, key=lambda r: (r.split != "train", place[r.text])), scale


def split(job: Path, preset: dict, tokenizer, distilbert: str | None, data: str | None) -> str:
    """Writes reviews.jsonl, the two files of prompts, the judge of sentiment and split.json. Returns a summary."""
    reviews, counts = load_reviews(data)
    taken, rest, scale = divide(reviews, preset, tokenizer)
    if scale < 1:
        print(f"warning: {len(reviews)} reviews are fewer than the preset needs, so shares are scaled by {scale:.3f}; "
              f"choose a smaller preset, or put {ARCHIVE} into a folder and give DATA=FOLDER")
    for name, file in FILES.items():
        write_lines(job / file, ({"prompt": prompt} for _, prompt in taken[name]))
    write_lines(job / "reviews.jsonl", ({"text": review.text} for review, _ in taken["reviews"]))
    labelled = [r for r in [*rest, *(r for r, _ in taken["reviews"])] if r.label is not None]
    disjoint = len(labelled) >= JUDGE_LEAST
    if not disjoint:
        labelled += [r for r, _ in taken["train"] if r.label is not None]
    fitted = [(r.text, r.label) for r in labelled[: preset["judge_reviews"]]]
    judge = use_distilbert(job, distilbert) if distilbert else fit_sentiment(fitted, job, preset["seed"])
    facts = {"texts": counts, "taken": {name: len(rows) for name, rows in taken.items()}, "scale_of_shares": scale}
    facts |= {"judge_of_sentiment": judge, "judge_reviews_disjoint_from_prompts": disjoint or bool(distilbert)}
    write_text(job / "split.json", to_json(facts, indent=1) + "\n")
    sizes = {name: len(rows) for name, rows in taken.items()}
    return (f"{sizes['train']} train and {sizes['heldout']} held-out prompts, {sizes['reviews']} texts for fine-tuning"
            f"; {describe_judge(judge)}")


DATASET = DataSet("imdb", IMDB, (OWN, ARCHIVE), ("seed", "prompts", "heldout", "reviews", "judge_reviews"), split)

if __name__ == "__main__":
    command(main, DATASET)
