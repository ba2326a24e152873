"""A server with the pack and a headless Chromium that shows its page, for tests of what a user would see.

Chromium is driven through its own debugging protocol over aiohttp, which the host requires anyway.
"""

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
PLACES = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
          "/Applications/Chromium.app/Contents/MacOS/Chromium",
          "C:/Program Files/Google/Chrome/Application/chrome.exe",
          "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--window-size=1280,900", "--remote-debugging-port=0")
SETTINGS = {"Comfy.TutorialCompleted": True}  # else a new user is greeted with a dialog


def find_chromium():
    return next((path for path in map(shutil.which, NAMES) if path), None) or next(
        (path for path in PLACES if Path(path).is_file()), None)


class Server:
    """The host's own server with this pack alone, and folders of its own."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = Path(folder)
        user = self.folder / "user" / "default"
        user.mkdir(parents=True)
        (user / "comfy.settings.json").write_text(json.dumps(SETTINGS))
        self.log = self.folder / "server.log"
        command = [sys.executable, str(Path(__file__).with_name("host.py")), "--serve", str(self.port),
                   "--files", str(self.folder)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            self.wait()
        except BaseException:
            self.close()
            raise

    def wait(self, seconds=180):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                return self.get("/system_stats")
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"The server did not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    def read(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def get(self, path):
        return json.loads(self.read(path))

    def close(self):
        self.process.terminate()
        self.process.wait(30)


class Browser:
    """One page in a headless Chromium. `console` collects what it reports as errors."""

    def __init__(self, executable, url):
        self.console = []
        self.profile = tempfile.mkdtemp(prefix="steer-chromium-")
        self.process = subprocess.Popen([executable, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.loop = asyncio.new_event_loop()
        try:
            self.loop.run_until_complete(self._open(url))
        except BaseException:
            self.close()
            raise

    def evaluate(self, expression, seconds=60):
        """The JSON value of a JavaScript expression, awaited if it is a promise."""
        return self.loop.run_until_complete(asyncio.wait_for(self._evaluate(expression), seconds))

    def wait(self, expression, seconds=60):
        deadline = time.monotonic() + seconds
        while not self.evaluate(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(f"After {seconds} s still not true in the page: {expression}")
            time.sleep(0.1)

    def screenshot(self):
        result = self.loop.run_until_complete(self._send("Page.captureScreenshot", format="png"))
        return result["data"]

    async def _open(self, url):
        port_file = Path(self.profile) / "DevToolsActivePort"
        deadline = time.monotonic() + 30
        while not (port_file.is_file() and port_file.read_text().count("\n")):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError("Chromium did not open its debugging port.")
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(target for target in await answer.json() if target["type"] == "page")
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        self.count = 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._send(f"{domain}.enable")
        await self._send("Page.navigate", url=url)

    async def _send(self, method, **params):
        self.count += 1
        number = self.count
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = json.loads((await self.socket.receive()).data)
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._note(message.get("method"), message.get("params"))

    def _note(self, event, data):
        if event == "Runtime.consoleAPICalled" and data["type"] in ("error", "assert"):
            self.console.append(" ".join(str(a.get("value", a.get("description"))) for a in data["args"]))
        elif event == "Runtime.exceptionThrown":
            details = data["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Log.entryAdded" and data["entry"]["level"] == "error":
            self.console.append(f"{data['entry']['text']} {data['entry'].get('url', '')}")

    async def _evaluate(self, expression):
        kept = f"globalThis.awaited = ({expression})"  # a promise that nobody holds may be collected before it is done
        result = await self._send("Runtime.evaluate", expression=kept, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def close(self):
        if hasattr(self, "session"):
            self.loop.run_until_complete(self.session.close())
        self.loop.close()
        self.process.terminate()
        self.process.wait(30)
        shutil.rmtree(self.profile, ignore_errors=True)
