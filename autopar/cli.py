"""The command line: `autopar plan`, `autopar explain`, `autopar verify`, `autopar profile`.

It only parses, calls the public API and prints. Results go to stdout, everything else
(progress, errors) to stderr. Exit codes are in `EPILOG`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from autopar import __version__
from autopar.errors import AutoparError, ClusterSpecError, Infeasible, PlanError, VerifyError
from autopar.placements import is_placement
from autopar.progress import Progress

if TYPE_CHECKING:
    from torch import nn

    from autopar.cluster import ClusterSpec
    from autopar.explain import Report
    from autopar.plans import Plan

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INFEASIBLE, EXIT_VERIFY, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130

# How a plan file records the attention that `--attention` chose, so that `verify` loads the same model.
ATTENTION_MARK = "#attention="

MOST_COMPARED_OPS = 1500  # of a model whose plan is compared with the usual layouts without being asked

EPILOG = """\
exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 3 nothing fits the limits,
4 the program differs from the single-device model"""

DESCRIPTION = "Turns a single-device PyTorch model into a program for a cluster, and says why it looks as it does."

PLAN_EXAMPLES = """\
examples:
  autopar plan --model llama3-8b --cluster h100-sxm --gpus 64 --seq 8192 --global-batch 256 -o plan.json
  autopar plan --model path/to/config.json --cluster cluster.json --seq 2048 --global-batch 64 --json
  autopar plan --model my_package.models:build --cluster a100-80g --gpus 8 --global-batch 64 \\
               --pin tp=4 --pin 'layers.*.mlp.up_proj.weight=R,S(0)' --pin 'layers.*.mlp=recompute'"""

EXPLAIN_EXAMPLES = """\
examples:
  autopar explain plan.json
  autopar explain plan.json --html plan.html
  autopar explain plan.json --again
  autopar explain plan.json --why-not tp=8
  autopar explain plan.json --next-best mesh --json
  autopar explain plan.json --diff other.json"""

VERIFY_EXAMPLES = """\
examples:
  autopar verify plan.json
  autopar verify plan.json --model my_package.models:build --json"""

PROFILE_EXAMPLES = """\
examples:
  autopar profile -o cluster.json
  autopar profile --quick -o cluster.json
  torchrun --nproc-per-node 8 -m autopar.cli profile -o cluster.json
  autopar plan --model llama3-8b --cluster cluster.json --seq 8192 --global-batch 256"""

PIN_HELP = (
    "fix a layout key (tp=4), a parameter's placements (PATTERN=R,S(0)) or a module's activations "
    "(PATTERN=recompute); may be repeated"
)

WHY_NOT_HELP = "solve again with this pin (as for autopar plan) and say what it costs; repeated, pins hold together"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where to read on."""
        self.exit(EXIT_USAGE, f"autopar: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="autopar", description=DESCRIPTION, epilog=EPILOG, formatter_class=_formatter)
    parser.add_argument("--version", action="version", version=f"autopar {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_plan(commands)
    _add_explain(commands)
    _add_verify(commands)
    _add_profile(commands)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Examples and exit codes keep their lines; the width does not depend on the terminal."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=100)


def _command(commands: Any, name: str, summary: str, examples: str, run: Callable[..., int]) -> Parser:
    parser: Parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=_formatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_plan(commands: Any) -> None:
    parser = _command(commands, "plan", "find the fastest layout that fits the cluster", PLAN_EXAMPLES, run_plan)
    add = parser.add_argument
    add("--model", required=True, help="a name of the zoo, a Hugging Face config.json, or package.module:callable")
    add("--cluster", required=True, help="a preset (such as h100-sxm) or a JSON file")
    add("--gpus", type=_positive_int, metavar="N", help="number of devices of a preset (default 8)")
    add("--seq", type=_positive_int, metavar="N", help="tokens in a sequence, for a transformers model")
    add("--global-batch", type=_positive_int, required=True, metavar="N", help="samples in a step, over all devices")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--memory-limit-gb", type=_positive_float, metavar="GB", help="per device, in 10^9 bytes")
    limit.add_argument("--memory-limit-bytes", type=_positive_int, metavar="BYTES", help="per device, in bytes")
    add("--precision", metavar="NAME", help="model (its own dtypes, the default), fp32, or bf16 (float32 weights)")
    add("--optimizer", help="whose state is planned for (default adamw), as in autopar.plan")
    add("--time-limit-s", type=_positive_float, metavar="S", help="stop proving after S seconds; the gap is reported")
    add("--pin", type=parse_pin, action="append", default=[], metavar="KEY=VALUE", help=PIN_HELP)
    add("--attention", choices=("eager", "sdpa"), help="attention of a transformers model (default: its own)")
    add("-o", "--output", type=Path, metavar="FILE", help="write the plan to FILE")
    add("--dump-dir", type=Path, metavar="DIR", help="write every stage to DIR as readable Python or JSON")
    add("--compare", action="store_true", help="solve the usual layouts too (small models: always)")
    add("--json", action="store_true", help="print one JSON object: the layout and its figures")


def _add_explain(commands: Any) -> None:
    parser = _command(commands, "explain", "say what a plan does and why", EXPLAIN_EXAMPLES, run_explain)
    add = parser.add_argument
    add("plan", type=Path, help="a file made by autopar plan -o")
    add("--html", type=Path, metavar="FILE", help="write the report as one HTML file")
    add("--json", action="store_true", help="print one JSON object")
    add("--again", action="store_true", help="trace the model again and solve the alternatives of the report")
    add("--why-not", type=parse_pin, action="append", default=[], metavar="KEY=VALUE", help=WHY_NOT_HELP)
    add("--next-best", metavar="NAME", help="solve again with this decision forbidden (mesh, storage, op, or a name)")
    add("--diff", type=Path, metavar="FILE", help="say what another plan of the same model does differently")
    add("--model", help="the model, where the plan file does not name it (as for autopar plan)")
    add("--time-limit-s", type=_positive_float, metavar="S", help="for what is solved again (default 30)")


def _add_verify(commands: Any) -> None:
    summary = "run every rank of a plan on this CPU and compare with the single-device model"
    parser = _command(commands, "verify", summary, VERIFY_EXAMPLES, run_verify)
    parser.add_argument("plan", type=Path, help="a file made by autopar plan -o")
    parser.add_argument("--model", help="the model, where the plan file does not name it (as for autopar plan)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_profile(commands: Any) -> None:
    summary = "measure the devices and links that are present, and write them as a cluster file"
    parser = _command(commands, "profile", summary, PROFILE_EXAMPLES, run_profile)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="write the cluster to FILE")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time: fewer ops, sizes and repetitions")


def _positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def parse_pin(text: str) -> tuple[str, Any]:
    """One --pin: the key, and its value as an int, a bool, a tuple of placements or a word."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    if value.isdecimal():
        return key, int(value)
    if value in ("true", "false"):
        return key, value == "true"
    parts = tuple(part.strip() for part in value.split(","))
    return key, parts if all(is_placement(part) for part in parts) else value


# -- the commands -----------------------------------------------------------------------


def run_plan(args: argparse.Namespace) -> int:
    """Plan, save, and print the report or the figures."""
    _check_writable(args.output)
    pin = _merge_pins(args.pin)
    import autopar  # late, as it brings torch
    from autopar.api import with_model

    cluster = _load_cluster(args.cluster, args.gpus)
    spec = args.model + (f"{ATTENTION_MARK}{args.attention}" if args.attention else "")
    model = _load_model(spec, args.precision)
    options = {
        "seq": args.seq,
        "global_batch": args.global_batch,
        "precision": args.precision,
        "optimizer": args.optimizer,
        "memory_limit_bytes": _memory_limit_bytes(args),
        "time_limit_s": args.time_limit_s,
        "pin": pin or None,
        "dump_dir": args.dump_dir,
    }
    given = {name: value for name, value in options.items() if value is not None}
    gc.disable()  # planning makes millions of small objects that stay: looking through them takes a tenth of the time
    with Progress() as progress:
        plan = autopar.plan(model, cluster, progress=progress.show, **given)
    gc.enable()
    plan = with_model(plan, spec)
    if args.output is not None:
        plan.save(args.output)
    if not (args.compare or len(plan.decisions.nodes) <= MOST_COMPARED_OPS):
        plan = dataclasses.replace(plan, bench=None)
    print(_to_json({**plan.layout(), **plan.to_summary()}) if args.json else plan.explain())
    if args.output is not None and not args.json:
        print(f"Written to {args.output}; next: autopar verify {args.output}")
    return EXIT_OK


def run_explain(args: argparse.Namespace) -> int:
    """Print the report of a plan file, or write it as HTML; or answer a question about it."""
    _check_writable(args.html)
    import autopar

    plan = autopar.Plan.load(args.plan)
    if args.diff is not None:
        difference = plan.diff(autopar.Plan.load(args.diff))
        print(_to_json(difference.to_dict()) if args.json else difference)
        return EXIT_OK
    solving = args.again or args.why_not or args.next_best
    model = _load_model(_recorded_model(args, plan), plan.options.precision) if solving else None
    report = plan.explain(model, time_limit_s=args.time_limit_s)
    if args.why_not or args.next_best:
        return _answer(args, report)
    if args.html is not None:
        report.to_html(args.html)
    if args.json:
        print(_to_json(report.to_dict()))
    elif args.html is None:
        print(report)
    else:
        print(f"Written to {args.html}")
    return EXIT_OK


def _answer(args: argparse.Namespace, report: Report) -> int:
    """What was asked by --why-not and --next-best."""
    limit = {} if args.time_limit_s is None else {"time_limit_s": args.time_limit_s}
    found = list(report.next_best(args.next_best, **limit)) if args.next_best else []
    if args.why_not:
        found.insert(0, report.why_not(_merge_pins(args.why_not), **limit))
    if args.json:
        print(_to_json({"answers": [a.to_dict() for a in found]}))
    else:
        print("\n\n".join(map(str, found)))
    return EXIT_OK


def run_verify(args: argparse.Namespace) -> int:
    """Prove a plan file against its model."""
    import autopar

    plan = autopar.Plan.load(args.plan)
    result = autopar.verify(_load_model(_recorded_model(args, plan), plan.options.precision), plan)
    print(_to_json(result.to_dict()) if args.json else result)
    return EXIT_OK


def run_profile(args: argparse.Namespace) -> int:
    """Measure on every rank; rank 0 writes the file and says what is in it."""
    _check_writable(args.output)
    from autopar.profiling.run import leave, profile, summary

    with Progress() as progress:
        cluster = profile(quick=args.quick, progress=progress.show)
    try:
        if os.environ.get("RANK", "0") == "0":
            cluster.save(args.output)
            print(summary(cluster))
            print(f"Written to {args.output}; next: autopar plan --cluster {args.output} ...")
    finally:
        leave()
    return EXIT_OK


def _recorded_model(args: argparse.Namespace, plan: Plan) -> str:
    if args.model is not None:
        return str(args.model)
    if plan.options.model is None:
        raise PlanError(f"{args.plan} does not name its model (it was not made by `autopar plan`); pass --model")
    return plan.options.model


def _load_cluster(spec: str, gpus: int | None) -> ClusterSpec:
    """A preset, or what a JSON file says."""
    import autopar

    if not spec.endswith(".json"):
        return autopar.ClusterSpec.preset(spec, **({} if gpus is None else {"gpus": gpus}))
    cluster = autopar.ClusterSpec.load(spec)
    if gpus is not None and gpus != cluster.devices:
        raise ClusterSpecError(
            f"{spec} has {cluster.devices} devices, --gpus says {gpus}: leave --gpus out or edit the file"
        )
    return cluster


def _load_model(spec: str, precision: str | None) -> nn.Module:
    """The model on meta device, with the attention that is recorded in its name, in the dtype of a precision."""
    from autopar.models import load_model
    from autopar.precision import checked_precision, parameter_dtype

    name, _, attention = spec.partition(ATTENTION_MARK)
    return load_model(name, attention=attention or None, dtype=parameter_dtype(checked_precision(precision)))


def _memory_limit_bytes(args: argparse.Namespace) -> int | None:
    if args.memory_limit_gb is not None:
        return int(args.memory_limit_gb * 10**9)
    limit: int | None = args.memory_limit_bytes
    return limit


def _merge_pins(pins: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for key, value in pins:
        if merged.setdefault(key, value) != value:
            raise AutoparError(f"pin {key} is given twice, as {merged[key]} and as {value}: keep one")
    return merged


def _check_writable(path: Path | None) -> None:
    """Refuse an output that cannot be written before minutes are spent on it."""
    if path is None:
        return
    if path.is_dir():
        raise AutoparError(f"cannot write {path}: it is a folder; name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise AutoparError(f"cannot write {path}: the folder {path.parent} does not exist or is not writable")


def _to_json(data: Any) -> str:
    """One JSON object, with no NaN or infinity in it."""
    return json.dumps(data, indent=2, allow_nan=False)


# -- entry point ------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except AutoparError as error:
        print(f"autopar: error: {' '.join(str(error).split())}", file=sys.stderr)
        if isinstance(error, VerifyError):
            return EXIT_VERIFY
        return EXIT_INFEASIBLE if isinstance(error, Infeasible) else EXIT_ERROR
    except KeyboardInterrupt:
        print("autopar: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
