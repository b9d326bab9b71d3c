"""The examples run as they stand, and find what they say they find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an example in a folder of its own."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["custom_loop.py", "lightning_callback.py"])
def test_example_runs_and_names_the_illness(name: str, tmp_path: Path) -> None:
    """Each example is a script of under 60 lines that trains a sick network and prints its report."""
    source = EXAMPLES / name
    done = run_example(name, tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gradguard explain GG101") == 1
    assert "GG101 vanishing-gradient, caused by activation derivative" in done.stdout
    assert len(source.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.slow
def test_the_clipping_example_shows_that_clipping_saves_the_run(tmp_path: Path) -> None:
    """Without clipping the net ends at chance; the default keeps it above 90 % and clips little but the bad batches."""
    done = run_example("clipping.py", tmp_path)
    rows = {line[:12].strip(): line[12:].split() for line in done.stdout.splitlines() if line.endswith("%")}

    assert done.returncode == 0, done.stderr
    assert float(rows["none"][1].rstrip("%")) < 30.0
    assert float(rows["Adaptive"][1].rstrip("%")) > 90.0
    assert rows["Adaptive"][2:5] == ["6", "of", "6"]
    assert float(rows["Adaptive"][5].rstrip("%")) < 5.0
    assert "use          clipper = gradguard.clip." in done.stdout


def test_there_are_examples_for_both_ways_of_training() -> None:
    """A loop of one's own, Lightning and clipping are shown."""
    assert {"clipping.py", "custom_loop.py", "lightning_callback.py"} <= {path.name for path in EXAMPLES.glob("*.py")}
