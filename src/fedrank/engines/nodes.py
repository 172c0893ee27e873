"""The engines on which clients are nodes of a Flower grid: each site its own, or, in a simulation, any."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from fedrank.engines.flower import KEPT, SLOWEST, WORD, Apart, Content, Grid, Together, converse, send
from fedrank.frame import OTHER, Refused
from fedrank.hello import UNKNOWN, Registration
from fedrank.protocol import ClientId, Device

log = logging.getLogger(__name__)

GREETING = 120.0  # seconds that the first round waits for sites that were told of the run and still load it
AGAIN = 60.0  # seconds after which a site that could not take part is asked again
LOST = 600.0  # seconds after which a site that has not answered is told again: its SuperNode may have ended over it


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
        for client, reply in converse(Apart(self.grid), there, seconds or self.seconds):
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
            if node in self.barred and now - self.barred[node][0] <= AGAIN:
                continue
            if (number := send(self.grid, node, self.hello, KEPT)) is not None:
                self.told[number] = (node, now)
            else:
                self._bar(node, "its SuperLink does not take what it is to be told")
        for number, content in list(self.registrations(self.told)):
            if (told := self.told.pop(number, None)) is not None:
                self._take(told[0], content, here)
        return here

    def _bar(self, node: int, why: str) -> None:
        self.barred[node] = (time.monotonic(), why)
        log.warning("a site takes no part: %s", why)

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
            self._bar(node, str(error))
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
        return converse(Together(self.grid), placed, None, seconds)
