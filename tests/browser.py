"""Headless Chromium for tests, over W3C WebDriver with nothing but the standard library."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class BrowserError(Exception):
    """What WebDriver answered instead of a value: its error code first."""


class Browser:
    """One WebDriver session."""

    def __init__(self, address: str, capabilities: dict[str, Any]):
        self._root = f"{address}/session"
        session = _call("POST", self._root, {"capabilities": {"alwaysMatch": capabilities}})
        self._root += f"/{session['sessionId']}"

    def command(self, method: str, path: str, **body: Any) -> Any:
        """The value of a WebDriver command on this session."""
        return _call(method, self._root + path, body if method == "POST" else None)

    def open(self, path: Path) -> None:
        """Load a local file."""
        self.command("POST", "/url", url=path.as_uri())

    def run(self, script: str, *args: Any) -> Any:
        """What a script returns; it is not subject to the page's policy."""
        return self.command("POST", "/execute/sync", script=script, args=list(args))

    def click(self, selector: str) -> None:
        """A trusted click on the first element that matches."""
        found = self.command("POST", "/element", using="css selector", value=selector)
        self.command("POST", f"/element/{found[ELEMENT]}/click")

    def press(self, key: str) -> None:
        """A trusted key press where the focus is; keys have WebDriver's code points."""
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        self.command("POST", "/actions", actions=[keyboard])

    def log(self, kind: str) -> list[dict[str, Any]]:
        """The entries of the log "browser" or "performance" since the last call."""
        return self.command("POST", "/se/log", type=kind)

    def requests(self) -> list[str]:
        """Every URL asked for since the last call, data: URIs left out."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        requests = [
            message["params"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        urls = [r["request"]["url"] for r in requests if not _own(r["documentURL"])]
        return [url for url in urls if not url.startswith("data:")]

    def has_dialog(self) -> bool:
        """Whether alert(), confirm() or prompt() is open."""
        try:
            self.command("GET", "/alert/text")
        except BrowserError as error:
            if str(error).startswith("no such alert"):
                return False
            raise
        return True

    def devtools(self, method: str, **params: Any) -> Any:
        """The answer of a DevTools command."""
        return self.command("POST", "/goog/cdp/execute", cmd=method, params=params)

    def screenshot(self, path: Path, width: int, scheme: str = "light") -> None:
        """A PNG of the whole page at a width in CSS pixels, "light" or "dark"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A fresh browser; where there is none the test fails, or skips if CMKIT_NO_BROWSER=1."""
    if os.environ.get("CMKIT_NO_BROWSER") == "1":
        pytest.skip("CMKIT_NO_BROWSER=1: no test that needs Chromium is run")
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        pytest.fail(
            f"{' and '.join(missing)} not found: apt-get install chromium chromium-driver,"
            " or set CMKIT_NO_BROWSER=1 to skip these tests"
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, _driver() as address:
        options = {"binary": shutil.which("chromium"), "args": _flags(profile)}
        browser = Browser(
            address,
            {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
                "unhandledPromptBehavior": "ignore",
            },
        )
        try:
            yield browser
        finally:
            browser.command("DELETE", "")


def _own(page: str) -> bool:
    """Whether a page is the browser's own, such as the one that it starts with."""
    return page.startswith(("chrome:", "chrome-untrusted:", "chrome-search:"))


def _flags(profile: str) -> list[str]:
    return [*FLAGS, f"--user-data-dir={profile}"]


@contextlib.contextmanager
def _driver() -> Iterator[str]:
    """The address of a chromedriver on a free port."""
    command = ["chromedriver", "--port=0"]
    quiet = {"stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, **quiet) as process:
        try:
            for line in process.stdout:
                if "started successfully on port" in line:
                    yield f"http://127.0.0.1:{line.split()[-1].rstrip('.')}"
                    break
            else:
                pytest.fail("chromedriver ended before it was ready")
        finally:
            process.terminate()


def _call(method: str, url: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with _DIRECT.open(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        with error:
            value = json.load(error)["value"]
        raise BrowserError(f"{value['error']}: {value['message']}") from None
