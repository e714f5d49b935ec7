"""The page in a browser: texts stream, tokens of the draft are marked, speed and acceptance are told."""

import json
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, open_page
from servers import ANSWER, ask, complete, events, expected, server_thread, target

import speculative_mamba as sm
from speculative_mamba.serve import Engine
from speculative_mamba.serve.protocol import ServedModel

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
PAGE = (Path(sm.__file__).parent / "serve" / "page.html").read_text("utf-8")
browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

TEXT = "document.querySelector('article:last-of-type .answer').textContent"
MARKED = "[...document.querySelectorAll('article:last-of-type mark')].map(mark => mark.textContent).join('')"
FACTS = "document.querySelector('article:last-of-type .facts').innerText.replace(/\\n/g, ' ')"
ENDED = "document.querySelector('article:last-of-type')?.getAttribute('aria-busy') === 'false'"
CONNECTED = "document.getElementById('draft').textContent"


def test_it_is_served_as_it_is_and_may_load_nothing(url):
    reply = ask(f"{url}/")
    assert reply.status == 200 and reply.body.decode() == PAGE
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';") and "connect-src 'self';" in policy
    assert not re.search(r"https?://|//\w|@import|url\(|innerHTML|eval\(", PAGE), "nothing from elsewhere"


def fill(page, **fields):
    for name, value in fields.items():
        page.evaluate(f"document.getElementById({json.dumps(name)}).value = {json.dumps(value)}")


def send(page, text):
    page.evaluate("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")


@browser
def test_a_completion(url, tmp_path):
    """The text of ``generate``, with the tokens marked that the stream says are the draft's."""
    with open_page(url, tmp_path) as page:
        page.wait_for(CONNECTED)
        assert page.evaluate("document.title") == "builtin:target"
        fill(page, max_tokens="60", temperature="0")
        send(page, "She had not")
        page.wait_for(ENDED)
        assert page.evaluate(TEXT) == expected(tokens=60)
        choices = [chunk["choices"][0] for chunk in events(complete(url, max_tokens=60, stream=True))]
        assert page.evaluate(MARKED) == "".join(choice["text"] for choice in choices if choice.get("drafted"))
        details = complete(url, max_tokens=60).json["usage"]["completion_tokens_details"]
        accepted, rejected = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
        facts = page.evaluate(FACTS)
        assert facts.startswith("60 tokens ") and re.search(r" \d+ tokens/s ", facts) and " ms to the first" in facts
        assert f" {round(100 * accepted / (accepted + rejected))} % accepted" in facts
        assert f" {round(100 * accepted / 60)} % from the draft" in facts
        fill(page, max_tokens="9000")
        send(page, "<b>He</b>")
        page.wait_for(f"document.querySelectorAll('article').length === 2 && {ENDED}")
        assert "maximum context length" in page.evaluate(FACTS)
        assert page.evaluate("document.querySelector('article:last-of-type .said').textContent") == "<b>He</b>"
        assert page.evaluate("document.querySelector('[role=alert]').className") == "error"
        origins = "performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin)"
        assert set(page.evaluate(origins)) == {url}
        page.evaluate("document.getElementById('clear').click()")
        assert page.evaluate("document.querySelectorAll('article').length") == 0


@browser
def test_stop_and_a_key(tmp_path):
    """Stop frees the row; without the key there is a line that says so."""
    engine = Engine(target(), max_batch_size=1, max_length=10**5)
    with engine, server_thread(engine, ServedModel(target(), "alone", 10**5), api_key="secret") as url:
        with open_page(url, tmp_path) as page:
            page.wait_for("document.getElementById('empty').textContent.includes('API key')")
            assert page.evaluate("document.getElementById('settings-box').open")
            fill(page, key="secret", max_tokens="90000")
            page.evaluate("document.getElementById('key').dispatchEvent(new Event('change'))")
            page.wait_for(CONNECTED)
            assert page.evaluate(CONNECTED) == "without a draft"
            send(page, "She had not")
            page.wait_for("document.querySelector('.answer')?.textContent.length > 3")
            page.press("Escape")
            page.wait_for(ENDED)
            assert page.evaluate(FACTS).endswith("stopped") and page.evaluate(MARKED) == ""
        engine.close()
        assert engine.stats().requests == {"cancelled": 1}


@browser
def test_a_chat(chatty, tmp_path):
    """Turns are sent along."""
    with open_page(chatty, tmp_path) as page:
        page.wait_for(CONNECTED)
        assert page.evaluate("document.body.className") == "chat"
        fill(page, max_tokens="20")
        prompts = []
        for turn in range(2):
            send(page, "Hello")
            page.wait_for(f"document.querySelectorAll('article').length === {turn + 1} && {ENDED}")
            assert page.evaluate(TEXT) == ANSWER
            reply = ask(f"{chatty}/metrics").body.decode()
            prompts.append(float(re.search(r"^speculative_mamba_prompt_tokens_total (.*)$", reply, re.MULTILINE)[1]))
        assert prompts[1] - prompts[0] > prompts[0] + len(ANSWER)
