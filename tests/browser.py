"""A headless Chromium for tests, driven through its remote-debugging pipe: standard library only.

The browser reads commands from file descriptor 3 and answers on 4, each a JSON text that ends in a NUL.
"""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find():
    """The browser's path, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of one browser; what it logs, throws and asks the network for is kept."""

    def __init__(self, width=1400, height=800):
        self.profile = tempfile.mkdtemp(prefix="ddpn-browser-")
        to_browser, from_browser = os.pipe(), os.pipe()
        # Descriptors 3 and 4 are the child's ends, whatever their numbers are here.
        command = f'exec "$0" "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                 f"--window-size={width},{height}", f"--user-data-dir={self.profile}",
                 "--remote-debugging-pipe"]  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", "-c", command, find(), *flags, "about:blank"],
            pass_fds=(to_browser[0], from_browser[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser[0])
        os.close(from_browser[1])
        self.out, self.incoming = to_browser[1], from_browser[0]
        self.buffer, self.count, self.session = b"", 0, None
        self.errors, self.requests, self.events = [], [], []
        try:
            self._attach()
        except Exception:
            self.close()
            raise

    def _attach(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, timeout=60, **params):
        """Send a command and wait for its answer."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        return self._until(lambda m: m.get("id") == self.count, timeout)["result"]

    def open(self, path, fragment="", timeout=60):
        """Load a file and wait until its scripts have run; gives the seconds that took."""
        self.call("Page.navigate", url="about:blank")  # else another fragment of the same file loads nothing
        self._until(lambda m: m.get("method") == "Page.loadEventFired", timeout)
        self.requests.clear()
        self.events.clear()
        start = time.perf_counter()
        self.call("Page.navigate", url=Path(path).resolve().as_uri() + fragment)
        if not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self._until(lambda m: m.get("method") == "Page.loadEventFired", timeout)
        return time.perf_counter() - start

    def run(self, script):
        """Evaluate JavaScript; gives its value."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise AssertionError(result["exceptionDetails"])
        return result["result"].get("value")

    def key(self, name, text=None):
        """Press and release a key."""
        extra = {"text": text} if text else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, **extra)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name)

    def type(self, words):
        for letter in words:
            self.key(letter, letter)

    def screenshot(self, path):
        import base64

        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        """Ask it to leave; end it if it does not."""
        try:
            self.session = None
            self.call("Browser.close", timeout=10)
            self.process.wait(10)
        except Exception:
            self.process.kill()
            self.process.wait()
        os.close(self.out)
        os.close(self.incoming)
        shutil.rmtree(self.profile, ignore_errors=True)

    def _until(self, wanted, timeout):
        deadline = time.monotonic() + timeout
        while True:
            while b"\0" in self.buffer:
                raw, _, self.buffer = self.buffer.partition(b"\0")
                message = json.loads(raw)
                self._note(message)
                if wanted(message):
                    if "error" in message:
                        raise RuntimeError(message["error"])
                    return message
            if not select.select([self.incoming], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {timeout} s")
            data = os.read(self.incoming, 1 << 20)
            if not data:
                raise RuntimeError("the browser has left")
            self.buffer += data

    def _note(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", str(params)))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif method == "Log.entryAdded":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if method:
            self.events.append(message)
