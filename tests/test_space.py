"""The page of examples/space: what it shows, and in a real browser where there is one."""

import csv
import importlib.util
import shutil
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from hf_adaptive import evaluate_exits
from tests import tiny

gr = pytest.importorskip("gradio", reason='gradio is not installed: pip install "hf_adaptive[space]"')
SPACE = Path(__file__).parent.parent / "examples" / "space"


@pytest.fixture(scope="module")
def app():
    specification = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = tiny.model("bert"), tiny.tokenizer()
    texts = tiny.sentences(40)
    rows = Dataset.from_dict({**tokenizer(texts), "label": torch.randint(tiny.LABELS, (40,)).tolist()})
    evaluate_exits(model, rows, timed_examples=8, show_progress=False).to_json(folder / "exit_report.json")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(app, checkpoint):
    return app.Classifier(str(checkpoint))


def test_every_text_has_a_row_with_what_each_exit_says(classifier):
    texts = tiny.sentences(3)
    rows = classifier.classify(texts, 0.0)
    assert [row[0] for row in rows] == texts
    assert all(len(row) == len(classifier.headers) == 4 + len(tiny.EXIT_LAYERS) for row in rows)
    assert [row[2] for row in rows] == [tiny.EXIT_LAYERS[0]] * 3  # a threshold of 0 lets everything leave at once
    assert [row[1] for row in rows] == [row[4] for row in rows]  # the answer is what that exit says
    assert [row[2] for row in classifier.classify(texts, 1.0)] == [tiny.LAYERS] * 3


def test_the_slider_goes_from_the_cheapest_to_the_dearest_point(classifier):
    thresholds = [classifier.threshold(care) for care in (0, 0.5, 1)]
    costs = [point.cost for point in classifier.points]
    assert thresholds[0] == classifier.points[0].threshold
    assert thresholds[2] == classifier.points[-1].threshold
    assert f"{costs[0]:.0%}** of the layers" in classifier.held_out(0)
    assert f"{costs[-1]:.0%}** of the layers" in classifier.held_out(1)
    assert "times as fast" in classifier.held_out(1)


def test_a_checkpoint_without_a_report_or_exits(app, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "bare")
    (tmp_path / "bare" / "exit_report.json").unlink()
    bare = app.Classifier(str(tmp_path / "bare"))
    assert "No `exit_report.json`" in bare.held_out(0.5)
    assert 1 / tiny.LABELS < bare.threshold(0.5) < 1
    tiny.save_encoder(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no exits"):
        app.Classifier(str(tmp_path / "plain"))


def test_a_file_comes_back_with_answers(classifier, tmp_path):
    texts = tiny.sentences(5)
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "id"], *([text, number] for number, text in enumerate(texts))])
    with open(classifier.classify_file(str(tmp_path / "in.csv"), "text", 1.0), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == texts
    assert {row["label"] for row in rows} <= set(classifier.model.config.id2label.values())
    assert all(0 < float(row["score"]) <= 1 for row in rows)
    with pytest.raises(gr.Error, match="no column 'review'"):
        classifier.classify_file(str(tmp_path / "in.csv"), "review", 1.0)


@pytest.fixture
def browser(tmp_path):
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-sync")
    for flag in (*flags, "disable-component-update", f"user-data-dir={tmp_path / 'profile'}", "window-size=1300,1000"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def test_in_a_browser(app, classifier, browser, tmp_path):
    page = app.make_page(classifier)
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        browser.get(address)
        button = found(browser, "#classify")
        assert "of the layers" in found(browser, "#measured").text
        button.click()
        deadline = time.monotonic() + 30
        while "A masterpiece" not in (text := found(browser, "#answers").text) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert "A masterpiece" in text
        assert "It has its moments" in text
        browser.save_screenshot(str(tmp_path / "page.png"))
        assert (tmp_path / "page.png").stat().st_size > 10_000
    finally:
        page.close()


def found(browser, selector):
    """The element, when it is there."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.expected_conditions import presence_of_element_located
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, 30).until(presence_of_element_located((By.CSS_SELECTOR, selector)))
