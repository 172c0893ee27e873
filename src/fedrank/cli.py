"""The command line: run, resume, compare, cost, profile, import, export, verify, show, methods; cli_report's and cli_deploy's."""

import json
import logging
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

import fedrank
from fedrank import cli_deploy, cli_report, tables, views
from fedrank import config as settings
from fedrank import methods as registry
from fedrank.engines.workers import quieten
from fedrank.exits import errors, mistakes, needs, stoppable
from fedrank.protocol import About
from fedrank.store import Store

app = typer.Typer(
    help="Federated fine-tuning of language models with adaptive-rank LoRA.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 the run failed, 2 a mistake in what was asked, 130 stopped (resume goes on).",
)  # fmt: skip
app.add_typer(cli_deploy.deploy, name="deploy")
app.add_typer(cli_deploy.site, name="site")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config keys to set, such as local.lr=0.01.")
]
Show = Annotated[
    views.Output,
    typer.Option(
        "--output",
        "-o",
        help="live: bars and a table; plain: a line per round; json: an event per line; quiet: errors only.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="The run directory; by default the next free runs/METHOD-NNN.")]


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A YAML file, or a preset: quickstart, centralized.")],
    overrides: Overrides = None, out: Out = None, output: Show = views.Output.live,
    baselines: Annotated[bool, typer.Option("--baselines", help="Also score a linear probe and TF-IDF on the same rows (needs scikit-learn).")] = False,
) -> None:  # fmt: skip
    """Play a whole federated run and leave a PEFT adapter."""
    from fedrank import experiment

    with mistakes():
        resolved = settings.load(config, overrides or [])
        where = experiment.default_out(resolved) if out is None else out
        if baselines:
            from fedrank.training import probe

            probe.check(resolved)
    _follow(lambda: experiment.start(resolved, where), where, output, baselines)


@app.command()
def resume(
    path: Annotated[Path, typer.Argument(help="A run directory.")],
    overrides: Overrides = None,
    output: Show = views.Output.live,
) -> None:
    """Go on with a stopped run, to the same bits; or extend a finished one with rounds.count=+20."""
    from fedrank import experiment

    _follow(lambda: experiment.go_on(path, overrides or []), path, output, False)


@app.command()
def cost(
    config: Annotated[str, typer.Argument(help="A YAML file, or a preset: quickstart, centralized.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Say what a run will cost before anything runs: bytes, time, energy and memory, by kind of device."""
    from fedrank.forecast import forecast

    with stoppable(), mistakes():
        resolved = settings.load(config, overrides or [])
        with views.rounds(errors) as watch:
            found = forecast(resolved, watch=watch)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = Console()
    if "run" not in found:  # a private one, of sites
        asked = (
            "asked in every round" if resolved.privacy.kind == "local" else "in cohorts of {cohort} of {clients} sites"
        )
        console.print(
            f"Privacy of a client, in the end: {views.budget(found)}, {asked.format(**found)}. What a run costs the sites "
            "hangs on their rows and devices, which are theirs to know.",
            highlight=False,
        )  # fmt: skip
        return
    console.print("Per client and round:", tables.costs(found), "", sep="\n")
    if len(found["kinds"]) > 1:
        console.print("In all rounds, clients added up:", tables.kinds(found), "", sep="\n")
    console.print(tables.totals(found), "", sep="\n")
    if "epsilon" in found:
        console.print(f"Privacy of a client, in the end: {views.budget(found)}.", "", sep="\n", highlight=False)
    console.print(
        f"Every round was played on the model of the devices, in cohorts of {found['cohort']} of {found['clients']} "
        "clients, with nothing trained: exact, unless what is sent or trained hangs on what was learnt. Evaluation and "
        "failures are left out.",
        highlight=False,
    )  # fmt: skip


@app.command()
def compare(
    study: Annotated[str, typer.Argument(help="A study's YAML file; with --methods a run's, or a preset.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the study to set, such as seeds=3 or base.rounds.count=10.")] = None,
    methods: Annotated[str | None, typer.Option(help="Compare these on a run's config: names with commas between, the reference first.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds each is played with; by default as the study says, else 5.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where comparison.json and its tables go; by default comparisons/NAME.")] = None,
    runs: Annotated[Path | None, typer.Option("--runs", help="Where the run directories go; by default OUT/runs.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at once, each on one core; by default as many as there are cores.")] = None,
    forecast: Annotated[bool, typer.Option("--forecast", help="Stop after the forecast.")] = False,
    output: Annotated[views.Output, typer.Option("--output", "-o", help="plain: a line per run; json: an event per line; quiet: errors only.")] = views.Output.plain,
) -> None:  # fmt: skip
    """Play methods against each other with the same data, seeds and tuning, and say what may be concluded."""
    with mistakes():
        needs("compare", "optuna", "scipy", "tabulate")
        from fedrank.studies.play import play
        from fedrank.studies.study import read

        asked = read(study, overrides or [], methods.split(",") if methods else (), seeds)
    where = out or Path("comparisons") / Path(study).stem
    again = f"what is played is kept. Go on with: [bold]fedrank compare {escape(shlex.join(sys.argv[2:]))}[/]"
    failed = 0
    with stoppable(lambda: f"stopped; {again}"), mistakes():
        for event in play(asked, where, runs, workers, forecast):
            failed += event["event"] == "failed"
            views.STUDIES[output](event)
    if failed:
        raise typer.Exit(1)


@app.command()
def profile(
    config: Annotated[str, typer.Argument(help="A YAML file, or a preset: quickstart, centralized.")],
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds to play.")] = 2,
    trace: Annotated[Path, typer.Option(help="Where to write the spans, for chrome://tracing or Perfetto.")] = Path("trace.json"),
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:  # fmt: skip
    """Play a few rounds in one process and say where the time goes."""
    from fedrank.profile import profile as measure

    with stoppable(), mistakes():
        found = measure(settings.load(config, overrides or []), rounds, trace)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    Console().print(tables.profile(found), "", *tables.advice(found, trace), sep="\n", highlight=False, soft_wrap=True)


@app.command("import")
def import_(
    adapter: Annotated[Path, typer.Argument(help="A PEFT LoRA adapter's folder.")],
    config: Annotated[str, typer.Argument(help="A YAML file or preset; its model must be the adapter's base model.")],
    overrides: Overrides = None, out: Out = None, output: Show = views.Output.live,
) -> None:  # fmt: skip
    """Start a run from a PEFT adapter: its increment is the first state's."""
    from fedrank import experiment

    with mistakes():
        resolved = settings.load(config, overrides or [])
        where = experiment.default_out(resolved) if out is None else out
    _follow(lambda: experiment.start(resolved, where, imported=adapter), where, output, False)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="A run directory.")],
    to: Annotated[Path | None, typer.Option("--to", help="Where to write; by default RUN/adapter, RUN/adapter-CLIENT or RUN/adapters.")] = None,
    round: Annotated[int | None, typer.Option(help="The state to export; by default the last.")] = None,
    client: Annotated[str | None, typer.Option(help="Of a method whose clients keep parts of their own: whose.")] = None,
    all_clients: Annotated[bool, typer.Option("--all-clients", help="Of such a method: a folder for each client, and an index.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Not the adapter but the whole model, for transformers; by default to RUN/model.")] = False,
) -> None:  # fmt: skip
    """Write what a run came to, as PEFT or transformers load it, with a card and its provenance."""
    from fedrank import export as exports

    what = "model" if merged else "adapter"
    with mistakes():
        if all_clients and client is not None:
            raise settings.ConfigError("--client names one, --all-clients takes all; give one of them")
        if all_clients:
            print(exports.export_clients(path, to or path / f"{what}s", round, merged))
        else:
            print(
                exports.export(
                    path, to or path / (what if client is None else f"{what}-{client}"), round, client, merged
                )
            )


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="The folder of an export.")]) -> None:
    """Say whether an export is as it was written: its files by their hashes, and its config."""
    from fedrank import export as exports

    with mistakes():
        odd = exports.verify(path)
    for line in odd:
        print(line)
    if odd:
        raise typer.Exit(1)
    print(f"{path}: as it was exported")


@app.command()
def show(path: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Print a run's rounds and what it came to."""
    from fedrank.experiment import Run

    with mistakes():
        Store.open(path)
        found = Run(path)
        rows = found.rounds
        console = Console()
        console.print(views.table(rows))
        if (path / "summary.json").exists() and found.summary["rounds"] == found.config.rounds.count:
            console.print(views.summary(found.summary))
        else:
            console.print(f"not finished: round {len(rows)} of {found.config.rounds.count}; fedrank resume {path}")


app.command()(cli_report.report)
app.command()(cli_report.watch)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """List the methods: their papers, what may differ between clients, what is exact, and their hyper-parameters."""
    listed = []
    for name in registry.names():
        try:
            cls = registry.find(name)
        except (TypeError, AttributeError, ImportError) as error:  # another package's: the rest are listed all the same
            errors.print(f"[bold red]error:[/] {escape(f'{name}: {error}')}", highlight=False, soft_wrap=True)
            continue
        about = {f.name: getattr(getattr(cls, "about", None), f.name, None) for f in fields(About)}
        knobs = {f.name: None if f.default is MISSING else f.default for f in fields(cls) if f.init}
        listed.append(
            {
                "name": name,
                "summary": registry.summary(cls),
                **about,
                "default_lr": cls.default_lr,
                "hyper_parameters": knobs,
            }
        )
    if as_json:
        print(json.dumps(listed, indent=1))
        return
    Console().print(tables.methods(listed))


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(fedrank.__version__)
        raise typer.Exit
    quieten()


# ---- following a run


def _follow(start: Callable[[], Iterator[dict[str, Any]]], path: Path, output: views.Output, baselines: bool) -> None:
    level = logging.ERROR if output is views.Output.quiet else logging.WARNING
    shown = RichHandler(level, console=errors, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[shown])  # observe.log has warnings too
    last: dict[str, Any] = {}
    go_on = f"every finished round is saved. Go on with: [bold]fedrank resume {escape(str(path))}[/]"

    def begun() -> bool:
        return (path / "config.yaml").exists()

    with stoppable(lambda: f"stopped; {go_on if begun() else 'nothing had begun.'}"), mistakes():
        try:
            last = deque(views.VIEWS[output](start()), maxlen=1).pop()
        except (OSError, BrokenProcessPool) as error:  # a full disk, a closed pipe; a worker without memory
            if not begun():
                raise
            lost = "a worker process was killed, as when memory runs out; engine.workers=1 needs less"
            what = lost if isinstance(error, BrokenProcessPool) else escape(str(error))
            errors.print(f"[bold red]error:[/] {what}; {go_on}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None
        if baselines:
            _baselines(path, output)
    if last.get("clients_ok") == 0 and last.get("rounds"):
        what = f"no client's update was merged in any round; see {escape(str(path))}/clients.jsonl"
        errors.print(f"[bold red]error:[/] {what}", highlight=False, soft_wrap=True)
        raise typer.Exit(1)


def _baselines(path: Path, output: views.Output) -> None:
    from fedrank.training.probe import baselines

    found = baselines(settings.load(path / "config.yaml"))
    summary = json.loads((path / "summary.json").read_text()) | {"baselines": found}
    store = Store.open(path)
    store.write("baselines.json", json.dumps(found, indent=1))  # they stay true when the run goes on
    store.write("summary.json", json.dumps(summary, indent=1))
    if output is views.Output.json:
        print(json.dumps({"event": "baselines", **found}))
    elif output is not views.Output.quiet:
        Console().print(tables.baselines(summary, found))
        ours = summary["accuracy"]  # null where every client has a model of its own
        above = [name for name, value in found.items() if ours is not None and ours < value]
        if above:
            Console().print(f"The federated run is below: {', '.join(above)}.", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
