"""The gate of a deployment: it stands where sites connect, and passes on to the SuperLink only what a SuperNode says."""

import asyncio
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from fedrank.config import ConfigError
from fedrank.engines.flower import forged

# What SuperNodes call, as it stands in the request's first line: nothing encoded, no way up, no other host. Whoever reaches
# the SuperLink itself may also register nodes and submit apps there (/v1/control).
ALLOWED = re.compile(rb"/v1/fleet/[a-z-]+")
# What an answer's parts are announced by; they follow one by one.
PUSH, LONGEST = b"/v1/fleet/push-messages", 1 << 20  # its bytes: metadata and hashes alone
LARGEST = 1 << 31  # bytes of any other: no more is a message of protobuf
# Of one connection, not of what it carries (RFC 9110); and where a sender says that it is.
DROPPED = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade "
    b"host expect forwarded x-forwarded-for x-forwarded-proto".split()
)
PATIENCE = {"timeout": httpx.Timeout(60.0).as_dict()}  # seconds for a word of the SuperLink; a SuperNode waits 30
SERVER: dict[str, Any] = {
    "http": "h11", "ws": "none", "interface": "asgi3", "lifespan": "off", "log_config": None, "access_log": False,
    "proxy_headers": False, "server_header": False, "date_header": False,
    "timeout_graceful_shutdown": 5,  # seconds for what is under way when the gate is stopped
}  # fmt: skip
log = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]


class Gone(Exception):
    """Who asks has left before all was said."""


def serve(host: str, port: int, inner: int, certificates: Path | None) -> None:
    """Listen at this address for sites, until stopped; the SuperLink is at the port `inner` of this machine's loopback.

    certificates: the folder of `ca.crt`, `server.crt` and `server.key`, by which both speak TLS; None: plain text.
    ConfigError where a file is missing; OSError where the address is none of this machine's, or taken.
    """
    scheme, config, verify = "http", dict[str, Any](), ssl.create_default_context()
    if certificates is not None:
        ca, certificate, key = (certificates / name for name in ("ca.crt", "server.crt", "server.key"))
        if missing := [path for path in (ca, certificate, key) if not path.is_file()]:
            raise ConfigError(f"--certificates: no file {str(missing[0])!r}; `fedrank deploy keys` makes it")
        scheme, config = "https", {"ssl_certfile": certificate, "ssl_keyfile": key}
        verify = ssl.create_default_context(cafile=ca)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    with socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both) as listening:
        asyncio.run(_serve(f"{scheme}://127.0.0.1:{inner}", verify, listening, config))


async def _serve(base: str, verify: ssl.SSLContext, listening: socket.socket, config: dict[str, Any]) -> None:
    # No client of httpx, which adds headers and keeps cookies. The SuperLink closes a connection that was idle for 5 s.
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2.0)
    async with httpx.AsyncHTTPTransport(verify=verify, limits=limits, trust_env=False) as link:
        server = uvicorn.Server(uvicorn.Config(partial(_answer, link, base), **SERVER, **config))
        await server.serve(sockets=[listening])


async def _answer(link: httpx.AsyncHTTPTransport, base: str, scope: Any, receive: Any, send: Any) -> None:
    """A request, by ASGI: passed on, and its answer passed back, each as it comes; what announces an answer, once it is
    there and in order."""

    async def say(status: int, headers: Headers = ((b"content-length", b"0"),), chunks: Any = None) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if chunks is not None:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body"})

    method, path, asker = scope["method"], scope["raw_path"], scope["client"][0]
    if method != "POST" or scope["query_string"] or not ALLOWED.fullmatch(path):
        log.warning("%s asked for %s %r, which is refused", asker, method, path)
        return await say(404)
    told = dict(scope["headers"])
    if b"transfer-encoding" in told:  # two servers may read such a length differently, and SuperNodes say it
        log.warning("%s does not say how long its request is, which is refused", asker)
        return await say(411)
    if int(told.get(b"content-length", 0)) > (LONGEST if path == PUSH else LARGEST):
        log.warning("%s sends %s bytes to %s, which is refused", asker, told[b"content-length"].decode(), path.decode())
        return await say(413)
    headers = [*passed(scope["headers"]), (b"x-forwarded-for", asker.encode())]  # for the SuperLink's log
    url = base + path.decode()
    content: Any = _body(receive)
    try:
        if path == PUSH:
            content = b"".join([part async for part in content])
            if wrong := forged(content):
                log.warning("%s pushes %s, which is refused", asker, wrong)
                return await say(400)
        answer = await link.handle_async_request(httpx.Request(method, url, headers=headers, content=content, extensions=PATIENCE))  # fmt: skip
    except Gone:
        return None
    except httpx.TransportError as error:
        log.warning("the SuperLink does not answer %s: %r", path.decode(), error)
        return await say(502)  # a SuperNode tries again
    try:
        await say(answer.status_code, passed(answer.headers.raw), answer.aiter_raw())
    finally:
        await answer.aclose()


async def _body(receive: Any) -> AsyncIterator[bytes]:
    more = True
    while more:
        if (event := await receive())["type"] == "http.disconnect":
            raise Gone
        yield event.get("body", b"")
        more = event.get("more_body", False)


def passed(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Those that are passed on: not those of the connection, nor what `connection` names."""
    found = [(name.lower(), value) for name, value in headers]
    named = {word.strip().lower() for name, value in found if name == b"connection" for word in value.split(b",")}
    return [(name, value) for name, value in found if name not in DROPPED | named]
