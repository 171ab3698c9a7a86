"""The page in a real browser: Debian's Chromium, headless, driven by the keyboard. No request leaves this machine."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_models import tiny_model, tiny_tokenizer

from quarkrl.models.conditioning import Conditioning

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of three quantiles with a chat template, and its reference."""
    directory = tmp_path_factory.mktemp("page")
    tokenizer = tiny_tokenizer(pad="own", chat_template=True)
    tiny_model("gpt2", tokenizer).save_pretrained(directory / "before")
    tokenizer.save_pretrained(directory / "before")
    policy = tiny_model("gpt2", tokenizer)
    conditioning, extended = Conditioning.add_to(tokenizer, policy, 3)
    policy.save_pretrained(directory / "final")
    conditioning.steer_tokenizer(extended).save_pretrained(directory / "final")
    rewards = [{"name": "brevity", "scale": 100}]
    conditioning.save(directory / "final", reference={"name": str(directory / "before")}, rewards=rewards)
    (directory / "prompts.txt").write_text("You are\nIn the end\n", encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def server(model):
    """The address of `quarkrl play`, which ends by Ctrl-C with exit code 0 and without a word."""
    command = [sys.executable, "-m", "quarkrl", "play", "final", "--no_open", "--prompts", "prompts.txt"]
    process = subprocess.Popen([*command, "--reward", "brevity"], cwd=model, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if address := re.match(r"(http://127\.0\.0\.1:\d+/)", line):
            yield address[1]
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and not rest.strip(), [*lines, rest]


@pytest.fixture
def open_page(browser, server):
    """Opens pages in contexts of their own; afterwards no request has been sent to another address."""
    foreign, contexts = [], []

    def open_(path: str = "", **context):
        contexts.append(browser.new_context(**context))
        contexts[-1].route(re.compile(f"^(?!{re.escape(server)}|data:|blob:)"), lambda route: refuse(route))
        page = contexts[-1].new_page()
        page.goto(server + path)
        page.get_by_label("Prompt", exact=True).wait_for()
        return page

    def refuse(route):
        foreign.append(route.request.url)
        route.abort()

    yield open_
    for context in contexts:
        context.close()
    assert foreign == []


def finished(page, columns: int) -> list[str]:
    """Wait for so many finished columns; return their texts."""
    page.wait_for_function(
        f"document.querySelectorAll('.q-column').length == {columns} && !document.querySelector('.q-waiting')"
    )
    return page.locator(".q-column").all_inner_texts()


def focus(page, label: str) -> None:
    """Press Tab until the element with a label has the focus."""
    name = "document.activeElement.innerText || document.activeElement.parentElement.innerText || ''"
    for _ in range(40):
        if page.evaluate(name).strip() == label:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {label}")


def test_the_page_works_with_the_keyboard_alone_and_is_restored_by_its_address(open_page):
    page = open_page()
    page.keyboard.type("You are")
    page.keyboard.press("Enter")
    before, best, worst = finished(page, 3)
    assert before.startswith("before") and best.startswith("best") and worst.startswith("worst")
    assert all(len(re.findall(r"brevity \d\.\d\d", text)) == 4 for text in (before, best, worst))

    focus(page, "1")
    page.keyboard.press("Space")
    texts = finished(page, 4)
    assert texts[2].startswith("quantile 1") and [texts[0], texts[1], texts[3]] == [before, best, worst]
    focus(page, "Generate")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?prompt=You+are&quantile=1")

    shared = open_page(page.url.rsplit("/", 1)[1])
    assert finished(shared, 4) == texts
    assert shared.get_by_label("Prompt", exact=True).input_value() == "You are"


def test_two_tabs_are_answered(open_page):
    tabs = [open_page(f"?prompt=tab+{number}") for number in (1, 2)]
    assert "tab 1" in finished(tabs[0], 3)[0] and "tab 2" in finished(tabs[1], 3)[0]


def test_errors_are_one_line_on_the_page(open_page):
    page = open_page("?temperature=warm")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text() == "address of the page: temperature 'warm': must be a number."
    page.get_by_label("Prompt", exact=True).press("Enter")
    page.wait_for_function("document.querySelector('[role=alert]')?.innerText.startsWith('prompt: must not be empty')")
    page.get_by_label("Prompt", exact=True).fill("a" * 300)
    page.get_by_label("Prompt", exact=True).press("Enter")
    page.wait_for_function("document.querySelector('[role=alert]')?.innerText.startsWith('prompt: must have at most')")
    assert page.locator(".q-card").count() == 0


def test_a_held_out_prompt_is_chosen_and_a_message_is_answered(open_page):
    page = open_page()
    page.get_by_text("In the end", exact=True).click()
    page.get_by_label("Chat: the prompt is a message").check()
    page.get_by_role("button", name="Generate").click()
    finished(page, 3)
    assert page.locator(".q-message").all_inner_texts() == ["In the end"] * 3
    assert "In the end" not in page.locator(".q-card").first.inner_text()  # An answer, not a continuation.
    page.wait_for_url("**/?prompt=In+the+end&chat=True")


def say(page, message: str) -> list[str]:
    """Answer with the keyboard; return the texts of the three columns."""
    page.get_by_label("Next message").focus()
    page.keyboard.type(message)
    page.keyboard.press("Enter")
    page.wait_for_function(
        f"[...document.querySelectorAll('.q-column')].every(c => c.innerText.includes({message!r}))"
        " && document.querySelector('#q-reply textarea').value == ''"
    )
    return finished(page, 3)


def test_a_conversation_goes_on_is_restored_by_its_address_and_starts_again(open_page):
    page = open_page("?prompt=hello&chat=True&max_new_tokens=3")
    first = finished(page, 3)
    answers = [column.locator(".q-card p").first.inner_text() for column in page.locator(".q-column").all()]
    second = say(page, "and then")
    assert [text.count("brevity") for text in first + second] == [4] * 3 + [1 + 4] * 3
    kept = [column.locator(".q-card p").first.inner_text() for column in page.locator(".q-column").all()]
    assert kept == answers
    texts = say(page, "so")
    assert [text.count("brevity") for text in texts] == [1 + 1 + 4] * 3
    assert page.evaluate("document.activeElement.matches('#q-reply textarea')")
    tops = page.evaluate(
        "[...document.querySelectorAll('.q-message')].map(m => Math.round(m.getBoundingClientRect().top))"
    )
    assert len(tops) == 9 and len({*tops}) == 3  # Answers to one message are beside each other.
    bottom = page.evaluate("document.querySelector('#q-reply').getBoundingClientRect().bottom - innerHeight")
    assert bottom <= 1  # The box for the next message is in the window.

    page.wait_for_url("**/?prompt=hello&replies=**")
    shared = open_page(page.url.rsplit("/", 1)[1])
    assert finished(shared, 3) == texts

    page.keyboard.type("x" * 120)  # Too long for the context of 128 tokens.
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('[role=alert]')?.innerText.startsWith('conversation: must have at')")
    assert finished(page, 3) == texts and page.get_by_label("Next message").input_value() == "x" * 120

    focus(page, "Start again")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "!document.querySelector('.q-column') && document.activeElement.matches('#q-prompt textarea')"
    )
    assert page.url.endswith("/") and page.get_by_label("Prompt", exact=True).input_value() == ""
    assert page.get_by_label("Next message").count() == page.get_by_role("alert").count() == 0


@pytest.mark.parametrize("look", [{"viewport": {"width": 390, "height": 844}}, {"color_scheme": "dark"}], ids=str)
def test_the_page_fits_a_phone_and_follows_the_colour_scheme(open_page, look):
    page = open_page("?prompt=You+are", **look)
    finished(page, 3)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    lefts = page.evaluate("[...document.querySelectorAll('.q-column')].map(c => c.getBoundingClientRect().left)")
    assert len({*lefts}) == (1 if "viewport" in look else 3)
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (brightness < 60) == ("color_scheme" in look)
