"""The report of a real small run in headless Chromium, from file://, on a phone and on a wide screen, light and dark.

`pip install -e '.[browser]'`, Debian's `chromium` and `chromium-driver`, then `pytest -n 0 -m browser tests/opd/test_report_browser.py`.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd.__main__ import load_config
from opd.report import FILE, report

pytestmark = pytest.mark.browser

EVIL = "<script>document.title = 'run by a model'</script><img src=x onerror=\"document.title = 'run by a model'\">"
WIDTHS = {"phone": 375, "wide": 1280}


@pytest.fixture(scope="module")
def page(short_run, tmp_path_factory) -> Path:
    """The short run's page, with a completion that would run if it were not text."""
    folder = tmp_path_factory.mktemp("browser") / "run"
    shutil.copytree(short_run, folder, ignore=shutil.ignore_patterns("checkpoints", "wandb", "log", "*.safetensors"))
    samples = folder / "samples/000002.json"
    content = json.loads(samples.read_text())
    content["domains"]["arithmetic"][0]["pieces"][0] = EVIL
    samples.write_text(json.dumps(content))
    report(load_config("report", [f"run_dir={folder}"]))
    return folder / FILE


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Chromium without a window, whose console and requests are kept."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install -e '.[browser]'")
    from selenium.webdriver.chrome.service import Service

    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or chromium is None:
        pytest.skip("no headless Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.fixture(params=["light", "dark"])
def theme(request) -> str:
    return request.param


@pytest.fixture(params=list(WIDTHS))
def opened(request, browser, page, theme):
    """The browser with the page open, at a width and in a theme."""
    browser.get_log("browser"), browser.get_log("performance")
    width = WIDTHS[request.param]
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": request.param == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    browser.get(page.as_uri())
    return browser


def background(browser) -> tuple[int, ...]:
    text = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    return tuple(int(part) for part in text.removeprefix("rgb(").removesuffix(")").split(","))


def test_the_page_is_right_at_each_width_and_theme(opened, page, theme):
    """One test, since opening is most of its time: console, requests, theme, width, figures."""
    opened.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    assert opened.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert (max(background(opened)) < 60) == (theme == "dark")
    assert opened.execute_script("return document.documentElement.scrollWidth") <= opened.execute_script("return window.innerWidth")
    assert opened.title.startswith("opd report: ")
    figures = opened.execute_script(
        "return [...document.querySelectorAll('figure')].map((figure) => ({title: figure.querySelector('h3').textContent,"
        " axes: [...figure.querySelectorAll('.axis')].map((axis) => axis.textContent), caption: figure.querySelector('figcaption').textContent,"
        " legend: figure.querySelectorAll('.legend li').length, height: figure.querySelector('svg').getBoundingClientRect().height}))"
    )
    assert len(figures) > 12
    for figure in figures:
        assert figure["title"]
        assert len(figure["axes"]) == 2, figure
        assert all(figure["axes"]), figure
        assert len(figure["caption"].split()) > 6, figure
        assert figure["legend"] >= 1, figure
        assert figure["height"] > 120, figure


def test_text_is_large_enough_to_read_on_a_phone_and_on_a_wide_screen(opened):
    sizes = opened.execute_script("return [...document.querySelectorAll('svg .tick')].map((text) => text.getBoundingClientRect().height)")
    assert min(size for size in sizes if size) > 7


def test_the_button_changes_the_theme_a_legend_entry_brings_its_line_out_and_pointing_shows_values(browser, page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    browser.get(page.as_uri())
    before = background(browser)
    browser.find_element(By.ID, "theme").click()
    assert (max(background(browser)) < 60) != (max(before) < 60)
    browser.find_element(By.CSS_SELECTOR, ".legend button[data-name=tools]").click()
    chosen = browser.execute_script("return [...document.querySelectorAll('path.line.chosen')].map((line) => line.dataset.name)")
    assert len(chosen) > 4
    assert set(chosen) == {"tools"}
    chart = browser.find_element(By.CSS_SELECTOR, "svg.lines")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(browser).move_to_element_with_offset(chart, -60, 0).perform()
    tip = browser.find_element(By.CSS_SELECTOR, ".tip").text
    assert tip.startswith("step ")
    assert len(tip.splitlines()) >= 2
    assert browser.get_log("browser") == []
