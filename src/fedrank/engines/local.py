"""The local engine: every client runs on this machine, through the real wire, on modelled devices."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from fedrank import client, together
from fedrank.engines.workers import Spread
from fedrank.frame import Refused, digest
from fedrank.protocol import ClientId, Device, rng

log = logging.getLogger(__name__)
Sent = tuple[ClientId, bytes, float | None]  # to whom, the request, the deadline


def inline(function: Callable[[list[Sent]], list[bytes | None]]) -> Spread:
    """The function over many arguments, one after the other in this process."""
    return partial(map, function)


def fails(frame: bytes, rate: float, seed: int) -> bool:
    """Whether a request gets no answer, drawn by what is asked, so that it repeats."""
    return bool(rate) and rng(seed, "failure", digest(frame)).random() < rate


@dataclass(frozen=True, eq=False)
class Local:
    """devices: every client. site: its client side, made when it is needed.

    failure_rate: the share of requests that get no answer.
    stack: how many clients are trained together. share: makes one function into one over many arguments, on workers
    perhaps; replies come in the order of requests.
    """

    devices: Mapping[ClientId, Device]
    site: Callable[[ClientId], client.Site]
    failure_rate: float
    seed: int
    stack: int = 1
    share: Callable[[Callable[[list[Sent]], list[bytes | None]]], Spread] = inline
    _answers: Spread = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_answers", self.share(self._answer))

    def fleet(self) -> Mapping[ClientId, Device]:
        return self.devices

    def exchange(
        self, requests: Iterable[tuple[ClientId, Callable[[], bytes]]], seconds: float | None
    ) -> Iterator[tuple[ClientId, bytes]]:
        named = list[list[ClientId]]()

        def sent() -> Iterator[list[Sent]]:
            for group in self._groups(requests):
                frames = [(name, build(), seconds) for name, build in group]
                asked = [one for one in frames if not fails(one[1], self.failure_rate, self.seed)]
                if asked:
                    named.append([name for name, _, _ in asked])
                    yield asked

        for at, replies in enumerate(self._answers(sent())):
            for name, reply in zip(named[at], replies, strict=True):
                if reply is not None:
                    yield name, reply

    def _groups(
        self, requests: Iterable[tuple[ClientId, Callable[[], bytes]]]
    ) -> Iterable[list[tuple[ClientId, Callable[[], bytes]]]]:
        """Who is trained together: groups of at most `stack`, about equal in rows, the same whoever computes them."""
        if self.stack == 1:
            return ([request] for request in requests)
        waiting = list(requests)
        groups: list[list[int]] = [[] for _ in range(-(-len(waiting) // self.stack))]
        sizes = [0] * len(groups)
        for at in sorted(range(len(waiting)), key=lambda at: -self.devices[waiting[at][0]].examples):
            least = min((n for n, group in enumerate(groups) if len(group) < self.stack), key=sizes.__getitem__)
            groups[least].append(at)
            sizes[least] += self.devices[waiting[at][0]].examples
        return ([waiting[at] for at in sorted(group)] for group in groups)

    def _answer(self, sent: list[Sent]) -> list[bytes | None]:
        """The replies of these clients, which work together; None where none comes."""
        codes = [partial(self._reply, *one) for one in sent]
        if len(codes) == 1:
            return [codes[0]()]
        with self.site(sent[0][0]).session():
            replies = together.meet(codes)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def _reply(self, name: ClientId, frame: bytes, seconds: float | None) -> bytes | None:
        try:
            return client.handle(frame, self.site(name), seconds)
        except client.Late:  # on the simulated clock: its answer would not be waited for
            return None
        except Refused as error:
            log.warning("client %s refused its request: %s", name, error)
            return None
