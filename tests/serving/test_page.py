"""mixdpo/serving/page.html in Chromium, on the server of a tiny trained run: `python -m mixdpo.serving`.

Docstrings name the faults that each test was seen to fail on. Every visit also fails on a message in the browser's
console, and on a request to another host (visits.py). Without playwright, or without a Chromium of the system, only
the test of the file runs."""

import json
import re

import pytest
from visits import (
    CHROMIUM,
    CONTRAST,
    CONTROLS,
    FOCUS,
    HOSTILE,
    LABEL,
    MISSING,
    ROOT,
    ask,
    check_cards,
    check_curve,
    check_download,
    choose,
    completion,
    expect,
    fits,
    known,
    make_folder,
    ready,
    serving,
    user_of,
    visit,
)

in_browser = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The path of a mixture, with a DPO run beside it."""
    return make_folder(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """The address of its server."""
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


# --- visits -----------------------------------------------------------------------------------------------------------


@in_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_visit(chromium, url, folder, width, tmp_path):
    """Faults: answers at once in place of streams; the same policy in all columns; tokens without a tint, or tinted
    by the posterior after them; a tip of the next token; the curve of one comparison fewer; a user that a reload
    forgets; a panel that is wider than a phone."""
    with visit(chromium, url, width) as page:
        scores = []
        page.on("response", lambda answer: scores.append(answer) if answer.url.endswith("/api/score") else None)
        assert fits(page)
        ask(page)
        seen, names = page.evaluate("window.seen"), ["reference", "dpo", "expert-0", "expert-1"]
        assert page.eval_on_selector_all("#answers article", "all => all.map(one => one.dataset.policy)") == names
        assert all(len(seen.get(name, [])) > 2 for name in [*names[2:], "spoken"]), f"nothing was streamed: {seen}"
        texts = check_cards(page, {one.request.post_data_json["completion"]: one.json() for one in scores}, names)
        assert all(texts[name] == completion(url, name, "mno", 8) for name in names)
        assert fits(page)
        sent = []
        page.on("request", lambda one: sent.append(one) if one.method == "POST" and "/users/" in one.url else None)
        choose(page, 4)
        user = user_of(page)
        check_curve(page, known(url, user))
        assert fits(page)
        page.reload()
        expect(page, "#type-words").to_contain_text("after 4 comparisons")
        check_curve(page, known(url, user))
        with page.expect_download() as found:
            page.click("#save")
        found.value.save_as(tmp_path / "mine.jsonl")
    check_download(tmp_path / "mine.jsonl", [request.post_data_json | {"user": user} for request in sent], folder)


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
    """Faults: innerHTML for an answer, a token, a prompt or a label, or the name of a reward."""
    event = {"choices": [{"index": 0, "text": HOSTILE, "finish_reason": "stop"}], "mixdpo": {
        "expert": 1, "weights": [0.5, 0.5], "seed": 1}}
    body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
    with visit(chromium, url, allowed=("400",)) as page:                    # a browser reports the refused text
        page.route("**/v1/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
        before = page.locator("script, img, b[onclick]").count()
        page.locator("#examples button").nth(2).click()
        assert page.input_value("#prompt") == f"p{HOSTILE}"
        page.click("#go")                                                   # the texts fill the tiny model's context
        expect(page, "#ask-status").to_contain_text("context")
        ask(page, "a", 8)
        for place in ("[data-policy=reference] .text", "[data-policy=expert-1] .text", "#tokens"):
            assert HOSTILE in page.locator(place).text_content()
        names = ("reference", "dpo", "expert-0", "expert-1")                # the tiny model has a letter a token
        score = {"tokens": [HOSTILE, "b"], "logps": dict.fromkeys(names, [-1, -1]), "posterior": [[0.5, 0.5]] * 3,
                 "totals": dict.fromkeys(names, {"logp": -2, "log_ratio": 0}), "rewards": {LABEL: 0.5}}
        page.route("**/api/score", lambda route: route.fulfill(json=score))
        ask(page, "a", 8)
        assert page.locator("#tokens .tok").first.text_content() == HOSTILE
        assert LABEL in page.locator("[data-policy=dpo] dl").text_content()
        page.locator("#tokens .tok").first.focus()
        assert HOSTILE in page.locator("#tip").text_content()
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
        wanted = page.evaluate(CONTROLS)
        page.evaluate("document.activeElement.blur(); getSelection().removeAllRanges(); scrollTo(0, 0)")
        page.locator("h1").click()
        reached, unseen = set(), []
        for _ in range(len(wanted) + 5):
            page.keyboard.press("Tab")
            name, outline = page.evaluate(FOCUS)
            reached.add(name)
            unseen += [name] * (outline == "none")
        assert {*wanted} - reached - {"Skip to the prompt"} == set() and len(wanted) > 20 and "token" in reached
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
        weights = known(url, name)["posterior"]
        shown = page.locator("#weights .num").all_text_contents()
        assert [float(text) for text in shown] == pytest.approx(weights, abs=0.0051) and before == ["0.50", "0.50"]
        bodies = {request.url.rsplit("/", 1)[1]: request.post_data_json for request in sent}
        assert bodies["weights"]["user"] == bodies["completions"]["user"] == bodies["score"]["user"] == name
        assert bodies["completions"]["model"] == "mixture"
        page.click("#forget")
        assert len(known(url, name)["history"]) == 4
        page.click("#forget")
        expect(page, "#taste-status").to_contain_text("forgotten")
        assert len(known(url, name)["history"]) == 1
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
        for status, body, text in ((429, json.dumps(refused), "The server is busy. Try again in 3 s."),
                                   (200, cut, "broke off"), (200, failing, "The model failed.")):
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
        assert page.get_attribute("#stop", "aria-disabled") == "true"
        assert "error" not in (page.get_attribute("#ask-status", "class") or "")
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
        expect(page, "#title").to_have_text("mine")
        context.close()


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
    text = (ROOT / "mixdpo" / "serving" / "page.html").read_text()
    assert [text.count(f"<{tag}>") for tag in ("script", "style")] == [1, 1] and text.count("</script>") == 1
    markup = re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"\s(style|src|on\w+)=", markup)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|DOMParser", text)
    assert {*re.findall(r"\w+://[^\s\"'`)]+", text)} == {"http://www.w3.org/2000/svg"}
    assert len(text.splitlines()) < 900 and "\r" not in text
