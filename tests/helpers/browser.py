"""A Chromium that tests steer through its DevTools."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def command(profile: Path, *more: str) -> list[str]:
    """A headless Chromium that reaches no network; skips where there is none, except in CI."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs a Chromium; .ci/run installs one")
        pytest.skip("no Chromium on this machine")
    return [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}",
        *more,
    ]  # fmt: skip


class Navigated(Exception):
    """The page that was asked is being left for another one."""


class Browser:
    """One tab of a headless Chromium, driven over its debugging socket."""

    def __init__(self, profile: Path) -> None:
        from websockets.sync.client import connect  # the tests without a browser need none

        self.profile = profile
        self.process = subprocess.Popen(
            command(profile, "--remote-debugging-port=0", "--window-size=1400,900"),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.errors: list[str] = []
        self.sent, self.session = 0, None
        try:
            port, path = self.until(self._address)
            self.socket = connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None)
            self._open_tab()
        except BaseException:
            self.process.kill()
            raise

    def _open_tab(self) -> None:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=1400, height=900, deviceScaleFactor=1, mobile=False)

    def _address(self) -> list[str] | None:
        file = self.profile / "DevToolsActivePort"
        lines = file.read_text().split() if file.is_file() else []
        return lines if len(lines) == 2 else None

    def until(self, ask: Callable[[], Any], seconds: float = 60) -> Any:
        """Wait for a true answer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                answer = ask()
            except Navigated:  # asked while one page gives way to the next
                answer = None
            if answer:
                return answer
            time.sleep(0.05)
        raise AssertionError(f"nothing after {seconds} s; errors: {self.errors}")

    def send(self, method: str, **params: Any) -> Any:
        """One command and its answer; complaints of the page that arrive meanwhile are kept."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                self.errors.append(json.dumps(answer["params"]))
            if answer.get("id") == self.sent:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise Navigated(answer)
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path: Path, address: str = "") -> None:
        """Go to a page and wait until it says that it is drawn."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=path.as_uri() + address)
        self.until(lambda: self.js("document.body?.dataset.ready"))

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def click(self, selector: str, times: int = 1) -> None:
        """A real click in the middle of an element."""
        x, y = self.js(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)

    def key(self, key: str) -> None:
        """One key, pressed and let go."""
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.send("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """A screenshot."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """End the browser."""
        try:
            self.session = None
            self.send("Browser.close")
            self.socket.close()
            self.process.wait(timeout=20)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield opened
    opened.close()


SELECTED = "[...document.querySelectorAll('.node.selected')].map(e => e.dataset.id)"
PANEL = "document.querySelector('#panel').textContent"
