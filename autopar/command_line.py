"""What the command line takes: subcommands, options and their help. What they do is in `autopar.cli`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from autopar import __version__
from autopar.placements import is_placement

EXIT_USAGE = 2

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

PREDICT_EXAMPLES = """\
examples:
  autopar predict --model megatron-22b --cluster a100-80g --gpus 8 --seq 2048 --global-batch 4 --attention eager \\
                  --layout tp=8,micro_batch=4,recompute=selective
  autopar predict --model path/to/config.json --cluster h100-sxm --gpus 64 --seq 8192 --global-batch 64 --json \\
                  --layout dp=8,tp=8,zero=1 --layout dp=8,pp=8,micro_batch=1,recompute=full
  autopar predict --model llama3-8b --cluster h100-sxm --gpus 64 --seq 8192 --global-batch 64 \\
                  --layout pp=4,tp=2,vpp=2 --trace step.json"""

SIZE_EXAMPLES = """\
examples:
  autopar size --model llama3-8b --seq 8192 --global-batch 512 --target "1T tokens in 30 days"
  autopar size --model llama3-70b --seq 8192 --global-batch 1024 --target "300B tokens under $2M" \\
               --clusters h100-sxm,mi300x --price mi300x=2.5 --max-gpus 2048 --html sizing.html
  autopar size --model path/to/config.json --seq 4096 --global-batch 256 --target "step in 2.5 s" --json"""

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
    "fix a layout key (tp=4, by axes tp=2,2, or with pp for each stage tp=2/1), a parameter's placements "
    "(PATTERN=R,S(0)) or a module's activations (PATTERN=recompute); may be repeated"
)

NETWORK_HELP = "network between the nodes of a preset, per device and direction, in Gbit/s (default: the usual one)"

LAYOUT_HELP = (
    "dp, tp, pp, cp, ep, vpp, micro_batch, zero (0 to 3), sp (true, false), recompute (none, selective, full), "
    "schedule (gpipe, 1f1b, interleaved, zero-bubble), grad_dtype, cut (where stages "
    "begin, cut=layers.2/layers.5, or blocks of each, cut=3/1); dp, tp and cp may differ between "
    "stages (dp=2/4,tp=2/1); what is left out has the usual default; repeated: each is priced, with one trace"
)

EXPLAIN_HTML_HELP = (
    "write the report as one HTML file; with --again, or for a small model that the plan names by config or zoo name, "
    "with all that takes solving again"
)

PREDICT_PRECISION_HELP = (
    "model (its own dtypes, the default; where a config.json names none, bfloat16 with float32 master weights), fp32, "
    "or bf16 (float32 weights)"
)

TRACE_HELP = "simulate the step of the one layout, event by event, and write it for ui.perfetto.dev to FILE"

TARGET_HELP = (
    'such as "1T tokens in 30 days", "300B tokens under $2M", "1T tokens in 30 days for 5M USD", "step in 2.5 s"; '
    "samples may stand for tokens"
)

CLUSTERS_HELP = "presets or cluster files (default: the presets whose price is known)"

PRICE_HELP = "USD per device-hour of one of the clusters, instead of the known one; repeated"

WHY_NOT_HELP = "solve again with this pin (as for autopar plan) and say what it costs; repeated, pins hold together"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where to read on."""
        self.exit(EXIT_USAGE, f"autopar: error: {message} (see {self.prog} --help)\n")


Run = Callable[[argparse.Namespace], int]


def build_parser(run: Mapping[str, Run]) -> Parser:
    """The whole command line; `run`: what each subcommand does."""
    parser = Parser(prog="autopar", description=DESCRIPTION, epilog=EPILOG, formatter_class=_formatter)
    parser.add_argument("--version", action="version", version=f"autopar {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_plan(commands, run["plan"])
    _add_predict(commands, run["predict"])
    _add_size(commands, run["size"])
    _add_explain(commands, run["explain"])
    _add_verify(commands, run["verify"])
    _add_profile(commands, run["profile"])
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Examples and exit codes keep their lines; the width does not depend on the terminal."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=100)


def _command(commands: Any, name: str, summary: str, examples: str, run: Run) -> Parser:
    parser: Parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=_formatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_plan(commands: Any, run: Run) -> None:
    parser = _command(commands, "plan", "find the fastest layout that fits the cluster", PLAN_EXAMPLES, run)
    add = parser.add_argument
    _add_job(parser)
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--memory-limit-gb", type=_positive_float, metavar="GB", help="per device, in 10^9 bytes")
    limit.add_argument("--memory-limit-bytes", type=_positive_int, metavar="BYTES", help="per device, in bytes")
    add("--precision", metavar="NAME", help="model (its own dtypes, the default), fp32, or bf16 (float32 weights)")
    add("--optimizer", help="whose state is planned for (default adamw), as in autopar.plan")
    add("--time-limit-s", type=_positive_float, metavar="S", help="stop proving after S seconds; the gap is reported")
    add("--pin", type=parse_pin, action="append", default=[], metavar="KEY=VALUE", help=PIN_HELP)
    add("-o", "--output", type=Path, metavar="FILE", help="write the plan to FILE")
    add("--dump-dir", type=Path, metavar="DIR", help="write every stage to DIR as readable Python or JSON")
    add("--compare", action="store_true", help="solve the usual layouts too (small models: always)")
    add("--json", action="store_true", help="print one JSON object: the layout and its figures")


def _add_job(parser: Parser) -> None:
    """The model, the cluster and the batch of a step."""
    add = parser.add_argument
    add("--model", required=True, help="a name of the zoo, a Hugging Face config.json, or package.module:callable")
    add("--cluster", required=True, help="a preset (such as h100-sxm) or a JSON file")
    add("--gpus", type=_positive_int, metavar="N", help="number of devices of a preset (default 8)")
    add("--inter-node-gbit-per-s", type=_positive_float, metavar="G", help=NETWORK_HELP)
    add("--seq", type=_positive_int, metavar="N", help="tokens in a sequence, for a transformers model")
    add("--global-batch", type=_positive_int, required=True, metavar="N", help="samples in a step, over all devices")
    add("--attention", choices=("eager", "sdpa"), help="attention of a transformers model (default: its own)")


def _add_predict(commands: Any, run: Run) -> None:
    parser = _command(commands, "predict", "price a layout that you name", PREDICT_EXAMPLES, run)
    _add_job(parser)
    add = parser.add_argument
    add("--layout", action="append", required=True, metavar="KEY=VALUE,...", help=LAYOUT_HELP)
    add("--precision", metavar="NAME", help=PREDICT_PRECISION_HELP)
    add("--optimizer", help="whose state and step are counted (default adamw), as in autopar.plan")
    add("--trace", type=Path, metavar="FILE", help=TRACE_HELP)
    add("--json", action="store_true", help="print one JSON object; with several layouts, a list in it: predictions")
    add("--html", type=Path, metavar="FILE", help="write a report of the fastest that fits as one HTML file")


def _add_size(commands: Any, run: Run) -> None:
    summary = "find the fewest GPUs, and the cheapest way, to meet a target"
    parser = _command(commands, "size", summary, SIZE_EXAMPLES, run)
    add = parser.add_argument
    add("--model", required=True, help="a name of the zoo, a Hugging Face config.json, or package.module:callable")
    add("--target", required=True, metavar="WORDS", help=TARGET_HELP)
    add("--seq", type=_positive_int, metavar="N", help="tokens in a sequence, for a transformers model")
    add("--global-batch", type=_positive_int, required=True, metavar="N", help="samples in a step; stays as given")
    add("--clusters", type=_names, default=[], metavar="A,B", help=CLUSTERS_HELP)
    add("--max-gpus", type=_positive_int, metavar="N", help="the most GPUs of a preset (default 16384)")
    add("--price", type=_price, action="append", default=[], metavar="NAME=USD", help=PRICE_HELP)
    add("--inter-node-gbit-per-s", type=_positive_float, metavar="G", help=NETWORK_HELP)
    add("--attention", choices=("eager", "sdpa"), help="attention of a transformers model (default: its own)")
    add("--precision", metavar="NAME", help=PREDICT_PRECISION_HELP)
    add("--optimizer", help="whose state and step are counted (default adamw), as in autopar.plan")
    add("--pin", type=parse_pin, action="append", default=[], metavar="KEY=VALUE", help="fix a layout key (zero=1)")
    add("--time-limit-s", type=_positive_float, metavar="S", help="stop searching after S seconds (default 300)")
    add("-o", "--output", type=Path, metavar="FILE", help="write what --json prints to FILE")
    add("--html", type=Path, metavar="FILE", help="write tables and picture as one HTML file")
    add("--json", action="store_true", help="print one JSON object")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return names


def _price(text: str) -> tuple[str, float]:
    name, equals, usd = (part.strip() for part in text.rpartition("="))
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=USD, got {text!r}")
    return name, _positive_float(usd)


def _add_explain(commands: Any, run: Run) -> None:
    parser = _command(commands, "explain", "say what a plan does and why", EXPLAIN_EXAMPLES, run)
    add = parser.add_argument
    add("plan", type=Path, help="a file made by autopar plan -o")
    add("--html", type=Path, metavar="FILE", help=EXPLAIN_HTML_HELP)
    add("--json", action="store_true", help="print one JSON object")
    add("--again", action="store_true", help="trace the model again and solve the alternatives of the report")
    add("--why-not", type=parse_pin, action="append", default=[], metavar="KEY=VALUE", help=WHY_NOT_HELP)
    add("--next-best", metavar="NAME", help="solve again with this decision forbidden (mesh, storage, op, or a name)")
    add("--diff", type=Path, metavar="FILE", help="say what another plan of the same model does differently")
    add("--model", help="the model, where the plan file does not name it (as for autopar plan)")
    add("--time-limit-s", type=_positive_float, metavar="S", help="for what is solved again (default 30)")


def _add_verify(commands: Any, run: Run) -> None:
    summary = "run every rank of a plan on this CPU and compare with the single-device model"
    parser = _command(commands, "verify", summary, VERIFY_EXAMPLES, run)
    parser.add_argument("plan", type=Path, help="a file made by autopar plan -o")
    parser.add_argument("--model", help="the model, where the plan file does not name it (as for autopar plan)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_profile(commands: Any, run: Run) -> None:
    summary = "measure the devices and links that are present, and write them as a cluster file"
    parser = _command(commands, "profile", summary, PROFILE_EXAMPLES, run)
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
    """One --pin: the key, and its value as an int, several (2,2), a bool, a tuple of placements or a word."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    if value.isdecimal():
        return key, int(value)
    if value in ("true", "false"):
        return key, value == "true"
    parts = tuple(part.strip() for part in value.split(","))
    if all(part.isdecimal() for part in parts):
        return key, tuple(map(int, parts))
    return key, parts if all(is_placement(part) for part in parts) else value
