"""The public names: each is there, stays the same object, and is never shadowed by a module."""

from __future__ import annotations

import importlib.metadata
import json
import pkgutil
import subprocess
import sys
import types
from typing import Any

import pytest

import gradguard

CONTRACT = {
    "Cause",
    "Diagnosis",
    "Evidence",
    "Finding",
    "GradGuardCallback",
    "GradGuardError",
    "GradGuardWarning",
    "Guard",
    "GuardConfig",
    "Prescription",
    "Severity",
    "check",
    "clip",
    "errors",
    "findings",
    "rules",
    "testing",
    "theory",
    "watch",
}

# Each name is asked of a package that was imported afresh, then all names before and after the import of every
# submodule, then all names where every submodule came first. torch and Lightning stay loaded in between: it is quicker.
PROBE = """
import importlib, json, pkgutil, sys, types

def fresh():
    for module in [name for name in sys.modules if name.partition(".")[0] == "gradguard"]:
        del sys.modules[module]
    return importlib.import_module("gradguard")

failures = {}

def import_all(package):
    for module in pkgutil.walk_packages(package.__path__, "gradguard.", onerror=lambda name: None):
        try:
            importlib.import_module(module.name)
        except Exception as error:  # a module whose extra is not installed may say so
            if type(error).__name__ != "MissingExtraError":
                failures[module.name] = f"{type(error).__name__}: {error}"

def get(package, name):
    try:
        return getattr(package, name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def look(name, alone, again, before, after, late):
    return {
        "error": alone if isinstance(alone, str) and name != "__version__" else "",
        "same": alone is again and before is after,
        "module_first": isinstance(alone, types.ModuleType),
        "module_late": isinstance(late, types.ModuleType),
        "name": getattr(alone, "__name__", ""),
    }

names = fresh().__all__
alone, again = [], []
for name in names:
    package = fresh()
    alone.append(get(package, name))
    again.append(get(package, name))
package = fresh()
before = [get(package, name) for name in names]
import_all(package)
after = [get(package, name) for name in names]
package = fresh()
import_all(package)
late = [get(package, name) for name in names]
looks = dict(zip(names, map(look, names, alone, again, before, after, late)))
print(json.dumps({"looks": looks, "failures": failures}))
"""


@pytest.fixture(scope="module")
def probe() -> dict[str, dict[str, Any]]:
    """Return what a fresh interpreter finds: ``looks`` by public name, ``failures`` by submodule."""
    process = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    result: dict[str, dict[str, Any]] = json.loads(process.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def looks(probe: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what each public name resolved to."""
    return probe["looks"]


def test_every_submodule_can_be_imported(probe: dict[str, dict[str, Any]]) -> None:
    """No submodule fails on import, in whichever order; one whose extra is missing may say that."""
    assert probe["failures"] == {}


def test_the_names_of_the_contract_are_public() -> None:
    """The names that users and documentation rely on are exported."""
    assert set(gradguard.__all__) >= CONTRACT


@pytest.mark.parametrize("name", gradguard.__all__)
def test_name_resolves_to_one_object(name: str, looks: dict[str, dict[str, Any]]) -> None:
    """Asking twice, and again after every submodule was imported, gives the same object."""
    assert looks[name]["error"] == ""
    assert looks[name]["same"]


@pytest.mark.parametrize("name", gradguard.__all__)
def test_name_is_a_module_only_where_meant(name: str, looks: dict[str, dict[str, Any]]) -> None:
    """No submodule takes the place of a function or class of the same name, whichever was loaded first."""
    meant = name in {"clip", "errors", "findings", "jacobian", "rules", "spectra", "testing", "theory"}
    assert looks[name]["module_first"] is meant
    assert looks[name]["module_late"] is meant


@pytest.mark.parametrize("name", sorted(set(gradguard.__all__) - {"__version__"}))
def test_name_is_the_name_of_what_it_gives(name: str, looks: dict[str, dict[str, Any]]) -> None:
    """A name is no alias: what it gives calls itself the same, so tracebacks and documentation agree."""
    assert looks[name]["name"].rpartition(".")[2] == name


def test_no_function_or_class_is_named_like_a_submodule() -> None:
    """The names of submodules and of other public objects are disjoint, except for the exported submodules."""
    submodules = {module.name for module in pkgutil.iter_modules(gradguard.__path__)}
    exported_modules = {name for name in gradguard.__all__ if isinstance(getattr(gradguard, name), types.ModuleType)}

    assert submodules & set(gradguard.__all__) == exported_modules


def test_all_is_sorted_and_free_of_repetitions() -> None:
    """The list of public names can be read and compared."""
    assert list(gradguard.__all__) == sorted(set(gradguard.__all__))


def test_dir_lists_every_public_name() -> None:
    """Tab completion shows names that are not loaded yet."""
    assert set(gradguard.__all__) <= set(dir(gradguard))
    assert dir(gradguard) == sorted(dir(gradguard))


def test_unknown_attribute_is_named_in_the_error() -> None:
    """A misspelt name raises what Python raises for any module, with the facts from which it suggests a spelling."""
    with pytest.raises(AttributeError, match=r"^module 'gradguard' has no attribute 'wach'$") as caught:
        gradguard.wach  # type: ignore[attr-defined]  # noqa: B018  # the access itself is the test

    assert caught.value.name == "wach"
    assert caught.value.obj is gradguard


def test_importing_an_unknown_name_fails() -> None:
    """``from gradguard import`` of a misspelt name is an ImportError, as for any module."""
    with pytest.raises(ImportError, match="cannot import name 'wach' from 'gradguard'"):
        from gradguard import wach  # type: ignore[attr-defined]  # noqa: F401  # the import itself is the test


def test_version_is_that_of_the_installed_distribution() -> None:
    """The version is stated once, in pyproject.toml."""
    assert gradguard.__version__ == importlib.metadata.version("gradguard")
