"""The command line: `autopar plan`, `predict`, `size`, `explain`, `verify` and `profile`.

It calls the public API and prints. Results go to stdout, everything else (progress, errors) to stderr. Options and
exit codes are in `autopar.command_line`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from autopar import command_line
from autopar.errors import AutoparError, ClusterSpecError, Infeasible, PlanError, VerifyError
from autopar.fixes import lines as fix_lines
from autopar.process import end_at_once, without_garbage
from autopar.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn

    from autopar.cluster import ClusterSpec
    from autopar.explain import Report
    from autopar.plans import Plan
    from autopar.predicting.predict import Prediction, Predictor

EXIT_OK, EXIT_ERROR, EXIT_INFEASIBLE, EXIT_VERIFY, EXIT_INTERRUPTED = 0, 1, 3, 4, 130

# How a plan file records the attention that `--attention` chose, so that `verify` loads the same model.
ATTENTION_MARK = "#attention="

MOST_COMPARED_OPS = 1500  # of a model whose plan is compared with the usual layouts without being asked


def build_parser() -> command_line.Parser:
    """The whole command line."""
    commands: dict[str, command_line.Run] = {
        "plan": run_plan,
        "predict": run_predict,
        "size": run_size,
        "explain": run_explain,
        "verify": run_verify,
        "profile": run_profile,
    }
    return command_line.build_parser(commands)


# -- the commands -----------------------------------------------------------------------


def run_plan(args: argparse.Namespace) -> int:
    """Plan, save, and print the report or the figures."""
    _check_writable(args.output)
    with without_garbage():
        return _plan(args)


def _plan(args: argparse.Namespace) -> int:
    pin = _merge_pins(args.pin)
    import autopar  # late, as it brings torch
    from autopar.api import with_model

    cluster = _load_cluster(args)
    spec = _model_spec(args)
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
    with Progress() as progress:
        plan = autopar.plan(model, cluster, progress=progress.show, **given)
    plan = with_model(plan, spec)
    if args.output is not None:
        plan.save(args.output)
    if not (args.compare or len(plan.decisions.nodes) <= MOST_COMPARED_OPS):
        plan = dataclasses.replace(plan, bench=None)
    print(_to_json({**plan.layout(), **plan.to_summary()}) if args.json else plan.explain())
    if args.output is not None and not args.json:
        print(f"Written to {args.output}; next: {_next_command(plan, args.output)}")
    return EXIT_OK


def _next_command(plan: Plan, path: Path) -> str:
    """What a person may want to do with the file."""
    from autopar.staged import StagedPlan

    if isinstance(plan, StagedPlan) and plan.not_yet:
        return f"autopar explain {path} --html {path.with_suffix('.html')}"
    return f"autopar verify {path}"


def run_predict(args: argparse.Namespace) -> int:
    """Price the layouts and print what they take; HTML and the trace of a simulated step if asked for."""
    _check_writable(args.html)
    _check_writable(args.trace)
    if args.trace is not None and len(args.layout) > 1:
        raise AutoparError(f"--trace writes the step of one layout, found {len(args.layout)}: keep one --layout")
    import torch

    from autopar.explaining.guesses import PredictionReport
    from autopar.layouts import parse_layout
    from autopar.predicting.predict import Predictor
    from autopar.prediction_text import describe, lacking

    cluster = _load_cluster(args)
    layouts = [parse_layout(text, cluster.devices) for text in args.layout]  # before the trace, which takes seconds
    options = {"seq": args.seq, "precision": args.precision, "optimizer": args.optimizer}
    given = {name: value for name, value in options.items() if value is not None}
    model = _load_model(_model_spec(args), args.precision, open_dtype=torch.bfloat16)
    predictor = Predictor(model, cluster, global_batch=args.global_batch, **given)
    found = [predictor.predict(layout) for layout in layouts]
    report = PredictionReport(predictor, found, str(args.model))
    if args.html is not None:
        report.to_html(args.html)
    simulation = report.simulation if args.trace is not None else None
    if simulation is not None:
        simulation.save(args.trace)
    if args.json:
        dicts = [{**p.to_dict(), **_lacking_data(predictor, p)} for p in found]
        if simulation is not None:
            dicts[0]["simulation"] = simulation.to_dict()
        print(_to_json(dicts[0] if len(dicts) == 1 else {"predictions": dicts}))
    else:
        print(describe(found, simulation), *report.lines(), sep="\n")
        nearest = min(found, key=lambda p: p.peak_bytes)
        if not nearest.fits:
            print(f"\n{nearest.layout}" if len(found) > 1 else "")
            print(lacking(predictor.shortfall(nearest), predictor.fixes(nearest)))
        if args.html is not None:
            print(f"Written to {args.html}")
        if simulation is not None:
            print(f"Written to {args.trace}; open it at ui.perfetto.dev")
    return EXIT_OK


def run_size(args: argparse.Namespace) -> int:
    """Find what a target takes, print it, and write it where it was asked for."""
    _check_writable(args.output)
    _check_writable(args.html)
    import torch

    import autopar
    from autopar.files import write_atomically
    from autopar.sizing.target import parse_target

    target = parse_target(args.target)  # before the trace, which takes seconds
    names = ("seq", "max_gpus", "inter_node_gbit_per_s", "precision", "optimizer", "time_limit_s")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    model = _load_model(_model_spec(args), args.precision, open_dtype=torch.bfloat16)
    with Progress() as progress:
        found = autopar.size(
            model, target, global_batch=args.global_batch, clusters=args.clusters, prices=dict(args.price),
            pin=_merge_pins(args.pin), progress=progress.show, **given,
        )  # fmt: skip
    text = _to_json({"model": args.model, "seq": args.seq, **found.to_dict()})
    try:
        if args.output is not None:
            write_atomically(args.output, text + "\n")
    except OSError as error:
        raise AutoparError(f"cannot write {args.output}: {error.strerror or error}; nothing was changed") from None
    if args.html is not None:
        found.to_html(args.html)
    print(text if args.json else found)
    return EXIT_OK


def _lacking_data(predictor: Predictor, prediction: Prediction) -> dict[str, Any]:
    """What a layout that does not fit is short by, where, and what would help."""
    if prediction.fits:
        return {}
    short = predictor.shortfall(prediction)
    fixes = [fix.to_dict() for fix in predictor.fixes(prediction)]
    return {"short_by_bytes": short.short_by_bytes, "where": short.where, "fixes": fixes}


def run_explain(args: argparse.Namespace) -> int:
    """Print the report of a plan file, or write it as HTML; or answer a question about it."""
    _check_writable(args.html)
    import autopar

    plan = autopar.Plan.load(args.plan)
    if args.diff is not None:
        difference = plan.diff(autopar.Plan.load(args.diff))
        print(_to_json(difference.to_dict()) if args.json else difference)
        return EXIT_OK
    if args.again or args.why_not or args.next_best:
        model = _load_model(_recorded_model(args, plan), plan.options.precision)
        report = plan.explain(model, time_limit_s=args.time_limit_s)
    else:
        report = plan.explain() if args.html is None else _for_page(args, plan)
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


def _for_page(args: argparse.Namespace, plan: Plan) -> Report:
    """The report with all that a page shows, as far as it can be had at once: see --html.

    Code that a plan file names is not run unless it is asked for by --again or --model.
    """
    spec = args.model or plan.options.model
    if spec is None or (args.model is None and ":" in spec):
        return plan.explain()
    try:
        report = plan.explain(_load_model(spec, plan.options.precision), time_limit_s=args.time_limit_s)
    except AutoparError as error:
        print(f"autopar: the page is without what takes the model: {' '.join(str(error).split())}", file=sys.stderr)
        return plan.explain()
    large = len(plan.decisions.nodes) > MOST_COMPARED_OPS
    return dataclasses.replace(report, solves=False) if large else report


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


def _load_cluster(args: argparse.Namespace) -> ClusterSpec:
    """A preset, or what a JSON file says."""
    import autopar

    spec, gpus = args.cluster, args.gpus
    if not spec.endswith(".json"):
        wanted = {"gpus": gpus, "inter_node_gbit_per_s": args.inter_node_gbit_per_s}
        return autopar.ClusterSpec.preset(spec, **{name: v for name, v in wanted.items() if v is not None})
    if args.inter_node_gbit_per_s is not None:
        raise ClusterSpecError(f"--inter-node-gbit-per-s goes with a preset; {spec} says what its network is: edit it")
    cluster = autopar.ClusterSpec.load(spec)
    if gpus is not None and gpus != cluster.devices:
        raise ClusterSpecError(
            f"{spec} has {cluster.devices} devices, --gpus says {gpus}: leave --gpus out or edit the file"
        )
    return cluster


def _model_spec(args: argparse.Namespace) -> str:
    """The model's name, with its attention."""
    return str(args.model) + (f"{ATTENTION_MARK}{args.attention}" if args.attention else "")


def _load_model(spec: str, precision: str | None, open_dtype: torch.dtype | None = None) -> nn.Module:
    """The model on meta device, with the attention that is recorded in its name, in the dtype of a precision.

    open_dtype: of a model whose config and precision leave it open.
    """
    from autopar.models import load_model
    from autopar.precision import checked_precision, parameter_dtype

    name, _, attention = spec.partition(ATTENTION_MARK)
    dtype = parameter_dtype(checked_precision(precision))
    return load_model(name, attention=attention or None, dtype=dtype, open_dtype=open_dtype)


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


def _say_infeasible(error: Infeasible, *, as_json: bool) -> int:
    """One line, then what would help, one change a line; as JSON on stdout besides, if that was asked for."""
    if as_json:
        print(_to_json(error.to_dict()))
    headline = error.headline if error.fixes else str(error)
    print(f"autopar: error: {' '.join(headline.split())}", file=sys.stderr)
    if error.fixes and not as_json:
        print("\n".join(["any one of these makes it fit:", *fix_lines(error.fixes)]), file=sys.stderr)
    return EXIT_INFEASIBLE


# -- entry point ------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except AutoparError as error:
        if isinstance(error, Infeasible):
            return _say_infeasible(error, as_json=getattr(args, "json", False))
        print(f"autopar: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_VERIFY if isinstance(error, VerifyError) else EXIT_ERROR
    except KeyboardInterrupt:
        print("autopar: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def run() -> NoReturn:
    """`autopar` as a process of its own."""
    end_at_once(main())


if __name__ == "__main__":
    run()
