"""data/texts/books.py, data/reviews.py and data/report/domains.py: what each test catches stands in its docstring."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from raising import raises_at
from test_imdb import save_tiny, write_reviews

from data import reviews
from data.experiment import common, simulated
from data.experiment.presets import REVIEWS
from data.experiment.stages import read_lines
from data.report import domains
from data.report.job import Job, Run
from data.texts.books import load_products
from data.texts.movies import Review
from mixdpo.preferences import read_preferences
from mixdpo.text.tokenizer import load_tokenizer

LINE = {"domain": "books", "label": "pos", "text": "A fine &quot;book&quot;.<br />Read it."}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def write_products(folder, rows, name="amazon_multidomain.jsonl.gz"):
    with gzip.open(folder / name, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


# ---- sources


def test_product_reviews_are_clean_and_stand_once(tmp_path):
    """Caught: entities left in; a text counted twice; labels exchanged; a domain lost."""
    rows = [LINE, LINE, LINE | {"text": "Bad.", "label": "neg"}, LINE | {"domain": "kitchen", "text": "A pan."}]
    found, counts = load_products(write_products(tmp_path, rows))
    assert [(r.text, r.label) for r in found["books"]] == [('A fine "book". Read it.', 1), ("Bad.", 0)]
    assert [r.text for r in found["kitchen"]] == ["A pan."]
    assert counts == {"source": "amazon_multidomain.jsonl.gz", "read": 4, "books": 2, "kitchen": 1}


def test_the_official_archive_of_products_is_read(tmp_path):
    """Caught: the label of the file's name exchanged; a domain named with its tail; reviews of a file run together;
    a cut archive taken."""
    bodies = {"books/positive": "<review>\n<review_text>\nGood.\n</review_text>\n</review>\n"
                                "<review><review_text>Fine.</review_text></review>",
              "books/negative": "<review_text>Dull.</review_text>",
              "kitchen_&_housewares/negative": "<review_text>Rust.</review_text>",
              "books/unlabeled": "<review_text>No.</review_text>"}
    path = tmp_path / "domain_sentiment_data.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, body in bodies.items():
            info = tarfile.TarInfo(f"sorted_data_acl/{name}.review")
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body.encode()))
    found, _ = load_products(tmp_path)
    assert {d: [(r.text, r.label) for r in rows] for d, rows in found.items()} == {
        "books": [("Good.", 1), ("Fine.", 1), ("Dull.", 0)], "kitchen": [("Rust.", 0)]}
    path.write_bytes(path.read_bytes()[:-40])
    with raises_at(file=path):
        load_products(tmp_path)


@pytest.mark.parametrize(("line", "number"), [
    ("{", 1), ('{"domain": "books", "text": "a"}', 1), ('{"domain": "toys", "label": "pos", "text": "a"}', None)])
def test_faulty_product_reviews_are_named(tmp_path, line, number):
    """Caught: a line passed over; another domain taken for books."""
    with gzip.open(tmp_path / "books.jsonl.gz", "wt") as file:
        file.write(line + "\n")
    with raises_at(file=tmp_path / "books.jsonl.gz", line=number):
        load_products(tmp_path)


@pytest.mark.parametrize("data", [None, "FOLDER"])
def test_no_source_says_what_to_do(tmp_path, data):
    """Caught: a missing folder for an empty one; no remedy."""
    with raises_at("domain_sentiment_data.tar.gz", "DATA=FOLDER", file=data and tmp_path):
        load_products(data and str(tmp_path))


# ---- prompts


def test_a_crossing_prompt_begins_with_the_sentence_that_crosses(tiny):
    """Caught: a word within a word; the review's first sentence; a prompt that ends before the word."""
    tokenizer, tail = load_tokenizer(tiny), " " + "word " * 60
    made = reviews.crossing("It bookends. The novel is old. So." + tail, ["book", "novel"], tokenizer)
    assert made.startswith("The novel is")
    for text in ("It bookends here.", "It ebook here."):
        assert reviews.crossing(text + tail, ["book"], tokenizer) is None
    assert reviews.crossing("No. " + "word " * 40 + "and the novel is old." + tail, ["novel"], tokenizer) is None
    assert reviews.crossing("A Book! It is." + tail, ["book"], tokenizer).startswith("A Book")


def texts(words, count, label=None):
    return [Review(f"{words} number {n} is here. " + "word " * 60, "train", n % 2 if label is None else label)
            for n in range(count)]


def test_shares_of_a_domain_are_apart(tiny):
    """Caught: a review in two shares; crossed ones that do not cross; too few taken in silence."""
    preset = {"seed": 0, "prompts": 20, "heldout": 10, "evaluate": 24, "apart": 3, "reviews": 30}
    own, crossed = texts("A tale", 60), texts("The film", 5)
    taken, rest = reviews.divide("book", own + crossed, preset, load_tokenizer(tiny))
    counts = {"crossed": 3, "heldout": 5, "train": 10, "evaluate": 6, "reviews": 15}
    assert {name: len(rows) for name, rows in taken.items()} == counts
    assert all("film" in prompt for prompt in taken["crossed"])
    assert len(rest) == 65 - 39
    with raises_at("book", 2, "crossed", 3, option="preset"):
        reviews.divide("book", own + crossed[:2], preset, load_tokenizer(tiny))


def test_a_whole_tiny_job_of_two_domains(tiny, tmp_path, monkeypatch):
    """Caught: judges of one domain shown the other's pairs; domains lost on the way; evaluation on other prompts."""
    pytest.importorskip("spacy", reason="spaCy is not installed (the `data` extra)")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (the `data` extra)")
    rng, words, data = np.random.default_rng(0), {1: ["superb", "moving"], 0: ["awful", "boring"]}, tmp_path / "data"
    data.mkdir()

    def some(first, count):
        return [f"{first} {n}. " + " ".join([*rng.choice(list("abcdefgh"), 60), *words[n % 2], str(n)])
                for n in range(count)]

    labels = ("neg", "pos")
    movies = [{"split": "train", "label": labels[n % 2], "text": t}
              for n, t in enumerate([*some("m", 300), *some("A book", 4)])]
    products = [{"domain": d, "label": labels[n % 2], "text": t} for d, first, count in (
        ("books", "b", 200), ("books", "A film", 4), ("kitchen", "k", 5)) for n, t in enumerate(some(first, count))]
    write_reviews(data, movies)
    write_products(data, products)
    preset = REVIEWS["smoke"] | {"margin": 0.0, "max_response": 24, "users": 2, "prompts": 40, "heldout": 20,
                                 "finetune": {"steps": 1, "batch": 2, "tokens": 32, "held": 4}}
    monkeypatch.setitem(REVIEWS, "tiny", preset)
    trained, evaluated = [], []
    monkeypatch.setattr(common, "run", trained.append)
    monkeypatch.setattr(common, "evaluate", evaluated.append)
    job = tmp_path / "job"
    flags = {"--preset": "tiny", "--model": tiny, "--out": job, "--data-folder": data}
    simulated.main(reviews.DATASET, [str(word) for flag in flags.items() for word in flag])
    for name, each in (("train", 5), ("heldout", 3)):
        pairs = read_preferences(job / f"{name}.jsonl", load_tokenizer(tiny), 16, 24)
        assert len(pairs) == 2 * each
        assert {(p.domain, p.annotator) for p in pairs} == {("movie", "informativeness"), ("book", "sentiment")}
        of = {row["prompt"]: row["domain"]
              for file in ("prompts-train.jsonl", "prompts.jsonl") for row in read_lines(job / file)}
        assert all(of[row["prompt"]] == row["domain"] for row in read_lines(job / f"{name}.jsonl"))
    asked = [(row["domain"], row["set"]) for row in read_lines(job / "evaluate.jsonl")]
    both = [[("movie", part), ("book", part)] * 2 for part in ("held out", "crossed")]
    assert asked == [*both[0], *both[1], *[("kitchen", "other")] * 2]
    assert json.loads((job / "split.json").read_text())["domains_left_out"] == ["electronics"]
    facts = json.loads((job / "dataset.json").read_text())
    assert facts["domains"] == {"movie": ["informativeness"], "book": ["sentiment"]}
    assert [c.gate for c in trained] == ["fixed", "fixed", "linear", "mlp", "domain", "random", "fixed", "linear"]
    assert [c.sharing for c in trained] == ["lora"] * 7 + ["models"]
    assert evaluated[0].prompts == str(job / "evaluate.jsonl")


# ---- tables


@pytest.fixture
def job(tmp_path):
    """Four held-out prompts, two crossed and one of another domain; a sure gate that is wrong on one crossed prompt."""
    held = [("movie", "held out"), ("book", "held out")] * 2
    asked = [{"domain": d, "set": s} for d, s in (*held, ("movie", "crossed"), ("book", "crossed"), ("pan", "other"))]
    w = [[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9], [0.2, 0.8], [0.2, 0.8], [0.5, 0.5]]
    values = [[0.1 * n, 1 - 0.1 * n] for n in range(7)]
    se = {"mean": 0.0, "se": 0.1, "n": 7}
    policies = {name: {"values": values} for name in ("reference", "moe mixture", "moe head 0")}
    policies["moe mixture"]["w"] = w
    of = {"log_likelihood": se, "accuracy_mbt": se, "prompt_of_pair": [0, 0, 1, 2]}
    by_pair = {"moe": [-0.1, -0.2, -0.3, -0.4], "dpo": [-0.2, -0.4, -0.5, -0.3], "random": [-0.9] * 4,
               "random models": [-0.6, -0.2, -0.3, -0.4]}
    preferences = {name: of | {"by_pair": values} for name, values in by_pair.items()}
    dataset = {"rewards": ["sentiment", "informativeness"], "annotators": ["sentiment", "informativeness"],
               "domains": {"movie": ["informativeness"], "book": ["sentiment"]}}
    runs = [Run(name, {"gate": gate, "experts": K, "sharing": sharing}, [], [], [], 0.0)
            for name, gate, K, sharing in (("dpo", "fixed", 1, "heads"), ("moe", "linear", 2, "models"),
                                           ("random", "random", 2, "heads"), ("random models", "random", 2, "models"))]
    return Job(tmp_path, {"policies": policies, "preferences": preferences, "asked": asked}, dataset, [], {}, {}, runs)


def cells(text):
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("| ")]
    return rows[0], {row[0]: row[1:] for row in rows[2:]}


def test_rewards_by_domain_are_those_its_judges_follow(job):
    """Caught: the other domain's reward; prompts of another set; heads among the policies."""
    head, rows = cells(domains.rewards_by_domain(job))
    assert head[1:] == ["movie, held out: informativeness", "book, held out: sentiment",
                        "movie, crossed: informativeness", "book, crossed: sentiment",
                        "pan, other: sentiment, informativeness"]
    assert set(rows) == {"reference", "moe mixture"}
    assert [float(cell.split()[0]) for cell in rows["reference"]] == pytest.approx([0.9, 0.2, 0.6, 0.5, 0.5])


def test_gates_are_named_by_held_out_prompts(job):
    """Caught: names by the set itself, which would hide that a set is crossed; entropy in bits; information of all."""
    _, rows = cells(domains.gates(job))
    sure = -0.9 * np.log(0.9) - 0.1 * np.log(0.1)
    assert rows["moe"][:3] == ["linear", f"{np.log(2) - sure:.3f}", "2.00"]
    assert [cell.split(",")[0] for cell in rows["moe"][3:]] == ["1.00", "1.00", "0.00", "1.00", "0.69"]
    assert rows["moe"][3] == f"1.00, {sure:.2f}"
    job.results["asked"] += [{"domain": "movie", "set": "crossed"}] * 9
    w = np.array(job.results["policies"]["moe mixture"]["w"] + [[0.2, 0.8]] * 9)
    assert domains.names_of(job, w) == {0: "movie", 1: "book"}


def test_runs_are_compared_pair_by_pair_in_clusters(job):
    """Caught: unpaired errors; the sign; pairs for prompts; the random gate on another kind of experts."""
    _, rows = cells(domains.likelihoods(job))
    gap = np.array([0.1, 0.2, 0.2, -0.1])
    sums = np.array([(gap - gap.mean())[:2].sum(), (gap - gap.mean())[2], (gap - gap.mean())[3]]) / 4
    assert rows["moe"][2] == f"{gap.mean():+.4f} ± {np.sqrt(1.5 * (sums**2).sum()):.4f}" and rows["dpo"][2] == "–"
    assert rows["moe"][4].startswith("+0.1250") and rows["dpo"][4].startswith("+0.5500")
    assert rows["random models"][4] == "–" and rows["random"][4] == "–"


def test_pictures_of_gates_are_drawn(job):
    """Caught: a picture that needs states where there are none; sets mixed up."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the `plots` extra)")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (the `data` extra)")
    from safetensors.torch import save_file

    from data.report import pictures

    figure = pictures.gate_weights(job)["gate"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][2:4] == ["movie, crossed", "book, crossed"]
    dots = figure.axes[0].lines[0]
    assert np.allclose(dots.get_xdata(), [0.9, 0.9])
    assert pictures.prompt_features(job) == {}
    job.runs[1].config["gate_features"] = "mean"
    states = torch.randn(7, 2, 6, generator=torch.Generator().manual_seed(0))
    save_file({"states": states}, job.home / "prompt-states.safetensors")
    assert len(pictures.prompt_features(job)["prompts"].axes) == 4 + 2
