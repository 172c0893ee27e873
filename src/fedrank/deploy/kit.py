"""The folders of a deployment: what the server's machine is given, and what each site's."""

import getpass
import ipaddress
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from fedrank import config as settings
from fedrank import remote, resolve
from fedrank.config import Config, ConfigError
from fedrank.deploy import keys
from fedrank.store import write
from fedrank.training import data as rows

RUNTIME = 9094  # the first site's port for its own processes, Flower's default; sites may share a machine


@dataclass(frozen=True)
class Deployment:
    """What holds for all folders, kept beside them. superlink: host:port, as sites reach it. sites: in the order made."""

    superlink: str
    insecure: bool
    sites: tuple[str, ...]

    @property
    def port(self) -> int:
        """At which sites connect, to the gate."""
        return int(self.superlink.rpartition(":")[2])

    @property
    def inner(self) -> int:
        """The SuperLink's own, on the server's loopback: the next one, or the one before the last."""
        return self.port + 1 if self.port < 65535 else self.port - 1


def init(
    folder: Path, config: str | None, hosts: Sequence[str], port: int | None, sites: Sequence[str], insecure: bool
) -> Deployment:
    """Write a new deployment's folders; or, where there is one already, those of more sites.

    config, hosts, port, insecure: of a new one. hosts: names and addresses of the server; sites connect to the first.
    """
    for name in sites:
        keys.check_site(name)
    if not sites or len(set(sites)) < len(sites):
        raise ConfigError("--site: name each site once, and at least one")
    told = folder / "deploy.yaml"
    if told.exists():
        if config is not None or hosts or port is not None or insecure:
            raise ConfigError(f"{folder} is a deployment already: --site adds sites, what else it is stays in {told}")
        before = _read(told)
        if there := [name for name in sites if name in before.sites or (folder / "sites" / name).exists()]:
            raise ConfigError(f"--site {there[0]}: {folder / 'sites' / there[0]} is there already")
        needed = [folder / "server" / "sites"]
        needed += [] if before.insecure else [folder / "keys" / name for name in ("ca.key", "ca.crt", "server.crt")]
        if gone := [path for path in needed if not path.exists()]:
            raise ConfigError(f"--site: it needs {gone[0]}, which is not there; put it back for as long as this takes")
        made = Deployment(before.superlink, before.insecure, (*before.sites, *sites))
    else:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is not an empty folder; choose another")
        if config is None or not hosts:
            raise ConfigError("--config and --host: a new deployment needs the run's config and the server's name")
        for host in hosts:
            keys.check_host(host)
        made = Deployment(_address(hosts[0], 8000 if port is None else port), insecure, tuple(sites))
        played = _played(config, made)  # most mistakes show here, before anything is written
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not made.insecure:
        keys.make(folder / "keys", hosts, sites)
    if not told.exists():
        _server(folder, made, played)
    for at, name in enumerate(made.sites):
        if name in sites:
            _site(folder, made, name, RUNTIME + at)
    write(told, yaml.safe_dump({"superlink": made.superlink, "insecure": made.insecure, "sites": list(made.sites)}, sort_keys=False).encode())  # fmt: skip
    return made


def _read(told: Path) -> Deployment:
    try:
        found = yaml.safe_load(told.read_bytes())
    except yaml.YAMLError:
        found = None
    match found:
        case {"superlink": str(superlink), "insecure": bool(insecure), "sites": [*sites]} if all(
            type(name) is str for name in sites
        ):
            return Deployment(superlink, insecure, tuple(sites))
    raise ConfigError(f"{told}: not what `fedrank deploy init` wrote")


def _address(host: str, port: int) -> str:
    try:
        return f"[{host}]:{port}" if ipaddress.ip_address(host).version == 6 else f"{host}:{port}"
    except ValueError:
        return f"{host}:{port}"


def _played(source: str, made: Deployment) -> dict[str, Any]:
    """The run's config: what was said in it, and how the server's machine reaches the SuperLink."""
    certificate = "null" if made.insecure else "certificates/ca.crt"
    connection = [
        "kind=flower",
        f"superlink=127.0.0.1:{made.inner}",
        f"insecure={made.insecure}",
        f"root_certificate={certificate}",
    ]
    config = settings.load(source, [f"engine.{one}" for one in connection])
    resolved, _ = resolve.resolve(config)
    rows.central(resolved)
    if config.rounds.minimum > len(made.sites):
        raise ConfigError(
            f"rounds.minimum={config.rounds.minimum}: no round would begin with {len(made.sites)} sites; at most so many"
        )
    whole: dict[str, Any] = {key: getattr(resolved, key) for key in ("data", "model") if key in config.model_fields_set}
    found: Config = config.model_copy(update=whole)  # their paths hold from any folder
    return found.model_dump(mode="json", exclude_unset=True)


def _server(folder: Path, made: Deployment, played: dict[str, Any]) -> None:
    server, port, inner = folder / "server", str(made.port), str(made.inner)
    if made.insecure:
        connection, secure, gate, secrets = "insecure = true", "--insecure", "--insecure", ""
        doctor = f"--superlink {made.superlink} --insecure"
    else:
        connection = 'root-certificates = "$PWD/certificates/ca.crt"'
        secure = (
            "--enable-supernode-auth \\\n  --ssl-ca-certfile certificates/ca.crt "
            "--ssl-certfile certificates/server.crt --ssl-keyfile certificates/server.key"
        )
        gate = "--certificates certificates"
        secrets = (
            "`keys/` stays with whoever deploys: who has `ca.key` can pose as the server. A certificate lasts a year.\n"
        )
        doctor = f"--superlink {made.superlink} --root-certificate ca.crt"
        certificates = server / "certificates"
        certificates.mkdir(parents=True)
        for name in ("ca.crt", "server.crt"):
            shutil.copyfile(folder / "keys" / name, certificates / name)
        keys.private(certificates / "server.key", (folder / "keys" / "server.key").read_bytes())
    (server / "sites").mkdir(parents=True, exist_ok=True)
    write(server / "config.yaml", yaml.safe_dump(played, sort_keys=False).encode())
    app = {"out": "runs/first", "config": "config.yaml", "watch": "", "simulation": False, "overrides": "[]"}
    remote.write_app(server / "app", app)
    here = _here(server)
    listen = "::" if made.superlink.startswith("[") else "0.0.0.0"
    _render(
        "server.sh", server / "server.sh", listen=listen, port=port, inner=inner, connection=connection, secure=secure, gate=gate
    )  # fmt: skip
    _render("server.service", server / "fedrank-server.service", **here)
    _render("server.compose.yaml", server / "compose.yaml", port=port, **here)
    _render("README.md", folder / "README.md", superlink=made.superlink, secrets=secrets, doctor=doctor)


def _site(folder: Path, made: Deployment, name: str, port: int) -> None:
    site, secure = folder / "sites" / name, "--insecure"
    site.mkdir(parents=True, mode=0o700)
    if not made.insecure:
        secure = f"--root-certificates ca.crt --auth-supernode-private-key {name}.key"
        shutil.copyfile(folder / "keys" / "ca.crt", site / "ca.crt")
        keys.private(site / f"{name}.key", (folder / "keys" / f"{name}.key").read_bytes())
        shutil.copyfile(folder / "keys" / f"{name}.pub", folder / "server" / "sites" / f"{name}.pub")
    here = _here(site)
    _render("site.yaml", site / "site.yaml", client=json.dumps(name))
    _render("client.sh", site / "client.sh", superlink=made.superlink, secure=secure, port=str(port))
    _render("site.compose.yaml", site / "compose.yaml", **here)
    for what in ("worker", "supernode"):
        unit = f"fedrank-{name}-{what}"
        _render("site.service", site / f"{unit}.service", unit=unit, what=what, name=name, **here)


def _here(folder: Path) -> dict[str, str]:
    """What a service has to know of the machine; that of this one, which its reader may change."""
    return {
        "folder": str(folder.absolute()), "user": getpass.getuser(), "bin": str(Path(sys.executable).parent),
        "uid": f"{os.getuid()}:{os.getgid()}",
    }  # fmt: skip


def _render(template: str, path: Path, **told: str) -> None:
    """A file of a template, whose blanks are words between two @."""
    text = (files("fedrank.deploy") / "templates" / template).read_text()
    write(path, re.sub(r"@(\w+)@", lambda blank: told[blank[1]], text).encode())
    if path.suffix == ".sh":
        path.chmod(0o755)
