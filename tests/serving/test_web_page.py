"""The page in headless Chromium: it writes, shows what was likely, stops, and fits a phone and the dark."""

import os
import shutil
from contextlib import contextmanager

import pytest
from running_server import running

webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
SECONDS = 60


@contextmanager
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    if os.geteuid() == 0:  # Chromium's sandbox does not run as root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Page(made)
    finally:
        made.quit()


class Page:
    """The page in a browser."""

    def __init__(self, browser) -> None:
        self.browser = browser

    def open(self, server) -> None:
        self.browser.get(f"http://127.0.0.1:{server.port}/")

    def __getitem__(self, name: str):
        return self.browser.find_element(By.ID, name)

    def all(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait_for(self, condition) -> None:
        WebDriverWait(self.browser, SECONDS, 0.05).until(lambda _: condition())

    def run(self, script: str, *arguments):
        return self.browser.execute_script(script, *arguments)

    def set(self, **values) -> None:
        for name, value in values.items():
            self.run(
                "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
                self[name],
                str(value),
            )

    def is_idle(self) -> bool:
        return self["generate"].is_enabled() and not self["stop"].is_enabled()

    def written(self) -> str:
        return self.run("return [...document.querySelectorAll('.token')].map((token) => token.textContent).join('')")

    def mistakes(self) -> list:
        return [entry for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def browser():
    with chromium() as made:
        yield made


@pytest.fixture
def page(browser, server):
    browser.open(server)
    browser.wait_for(lambda: "story" in browser["model"].text)
    yield browser
    assert browser.mistakes() == []


def generate(page, **values) -> None:
    page.set(**values)
    page["generate"].click()
    page.wait_for(lambda: page.is_idle() and page["status"].get_attribute("textContent").startswith("Done"))


def test_it_writes_what_the_api_writes_with_a_tint_for_every_token(page, server):
    generate(page, prompt="The king", seed=5, max_tokens=24, temperature=0.7)
    options = {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5}
    wanted = server.complete(prompt="The king", max_tokens=24, logprobs=0, **options).json["choices"][0]
    assert page.written() == wanted["text"]
    assert page["tokens"].text.startswith("The king")
    tints = page.run(
        "return [...document.querySelectorAll('.token')].map((t) => Number(t.style.getPropertyValue('--surprise')))"
    )
    surprises = [min(1, -score / 0.6931 / 10) for score in wanted["logprobs"]["token_logprobs"]]
    assert tints == pytest.approx(surprises, abs=2e-3)
    assert "24 tokens" in page["stats"].text and "tokens/s" in page["stats"].text and "seed 5" in page["stats"].text


def test_alternatives_by_keyboard_and_by_pointer(page):
    generate(page, seed=5, max_tokens=12)
    page.run("arguments[0].focus()", page["tokens"])
    page["tokens"].send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    active = page["tokens"].get_attribute("aria-activedescendant")
    assert page[active].get_attribute("aria-describedby") == "alternatives"
    assert page[active].get_attribute("aria-selected") == "true" and "%" in page[active].get_attribute("aria-label")
    assert 5 <= len(page.all(".alternative")) <= 6 and len(page.all(".alternative.chosen")) == 1
    page["tokens"].send_keys(Keys.ESCAPE)
    assert not page["alternatives"].is_displayed()
    last = page.all(".token")[-1]
    webdriver.ActionChains(page.browser).move_to_element(last).perform()
    page.wait_for(lambda: page["alternatives"].is_displayed())
    assert len(page.all('[aria-selected="true"]')) == 1 and last.get_attribute("aria-selected") == "true"


def test_the_stop_button_and_escape_end_it_on_the_server_too(page, server):
    for stop in (lambda: page["stop"].click(), lambda: page["prompt"].send_keys(Keys.ESCAPE)):
        before = server.metric("vllm:request_success_total", finished_reason="abort")
        server.brake.on()
        page.set(max_tokens=400, temperature=0)
        page["prompt"].send_keys(Keys.CONTROL, Keys.ENTER)
        page.wait_for(lambda: page["stop"].is_enabled() and server.async_engine._requests)
        stop()
        page.wait_for(lambda: page.is_idle() and page["stats"].text.endswith("stopped"))
        server.brake.off()
        server.wait_for(lambda b=before: server.metric("vllm:request_success_total", finished_reason="abort") == b + 1)


def test_continue_goes_on_from_what_was_written(page):
    generate(page, prompt="The king", seed=5, max_tokens=6)
    first = page.written()
    page["continue"].click()
    page.wait_for(lambda: page.is_idle() and page["prompt"].get_attribute("value") == "The king" + first)
    page.wait_for(lambda: page["status"].get_attribute("textContent").startswith("Done"))
    assert page["tokens"].text.startswith(("The king" + first).strip())
    page["prompt"].send_keys(" of")  # what was written belongs to another prompt now
    assert not page["continue"].is_enabled()
    page["prompt"].send_keys(Keys.BACKSPACE * 3)
    assert page["continue"].is_enabled()


def test_examples_and_reset(page):
    example = page.all(".example")[1]
    example.click()
    assert page["prompt"].get_attribute("value") == example.text
    page.set(temperature=2)
    page.all("button[type=reset]")[0].click()
    page.wait_for(lambda: page["temperature"].get_attribute("value") == "0.8")
    assert page["prompt"].get_attribute("value") == example.text
    assert page.all('output[for="temperature"]')[0].text == "0.8"


def test_text_is_text_and_errors_are_reported(page):
    generate(page, prompt="<img src=x onerror=document.title='bad'><b>bold</b>", max_tokens=2)
    assert page["tokens"].text.startswith("<img src=x") and not page.all("#tokens img, #tokens b")
    assert page.browser.title == "opt_megatron"
    page.set(prompt="word " * 600)
    page["generate"].click()
    page.wait_for(lambda: page["error"].is_displayed())
    assert "has 60" in page["error"].text and "positions" in page["error"].text and page.is_idle()
    assert not page["tokens"].is_displayed() and page["empty"].is_displayed()
    page.browser.get_log("browser")  # Chromium notes the answer's status


def test_a_connection_that_ends_too_soon_is_reported(page):
    page.run(
        "const plain = fetch; window.fetch = async (url, options) => { window.fetch = plain;"
        " const text = await (await plain(url, options)).text(); return new Response(text.split('data: [DONE]')[0]); }"
    )
    page.set(max_tokens=3)
    page["generate"].click()
    page.wait_for(lambda: page["error"].is_displayed())
    assert "the connection ended before" in page["error"].text and page.is_idle() and page.written()


def test_nothing_comes_from_elsewhere_and_everything_has_a_name(page, server):
    names = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert names and all(name.startswith(f"http://127.0.0.1:{server.port}/") for name in names)
    answer = server.request("GET", "/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    unnamed = [
        element.get_attribute("outerHTML")
        for element in page.all("button, input, textarea, [role=listbox], fieldset")
        if element.is_displayed() and not element.accessible_name
    ]
    assert unnamed == []


def test_a_phones_width_and_the_dark(page):
    generate(page, prompt="Once upon a time " + "a" * 300, max_tokens=30, seed=5)
    try:
        for width in (320, 390):
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
            page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            page.run("document.querySelector('details').open = true")
            assert page.run("return document.documentElement.scrollWidth") == width
        light = page.run("return getComputedStyle(document.body).backgroundColor")
        scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        assert page.run("return getComputedStyle(document.body).backgroundColor") != light
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_key_is_asked_for_and_used(alone, browser):
    with running(alone, api_key="s3cret") as server:
        browser.open(server)
        browser.wait_for(lambda: browser["key"].is_displayed())
        assert browser["model"].text == "a key is needed"
        browser["key"].send_keys("secret")
        browser["key-use"].click()
        browser.wait_for(lambda: browser["model"].text == "this key is not the server's")
        browser["key"].clear()
        browser["key"].send_keys("s3cret", Keys.ENTER)
        browser.wait_for(lambda: "story" in browser["model"].text)
        assert not browser["key"].is_displayed()
        generate(browser, max_tokens=3)
        assert len(browser.all(".token")) == 3
        browser.browser.get_log("browser")
