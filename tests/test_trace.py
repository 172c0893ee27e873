"""Spans: where the time goes, each second once."""

import json
import time

import pytest

from fedrank import trace
from fedrank.trace import span


def test_nothing_is_kept_while_nobody_records():
    with span("unseen"):
        pass
    with trace.recording() as spans:
        pass
    assert spans == []


def test_every_second_counts_once():
    spans = [("outer", 0.0, 10.0, 0), ("inner", 1.0, 4.0, 1), ("deep", 2.0, 3.0, 2), ("inner", 5.0, 6.0, 1)]
    assert trace.shares(spans) == {"outer": 6.0, "inner": 3.0, "deep": 1.0}
    assert trace.shares(spans, whole=("outer",)) == {"outer": 10.0}
    assert trace.shares(spans[::-1]) == trace.shares(spans)
    assert sum(trace.shares(spans, whole=("inner",)).values()) == 10.0


def test_spans_are_recorded_over_blocks_and_functions():
    @span("work")
    def work(times: int) -> None:
        time.sleep(0.01)
        if times:
            work(times - 1)

    with trace.recording() as spans:
        with span("all"):
            work(2)
        with pytest.raises(ValueError, match="out"), span("failed"):
            raise ValueError("out")
    assert sorted(name for name, *_ in spans) == ["all", "failed", "work", "work", "work"]
    found = trace.shares(spans)
    assert found["work"] >= 0.03
    assert found["all"] < found["work"]


def test_a_chrome_trace_has_every_span(tmp_path):
    trace.write([("b", 12.0, 13.0, 0), ("a", 11.0, 11.5, 0)], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(e["name"], e["ts"], e["dur"], e["ph"]) for e in events] == [("a", 0.0, 5e5, "X"), ("b", 1e6, 1e6, "X")]
    trace.write([], tmp_path / "empty.json")
    assert json.loads((tmp_path / "empty.json").read_text())["traceEvents"] == []
