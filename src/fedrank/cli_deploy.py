"""The command line of a deployment on Flower: its folders and keys, its gate, a site's check, and a site's worker."""

import importlib.util
import json
import logging
from dataclasses import asdict
from errno import EADDRINUSE, EADDRNOTAVAIL
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedrank.config import ConfigError
from fedrank.exits import errors, mistakes, stoppable

deploy = typer.Typer(help="Put a federated run on machines of its own, by Flower.", no_args_is_help=True)
site = typer.Typer(help="What runs on a site's machine.", no_args_is_help=True)

Hosts = Annotated[list[str] | None, typer.Option("--host", help="The server's name or address, as sites reach it; may be repeated.")]  # fmt: skip
Sites = Annotated[list[str] | None, typer.Option("--site", help="A site's client id; may be repeated.")]


@deploy.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder; or that of a deployment, to add sites.")],
    config: Annotated[str | None, typer.Option(help="The run's config: a YAML file, or a preset.")] = None,
    host: Hosts = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="At which sites connect; by default 8000. The next one is the SuperLink's own.")] = None,
    site: Sites = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain text: without TLS, certificates and keys.")] = False,
) -> None:  # fmt: skip
    """Write the folders of the server and of each site: scripts, units, certificates, a Flower app."""
    with mistakes():
        _needs("cryptography")
        from fedrank.deploy import kit

        made = kit.init(folder, config, host or [], port, site or [], insecure)
    how = "in plain text: anyone on the way can read and change what travels" if insecure else "with TLS and node keys"
    print(
        f"{folder}/server and {len(site or [])} of {folder}/sites, for {made.superlink} {how}; next: {folder}/README.md"
    )


@deploy.command("keys")
def keys_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where keys and certificates are kept.")],
    host: Hosts = None, site: Sites = None,
    renew: Annotated[bool, typer.Option("--renew", help="A new server certificate, for the same key.")] = False,
) -> None:  # fmt: skip
    """Make a CA, the server's certificate and a key for each site; what is there already stays."""
    with mistakes():
        _needs("cryptography")
        from fedrank.deploy import keys

        written = keys.make(folder, host or [], site or [], renew)
    print("\n".join(map(str, written)) or "nothing to make: all is there")


@deploy.command()
def doctor(
    site: Annotated[Path, typer.Option("--site", help="The site's file.")],
    superlink: Annotated[str | None, typer.Option(help="host:port, to try the link too.")] = None,
    root_certificate: Annotated[Path | None, typer.Option(help="Of the CA; without it, those that the machine trusts.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="The link is plain text.")] = False,
    config: Annotated[str | None, typer.Option(help="A run's config, whose model and method are tried; by default a small one.")] = None,
    fingerprint: Annotated[str | None, typer.Option(help="What the base model should have.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: a line per check.")] = False,
) -> None:  # fmt: skip
    """Check a site: versions, link, disk, rows, model, memory, and a round of one step. Exit code 1 where one fails."""
    wrong, console = False, Console()
    with stoppable(), mistakes():
        _needs("packaging")
        from fedrank.deploy.doctor import Link, examine

        link = None if superlink is None else Link(superlink, root_certificate, insecure)
        if fingerprint is not None and config is None:
            raise ConfigError("--fingerprint: it is of a run's model; --config too")
        for found in examine(site, link, config, fingerprint):
            wrong = wrong or not found.ok
            if as_json:
                print(json.dumps(asdict(found)), flush=True)
                continue
            mark = "[green]ok   [/]" if found.ok else "[bold red]wrong[/]"
            console.print(f"{mark} {found.name:8} {escape(found.text)}", highlight=False, soft_wrap=True)
    raise typer.Exit(int(wrong))


@deploy.command("gate")
def gate_(
    inner: Annotated[int, typer.Option(min=1, max=65535, help="The SuperLink's port, on 127.0.0.1.")],
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port at which sites connect.")] = 8000,
    certificates: Annotated[Path | None, typer.Option(metavar="DIR", help="Of ca.crt, server.crt and server.key.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain text, to both sides.")] = False,
) -> None:  # fmt: skip
    """Let sites reach the SuperLink for what a SuperNode says, and for nothing else, until it is stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    with stoppable(code=0), mistakes():
        for package in ("flwr", "httpx", "uvicorn"):
            _needs(package)
        if insecure == (certificates is not None):
            raise ConfigError(
                "--certificates: the folder of the server's, or --insecure for plain text; one of the two"
            )
        from fedrank.deploy import gate

        try:
            gate.serve(host, port, inner, certificates)
        except OSError as error:
            if error.errno not in (EADDRINUSE, EADDRNOTAVAIL):
                raise
            # Not for ever: at a machine's start its address may come later.
            errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None


@site.command()
def serve(file: Annotated[Path, typer.Argument(metavar="FILE", help="The site's file.")]) -> None:
    """Keep model and rows loaded, and answer the frames that this site's SuperNode brings, until it is stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("fedrank").setLevel(logging.INFO)
    with stoppable(code=0), mistakes():
        from fedrank import resident, sites

        resident.serve(sites.read(file))


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{package} is not installed: pip install 'fedrank[flower]'")
