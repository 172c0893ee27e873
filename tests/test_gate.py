"""The gate: what it lets through, that it holds no frame in memory, and what becomes of headers, breaks and mistakes."""

import hashlib
import http.client
import math
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from federation import answers, free_port, until
from fedrank import cli, remote

pytest.importorskip("flwr")
pytest.importorskip("cryptography")
from flwr.proto.fleet_pb2 import PushMessagesRequest

from fedrank.deploy import gate, keys
from fedrank.engines import flower

PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-messages"


@dataclass
class Link:
    """In the SuperLink's place, which notes what reaches it. parts: what was read so far; go: lets the next half be said."""

    port: int
    asked: list[tuple[str, str, list[tuple[str, str]]]] = field(default_factory=list)
    parts: queue.Queue[bytes] = field(default_factory=queue.Queue)
    go: threading.Event = field(default_factory=threading.Event)
    lines: list[int] = field(default_factory=list)  # by which line each came


@dataclass
class Gate:
    port: int
    process: subprocess.Popen[bytes]
    link: Link
    context: ssl.SSLContext

    def line(self) -> socket.socket:
        return self.context.wrap_socket(
            socket.create_connection(("127.0.0.1", self.port), 30), server_hostname="localhost"
        )

    def ask(
        self, target: str, method: str = "POST", more: str = "", body: bytes = b"hello"
    ) -> tuple[int, dict[str, str], bytes]:
        """By hand: a library would mend the path."""
        with self.line() as line:
            head = f"{method} {target} HTTP/1.1\r\nHost: there\r\nContent-Length: {len(body)}\r\n{more}\r\n"
            line.sendall(head.encode("latin-1") + body)
            answer = http.client.HTTPResponse(line)
            answer.begin()
            return answer.status, dict(answer.getheaders()), answer.read()


@contextmanager
def linked(folder: Path, port: int) -> Iterator[Link]:
    """Serves with the made certificate. A path says what is done; any other is answered with the hash of what came."""
    link = Link(port)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            link.asked.append((self.command, self.path, self.headers.items()))
            link.lines.append(self.client_address[1])
            left, found = int(self.headers["content-length"]), hashlib.sha256()
            while left and (part := self.rfile.read1(left)):
                left -= len(part)
                found.update(part)
                if self.path.endswith("parts"):
                    link.parts.put(part)
            self.send_response(418 if self.path.endswith("teapot") else 200)
            self.send_header("Connection", "x-mine")
            self.send_header("X-Mine", "1")
            self.send_header("X-Yours", "2")
            if self.path.endswith("large"):
                self.send_header("Content-Length", str(50 << 20))
                self.end_headers()
                for _ in range(50):
                    self.wfile.write(bytes(1 << 20))
            elif self.path.endswith("halves") or self.path.endswith("break"):
                self.send_header("Content-Length", "8")
                self.end_headers()
                self.wfile.write(b"half")
                if self.path.endswith("break"):
                    self.close_connection = True
                    return
                assert link.go.wait(30)
                self.wfile.write(b"rest")
            else:
                self.send_header("Content-Length", "64")
                self.end_headers()
                self.wfile.write(found.hexdigest().encode())

        do_GET = do_PUT = do_POST

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield link
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def begin(port: int, inner: int, *how: str) -> subprocess.Popen[bytes]:
    words = ["deploy", "gate", "--host", "127.0.0.1", "--port", str(port), "--inner", str(inner), *how]
    process = subprocess.Popen([sys.executable, "-m", "fedrank.cli", *words], stderr=subprocess.PIPE)

    until(lambda: process.poll() is not None or answers(port), 120, "the gate")
    assert process.poll() is None, process.stderr and process.stderr.read()
    return process


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("keys")
    keys.make(folder, ["localhost"], [])
    return folder


@pytest.fixture(scope="module")
def running(certified: Path) -> Iterator[Gate]:
    port, inner = free_port(), free_port()
    with linked(certified, inner) as link:
        process = begin(port, inner, "--certificates", str(certified))
        try:
            yield Gate(port, process, link, ssl.create_default_context(cafile=certified / "ca.crt"))
        finally:
            process.kill()
            process.communicate()


@pytest.fixture
def there(running: Gate) -> Gate:
    running.link.asked.clear()
    running.link.go.clear()
    return running


@pytest.mark.parametrize(
    "target",
    [
        "/v1/control/create-node", "/v1/control/start-run", "/v1/runtime/get-run", "/", "*", "/health", "/docs", "/openapi.json",
        "/v1/fleet", "/v1/fleet/", "/v1/fleet/../control/start-run", "/v1/fleet/..", "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet%2f..%2fcontrol/start-run", "/v1/fleet/..%2fcontrol", "//v1/control/start-run", "/v1//control/start-run",
        "//v1/fleet/pull-messages", "/v1/fleet//pull-messages", "/v1/fleet/pull-messages/", "/v1/fleet/pull-messages/../x",
        "/v1/fleet/..\\control", "\\v1\\control", "/v1/fleet/pull-messages;/../control", "/v1/fleet/pull-messages?x=/v1/control",
        "http://127.0.0.1/v1/control/start-run", "http://127.0.0.1/v1/fleet/pull-messages", "/V1/FLEET/PULL-MESSAGES",
        "/v1/fleet/pull%2dmessages", "/v1/fleet/pull-messages#x",
    ],
)  # fmt: skip
def test_what_is_not_a_site_s_never_reaches_the_superlink(there: Gate, target: str) -> None:
    assert there.ask(target)[0] == 404
    assert there.link.asked == []


def test_a_run_that_is_handed_to_the_gate_is_told_so(there: Gate, certified: Path, tmp_path: Path) -> None:
    remote.write_connection(tmp_path, f"localhost:{there.port}", certified / "ca.crt")
    with pytest.raises(
        remote.RemoteError, match=r"404 Not Found.*is engine.superlink the gate\?.* the port after it"
    ) as error:
        remote._flwr(tmp_path, "list", remote.NAME)
    assert "\n" not in str(error.value)
    assert there.link.asked == []


def test_what_a_supernode_calls_passes(there: Gate) -> None:
    """Every path of the installed SuperNode's client."""
    from flwr.supernode import fleet_http_client

    source = Path(fleet_http_client.__file__).read_text()
    paths = [line.split('"')[1] for line in source.splitlines() if line.strip().startswith('path="')]
    assert PULL in paths
    assert len(paths) > 8
    for path in paths:
        said = pushed() if path == PUSH else b"hello"
        status, _, body = there.ask(path, body=said)
        assert (status, body.decode()) == (200, hashlib.sha256(said).hexdigest())
    assert [(method, path) for method, path, _ in there.link.asked] == [("POST", path) for path in paths]
    assert there.ask("/v1/fleet/teapot")[0] == 418


def pushed(parts: str = "b" * 64, seconds: float = 1.0, **said: Any) -> bytes:
    """An answer of node 7, with these metadata, parts, and seconds that it took."""
    meta = {
        "src_node_id": 7,
        "dst_node_id": 1,
        "message_id": "b" * 64,
        "reply_to_message_id": "a" * 64,
        "ttl": 60.0,
        "created_at": 1e9,
    }
    made: Any = {"messages_list": [{"metadata": {**meta, **said}}], "message_object_trees": [{"object_id": parts}]}
    return PushMessagesRequest(node={"node_id": 7}, clientapp_runtime_list=[seconds], **made).SerializeToString()  # type: ignore[no-any-return, arg-type]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (pushed(src_node_id=1), "another's name"), (pushed(src_node_id=8), "another's name"),
        (pushed(reply_to_message_id=""), "answers none"), (pushed(ttl=math.nan), "no time"), (pushed(ttl=math.inf), "no time"),
        (pushed(created_at=math.nan), "no time"), (pushed(seconds=math.inf), "no time"), (pushed() * 2, "than one message"),
        (b"", "than one message"), (pushed(parts="a" * 64), "another message's parts"), (b"\xff" * 9, "no message"),
        (pushed(parts="a" * 64, message_id="a" * 64), "another message's parts"),
    ],
)  # fmt: skip
def test_what_a_supernode_pushes_is_an_answer_in_its_own_name(body: bytes, why: str, there: Gate) -> None:
    """The SuperLink would hand anything else out as another's answer, or fail at it."""
    assert why in (flower.forged(body) or "")
    assert there.ask(PUSH, body=body)[0] == 400
    assert there.link.asked == []


@pytest.mark.parametrize(("path", "most"), [(PUSH, 1 << 20), ("/v1/fleet/push-object", 1 << 31)])
def test_what_is_too_long_is_not_waited_for(path: str, most: int, there: Gate) -> None:
    with there.line() as line:
        line.sendall(f"POST {path} HTTP/1.1\r\nHost: there\r\nContent-Length: {most + 1}\r\n\r\n".encode())
        assert line.recv(12) == b"HTTP/1.1 413"
    assert there.link.asked == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "CONNECT", "OPTIONS"])
def test_only_posts_pass(there: Gate, method: str) -> None:
    assert there.ask(PULL, method)[0] == 404
    assert there.link.asked == []


def test_headers_of_the_connection_are_dropped_and_others_pass(there: Gate) -> None:
    more = (
        "Flwr-Signature: aGk=\r\nX-Twice: 1\r\nX-Twice: 2\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nTE: trailers\r\n"
        "Upgrade: websocket\r\nProxy-Authorization: x\r\nX-Forwarded-For: 10.9.8.7\r\nForwarded: for=10.9.8.7\r\n"
    )
    _, headers, _ = there.ask(PULL, more=more)
    ((_, _, found),) = there.link.asked
    names = [(name.lower(), value) for name, value in found]
    assert sorted(names) == [
        ("content-length", "5"), ("flwr-signature", "aGk="), ("host", f"127.0.0.1:{there.link.port}"),
        ("x-forwarded-for", "127.0.0.1"), ("x-twice", "1"), ("x-twice", "2"),
    ]  # fmt: skip
    assert {name.lower() for name in headers} == {"server", "date", "x-yours", "content-length"}


@pytest.mark.parametrize("coding", ["chunked", "gzip, chunked", "identity"])
def test_a_message_of_two_lengths_is_not_passed_on(there: Gate, coding: str) -> None:
    """Where two servers would read it differently, a second request could hide in it."""
    hidden = b"0\r\n\r\nPOST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    assert there.ask(PULL, more=f"Transfer-Encoding: {coding}\r\n", body=hidden)[0] in (411, 400, 501)
    assert there.link.asked == []


def test_a_request_passes_as_it_comes(there: Gate) -> None:
    with there.line() as line:
        line.sendall(b"POST /v1/fleet/parts HTTP/1.1\r\nHost: there\r\nContent-Length: 10\r\n\r\nfirst")
        assert there.link.parts.get(timeout=30) == b"first"
        line.sendall(b"later")
        assert there.link.parts.get(timeout=30) == b"later"
        assert line.recv(12) == b"HTTP/1.1 200"


def test_an_answer_passes_as_it_comes(there: Gate) -> None:
    with there.line() as line:
        line.sendall(b"POST /v1/fleet/halves HTTP/1.1\r\nHost: there\r\nContent-Length: 0\r\n\r\n")
        answer = http.client.HTTPResponse(line)
        answer.begin()
        assert answer.read(4) == b"half"
        there.link.go.set()
        assert answer.read() == b"rest"


def test_large_frames_pass_and_are_never_held(there: Gate) -> None:
    frame = bytes(range(256)) * (50 << 12)  # 50 MiB
    process = psutil.Process(there.process.pid)
    assert there.ask(PULL)[0] == 200
    before = peak(process)
    assert there.ask("/v1/fleet/push-object", body=frame)[2].decode() == hashlib.sha256(frame).hexdigest()
    assert there.ask("/v1/fleet/large")[2] == bytes(50 << 20)
    assert peak(process) - before < 20 << 20


def peak(process: psutil.Process) -> int:
    """The most bytes that it ever had in memory."""
    (line,) = (
        line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def test_an_answer_that_breaks_off_is_not_made_whole(there: Gate) -> None:
    with pytest.raises((http.client.IncompleteRead, ssl.SSLError, ConnectionError)):
        there.ask("/v1/fleet/break")
    assert there.ask(PULL)[0] == 200


def test_who_leaves_early_leaves_nothing_behind(there: Gate) -> None:
    with there.line() as line:
        line.sendall(b"POST /v1/fleet/parts HTTP/1.1\r\nHost: there\r\nContent-Length: 10\r\n\r\nfirst")
        assert there.link.parts.get(timeout=30) == b"first"
    process = psutil.Process(there.process.pid)
    until(
        lambda: not [one for one in process.net_connections() if one.status == "ESTABLISHED"], 30, "an end of the lines"
    )
    assert there.ask(PULL)[0] == 200


def test_a_line_that_was_idle_is_not_used_again(there: Gate) -> None:
    """The SuperLink may have closed it."""
    for pause in (0.0, 0.0, 2.5):
        time.sleep(pause)
        assert there.ask(PULL)[0] == 200
    one, two, three = there.link.lines[-3:]
    assert one == two != three


def test_a_silent_superlink_is_tried_again_later(certified: Path) -> None:
    """502 is what SuperNodes take for a reason to try again; a gate that stops ends with 0."""
    port, inner = free_port(), free_port()
    process = begin(port, inner, "--certificates", str(certified))
    made = Gate(port, process, Link(inner), ssl.create_default_context(cafile=certified / "ca.crt"))
    try:
        assert made.ask(PULL)[0] == 502
        with linked(certified, inner):
            assert made.ask(PULL)[0] == 200
        assert made.ask("/v1/control/start-run")[0] == 404
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
    told = said.decode()
    assert "the SuperLink does not answer /v1/fleet/pull-messages: ConnectError" in told
    assert "127.0.0.1 asked for POST b'/v1/control/start-run', which is refused" in told
    assert "Traceback" not in told


def test_a_superlink_of_another_ca_is_not_spoken_to(certified: Path, tmp_path: Path) -> None:
    keys.make(tmp_path / "theirs", ["localhost"], [])
    port, inner = free_port(), free_port()
    with linked(tmp_path / "theirs", inner) as link:
        process = begin(port, inner, "--certificates", str(certified))
        try:
            made = Gate(port, process, link, ssl.create_default_context(cafile=certified / "ca.crt"))
            assert made.ask(PULL)[0] == 502
        finally:
            process.kill()
            process.communicate()
        assert link.asked == []


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_two_colons_are_all_addresses_of_both_families() -> None:
    port = free_port()
    process = begin(port, free_port(), "--host", "::", "--insecure")
    try:
        for address in ("127.0.0.1", "::1"):
            with closing(http.client.HTTPConnection(address, port, timeout=30)) as line:
                line.request("POST", "/v1/control/start-run")
                assert line.getresponse().status == 404
    finally:
        process.kill()
        process.communicate()


def test_mistakes_are_named(tmp_path: Path, certified: Path) -> None:
    def wrong(word: str, *args: Any, code: int = 2) -> None:
        done = CliRunner().invoke(cli.app, ["deploy", "gate", "--inner", "1", "--host", "127.0.0.1", *map(str, args)])
        assert done.exit_code == code
        assert word in done.stderr

    before = signal.getsignal(signal.SIGTERM)
    try:
        wrong("or --insecure for plain text")
        wrong("or --insecure for plain text", "--insecure", "--certificates", certified)
        wrong("no file", "--certificates", tmp_path)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            # It may be free, or this machine's, later: 2 would keep `server.sh` from another try.
            wrong("Address already in use", "--insecure", "--port", taken.getsockname()[1], code=1)
        wrong("Errno -", "--insecure", "--host", "no.such.host.invalid")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_names_of_headers_are_compared_without_their_case() -> None:
    assert gate.passed([(b"CONNECTION", b"A, b"), (b"a", b"1"), (b"B", b"2"), (b"C", b"3")]) == [(b"c", b"3")]
