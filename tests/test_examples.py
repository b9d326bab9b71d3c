"""The examples run as they stand, and find what they say they find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.py"))])
def test_example_runs_and_names_the_illness(name: str, tmp_path: Path) -> None:
    """Each example is a script of under 60 lines that trains a sick network and prints its report."""
    source = EXAMPLES / name
    done = subprocess.run(
        [sys.executable, str(source)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gradguard explain GG101") == 1
    assert "GG101 vanishing-gradient, caused by activation derivative" in done.stdout
    assert len(source.read_text(encoding="utf-8").splitlines()) < 60


def test_there_are_examples_for_both_ways_of_training() -> None:
    """A loop of one's own and Lightning are both shown."""
    assert {"custom_loop.py", "lightning_callback.py"} <= {path.name for path in EXAMPLES.glob("*.py")}
