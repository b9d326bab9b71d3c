"""The commands that need torch: ``gradguard check`` and ``gradguard demo``.

``gradguard.cli`` loads this module by name when one of them is called. Both return the exit code of the process and
raise a :class:`~gradguard.errors.GradGuardError` where they cannot do what was asked.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from torch.optim import Optimizer

from gradguard._demo import CASES, Case, Network, accuracy, load_digits, train, train_with_lightning, try_cures
from gradguard.config import GuardConfig
from gradguard.errors import GradGuardError
from gradguard.findings import Diagnosis, Finding, Severity
from gradguard.outcomes import TrialResult
from gradguard.preflight import check
from gradguard.report.console import print_report
from gradguard.report.trial import render_trial
from gradguard.trials import trial

__all__ = ["TargetError", "TrialOptions", "load_target", "run_check", "run_demo"]

_Result = TypeVar("_Result")

_FORMS = "Write module:function or path/to/file.py:function, for instance net.py:sample."
_RETURNS = (
    "It must return (model, batch, compute_loss), where compute_loss(model, batch) is the scalar loss; for --trial "
    "(model, batch, compute_loss, make_optimizer, batches)."
)
_FOR_TRIAL = (
    "A trial trains copies of the model, so the function must return two things more: (model, batch, compute_loss, "
    "make_optimizer, batches), where make_optimizer(model) is the optimizer to train a copy with and batches an "
    "iterable of training batches like batch, for instance a DataLoader."
)


class TargetError(GradGuardError):
    """The target of ``gradguard check`` cannot be used; the message says why and what is accepted."""


@dataclass(frozen=True, slots=True)
class _Target:
    """What a target returns; the last two are needed for a trial only."""

    model: nn.Module
    batch: Any
    compute_loss: Callable[[Any, Any], Any]
    make_optimizer: Callable[[Any], Optimizer] | None = None
    batches: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOptions:
    """What bounds a trial on the command line.

    Attributes:
        steps: Steps of a whole run of a copy; ``None`` for the usual 40.
        seconds: Seconds after which to stop with what is known by then; ``None`` for no such limit.
        progress: Say on standard error what was dropped, and why.
    """

    steps: int | None = None
    seconds: float | None = None
    progress: bool = True


def run_check(
    target: str,
    *,
    as_json: bool = False,
    fail_on: str = "warning",
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    trial_options: TrialOptions | None = None,
) -> int:
    """Check the model that a function returns, and print the report; on request try the cures on copies as well.

    Args:
        target: ``module:function`` or ``path/to/file.py:function``; see :func:`load_target`.
        as_json: Print the diagnosis as one JSON object. What the target itself prints then goes to standard error.
        fail_on: Lowest severity that counts as a failure: ``"info"``, ``"warning"`` or ``"error"``.
        select: Codes, names or families of rules to apply; empty means all.
        ignore: Codes, names or families of rules to leave out.
        trial_options: Run a trial after the check, within these bounds; ``None`` for no trial.

    Returns:
        0 where nothing at or above ``fail_on`` was found, 1 where something was, 2 where too little could be observed;
        a trial does not change it, since the model is as ill as before.

    Raises:
        TargetError: If the target cannot be loaded, or its model cannot be checked, or cures cannot be tried on it.
    """
    result = None
    with _search_path(target), contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        loaded = _load(target)
        if trial_options is not None:
            _check_for_trial(target, loaded)
        rules = GuardConfig(select=tuple(select), ignore=tuple(ignore))
        diagnosis = _run(
            target, "checked", partial(check, loaded.model, loaded.batch, loaded.compute_loss, config=rules)
        )
        if trial_options is not None and not as_json:
            print_report(diagnosis)
        if trial_options is not None:
            result = _run(target, "tried", partial(_try_cures, loaded, diagnosis, trial_options))
    if as_json:
        sys.stdout.write(f"{_json_of(diagnosis, result)}\n")
    elif result is None:
        print_report(diagnosis)
    else:
        _print_trial(result)
    worst = diagnosis.worst()
    if worst is not None and worst >= Severity[fail_on.upper()]:
        return 1
    return 2 if diagnosis.healthy is None else 0


def _run(target: str, what: str, function: Callable[[], _Result]) -> _Result:
    """Run something on the model of a target; its own errors become the target's."""
    try:
        return function()
    except GradGuardError:
        raise
    except Exception as error:
        raise TargetError(f"the model of {target!r} could not be {what}.\n{_describe(error)}") from error


def _try_cures(loaded: _Target, diagnosis: Diagnosis, options: TrialOptions) -> TrialResult:
    assert loaded.make_optimizer is not None  # noqa: S101  # _check_for_trial lets no such target pass
    console = Console(stderr=True, highlight=False, quiet=not options.progress)
    with console.status("trying cures on copies of the model"):
        return trial(
            loaded.model,
            loaded.batches,
            loaded.compute_loss,
            loaded.make_optimizer,
            diagnosis=diagnosis,
            steps=options.steps,
            seconds=options.seconds,
            progress=partial(console.print, markup=False),
        )


def _print_trial(result: TrialResult) -> None:
    console = Console(highlight=False)
    console.print("\nCures tried on copies of the model, which is as it was:", soft_wrap=True)
    for part in render_trial(result, console.options, apply="" if result.best is None else result.best.code):
        console.print(part)


def _json_of(diagnosis: Diagnosis, result: TrialResult | None) -> str:
    """Return the diagnosis as JSON; with a trial its prescriptions hold what was measured, and ``"trial"`` the rest."""
    if result is None:
        return diagnosis.to_json()
    tried = {key: value for key, value in result.to_dict().items() if key != "diagnosis"}
    known = result.diagnosis if result.diagnosis is not None else diagnosis
    return json.dumps(known.to_dict() | {"trial": tried}, indent=2, allow_nan=False)


def load_target(target: str) -> tuple[nn.Module, Any, Callable[[Any, Any], Any]]:
    """Import a function by ``module:function`` or ``path/to/file.py:function``, call it, and check what it returns.

    Args:
        target: Module (the working directory is searched as well) or file, a colon, and the name of a function that
            takes no arguments.

    Returns:
        The model, a batch, and the function ``compute_loss(model, batch)``.

    Raises:
        TargetError: If any of that fails. The message shows the original error, or names the closest function.
    """
    loaded = _load(target)
    return loaded.model, loaded.batch, loaded.compute_loss


def _load(target: str) -> _Target:
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise TargetError(f"target {target!r} names no module and function. {_FORMS}")
    module = _import(where)
    function = getattr(module, name, None)
    if not callable(function):
        raise TargetError(f"{where!r} has no function {name!r}.{_closest_function(name, module)} {_FORMS}")
    try:
        value = function()
    except (Exception, SystemExit) as error:
        raise TargetError(f"{target!r} failed when called without arguments.\n{_describe(error)}") from error
    return _checked(target, value)


def _checked(target: str, value: Any) -> _Target:
    if not isinstance(value, (tuple, list)) or len(value) not in {3, 5}:
        size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
        raise TargetError(f"{target!r} returned a {type(value).__name__}{size}. {_RETURNS}")
    loaded = _Target(*value)
    if not isinstance(loaded.model, nn.Module):
        kind = type(loaded.model).__name__
        raise TargetError(f"{target!r} returned a {kind} as its model, not an nn.Module. {_RETURNS}")
    if not callable(loaded.compute_loss):
        kind = type(loaded.compute_loss).__name__
        raise TargetError(f"{target!r} returned a {kind} as compute_loss, which cannot be called. {_RETURNS}")
    return loaded


def _check_for_trial(target: str, loaded: _Target) -> None:
    """Refuse a target that has not what a trial needs.

    Raises:
        TargetError: If make_optimizer or batches are missing or of the wrong kind.
    """
    if loaded.make_optimizer is None and loaded.batches is None:
        raise TargetError(f"{target!r} returned no make_optimizer and no batches. {_FOR_TRIAL}")
    if not callable(loaded.make_optimizer):
        kind = type(loaded.make_optimizer).__name__
        raise TargetError(f"{target!r} returned a {kind} as make_optimizer, which cannot be called. {_FOR_TRIAL}")
    if isinstance(loaded.batches, (str, bytes, dict, torch.Tensor)) or not isinstance(loaded.batches, Iterable):
        kind = type(loaded.batches).__name__
        raise TargetError(f"{target!r} returned a {kind} as batches, which is no iterable of batches. {_FOR_TRIAL}")


def _import(where: str) -> ModuleType:
    path = Path(where)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise TargetError(f"there is no file {where!r} in {Path.cwd()}. {_FORMS}")
    try:
        return _import_file(path) if is_file else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        raise TargetError(f"{where!r} could not be imported.\n{_describe(error)}") from error


def _import_file(path: Path) -> ModuleType:
    # Not under the file's own name: a net called torch.py must not take the place of torch.
    name = f"gradguard_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"Python has no loader for {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _search_path(target: str) -> Iterator[None]:
    """Let the target import its neighbours: those of its file, and those in the working directory."""
    before = list(sys.path)
    path = Path(target.rpartition(":")[0])
    sys.path[:0] = [str(path.resolve().parent)] if path.suffix == ".py" else []
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


def _closest_function(name: str, module: ModuleType) -> str:
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    close = difflib.get_close_matches(name, functions, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _describe(error: BaseException) -> str:
    """Return the original error with those lines of its traceback that are the user's."""
    machinery = [Path(str(file)).parent for file in (__file__, torch.__file__, importlib.__file__)]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen")
        and not any(Path(frame.filename).is_relative_to(folder) for folder in machinery)
    ]
    text = "".join(traceback.StackSummary.from_list(frames).format())
    return text + "".join(traceback.format_exception_only(error)).rstrip()


def run_demo(
    *, lightning: bool = False, as_json: bool = False, steps: int = 240, seed: int = 0, progress: bool = True
) -> int:
    """Train a sick network and its healthy twin on digits, and print the report on each.

    Args:
        lightning: Train through a Lightning Trainer with :class:`gradguard.GradGuardCallback`.
        as_json: Print one JSON object with both diagnoses and the trial: ``"sick"``, ``"healthy"``, ``"trial"``.
        steps: Optimizer steps for each network, at least 1.
        seed: Seed of the weights and of the order of the batches.
        progress: Show a progress bar on standard error.

    Then cures are tried on copies of the sick network, and the best is applied and trained with.

    Returns:
        0: what the diagnoses say is no failure of the demo.

    Raises:
        MissingExtraError: If scikit-learn or Lightning is missing; the message names the extra.
    """
    digits = load_digits()
    fit = train_with_lightning if lightning else train
    results: list[tuple[Case, Diagnosis, float]] = []
    with _progress_bar(shown=progress) as bar, torch.random.fork_rng(devices=[]), _one_thread():
        for case in CASES:
            task = bar.add_task(f"training the {case.label} network", total=steps)
            torch.manual_seed(seed)
            model = Network(case)
            batches = digits.batches(steps, seed=seed)
            diagnosis = fit(model, batches, _announcer(case, bar, shown=progress), partial(bar.advance, task))
            results.append((case, diagnosis, accuracy(model, digits)))
        sick, found, _ = results[0]
        cure, cured = try_cures(sick, digits, found, steps=steps, seed=seed)
    if as_json:
        data = {case.label: diagnosis.to_dict() for case, diagnosis, _ in results} | {"trial": cure.to_dict()}
        sys.stdout.write(f"{json.dumps(data, indent=2)}\n")
    else:
        _print_reports(results, steps)
        _print_cure(cure, cured, steps)
    return 0


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: layers this small gain nothing from two, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _print_reports(results: Sequence[tuple[Case, Diagnosis, float]], steps: int) -> None:
    console = Console(highlight=False)
    for case, diagnosis, share in results:
        console.print(f"\nThe {case.label} one: {case.title}, {steps} steps of Adam.", soft_wrap=True)
        console.print(f"It names {share:.0%} of the held-out digits correctly; chance is 10%.", soft_wrap=True)
        print_report(diagnosis, console)


def _print_cure(cure: TrialResult, share: float, steps: int) -> None:
    console = Console(highlight=False)
    console.print("\nThe sick one again, from its first weights: cures tried on copies.", soft_wrap=True)
    console.print(cure)
    if cure.best is not None:
        console.print(
            f"With {cure.best.remedy} applied and {steps} steps of Adam it names {share:.0%} correctly.", soft_wrap=True
        )


def _progress_bar(*, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


def _announcer(case: Case, bar: Progress, *, shown: bool) -> Callable[[Finding], object]:
    """Return what a run says the moment a finding begins: one line, above the progress bar."""

    def announce(finding: Finding) -> None:
        if shown:
            bar.console.print(f"{case.label}: step {finding.step}: {finding.code} {finding.name}", highlight=False)

    return announce
