"""Annotators: scores computed by hand, and the judge of sentiment on reviews whose opinion is known."""

import json
import shutil

import numpy as np
import pytest
from raising import raises_at

from data.annotators import rewards
from data.annotators.rewards import checks, grammar, informativeness, parser, score
from data.annotators.sentiment import NEEDED, fit_sentiment, piece, read_judge, sentiment, write_judge
from mixdpo.config import InputError

spacy = pytest.importorskip("spacy", reason="spaCy is not installed (the `data` extra)")
pytest.importorskip("sklearn", reason="scikit-learn is not installed (the `data` extra)")
if not any(map(spacy.util.is_package, rewards.SPACY_MODELS)):
    pytest.skip("spaCy's small English model is not installed (the `data` extra)", allow_module_level=True)


# ---- informativeness


@pytest.mark.parametrize("text, points, words", [
    ("It was a good film.", 2, 5),                              # good, film
    ("Bogart loved Bergman in Casablanca.", 7, 5),              # three names at 2, loved
    ("A good film, a good film.", 2, 6),                        # the second time says nothing new
    ("The film has films.", 1, 4),                              # by lemma, not by form; "has" is a stop word
    ("It ran 97 minutes.", 5, 4),                               # ran; the numeral and its unit are one entity (TIME)
    ("It was what it was.", 0, 5),
    ("!!! ...", 0, 0),
])
def test_informativeness_by_hand(text, points, words):
    """Caught: stop words or punctuation counted, repetition rewarded, forms for lemmas, names at one point, 0 / 0."""
    assert informativeness(parser()(text)) == pytest.approx(min(1, points / words) if words else 0)


def test_a_word_is_news_again_after_twenty_others():
    """Caught: a window one word longer or shorter, or none."""
    filler = " ".join(["it was of"] * 6)                        # 18 stop words
    texts = [f"Film {filler}{more} film." for more in ("", " it", " it it")]
    assert [round(informativeness(parser()(t)) * len(t.split())) for t in texts] == [1, 1, 2]


def test_informativeness_does_not_grow_with_length():
    """Caught: points not divided by words, or divided by sentences."""
    dense, thin = "Bogart loved Bergman in Casablanca.", "It was what it was and that is that, as it is."
    a, b, both = (informativeness(parser()(text)) for text in (dense, thin, f"{thin} {dense}"))
    assert b < both < a
    assert informativeness(parser()(" ".join([dense] * 5))) <= a


# ---- grammar


@pytest.mark.parametrize("good, bad, check", [
    ("They are here.", "they are here.", 1),
    ("They are here.", "They are here", 2),
    ('She said "yes (no)."', 'She said "yes (no)" and', 2),
    ("She is watching it.", "She watching it.", 3),
    ("Do not watch it!", "Not the film, again.", 3),
    ("It was a waste of time.", "Was a waste of time.", 4),
    ("They are here.", "They is here.", 5),
    ("She has seen it.", "She have seen it.", 5),
    ("The films were long and the actor is dull.", "The films was long and the actor are dull.", 5),
    ("It was very very good.", "It was was good.", 6),
    ("It was good (and short).", "It was good (and short.", 7),
    ('It was "good".', 'It was "good.', 7),
    ("It was good, and short.", "It was good , and short.", 8),
    ("It was good, and short.", "It was good,and short.", 8),
])
def test_each_check_tells_a_sentence_from_its_faulty_twin(good, bad, check):
    """Caught: each check in turn made always true; each made always false."""
    def failed(text):
        (sentence,) = parser()(text).sents
        return [n for n, passed in enumerate(checks(sentence), 1) if not passed]

    assert failed(good) == []
    assert check in failed(bad)


@pytest.mark.parametrize("text, value", [
    ("They are here.", 1), ("They is here.", 1 / 2), ("a film film", 1 / 32), ("They are here. a film film", 33 / 64),
    ("It was a good film and we like it. a film film", (9 + 3 / 32) / 12), ("Do watch it!", 1),
    ("A lot of films are long.", 1), ("He and she run.", 1), ("...", 0), ("", 0),
])
def test_grammar_by_hand(text, value):
    """Caught: sentences weighted alike whatever their length, a share of checks for halving, "a lot are" refused."""
    assert grammar(parser()(text)) == pytest.approx(value)


def test_scores_order_as_they_should():
    """Caught: a score's sign."""
    folder = None                                               # these two need no judge
    informed = score(["In 1942 Humphrey Bogart ran a nightclub.", "It was good.", "It was what it was."],
                     ["informativeness"], folder)["informativeness"]
    correct = score(["He walks to the store.", "He walk to the store.", "walk he to store the store store"],
                    ["grammar"], folder)["grammar"]
    assert informed == sorted(informed, reverse=True) and correct == sorted(correct, reverse=True)
    assert len(set(informed)) == len(set(correct)) == 3
    assert all(0 <= value <= 1 for value in informed + correct)


def test_score_keeps_the_order_of_names_and_of_texts(tmp_path):
    """Caught: columns named by the order of computation; texts sorted for speed and not put back; unknown names."""
    write_judge(tmp_path, {"kind": "bag"})
    texts = ["They is here.", "They are here.", "Bogart loved Bergman."]
    got = score(texts, ["grammar", "informativeness"], tmp_path)
    assert list(got) == ["grammar", "informativeness"]
    assert got["grammar"] == [0.5, 1.0, 1.0] and got["informativeness"] == [0.0, 0.0, 1.0]
    with raises_at("'humour'", "sentiment", "informativeness", "grammar", option="judge"):
        score(texts, ["grammar", "humour"], tmp_path)


def test_many_texts_score_the_same_over_several_processes():
    """Caught: results of several processes out of order."""
    texts = ["They is here.", "They are here.", "Bogart loved Bergman."] * 50
    spread = [grammar(doc) for doc in rewards.parsed(texts, processes_from=1)]
    assert spread == [0.5, 1.0, 1.0] * 50


# ---- sentiment


def reviews(count, seed=0, noise=0.03):
    """Reviews of 60 words: four tell the opinion, the others are the same on both sides; a few labels are wrong."""
    rng = np.random.default_rng(seed)
    words = {1: ["superb", "moving", "delight"], 0: ["awful", "boring", "waste"]}
    plain, out = [f"word{i}" for i in range(40)], []
    for n in range(count):
        label = n % 2
        text = [*rng.choice(plain, 56), *rng.choice(words[label], 4)]
        out.append((" ".join(rng.permutation(text)), label if rng.random() > noise else 1 - label))
    return out


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    return folder, fit_sentiment(reviews(2400), folder)


def test_sentiment_is_the_probability_of_positive(judge):
    """Caught: labels swapped, the logit returned, slope or offset forgotten in the sigmoid (reports would differ)."""
    folder, report = judge
    high, low = sentiment(["a superb and moving film", "a boring and awful film"], folder)
    assert 0 <= low < 0.2 < 0.8 < high <= 1
    fresh = reviews(400, seed=7, noise=0)
    rng = np.random.default_rng(0)
    p = np.array(sentiment([piece(text, 25, rng) for text, _ in fresh], folder))
    truth = np.array([label for _, label in fresh])
    assert np.mean((p > 0.5) == truth) > 0.8
    assert report["accuracy_whole"] >= NEEDED and report["reviews_fitted"] == 2100


def test_slope_and_offset_are_used(judge, tmp_path):
    """Caught: the sigmoid of the raw logit; slope or offset left out, or the offset's sign turned."""
    folder, report = judge
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    write_judge(tmp_path, report | {"slope": 2 * report["slope"], "offset": report["offset"] - 1})
    texts = ["a superb film", "a boring film that was moving", "a film"]
    before, after = (np.array(sentiment(texts, place)) for place in (folder, tmp_path))
    raw, new = np.log(before / (1 - before)) - report["offset"], np.log(after / (1 - after))
    assert new == pytest.approx(2 * raw + report["offset"] - 1, abs=1e-6)


def test_probabilities_are_calibrated(judge):
    """Caught: certainty that the truth does not bear out, as without Platt's fit."""
    folder, _ = judge
    fresh, rng = reviews(3000, seed=8), np.random.default_rng(1)
    p = np.array(sentiment([piece(text, 50, rng) for text, _ in fresh], folder))
    truth = np.array([label for _, label in fresh])
    for low, high in ((0, 0.3), (0.7, 1)):
        inside = (p >= low) & (p <= high)
        assert inside.sum() > 200
        assert abs(p[inside].mean() - truth[inside].mean()) < 0.08


def test_a_judge_no_better_than_chance_is_refused_and_not_written(tmp_path):
    """Caught: accuracy measured on the reviews it was fitted on (which it knows by heart), or not looked at."""
    own_words = [" ".join(f"word{60 * n + i}" for i in range(60)) for n in range(480)]      # easily learnt by heart
    rng = np.random.default_rng(0)
    with raises_at("of 40", NEEDED, option="sentiment"):
        fit_sentiment([(text, int(rng.integers(2))) for text in own_words], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_judge_is_fitted_once_and_again_if_anything_changed(judge, monkeypatch):
    """Caught: a key without the reviews, the labels or the seed; a second fit where the first would do."""
    folder, report = judge
    same = reviews(2400)
    before = (folder / "judge.json").stat().st_mtime_ns
    assert fit_sentiment(same, folder) == report
    assert (folder / "judge.json").stat().st_mtime_ns == before
    monkeypatch.setattr("data.annotators.sentiment.vectors", lambda texts: 1 / 0)
    text, label = same[0]
    for first, seed in ((("x" + text, label), 0), ((text, 1 - label), 0), ((text, label), 1)):
        with pytest.raises(ZeroDivisionError):
            fit_sentiment([first, *same[1:]], folder, seed)


def test_an_interrupted_fit_leaves_no_judge(judge, tmp_path, monkeypatch):
    """Caught: new weights beside an old judge.json, which would vouch for them."""
    fit_sentiment(reviews(800), tmp_path)
    monkeypatch.setattr("data.annotators.sentiment.write_judge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_sentiment(reviews(800, seed=1), tmp_path)
    assert read_judge(tmp_path) is None
    with raises_at("judge.json", file=tmp_path):
        sentiment(["a film"], tmp_path)


def test_what_is_stored_is_numbers_and_json(judge):
    """Caught: a pickled model in the cache."""
    folder, report = judge
    assert sorted(file.name for file in folder.iterdir()) == ["judge.json", "sentiment.safetensors"]
    assert json.loads((folder / "judge.json").read_text()) == report


def test_distilbert_of_a_directory_is_the_probability_of_the_second_class(tmp_path):
    """Caught: the first class read as positive; padding that changes a text's score."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the `peers` extra)")
    import torch

    from data.annotators.sentiment import use_distilbert

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "a", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.DistilBertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=len(words), dim=32, n_layers=1, n_heads=2, hidden_dim=32,
                                           num_labels=2, initializer_range=0.5)
    model = transformers.DistilBertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    use_distilbert(tmp_path, str(tmp_path))
    texts = ["good", "bad film a a a a a a", "film"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        want = [model(**tokenizer(t, return_tensors="pt")).logits.softmax(-1)[0, 1].item() for t in texts]
    assert sentiment(texts, tmp_path) == pytest.approx(want, abs=1e-5)
    assert max(want) - min(want) > 0.01


def test_a_judge_wants_reviews_to_fit_and_to_test(tmp_path):
    """Fault: a traceback for a file of twenty reviews."""
    with pytest.raises(InputError, match="too few"):
        fit_sentiment([(f"review {n}", n % 2) for n in range(20)], tmp_path)
