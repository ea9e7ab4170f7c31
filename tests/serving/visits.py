"""Visits of the page in Chromium: a tiny trained run, its server, a browser, and what tests do and measure there."""

import contextlib
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import tinyjob
import torch

import train
from mixdpo.logprob import token_logps
from mixdpo.models.weights import load_model, save_model
from mixdpo.preferences import read_preferences
from mixdpo.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [*(f"the package {name}" for name in ("starlette", "uvicorn", "playwright")
             if importlib.util.find_spec(name) is None), *["a Chromium on the PATH"] * (CHROMIUM is None)]
HOSTILE = "<script>window.hit=1</script><img src=x onerror=window.hit=2>"
LABEL = "<b onclick=hit=3>first</b>"
PROMPT, RESPONSE = 12, 10           # tokens of the run's longest texts

# Collects what is written into an answer while it is still being written.
WATCH = """window.seen = {};
new MutationObserver((all) => all.forEach(({target, addedNodes}) => {
  const text = [...addedNodes].map((node) => node.textContent).join("");
  const place = target.nodeType === 1 && target.matches(".text") && target.closest("[data-policy], #spoken");
  if (!place || !text || !target.closest("[aria-busy=true]")) return;
  (window.seen[place.dataset.policy || "spoken"] ??= []).push(text);
})).observe(document, {subtree: true, childList: true});"""

# The names of all controls that Tab should reach, "token" among them, and of the one that has the focus with the style
# of its outline.
NAME = "(one) => one.matches('.tok') ? 'token' : one.id || one.textContent || one.value"
CONTROLS = f"""() => [...document.querySelectorAll("a, button, input, select, textarea, summary, .tok")]
  .filter((one) => one.checkVisibility() && !(one.type === "radio" && !one.checked)).map({NAME})"""
FOCUS = f"""() => {{ const one = document.activeElement, shown = one.type === "radio" ? one.nextElementSibling : one;
  return [({NAME})(one), getComputedStyle(shown).outlineStyle] }}"""

# Visible texts whose contrast to what is behind them is below 4.5.
CONTRAST = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (one) => {
    const layers = [];
    for (let node = one; node; node = node.parentElement) layers.unshift(rgba(getComputedStyle(node).backgroundColor));
    return layers.reduce((low, top) => low.map((v, i) => v + (top[i] - v) * top[3] / 255), [255, 255, 255]);
  };
  const poor = [];
  for (const one of document.querySelectorAll("body *")) {
    const texts = [...one.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
    if (!texts.length || !one.checkVisibility() || one.closest("[aria-disabled=true], script")) continue;
    const style = getComputedStyle(one), front = rgba(one.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(front), light(behind(one))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push([one.tagName, one.textContent.slice(0, 30), ratio.toFixed(2)]);
  }
  return poor }"""


def make_folder(home):
    """A mixture and a DPO run, with prompts and an evaluation whose texts are markup. Returns the mixture's path. The
    experts are trained at such a rate that they differ."""
    model = teach_letters(tinyjob.make_model(home / "model"))
    options = dict(model=str(model), data=tinyjob.write(home / "train.jsonl", tinyjob.make_records(users=6, each=4)),
                   epochs=3, max_prompt=PROMPT, max_response=RESPONSE, lr=0.01)
    train.run(train.TrainConfig(out=str(home / "mine"), **tinyjob.small(latent="user", **options) | {"head_lr": 0.05}))
    train.run(train.TrainConfig(out=str(home / "dpo"), **tinyjob.small(experts=1, **options)))
    tinyjob.write(home / "prompts.jsonl", [{"prompt": text} for text in ("mnop", "nn", f"p{HOSTILE}")])
    figures = {"experts": 2, "own": [LABEL, None], "trained_on": ["all"], "type_of_pair": ["all"],
               "log_likelihood_own": {"mean": -0.7, "se": 0.1, "n": 4}}
    curve = [{"shown": n, "users": 3, "accuracy": {"mean": 0.5 + n / 10, "se": 0.05, "n": 9}} for n in (0, 1, 2)]
    (home / "results.json").write_text(json.dumps({"preferences": {"mine": figures}, "policies": {}, "own_reward": [],
                                                   "adapt": {"adapt-new": {"mine": curve}}}))
    return home / "mine"


def teach_letters(folder, steps=150):
    """Trains a tiny model, for seconds, to write a few letters and blanks and to end: as it is, most of its tokens are
    bytes that are no characters. Returns the folder."""
    model, order = load_model(str(folder)), torch.Generator().manual_seed(0)
    letters = torch.tensor([*b"abcdwxyzmnop    " * 5, tinyjob.EOS])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        ids = letters[torch.randint(len(letters), (16, 24), generator=order)]
        loss = -token_logps(model(ids[:, :-1]), model.unembedding, ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(model, folder)
    return folder


@contextlib.contextmanager
def serving(run, users, *options):
    """The address of a server of this run, as it prints it."""
    command = [sys.executable, "-m", "mixdpo.serving", str(run), "--port", "0", "--users", str(users), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            lines = iter(process.stdout.readline, "")
            yield next(found.group() for line in lines if (found := re.match(r"http://\S+", line)))
        finally:
            process.terminate()


@contextlib.contextmanager
def visit(chromium, url, width=1280, allowed=(), **options):
    """A new browser profile on the page, ready. At the end: no markup has run, the console is empty but for messages
    with one of the texts `allowed`, and no request went to another host."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
    context.add_init_script(WATCH)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    context.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.locator("#main:not([hidden])").wait_for(timeout=60_000)
    yield page
    assert not page.evaluate("window.hit"), "markup has run"
    context.close()
    assert [text for text in said if not any(part in text for part in allowed)] == []
    home = url.partition("#")[0].rstrip("/")
    assert asked and [one for one in asked if not one.startswith((f"{home}/", f"blob:{home}/", "data:,"))] == []


def expect(page, where):
    """Playwright's expectations of an element, which wait for it."""
    from playwright.sync_api import expect

    return expect(page.locator(where))


def ask(page, prompt="mno", length=8):
    """Types a prompt and waits for all answers."""
    page.fill("#prompt", prompt)
    page.fill("#length", str(length))
    page.click("#go")
    expect(page, "#ask-status").to_contain_text("Done in")


def choose(page, times):
    """Shows two answers and clicks so many times, right and left by turns."""
    before = page.evaluate("taste.history ? taste.history.length - 1 : 0")
    page.click("#next")
    for n in range(times):
        ready(page)
        page.click(f"#prefer-{(n + 1) % 2}")
        expect(page, "#type-words").to_contain_text(f"after {before + n + 1} comparison")
    ready(page)


def ready(page):
    """Waits for two different answers; a tiny model may write the same twice, or nothing."""
    for _ in range(20):
        expect(page, "#next").to_have_attribute("aria-disabled", "false")
        if page.get_attribute("#prefer-0", "aria-disabled") == "false":
            return
        page.click("#next")
    raise AssertionError("the model writes the same answer again and again")


def fits(page):
    """Whether nothing is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def user_of(page):
    """The name under which the browser knows its user; None before the first comparison."""
    return page.evaluate("localStorage.getItem('mixdpo-user-mine')")


def known(url, user):
    """What the server knows of a user."""
    with urllib.request.urlopen(f"{url}/v1/users/{user}") as answer:
        return json.loads(answer.read())


def completion(url, model, prompt, length):
    """The text that the server gives a program, without blanks in front, as the page shows it."""
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": length, "seed": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())["choices"][0]["text"].lstrip()


def numbers(texts):
    """The page's numbers as floats."""
    return [float(text.replace("−", "-")) for text in texts]


# --- checks of a page -------------------------------------------------------------------------------------------------


def check_cards(page, scores, names):
    """The numbers of the cards and the tints of the mixture's tokens are those of the server's scores."""
    texts = {}
    for name in names:
        card = page.locator(f"[data-policy={name}]")
        texts[name] = card.locator(".text").text_content()
        score = next(one for text, one in scores.items() if text.lstrip() == texts[name])
        shown = dict(zip(card.locator("dt").all_text_contents(), card.locator("dd").all_text_contents()))
        found = numbers([shown["Log-probability"], shown.get("Log-ratio to the reference", "0")])
        total = score["totals"][name]
        assert found == [pytest.approx(total["logp"], abs=0.051), pytest.approx(total["log_ratio"], abs=0.0051)]
    tokens = page.locator("#tokens .tok")
    text = "".join(tokens.all_text_contents())
    score = scores[text]
    assert text.lstrip() in (texts["expert-0"], texts["expert-1"]), "the mixture's answer is no expert's"
    found = tokens.evaluate_all("all => all.map(one => [one.className, Number(one.style.getPropertyValue('--sure'))])")
    wanted = [(max(range(2), key=lambda k: row[k]), 2 * max(row) - 1) for row in score["posterior"][:-1]]
    assert [name.split()[1] for name, _ in found] == [f"e{k}" for k, _ in wanted]
    assert [sure for _, sure in found] == pytest.approx([sure for _, sure in wanted], abs=6e-4)
    assert max(sure for _, sure in wanted) > 0.05, "the tiny experts are too alike: no tint would be seen"
    clear, tinted = (tokens.nth(n).evaluate("one => getComputedStyle(one).backgroundColor") for n in (
        0, max(range(len(wanted)), key=lambda n: wanted[n][1])))
    assert clear != tinted
    tokens.nth(2).hover()
    cells = page.locator("#tip tr").nth(1).locator("td").all_text_contents()
    assert numbers(cells) == pytest.approx(
        [math.exp(score["logps"]["expert-0"][2]), score["posterior"][2][0], score["posterior"][3][0]], abs=0.0051)
    assert page.locator("#track-plot path.curve").count() == 2
    return texts


def check_curve(page, user):
    """The curve has a point for each comparison, at the height of the posterior."""
    history = user["history"]
    assert user["comparisons"] == 4 and len({row[0] for row in history}) == 5, "a comparison moved nothing"
    of_all = "(all, name) => all.map((one) => Number(one.getAttribute(name)))"
    heights = page.eval_on_selector_all("#type-plot g.e0 circle", of_all, "cy")
    low, _, high = page.eval_on_selector_all("#type-plot line.grid", of_all, "y1")
    assert [(low - y) / (low - high) for y in heights] == pytest.approx([row[0] for row in history], abs=1e-3)
    assert page.locator("#expected-words").text_content().startswith(
        "at 2 comparisons, the most that was measured: 0.70 ± 0.05")


def check_download(path, choices, folder):
    """The file has these choices, and train.py's reader takes it."""
    assert tinyjob.lines(path) == choices and len(choices) == 4
    pairs = read_preferences(path, load_tokenizer(str(folder.parent / "model")), PROMPT, RESPONSE)
    assert [pair.user for pair in pairs] == [choice["user"] for choice in choices]
