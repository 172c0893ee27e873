"""The page of a run served while it goes on: to this machine, by names of its own, and nothing but the page and its data."""

import contextlib
import hashlib
import ipaddress
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from fedrank.config import ConfigError
from fedrank.remote import mistaken
from fedrank.report import page, played
from fedrank.report.page import Page, Section, Text
from fedrank.report.pages import awaited
from fedrank.studies.record import FILE

log = logging.getLogger(__name__)
ALL = ("0.0.0.0", "::", "")
SECONDS = 20.0  # that a reader may take over a request


def current(path: Path) -> Callable[[], Page]:
    """What gives the page of a path as it is now, made anew only when something of it has changed."""
    lock, last, rows = threading.Lock(), dict[tuple[object, ...], Page](), played.follower()

    def now() -> Page:
        with lock:  # many readers, one that makes it
            if (stamp := _stamp(path)) not in last:
                made = _made(path, rows)
                last.clear()
                last[stamp] = made
            return last[stamp]

    return now


def _stamp(path: Path) -> tuple[object, ...]:
    """What changes when the page would: sizes and times of its files, and whether a process is at it."""
    found: list[object] = [played.working(path if path.is_dir() else path.parent)]
    for file in (path, *(path / name for name in (*played.FILES, FILE, "states"))):
        with contextlib.suppress(OSError):
            told = file.stat()
            found.append((file.name, told.st_mtime_ns, told.st_size))
    return tuple(found)


def _made(path: Path, rows: played.Read) -> Page:
    """A mistake in what is there is said on the page: a file may be mended, and is asked for again."""
    try:
        return awaited(path, rows)
    except Exception as error:
        if not mistaken(error):
            raise
        said = Section("error", "It cannot be read", [Text(str(error), "bad")])
        return Page(path.name or str(path), "Not readable", "", ("stopped", "What is there cannot be read."), [said])


def names(host: str, port: int) -> Callable[[str], bool]:
    """Whether a Host header names this server: a page elsewhere may point a name of its own at this address, which no
    browser then keeps apart from ours (DNS rebinding), but cannot choose what the browser calls the server.

    An address is no name: where the server is bound to all of them, any is its own.
    """
    everywhere = host in ALL
    known = {host.lower(), "localhost", "127.0.0.1", "::1"}
    if everywhere:
        known |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def mine(header: str) -> bool:
        try:
            parts = urlsplit(f"//{header}")
            name, given = (parts.hostname or "").lower(), parts.port or 80
        except ValueError:
            return False
        if parts.path or parts.query or parts.fragment or parts.username is not None or given != port:
            return False
        return name in known or (everywhere and _address(name))

    return mine


def urls(host: str, port: int) -> list[str]:
    """Where it can be reached: at its host; where it is bound to all addresses, from here, and by this machine's name."""
    hosts = ["::1" if host == "::" else "127.0.0.1", socket.gethostname()] if host in ALL else [host]
    return [f"http://{f'[{one}]' if ':' in one else one}:{port}/" for one in hosts]


def _address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def served(path: Path, host: str, port: int) -> Iterator[str]:
    """Serve the page of a path while the block runs; its URLs, a line each. Port 0: any.

    ConfigError where the address cannot be had.
    """
    page.drawing()  # what is missing shows before anything is served
    now = current(path)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        made = type("Server", (ThreadingHTTPServer,), {"address_family": family, "daemon_threads": True})
        server = made((host, port), BaseHTTPRequestHandler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None
    taken = server.server_address[1]
    server.RequestHandlerClass = _handler(now, names(host, taken))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield "\n".join(urls(host, taken))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(now: Callable[[], Page], mine: Callable[[str], bool]) -> type[BaseHTTPRequestHandler]:
    """What answers: the page at /, its data at /data.json, to who calls the server by its name; and no one else."""

    class Answer(BaseHTTPRequestHandler):
        timeout = SECONDS
        server_version, sys_version = "fedrank", ""

        def do_GET(self) -> None:
            try:
                self.answer()
            except ConnectionError:  # whoever asked has left
                raise
            except Exception as error:  # such as of files that are changed while they are read: it is asked for again
                log.exception("the page could not be made")
                said = f"The page could not be made: {type(error).__name__}; the console has more.\n"
                self.say(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", said.encode())

        def answer(self) -> None:
            hosts = self.headers.get_all("Host") or []
            if len(hosts) != 1 or not mine(hosts[0]):
                self.say(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"This server goes by another name.\n")
            elif self.path == "/":
                text = page.html(now(), live=True)
                self.say(HTTPStatus.OK, "text/html", text.encode(), policy=page.policy(live=True))
            elif self.path == "/data.json":
                body = json.dumps(page.data(now()), allow_nan=False).encode()
                tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
                if self.headers.get("If-None-Match") == tag:
                    self.say(HTTPStatus.NOT_MODIFIED, "application/json", b"", tag)
                else:
                    self.say(HTTPStatus.OK, "application/json", body, tag)
            else:
                self.say(HTTPStatus.NOT_FOUND, "text/plain", b"Here are / and /data.json.\n")

        do_HEAD = do_GET

        def say(
            self, status: HTTPStatus, kind: str, body: bytes, tag: str = "", policy: str = "default-src 'none'"
        ) -> None:
            self.send_response(status)
            if status is not HTTPStatus.NOT_MODIFIED:
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
            if tag:
                self.send_header("ETag", tag)
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", f"{policy}; frame-ancestors 'none'")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a page asks every two seconds."""

    return Answer
