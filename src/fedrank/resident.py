"""The resident worker of a site: it keeps model and rows loaded, and answers frames at a socket of its owner's."""

import logging
import os
import socket
import struct
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener

from fedrank.frame import Refused
from fedrank.sites import Desk, SiteFile
from fedrank.store import StoreError

log = logging.getLogger(__name__)

LARGEST = 1 << 33  # bytes of a frame
FRAME, REFUSED = b"\x00", b"\x01"  # what an answer begins with


def ask(file: SiteFile, frame: bytes) -> bytes:
    """The site's answer to a frame: its resident worker's where there is one, else worked out in this process.

    Refused where none is to be given, also where the worker ends over it.
    """
    try:
        line = Client(str(file.socket), "AF_UNIX")
    except FileNotFoundError:
        return Desk(file).answer(frame)
    except ConnectionRefusedError:
        log.warning("%s: nobody listens there any more; the model is loaded for this frame alone", file.socket)
        return Desk(file).answer(frame)
    with line:
        try:
            line.send_bytes(frame)
            answer = line.recv_bytes(LARGEST)
        except (EOFError, OSError):
            raise Refused("the site's worker ended while it was at work") from None
    if answer[:1] != FRAME:
        raise Refused(answer[1:].decode())
    return answer[1:]


def serve(file: SiteFile, ready: Callable[[], None] = lambda: None) -> None:
    """Answer frames, one after the other, until it is interrupted. StoreError where another worker is at it."""
    file.store.mkdir(parents=True, exist_ok=True, mode=0o700)
    _free(file)
    before = os.umask(0o177)  # nobody else may connect
    try:
        listener = Listener(str(file.socket), "AF_UNIX", backlog=16)
    finally:
        os.umask(before)
    desk = Desk(file)
    try:
        ready()
        while True:
            with listener.accept() as line:
                _serve(desk, line)
    finally:
        listener.close()


def _free(file: SiteFile) -> None:
    """Clear away the socket of a worker that was killed."""
    try:
        Client(str(file.socket), "AF_UNIX").close()
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        file.socket.unlink()
        return
    raise StoreError(f"{file.socket}: another worker of this site is running")


def _serve(desk: Desk, line: Connection) -> None:
    try:
        if (user := _peer(line)) not in (os.getuid(), 0):
            log.error("user %d may not connect to this site", user)
            return
        frame = line.recv_bytes(LARGEST)
        try:
            answer = FRAME + desk.answer(frame)
        except Refused as error:
            log.warning("a frame is refused: %s", error)
            answer = REFUSED + str(error).encode()
        line.send_bytes(answer)
    except (EOFError, OSError) as error:  # who asked is gone; the answer is kept for who asks again
        log.warning("whoever asked is gone: %s", error)


def _peer(line: Connection) -> int:
    """The user at the other end, as the kernel says."""
    with socket.socket(fileno=os.dup(line.fileno())) as end:
        found = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", found)[1])
