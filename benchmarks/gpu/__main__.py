"""Everything that is worth measuring on a GPU, in one command that fits a few minutes.

    python -m benchmarks.gpu --minutes 9 --out build/gpu      # all phases, the most valuable first
    python -m benchmarks.gpu --list                           # the phases, and their shares of the time
    python -m benchmarks.gpu --phases ops steps --out …       # only these
    python -m benchmarks.gpu --dry-run --out …                # all of it on a CPU, with tiny sizes
    python -m benchmarks.gpu --adopt build/gpu                # its rows into benchmarks/results, then the tables

Each phase is a process of its own with a share of the time; what one leaves goes to the later ones. A phase writes
DIR/PHASE.json after every row and starts no row after its time; one that hangs is ended. So a run that is cut off loses
a row, never a phase that has ended. DIR/summary.json says how each phase ended, with the last lines that it printed.

`python -m benchmarks.gpu.pack` prepares a machine that can fetch nothing; docs/gpu.md says what to run next.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fastssl.files import write_atomically

from .record import Clock, Record

GRACE = 20.0  # seconds that a phase may take beyond its time to finish a row before it is ended
LAST_LINES = 30

# name: (share of the time, what it is for), in order of value
PHASES = {
    "facts": (0.03, "the card, its software, the bandwidth of a copy, the rates of matrix products"),
    "tests": (0.13, "the tests that need a GPU"),
    "ops": (0.25, "each op beside the papers' formulas, torch, torch.compile and other packages"),
    "steps": (0.35, "whole steps beside the official ones, torch.compile and CUDA graphs"),
    "loaders": (0.12, "images/s of each loader engine, and whether the step or the loader is slower"),
    "sweeps": (0.08, "tile sizes of kernels whose tables were never measured, with the best row"),
    "profile": (0.04, "kernels of a MAE step by time, and the gaps between them"),
}


def run(phases: list[str], minutes: float, folder: Path, dry: bool) -> dict[str, dict]:
    """Runs phases as processes, one after the other; {phase: {"state", "seconds", "rows", "output"}}."""
    folder.mkdir(parents=True, exist_ok=True)
    clock, summary = Clock(60 * minutes), {}
    for number, name in enumerate(phases):
        seconds = clock.left() * PHASES[name][0] / sum(PHASES[later][0] for later in phases[number:])
        print(f"{name}: {seconds:.0f} s, {PHASES[name][1]}", flush=True)
        summary[name] = _run_phase(name, max(seconds, 1.0), folder, dry)
        print(f"  {summary[name]['state']}: {summary[name]['rows']} rows in {summary[name]['seconds']} s", flush=True)
        with write_atomically(folder / "summary.json") as file:
            file.write(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def _run_phase(name: str, seconds: float, folder: Path, dry: bool) -> dict:
    command = [sys.executable, "-m", "benchmarks.gpu", "--phase", name, "--seconds", str(seconds), "--out", str(folder)]
    start, log = time.monotonic(), folder / f"{name}.log"
    (folder / f"{name}.json").unlink(missing_ok=True)  # of an earlier run
    with log.open("wb") as output:
        process = subprocess.Popen(
            command + ["--dry-run"] * dry, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = f"exit status {process.wait(seconds + GRACE)}"
        except subprocess.TimeoutExpired:
            ended = f"ended after {seconds + GRACE:.0f} s"
        finally:  # also the phase's own processes, and when this one is interrupted
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
    log.unlink()
    results = folder / f"{name}.json"
    content = json.loads(results.read_text()) if results.is_file() else {"state": "nothing written", "rows": []}
    finished = content["state"] == "finished" and process.returncode == 0
    return {
        "state": "finished" if finished else f"{content['state']} ({ended})",
        "seconds": round(time.monotonic() - start, 1),
        "rows": len(content["rows"]),
        "output": lines,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time of all phases together (9)")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), metavar="DIR", help="folder of the results")
    parser.add_argument("--phases", nargs="+", choices=[*PHASES], default=[*PHASES], help="only these, in this order")
    parser.add_argument("--list", action="store_true", help="print the phases and their shares of the time")
    parser.add_argument("--dry-run", action="store_true", help="run all phases with tiny sizes, on a CPU too")
    parser.add_argument("--adopt", type=Path, metavar="DIR", help="add the rows of DIR to benchmarks/results")
    parser.add_argument("--phase", choices=[*PHASES], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        for name, (share, purpose) in PHASES.items():
            print(f"{name:<9} {share:4.0%}  {purpose}")
        return 0
    if options.adopt:
        from .adopt import adopt

        return adopt(options.adopt)
    from benchmarks.machine import DEVICE

    if DEVICE.type == "cpu" and not options.dry_run:
        print("benchmarks.gpu: there is no GPU here: --dry-run runs everything on a CPU", file=sys.stderr)
        return 1
    if options.phase:
        from .phases import RUN, hasten

        if options.dry_run:
            hasten()
        record = Record(options.out, options.phase)
        RUN[options.phase](Clock(options.seconds), record, options.dry_run)
        record.finish()
        return 0
    summary = run(options.phases, options.minutes, options.out, options.dry_run)
    return 0 if all(phase["state"] == "finished" for phase in summary.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
