"""`fastgrpo watch RUN`: the report of a run that goes on, as a page on this machine's loopback that is made again.

Read-only: nothing is written, one page is served, to nobody else. From another machine: `ssh -L 8008:localhost:8008`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fastgrpo import __version__
from fastgrpo.commands.report import page, report_page
from fastgrpo.commands.report.run_data import read_config
from fastgrpo.errors import UserError

# Seconds between two looks at the run, of the page and of the server.
EVERY = 60.0

# Requests that are answered at a time: a page is for one person, on a few screens.
MOST_AT_ONCE = 8

# Seconds that a client may take to send its request, and to read the answer.
PATIENCE = 10.0

# Where a browser may think that this page is: another name is another site that was made to lead here.
NAMES = ("localhost", "127.0.0.1", "[::1]")

# Takes what the server made since in place of the page's content, so that nothing jumps and no picture is lost.
SCRIPT = """
setInterval(async () => {
  let said = "no answer from fastgrpo watch; what is shown is older";
  try {
    const answer = await fetch("/", {cache: "no-store"});
    if (answer.ok) {
      const made = new DOMParser().parseFromString(await answer.text(), "text/html");
      document.querySelector("main").replaceWith(made.querySelector("main"));
      document.title = made.title;
      return;
    }
  } catch (error) {}
  document.querySelector(".live").textContent = said;
}, 60000);
"""

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; script-src 'sha256-"
    + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    + "'"
)


class LivePage:
    """The page of a run, made again when it is asked for and older than `every` seconds.

    A run that cannot be read at this moment (its first iteration is not done, a file is half written) keeps the page
    that was made before, with the reason above it.
    """

    def __init__(self, run: Path, every: float = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        read_config(run)
        self.run, self.every, self.clock = run, every, clock
        self._lock = threading.Lock()
        self._made: float | None = None
        self._body, self._report = b"", ""

    def read(self) -> bytes:
        """The page, as UTF-8."""
        with self._lock:
            if self._made is None or self.clock() - self._made >= self.every:
                self._body = self._make().encode()
                self._made = self.clock()
            return self._body

    def _make(self) -> str:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        said = f"Live: read at {now}, again every {self.every:.0f} seconds."
        try:
            self._report = report_page([self.run], live="$live")
        except (UserError, OSError) as error:
            said = f"Waiting: {error} (at {now}; looks again every {self.every:.0f} seconds)."
        shown = self._report or page(self.run.resolve().name, "", "$live")
        above = f'<p class="live" role="status">{html.escape(said)}</p>'
        return shown.replace("$live", above, 1).replace("</body>", f"<script>{SCRIPT}</script>\n</body>", 1)


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of `/`, by a name of this machine, and nothing else."""

    timeout = PATIENCE
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if not self.server.slots.acquire(blocking=False):
            return self._answer(503, b"too many requests at once\n", "text/plain")
        try:
            self._get()
        finally:
            self.server.slots.release()

    def do_HEAD(self) -> None:
        self.do_GET()

    def _get(self) -> None:
        name = (self.headers.get("Host") or "").rpartition(":")
        host = name[0] if name[2].isdigit() else "".join(name)
        if host not in NAMES:
            return self._answer(403, b"not a name of this machine\n", "text/plain")
        if self.path.partition("?")[0] != "/":
            return self._answer(404, b"there is one page, /\n", "text/plain")
        self._answer(200, self.server.live.read(), "text/html")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return f"fastgrpo/{__version__}"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are the reader's own."""


class Server(ThreadingHTTPServer):
    """On the loopback interface, whatever it is asked."""

    daemon_threads = True

    def __init__(self, live: LivePage, port: int) -> None:
        self.live, self.slots = live, threading.Semaphore(MOST_AT_ONCE)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"--port: {port} cannot be listened on ({error.strerror}); give another, or 0") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away is no error of ours."""


def watch(run: Path, port: int, say: Callable[[str], None]) -> None:
    """Serves the report of a run until Ctrl-C.

    Args:
        run: A run directory, of a run that goes on or is over.
        port: Of the loopback interface; 0: any that is free.
        say: Is told the page's address.

    Raises:
        UserError: For a directory without a run, or a port that is taken.
    """
    with Server(LivePage(run), port) as server:
        say(f"http://localhost:{server.server_address[1]}/  (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended")
