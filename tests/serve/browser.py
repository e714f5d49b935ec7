"""A headless Chromium, told what to do through pipes, in the protocol of its developer tools."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Its pipes are descriptors 3 and 4, whatever else has these numbers here.
_START = "import os, sys; a, b = sys.argv[1:3]; os.dup2(int(a), 100); os.dup2(int(b), 101); os.dup2(100, 3); "
_START += "os.dup2(101, 4); os.execv(sys.argv[3], sys.argv[3:])"
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")


class Page:
    """One open page."""

    def __init__(self, to: int, reader: Iterator[bytes], session: str | None = None) -> None:
        self._to, self._reader, self._session, self._calls = to, reader, session, 0

    def call(self, method: str, **params: object) -> dict:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        for answer in map(json.loads, self._reader):
            if answer.get("id") == self._calls and answer.get("sessionId") == self._session:
                assert "error" not in answer, answer
                return answer["result"]
        raise EOFError("Chromium has gone")

    def evaluate(self, expression: str) -> object:
        """The value of an expression of JavaScript; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Until an expression of JavaScript is true; asked whenever the page has changed."""
        self.evaluate(
            f"new Promise(done => {{ const look = () => ({condition}) && done(); "
            "new MutationObserver(look).observe(document, "
            "{ subtree: true, childList: true, attributes: true, characterData: true }); look(); })"
        )

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text="\r" if key == "Enter" else "")


@contextmanager
def open_page(url: str, profile: Path, width: int = 900, height: int = 640) -> Iterator[Page]:
    """The page at ``url`` in a Chromium of its own. profile: a folder that it may fill."""
    (their_input, to), (back, their_output) = os.pipe(), os.pipe()
    flags = [*_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    browser = subprocess.Popen(
        [sys.executable, "-c", _START, str(their_input), str(their_output), CHROMIUM, *flags],
        pass_fds=(their_input, their_output), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(their_input)
    os.close(their_output)
    try:
        reader = _messages(back)
        whole = Page(to, reader)
        target = whole.call("Target.createTarget", url="about:blank")["targetId"]
        session = whole.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(to, reader, session)
        page.call("Page.enable")
        page.call("Page.navigate", url=url)
        page.wait_for("document.readyState === 'complete'")
        yield page
    finally:
        browser.kill()
        browser.wait()
        os.close(to)
        os.close(back)


def _messages(descriptor: int) -> Iterator[bytes]:
    rest = b""
    while part := os.read(descriptor, 2**16):
        *whole, rest = (rest + part).split(b"\0")
        yield from whole
