"""A page in headless Chromium, driven over the DevTools protocol: real pointer, real keys, real console.

with Browser(tmp_path) as browser:
    browser.open(path, width=360, dark=True)
    browser.run("document.title")              # the value of an expression
    browser.errors, browser.requests           # what the page has caused
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
from pathlib import Path

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --remote-debugging-pipe"
)
KEYS = {name: {"windowsVirtualKeyCode": code} for name, code in
        {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}.items()}  # fmt: skip
KEYS["Enter"]["text"] = "\r"  # Without it, Enter does not click.
SECONDS = 60  # the longest wait for a message


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """Chromium with one tab. Requests and answers are JSON, each with a NUL byte behind it, on two pipes."""

    def __init__(self, folder: Path):
        self.folder, self.number, self.session, self.rest = folder, 0, None, b""
        self.errors: list[str] = []  # texts of the console, exceptions, dialogs
        self.requests: list[str] = []  # addresses

    def __enter__(self) -> "Browser":
        ours = [os.pipe(), os.pipe()]
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (ours[0][0], ours[1][1])]

        def place() -> None:  # Chromium reads from 3 and writes to 4.
            os.dup2(theirs[0], 3)
            os.dup2(theirs[1], 4)

        call = [chromium(), *FLAGS.split(), f"--user-data-dir={self.folder}/user", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(
            call, preexec_fn=place, pass_fds=(3, 4), start_new_session=True, **quiet
        )  # fmt: skip
        for fd in (*theirs, ours[0][0], ours[1][1]):
            os.close(fd)
        self.input, self.output = ours[0][1], ours[1][0]
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.input)
        os.close(self.output)

    def call(self, method: str, **parameters) -> dict:
        """Send a command and return its result; events that come before it are noted."""
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters}
        request |= {"sessionId": self.session} if self.session else {}
        os.write(self.input, json.dumps(request).encode() + b"\0")
        while (message := self.read()).get("id") != self.number:
            pass
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

    def read(self) -> dict:
        """The next message of the browser; an event is noted before it is returned."""
        while b"\0" not in self.rest:
            ready, *_ = select.select([self.output], [], [], SECONDS)
            assert ready, f"Chromium has sent nothing for {SECONDS} seconds"
            block = os.read(self.output, 1 << 20)
            assert block, "Chromium has ended"
            self.rest += block
        raw, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(raw)
        method, found = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(found["exceptionDetails"]))
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("warning", "error"):
            self.errors.append(found["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(str(found["args"]))
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(found["message"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        return message

    def open(self, page: Path | str, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file or an address in a window of this width, and wait until it is complete."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while self.read().get("method") != "Page.loadEventFired":
            pass

    def run(self, expression: str):
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def point(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **KEYS.get(key, {}))

    def picture(self, path: Path) -> None:
        """A PNG of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))
