"""What the method promises, held to it on a run of its own."""

import pytest
from grow import Grow

import fedrank
from fedrank.store import Store

CONFIG = {
    "data": {"name": "docstrings", "train_limit": 60, "test_limit": 40},
    "clients": {"count": 3},
    "rounds": {"count": 4, "cohort": 3, "evaluate_every": 4},
    "adapter": {"rank": 4},
}


def test_components_join_one_after_the_other(tmp_path):
    run = fedrank.run(CONFIG, method=Grow(share=1.0), out=tmp_path / "run")
    for round in (2, 3, 4):  # of which states are kept
        for block in Store(run.path).state(round)[0].adapter.blocks.values():
            assert block.B[:, :round].any(axis=0).all()  # what has joined has moved
            assert not block.B[:, round:].any()  # what waits has not
    sent = [row["adapter_bytes_up"] for row in run.rounds]
    assert sent == [sent[0] * round for round in (1, 2, 3, 4)]


def test_a_share_beyond_the_run_is_refused():
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, got 2"):
        Grow(share=2)
