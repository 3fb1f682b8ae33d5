"""The command line.

Exit codes: 0 parity, 1 divergence, 2 usage, 3 could not run, 4 inconclusive, 5 nothing was compared.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

import paritykit
from paritykit.errors import ParityError, UsageError
from paritykit.options import (
    CAPTURE_OPTIONS,
    FLOOR_OPTIONS,
    REPORT_OPTIONS,
    RUN_OPTIONS,
    WEIGHTS_OPTIONS,
    apply,
    parse_engine_args,
)
from paritykit.progress import ProgressLine
from paritykit.reports import REPORTS, write_report
from paritykit.reports.terminal import print_summary, show_point
from paritykit.results import Results, read_jsonl

ENGINE_LIBRARIES = ("torch", "transformers")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(paritykit.__version__, "-V", "--version")
def cli() -> None:
    """Find out that two engines differ, where it starts, and why.

    \b
    paritykit run PATH_OR_HUB_ID --candidate vllm --html parity.html
    paritykit run tiny:qwen2 --dtype float32      a seeded model made on the spot
    paritykit doctor                              what works on this machine

    Exit codes: 0 parity, 1 divergence, 2 usage, 3 could not run, 4 inconclusive, 5 nothing was compared.
    """


@cli.command(context_settings=CONTEXT)
@click.argument("model")
@apply(RUN_OPTIONS)
@apply(REPORT_OPTIONS)
def run(model: str, **options: Any) -> int:
    """Run MODEL on the reference and on the candidate, and compare them layer by layer.

    MODEL is a checkpoint folder, a hub id, or tiny:FAMILY (see `paritykit list models`), with fields of its config
    where you like: tiny:qwen2,num_key_value_heads=1,tie_word_embeddings=true. real:smollm2 is a trained one.

    \b
    paritykit run ./my-model --candidate vllm --dtype bfloat16 --html parity.html
    paritykit run ./my-model --tensor-parallel-size 2 --case long-200 --check modules
    paritykit run ./my-model --engine-arg block_size=32 --engine-arg max_num_batched_tokens=32
    paritykit run ./my-model --candidate my_package.engine:make --map rules.toml
    """
    from paritykit.plan import make_plan

    plan = make_plan(
        model,
        given={
            **{name: options[name] for name in ("reference", "candidate", "dtype", "reference_dtype")},
            "floor": False if options["no_floor"] else None,
            "cache": "off" if options["no_cache"] else None,
        },
        checks=options["check"],
        case_names=options["case"],
        cases_file=options["cases"],
        engine_args=parse_engine_args(options["engine_arg"]),
        reference_args=parse_engine_args(options["reference_arg"]),
        tensor_parallel_size=options["tensor_parallel_size"],
        map_file=options["map"],
        explain=not options["no_explain"],
        local=options["local"],
    )
    with ProgressLine(quiet=options["quiet"]) as progress, plan.open(progress=progress) as session:
        results = session.results(plan.checks, command=["paritykit", *sys.argv[1:]])
    return _finish(results, options)


@cli.command(context_settings=CONTEXT)
@click.argument("engine")
@click.argument("model")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder for the capture.")
@apply(CAPTURE_OPTIONS)
def capture(engine: str, model: str, out: Path, **options: Any) -> int:
    """Record what ENGINE computes for MODEL into a folder.

    \b
    paritykit capture hf ./my-model -o ref --dtype float32
    paritykit capture vllm ./my-model -o cand --dtype float32 --follow ref
    paritykit compare ref cand --html parity.html
    """
    from paritykit.api import capture as make_capture
    from paritykit.captures.reader import Capture
    from paritykit.engines import check_engine
    from paritykit.engines import engine as make_engine
    from paritykit.engines.dtypes import dtype_name
    from paritykit.models import resolve_model
    from paritykit.plan import resolve_cases

    check_engine(engine)
    arguments = parse_engine_args(options["engine_arg"])
    if options["dtype"] != "auto":
        arguments["dtype"] = dtype_name(options["dtype"])
    if out.exists():
        raise UsageError(f"{out} exists already; remove it or choose another folder")
    follow = Capture.open(options["follow"]) if options["follow"] else None
    checkpoint = resolve_model(model)
    cases = resolve_cases(checkpoint, names=options["case"], file=options["cases"] or "")
    with ProgressLine(quiet=options["quiet"]) as progress:
        made = make_capture(
            make_engine(engine, str(checkpoint.path), **arguments),
            cases=cases,
            points=options["point"] or None,
            follow=follow,
            out=out,
            progress=progress,
        )
    if options["point"] and not made.points:
        shutil.rmtree(out)
        raise UsageError(f"no point of {engine} matches {' or '.join(options['point'])}; nothing was kept")
    if not options["quiet"]:
        click.echo(f"{out}: {len(made.points)} points of {len(made.cases)} cases on {made.ranks} rank(s)")
    return 0


@cli.command(context_settings=CONTEXT)
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option("--check", multiple=True, help="Check to run (repeatable; default: all).")
@click.option("--map", type=click.Path(path_type=Path), help="TOML file with mapping rules.")
@apply(REPORT_OPTIONS)
def compare(reference: Path, candidate: Path, **options: Any) -> int:
    """Compare two captures on disk.

    \b
    paritykit compare ref cand --html parity.html
    """
    from paritykit.captures.reader import Capture
    from paritykit.checks import CHECKS
    from paritykit.mapping.user import read_rules
    from paritykit.runner import compare_captures

    for name in options["check"]:
        CHECKS.get(name)
    with ProgressLine(quiet=options["quiet"]) as progress:
        results = compare_captures(
            Capture.open(reference),
            Capture.open(candidate),
            checks=options["check"] or None,
            rules=read_rules(options["map"]) if options["map"] else None,
            command=["paritykit", *sys.argv[1:]],
            progress=progress,
        )
    return _finish(results, options)


@cli.command(context_settings=CONTEXT)
@click.argument("model")
@apply(WEIGHTS_OPTIONS)
@apply(REPORT_OPTIONS)
def weights(model: str, **options: Any) -> int:
    """Show where the candidate's own loader puts every weight of MODEL, and whether it arrives unchanged.

    \b
    paritykit weights ./my-model --candidate vllm
    paritykit weights ./my-model --tensor-parallel-size 2 --jsonl weights.jsonl --html weights.html
    """
    from paritykit.plan import make_plan
    from paritykit.reports.weights import print_weights

    plan = make_plan(
        model,
        given={name: options[name] for name in ("candidate", "dtype")},
        checks=["weights"],
        engine_args=parse_engine_args(options["engine_arg"]),
        tensor_parallel_size=options["tensor_parallel_size"],
    )
    with ProgressLine(quiet=options["quiet"]) as progress, plan.open(progress=progress) as session:
        results = session.results(plan.checks, command=["paritykit", *sys.argv[1:]])
    if not options["quiet"]:
        print_weights(results, console=Console(), verbose=options["verbose"])
    return _finish(results, options)


@cli.command(context_settings=CONTEXT)
@click.argument("checkpoint")
@click.option("--base", help="Checkpoint that this one may be a delta to.")
@click.option("--tensor-parallel-size", type=int, default=1, show_default=True, help="Split that it should stand.")
@click.option("--headers-only", is_flag=True, help="Do not read the values.")
@apply(REPORT_OPTIONS)
def audit(checkpoint: str, **options: Any) -> int:
    """Look for what is wrong with the files and config of CHECKPOINT, a folder, hub id or tiny:FAMILY.

    Runs no model. Exit code 1 if there is an error, which one of the engines would fail or compute otherwise by.

    \b
    paritykit audit ./my-model
    paritykit audit ./my-model --base ./its-base --tensor-parallel-size 4
    """
    from paritykit.audit import audit as look
    from paritykit.reports.audit import print_audit
    from paritykit.runner import audit_results
    from paritykit.testing.names import folder_of

    with ProgressLine(quiet=options["quiet"]) as progress:
        found = look(
            folder_of(checkpoint),
            base=folder_of(options["base"]) if options["base"] else None,
            tensor_parallel_size=options["tensor_parallel_size"],
            deep=not options["headers_only"],
            progress=progress,
        )
    if not options["quiet"]:
        print_audit(found, console=Console(), verbose=options["verbose"])
    results = audit_results(found, checkpoint, command=["paritykit", *sys.argv[1:]])
    return _finish(results, {**options, "quiet": True})


@cli.command(context_settings=CONTEXT)
@click.argument("model")
@apply(FLOOR_OPTIONS)
def floor(model: str, **options: Any) -> int:
    """Measure the noise floor of MODEL: how far the reference in a dtype is from itself one precision above.

    Keeps it as data, or says where it moved since: exit code 1 if it did.

    \b
    paritykit floor ./my-model --dtype bfloat16 -o references/my-model-bfloat16.json
    paritykit floor ./my-model --dtype bfloat16 --against references/my-model-bfloat16.json
    """
    from paritykit.floor_file import moves, read_floor, write_floor
    from paritykit.plan import make_plan
    from paritykit.reports.floor import print_floor

    given = {"dtype": options["dtype"], "reference_dtype": options["reference_dtype"]}
    given["cache"] = "off" if options["no_cache"] else None
    plan = make_plan(model, given=given, case_names=options["case"], cases_file=options["cases"])
    before = read_floor(options["against"]) if options["against"] else None
    with ProgressLine(quiet=options["quiet"]) as progress:
        now = plan.measure_floor(progress=progress)
    moved = moves(before, now) if before is not None else []
    if options["out"]:
        write_floor(now, options["out"])
    if not options["quiet"]:
        print_floor(now.floors, moved=[m.describe() for m in moved], console=Console())
    return 1 if moved else 0


@cli.command(context_settings=CONTEXT)
@click.argument("records", type=click.Path(path_type=Path), metavar="RUN.jsonl")
@apply(REPORT_OPTIONS)
def report(records: Path, **options: Any) -> int:
    """Make reports again from the records of a run. Needs no torch.

    \b
    paritykit report run.jsonl --html parity.html
    """
    _finish(read_jsonl(records), options)
    return 0


@cli.command(context_settings=CONTEXT)
@click.argument("records", type=click.Path(path_type=Path), metavar="RUN.jsonl")
@click.argument("point")
def show(records: Path, point: str) -> int:
    """Show everything measured at one point of a run.

    \b
    paritykit show run.jsonl model.layers.2.self_attn
    """
    show_point(read_jsonl(records), point, console=Console())
    return 0


@cli.command(context_settings=CONTEXT)
@click.argument("cause", required=False)
def explain(cause: str | None) -> int:
    """Say what CAUSE is (a code or a name), how it is tested and what to look at; without one, list all causes.

    \b
    paritykit explain PK101
    paritykit explain sliding-window
    """
    from paritykit.diagnose.catalogue import find_cause
    from paritykit.reports.causes import cause_page

    if cause is None:
        _print_listing("causes")
    else:
        click.echo(cause_page(find_cause(cause)))
    return 0


@cli.command("list", context_settings=CONTEXT)
@click.argument(
    "kind", type=click.Choice(["engines", "checks", "cases", "models", "metrics", "reports", "faults", "causes"])
)
def list_names(kind: str) -> int:
    """List what there is of a KIND.

    \b
    paritykit list engines
    """
    _print_listing(kind)
    return 0


def _print_listing(kind: str) -> None:
    from paritykit.listing import LISTINGS

    lines = list(LISTINGS[kind]())
    width = max(20, *(len(name) + 2 for name, _ in lines))
    for name, text in lines:
        click.echo(f"{name:<{width}}{text}".rstrip())


@cli.command(context_settings=CONTEXT)
@click.option("--fix", "mend", is_flag=True, help="Uninstall companion packages that break torch's users.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
def doctor(mend: bool, as_json: bool) -> int:
    """Say what works on this machine and how to mend what does not.

    \b
    paritykit doctor
    paritykit doctor --fix
    """
    from paritykit import doctor as examiner

    checks = examiner.examine()
    if mend:
        removed = examiner.fix(checks)
        click.echo(f"uninstalled: {', '.join(removed)}" if removed else "nothing to mend", err=as_json)
        checks = examiner.examine() if removed else checks
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(checks)).decode())
    else:
        examiner.print_checks(checks, console=Console())
    return 3 if any(c.status == "bad" for c in checks) else 0


def _finish(results: Results, options: dict[str, Any]) -> int:
    """Print the summary and write the reports asked for, the records first: one that fails costs no other.

    Returns the exit code. Raises the first error a report ran into, after all were tried.
    """
    wanted = {name: options[name] for name in ("jsonl", *REPORTS.names()) if options.get(name)}
    errors = []
    for name, path in wanted.items():
        try:
            write_report(results, format=name, path=path)
        except ParityError as error:
            errors.append(error)
    if not options["quiet"]:
        html = str(wanted.get("html", ""))
        print_summary(results, console=Console(), verbose=options["verbose"], report=html)
    if errors:
        raise errors[0]
    return results.summary.exit_code


def execute(arguments: Sequence[str]) -> int:
    """Run one command. Errors raised on purpose become one message and their exit code, Ctrl-C becomes 3."""
    try:
        code: int | None = cli.main(args=list(arguments), prog_name="paritykit", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except ParityError as error:
        click.echo(f"paritykit: {error}", err=True)
        code = error.exit_code
    except ModuleNotFoundError as error:
        if error.name not in ENGINE_LIBRARIES:
            raise
        click.echo(f"paritykit: this needs {error.name}: pip install 'paritykit[hf]'; see `paritykit doctor`", err=True)
        code = 3
    except (KeyboardInterrupt, click.Abort):
        click.echo("paritykit: interrupted; engines were stopped and nothing was written", err=True)
        code = 3
    return code or 0


def main() -> None:
    """Entry point. Being terminated is like Ctrl-C: engines are stopped and temporary captures removed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(execute(sys.argv[1:]))


if __name__ == "__main__":
    main()
