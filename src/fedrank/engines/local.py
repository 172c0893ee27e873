"""The local engine: every client runs on this machine, through the real wire, on modelled devices."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from fedrank import client
from fedrank.engines.workers import Spread
from fedrank.frame import Refused, digest
from fedrank.protocol import ClientId, Device, rng

log = logging.getLogger(__name__)
Sent = tuple[ClientId, bytes, float | None]


def inline(function: Callable[[Sent], bytes | None]) -> Spread:
    """The function over many arguments, one after the other in this process."""
    return partial(map, function)


@dataclass(frozen=True, eq=False)
class Local:
    """devices: every client. site: its client side, made when first needed.

    failure_rate: the share of requests that get no answer, drawn by what is asked, so that it repeats.
    share: makes one function into one over many arguments, on workers perhaps; replies come in the order of requests.
    """

    devices: Mapping[ClientId, Device]
    site: Callable[[ClientId], client.Site]
    failure_rate: float
    seed: int
    share: Callable[[Callable[[Sent], bytes | None]], Spread] = inline
    _answers: Spread = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_answers", self.share(self._answer))

    def fleet(self) -> Mapping[ClientId, Device]:
        return self.devices

    def exchange(
        self, requests: Iterable[tuple[ClientId, Callable[[], bytes]]], seconds: float | None
    ) -> Iterator[tuple[ClientId, bytes]]:
        names = list[ClientId]()

        def sent() -> Iterator[Sent]:
            for name, build in requests:
                frame = build()
                if self.failure_rate and rng(self.seed, "failure", digest(frame)).random() < self.failure_rate:
                    continue
                names.append(name)
                yield name, frame, seconds

        for at, reply in enumerate(self._answers(sent())):
            if reply is not None:
                yield names[at], reply

    def _answer(self, sent: Sent) -> bytes | None:
        """A client's reply; None where none comes."""
        name, frame, seconds = sent
        try:
            return client.handle(frame, self.site(name), seconds)
        except client.Late:  # on the simulated clock: its answer would not be waited for
            return None
        except Refused as error:
            log.warning("client %s refused its request: %s", name, error)
            return None
