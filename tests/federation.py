"""A federation of real programs on loopback, with TLS and node authentication; and what its runs come to on one machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import fedrank
from fedrank import config, experiment, ledger, parts, remote, resolve, sites, store
from fedrank.deploy import keys

WORDS = {"colour": ("red", "green", "blue"), "animal": ("dog", "cat", "cow"), "motion": ("run", "walk", "jump")}
LABELS = tuple(WORDS)
PORTS = count(12000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")), 2)
# Program and home of what can be killed; None: a site's.
PROGRAMS = {
    "the worker": ("site", None), "the client app": ("flwr-clientapp", None), "the SuperNode": ("flower-supernode", None),
    "the gate": ("gate", "gate"), "the server app": ("flwr-serverapp", "link"), "the SuperLink": ("flower-superlink", "link"),
}  # fmt: skip
PLAYED = {"compute": "float32", "products": "torch", "stack": 1}  # the engine of a replay
SERVERS = ("the server app", "the SuperLink")  # with which the run's command ends, until it is resumed


def rows(seed: int, count: int) -> list[dict[str, str]]:
    random = np.random.default_rng(seed)
    labels = [LABELS[at] for at in random.integers(len(LABELS), size=count)]
    return [{"text": " ".join(random.choice([*WORDS[label], "the", "of"], 8)), "label": label} for label in labels]


def write_rows(path: Path, found: Sequence[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def _open(port: int) -> bool:
    with suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def free_port() -> int:
    """One that is free, as is the next. Each is given out once, below those that lines of other programs get."""
    return next(port for port in PORTS if _open(port) and _open(port + 1))


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def until(true: Callable[[], Any], seconds: float, what: str) -> Any:
    """What this gives once it is something; TimeoutError says what was waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{what}: not within {seconds:g} s")


@dataclass
class Federation:
    """folder: all that it has. port: the gate's, where sites connect. inner: the SuperLink's own.

    programs: those that it started, by name; each keeps running until it is stopped.
    """

    folder: Path
    names: tuple[str, ...]
    port: int = field(default_factory=free_port)
    inner: int = field(default_factory=free_port)
    programs: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys.make(self.keys, ["127.0.0.1"], [*self.names, "stranger", "hostile"])
        for at, name in enumerate(self.names):
            write_rows(self.folder / name / "rows" / "train.jsonl", rows(at, 60 + at))
            self.site(name).write_text(f"client: {name}\ndata: {{path: rows}}\nstore: store\n")
        remote.write_connection(self.home("cli"), f"127.0.0.1:{self.inner}", self.keys / "ca.crt")

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def files(self) -> list[Path]:
        return [self.site(name) for name in self.names]

    def home(self, name: str) -> Path:
        return self.folder / "homes" / name

    def site(self, name: str) -> Path:
        return self.folder / name / "site.yaml"

    def config(self, **sections: Any) -> dict[str, Any]:
        """Of a run here."""
        raw: dict[str, Any] = {
            "model": {"name": "tiny-encoder"}, "data": {"labels": list(LABELS)}, "adapter": {"rank": 4},
            "local": {"lr": 0.01, "batch_size": 8}, "method": {"name": "fedara"},
            "rounds": {"count": 5, "cohort": len(self.names), "evaluate_every": 5, "minimum": len(self.names)},
            "engine": {
                "kind": "flower", "superlink": f"127.0.0.1:{self.inner}", "root_certificate": str(self.keys / "ca.crt"),
                "compute": "float32", "products": "torch",
            },
        }  # fmt: skip
        for name, section in sections.items():
            raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
        return raw

    def start(self, name: str, words: Sequence[str], home: str) -> subprocess.Popen[bytes]:
        """A program in a group of its own, whose words go to a log; another of this name is over."""
        if name in self.programs:
            self.end(name)
        with (self.folder / f"{name}.log").open("ab") as log:
            environment = remote.environment(self.home(home)) | {"OMP_NUM_THREADS": "1"}
            made = subprocess.Popen(
                words, env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )  # fmt: skip
        self.programs[name] = made
        return made

    def start_link(self) -> None:
        k = self.keys
        self.start("link", [
            remote.tool("flower-superlink"), "--port", str(self.inner), "--database", str(self.folder / "state.db"),
            "--ssl-ca-certfile", str(k / "ca.crt"), "--ssl-certfile", str(k / "server.crt"), "--ssl-keyfile", str(k / "server.key"),
            "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        ], "link")  # fmt: skip
        until(lambda: answers(self.inner), 120, "the SuperLink")

    def start_gate(self) -> None:
        words = [
            "deploy",
            "gate",
            "--port",
            str(self.port),
            "--inner",
            str(self.inner),
            "--certificates",
            str(self.keys),
        ]
        self.start("gate", [sys.executable, "-m", "fedrank.cli", *words], "gate")
        until(lambda: answers(self.port), 120, "the gate")

    def register(self, name: str) -> None:
        self.flwr("supernode", "register", str(self.keys / f"{name}.pub"), remote.NAME)

    def flwr(self, *words: str) -> str:
        done = subprocess.run(
            [remote.tool("flwr"), *words],
            env=remote.environment(self.home("cli")),
            text=True,
            capture_output=True,
            check=False,
        )
        assert not done.returncode, done.stdout + done.stderr
        return done.stdout

    def start_worker(self, name: str) -> None:
        self.start(f"{name}.worker", [sys.executable, "-m", "fedrank.cli", "site", "serve", str(self.site(name))], name)
        until((self.folder / name / "store" / "site.sock").exists, 120, f"the worker of {name}")

    def start_node(self, name: str, key: str | None = None, insecure: bool = False, site: str | None = None) -> None:
        """A SuperNode that is started again until it stays, as a service manager does."""
        how = ["--insecure"] if insecure else [
            "--root-certificates", str(self.keys / "ca.crt"), "--auth-supernode-private-key", str(self.keys / f"{key or name}.key")
        ]  # fmt: skip
        words = [
            remote.tool("flower-supernode"), "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()),
            "--node-config", f'site="{self.site(site or name)}"', *how,
        ]  # fmt: skip
        loop = 'while :; do "$@"; sleep 5; done'
        self.start(f"{name}.node", ["bash", "-c", loop, "bash", *words], name)

    def run(self, out: Path, *words: str) -> subprocess.Popen[bytes]:
        """`fedrank run` or `resume`, whose events go to a log."""
        return self.start("run", [sys.executable, "-m", "fedrank.cli", *words, "-o", "json"], "run")

    def begin(self, raw: Mapping[str, Any], out: Path) -> subprocess.Popen[bytes]:
        path = self.folder / f"{out.name}.yaml"
        path.write_text(json.dumps(raw))
        return self.run(out, "run", str(path), "--out", str(out))

    def play(self, raw: Mapping[str, Any], out: Path, seconds: float) -> None:
        """A whole run."""
        self.wait(self.begin(raw, out), seconds)

    def wait(self, process: subprocess.Popen[bytes], seconds: float, code: int = 0) -> None:
        try:
            ended = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"a run took more than {seconds:g} s; {self.tail('run')}") from None
        assert ended == code, f"code {ended}: {self.tail('run')}"

    def said(self, name: str) -> str:
        """All that a program of this name has logged, those before it too."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def tail(self, name: str) -> str:
        return self.said(name)[-3000:]

    def found(self, word: str, home: str) -> list[psutil.Process]:
        """The processes of this home that run this program, or this command of fedrank."""
        result = []
        for process in psutil.process_iter(["environ", "cmdline"]):
            mine = (process.info["environ"] or {}).get("FLWR_HOME") == str(self.home(home))
            first = [Path(part).name for part in process.info["cmdline"] or ()][:5]
            if mine and word in first and first[0] != "bash":  # that starts it again
                result.append(process)
        return result

    def working(self, site: str) -> bool:
        """Whether its SuperNode has a message that is not answered yet, and a client app is at it."""
        _, received, since = self.said(f"{site}.node").rpartition("Receiving: ")
        return bool(received and "Sending: " not in since and self.found("flwr-clientapp", site))

    def back(self, site: str, out: Path, round: int) -> bool:
        """Whether an answer of this site, which the worker that runs now has made, was merged in a later round."""
        made = self.said(f"{site}.worker").rpartition(" is ready, ")[2]  # else a client app loads the model itself
        last, who = max(committed(out)), answered(out)
        return any(site in who[at] and f"round {at}, train" in made for at in range(round + 1, last + 1))

    def kill(self, word: str, home: str) -> list[int]:
        """kill -9; what they started lives on, as it does on a machine."""
        killed = []
        for process in self.found(word, home):
            with suppress(psutil.NoSuchProcess):
                process.kill()
                killed.append(process.pid)
        return killed

    def strike(self, what: str, site: str) -> None:
        """kill -9 of one of PROGRAMS, of this site or the server's; what no service manager here starts again is started."""
        word, home = PROGRAMS[what]
        until(lambda: self.kill(word, home or site), 60, what)
        if what == "the worker":
            self.start_worker(site)
        if what == "the gate":
            self.start_gate()
        if what == "the SuperLink":
            self.start_link()

    def end(self, name: str) -> None:
        """One program, with all that is in its group."""
        process = self.programs.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for name in list(self.programs):
            self.end(name)
        homes = {str(path) for path in (self.folder / "homes").iterdir()}
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get("FLWR_HOME") in homes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


@contextmanager
def federation(
    folder: Path, names: tuple[str, ...] = ("north", "south", "west"), warm: bool = True
) -> Iterator[Federation]:
    """Up and running; all of it ends with the block."""
    made = Federation(folder, names)
    try:
        made.start_link()
        made.start_gate()
        for name in names:
            made.register(name)
            if warm:
                made.start_worker(name)
            made.start_node(name)
        yield made
    finally:
        made.stop()


# ---- the same on this machine


def put_key(folder: Path, key: bytes = bytes(range(32))) -> None:
    """Of the noise that is made there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / store.KEY).write_bytes(key)


def named(raw: Mapping[str, Any], out: Path) -> str:
    """What frames will call the run that is played there, which is told before it begins."""
    out.mkdir(parents=True, exist_ok=True)
    (out / store.NAME).write_bytes(b"n" * 32)
    return resolve.run_id(resolve.resolve(config.load(raw))[0], store.Store(out).name)


def state(path: Path, round: int) -> bytes:
    return (path / "states" / f"{round:04d}.safetensors").read_bytes()


def committed(path: Path) -> list[int]:
    """The rounds whose States are kept."""
    return sorted(int(file.stem) for file in (path / "states").glob("*.safetensors"))


def answered(path: Path) -> dict[int, set[str]]:
    """Whose updates were merged, by round."""
    rows = ledger.read(path / "clients.jsonl")
    return {
        round: {row["client"] for row in rows if row["round"] == round and row["ok"]}
        for round in {row["round"] for row in rows}
    }


def local(
    files: Iterable[Path], raw: Mapping[str, Any], out: Path, answered: Mapping[int, set[str]] | None = None,
    imported: Path | None = None,
) -> None:  # fmt: skip
    """A run of these sites by the local engine; answered: who did in which round, where not all did."""
    data = sites.together(files, LABELS)

    def prepare(settings: config.Config, method: Any, rows: Any) -> parts.Parts:
        found = parts.prepare(settings, method, rows)
        return found if answered is None else replace(found, carrier=partial(silenced, answered=answered))

    loaded = config.load({**raw, "data": {"name": data.name}, "engine": PLAYED})
    for _ in experiment.start(loaded, out, imported=imported, data=data, by=prepare):
        pass


def silenced(made: parts.Parts, wire: Any, store: Any, answered: Mapping[int, set[str]]) -> Any:
    """The local engine, on which only these clients answer their training requests."""
    engine = parts.here(made, wire, store)

    class Some:
        def fleet(self) -> Any:
            return engine.fleet()

        def exchange(self, requests: Any, seconds: float | None) -> Any:
            asked = []
            for client, build in requests:
                frame = build()
                request = wire.open_request(frame)
                if request.kind != "train" or client in answered[request.round]:
                    asked.append((client, lambda frame=frame: frame))
            return engine.exchange(asked, seconds)

    return Some()


def follows(made: Federation, raw: Mapping[str, Any], path: Path, tmp_path: Path) -> None:
    """Its State is what the answers that arrived imply."""
    rows = ledger.read(path / "rounds.jsonl")
    assert [row["round"] for row in rows] == list(range(1, raw["rounds"]["count"] + 1))
    local(made.files, raw, tmp_path / "again", answered(path))
    last = raw["rounds"]["count"]
    assert state(path, last) == state(tmp_path / "again", last)
    assert fedrank.Run(path).summary["rounds"] == last
