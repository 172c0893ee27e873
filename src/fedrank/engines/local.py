"""The local engine: every client runs in this process, through the real wire, on modelled devices."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from fedrank import client
from fedrank.frame import Refused, digest
from fedrank.protocol import ClientId, Device, rng

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Local:
    """devices: every client. site: its client side, made when first needed.

    failure_rate: the share of requests that get no answer, drawn by what is asked, so that it repeats.
    """

    devices: Mapping[ClientId, Device]
    site: Callable[[ClientId], client.Site]
    failure_rate: float
    seed: int

    def fleet(self) -> Mapping[ClientId, Device]:
        return self.devices

    def exchange(
        self, requests: Iterable[tuple[ClientId, Callable[[], bytes]]], seconds: float | None
    ) -> Iterator[tuple[ClientId, bytes]]:
        for name, build in requests:
            frame = build()
            if self.failure_rate and rng(self.seed, "failure", digest(frame)).random() < self.failure_rate:
                continue
            try:
                reply = client.handle(frame, self.site(name), seconds)
            except client.Late:  # on the simulated clock: its answer would not be waited for
                continue
            except Refused as error:
                log.warning("client %s refused its request: %s", name, error)
                continue
            yield name, reply
