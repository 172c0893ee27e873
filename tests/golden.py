"""What the frames in tests/frames say: one of every kind, of numbers that no generator draws.

Those of schema 1 were written by this file (`python tests/golden.py tests/frames/1`) as it was while fedrank knew schema
1 alone, in the commit that added them. They are never written again: that a later fedrank reads and writes them is tested.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedrank import hello
from fedrank.adapter import Adapter, Block
from fedrank.protocol import Device, Load, ModelSpec, Module, Plan, State, Update
from fedrank.wire import Wire

RUN = "0123456789abcdef"
NUMERICS = {"fedrank": "0.1.0", "threads": 1}
SPEC = ModelSpec((Module("0.m", 2, 3, 0), Module("1.m", 3, 2, 1)), 2, {}, 2, 2.0, "print")
SETTINGS = {
    "model": {"name": "tiny-encoder"}, "data": {"labels": ["bad", "good"]}, "adapter": {"rank": 2, "targets": ["query"]},
    "local": {"steps": 2}, "engine": {"kind": "flower", "insecure": True, "compute": "float32", "products": "torch"},
}  # fmt: skip
DEVICE = Device("north", 5, "laptop", None, Load(1, 2, 3, 4, 5, 6, 7), 1.0, 0.0, 2.0, 2.0, 1.0, 3.0)
METRICS = {"accuracy": 0.5, "loss": 0.25, "rows": 4.0}
ERROR = "DeviceError: out of memory"


def ramp(*shape: int, by: float = 0.125) -> np.ndarray:
    """1, 2, 3, ... times this step: exact in every type."""
    return (np.arange(1, 1 + np.prod(shape, dtype=int), dtype=np.float32) * np.float32(by)).reshape(shape)


def adapter(by: float) -> Adapter:
    """Both modules, two components each, and a head."""
    blocks = {
        m.name: Block(np.arange(2), ramp(m.out, 2, by=by), ramp(2, by=by), ramp(2, m.in_, by=by)) for m in SPEC.modules
    }
    return Adapter(blocks, 2.0, {"head.weight": ramp(2, 2, by=by)})


def increment() -> Adapter:
    """An update of the base."""
    return Adapter({"0.m": Block(np.arange(1), ramp(2, 1), None, ramp(1, 3))}, 2.0, {"1.m": ramp(3, 2)})


START = adapter(0.125)
STATE = State(3, 10, adapter(0.25), base_updates={1: increment(), 3: increment()})
TRAIN = Plan(
    {"0.m": np.array([0, 1])}, {"1.m": np.array([1])}, since=2, arrays={"budget": np.array(5)}, returns={"keep": ("uint8", (2,))}
)  # fmt: skip
EVALUATE = Plan({}, {"0.m": np.array([0, 1]), "1.m": np.array([0, 1])}, learn="", up="")
UPDATE = Update(adapter(0.5).take(TRAIN.train), 12, {"loss": 0.5}, {"keep": np.array([1, 2], np.uint8)})


def wire(schema: int) -> Wire:
    """Of a server that knows which schema its site speaks."""
    return Wire(SPEC, START, "f32", RUN, 7, NUMERICS, {"north": schema})


def frames(schema: int, told: Mapping[str, Any]) -> dict[str, bytes]:
    """One of every kind, by its name. told: the config in the setup; in schema 1 it was that of SETTINGS, whole."""
    ends = wire(schema)
    asked = {
        kind: ends.request(kind, "north", plan, STATE) for kind, plan in (("train", TRAIN), ("evaluate", EVALUATE))
    }  # type: ignore[arg-type]
    train, evaluate = (ends.open_request(frame) for frame in asked.values())
    return asked | {
        "setup": hello.write_setup(hello.Setup(RUN, told, ("bad", "good"), "print", "start", START, schema)),
        "registration": hello.write_registration(hello.Registration(RUN, DEVICE, "print", NUMERICS, schema)),
        "update": ends.update(train, UPDATE),
        "evaluation": ends.evaluation(evaluate, METRICS),
        "error": ends.error(train, ERROR),
    }
