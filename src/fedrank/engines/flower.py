"""The Flower engine: frames as messages of a Flower grid, each to the SuperNode of its client."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid as Grid
from flwr.serverapp import ServerApp

from fedrank.frame import OTHER, Refused, printable
from fedrank.hello import UNKNOWN, Registration
from fedrank.protocol import ClientId, Device, Silence

log = logging.getLogger(__name__)

ASK = "query.frame"  # the type of all messages: what a frame asks for is said in the frame
KEPT = 30 * 86_400.0  # seconds that a message and its answer are kept, where no deadline ends the wait
SKEW = 300.0  # seconds by which machines' clocks may be apart, by which Flower says what is too old
POLL, SLOWEST = 0.05, 1.0  # seconds between looks for answers, at first and after a while
HERE = 0.5  # seconds in which an answer is pulled that is there, else its thread is left alone
WORD = 60.0  # seconds after which the log names who is awaited
GREETING = 120.0  # seconds that the first round waits for sites that were told of the run and still load it
AGAIN = 60.0  # seconds after which a site that could not take part is asked again
LOST = 600.0  # seconds after which a site that has not answered is told again: its SuperNode may have ended over it


# A frame, the run's settings, its SuperNode's, and the deadline of the round on the client's own clock -> the frame that
# answers it, None where the client stays silent; Refused says why not.
Answer = Callable[[bytes, Mapping[str, Any], Mapping[str, Any], float | None], bytes | None]


def server_app(play: Callable[[Grid, Mapping[str, Any]], None]) -> ServerApp:
    """The Flower component of a run's server. play: a grid, and the run's settings."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        play(grid, dict(context.run_config))

    return app


def client_app(answer: Answer) -> ClientApp:
    """The Flower component of a client."""
    app = ClientApp()

    @app.query("frame")
    def query(message: Message, context: Context) -> Message:
        told: dict[str, Any] = {}
        try:
            asked = message.content.config_records["frame"]
            frame, seconds = asked.get("frame"), asked.get("seconds")
            if not isinstance(frame, bytes) or not isinstance(seconds, float):
                raise Refused("a message that holds no frame")
            reply = answer(frame, dict(context.run_config), dict(context.node_config), seconds or None)
            if reply is not None:
                told["frame"] = reply
        except Refused as error:
            told["refused"] = str(error)
        return Message(RecordDict({"frame": ConfigRecord(told)}), reply_to=message)

    return app


# What a message of another machine says: a frame, or why there is none; None for nothing.
Content = bytes | str | None
# The numbers of messages that were sent -> those of them that have been answered, each once, with what the answer says.
Pull = Callable[[Collection[str]], Iterable[tuple[str, Content]]]


def together(grid: Grid, numbers: Collection[str]) -> Iterator[tuple[str, Content]]:
    """Pull answers that are made on this machine."""
    for message in grid.pull_messages(list(numbers)):
        yield message.metadata.reply_to_message_id, _content(message)


@dataclass(eq=False)
class Apart:
    """Pulls each answer in a thread of its own.

    Flower announces an answer before it is there. Who pulls it then waits for what is missing, for minutes or as long as its
    sender likes, with all answers that are pulled beside it; and where it cannot be read, no other is returned either.
    """

    grid: Grid
    at_work: set[str] = field(default_factory=set)
    pulled: dict[str, Content | BaseException] = field(default_factory=dict)

    def __call__(self, numbers: Collection[str]) -> Iterator[tuple[str, Content]]:
        idle = [number for number in numbers if number not in self.at_work and number not in self.pulled]
        threads = [threading.Thread(target=self._pull, args=(number,), daemon=True) for number in idle]
        self.at_work.update(idle)
        for thread in threads:
            thread.start()
        ends = time.monotonic() + HERE
        for thread in threads:
            thread.join(max(0.0, ends - time.monotonic()))
        for number in numbers:
            if number in self.pulled:
                found = self.pulled.pop(number)
                if isinstance(found, BaseException):
                    raise found
                yield number, found

    def _pull(self, number: str) -> None:
        try:
            for message in self.grid.pull_messages([number]):
                if message.metadata.reply_to_message_id == number:
                    self.pulled[number] = _content(message)
        except Exception as error:
            ours = isinstance(error, OSError | httpx.HTTPError)  # the SuperLink's, not the sender's
            self.pulled[number] = error if ours else f"an answer that Flower cannot read: {type(error).__name__}"
        except BaseException as error:  # Flower's word for a run that was stopped
            self.pulled[number] = error
        finally:
            self.at_work.discard(number)


def converse(
    grid: Grid,
    asked: Iterable[tuple[ClientId, int, bytes]],
    seconds: float | None,
    pull: Pull,
    clock: float | None = None,
) -> Iterator[tuple[ClientId, bytes | str]]:
    """Send each frame to its node, and yield what comes back: a frame, or why there is none.

    seconds: after which nobody waits any longer. clock: a deadline on the clients' own clocks, which they keep.
    """
    sent: dict[str, tuple[ClientId, int]] = {}
    started = time.monotonic()
    for client, node, frame in asked:
        kept = KEPT if seconds is None else seconds + SKEW
        if (number := _send(grid, node, frame, kept, clock)) is not None:
            sent[number] = (client, node)
        else:
            yield client, "its SuperLink did not take the message; is it too large?"
    pause, word = POLL, WORD
    while sent:
        looked = time.monotonic()
        waited = looked - started
        found = list(pull(sent))
        for number, content in found:
            one = sent.pop(number, None)
            if one is not None and content is not None:
                yield one[0], content
        if seconds is not None and waited > seconds:
            here = set(grid.get_node_ids())
            for client, node in sent.values():
                state = "though its node is connected" if node in here else "and its node is gone"
                yield client, Silence(f"no answer within {seconds:g} s, {state}")
            return
        if waited > word:
            names = sorted(client for client, _ in sent.values())
            log.warning("awaited for %.0f s: %s", waited, ", ".join(names[:20]))
            word += WORD
        pause = POLL if found else min(SLOWEST, pause * 1.5)
        if sent:
            time.sleep(max(pause, time.monotonic() - looked))


def _send(grid: Grid, node: int, frame: bytes, kept: float, clock: float | None = None) -> str | None:
    """The message's number, by which its answer is found."""
    content = RecordDict({"frame": ConfigRecord({"frame": frame, "seconds": clock or 0.0})})
    return next(iter(grid.push_messages([Message(content, node, ASK, ttl=kept)])), None) or None


def _content(message: Message) -> Content:
    """Its sender may have written anything."""
    if message.has_error():
        return f"Flower error {message.error.code}: {printable(str(message.error.reason)[:300])}"
    try:
        record = message.content.config_records["frame"]
    except (KeyError, AttributeError, ValueError):
        return "a message that holds no frame"
    frame, refused = record.get("frame"), record.get("refused")
    if isinstance(frame, bytes):
        return frame
    if isinstance(refused, str):
        return printable(refused[:300])
    return "a message that holds no frame" if record else None


@dataclass(eq=False)
class Sites:
    """The engine on which every client is a site with a SuperNode of its own.

    hello: the frame that tells a site of the run. admit: its answer, its node -> what it registers; Refused where it cannot
    take part. minimum: how many there must be before a round begins. seconds: of the wait where a round has none. schemas:
    client -> the schema of its frames, noted here for who writes them. known: client -> its node and device. barred:
    node -> when it was last told, and why it takes no part. told: message -> the node that it told of the run, and when.
    """

    grid: Grid
    hello: bytes
    admit: Callable[[bytes, int], Registration]
    minimum: int
    seconds: float | None
    schemas: dict[ClientId, int]
    known: dict[ClientId, tuple[int, Device]] = field(default_factory=dict)
    barred: dict[int, tuple[float, str]] = field(default_factory=dict)
    told: dict[str, tuple[int, float]] = field(default_factory=dict)
    begun: bool = False

    def __post_init__(self) -> None:
        self.registrations = Apart(self.grid)

    def fleet(self) -> dict[ClientId, Device]:
        """Every site whose node is connected, in the order of their ids; waits for as many as a round needs.

        The first round waits for all that are connected by then, within reason.
        """
        started, word = time.monotonic(), WORD
        while True:
            here = self._greet()
            found = {client: device for client, (node, device) in sorted(self.known.items()) if node in here}
            waited = time.monotonic() - started
            if len(found) >= self.minimum and (self.begun or not self.told or waited > GREETING):
                self.begun = True
                return found
            if waited > word:
                why = "; ".join(reason for _, reason in self.barred.values())
                log.warning("%d sites are here after %.0f s, and a round needs %d. %s", len(found), waited, self.minimum, why)  # fmt: skip
                word += WORD
            time.sleep(SLOWEST if self.told else 5 * SLOWEST)

    def exchange(
        self, requests: Iterable[tuple[ClientId, Callable[[], bytes]]], seconds: float | None
    ) -> Iterator[tuple[ClientId, bytes | str]]:
        asked = list(requests)
        there = ((client, self.known[client][0], build()) for client, build in asked if client in self.known)
        yield from ((client, "it is told of the run again first") for client, _ in asked if client not in self.known)
        for client, reply in converse(self.grid, there, seconds or self.seconds, Apart(self.grid)):
            # Its store is gone, or an older fedrank is there now: it is told again before the next round.
            if isinstance(reply, str) and reply.startswith((UNKNOWN, OTHER)):
                self.known.pop(client, None)
            yield client, reply

    def _greet(self) -> set[int]:
        """Tell new nodes of the run, and take in what has been answered; the nodes that are connected."""
        here, now = set(self.grid.get_node_ids()), time.monotonic()
        at_work = {node for node, _ in self.known.values()}
        at_work |= {node for node, at in self.told.values() if now - at < LOST}
        for node in here - at_work:
            due = node not in self.barred or now - self.barred[node][0] > AGAIN
            if due and (number := _send(self.grid, node, self.hello, KEPT)) is not None:
                self.told[number] = (node, now)
        for number, content in list(self.registrations(self.told)):
            if (told := self.told.pop(number, None)) is not None:
                self._take(told[0], content, here)
        return here

    def _take(self, node: int, told: Content, here: set[int]) -> None:
        try:
            if not isinstance(told, bytes):
                raise Refused(told or "a message that holds no frame")
            found = self.admit(told, node)
            device = found.device
            other = self.known.get(device.id, (node, device))[0]
            if other != node and other in here:
                raise Refused(f"client {device.id} is there already, as another node")
        except Refused as error:
            self.barred[node] = (time.monotonic(), str(error))
            log.warning("a site takes no part: %s", error)
        else:
            self.barred.pop(node, None)
            self.told = {number: one for number, one in self.told.items() if one[0] != node}
            self.known[device.id] = (node, device)
            self.schemas[device.id] = found.schema
            log.info(
                "client %s is there: %d examples, %s, fedrank %s", device.id, device.examples, device.kind, found.version
            )  # fmt: skip


@dataclass(eq=False)
class Simulated:
    """The engine on Flower's simulation runtime, where every node can be any client of this machine.

    fails: whether a request gets no answer.
    """

    grid: Grid
    devices: Mapping[ClientId, Device]
    fails: Callable[[bytes], bool]

    def fleet(self) -> Mapping[ClientId, Device]:
        return self.devices

    def exchange(
        self, requests: Iterable[tuple[ClientId, Callable[[], bytes]]], seconds: float | None
    ) -> Iterator[tuple[ClientId, bytes | str]]:
        nodes = sorted(self.grid.get_node_ids())
        frames = ((client, build()) for client, build in requests)
        asked = (one for one in frames if not self.fails(one[1]))
        placed = ((client, nodes[at % len(nodes)], frame) for at, (client, frame) in enumerate(asked))
        return converse(self.grid, placed, None, partial(together, self.grid), seconds)
