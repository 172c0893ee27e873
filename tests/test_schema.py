"""Schemas: frames of schema 1, as the fedrank of then wrote them, are read and written; what is older or newer is refused."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedrank
import golden
from fedrank import config, frame, hello, sites
from fedrank.frame import Refused, digest, pack, unpack
from toy import same

FILES = {path.stem: path.read_bytes() for path in sorted((Path(__file__).parent / "frames" / "1").glob("*.frame"))}
TOLD = unpack(FILES["setup"])[0]["config"]
NEW = golden.frames(2, TOLD)


def changed(kind: str, **facts: Any) -> bytes:
    """The golden frame of a kind with other facts; None: without that fact."""
    meta, tensors = unpack(FILES[kind])
    return pack({k: v for k, v in {**meta, **facts}.items() if v is not None}, tensors)


def keys(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        yield from keys(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [f"{prefix}{name}"]


def at(section: Any, key: str) -> Any:
    for name in key.split("."):
        section = section[name]
    return section


# ---- what schema 1 said is understood


def test_there_is_one_of_every_kind() -> None:
    kinds = {name: unpack(data)[0]["kind"] for name, data in FILES.items()}
    assert kinds == {
        name: name for name in ("setup", "registration", "train", "update", "evaluate", "evaluation", "error")
    }
    assert {unpack(data)[0]["schema"] for data in FILES.values()} == {1}


def test_a_setup() -> None:
    found = hello.read_setup(FILES["setup"])
    assert (found.run, found.labels, found.fingerprint, found.start) == (golden.RUN, ("bad", "good"), "print", "start")
    assert (found.schema, found.version) == (1, None)
    assert found.imported is not None
    assert same(found.imported, golden.START)
    assert (found.config["local"]["steps"], found.config["model"]["name"]) == (2, "tiny-encoder")


def test_a_registration() -> None:
    found = hello.read_registration(FILES["registration"], golden.RUN)
    assert (found.device, found.fingerprint, found.numerics) == (golden.DEVICE, "print", golden.NUMERICS)
    assert (found.schema, found.version) == (1, "0.1.0")


@pytest.mark.parametrize(("kind", "plan"), [("train", golden.TRAIN), ("evaluate", golden.EVALUATE)])
def test_a_request(kind: str, plan: Any) -> None:
    found = golden.wire(1).open_request(FILES[kind])
    assert (found.kind, found.round, found.rounds, found.client, found.schema) == (kind, 4, 10, "north", 1)
    assert (found.plan.returns, found.plan.since, found.plan.up) == (plan.returns, plan.since, plan.up)
    assert {name: array.tolist() for name, array in found.plan.arrays.items()} == {n: a.tolist() for n, a in plan.arrays.items()}  # fmt: skip
    assert same(found.adapter, golden.STATE.adapter.take(plan.present))
    assert list(found.base_updates) == [1, 3]
    last = found.base_updates[3]
    assert last is not None
    assert same(last, golden.increment())
    assert (found.base_updates[1] is None) == (plan.since == 2)  # it was sent before


def test_answers() -> None:
    ends = golden.wire(1)
    reply = ends.open_reply(FILES["update"], "train", 4, "north", golden.TRAIN, golden.STATE.adapter)
    assert reply.update is not None
    assert same(reply.update.adapter, golden.UPDATE.adapter)
    assert (reply.update.examples, reply.metrics, reply.numerics) == (12, {"loss": 0.5}, golden.NUMERICS)
    assert np.array_equal(reply.update.arrays["keep"], [1, 2])
    scored = ends.open_reply(FILES["evaluation"], "evaluate", 4, "north", golden.EVALUATE, golden.STATE.adapter)
    assert scored.metrics == golden.METRICS
    failed = ends.open_reply(FILES["error"], "train", 4, "north", golden.TRAIN, golden.STATE.adapter)
    assert (failed.update, failed.error) == (None, golden.ERROR)


# ---- and spoken


@pytest.mark.parametrize("kind", FILES)
def test_who_is_asked_to_speak_schema_1_writes_the_same_bytes(kind: str) -> None:
    assert golden.frames(1, TOLD)[kind] == FILES[kind]


@pytest.mark.parametrize("kind", FILES)
def test_what_is_new_in_schema_2(kind: str) -> None:
    """The setup names the server's version and goes out as schema 1; else the number alone."""
    (old, tensors), (new, others) = unpack(FILES[kind]), unpack(NEW[kind])
    more = {"newest": 2, "version": fedrank.__version__} if kind == "setup" else {"schema": 2}
    assert new == old | more
    assert tensors.keys() == others.keys()
    assert all(np.array_equal(tensors[name], others[name]) for name in tensors)
    assert len(NEW[kind]) == len(FILES[kind])


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_digest_is_the_same_in_every_schema(kind: str) -> None:
    assert digest(NEW[kind]) == digest(FILES[kind])


@pytest.mark.parametrize("schema", [1, 2])
def test_an_answer_has_the_schema_of_its_request(schema: int) -> None:
    """Whatever the site itself would rather speak."""
    site = golden.wire(3 - schema)
    asked = {kind: site.open_request((FILES if schema == 1 else NEW)[kind]) for kind in ("train", "evaluate")}
    answers = (
        site.update(asked["train"], golden.UPDATE), site.evaluation(asked["evaluate"], {}), site.error(asked["train"], "?")
    )  # fmt: skip
    assert [unpack(answer)[0]["schema"] for answer in answers] == [schema] * 3


# ---- both ends come to one


@pytest.mark.parametrize(("facts", "agreed"), [
    ({}, 1), ({"newest": 1}, 1), ({"newest": 2, "version": "0.1.0"}, 2), ({"newest": 3, "version": "9.9"}, 2),
    ({"schema": 2, "newest": 3, "version": "9.9"}, 2), ({"schema": 2, "newest": 2, "version": "0.1.0"}, 2),
])  # fmt: skip
def test_a_site_answers_a_setup_in_the_newest_that_both_speak(facts: dict[str, Any], agreed: int) -> None:
    """Also to a server of the next schema, which still speaks this one."""
    found = hello.read_setup(changed("setup", **facts))
    assert (found.schema, found.version) == (agreed, facts.get("version"))


@pytest.mark.parametrize(("facts", "why"), [
    ({"schema": 0}, r"schema version 0, this fedrank 0\.1\.0 speaks 1 to 2"),
    ({"schema": 3}, r"schema version 3, this fedrank 0\.1\.0 speaks 1 to 2"),
    ({"schema": 3, "newest": 4, "version": "9.9"}, r"schema version 3 \(fedrank 9\.9\), this fedrank 0\.1\.0 speaks 1 to 2"),
    ({"schema": 3, "version": "9" * 500}, rf"schema version 3 \(fedrank {'9' * 40}\), this"),
    ({"schema": None}, "schema version None"), ({"schema": None, "newest": 2}, "schema version None"),
    ({"schema": True}, "schema version True"), ({"schema": 1.0}, "schema version 1.0"), ({"newest": "2"}, "schema version 1"),
])  # fmt: skip
@pytest.mark.parametrize("kind", FILES)
def test_another_schema_is_refused(kind: str, facts: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both versions; of every kind."""
    monkeypatch.setattr(fedrank, "__version__", "0.1.0")
    spoilt = changed(kind, **facts)
    with pytest.raises(Refused, match=why):
        unpack(spoilt)


def test_what_schema_1_alone_makes_of_schema_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the setup, of which it is asked first, and refuses what it should not have been sent."""
    monkeypatch.setattr(frame, "SCHEMA", 1)
    assert hello.read_setup(NEW["setup"]).schema == 1
    for kind in NEW.keys() - {"setup"}:
        with pytest.raises(Refused, match=f"^{frame.OTHER} 2, this fedrank .* speaks 1 to 1$"):
            unpack(NEW[kind])


@pytest.mark.parametrize("version", [5, ["0.1.0"], "9" * 41])
def test_what_no_version_is(version: Any) -> None:
    with pytest.raises(Refused, match="a version is a short text"):
        hello.read_setup(changed("setup", newest=2, version=version))


# ---- the config in a setup


def test_a_site_of_schema_1_knows_every_key_that_it_is_told() -> None:
    """A key that came later is told only where it is set: `hello.told` leaves the others to the site's defaults."""
    assert set(keys(hello.told(config.load(golden.SETTINGS)))) <= set(keys(TOLD))


def test_what_is_not_told_is_the_same_at_a_site_of_schema_1() -> None:
    """A default that is another now has to be told whatever it is; a key that went would be unknown here."""
    site = sites.SiteFile(client="north", data=sites.Rows(path=Path("rows")), store=Path("store"))
    now = sites.joined(site, hello.read_setup(FILES["setup"])).model_dump(mode="json")
    told = hello.told(config.load(golden.SETTINGS))
    mine = sites.joined(site, replace(hello.read_setup(FILES["setup"]), config=told)).model_dump(mode="json")
    assert now == mine
    assert {key: at(now, key) for key in keys(TOLD)} == {key: at(TOLD, key) for key in keys(TOLD)}
