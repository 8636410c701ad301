"""A headless Chromium, spoken to by the DevTools protocol over two pipes: no driver, no port, no other package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe"),
)
ANSWER_S = 60.0
READ, WRITE = 3, 4  # where Chromium looks for the pipes


def chromium() -> str | None:
    """The browser of this machine."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@dataclass
class Page:
    """One open page. errors: of the console and of scripts. requests: addresses other than the page's own."""

    browser: Browser
    session: str
    address: str
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        return self.browser.send(method, params, self.session)

    def press(self, key: str) -> None:
        """One key, as a person presses it."""
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def size(self, width: int, height: int = 900) -> None:
        """The window, in CSS pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, *, scheme: str = "light", medium: str = "screen") -> None:
        """Light or dark, screen or print."""
        wanted = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=medium, features=wanted)

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def notice(self, method: str, params: dict[str, Any]) -> None:
        """Keep what an event says is wrong."""
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif method == "Network.requestWillBeSent":
            address = params["request"]["url"]
            if address != self.address and not address.startswith("data:"):
                self.requests.append(address)


class Browser:
    """A running browser with an empty profile."""

    def __init__(self, command: str, profile: Path) -> None:
        down_read, self._write = os.pipe()
        self._read, up_write = os.pipe()
        self._held, self._count, self._pages = b"", 0, dict[str, Page]()

        def place() -> None:
            high = [os.dup(fd) for fd in (down_read, up_write)] if {down_read, up_write} & {READ, WRITE} else []
            source, target = high or (down_read, up_write)
            os.dup2(source, READ)
            os.dup2(target, WRITE)

        self._process = subprocess.Popen(
            [command, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=place,
            pass_fds=(READ, WRITE),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down_read)
        os.close(up_write)

    def open(self, path: Path, width: int = 1600) -> Page:
        """A file in a page of its own, once it is loaded."""
        target = self.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session, path.resolve().as_uri())
        for domain in ("Runtime", "Log", "Network", "Page"):
            page.send(f"{domain}.enable")
        page.size(width)
        page.send("Page.navigate", url=page.address)
        page.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")
        assert page.run("location.href") == page.address
        return page

    def send(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        """One command; its answer. Events on the way go to their pages."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            page = self._pages.get(answer.get("sessionId", ""))
            if page is not None and "method" in answer:
                page.notice(answer["method"], answer["params"])
        raise AssertionError("unreachable")

    def _messages(self) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + ANSWER_S
        while True:
            while b"\0" in self._held:
                text, self._held = self._held.split(b"\0", 1)
                yield json.loads(text)
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser did not answer in {ANSWER_S:.0f} s"
            more = os.read(self._read, 1 << 16)
            assert more, "the browser ended"
            self._held += more

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._read)
        os.close(self._write)


@contextmanager
def browser(command: str, profile: Path) -> Iterator[Browser]:
    """A browser for as long as it is needed."""
    started = Browser(command, profile)
    try:
        yield started
    finally:
        started.close()
