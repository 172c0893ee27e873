"""The resident worker of a site: it keeps model and rows loaded, and answers frames at a socket of its owner's."""

import logging
import os
import socket
import struct
import time
from multiprocessing.connection import Client, Connection, Listener

from fedrank.frame import Refused, unpack
from fedrank.sites import Desk, SiteFile
from fedrank.store import Store

log = logging.getLogger(__name__)

LARGEST = 1 << 33  # bytes of a frame
FRAME, REFUSED = b"\x00", b"\x01"  # what an answer begins with
PATIENCE = 60  # seconds with who connects and then neither sends nor takes anything: others wait behind it


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


def serve(file: SiteFile) -> None:
    """Answer frames, one after the other, until it is interrupted. StoreError where another worker is at it."""
    file.store.mkdir(parents=True, exist_ok=True, mode=0o700)
    with Store(file.store).locked():
        file.socket.unlink(missing_ok=True)  # of a worker that was killed
        before = os.umask(0o177)  # nobody else may connect
        try:
            listener = Listener(str(file.socket), "AF_UNIX", backlog=16)
        finally:
            os.umask(before)
        desk = Desk(file)
        with listener:
            log.info("client %s is ready, at %s", file.client, file.socket)
            while True:
                with listener.accept() as line:
                    _serve(desk, line)


def _serve(desk: Desk, line: Connection) -> None:
    if (user := _peer(line)) not in (os.getuid(), 0):
        log.error("user %d may not connect to this site", user)
        return
    _hurry(line)
    try:
        frame = line.recv_bytes(LARGEST)
    except EOFError:  # someone who only looked whether it is there
        return
    except (OSError, MemoryError) as error:
        log.warning("whoever connected sent no frame: %s", error)
        return
    try:
        line.send_bytes(_answer(desk, frame))
    except OSError as error:  # the answer is kept for who asks again
        log.warning("whoever asked is gone: %s", error)


def _answer(desk: Desk, frame: bytes) -> bytes:
    """What goes back, whatever happens: one bad frame does not end the worker."""
    started = time.perf_counter()
    try:
        meta, _ = unpack(frame)
        answer = desk.answer(frame)
    except Refused as error:
        log.warning("a frame is refused: %s", error)
        return REFUSED + str(error).encode()
    except Exception:
        log.exception("a frame could not be answered")
        return REFUSED + f"client {desk.file.client}: what is wrong is said in the site's own log".encode()
    log.info(
        "run %s, round %s, %s: %d bytes down, %d up, %.1f s", meta["run"], meta.get("round", "-"), meta["kind"], len(frame),
        len(answer), time.perf_counter() - started,
    )  # fmt: skip
    return FRAME + answer


def _hurry(line: Connection) -> None:
    """No read or write of it takes longer than that: BlockingIOError."""
    with socket.socket(fileno=os.dup(line.fileno())) as end:
        for way in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, way, struct.pack("ll", PATIENCE, 0))


def _peer(line: Connection) -> int:
    """The user at the other end, as the kernel says."""
    with socket.socket(fileno=os.dup(line.fileno())) as end:
        found = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", found)[1])
