"""Sweep that chose the numbers of `eval few-labels`: learning rates of fine-tuning and of training from scratch.

    python -m benchmarks.few_labels RUN [--lrs 0.0003 0.001 0.003 0.01] [--counts 10 100 1000] [--draws 2]

Each setting is trained as `eval few-labels` does and judged on training images without a label in any draw: held-out
images play no part. The table of all settings is written to benchmarks/results/learning/few-labels-METHOD-DATA.json, or
to the file of --out; one with a sweep of other options is kept.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fastssl.data.source import Subset
from fastssl.eval import few_labels
from fastssl.eval.features import extract
from fastssl.eval.finetuning import build_classifier
from fastssl.eval.labels import accuracy, labelled
from fastssl.eval.protocols import FewLabels
from fastssl.evaluation import load_frozen
from fastssl.machine import facts
from fastssl.run import Run, open_run

FOLDER = Path(__file__).parent / "results" / "learning"
JUDGED = 500  # training images without a label that a setting is judged on


def main(arguments: list[str] | None = None) -> None:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    for name, kind, default in (("lrs", float, [3e-4, 1e-3, 3e-3, 1e-2]), ("counts", int, [10, 100, 1000])):
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=default)
    parser.add_argument("--layer-decays", type=float, nargs="+", default=[1.0])
    starts = [few_labels.SCRATCH, few_labels.PRETRAINED]
    parser.add_argument("--starts", nargs="+", default=starts, choices=starts)
    for name, default in (("draws", 2), ("steps", FewLabels.steps), ("batch-size", FewLabels.batch_size)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    run = open_run(options.run)
    path = options.out or FOLDER / f"few-labels-{run.short_name}-{run.options.data.partition(':')[0]}.json"
    chosen = {name: value for name, value in vars(options).items() if name != "out"}
    if path.exists() and json.loads(path.read_text())["options"] != chosen:
        parser.error(f"{path} holds a sweep with other options, which would be lost: name another file with --out")
    rows = sweep(run, options)
    record = {"options": chosen, "method": run.method_name, "data": run.options.data}
    path.write_text(json.dumps({**record, "facts": facts(), "rows": rows}, indent=1, default=str) + "\n")
    print(f"wrote {path}")


def sweep(run: Run, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy of each setting, on training images without a label."""
    base = dataclasses.replace(
        FewLabels.of_backbone(run.backbone), steps=options.steps, batch_size=options.batch_size, draws=options.draws
    )
    train, frozen = labelled(run.source("train")), load_frozen(run, "cpu")
    train = few_labels.Kept(train, range(len(train)))
    draws = few_labels.Draws(train, options.counts, options.draws, seed=1000)  # not those of an evaluation
    judged = Subset(train, sorted(set(range(len(train))) - set(draws.all_images()))[-JUDGED:])
    rows = []
    for start, count in itertools.product(options.starts, options.counts):
        decays = options.layer_decays if start == few_labels.PRETRAINED else [1.0]
        for lr, layer_decay in itertools.product(options.lrs, decays):
            numbers = dataclasses.replace(base, lr=lr, scratch_lr=lr, layer_decay=layer_decay)
            shares, began = [], time.process_time()
            for seed in draws.seeds:
                torch.manual_seed(seed)
                method = run.build() if start == few_labels.SCRATCH else frozen.method
                small_images = getattr(run.config, "small_images", False)
                model = build_classifier(method, run.backbone, len(train.classes), small_images=small_images)
                part = Subset(train, draws.images(count, seed))
                few_labels.train_on_few(model, part, numbers, start, run.image_size, seed, **frozen.loading)
                shares.append(accuracy(*extract(model, judged, run.image_size, **frozen.loading)[:2]).top1)
            rows.append(
                {
                    "start": start,
                    "labels": count,
                    "lr": lr,
                    "layer_decay": layer_decay,
                    "accuracy": round(statistics.fmean(shares), 4),
                    "accuracies": [round(share, 4) for share in shares],
                    "cpu_seconds": round(time.process_time() - began, 1),
                }
            )
            print(" · ".join(f"{name} {value}" for name, value in rows[-1].items() if name != "accuracies"), flush=True)
    return rows


if __name__ == "__main__":
    main()
