"""The server: http.server of the standard library, who may ask, and how long a request may take.

- It listens at 127.0.0.1; any other address needs a token, which is printed and becomes a cookie.
- The Host header must be this server's (a name that leads elsewhere today may lead here tomorrow), an Origin must be
  the same, and what a browser fetches for another site's page is refused. What changes something needs a header of its
  own, which other sites' pages can't send.
- Paths are of files below the start folder (places.py). Only pictures and results are handed out, and never as a page.
- Bodies have a limit, requests an end (`_SECONDS`), and no more than `_MOST` are served at a time.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..common.terminal import printable, say
from .answers import GET, POST, Answer, Asked, Studio
from .options import StudioOptions
from .places import Outside

HEADER = "X-Studio"  # of every request that changes something
MOST_BYTES = 64 * 2**20  # of a body: a large photograph
_MOST, _SECONDS = 64, 60.0  # requests at a time; for one of them, until its body is read
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; connect-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store",
}  # fmt: skip


class Refused(Exception):
    """A request that is not answered, with the code and the sentence for it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class StudioServer(ThreadingHTTPServer):
    """Serves one `Studio`; see the module's docstring."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, host: str, port: int, studio: Studio) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.studio, self.token = studio, None if _is_own(host) else secrets.token_urlsafe(24)
        self.open: dict[socket.socket, float] = {}  # since when each is read
        self.places = threading.BoundedSemaphore(_MOST)
        super().__init__((host, port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, unless too many are at work."""
        if not self.places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self.open[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads are to be had
            self.release(request)
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.release(request)

    def release(self, request: Any) -> None:
        """A connection has ended."""
        self.open.pop(request, None)
        self.places.release()

    def is_idle(self, patience: float = 5.0) -> bool:
        """Whether no request is at work any more, or soon; there are none afterwards."""
        end = time.monotonic() + patience
        return all(self.places.acquire(timeout=max(0.0, end - time.monotonic())) for _ in range(_MOST))

    def service_actions(self) -> None:
        """Cut off whoever does not come to the end of a request; called every half second."""
        for request, since in list(self.open.items()):
            if time.monotonic() - since > _SECONDS:
                self.open.pop(request, None)
                try:
                    request.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that break are nobody's business."""


class Handler(BaseHTTPRequestHandler):
    """One request; connections are not kept."""

    server: StudioServer
    timeout = 20.0
    server_version, sys_version = "midilite", ""

    def do_GET(self) -> None:
        """Answer with one of `answers.GET`."""
        self._answer(GET)

    def do_POST(self) -> None:
        """Answer with one of `answers.POST`."""
        self._answer(POST)

    def _answer(self, table: Mapping[str, Any]) -> None:
        try:
            url = urlsplit(self.path)
            self._check(url.query, table is POST)
            function = table.get(url.path) or (
                GET["/page/"] if table is GET and url.path.startswith("/page/") else None
            )
            if function is None:
                raise Refused(404, "there is nothing at this address")
            query = {key: values[-1] for key, values in parse_qs(url.query, max_num_fields=20).items()}
            asked = Asked(url.path, query, self._body() if table is POST else b"")
            self.server.open.pop(self.request, None)  # it has been read; what it asks for takes as long as it takes
            found = function(self.server.studio, asked)
            self._send(200, found if isinstance(found, Answer) else _json(found))
        except Refused as error:
            self._say(error.code, str(error))
        except Outside as error:
            self._say(404, str(error))
        except (ValueError, OSError, KeyError, RecursionError) as error:
            if not isinstance(error, ConnectionError | TimeoutError):
                self._say(400, str(error) or "the request can't be understood")
        except Exception as error:  # one bad request never ends the server
            say("".join(traceback.format_exception(error)))
            self._say(500, f"an error of midilite: {type(error).__name__}")

    def _check(self, query: str, changes: bool) -> None:
        """Raise Refused unless the request comes from the page of this server, or from no page."""
        host = self.headers.get("Host", "")
        if len(self.headers.get_all("Host", [])) != 1 or not self._is_ours(host):
            raise Refused(403, "the Host header is of another server: open the address that the studio printed")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        if origin not in (None, f"http://{host}") or site not in ("none", "same-origin"):
            raise Refused(403, "pages of other sites may not ask here")
        if changes and self.headers.get(HEADER) != "1":
            raise Refused(403, f"requests that change something have the header {HEADER}")
        if self.server.token is not None:
            self._check_token(query)

    def _is_ours(self, host: str) -> bool:
        found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::(\d{1,5}))?", host, re.A)
        if not found or int(found[2] or 80) != self.server.server_address[1]:
            return False
        name = found[1]
        if self.server.token is None:
            return name.lower() in ("127.0.0.1", "localhost", "[::1]")
        try:  # numbers can't be made to lead elsewhere
            return bool(ip_address(name.strip("[]")))
        except ValueError:
            return name.lower() in ("localhost", socket.gethostname().lower())

    def _check_token(self, query: str) -> None:
        name = f"studio{self.server.server_address[1]}"
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(name)
        except CookieError:
            cookie = None
        given = parse_qs(query, max_num_fields=20).get("token", [cookie.value if cookie else ""])[-1]
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise Refused(401, "open the address with the token that the studio printed")
        self.cookie = f"{name}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding"):
            raise Refused(411, "a body needs a Content-Length")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,12}", length, re.A):
            raise Refused(411, "a body needs a Content-Length")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"at most {MOST_BYTES // 2**20} MiB are taken")
        body = self.rfile.read(int(length))
        if len(body) != int(length):
            raise Refused(400, "the body ended before its length")
        return body

    def _say(self, code: int, text: str) -> None:
        try:
            self._send(code, _json({"error": printable(text)[:2000]}))
        except OSError:
            self.close_connection = True

    def _send(self, code: int, answer: Answer) -> None:
        self.send_response(code)
        for name, value in {**_HEADERS, **answer.headers}.items():
            self.send_header(name, value)
        if cookie := getattr(self, "cookie", None):
            self.send_header("Set-Cookie", cookie)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are no news."""


def _json(value: Any) -> Answer:
    return Answer(json.dumps(value).encode(), "application/json")


def _is_own(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def open_server(options: StudioOptions) -> StudioServer:
    """A server that listens, and whose jobs are ready.

    Raises:
        ValueError: there is no such folder, or the address can't be listened at.
    """
    start = Path(options.folder)
    if not start.is_dir():
        raise ValueError(f"{start}: no such folder")
    studio = Studio(start.resolve(), options.device)
    try:
        return StudioServer(options.host, options.port, studio)
    except (OSError, OverflowError) as error:
        studio.jobs.close()
        hint = "; --port 0 takes a free one" if options.port else ""
        raise ValueError(f"{options.host}:{options.port} can't be listened at ({error}){hint}") from error


def serve(options: StudioOptions) -> int:
    """Serve until ctrl-C, which ends the job at work, too; returns the exit code.

    Raises:
        ValueError: as `open_server`.
    """
    server = open_server(options)
    host = f"[{options.host}]" if ":" in options.host else options.host
    token = f"?token={server.token}" if server.token else ""
    say(f"the studio of {options.folder}: http://{host}:{server.server_address[1]}/{token}   (ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("ending")
    finally:
        server.server_close()
        if not (server.studio.jobs.close() and server.is_idle()):
            os._exit(0)  # threads that compute can't be ended, and torch aborts when its process ends around them
    return 0
