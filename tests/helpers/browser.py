"""Headless Chromium that shows pages from disk, driven over its pipe, without a network port."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --remote-debugging-pipe"
PATIENCE = 60  # seconds


class Browser:
    """One page of a browser process. Use it in a `with` statement."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM
        read, commands = os.pipe()
        answers, write = os.pipe()

        def pipes() -> None:  # the browser reads from descriptor 3 and writes to 4
            first, second = os.dup(read), os.dup(write)
            os.dup2(first, 3)
            os.dup2(second, 4)

        argv = [CHROMIUM, *OPTIONS.split(), f"--user-data-dir={profile}", "about:blank"]
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(argv, stdout=null, stderr=null, close_fds=False, preexec_fn=pipes)
        os.close(read)
        os.close(write)
        self.commands, self.answers = os.fdopen(commands, "wb", 0), os.fdopen(answers, "rb", 0)
        self.number, self.session, self.received = 0, "", b""
        self.requests: list[str] = []
        pages = self.call("Target.getTargets")["targetInfos"]
        page = next(item["targetId"] for item in pages if item["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.commands.close()
        self.answers.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            pass
        assert "result" in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        """Return the next message; requests of the page are kept."""
        while b"\0" not in self.received:
            assert select.select([self.answers], [], [], PATIENCE)[0], "the browser does not answer"
            part = self.answers.read(1 << 20)
            assert part, "the browser has ended"
            self.received += part
        text, _, rest = self.received.partition(b"\0")
        self.received = rest
        message: dict[str, Any] = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def open(self, path: Path, width: int, dark: bool = False, height: int = 800) -> None:
        """Show a file on a screen of that width, in the light or dark scheme."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def screenshot(self) -> Image.Image:
        """Return a picture of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
