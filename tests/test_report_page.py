"""The page of a run: curves, samples, escaping, and a real browser that opens it."""

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from loopos.errors import InputError, OutputError
from loopos.reporting import read_run, report_page, write_report
from loopos.reporting.charts import chart, labels, smoothed, thinned, ticks
from loopos.reporting.records import Series

STEPS = 40
EVIL = "<script>alert('no')</script>\u2028&amp; \ud800"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def write(path, *, steps=STEPS, text="", samples=True, name="evil"):
    """Write the records of a PPO run whose reward model stands within it."""
    path.mkdir(parents=True)
    lines = [
        {"step": s, "epoch": 0, "loss": 0.1 / s, "reward/score": s / steps, "kl/mean": 0.1 * s,
         "entropy": 3 - s / steps, "learning_rate": 1e-4, "tokens_per_s": 1000.0 + s,
         "tokens": 100, "time_s": 0.1, "own/figure": s**2}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    lines += [{"step": s, "epoch": 0, "eval": {"reward/score": s / 50}, "best": True}
              for s in (10, 20, 40)]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + text)
    rows = [{"step": s, "prompt": f"{EVIL} {s}", "response": EVIL if i else "", "score": i / 3,
             "tokens": i, "ended": bool(i)} for s in (5, 10, 15, 20) for i in range(3)]  # fmt: skip
    if samples:
        (path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = {"computation": {"method": "rlhf", "description": EVIL},
              "training": {"learning_rate": 1e-4, "scheduler": None}}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    data = {"rows": 90, "validation_rows": 10, "classes": {EVIL: 30, "b": 60},
            "validation_classes": {EVIL: 3, "b": 7}, "dropped": {"count": 2, "places": ["a:3"]},
            "lengths": {"min": 1, "max": 9}, "leaks": {"count": 5, "places": ["b:1"]},
            "warnings": [EVIL]}  # fmt: skip
    (path / "data_report.json").write_text(json.dumps(data))
    evaluation = {"accuracy": 0.75, "count": 10, "confusion_matrix": [[4, 1], [2, 3]],
                  "per_class": {"recall": [0.8, 0.6], "support": [5, 5]}}  # fmt: skip
    (path / "evaluation.json").write_text(json.dumps(evaluation))
    state = path / "checkpoints" / "step-00000040"
    state.mkdir(parents=True)
    (state / "state.json").write_text(json.dumps({
        "total_steps": 40, "seed": 3, "loopos_version": "0.0", "options": {"ppo_epochs": 4},
        "backend": {"name": "cython", "isa": "x86-64-v3", "threads": 2, "native": ["a", "b"],
                    "inherited": ["c"]}}))  # fmt: skip
    part = path / "reward_model"
    (part / "model").mkdir(parents=True)
    (path / "model").mkdir()
    pairs = [{"step": s, "loss": 0.7 - s / 100, "rewards/margin": s / 10} for s in range(1, 16)]
    (part / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))
    calibration = [{"from": 0.5, "to": 0.6, "count": 40, "confidence": 0.55, "accuracy": 0.6}]
    (part / "evaluation.json").write_text(
        json.dumps(
            {"accuracy": 0.7, "longer_accuracy": 0.5, "calibration": calibration, "count": 400}
        )
    )
    return path


class Tags(HTMLParser):
    """Every tag with its attributes, and whether each is closed in its order."""

    VOID = ("meta", "link", "line", "path", "br", "input", "img")

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return report_page(read_run(write(tmp_path_factory.mktemp("page") / "run")))


def figures_of(page):
    """Return the charts of a page: name, number of values, data."""
    names = re.findall(r'<figure[^>]* data-name="([^"]*)" data-values="(\d+)"', page)
    data = [json.loads(html.unescape(text)) for text in re.findall(r'data-curve="([^"]*)"', page)]
    return [(name, int(count), curve) for (name, count), curve in zip(names, data, strict=True)]


def test_it_needs_nothing_else_and_is_well_formed(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert [tag for tag, _ in tags.found].count("script") == 1
    for tag, attributes in tags.found:
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:,") == "data:,"
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert 'name="viewport"' in page


def test_text_of_the_data_stays_text(page):
    assert "<script>alert" not in page
    # Of prompts, responses; class, warning, description, and that in the configuration.
    assert page.count("&lt;script&gt;alert(&#39;no&#39;)&lt;/script&gt;") == 9 + 6 + 4
    assert "&amp;amp;" in page
    page.encode("utf-8")


def test_every_figure_of_steps_and_evaluations_is_drawn(page):
    found = {name: (count, curve) for name, count, curve in figures_of(page)}
    assert list(found)[:2] == ["loss", "rewards/margin"]  # of the reward model, which comes first
    count, curve = found["reward/score"]
    assert count == STEPS + 3
    assert curve["train"]["step"] == list(range(1, STEPS + 1))
    assert curve["train"]["value"][0] == "0.025"
    assert curve["eval"]["step"] == [10, 20, 40]
    assert curve["eval"]["value"] == ["0.2", "0.4", "0.8"]
    assert (curve["train"]["x"][0], curve["train"]["x"][-1]) == (0, 100)
    assert curve["train"]["y"] == sorted(curve["train"]["y"], reverse=True)  # up is less far down
    assert {"kl/mean", "entropy", "tokens_per_s", "own/figure"} <= set(found)
    assert "learning_rate" not in found  # one value throughout is no curve
    assert "learning rate <b>0.0001</b>" in page


def test_samples_at_start_middle_and_end(page):
    assert re.findall(r"<h3>(\w+, step \d+)</h3>", page) == [
        "Start, step 5", "Middle, step 10", "End, step 20"]  # fmt: skip
    assert page.count('<span class="none">nothing</span>') == 3
    assert page.count(">cut</td>") == 3


def test_configuration_data_evaluation_and_machine(page):
    pairs = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page))
    assert pairs["learning_rate"] == "0.0001"
    assert "scheduler" not in pairs  # null
    assert pairs["ppo_epochs"] == "4"
    assert pairs["dropped"] == "2 (a:3)"
    assert pairs["lengths"] == "min 1, max 9"
    assert pairs["accuracy"] == "0.7500"
    assert pairs["backend"] == "cython"
    assert pairs["operations"] == "2 of its own, 1 of NumPy&#39;s"
    assert pairs["seed"] == "3"
    assert '<td>0</td><td class="num">4</td><td class="num">1</td>' in page
    assert "<h3>Calibration</h3>" in page


def test_the_verdict_stands_on_top(page):
    verdict = page[page.index('id="verdict"') : page.index('class="chapter"')]
    assert "<p>1 problem</p>" in verdict
    assert 'class="problem" data-rule="leaks"' in verdict
    assert 'data-rule="unfinished"' not in verdict  # all its steps were made, its model was saved
    assert "Figures that were looked at" in verdict


def test_only_a_run_that_is_finished_is_called_so(tmp_path):
    run = write(tmp_path / "run")
    (state,) = run.glob("checkpoints/*/state.json")

    def look(total, exhausted=False):
        state.write_text(json.dumps({"total_steps": total, "exhausted": exhausted}))
        page = report_page(read_run(run))
        (about,) = re.findall(r'<p class="about">(step .*) · last record', page)
        assert "<h2>Evaluation of reward model</h2>" in page  # that part is finished
        old = "<h2>Evaluation</h2>" in page, "<dt>accuracy</dt><dd>0.7500" in page
        assert old == (about.partition(" · ")[2].startswith("finished"),) * 2
        assert ('data-rule="unfinished"' in page) is not old[0]
        return about

    assert look(40) == "step 40 of 40 · finished"
    assert look(90, True) == "step 40 of 90 · finished; ended by itself before its last step"
    # Made longer: the model and the evaluation are of before.
    assert look(90) == "step 40 of 90 · not finished"
    assert look(30) == "step 40 · not finished"
    (run / "model").rmdir()
    left = "all steps are made, but the model is not saved yet; continue it with --resume"
    assert look(40) == f"step 40 of 40 · {left}"
    assert look(90) == "step 40 of 90 · not finished"
    (run / "config.json").unlink()  # what a trainer wrote by itself has no model
    assert look(40) == "step 40 of 40 · finished"
    assert look(90) == "step 40 of 90 · not finished"


def test_a_run_that_was_killed_has_a_page(tmp_path):
    run = read_run(write(tmp_path / "run", text='{"step": 41, "lo', samples=False))
    assert run.torn == ["metrics.jsonl"]
    assert run.last_step == STEPS
    assert "metrics.jsonl ends in half a line" in report_page(run)
    assert "<h2>Samples</h2>" not in report_page(run)
    (tmp_path / "run" / "samples.jsonl").write_bytes('{"step": 1}\n{"prompt": "é'.encode()[:-1])
    again = read_run(tmp_path / "run")
    assert again.torn == ["metrics.jsonl", "samples.jsonl"]
    assert len(again.samples) == 1


def test_a_run_that_trains_its_reward_model_first(tmp_path):
    run = write(tmp_path / "runs" / "run")
    (run / "metrics.jsonl").unlink()
    (run / "config.json").unlink()
    page = report_page(read_run(run))
    assert re.findall(r'data-part="([^"]*)"', page) == ["reward_model"]
    with pytest.raises(
        InputError, match=r"runs: is not a run directory \(metrics.jsonl is missing"
    ):
        read_run(tmp_path / "runs")


def test_where_it_is_written(tmp_path):
    run = write(tmp_path / "run")
    assert write_report(run) == run / "report.html"
    other = write_report(run, tmp_path / "deep" / "page.html")
    assert other.read_bytes() == (run / "report.html").read_bytes()
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="taken: is a directory"):
        write_report(run, tmp_path / "taken")


def test_rounds_come_in_their_order(tmp_path):
    run = write(tmp_path / "run")
    for number in (10, 2, 1):
        shutil.copytree(run / "reward_model", run / f"round-{number}")
    parts = re.findall(r'data-part="([^"]*)"', report_page(read_run(run)))
    assert parts == ["reward_model", "", "round-1", "round-2", "round-10"]


# -- curves ----------------------------------------------------------------------------------------


def test_ticks_are_round():
    assert ticks(0, 1, 4) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.13, 0.87, 3) == [0.2, 0.4, 0.6, 0.8]
    assert ticks(1, 60, 4, whole=True) == [20.0, 40.0, 60.0]
    assert ticks(1, 3, 5, whole=True) == [1.0, 2.0, 3.0]
    assert ticks(-3, 1e-9, 3) == [-3.0, -2.0, -1.0, 0.0]
    assert labels([0.0, 0.0005, 0.001]) == ["0", "0.0005", "0.001"]
    assert labels([0.0, 1e-4, 2.5e-4]) == ["0", "1e-4", "2.5e-4"]
    assert labels([-1.0, 0.0, 20.0, 8000.0]) == ["-1", "0", "20", "8000"]
    assert labels([0.0, 8000.0, 12000.0]) == ["0", "8k", "12k"]
    assert labels([0.0, 2.5e6, 3e7]) == ["0", "2.5M", "30M"]
    assert labels([0.0, 1e15]) == ["0", "1e15"]


def test_smoothing_is_a_centred_mean():
    line = Series(np.arange(100), np.arange(100.0))
    np.testing.assert_allclose(smoothed(line).values, line.values)  # a line stays a line
    spike = np.zeros(100)
    spike[50] = 9.0
    calm = smoothed(Series(np.arange(100), spike)).values
    np.testing.assert_allclose(
        calm[44:57] * 25 / 9, [0, 0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0, 0], atol=1e-9
    )
    assert len(smoothed(Series(np.arange(19), np.ones(19)))) == 0


def test_thinning_keeps_ends_and_extremes():
    values = np.sin(np.arange(50_000) / 100)
    values[12_345] = 7.0
    thin = thinned(Series(np.arange(50_000), values), 800)
    assert len(thin) <= 800
    assert (thin.steps[0], thin.steps[-1]) == (0, 49_999)
    assert thin.values.max() == 7.0
    assert (np.diff(thin.steps) > 0).all()


def test_scales(tmp_path):
    run = read_run(write(tmp_path / "run"))
    run.steps[5]["kl/mean"] = 5000.0
    wide = chart(run, "kl/mean", "KL")
    assert wide.log
    assert [tick.label for tick in wide.y_ticks] == ["0.1", "10", "1000"]
    run.steps[6]["entropy"] = float("nan")  # not drawn
    entropy = chart(run, "entropy", "Entropy")
    assert entropy.points == STEPS - 1
    assert not entropy.log
    assert "nan" not in entropy.raw
    assert chart(run, "no such figure", "None") is None
    assert chart(run, "learning_rate", "Rate") is None


# -- a browser -------------------------------------------------------------------------------------


@pytest.fixture
def browse(tmp_path):
    """Return a function that opens a page: its DOM after the script, and what was complained of."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        message = f"no browser is on this machine ({', '.join(BROWSERS)})"
        if os.environ.get("LOOPOS_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)

    def open_page(page, *options):
        done = subprocess.run(
            [found, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", *options,
             "--dump-dom", page.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_page


def test_a_browser_opens_it(browse, tmp_path):
    page = write_report(write(tmp_path / "run"))
    dom, complaints = browse(page)
    assert complaints == []
    (root,) = re.findall(r"<html[^>]*>", dom)
    drawn = figures_of(page.read_text(encoding="utf-8"))
    assert f'data-plots="{len(drawn)}"' in root  # the script ran to its end
    assert f'data-values="{sum(count for _, count, _ in drawn)}"' in root
    assert len(drawn) > 6
    assert dom.count("<figure") == len(drawn)
    assert "alert(" not in re.sub(r"&lt;script&gt;alert", "", dom)


def test_the_browser_test_hears_complaints(browse, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('heard'); throw new Error('too')</script>")
    _, complaints = browse(page)
    assert len(complaints) == 2


def test_hovering_shows_values(browse, tmp_path):
    page = write_report(write(tmp_path / "run"))
    script = """<script>
      const plot = document.querySelector('figure[data-name="reward/score"] .plot');
      const box = plot.getBoundingClientRect();
      plot.dispatchEvent(new PointerEvent("pointermove",
        {clientX: box.left + box.width, clientY: box.top, bubbles: true}));
    </script></body>"""
    hovered = tmp_path / "hovered.html"
    hovered.write_text(page.read_text(encoding="utf-8").replace("</body>", script), "utf-8")
    dom, complaints = browse(hovered)
    assert complaints == []
    (readout,) = re.findall(
        r'data-name="reward/score".*?<p class="readout"[^>]*>(.*?)</p>', dom, re.S
    )
    said = re.sub(r"<[^>]*>", "", readout)
    assert said == "step 40  1 · mean 1 · held-out at 40 0.8"
