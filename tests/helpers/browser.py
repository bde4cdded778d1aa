"""A headless Chromium, driven over a pipe by its own protocol: https://chromedevtools.github.io/devtools-protocol/."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-extensions",
)


def program() -> str | None:
    """Chromium, or what COSPADI_CHROMIUM names; None where there is none."""
    return os.environ.get("COSPADI_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """One page. `events` are the protocol's, as they came."""

    def __init__(self, commands: Any, answers: Any) -> None:
        self._commands, self._answers, self._number, self._rest = commands, answers, 0, b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """The answer to one command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if self._session is None else {"sessionId": self._session}
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _read(self) -> Any:
        while b"\0" not in self._rest:
            part = os.read(self._answers.fileno(), 2**20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int, dark: bool, height: int = 900) -> None:
        """Show a file in a window of this width, and wait until it is there."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        narrow = width < 600
        self.call("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=narrow
        )  # fmt: skip
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        self.run("document.fonts.ready.then(() => new Promise(done => requestAnimationFrame(() => done(1))))")

    def run(self, script: str) -> Any:
        """What a script gives, or promises, as JSON has it."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key, down and up."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def printed(self) -> bytes:
        """The page as PDF."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])


@contextmanager
def opened(profile: Path) -> Iterator[Browser]:
    """A browser for as long as this block takes.

    Args:
        profile: an empty folder for its files.
    """
    name = program()
    assert name is not None
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    # The protocol's pipes are the file descriptors 3 and 4.
    shell = f'exec 3<&{command_read} 4>&{answer_write}; exec "$@"'
    words = ["bash", "-c", shell, "bash", name, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        words, pass_fds=(command_read, answer_write), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(command_read)
    os.close(answer_write)
    try:
        with os.fdopen(command_write, "wb") as commands, os.fdopen(answer_read, "rb", buffering=0) as answers:
            browser = Browser(commands, answers)
            yield browser
            browser._session = None
            browser.call("Browser.close")
    finally:
        process.terminate()
        process.wait()
