"""The playground's command in a process of its own, and a headless Chromium on it.

As a script it takes README's picture: ``python -m tests.browser docs/images/playground.png``.
"""

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PICTURE = Path(__file__).parent.parent / "docs/images/playground.png"

# Python's sockets tell where they go to: whatever is not this machine is printed.
_WATCHED = """
import sys
def watch(event, args):
    if event == "socket.connect" and args[0].family != 1 and args[1][0] not in ("127.0.0.1", "::1", "localhost"):
        print("LEAVES", args[1], flush=True)
    if event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", "::1", "localhost", None):
        print("ASKS FOR", args[0], flush=True)
sys.addaudithook(watch)
sys.argv[0] = "inf-embed"
from sentence_transformers_inf.cli import main
main()
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Playground:
    """``inf-embed playground`` with further words, until :meth:`stop`."""

    def __init__(self, *words):
        command = [sys.executable, "-c", _WATCHED, "playground", "--port", str(free_port()), *map(str, words)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
        self.printed = ""
        for line in self.process.stdout:
            self.printed += line
            if found := re.search(r"The playground is at (http://127\.0\.0\.1:\d+/)", line):
                self.address = found[1]
                return
        raise AssertionError(self.printed)

    def stop(self):
        """End it, and return all that it printed."""
        self.process.terminate()
        return self.printed + self.process.communicate()[0]


@contextlib.contextmanager
def chromium():
    """A browser that finds no other machine."""
    words = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    words += ["--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=words)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser, address, width=1280, scheme="light"):
    """The page, when it shows a ranking or a message; ``page.requested`` are the addresses that it asked for."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.requested, page.errors = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.set_default_timeout(120_000)
    page.goto(address)
    page.wait_for_selector("#result .columns, #result .message")
    return page


def take_picture(page, path):
    """The whole page in few colours, so that it is small."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture.convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    playground = Playground()
    with chromium() as opened:
        take_picture(open_page(opened, playground.address), sys.argv[1])
    playground.stop()
