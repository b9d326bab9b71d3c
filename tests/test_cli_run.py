"""The commands that need torch: checking a function's model, and the demo."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import gradguard.cli_run
from gradguard.cli import app
from gradguard.cli_run import TargetError, load_target
from gradguard.findings import Diagnosis

NETS = """
    import torch
    from torch import nn

    def stack(activation, layers, width=16):
        modules = [m for _ in range(layers) for m in (nn.Linear(width, width), activation())]
        return nn.Sequential(*modules, nn.Linear(width, 1))

    def loss(model, batch):
        return model(batch).square().mean()

    def sick():
        torch.manual_seed(0)
        return stack(nn.Sigmoid, 20), torch.randn(32, 16), loss

    def healthy():
        torch.manual_seed(0)
        print("building the net")
        return stack(nn.ReLU, 2), torch.randn(32, 16), loss
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file with a sick and a healthy net; its folder is the working directory."""
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "nets.py", NETS)


def write(path: Path, text: str) -> Path:
    """Write Python code to a file, without its common indentation."""
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def run(*arguments: str) -> Result:
    """Run a command in this process, 80 columns wide."""
    return CliRunner().invoke(app, arguments, prog_name="gradguard", env={"COLUMNS": "80"})


def failure(*arguments: str) -> str:
    """Run a command that must end with exit code 2 and nothing on standard output; return its message in one line."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


# ---------------------------------------------------------------------------------------------------------------- check


def test_check_of_a_sick_net_exits_with_1_and_names_the_rule(nets: Path) -> None:
    """A vanishing gradient fails the check, and the report says so."""
    result = run("check", f"{nets}:sick")

    assert result.exit_code == 1
    assert "GG101 vanishing-gradient" in " ".join(result.stdout.split())


def test_check_of_a_healthy_net_exits_with_0(nets: Path) -> None:
    """A healthy net passes, and the report says so."""
    result = run("check", f"{nets}:healthy")

    assert result.exit_code == 0
    assert "HEALTHY" in result.stdout


@pytest.mark.parametrize(("target", "code"), [("nets.py:sick", 1), ("nets.py:healthy", 0)])
def test_check_takes_a_relative_file(nets: Path, target: str, code: int) -> None:
    """A file is found from the working directory."""
    assert run("check", target).exit_code == code


def test_check_takes_a_module_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module is imported as Python would with the working directory on its path; the path is as before afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gg_package").mkdir()
    write(tmp_path / "gg_package" / "gg_nets.py", NETS)
    path = list(sys.path)

    result = run("check", "gg_package.gg_nets:sick")

    assert result.exit_code == 1
    assert sys.path == path


def test_file_can_import_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in another folder imports what lies beside it, also inside the function."""
    folder = tmp_path / "project"
    folder.mkdir()
    write(folder / "gg_neighbour.py", NETS)
    write(folder / "entry.py", "def sample():\n    import gg_neighbour\n    return gg_neighbour.healthy()\n")
    monkeypatch.chdir(tmp_path)

    assert run("check", "project/entry.py:sample").exit_code == 0


def test_file_named_like_an_installed_module_does_not_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``random.py:sample`` leaves Python's ``random`` alone."""
    import random

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "random.py", NETS)

    assert run("check", "random.py:healthy").exit_code == 0
    assert sys.modules["random"] is random


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 1),
        (["--fail-on", "info"], 1),
        (["--fail-on", "WARNING"], 1),
        (["--fail-on", "error"], 0),
        (["--select", "dead,saturated"], 0),
        (["--select", "dead", "--select", "GG101"], 1),
        (["--ignore", "vanishing"], 0),
    ],
)
def test_exit_code_follows_severity_and_selected_rules(nets: Path, options: list[str], code: int) -> None:
    """The vanishing gradient is a warning before the first step, and counts where its rule is selected."""
    assert run("check", f"{nets}:sick", *options).exit_code == code


def test_check_as_json_is_one_object(nets: Path) -> None:
    """Standard output holds the diagnosis alone; what the target prints goes to standard error."""
    sick, healthy = run("check", f"{nets}:sick", "--json"), run("check", f"{nets}:healthy", "--json")

    assert (sick.exit_code, json.loads(sick.stdout)["primary"]) == (1, "GG101")
    assert (healthy.exit_code, json.loads(healthy.stdout)["healthy"]) == (0, True)
    assert healthy.stderr == "building the net\n"


def test_too_little_seen_exits_with_2(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline must not take "nothing observed" for "healthy"."""
    nothing = Diagnosis(findings=(), verdict="Nothing was observed.", observations=0, sufficient=False)
    monkeypatch.setattr(gradguard.cli_run, "check", lambda *_, **__: nothing)

    assert run("check", f"{nets}:healthy").exit_code == 2


@pytest.mark.parametrize("target", ["nets.py", ":sick", "nets.py:", "nets"])
def test_target_without_module_or_function_says_how_to_write_it(nets: Path, target: str) -> None:
    """The forms that are accepted stand in the message, with an example."""
    message = failure("check", target)

    assert f"Error: target {target!r} names no module and function." in message
    assert "Write module:function or path/to/file.py:function, for instance net.py:sample." in message


def test_missing_file_and_missing_module_are_named(nets: Path) -> None:
    """A file that is not there, and a module that cannot be found, each with the original reason."""
    assert "there is no file 'absent.py' in" in failure("check", "absent.py:sick")
    message = failure("check", "gg_absent.nets:sick")
    assert "'gg_absent.nets' could not be imported. ModuleNotFoundError: No module named 'gg_absent'" in message


def test_missing_function_names_the_closest(nets: Path) -> None:
    """A misspelt function gets a suggestion from those of the module."""
    assert "has no function 'helthy'. Did you mean 'healthy'?" in failure("check", f"{nets}:helthy")
    assert "Did you mean" not in failure("check", f"{nets}:xyzzy")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import gg_missing_dependency", "ModuleNotFoundError: No module named 'gg_missing_dependency'"),
        ("def sample(:", "SyntaxError"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit('stop')", "SystemExit: stop"),
    ],
)
def test_file_that_fails_to_import_shows_the_original_error(nets: Path, code: str, error: str) -> None:
    """The user's line and error are shown; the lines of the import machinery are not."""
    write(nets.parent / "broken.py", code)

    message = failure("check", "broken.py:sample")

    assert "Error: 'broken.py' could not be imported." in message
    assert error in message
    assert "broken.py" in message.partition("could not be imported.")[2]
    assert "cli_run.py" not in message
    assert "frozen importlib" not in message


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("raise RuntimeError('no data')", "failed when called without arguments. File"),
        ("return None", "returned a NoneType. It must return (model, batch, compute_loss)"),
        ("return nn.Linear(2, 1), None", "returned a tuple of 2. It must return (model, batch, compute_loss)"),
        ("return nn.Linear, None, None", "returned a type as its model, not an nn.Module."),
        ("return nn.Linear(2, 1), None, 'mse'", "returned a str as compute_loss, which cannot be called."),
    ],
)
def test_function_with_a_wrong_result_says_what_came(nets: Path, body: str, text: str) -> None:
    """The type that came and the three that are wanted stand in the message."""
    write(nets.parent / "wrong.py", f"from torch import nn\n\ndef sample():\n    {body}\n")

    assert f"Error: 'wrong.py:sample' {text}" in failure("check", "wrong.py:sample")


def test_function_that_takes_arguments_says_so(nets: Path) -> None:
    """The call and Python's own words are shown."""
    write(nets.parent / "wrong.py", "def sample(batch_size):\n    return batch_size\n")

    message = failure("check", "wrong.py:sample")

    assert "'wrong.py:sample' failed when called without arguments." in message
    assert "missing 1 required positional argument: 'batch_size'" in message


@pytest.mark.parametrize(
    ("model", "loss", "text"),
    [
        ("nn.Linear(3, 1)", "m(x).mean()", "mat1 and mat2 shapes cannot be multiplied"),
        ("nn.Linear(2, 1)", "m(x)", "must return a scalar"),
        ("nn.Linear(2, 1)", "m(x).mean().item()", "must return a scalar tensor"),
        ("nn.Linear(2, 1)", "m(x).mean().detach()", "depends on no trainable parameter"),
        ("nn.ReLU()", "m(x).mean()", "parameter"),
    ],
)
def test_model_that_cannot_be_checked_is_no_finding(nets: Path, model: str, loss: str, text: str) -> None:
    """A failing forward pass or a loss without gradient ends with exit code 2 and its reason, not with a traceback."""
    sample = f"def sample():\n    return {model}, torch.ones(4, 2), lambda m, x: {loss}\n"
    write(nets.parent / "wrong.py", f"import torch\nfrom torch import nn\n\n{sample}")

    assert text in failure("check", "wrong.py:sample")


def test_load_target_returns_what_the_function_returns(nets: Path) -> None:
    """The three values come back as they are; errors are gradguard's own."""
    model, batch, compute_loss = load_target(f"{nets}:healthy")

    assert isinstance(model, nn.Sequential)
    assert compute_loss(model, batch).shape == ()
    with pytest.raises(TargetError, match="names no module and function"):
        load_target("healthy")


# ---------------------------------------------------------------------------------------------------------------- trial

TRIED = """
    import torch
    from torch import nn

    def adam(model):
        return torch.optim.Adam(model.parameters(), lr=0.01)

    def sample(activation, layers, width=12):
        torch.manual_seed(0)
        hidden = [m for _ in range(layers) for m in (nn.Linear(width, width), activation())]
        model = nn.Sequential(*hidden, nn.Linear(width, 2))
        data = torch.randn(6, 32, width, generator=torch.Generator().manual_seed(0))
        batches = [(x, (x[:, 0] > 0).long()) for x in data]
        loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        return model, batches[0], loss, adam, batches

    def sick():
        return sample(nn.Sigmoid, 8)

    def healthy():
        return sample(nn.ReLU, 1)

    def dead_end():
        def broken(model):
            raise RuntimeError("no optimizer today")
        return *sick()[:3], broken, sick()[4]
"""


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file with a sick and a healthy net and what a trial of them needs."""
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "tried.py", TRIED)


def test_trial_prints_report_ranking_and_the_line_to_apply(tried: Path) -> None:
    """After the check's report stands the table of cures; the model is as ill as before, so the exit code is 1."""
    result = run("check", "tried.py:sick", "--trial", "--steps", "12")
    text = " ".join(result.stdout.split())

    assert result.exit_code == 1
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    report, _, trial = text.partition("Cures tried on copies of the model, which is as it was:")
    assert "GG101 vanishing-gradient" in report
    assert "untreated" in trial
    best = trial.split(":")[0].strip()
    assert f'gradguard.apply("{best}", model, optimizer=optimizer, batch=batch)' in trial
    assert "result.best" not in trial
    assert "dropped" in result.stderr


def test_trial_as_json_is_the_diagnosis_with_what_was_measured(tried: Path) -> None:
    """One object: the diagnosis as without a trial, effects in its prescriptions, and the trial's runs beside it."""
    plain = json.loads(run("check", "tried.py:sick", "--json").stdout)
    result = run("check", "tried.py:sick", "--trial", "--steps", "12", "--json", "--no-progress")
    data = json.loads(result.stdout)

    assert (result.exit_code, result.stderr) == (1, "")
    assert list(data) == [*plain, "trial"]
    assert data["primary"] == plain["primary"] == "GG101"
    assert data["trial"]["best"]["remedy"] == data["findings"][0]["prescriptions"][0]["remedy"]
    assert data["findings"][0]["prescriptions"][0]["effect"]["steps"] == 12
    assert plain["findings"][0]["prescriptions"][0]["effect"] is None
    assert data["trial"]["cost_steps"] > 0


def test_nothing_is_tried_on_a_healthy_model(tried: Path) -> None:
    """Exit code 0, and a sentence that says so."""
    result = run("check", "tried.py:healthy", "--trial")

    assert result.exit_code == 0
    assert "Nothing is wrong, so nothing was tried." in result.stdout


def test_a_target_for_a_trial_can_be_checked_without_one(tried: Path) -> None:
    """Optimizer and batches are not asked for then."""
    assert run("check", "tried.py:sick").exit_code == 1
    assert run("check", "tried.py:healthy").exit_code == 0


def test_time_bounds_a_trial(tried: Path) -> None:
    """What is known by then is printed, and that it was cut short."""
    result = run("check", "tried.py:sick", "--trial", "--steps", "100000", "--seconds", "0.5")

    assert result.exit_code == 1
    assert "interrupted" in result.stdout


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("(net, x, loss)", "returned no make_optimizer and no batches. A trial trains copies"),
        ("(net, x, loss, adam, None)", "returned a NoneType as batches, which is no iterable of batches."),
        ("(net, x, loss, adam, x)", "returned a Tensor as batches, which is no iterable of batches."),
        ("(net, x, loss, [x], [x])", "returned a list as make_optimizer, which cannot be called."),
        ("(net, x, loss, adam)", "returned a tuple of 4. It must return (model, batch, compute_loss)"),
        ("(net, x, loss, adam, [])", "batches is empty: a trial needs at least one batch to train on"),
        ("(net, x, loss, lambda m: 3, [x])", "make_optimizer"),
    ],
)
def test_what_a_trial_lacks_is_said(value: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came, what is accepted, and what the two further values are."""
    monkeypatch.chdir(tmp_path)
    body = f"""
        import torch
        from torch import nn

        def sample():
            torch.manual_seed(0)
            net = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(4, 4), nn.Sigmoid())], nn.Linear(4, 1))
            x, loss = torch.randn(8, 4), lambda model, batch: model(batch).square().mean()
            adam = lambda model: torch.optim.Adam(model.parameters())
            return {value}
    """
    write(tmp_path / "lacking.py", body)
    result = run("check", "lacking.py:sample", "--trial", "--json")

    assert result.exit_code == 2
    assert result.stdout == ""
    assert text in " ".join(result.stderr.split())


def test_an_optimizer_that_cannot_be_made_is_shown_with_the_users_lines(tried: Path) -> None:
    """The original error, not a traceback through gradguard."""
    result = run("check", "tried.py:dead_end", "--trial", "--json")

    assert result.exit_code == 2
    assert "no optimizer today" in result.stderr
    assert "_contest.py" not in result.stderr


@pytest.mark.parametrize("options", [("--steps", "5"), ("--seconds", "5")])
def test_bounds_without_a_trial_are_refused(options: tuple[str, str]) -> None:
    """They would do nothing."""
    assert "it bounds a trial: add --trial" in failure("check", "nets.py:sick", *options)


# ----------------------------------------------------------------------------------------------------------------- demo


def demo(*options: str) -> dict[str, Any]:
    """Run a short demo and return its JSON object."""
    result = run("demo", "--json", "--no-progress", "--steps", "12", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def test_demo_as_json_is_one_object_with_both_diagnoses() -> None:
    """The sick net has a vanishing gradient, its twin nothing at WARNING or above, already after a few steps."""
    data = demo()

    assert list(data) == ["sick", "healthy", "trial"]
    assert data["trial"]["control"]["outcome"] == "untreated"
    assert (data["sick"]["primary"], data["sick"]["healthy"]) == ("GG101", False)
    assert data["sick"]["findings"][0]["cause"] == "activation derivative"
    assert (data["healthy"]["primary"], data["healthy"]["healthy"]) == (None, True)
    assert data["sick"]["summary"]["steps"] == data["healthy"]["summary"]["steps"] == 12


def test_demo_is_repeatable_and_leaves_the_random_state_alone() -> None:
    """The same seed gives the same numbers, another seed others; the caller's random state is as it was."""
    state = torch.get_rng_state()

    spans = [demo("--seed", seed)["sick"]["summary"]["span_decades"] for seed in ("3", "3", "4")]

    assert spans[0] == spans[1] != spans[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_demo_prints_both_reports_in_80_columns() -> None:
    """Each report is introduced by what was trained and how well it does; progress goes to standard error."""
    result = run("demo", "--steps", "12")

    assert result.exit_code == 0
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    text = " ".join(result.stdout.split())
    sick, _, healthy = text.partition("The healthy one: 20 layers of ReLUs, He initialization, 12 steps of Adam.")
    assert "The sick one: 20 layers of sigmoids, Xavier initialization, 12 steps of Adam." in sick
    assert "of the held-out digits correctly; chance is 10%." in sick
    assert "GG101 vanishing-gradient" in sick
    assert "HEALTHY" in healthy
    assert "cures tried on copies" in healthy
    assert "batch-norm" in healthy
    assert "training the sick network" in result.stderr
    assert "sick: step 0: GG101 vanishing-gradient" in result.stderr
    assert "healthy: step" not in result.stderr


def test_lightning_demo_trains_the_same_networks() -> None:
    """Through a Trainer the same batches give the same losses and the same verdicts."""
    pytest.importorskip("lightning")

    plain, through_trainer = demo(), demo("--lightning")

    for label in ("sick", "healthy"):
        assert through_trainer[label]["primary"] == plain[label]["primary"]
        for name in ("loss_first", "loss_last", "span_decades"):
            expected = plain[label]["summary"][name]
            assert through_trainer[label]["summary"][name] == pytest.approx(expected, rel=1e-4), (label, name)


@pytest.mark.parametrize(
    ("options", "missing", "extra"),
    [
        ([], ["sklearn", "sklearn.datasets"], "demo"),
        (["--lightning"], ["lightning", "lightning.pytorch", "pytorch_lightning"], "lightning"),
    ],
)
def test_demo_without_an_extra_names_it(
    options: list[str], missing: list[str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing, and the command that installs it; exit code 2."""
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)

    message = failure("demo", "--no-progress", "--steps", "1", *options)

    assert "which is not installed" in message
    assert f"pip install 'gradguard[{extra}]'" in message
