"""``python -m benchmarks.matrix``: runs the pairs that are left, and writes the page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.matrix.page import write_page
from benchmarks.matrix.row import Row, Task, left, read_rows
from benchmarks.matrix.sweep import run_tasks
from paritykit.errors import ParityError, UnknownNameError
from paritykit.testing.drawn.catalogue import sample, vllm_classes
from paritykit.testing.scoreboard.command import read_shard
from paritykit.testing.scoreboard.loop import digest_source

DTYPES = ("float32", "bfloat16")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of rows; what is in it is kept.")
@click.option("--page", type=click.Path(path_type=Path), help="Markdown file to write.")
@click.option("--model-type", "model_types", multiple=True, help="Only this one; may be repeated.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="May be repeated; both by default.")
@click.option("--seed", default=0, help="Of the models; with 0 the switches are as the config classes have them.")
@click.option("--sample", type=click.IntRange(1), help="Only so many, drawn by --seed.")
@click.option("--shard", default="1/1", metavar="I/N", help="Only part I of N.")
@click.option("--seconds", default=300.0, type=click.FloatRange(1), help="A pair that takes longer could not run.")
@click.option("--no-explain", is_flag=True, help="No replay and no causes where a pair fails.")
@click.option("--any-source", is_flag=True, help="What ran with another version of the code is not run again either.")
@click.option("--no-run", is_flag=True, help="Write the page from what is there.")
def matrix(**options: Any) -> None:
    """Run a clean pair of every architecture that transformers and vLLM both have."""
    read_shard(options["shard"])
    classes, book, source = vllm_classes(), options["out"] / "rows.jsonl", digest_source()
    tasks = make_tasks(classes, options)
    if not options["no_run"]:
        todo = left(tasks, read_rows(book), "" if options["any_source"] else source)
        options["out"].mkdir(parents=True, exist_ok=True)
        run_tasks(todo, book, source=source, seconds=options["seconds"], tell=tell)
    if options["page"] is not None:
        wanted = {(t.name, t.dtype) for t in tasks}
        rows = [r for r in read_rows(book) if (r.task.name, r.task.dtype) in wanted]
        write_page(rows, classes, options["page"], planned=len(tasks))


def make_tasks(classes: dict[str, str], options: dict[str, Any]) -> list[Task]:
    """The pairs that were asked for, one dtype after the other. Raises UnknownNameError."""
    for name in options["model_types"]:
        if name not in classes:
            raise UnknownNameError("model type that vLLM takes", name, classes)
    names = list(options["model_types"]) or list(classes)
    if options["sample"] is not None:
        names = sample(names, options["sample"], seed=options["seed"])
    number, count = read_shard(options["shard"])
    names = names[number - 1 :: count]
    own = {"seed": options["seed"], "explain": not options["no_explain"]}
    return [Task(model_type=n, dtype=dtype, **own) for dtype in options["dtypes"] or DTYPES for n in names]


def tell(number: int, total: int, row: Row) -> None:
    """A line for each pair."""
    where = f"  {row.first}" if row.first else f"  {row.reason[:100]}" if row.reason else ""
    click.echo(
        f"{number}/{total} {row.task.model_type} {row.task.dtype}: {row.outcome} {row.seconds:.0f} s{where}", err=True
    )


def execute(arguments: Sequence[str]) -> int:
    """Run the command. Errors raised on purpose become one message and their exit code, Ctrl-C becomes 3."""
    try:
        matrix.main(args=list(arguments), prog_name="matrix", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ParityError as error:
        click.echo(f"matrix: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("matrix: interrupted; the same command goes on where it was", err=True)
        return 3
    return 0


def main() -> None:
    """Entry point."""
    sys.exit(execute(sys.argv[1:]))
