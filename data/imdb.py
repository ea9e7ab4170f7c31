"""IMDb: `python -m data.imdb --preset quick` on movie reviews (experiment/simulated.py, texts/movies.py).

No review serves twice: those of the supervised step, of train prompts and of held-out prompts are apart by their text.
The judge of sentiment is fitted on labelled reviews that give no prompt; should there be fewer than 5,000 of them, on
those of the train prompts too, never on those of held-out prompts.
"""

import hashlib
from pathlib import Path

from data.annotators.sentiment import fit_sentiment, use_distilbert
from data.experiment.presets import IMDB
from data.experiment.simulated import FILES, DataSet, main, prompt_of
from data.experiment.stages import write_lines
from data.texts.movies import ARCHIVE, OWN, Review, load_reviews
from mixdpo.config import command, to_json

JUDGE_LEAST = 5000  # labelled reviews that the judge of sentiment needs to reach its accuracy


def divide(reviews: list[Review], preset: dict, tokenizer) -> tuple[dict[str, list[tuple]], list[Review], float]:
    """Disjoint shares "heldout", "train", "reviews": [(review, prompt or None)]; the reviews left; the share kept.

    Reviews stand in the order of a hash of seed and text, which no source can change. Held-out prompts come from the
    test split, train prompts from the train split, the supervised step's texts from those without a label, while they
    last. Are there too few reviews in all, every share shrinks alike.
    """
    place = {r.text: hashlib.sha256(f"{preset['seed']}:{r.text}".encode()).digest() for r in reviews}
    free = sorted(reviews, key=lambda r: place[r.text])
    wanted = {"heldout": preset["heldout"], "train": preset["prompts"], "reviews": preset["reviews"]}
    first = {"heldout": "test", "train": "train", "reviews": "unsup"}
    kept, taken = min(1.0, 0.97 * len(free) / sum(wanted.values())), {}     # some reviews are too short for a prompt
    for name, count in wanted.items():
        free.sort(key=lambda r: r.split != first[name])                     # stable: within, the order stays
        taken[name], looked_at = [], 0
        while len(taken[name]) < int(kept * count) and looked_at < len(free):
            review = free[looked_at]
            prompt = None if name == "reviews" else prompt_of(review.text, tokenizer)
            if prompt or name == "reviews":
                taken[name].append((review, prompt))
            looked_at += 1
        free = free[looked_at:]
    return taken, sorted(free, key=lambda r: (r.split != "train", place[r.text])), kept


def split(job: Path, preset: dict, tokenizer, distilbert: str | None, data: str | None) -> None:
    """Writes reviews.jsonl, the two files of prompts, the judge of sentiment, and what there was into split.json."""
    reviews, counts = load_reviews(data)
    taken, rest, kept = divide(reviews, preset, tokenizer)
    if kept < 1:
        print(f"{len(reviews)} reviews are fewer than the preset asks for: every share is {kept:.3f} of what it asks")
    for name, file in FILES.items():
        write_lines(job / file, ({"prompt": prompt} for _, prompt in taken[name]))
    write_lines(job / "reviews.jsonl", ({"text": review.text} for review, _ in taken["reviews"]))
    labelled = [r for r in [*rest, *(r for r, _ in taken["reviews"])] if r.label is not None]
    apart = len(labelled) >= JUDGE_LEAST
    if not apart:
        labelled += [r for r, _ in taken["train"] if r.label is not None]
    fitted = [(r.text, r.label) for r in labelled[: preset["judge_reviews"]]]
    judge = use_distilbert(job, distilbert) if distilbert else fit_sentiment(fitted, job, preset["seed"])
    facts = {"texts": counts, "taken": {name: len(rows) for name, rows in taken.items()}, "share_of_asked": kept}
    facts |= {"judge_of_sentiment": judge, "its_reviews_are_apart_from_all_prompts": apart or bool(distilbert)}
    (job / "split.json").write_text(to_json(facts, indent=1) + "\n")
    print(to_json(facts))


DATASET = DataSet("imdb", IMDB, (OWN, ARCHIVE), ("seed", "prompts", "heldout", "reviews", "judge_reviews"), split)

if __name__ == "__main__":
    command(main, DATASET)
