"""Open a page in headless Chromium and fail on everything that a browser complains about.

    python tests/browser/check_page.py report.html [--pictures DIR]

Each page is opened wide, narrow (400 px) and dark. It must cause no error or warning in the console and no request, have
nothing wider than the window, and show every image. Exit codes: 0 fine, 1 complaints, 4 no Chromium. The script speaks
the browser's DevTools protocol over two pipes.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
VIEWS = {"wide": (1280, False), "narrow": (400, False), "dark": (1280, True), "dark-narrow": (400, True)}
TIMEOUT = 60.0
PROBE = """JSON.stringify({
  wide: [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className).slice(0, 5),
  scroll: document.documentElement.scrollWidth - innerWidth,
  broken: [...document.images].filter(e => !e.complete || !e.naturalWidth).length,
  unnamed: [...document.querySelectorAll('svg')].filter(e => !e.querySelector(':scope > title')).length,
  headless: [...document.querySelectorAll('table')].filter(e => !e.querySelector('th[scope=col]')).length,
  charts: document.querySelectorAll('svg').length, pictures: document.images.length,
  tables: document.querySelectorAll('table').length})"""


class Browser:
    """A headless Chromium that answers DevTools commands."""

    def __init__(self, program: str) -> None:
        self.profile = tempfile.TemporaryDirectory(prefix="check-page-", ignore_cleanup_errors=True)
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # Chromium reads descriptor 3 and writes descriptor 4; the shell moves our pipes there.
        with tempfile.TemporaryFile() as log:
            arrange = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
            options = ["--headless", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe", "--hide-scrollbars"]
            options += ["--disable-dev-shm-usage", f"--user-data-dir={self.profile.name}"]
            options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to run as root
            self.process = subprocess.Popen(
                ["bash", "-c", arrange, "browser", program, *options, "about:blank"],
                pass_fds=(theirs_in, theirs_out),
                stdout=log,
                stderr=log,
            )
        os.close(theirs_in)
        os.close(theirs_out)
        self.input, self.output = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
        self.number, self.session, self.events = 0, "", []  # type: int, str, list[dict[str, Any]]
        self.buffer = b""

    def __enter__(self) -> Self:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Security"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.input.close()
        self.output.close()
        self.profile.cleanup()

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send one command and return its answer. Events that arrive meanwhile are kept."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.input.write(json.dumps(message).encode() + b"\0")
        self.input.flush()
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def wait(self, event: str) -> None:
        """Wait until an event of this name has arrived."""
        end = time.monotonic() + TIMEOUT
        while not any(each.get("method") == event for each in self.events):
            if time.monotonic() > end:
                raise RuntimeError(f"no {event} within {TIMEOUT:g} s")
            self.events.append(self.read())

    def read(self) -> dict[str, Any]:
        """Return the next message."""
        while b"\0" not in self.buffer:
            part = self.output.read1(1 << 16)
            if not part:
                raise RuntimeError("the browser closed the connection")
            self.buffer += part
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)


def check(browser: Browser, page: Path, view: str, pictures: Path | None) -> list[str]:
    """Return the complaints about a page in one view."""
    width, dark = VIEWS[view]
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    scheme = "dark" if dark else "light"
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.events.clear()
    browser.call("Page.navigate", url=page.resolve().as_uri())
    browser.wait("Page.loadEventFired")
    if pictures is not None:
        shot = browser.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        (pictures / f"{page.stem}-{view}.png").write_bytes(base64.b64decode(shot["data"]))
    opened = "document.querySelectorAll('details').forEach(e => e.open = true)"
    browser.call("Runtime.evaluate", expression=opened)
    found = json.loads(browser.call("Runtime.evaluate", expression=PROBE)["result"]["value"])
    complaints = list(filter(None, map(complaint, browser.events)))
    if found["scroll"] > 0 or found["wide"]:
        complaints.append(f"wider than the window by {found['scroll']} px: {', '.join(found['wide'])}")
    for key, what in (
        ("broken", "images not drawn"),
        ("unnamed", "charts without title"),
        ("headless", "tables without header"),
    ):
        if found[key]:
            complaints.append(f"{found[key]} {what}")
    counts = ", ".join(f"{found[key]} {key}" for key in ("tables", "charts", "pictures"))
    print(f"{view:<12}{width} px  {counts}  {'ok' if not complaints else 'FAILED'}", file=sys.stderr)
    return [f"{view}: {text}" for text in complaints]


def complaint(event: dict[str, Any]) -> str | None:
    """Return the complaint that a browser's event is about; None for an event that is fine."""
    method, given = event.get("method"), event.get("params", {})
    if method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
        return f"console {given['entry']['level']}: {given['entry']['text']}"
    if method == "Runtime.exceptionThrown":
        return f"exception: {given['exceptionDetails']['text']}"
    if method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
        return f"console {given['type']}: {[each.get('value') for each in given['args']]}"
    if method == "Network.requestWillBeSent" and not given["request"]["url"].startswith(("file:", "data:")):
        return f"request to {given['request']['url'][:100]}"
    return None


def main() -> int:
    """Check every page that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--pictures", type=Path, help="write a picture of every view into this directory")
    args = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        print(
            f"check_page: There is no Chromium on the PATH (looked for {', '.join(BROWSERS)}). Install it, for example with "
            "`apt-get install chromium`.",
            file=sys.stderr,
        )
        return 4
    absent = [str(page) for page in args.pages if not page.is_file()]
    if absent:
        print(f"check_page: There is no such file: {', '.join(absent)}.", file=sys.stderr)
        return 4
    if args.pictures is not None:
        args.pictures.mkdir(parents=True, exist_ok=True)
    complaints: list[str] = []
    with Browser(program) as browser:
        for page in args.pages:
            for view in VIEWS:
                complaints += [f"{page}: {text}" for text in check(browser, page, view, args.pictures)]
    for text in complaints:
        print(text, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
