"""What is Flower's: frames as messages of its grid, the components of its apps, and what a SuperNode may push."""

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.serverapp import Grid as Grid
from flwr.serverapp import ServerApp
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from google.protobuf.message import DecodeError

from fedrank.frame import Refused, printable
from fedrank.protocol import ClientId, Silence

log = logging.getLogger(__name__)

ASK = "query.frame"  # the type of all messages: what a frame asks for is said in the frame
KEPT = 30 * 86_400.0  # seconds that a message and its answer are kept, where no deadline ends the wait
SKEW = 300.0  # seconds by which machines' clocks may be apart, by which Flower says what is too old
POLL, SLOWEST = 0.05, 1.0  # seconds between looks for answers, at first and after a while
SALT = 16  # bytes. Flower names objects by their hash: who can guess another's may announce it first, as something else
HERE = 0.5  # seconds in which an answer is pulled that is there, else its thread is left alone
PATIENCE = 60.0  # seconds for which an answer is pulled again, on which the SuperLink fails
WORD = 60.0  # seconds after which the log names who is awaited


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
        if told:
            told["salt"] = secrets.token_bytes(SALT)
        return Message(RecordDict({"frame": ConfigRecord(told)}), reply_to=message)

    return app


# What a message of another machine says: a frame, or why there is none; None for nothing.
Content = bytes | str | None


@dataclass(eq=False)
class Together:
    """Pulls answers that are made on this machine: of the messages with these numbers, each once."""

    EACH: ClassVar = 0.0
    grid: Grid

    def __call__(self, numbers: Collection[str]) -> Iterator[tuple[str, Content]]:
        for message in self.grid.pull_messages(list(numbers)):
            yield message.metadata.reply_to_message_id, _content(message)


@dataclass(eq=False)
class Apart:
    """Pulls each answer in a thread of its own.

    Flower announces an answer before it is there. Who pulls it then waits for what is missing, for minutes or as long as its
    sender likes, with all answers that are pulled beside it; and where it cannot be read, no other is returned either.
    """

    EACH: ClassVar = 0.01  # seconds between looks for each answer that is awaited, as each is a request of its own
    grid: Grid
    at_work: dict[str, threading.Thread] = field(default_factory=dict)
    failing: dict[str, float] = field(default_factory=dict)  # since when
    pulled: dict[str, Content | BaseException] = field(default_factory=dict)

    def __call__(self, numbers: Collection[str]) -> Iterator[tuple[str, Content]]:
        for number in numbers:
            if number not in self.at_work and number not in self.pulled:
                self.at_work[number] = thread = threading.Thread(target=self._pull, args=(number,), daemon=True)
                thread.start()
        ends = time.monotonic() + HERE
        for thread in self.at_work.copy().values():
            thread.join(max(0.0, ends - time.monotonic()))
        for number in self.pulled.copy():
            found = self.pulled.pop(number)
            self.failing.pop(number, None)
            if isinstance(found, BaseException):
                raise found
            if number in numbers:  # else it was given up
                yield number, found

    def _pull(self, number: str) -> None:
        try:
            for message in self.grid.pull_messages([number]):
                if message.metadata.reply_to_message_id == number:
                    self.pulled[number] = _content(message)
        except httpx.HTTPStatusError as error:  # for a moment, such as that of a busy database, or at this answer alone
            if time.monotonic() - self.failing.setdefault(number, time.monotonic()) > PATIENCE:
                self.pulled[number] = f"an answer on which its SuperLink fails: {error.response.status_code}"
        except (OSError, httpx.TransportError) as error:  # no link, for anybody
            self.pulled[number] = error
        except Exception as error:
            self.pulled[number] = f"an answer that Flower cannot read: {type(error).__name__}"
        except BaseException as error:  # Flower's word for a run that was stopped
            self.pulled[number] = error
        finally:
            del self.at_work[number]


def converse(
    pull: Together | Apart,
    asked: Iterable[tuple[ClientId, int, bytes]],
    seconds: float | None,
    clock: float | None = None,
) -> Iterator[tuple[ClientId, bytes | str]]:
    """Send each frame to its node, and yield what comes back: a frame, or why there is none.

    seconds: after which nobody waits any longer. clock: a deadline on the clients' own clocks, which they keep.
    """
    sent: dict[str, tuple[ClientId, int]] = {}
    started = time.monotonic()
    for client, node, frame in asked:
        kept = KEPT if seconds is None else seconds + SKEW
        if (number := send(pull.grid, node, frame, kept, clock)) is not None:
            sent[number] = (client, node)
        else:
            yield client, "its SuperLink did not take the message; is it too large?"
    pause, word = POLL, WORD
    while sent:
        looked = time.monotonic()
        waited = looked - started
        found = list(pull(sent))
        looking = time.monotonic() - looked
        for number, content in found:
            one = sent.pop(number, None)
            if one is not None and content is not None:
                yield one[0], content
        if seconds is not None and waited > seconds:
            here = set(pull.grid.get_node_ids())
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
            time.sleep(max(pause, looking, pull.EACH * len(sent)))


def send(grid: Grid, node: int, frame: bytes, kept: float, clock: float | None = None) -> str | None:
    """The message's number, by which its answer is found; None where the SuperLink does not take it."""
    record = ConfigRecord({"frame": frame, "seconds": clock or 0.0, "salt": secrets.token_bytes(SALT)})
    content = RecordDict({"frame": record})
    try:
        return next(iter(grid.push_messages([Message(content, node, ASK, ttl=kept)])), None) or None
    except ObjectPushError as error:  # its node may confirm it while it is uploaded
        log.warning("a message to node %d is gone before it was there: %s", node, error)
        return None


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


def forged(body: bytes) -> str | None:
    """What is wrong with what a SuperNode pushes, where it is no answer in its own name; the SuperLink does not look.

    It would give a message to itself to whoever pulls the next answer, in that one's place; a time that is no number makes
    it fail at every pull; and who takes the parts of a message that is still uploaded makes the upload fail.
    """
    try:
        asked = PushMessagesRequest.FromString(body)
    except DecodeError:
        return "no message"
    if len(asked.messages_list) != 1 or len(asked.message_object_trees) != 1:
        return "other than one message"
    said, tree = asked.messages_list[0].metadata, asked.message_object_trees[0]
    if said.src_node_id != asked.node.node_id:
        return "a message in another's name"
    if not said.reply_to_message_id:
        return "a message that answers none"
    if said.message_id != tree.object_id or said.message_id == said.reply_to_message_id:
        return "another message's parts"
    if not all(map(math.isfinite, (said.ttl, said.created_at, *asked.clientapp_runtime_list))):
        return "a message of no time"
    return None
