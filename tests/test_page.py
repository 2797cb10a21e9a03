"""The chat page: what it may do, and in a headless browser what it does.

The browser's tests are slow and need Chromium and its driver (Debian: `apt-get install chromium chromium-driver`).
"""

import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_serve
import torch
import uvicorn
from checks import ROOT
from tiny import make_model
from tiny_chat import VOCAB_SIZE

from serving.app import Service
from serving.page import HTML

tokenizer = test_serve.tokenizer

# ---------------------------------------------------------------- what it may do


@pytest.fixture
def page(tokenizer):
    """(status, headers, text) of the page."""
    with (
        serving(tokenizer, Service(api_key="secret")) as (url, _),  # the page itself needs no key
        urllib.request.urlopen(url, timeout=20) as response,
    ):
        return response.status, response.headers, response.read().decode()


def test_nothing_runs_but_its_own_script(page):
    status, headers, text = page
    assert (status, text, headers["Content-Type"]) == (200, HTML, "text/html; charset=utf-8")
    rules = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", rules["script-src"])
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_nothing_is_loaded_from_elsewhere_and_no_text_becomes_html():
    assert "//" not in re.sub(r"^//.*|\s// .*", "", HTML, flags=re.MULTILINE)
    assert not re.search(
        r"\bon\w+=|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|@import|url\(", HTML
    )


@pytest.mark.slow
def test_the_page_is_in_a_wheel(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="wheels are built by setuptools 77 or newer")
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "runs", "tests", "docs", "benchmarks", "*.safetensors", "build")
    shutil.copytree(ROOT, source, ignore=unwanted, symlinks=True)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert zipfile.ZipFile(wheel).read("serving/page.html").decode() == HTML


def test_only_the_page_needs_no_key(tokenizer):
    with serving(tokenizer, Service(api_key="secret")) as (url, _):
        for path in ("/page.html", "//", "/v1/models"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(url.rstrip("/") + path, timeout=20)
            assert refused.value.code == 401


# ---------------------------------------------------------------- in a browser

HOSTILE = (
    '</script><script>hacked()</script><img src=x onerror="hacked()"><svg onload=hacked()><b id=bold>&lt;b&gt;</b>'
)


class Script:
    """A model that writes what it is told: instead of its own next token that of a text, then the end."""

    def __init__(self, model, tokenizer):
        self.ids: list[int] = []
        self.seconds = 0.0
        self._tokenizer = tokenizer
        self._written = 0
        generate = model.generate

        def start(*args, **kwargs):
            self._written = 0
            return generate(*args, **kwargs)

        model.generate = start
        model.lm_head.register_forward_hook(self._replace)

    def answer(self, text: str, thoughts: str = "", seconds: float = 0.0, again: int = 1) -> None:
        """Say what the next answers are, and how long a token takes."""
        close = [self._tokenizer.convert_tokens_to_ids("</think>")] if thoughts else []
        encode = self._tokenizer.backend_tokenizer.encode
        thought, written = (encode(part, add_special_tokens=False).ids for part in (thoughts, text))
        self.ids = thought + close + written * again + [self._tokenizer.eos_token_id]
        self.seconds = seconds

    def _replace(self, module, args, logits):
        time.sleep(self.seconds)
        told = torch.full_like(logits, -30.0)
        told[..., self.ids[min(self._written, len(self.ids) - 1)]] = 30.0
        self._written += 1
        return told


@contextmanager
def serving(tokenizer, service: Service, load: list | None = None, context: int = 4096):
    """A server in this process -> (its address, what its model writes).

    Args:
        load: gets the function that loads the model; None loads it at once.
    """
    model = make_model("v3", vocab_size=VOCAB_SIZE, max_position_embeddings=context)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.do_sample = False
    script = Script(model, tokenizer)
    port = test_serve.free_port()
    server = uvicorn.Server(uvicorn.Config(service.app(), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    if load is None:
        service.attach(model, tokenizer)
    else:
        load.append(lambda: service.attach(model, tokenizer))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}/", script
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless browser."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no browser: chromium and chromedriver are not installed")
    with open_browser(program, driver, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@contextmanager
def open_browser(program: str, driver: str, profile: Path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield opened
    finally:
        opened.quit()


class Page:
    """The page in a browser, as a reader sees it."""

    def __init__(self, browser, url: str):
        self.browser = browser
        browser.set_window_size(1000, 800)
        browser.get_log("browser")
        browser.get(url)

    def find(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """The texts of the elements, also of those that are folded."""
        return self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def until(self, holds):
        """Wait for what holds."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 20, 0.05).until(lambda _: holds())

    def write(self, text: str) -> None:
        """Press the keys of a text; \n is Enter."""
        self.find("#input").send_keys(text)

    def ask(self, text: str) -> None:
        """Ask, and wait for the answer."""
        count = len(self.texts(".answer"))
        self.until(lambda: self.find("#input").is_displayed() and self.texts("#name") == ["deepseek"])
        self.write(text + "\n")
        self.until(lambda: len(self.texts(".answer")) == count + 1 and self.find("#send").is_displayed())

    def log(self) -> list[str]:
        """What the browser complained of."""
        return [entry["message"] for entry in self.browser.get_log("browser") if "401" not in entry["message"]]


@pytest.fixture(scope="module")
def server(tokenizer):
    with serving(tokenizer, Service()) as (url, script):
        yield url, script


@pytest.fixture
def open_page(browser, server):
    """(the page, what the model writes); nothing that the browser complains of is let pass."""
    opened = Page(browser, server[0])
    yield opened, server[1]
    assert opened.log() == []


@pytest.mark.slow
def test_a_chat(open_page):
    page, script = open_page
    script.answer("The door is open.")
    page.ask("Hello")
    assert page.texts(".question") == ["Hello"]
    assert page.texts(".answer > .text") == ["The door is open."]
    assert not page.find("details").is_displayed()
    assert f"{len(script.ids)} tokens · chat: " in page.texts(".under span")[0]
    page.ask("And now?")
    assert page.texts(".question") == ["Hello", "And now?"]
    page.find("#new").click()
    assert page.texts("article") == []
    assert page.find("#empty").is_displayed()
    assert page.browser.execute_script("return messages") == []


@pytest.mark.slow
def test_what_is_sent_is_the_chat(open_page):
    page, script = open_page
    page.browser.execute_script(
        "window.bodies = []; const f = fetch; fetch = (...a) => (bodies.push(a[1].body), f(...a))"
    )
    script.answer("one", "thoughts")
    page.find("#thinking").click()
    page.ask("first")
    script.answer("two")
    page.find("#thinking").click()
    page.ask("second")
    first, second = (page.browser.execute_script("return JSON.parse(bodies[arguments[0]])", i) for i in (0, 1))
    assert first["chat_template_kwargs"] == {"thinking": True}
    assert second["chat_template_kwargs"] == {"thinking": False}
    assert second["messages"] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second"},
    ]


@pytest.mark.slow
def test_thinking_is_folded(open_page):
    page, script = open_page
    script.answer("It is.", "Is the door open? 你好")
    page.find("#thinking").click()
    page.ask("Hello")
    assert page.texts(".answer > .text") == ["It is."]
    assert page.texts("details .text") == ["Is the door open? 你好"]
    assert page.find("summary").is_displayed()
    assert re.fullmatch(r"Thought for \d+ s", page.find("summary").text)
    assert not page.find("details .text").is_displayed()
    page.find("summary").click()
    assert page.find("details .text").is_displayed()


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [False, True])
def test_hostile_text_is_text(open_page, thinking):
    page, script = open_page
    page.browser.execute_script("window.hacked = () => { window.wasHacked = true }")
    script.answer(HOSTILE, HOSTILE if thinking else "")
    if thinking:
        page.find("#thinking").click()
    page.ask(HOSTILE)
    page.ask(HOSTILE)
    assert page.texts(".question .text") == [HOSTILE] * 2
    assert page.texts(".answer > .text") == [HOSTILE] * 2
    assert page.texts("details .text") == [HOSTILE if thinking else ""] * 2
    assert (
        page.browser.execute_script("return document.querySelectorAll('article :is(script, img, svg, b)').length") == 0
    )
    assert not page.browser.execute_script("return Boolean(window.wasHacked)")


@pytest.mark.slow
def test_a_hostile_error_and_name_are_text(browser, tokenizer):
    with serving(tokenizer, Service(name=HOSTILE)) as (url, _):
        page = Page(browser, url)
        page.browser.execute_script("window.hacked = () => { window.wasHacked = true }")
        page.until(lambda: page.texts("#name") == [HOSTILE])
        assert page.browser.title == HOSTILE
        page.browser.execute_script(f"model = {{id: {HOSTILE + 'x'!r}, max_model_len: 1}}".replace("</", "<\\/"))
        page.write("Hello\n")
        page.until(lambda: page.find("#notice").is_displayed())
        assert "<script>hacked()" in page.find("#notice").text
        assert not page.browser.execute_script("return Boolean(window.wasHacked)")
        page.log()  # the 404


@pytest.mark.slow
def test_the_browser_refuses_scripts_and_html_whatever_the_page_does(browser, server):
    page = Page(browser, server[0])
    attempt = (
        "window.hacked = () => { window.wasHacked = true };"
        "try { document.body.innerHTML = arguments[0]; return 'parsed' } catch (error) { return error.name }"
    )
    assert page.browser.execute_script(attempt, HOSTILE) == "TypeError"
    page.browser.execute_script(
        "const image = document.createElement('img'); image.setAttribute('src', 'http://127.0.0.1:9/x'); document.body.append(image)"
    )
    page.until(lambda: any("img-src" in entry for entry in page.log()))
    assert not page.browser.execute_script("return Boolean(window.wasHacked)")


@pytest.mark.slow
def test_the_keys(open_page):
    from selenium.webdriver.common.keys import Keys

    page, script = open_page
    script.answer("Yes.")
    page.until(lambda: page.texts("#name") == ["deepseek"])
    assert page.browser.switch_to.active_element.get_attribute("id") == "input"
    page.write("\n")
    page.write("  \n")
    assert page.texts(".question") == []  # nothing to say
    page.find("#input").clear()
    page.write("one" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "two")
    assert page.find("#input").get_attribute("value") == "one\ntwo"
    # Enter that ends a word of an input method sends nothing.
    page.browser.execute_script(
        "input.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert page.texts(".question") == []
    page.write("\n")
    page.until(lambda: page.texts(".answer > .text") == ["Yes."])
    assert page.texts(".question .text") == ["one\ntwo"]
    assert page.find("#input").get_attribute("value") == ""


@pytest.mark.slow
def test_stopping_keeps_what_there_is(open_page):
    page, script = open_page
    script.answer("word ", seconds=0.05, again=500)
    page.until(lambda: page.texts("#name") == ["deepseek"])
    page.write("Hello\n")
    page.until(lambda: len(page.texts(".answer > .text")[0]) > 10)
    assert not page.find("#send").is_displayed()
    page.write("next\n")  # is not sent while an answer is written, and not lost
    assert len(page.texts(".question")) == 1
    page.find("#stop").click()
    page.until(lambda: page.find("#send").is_displayed())
    kept = page.texts(".answer > .text")[0]
    assert "stopped" in page.texts(".under span")[0]
    time.sleep(0.5)
    assert page.texts(".answer > .text") == [kept]
    assert page.find("#input").get_attribute("value") == "next"
    script.answer("Good.")
    page.ask("")
    assert page.texts(".answer > .text") == [kept, "Good."]
    assert page.browser.execute_script("return messages.map(m => m.content)") == ["Hello", kept, "next", "Good."]


@pytest.mark.slow
def test_a_new_chat_ends_an_answer(open_page):
    page, script = open_page
    script.answer("word ", seconds=0.05, again=500)
    page.until(lambda: page.texts("#name") == ["deepseek"])
    page.write("Hello\n")
    page.until(lambda: len(page.texts(".answer > .text")[0]) > 10)
    page.find("#new").click()
    script.answer("Good.")
    page.ask("Again")
    assert page.texts("article > .text") == ["Again", "Good."]
    assert page.browser.execute_script("return messages.length") == 2


@pytest.mark.slow
@pytest.mark.parametrize("secure", [True, False], ids=["clipboard", "without a clipboard"])
def test_copying(open_page, secure):
    page, script = open_page
    script.answer(HOSTILE + "\n  你好")
    page.ask("Hello")
    if secure:
        page.browser.execute_cdp_cmd(
            "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        )
    else:
        page.browser.execute_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.find(".under button").click()
    page.until(lambda: page.find(".under button").text == "Copied")
    from selenium.webdriver.common.keys import Keys

    page.write(Keys.CONTROL + "v")
    assert page.find("#input").get_attribute("value") == HOSTILE + "\n  你好"


@pytest.mark.slow
def test_what_cannot_be_answered_is_said_and_the_question_stays(browser, server):
    page = Page(browser, server[0])
    page.until(lambda: page.texts("#name") == ["deepseek"])
    question = "word " * 5000
    page.browser.execute_script("input.value = arguments[0]; showState()", question)
    page.find("#send").click()
    page.until(lambda: "more tokens than" in page.find("#notice").text)
    assert page.texts("article") == []
    assert page.find("#input").get_attribute("value") == question


@pytest.mark.slow
def test_a_cut_answer_says_so(browser, tokenizer):
    with serving(tokenizer, Service(), context=64) as (url, script):
        page = Page(browser, url)
        script.answer("word ", again=100)
        page.ask("Hello")
        assert "cut off: no room for more tokens · " in page.texts(".under span")[0]
        assert "chat: 64 of 64" in page.texts(".under span")[0]
        assert page.log() == []


@pytest.mark.slow
def test_a_failing_answer_says_so(browser, tokenizer):
    service = Service()
    with serving(tokenizer, service) as (url, script):
        page = Page(browser, url)
        script.answer("word ", seconds=0.05, again=500)
        page.until(lambda: page.texts("#name") == ["deepseek"])
        page.write("Hello\n")
        page.until(lambda: len(page.texts(".answer > .text")[0]) > 10)
        service.stop()
        page.until(lambda: page.find("#send").is_displayed())
        assert "the server is stopping" in page.texts(".under span")[0]
        page.write("More\n")
        page.until(lambda: "the server is stopping" in page.find("#notice").text)
        assert page.find("#input").get_attribute("value") == "More"


@pytest.mark.slow
def test_the_key_is_asked_for_only_if_there_is_one(browser, server, tokenizer):
    page = Page(browser, server[0])
    page.until(lambda: page.texts("#name") == ["deepseek"])
    assert not page.find("#key-form").is_displayed()
    with serving(tokenizer, Service(api_key="secret")) as (url, script):
        page = Page(browser, url)
        page.until(lambda: page.find("#key").is_displayed())
        assert not page.find("#composer").is_displayed()
        page.find("#key").send_keys("wrong\n")
        page.until(lambda: page.find("#notice").is_displayed() and page.find("#key").is_displayed())
        page.find("#key").send_keys("secret\n")
        script.answer("Yes.")
        page.ask("Hello")
        assert not page.find("#notice").is_displayed()
        assert page.texts(".answer > .text") == ["Yes."]
        assert page.browser.execute_script("return localStorage.length + sessionStorage.length") == 0


@pytest.mark.slow
def test_a_model_that_is_being_loaded(browser, tokenizer):
    load: list = []
    with serving(tokenizer, Service(thinking=True), load) as (url, script):
        page = Page(browser, url)
        page.until(lambda: "being loaded" in page.find("#notice").text)
        page.write("Hello\n")
        assert page.texts(".question") == []
        load[0]()
        page.until(lambda: not page.find("#notice").is_displayed())
        assert page.find("#thinking").is_selected()  # as the server was started
        script.answer("Yes.", "Hm.")
        page.ask("")
        assert page.texts("details .text") == ["Hm."]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1000, 500])
def test_nothing_sticks_out(open_page, scheme, width, tmp_path):
    page, script = open_page
    emulated = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
    page.browser.set_window_size(width, 700)
    script.answer("x" * 600, "y" * 600)
    page.find("#thinking").click()
    page.ask("z" * 600)
    page.find("summary").click()
    assert page.browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert page.browser.execute_script("return document.documentElement.scrollHeight <= innerHeight")
    dark = page.browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 28)"
    assert dark == (scheme == "dark")
