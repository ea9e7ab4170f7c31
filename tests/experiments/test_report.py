"""data/report/page.py on a made-up job: what is drawn, and that a report comes out whole whatever there is to report.
"""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from fakejob import NAMES, make_job

pytest.importorskip("matplotlib", reason="the pictures need the `plots` extra")

from data.report.job import annotators_of, read_job  # noqa: E402
from data.report.page import as_html, report  # noqa: E402
from data.report.pictures import ANNOTATORS, accuracy, histogram, responsibilities, rewards, training  # noqa: E402
from data.report.tables import preferences  # noqa: E402


@pytest.fixture
def home(tmp_path):
    return make_job(tmp_path / "imdb-quick")


@pytest.mark.parametrize("name, columns", [("train.csv", ""), ("train.json", ""), ("other.jsonl", "user=worker")])
def test_training_files_of_any_container_are_read(home, name, columns):
    """Caught: every line of the training file parsed as a record of the project's own format, so that eval.py on a run
    from a CSV or JSON file, or with --columns, ended with a traceback in front of its result."""
    own, path = read_job(home).runs[-1], home / "mix-user/config.json"
    pairs = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    if name.endswith("csv"):
        rows = [",".join(pairs[0]), *(",".join(pair.values()) for pair in pairs)]
    elif columns:
        rows = [json.dumps(pair).replace('"user"', '"worker"') for pair in pairs]
    else:
        rows = [json.dumps(pairs)]
    (home / name).write_text("\n".join(rows) + "\n")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": f"elsewhere/{name}", "columns": columns}))
    again = read_job(home).runs[-1]
    assert again.name == "mix-user" and again.units == own.units and len(set(own.units)) == 2


def test_training_files_are_read_when_they_are_several(home):
    """Caught: a list of files taken for one name: the last file was read alone, so groups got others' annotators, and
    the names of twenty files, which are longer than a name may be, ended eval.py with an error after its tables."""
    own, path = read_job(home).runs[-1], home / "mix-user/config.json"
    lines = (home / "train.jsonl").read_text().splitlines(keepends=True)
    (home / "train.jsonl").unlink()
    names = [f"train-{n:05}-of-00020.jsonl" for n in range(20)]
    for n, name in enumerate(names):
        (home / name).write_text("".join(lines[n * len(lines) // 20 : (n + 1) * len(lines) // 20]))
    config = json.loads(path.read_text())
    for folder in ("", "elsewhere/"):                                       # the second job has moved
        path.write_text(json.dumps(config | {"data": ",".join(folder + name for name in names)}))
        assert read_job(home).runs[-1].units == own.units
    path.write_text(json.dumps(config | {"data": "hub:owner/name," + names[0]}))
    assert read_job(home).runs[-1].units == []                              # the hub is not asked


# ---- pictures


def test_rewards_picture_has_the_tables_numbers(home):
    """Caught: rows upside down against their labels; bars of two SEs; a panel of another reward."""
    job = read_job(home)
    (drawn,) = rewards(job).values()
    labels = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert labels == list(job.results["policies"]) and drawn.axes[0].yaxis_inverted()
    for r, axis in enumerate(drawn.axes[:3]):
        assert NAMES[r] in axis.get_xlabel()
        for y, (name, row) in enumerate(job.results["policies"].items()):
            values = np.array(row["values"])[:, r]
            point, _, (bar,) = axis.containers[y]
            (low, high), se = bar.get_segments()[0][:, 0], values.std(ddof=1) / 7**0.5
            assert point.get_ydata()[0] == y and np.isclose(point.get_xdata()[0], values.mean())
            assert np.allclose([low, high], [values.mean() - se, values.mean() + se]), name


def test_bars_are_the_experts_accuracies(home):
    """Caught: annotators or experts swapped; bars under another annotator's name."""
    job = read_job(home)
    (drawn,) = accuracy(job).values()
    axis, kinds = drawn.axes[2], ["sentiment", "informativeness"]
    assert axis.get_title() == "mix-user" and [t.get_text() for t in axis.get_xticklabels()] == kinds
    bars = [p for p in axis.patches]
    for i, kind in enumerate(kinds):
        under = sorted((p for p in bars if abs(p.get_x() + p.get_width() / 2 - i) < 0.5), key=lambda p: p.get_x())
        wanted = [a["mean"] for a in job.results["preferences"]["mix-user"]["accuracy"][kind]]
        assert np.allclose([p.get_height() for p in under], wanted)


def test_an_annotator_has_one_colour_everywhere(tmp_path):
    """Caught: colours by order of appearance in a run; K = 2 drawn twice, K = 3 with an expert left out; counts
    for shares.
    """
    runs = {"mix-pair": (3, "pair"), "mix-user": (2, "user")}
    home = make_job(tmp_path / "job", runs=runs, judges=("grammar", "sentiment", "informativeness"), users=5)
    dataset = json.loads((home / "dataset.json").read_text())
    (home / "dataset.json").write_text(json.dumps(dataset | {"annotators": NAMES}))
    job = read_job(home)
    assert annotators_of(job) == NAMES
    (lines,), (histograms,) = responsibilities(job).values(), histogram(job).values()
    assert [axis.get_title() for axis in lines.axes] == [f"mix-pair, expert {k}" for k in range(3)] + [
        "mix-user, expert 0"
    ]
    for axis in lines.axes:
        drawn = {line.get_label(): line.get_color() for line in axis.lines if line.get_label() in NAMES}
        assert drawn == dict(zip(NAMES, ANNOTATORS))
    for axis in histograms.axes:
        drawn = {patch.get_label(): patch.get_edgecolor()[:3] for patch in axis.patches}
        assert set(drawn) == set(NAMES)
        for name, colour in zip(NAMES, ANNOTATORS):
            assert np.allclose(drawn[name], [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], atol=1e-3)
        for patch in axis.patches:  # 20 bins of 0.05, heights that sum to 1
            x, y = patch.get_xy().T
            assert np.isclose(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2, 0.05)


def test_training_pictures_share_their_scales(home):
    """Caught: a run on scales of its own, or whose curves leave the panel."""
    drawn = training(read_job(home))
    assert list(drawn) == ["training-dpo", "training-mix-pair", "training-mix-user"]
    for panel in range(5):
        scales = {one.axes[panel].get_ylim() for one in drawn.values()}
        assert len(scales) == 1
        ((low, high),) = scales
        assert all(
            low < line.get_ydata().min() and line.get_ydata().max() < high
            for one in drawn.values()
            for line in one.axes[panel].lines
        )


# ---- the whole


def test_report_is_complete(tmp_path):
    """Caught: sections out of order; a link without its picture or a picture of before; a large picture; a file
    half-written.
    """
    home = make_job(tmp_path / "imdb-quick", steps=120)
    (home / "report").mkdir()
    (home / "report/training-gone.png").write_bytes(b"old")
    path = report(home)
    text = path.read_text(encoding="utf-8")
    assert path == home / "report.md" and text.startswith("# imdb-quick\n") and not list(home.glob("*.part"))
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [
        "Result",
        "Rewards of the policies",
        "Differences between the heads",
        "Held-out preferences",
        "What each type of user gets",
        "Experts and annotators",
        "Rewards",
        "Training",
        "Responsibilities by annotator",
        "Held-out accuracy",
        "Last responsibilities",
        "Sample completions",
        "What was run",
    ]
    linked = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert sorted(linked) == sorted(f"report/{file.name}" for file in (home / "report").iterdir()) and len(linked) == 8
    for link in linked:
        content = (home / link).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) < 150_000, f"{link}: {len(content)} bytes"


def test_the_report_shows_active_experts_and_warns(home):
    """Catches: no column of active experts; no warning; one for DPO; an error on results without these figures."""
    text = preferences(read_job(home))
    assert text.count("effective experts | active experts |") == 1
    job = read_job(home)
    K = {run: figures["experts"] for run, figures in job.results["preferences"].items()}
    for run, experts in K.items():
        assert (f"- warning: {run}: only 1 of {experts} experts" in text) == (experts > 1)
        assert f"{'–' if experts == 1 else f'1 of {experts}'} |" in text
        del job.results["preferences"][run]["collapse"]
    assert "warning" not in preferences(job)


@pytest.mark.parametrize(
    "missing, options",
    [
        ("Held-out preferences\n\nNo held-out pairs", {"heldout": False}),
        ("Rewards of the policies\n\nNo completions", {"completions": False}),
        ("No completions of a run with several experts", {"runs": {"dpo": (1, "pair")}}),
        ("Not measured", {"judges": ("sentiment",)}),
        ("judge unknown", {"named": False}),
        ("head 0 minus head 2", {"runs": {"mix": (3, "user")}}),  # more experts than annotators
        ("in SEs", {"prompts": 1, "steps": 1}),  # no standard error, no curve
    ],
)
def test_missing_pieces_leave_a_report(tmp_path, monkeypatch, missing, options):
    """Caught: a section, a picture or a standard error that takes for granted what is not there; silence about it."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path: self.draw_without_rendering())
    options = {"runs": {"dpo": (1, "pair"), "mix": (2, "user")}} | options
    text = report(make_job(tmp_path / "job", **options)).read_text(encoding="utf-8")
    assert missing in text and "nan" not in text


def test_a_folder_of_unevaluated_runs(tmp_path, monkeypatch):
    """Caught: results.json, dataset.json, the reference or the preference file taken for granted."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path: self.draw_without_rendering())
    home = make_job(tmp_path / "job", heldout=False, completions=False)
    for name in ("results.json", "train.jsonl", "reference/finetune.json"):
        (home / name).unlink()
    text = report(home).read_text(encoding="utf-8")
    assert "training-mix-user" in text and text.count("were not measured") == 4  # pictures; training is there
    assert "Sample completions\n\nNo completions" in text


def test_tables_need_no_matplotlib_and_pictures_no_pyplot():
    """Caught: drawing packages imported by the tables; pyplot, with a window system behind it, by the pictures."""
    check = "import sys, data.report.tables; assert 'matplotlib' not in sys.modules, 'tables'; "
    check += "import data.report.page; assert 'matplotlib.pyplot' not in sys.modules, 'pictures'"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- as a page

OWNED = ('<script>document.title = "owned"</script><img src=x onerror=\'document.title="owned"\'> <br> '
         '[a](javascript:1)\nline')


def hostile_page(home):
    """The report as a page, of a job whose completions and names are markup."""
    rows = [json.loads(line) for line in (home / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        row["texts"] = {name: row["prompt"] + OWNED for name in row["texts"]}
    (home / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(home)
    return home / "report.html"


def test_the_page_shows_markup_as_text(home):
    """Caught: HTML let through, a link made of a text, our own line breaks shown as text."""
    page = hostile_page(home).read_text()
    body = page[page.index("<body>") :]
    assert "&lt;script&gt;document.title" in body and "<script" not in body and "<br>" in body
    images = re.findall(r"<img ([^>]*)>", body)
    assert images and all(re.fullmatch(r'src="report/[\w%.-]+" alt="[^"]*" /', image) for image in images)
    assert "&lt;b&gt;x&lt;/b&gt;" in as_html("t", "<b>x</b>"), "what escape() missed would be text, too"
    known = "body h1 h2 p ul li table thead tbody tr th td img br em code strong"
    assert {*re.findall(r"<([a-z0-9]+)", body)} <= {*known.split()}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to open the page in")
def test_a_browser_shows_markup_as_text(home, tmp_path):
    """The page in a real browser. Caught: a script in a completion that runs."""
    page = hostile_page(home)

    def opened(path):
        call = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                               "--no-first-run", "--disable-background-networking", "--disable-component-update",
                               "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
                               path.as_uri()], capture_output=True, text=True, timeout=120)
        return call.stdout

    dom = opened(page)
    assert "<title>imdb-quick</title>" in dom and "&lt;script&gt;document.title" in dom, dom[:500]
    page.write_text(page.read_text().replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"'))
    assert "<title>owned</title>" in opened(page), "the browser runs scripts, so that they did not run says something"
