"""``python -m paritykit.testing.scoreboard``: runs the trials that are left, and writes the page."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from paritykit.errors import ParityError, UsageError
from paritykit.testing.scoreboard.loop import check_versions, read_versions, run_all
from paritykit.testing.scoreboard.outcome import read_outcomes
from paritykit.testing.scoreboard.page import write_page
from paritykit.testing.scoreboard.plan import DTYPES, ENGINES, Filter, Trial, make_plan, order, share
from paritykit.testing.scoreboard.rates import make_board
from paritykit.testing.scoreboard.several import run_in_processes
from paritykit.testing.scoreboard.telling import Teller

SHARD = re.compile(r"(\d+)/(\d+)")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of outcomes; what is in it is kept."
)
@click.option(
    "--page", type=click.Path(path_type=Path), help="Markdown file to write, with its data beside it as JSON."
)
@click.option("--engine", "engines", multiple=True, help=f"{' or '.join(ENGINES)}; may be repeated, as the next three.")
@click.option("--family", "models", multiple=True, help="A tiny model.")
@click.option("--dtype", "dtypes", multiple=True, help=" or ".join(DTYPES))
@click.option("--fault", "faults", multiple=True, help="A fault; clean pairs are then left out.")
@click.option("--full", is_flag=True, help="Every fault in every model at every strength: many hours.")
@click.option("--shard", default="1/1", metavar="I/N", help="Only part I of N.")
@click.option("--processes", default=1, type=click.IntRange(1), help="Run so many shards at once.")
@click.option("--limit-minutes", type=click.FloatRange(0), help="Begin no trial after so long; go on another time.")
@click.option("--fresh", is_flag=True, help="Remove outcomes of other versions from the folder.")
@click.option("--no-run", is_flag=True, help="Write the page from what is there.")
@click.option("--quiet", is_flag=True, help="No progress.")
def board(**options: Any) -> None:
    """Plant faults, compare, count: how well ParityKit finds, places and explains them."""
    wanted = Filter(**{name: options[name] for name in ("engines", "models", "dtypes", "faults")})
    trials = order(t for t in make_plan(full=options["full"]) if wanted.fits(t))
    if not trials:
        raise UsageError("no trial fits all of that: a fault may not fit the model, or the engine not run it")
    if not options["no_run"]:
        run(trials, wanted, options)
    if options["page"] is not None:
        folder, ids = options["out"], {t.id for t in trials}
        versions = read_versions(folder)
        found = [o for o in read_outcomes(folder) if o.trial.id in ids]
        write_page(make_board(found, planned=len(trials), versions=versions), options["page"])


def run(trials: list[Trial], wanted: Filter, options: dict[str, Any]) -> None:
    """Run what is left of the trials, here or in several processes. Raises UsageError."""
    folder: Path = options["out"]
    (number, count), minutes = read_shard(options["shard"]), options["limit_minutes"]
    if options["processes"] > 1 and count > 1:
        raise UsageError("--processes makes shards of its own: leave out --shard")
    check_versions(folder, fresh=options["fresh"])
    with Teller(quiet=options["quiet"]) as tell:
        if options["processes"] > 1:
            ids = {t.id for t in trials}
            given = child_options(folder, wanted, full=options["full"], minutes=minutes)
            run_in_processes(
                options["processes"], given, folder, tell=lambda: tell(done_of(folder, ids), len(trials), None)
            )
        else:
            own = share(trials, number, count)
            run_all(own, folder, name=f"shard-{number}-of-{count}", tell=tell, minutes=minutes)


def done_of(folder: Path, ids: set[str]) -> int:
    """How many of these trials have run."""
    return sum(o.trial.id in ids for o in read_outcomes(folder))


def child_options(out: Path, wanted: Filter, *, full: bool, minutes: float | None) -> list[str]:
    """What a shard's process is called with."""
    named = (
        ("--engine", wanted.engines),
        ("--family", wanted.models),
        ("--dtype", wanted.dtypes),
        ("--fault", wanted.faults),
    )
    options = [part for option, values in named for value in values for part in (option, value)]
    options += ["--full"] if full else []
    options += [] if minutes is None else ["--limit-minutes", str(minutes)]
    return ["--out", str(out), "--quiet", *options]


def read_shard(text: str) -> tuple[int, int]:
    """Number and count of a shard. Raises UsageError.

    >>> read_shard("2/4")
    (2, 4)
    """
    found = SHARD.fullmatch(text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--shard is I/N with I from 1 to N, not {text!r}")
    return int(found[1]), int(found[2])


def execute(arguments: Sequence[str]) -> int:
    """Run the command. Errors raised on purpose become one message and their exit code, Ctrl-C becomes 3."""
    try:
        board.main(args=list(arguments), prog_name="scoreboard", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ParityError as error:
        click.echo(f"scoreboard: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("scoreboard: interrupted; the same command goes on where it was", err=True)
        return 3
    return 0


def main() -> None:
    """Entry point. Being terminated is like Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(execute(sys.argv[1:]))
