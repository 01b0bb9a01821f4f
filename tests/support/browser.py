"""A real headless Chromium, spoken to over a pipe: no driver, no port, nothing to install but the browser."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
PATIENCE = 60.0
"""Seconds that an answer may take: other tests run beside this one."""
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe", "--hide-scrollbars",
)  # fmt: skip


def chromium() -> str:
    """Where the browser is; without one the test is skipped and says why."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium (Debian: apt-get install chromium)")
    return found


class Page:
    """One page: what a test asks of it."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol."""
        return self._browser.call(method, self._session, **parameters)

    def go(self, url: str) -> None:
        """Open an address anew, also one that differs after # only."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)

    def ask(self, expression: str) -> Any:
        """The value of an expression, awaited; an exception on the page is one here."""
        told = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise AssertionError(told["exceptionDetails"].get("exception", {}).get("description", told))
        return told["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true; its value."""
        last: Any = None
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(AssertionError):  # the page is not there yet
                if last := self.ask(expression):
                    return last
            time.sleep(0.05)
        raise AssertionError(
            f"never came true: {expression} (last: {last!r}; {self.ask('document.body.innerText')[:500]})"
        )

    def press(self, key: str) -> None:
        """A key on what has the focus."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode={"Enter": 13, "Tab": 9}.get(key, 0), **text)  # fmt: skip

    def sized(self, width: int, height: int) -> None:
        """As wide as a phone or a desk."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def picture(self, path: Path) -> None:
        """A screenshot of the whole page."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=False)
        path.write_bytes(base64.b64decode(told["data"]))


class Browser:
    """The process and its pipe."""

    def __init__(self, process: subprocess.Popen[bytes], out: int, back: int) -> None:
        self._process, self._out, self._back = process, out, back
        self._number, self._rest = 0, b""
        self.told: list[dict[str, Any]] = []
        """Events: what pages logged, threw or asked of the network."""

    def call(self, method: str, session: str = "", **parameters: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.told.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], PATIENCE)
            part = os.read(self._back, 1 << 20) if ready else b""
            assert part, "the browser is gone or hangs"
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(first)
        return answer

    def page(self) -> Page:
        """A new page whose errors and requests are noted in ``told``."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        return page

    def complaints(self) -> list[str]:
        """Errors that pages logged or threw, and addresses other than files that they asked for."""
        found = []
        for event in self.told:
            method, told = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"].get("exception", {}).get("description", told)))
            elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
                found.append(told["entry"]["text"])
            elif method == "Network.requestWillBeSent":
                url = told["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:", "about:")):
                    found.append(f"asked for {url[:100]}")
            elif method == "Page.javascriptDialogOpening":
                found.append(f"a dialog: {told['message']}")
        return found


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    """A browser with a profile of its own, ended afterwards."""
    path = chromium()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        (reads, out), (back, writes) = os.pipe(), os.pipe()
        # the browser wants 3 and 4, which may be taken here: away from them first
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 16) for fd in (reads, writes)]

        def lay() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        process = subprocess.Popen(
            [path, *_FLAGS, f"--user-data-dir={home}", "about:blank"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, preexec_fn=lay, pass_fds=(3, 4), start_new_session=True,
            env={**os.environ, "HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home},
        )  # fmt: skip
        for fd in (reads, writes, *high):
            os.close(fd)
        try:
            yield Browser(process, out, back)
        finally:
            with contextlib.suppress(OSError):
                os.write(out, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(out)
            os.close(back)
