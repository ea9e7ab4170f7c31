"""mixdpo/serving/page.html in Chromium, on the server of a tiny trained run: `python -m mixdpo.serving`.

Docstrings name the faults that each test was seen to fail on. Every visit also fails on a message in the browser's
console, and on a request to another host. Without playwright, or without a Chromium of the system, only the tests of
the file run."""

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
from served_jobs import make_folder

from mixdpo.preferences import read_preferences
from mixdpo.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "mixdpo" / "serving" / "page.html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [what for what, there in (("the package playwright", importlib.util.find_spec("playwright")),
                                    ("a Chromium on the PATH", CHROMIUM)) if not there]
in_browser = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
HOSTILE = "<script>window.hit=1</script><img src=x onerror=window.hit=2>"
LABEL = "<b onclick=hit=3>first</b>"
WATCH = """window.seen = {};
new MutationObserver((all) => all.forEach(({target, addedNodes}) => {
  const card = target.nodeType === 1 && target.matches(".text") ? target.closest("[data-policy], #spoken") : null;
  const text = [...addedNodes].map((node) => node.textContent).join("");
  if (card && text && (card.ariaBusy ?? target.ariaBusy) === "true") (window.seen[card.dataset.policy || "spoken"] ??= []).push(text);
})).observe(document, {subtree: true, childList: true});"""


# --- a run, its server, a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture and a DPO run, with prompts and an evaluation whose texts are markup."""
    home = tmp_path_factory.mktemp("page")
    run = make_folder(home, "heads")
    tinyjob.write(home / "prompts.jsonl", [{"prompt": text} for text in ("mnop", "nn", f"p{HOSTILE}")])
    figures = {"experts": 2, "own": [LABEL, None], "trained_on": ["all"], "type_of_pair": ["all"],
               "log_likelihood_own": {"mean": -0.7, "se": 0.1, "n": 4}}
    curve = [{"shown": n, "users": 3, "accuracy": {"mean": 0.5 + n / 10, "se": 0.05, "n": 9}} for n in (0, 1, 2)]
    (home / "results.json").write_text(json.dumps({"preferences": {"heads": figures}, "adapt": {"adapt-new": {
        "heads": curve}}, "policies": {}, "own_reward": []}))
    return run


@contextlib.contextmanager
def serving(run, users, *options):
    """The address of a server of this run."""
    command = [sys.executable, "-m", "mixdpo.serving", str(run), "--port", "0", "--users", str(users), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            lines = iter(process.stdout.readline, "")
            yield next(found.group() for line in lines if (found := re.match(r"http://\S+", line)))
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    with serving(folder, tmp_path_factory.mktemp("users") / "users.sqlite") as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def visit(chromium, url, width=1280, allowed=(), **options):
    """A new browser profile on the page, ready. allowed: texts that a console message may have."""
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
    from playwright.sync_api import expect

    return expect(page.locator(where))


def ask(page, prompt="mno", length=8):
    """Types a prompt and waits for all answers."""
    page.fill("#prompt", prompt)
    page.fill("#length", str(length))
    page.click("#go")
    expect(page, "#ask-status").to_contain_text("Done in")


def choose(page, times):
    """Shows two answers and clicks so many times."""
    before = page.evaluate("taste.history ? taste.history.length - 1 : 0")
    page.click("#next")
    for n in range(times):
        ready(page)
        page.click(f"#prefer-{n % 2}")
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
    return page.evaluate("localStorage.getItem('mixdpo-user-heads')")


def get(url, path):
    with urllib.request.urlopen(url.rstrip("/") + path) as answer:
        return answer.read().decode()


# --- visits -----------------------------------------------------------------------------------------------------------


@in_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_visit(chromium, url, folder, width, tmp_path):
    """Faults: answers at once in place of streams; the same policy in all columns; tokens without a tint, or tinted
    by the posterior after them; the curve of one comparison fewer; a user that a reload forgets; chosen and rejected
    swapped; a table that is wider than a phone."""
    with visit(chromium, url, width) as page:
        scores = []
        page.on("response", lambda answer: scores.append(answer) if answer.url.endswith("/api/score") else None)
        assert fits(page)
        ask(page)
        seen, names = page.evaluate("window.seen"), ["reference", "dpo", "expert-0", "expert-1"]
        assert page.eval_on_selector_all("#answers article", "all => all.map(one => one.dataset.policy)") == names
        assert all(len(seen.get(name, [])) > 2 for name in [*names[2:], "spoken"]), f"nothing was streamed: {seen}"
        check_cards(page, {one.request.post_data_json["completion"]: one.json() for one in scores}, names)
        assert fits(page)
        choose(page, 4)
        known = json.loads(get(url, f"/v1/users/{user_of(page)}"))
        check_curve(page, known)
        assert fits(page)
        page.reload()
        expect(page, "#type-words").to_contain_text("after 4 comparisons")
        check_curve(page, known)
        with page.expect_download() as found:
            page.click("#save")
        found.value.save_as(tmp_path / "mine.jsonl")
    check_download(tmp_path / "mine.jsonl", known["user"], folder)


def check_cards(page, scores, names):
    """The numbers of the cards and the tints of the mixture's tokens are those of the server's scores."""
    texts = {}
    for name in names:
        card = page.locator(f"[data-policy={name}]")
        texts[name] = card.locator(".text").text_content()
        score = next(one for text, one in scores.items() if text.lstrip() == texts[name])
        shown = dict(zip(card.locator("dt").all_text_contents(), card.locator("dd").all_text_contents()))
        total = score["totals"][name]
        assert as_number(shown["Log-probability"]) == pytest.approx(total["logp"], abs=0.051)
        assert name == "reference" or as_number(shown["Log-ratio to the reference"]) == pytest.approx(
            total["log_ratio"], abs=0.0051)
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
    assert [as_number(cell) for cell in cells] == pytest.approx(
        [math.exp(score["logps"]["expert-0"][2]), score["posterior"][2][0], score["posterior"][3][0]], abs=0.0051)
    assert page.locator("#track-plot path.curve").count() == 2


def as_number(text):
    return float(text.replace("−", "-"))


def check_curve(page, known):
    """The curve has a point for each comparison, at the height of the posterior."""
    history = known["history"]
    assert known["comparisons"] == 4 and len({row[0] for row in history}) == 5, "a comparison moved nothing"
    heights = page.eval_on_selector_all("#type-plot g.e0 circle", "all => all.map(one => Number(one.getAttribute('cy')))")
    low, high = (page.eval_on_selector_all("#type-plot line.grid", "all => all.map(one => Number(one.getAttribute('y1')))")[n]
                 for n in (0, 2))
    assert [(low - y) / (low - high) for y in heights] == pytest.approx([row[0] for row in history], abs=1e-3)
    assert page.locator("#expected-words").text_content().startswith(
        "at 2 comparisons, the most that was measured: 0.70 ± 0.05")


def check_download(path, user, folder):
    """train.py's reader takes the file, with the texts as they were chosen."""
    pairs = read_preferences(path, load_tokenizer(str(folder.parent / "model")), 12, 10)
    rows = tinyjob.lines(path)
    assert len(pairs) == 4 and {pair.user for pair in pairs} == {user}
    assert [row.keys() for row in rows] == [{"prompt", "chosen", "rejected", "user"}] * 4


@in_browser
def test_a_choice_is_sent_as_it_was_made(chromium, url):
    """Faults: the left answer always; chosen and rejected swapped; the answer without its first blank."""
    with visit(chromium, url) as page:
        page.fill("#length", "8")
        page.click("#next")
        ready(page)
        for side in (1, 0):
            texts = page.evaluate("taste.pair.texts")
            shown = [page.locator(f"#text-{n}").text_content() for n in (0, 1)]
            assert [text.lstrip() for text in texts] == shown and shown[0] != shown[1]
            with page.expect_request("**/preferences") as sent:
                page.click(f"#prefer-{side}")
            body = sent.value.post_data_json
            assert (body["chosen"], body["rejected"]) == (texts[side], texts[1 - side])
            expect(page, "#taste-status").to_contain_text("you preferred the answer of Expert")
            ready(page)


@in_browser
def test_markup_is_text(chromium, url):
    """Faults: innerHTML for an answer, a token, a prompt or a label."""
    event = {"choices": [{"index": 0, "text": HOSTILE, "finish_reason": "stop"}], "mixdpo": {
        "expert": 1, "weights": [0.5, 0.5], "seed": 1}}
    body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
    with visit(chromium, url) as page:
        page.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
        before = page.locator("script, img, b[onclick]").count()
        page.locator("#examples button").nth(2).click()
        assert page.input_value("#prompt") == f"p{HOSTILE}"
        page.click("#go")                                                   # the texts fill the tiny model's context
        expect(page, "#ask-status").to_contain_text("context")
        ask(page, "a", 8)
        for place in ("[data-policy=reference] .text", "[data-policy=expert-1] .text", "#tokens"):
            assert HOSTILE in page.locator(place).text_content()
        page.locator("#tokens .tok").nth(1).focus()
        assert LABEL in page.locator("#tip").text_content() and LABEL in page.locator("#weights").text_content()
        page.click("#next")
        expect(page, "#text-1").to_have_text(HOSTILE)
        assert page.locator("script, img, b[onclick]").count() == before


@in_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_every_control_can_be_reached_and_used_by_keys(chromium, url, width):
    """Faults: a control that Tab leaves out; a token that is no stop; a focus that is not seen; a disabled button that
    loses the focus; arrows that do not move."""
    with visit(chromium, url, width) as page:
        page.focus("#prompt")
        page.keyboard.press("Control+A")
        page.keyboard.type("mop")
        page.fill("#length", "8")
        page.focus("#go")
        page.keyboard.press("Enter")
        expect(page, "#ask-status").to_contain_text("Done in")
        page.focus("#next")
        page.keyboard.press("Enter")
        ready(page)
        wanted = page.evaluate("""() => [...document.querySelectorAll("a, button, input, select, textarea, summary, .tok[tabindex='0']")]
            .filter(one => one.checkVisibility() && !(one.type === "radio" && !one.checked)).map(one => one.id || one.textContent || one.value)""")
        page.evaluate("document.activeElement.blur(); getSelection().removeAllRanges(); scrollTo(0, 0)")
        page.locator("h1").click()
        reached, unseen = set(), []
        for _ in range(len(wanted) + 5):
            page.keyboard.press("Tab")
            name, outline = page.evaluate("""() => { const one = document.activeElement, shown = one.type === "radio" ? one.nextElementSibling : one;
                return [one.id || one.textContent || one.value, getComputedStyle(shown).outlineStyle] }""")
            reached.add(name)
            unseen += [name] * (outline == "none")
        assert {*wanted} - reached - {"Skip to the prompt"} == set() and len(wanted) > 20
        assert [name for name in unseen if name in wanted] == []
        page.focus("#tokens .tok")
        page.keyboard.press("ArrowRight")
        assert "token 2 of" in page.locator("#tip").text_content()
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()
        page.focus("#prefer-1")
        page.keyboard.press("Enter")
        expect(page, "#type-words").to_contain_text("after 1 comparison")
        assert page.evaluate("document.activeElement.id") == "prefer-1"
        page.focus("#modes input:checked")
        page.keyboard.press("ArrowRight")
        expect(page, "#speaks-status").to_contain_text("The likeliest expert is")


@in_browser
def test_served_by_ones_own_type_and_forgotten(chromium, url):
    """Faults: the user is not sent; the weights stay the gate's; one click forgets; the browser keeps the name."""
    with visit(chromium, url) as page:
        sent = []
        page.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
        ask(page)
        assert not any("user" in request.post_data_json for request in sent)
        choose(page, 3)
        name, before = user_of(page), page.locator("#weights .num").all_text_contents()
        page.fill("#seed", "7")
        sent.clear()
        page.check("#me")
        expect(page, "#weights").to_contain_text("your comparisons")
        expect(page, "#speaks-status").to_contain_text("drew")
        weights = json.loads(get(url, f"/v1/users/{name}"))["posterior"]
        shown = page.locator("#weights .num").all_text_contents()
        assert [float(text) for text in shown] == pytest.approx(weights, abs=0.0051) and before == ["0.50", "0.50"]
        bodies = {request.url.rsplit("/", 1)[1]: request.post_data_json for request in sent}
        assert bodies["weights"]["user"] == bodies["completions"]["user"] == bodies["score"]["user"] == name
        assert bodies["completions"]["model"] == "mixture"
        page.click("#forget")
        assert len(json.loads(get(url, f"/v1/users/{name}"))["history"]) == 4
        page.click("#forget")
        expect(page, "#taste-status").to_contain_text("forgotten")
        assert len(json.loads(get(url, f"/v1/users/{name}"))["history"]) == 1
        assert user_of(page) is None and page.locator("#type-words").text_content() == "No comparison yet."


@in_browser
def test_errors_are_shown_as_the_servers_sentence(chromium, url):
    """Faults: a status in place of the sentence; no time to wait; a broken stream that looks complete."""
    refused = {"error": {"message": "the server is busy", "type": "x", "param": None, "code": None}}
    cut = 'data: {"choices": [{"index": 0, "text": "ab", "finish_reason": null}]}\n\n'
    failing = 'data: {"error": {"message": "the model failed"}}\n\n'
    with visit(chromium, url, allowed=("429", "400")) as page:
        page.evaluate("document.getElementById('prompt').value = 'a\\ud800'")
        page.click("#go")
        expect(page, "#ask-status").to_contain_text("surrogate")
        for status, body, text in ((429, json.dumps(refused), "the server is busy Try again in 3 s."),
                                   (200, cut, "broke off"), (200, failing, "the model failed")):
            page.route("**/v1/completions", lambda route: route.fulfill(status=status, body=body, headers={
                "retry-after": "3", "content-type": "text/event-stream"}))
            page.fill("#prompt", "mno")
            page.click("#go")
            expect(page, "#ask-status").to_contain_text(text)
            expect(page, "#ask-status").to_have_class("error")
            page.click("#next")
            expect(page, "#taste-status").to_contain_text(text)
            assert page.get_attribute("#prefer-0", "aria-disabled") == "true"


@in_browser
def test_stop(chromium, url):
    """Faults: the requests go on; the button stays; an error in place of a note."""
    with visit(chromium, url) as page:
        page.route("**/v1/completions", lambda route: None)                 # never answered
        page.click("#go")
        with page.expect_event("requestfailed"):
            page.click("#stop")
        expect(page, "#ask-status").to_have_text("Stopped.")
        assert page.get_attribute("#stop", "aria-disabled") == "true" and not page.locator(".error").count() - page.locator(
            "article .error").count()
        page.unroute("**/v1/completions")
        ask(page)


@in_browser
def test_one_policy_says_what_it_cannot_do(chromium, folder, tmp_path):
    """Faults: a question about experts that do not exist; comparisons that change nothing."""
    with serving(folder.parent / "dpo", tmp_path / "users.sqlite") as url, visit(chromium, url, 390) as page:
        ask(page)
        assert page.locator("#answers article").count() == 2 and fits(page)
        assert page.locator("#next, #modes, #weights, #tokens").locator("visible=true").count() == 0
        assert "one policy" in page.locator("#taste-lead").text_content()
        assert "experts, colours and your own type" in page.locator("#cannot").text_content()


@in_browser
def test_a_server_with_a_token(chromium, folder, tmp_path):
    """Faults: the token stays in the address; it is not sent; no way to type it."""
    with serving(folder, tmp_path / "users.sqlite", "--token", "0123456789abcdef") as url:
        with visit(chromium, url) as page:
            assert "0123" not in page.url
            ask(page)
        context = chromium.new_context()
        page = context.new_page()
        page.goto(url.partition("#")[0])
        expect(page, "#trouble").to_contain_text("token is missing or wrong")
        page.fill("#token", "0123456789abcdef")
        page.keyboard.press("Enter")
        expect(page, "#title").to_have_text("heads")
        context.close()


CONTRAST = """() => {
  const rgb = (text) => { const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    context.fillStyle = text; context.fillRect(0, 0, 1, 1); return [...context.getImageData(0, 0, 1, 1).data] };
  const light = ([r, g, b]) => { const x = [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x[0] + 0.7152 * x[1] + 0.0722 * x[2] };
  const under = (one) => { const back = []; for (let node = one; node; node = node.parentElement) { const c = rgb(getComputedStyle(node).backgroundColor); back.push(c); if (c[3] === 255) break }
    return back.reverse().reduce((low, top) => low.map((v, i) => v + (top[i] - v) * top[3] / 255), [255, 255, 255]) };
  const poor = [];
  for (const one of document.querySelectorAll("body *")) {
    if (!one.checkVisibility() || ![...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || one.closest("[aria-disabled=true], script")) continue;
    const style = getComputedStyle(one), front = rgb(one.closest("svg") ? style.fill : style.color), [a, b] = [light(front), light(under(one))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push([one.tagName, one.className.baseVal ?? one.className, one.textContent.slice(0, 30), ((a + 0.05) / (b + 0.05)).toFixed(2)]);
  }
  return poor }"""


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(chromium, url, scheme):
    """A contrast of 4.5 at least (WCAG AA). Faults: a text in the colour of lines; a colour of the other scheme."""
    with visit(chromium, url, color_scheme=scheme) as page:
        ask(page)
        choose(page, 1)
        page.focus("#tokens .tok")
        assert page.evaluate(CONTRAST) == []
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 300) == (scheme == "dark")


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_one_page_without_a_way_to_run_text():
    """Faults: an attribute of style or events; a second script; a way from text to markup; another host; no limit."""
    text = PAGE.read_text()
    assert [text.count(f"<{tag}>") for tag in ("script", "style")] == [1, 1] and text.count("</script>") == 1
    markup = re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"\s(style|on\w+)=", markup) and not re.search(r"<(script|style|link|img|iframe)\s[^>]*(src|http)", markup)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc", text)
    assert {*re.findall(r"\w+://[^\s\"'`)]+", text)} == {"http://www.w3.org/2000/svg"}
    assert len(text.splitlines()) < 900 and "\r" not in text
