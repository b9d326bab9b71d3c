"""The direction of the data, as import-linter enforces it: see architecture in CONTRIBUTING.md."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ONE_WAY = "The data goes one way"
TORCH = "Judging, reporting and the command line never import torch, even indirectly"
FRAMEWORKS = "Only integrations import training frameworks"
TORCH_FREE = {
    "actions",
    "cli",
    "columns",
    "config",
    "detectors",
    "diagnosis",
    "errors",
    "findings",
    "history",
    "linking",
    "origins",
    "outcomes",
    "prescriptions",
    "profiles",
    "records",
    "report",
    "rules",
    "runfile",
    "suggestions",
    "theory",
}


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package under ``root/src`` with the contracts in ``root/pyproject.toml``."""
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--config", str(root / "pyproject.toml"), "--no-cache", "--no-logo"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "src"), "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Return a copy of the package and its contracts, to plant violations in."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(house: Path, module: str, line: str) -> None:
    """Add a line to the end of a module of the copy."""
    path = house / "src" / "gradguard" / module
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")


def test_every_contract_is_kept(house: Path) -> None:
    """The package as it stands breaks no contract."""
    result = lint_imports(house)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        pytest.param("rules.py", "import torch", TORCH, id="torch in the rules"),
        pytest.param("history.py", "from gradguard import detectors", ONE_WAY, id="history imports what judges it"),
        pytest.param("records.py", "def late() -> None:\n    import torch", TORCH, id="torch inside a function"),
        pytest.param("report/__init__.py", "import gradguard.guard", TORCH, id="torch by a detour"),
        pytest.param("guard.py", "import lightning", FRAMEWORKS, id="Lightning outside integrations"),
        pytest.param("monitors/__init__.py", "import gradguard.detectors", ONE_WAY, id="a monitor judges"),
    ],
)
def test_planted_violation_breaks_its_contract(house: Path, module: str, line: str, broken: str) -> None:
    """Each kind of forbidden import makes import-linter fail, and the contract it breaks is named."""
    plant(house, module, line)

    result = lint_imports(house)

    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{broken} BROKEN" in result.stdout


def test_a_new_module_must_be_given_its_place(house: Path) -> None:
    """A module that no layer lists breaks the contract instead of escaping it."""
    (house / "src" / "gradguard" / "astray.py").write_text('"""A module without a place."""\n', encoding="utf-8")

    result = lint_imports(house)

    assert result.returncode == 1
    assert "gradguard.astray" in result.stdout


def test_an_import_for_type_checking_is_allowed(house: Path) -> None:
    """What only a type checker sees does not count as an import."""
    plant(house, "rules.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch")

    result = lint_imports(house)

    assert result.returncode == 0, result.stdout + result.stderr


def test_every_judging_module_that_exists_is_under_the_torch_free_contract() -> None:
    """A module that is to stay free of torch is listed in the contract as soon as it is written."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    listed = next(
        set(contract["source_modules"]) for contract in settings["contracts"] if contract["id"] == "torch-free"
    )
    package = ROOT / "src" / "gradguard"
    written = {name for name in TORCH_FREE if (package / f"{name}.py").exists() or (package / name).is_dir()}

    assert listed == {f"gradguard.{name}" for name in written}
