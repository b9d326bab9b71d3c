"""A second pass over the same cases under torchmortem, a peer from the package index; optional.

torchmortem is no dependency of the project. Put it into an environment of its own that sees the project's packages, and
run this module with that environment's interpreter::

    python -m venv --without-pip /tmp/mortem
    python -m pip --python /tmp/mortem/bin/python install --no-deps torchmortem==0.1.1 plotly
    echo PROJECT/.venv/lib/python3.11/site-packages > /tmp/mortem/lib/python3.11/site-packages/project.pth
    PYTHONPATH=src:. /tmp/mortem/bin/python -m benchmarks.clinic.mortem RESULTS --seeds 2
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.clinic.catalogue import cases, find
from benchmarks.clinic.outcome import LabelledRun
from benchmarks.clinic.rivals import Flag
from benchmarks.clinic.runner import drive

__all__ = ["flags_from"]

_FAMILIES: Mapping[str, tuple[str, ...]] = {
    "Vanishing gradients detected": ("vanishing", "temporal_vanishing"),
    "Exploding gradients detected": ("exploding", "temporal_exploding"),
    "Gradient stalling": ("no_gradient", "vanishing", "dead", "precision"),
    "Dead units": ("dead",),
    "Activation saturation": ("saturated",),
    "Update ratio too low": ("learning_rate", "no_update", "clipping", "precision"),
    "Update ratio too high": ("learning_rate",),
    "Weight norm explosion": ("exploding", "divergence", "learning_rate"),
    "Stagnant weight norms": ("no_update", "learning_rate", "clipping"),
    "Inter-layer weight norm imbalance": ("initialization",),
    "Training divergence detected": ("divergence", "learning_rate", "spike"),
    "Loss plateau detected": ("learning_rate", "clipping"),
    "Catapult phase detected": ("learning_rate", "spike"),
    "Edge of stability regime detected": ("learning_rate",),
}
"""Our families for its findings, by how their titles begin."""


def flags_from(path: Path) -> Callable[[LabelledRun], list[Flag] | None]:
    """Return a rule set that looks a run up in this pass's results; ``None`` for runs it does not hold."""
    rows: dict[tuple[str, int], Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if not row["error"]:
            rows[row["case"], row["seed"]] = row

    def look_up(run: LabelledRun) -> list[Flag] | None:
        row = rows.get(run.row.key)
        if row is None:
            return None
        return [_flag(finding) for finding in row["findings"] if finding["severity"] >= 1]

    return look_up


def _flag(finding: Mapping[str, Any]) -> Flag:
    families = next((f for title, f in _FAMILIES.items() if finding["title"].startswith(title)), ())
    layers = finding["layers"]
    return Flag(rule=finding["title"], families=families, step=finding["step"], layer=layers[0] if layers else "")


def _run(name: str, seed: int, autopsy_type: Any) -> dict[str, Any]:
    case = find(name)
    torch.manual_seed(seed)
    job = case.build(seed)
    losses: list[float] = []

    def record(_step: int, loss: Tensor, _name: str) -> None:
        losses.append(float(loss.detach()))

    started = time.perf_counter()
    autopsy = autopsy_type(job.model, optimizer=job.optimizers[0], sampling="fast")
    autopsy.attach()
    try:
        drive(job, record, end=lambda _step: autopsy.step(loss=losses[-1] if losses else 0.0))
        autopsy.detach()
        report = autopsy.get_report()
    except Exception as error:  # noqa: BLE001  # a tool that breaks a run is noted, and the pass goes on
        autopsy._attached = False  # noqa: SLF001  # or it writes a crash report at exit
        return {"case": name, "seed": seed, "error": f"{type(error).__name__}: {error}", "findings": []}
    findings = [
        {
            "title": finding.title,
            "severity": int(finding.severity),
            "layers": list(finding.affected_layers),
            "step": int(finding.step_range[0]),
        }
        for finding in report.findings
    ]
    seconds = round(time.perf_counter() - started, 3)
    return {"case": name, "seed": seed, "error": "", "findings": findings, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the clinic's cases under torchmortem.")
    parser.add_argument("results", type=Path, help="JSON Lines file to append to; runs it holds are not repeated")
    parser.add_argument("--half", choices=("practice", "exam"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cases", default="*", help="pattern of names")
    arguments = parser.parse_args()
    try:
        torchmortem = importlib.import_module("torchmortem")
    except ImportError as error:
        parser.exit(
            1, f"torchmortem is not importable here ({error}); this module's docstring says how to install it\n"
        )
    logging.getLogger("torchmortem").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    done = set()
    if arguments.results.exists():
        rows = (json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines())
        done = {(row["case"], row["seed"]) for row in rows}
    with arguments.results.open("a", encoding="utf-8") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(arguments.seeds):
            for case in cases(arguments.half):
                if fnmatch(case.name, arguments.cases) and (case.name, seed) not in done:
                    file.write(json.dumps(_run(case.name, seed, torchmortem.Autopsy)) + "\n")
                    file.flush()


if __name__ == "__main__":
    main()
