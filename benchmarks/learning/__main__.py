"""What each method learns on two cores, from the embedded tasks.

    python -m benchmarks.learning sweep METHOD                  # its grid; 60 s of a core for the best of it
    python -m benchmarks.learning sweep METHOD --grid lr=0.4,0.8 batch_size=32,64 --seconds 120 --plain
    python -m benchmarks.learning measure                       # all methods, three seeds; skips what is measured
    python -m benchmarks.learning measure byol mae --seeds 0 1 --processes 2 --again
    python -m benchmarks.learning measure albef --set itm_weight=0 mlm_weight=0  # beside the preset
    python -m benchmarks.learning check                         # does each method still learn, without new warnings?
    python -m benchmarks.learning sabotage                      # does anything notice methods broken on purpose?
    python -m benchmarks.learning table                         # the tables of the documentation, and the curves
    python -m benchmarks.learning table --check                 # exit status 1 if a table is out of date

Each run has one core of its own. Results lie in benchmarks/results/learning.
"""

import argparse
import os
import sys

from fastssl.method_modules import method_names

from .. import memory
from . import check, measure, sabotage, sweep, table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--processes", type=int, default=cores, help=f"runs at a time, each on a core of its own ({cores})"
        )
        return command

    command = add("sweep", "changed settings of a preset, each with the same seconds of one core, best first")
    command.add_argument("method", choices=method_names(), metavar="METHOD")
    command.add_argument(
        "--grid",
        nargs="+",
        action="append",
        default=[],
        metavar="NAME=VALUE,VALUE",
        help="instead of its own grid; several --grid are tried one beside the other",
    )
    command.add_argument("--seconds", type=float, default=60, help="seconds of one core of the best trials (60)")
    command.add_argument("--plain", action="store_true", help="all trials with all of the seconds")

    command = add("measure", "what the presets learn over seeds")
    command.add_argument("methods", nargs="*", metavar="METHOD", help="all by default")
    command.add_argument("--seeds", type=int, nargs="+", default=measure.SEEDS, help="seeds (0 1 2)")
    command.add_argument("--length", choices=measure.LENGTHS, default="preset", help="whole recipes, or shorter runs")
    command.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        dest="changes",
        help="changed settings of the presets; their rows stand beside those of the presets",
    )
    command.add_argument("--linear", action="store_true", help="train linear classifiers on the features, too")
    command.add_argument("--few-labels", action="store_true", help="train with 10, 100 and 1,000 labels, too")
    command.add_argument("--again", action="store_true", help="replace what is measured already")

    command = add("check", "whether a method has lost a third of its stated lift, or has new warnings")
    command.add_argument("methods", nargs="*", metavar="METHOD", help="all with a stated lift by default")
    command.add_argument("--length", choices=measure.LENGTHS, default="preset", help="of the runs (preset)")
    command.add_argument("--seed", type=int, default=0, help="of the runs (0)")

    command = add("sabotage", "break methods on purpose, and see what notices it")
    command.add_argument(
        "names", nargs="*", metavar="SABOTAGE", help=f"all by default: {', '.join(sabotage.SABOTAGES)}"
    )
    command.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="only of these methods")
    command.add_argument("--length", choices=measure.LENGTHS, default="preset", help="of the runs (preset)")
    command.add_argument("--again", action="store_true", help="repeat what is measured already")

    command = commands.add_parser("table", help="write the tables and the curves of the documentation")
    command.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a table is out of date")

    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except ValueError as error:
        print(f"benchmarks.learning: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    if options.command == "table":
        return max(table.write(options.check), memory.main(["--check" if options.check else "--render"]))
    if options.command == "sweep":
        grids = sweep.grids_of(options.method, options.grid)
        rows = sweep.sweep(options.method, grids, options.seconds, options.processes, not options.plain)
        print("best first:", *map(sweep.line, rows), sep="\n")
        return 0
    if options.command == "sabotage":
        names = options.names or list(sabotage.SABOTAGES)
        if unknown := set(names) - set(sabotage.SABOTAGES):
            raise ValueError(f"unknown sabotage {min(unknown)!r}, there are {', '.join(sabotage.SABOTAGES)}")
        rows = sabotage.sabotage(names, options.methods, options.processes, options.length, options.again)
        print("all:", *map(sabotage.line, rows), sep="\n")
        return 0
    methods = options.methods or method_names()
    if unknown := set(methods) - set(method_names()):
        raise ValueError(f"unknown method {min(unknown)!r}, there are {', '.join(method_names())}")
    if options.command == "check":
        if not options.methods:
            unstated = [method for method in methods if not measure.stated(method, options.length)]
            methods = [method for method in methods if method not in unstated]
            if unstated:
                print(f"not checked, as no lift of this length is stated: {', '.join(unstated)}")
            if not methods:
                raise ValueError(f"no lift of the length {options.length} is stated of any method")
        return bool(check.check(methods, options.processes, options.length, options.seed))
    changes = sweep.parse_changes(options.changes, methods)
    more = {name: getattr(options, name) for name in ("linear", "few_labels")}
    about = (options.length, options.again, changes)
    measure.measure(methods, options.seeds, options.processes, *about, **more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
