"""What an import costs: gradguard, its command line and its reports start without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gradguard

HEAVY = ("torch", "lightning", "pytorch_lightning", "sklearn", "scipy")
PACKAGE = Path(gradguard.__file__).parent


def imported_by(statement: str, *, path: Path | None = None) -> set[str]:
    """Return the top-level modules that are loaded after a statement in a fresh interpreter."""
    code = f"import json, sys\n{statement}\nprint(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("COV_", "COVERAGE_"))}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    return set(json.loads(process.stdout))


def test_importing_gradguard_imports_nothing_heavy() -> None:
    """``import gradguard`` loads neither torch nor Lightning, nor any other dependency."""
    assert imported_by("import gradguard") & {*HEAVY, "numpy", "rich", "typer"} == set()


@pytest.mark.parametrize(
    "statement",
    [
        "import gradguard; gradguard.GuardConfig",
        "import gradguard; gradguard.rules",
        "import gradguard; gradguard.Diagnosis",
        "import gradguard.history",
        "import gradguard.detectors",
        "import gradguard.diagnosis",
        "import gradguard.prescriptions",
        "import gradguard.report",
        "import gradguard.report.console",
        "import gradguard.report.html",
        "import gradguard.cli",
        "from gradguard.cli import main",
    ],
)
def test_judging_and_reporting_start_without_torch(statement: str) -> None:
    """Rules, verdicts, reports and the command line load neither torch nor Lightning."""
    assert imported_by(statement) & set(HEAVY) == set()


def test_the_probe_sees_an_import_that_should_not_be(tmp_path: Path) -> None:
    """With an ``import torch`` planted in the rules the test above would fail."""
    shutil.copytree(PACKAGE, tmp_path / "gradguard", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "torch.py").write_text("", encoding="utf-8")
    statement = "import gradguard; gradguard.rules"
    assert "torch" not in imported_by(statement, path=tmp_path)

    rules = tmp_path / "gradguard" / "rules.py"
    rules.write_text(rules.read_text(encoding="utf-8") + "\nimport torch\n", encoding="utf-8")

    assert "torch" in imported_by(statement, path=tmp_path)
