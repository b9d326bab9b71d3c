"""The experiments run, measure what theory says, and draw a picture where matplotlib is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("sklearn")

from examples.experiments import (  # after the check for what they need
    _common,
    batch_norm,
    clipping,
    recurrent_length,
    residual_depth,
)


@pytest.fixture(autouse=True)
def _as_before() -> object:
    """Put the random state and the number of threads back."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    yield
    torch.set_rng_state(state)
    torch.set_num_threads(threads)


def test_residual_paths_keep_the_gradient_that_plain_layers_lose() -> None:
    """Torch's default under ReLU passes 0.41 per layer, with a path 1.08, with SkipInit exactly 1."""
    rows = residual_depth.run(depths=(12,), steps=3)

    assert [row.kind for row in rows] == list(residual_depth.KINDS)
    plain, residual, skip = rows
    assert plain.factor == pytest.approx((1 / 6) ** 0.5, rel=0.1)
    assert residual.factor == pytest.approx((1 + 1 / 6) ** 0.5, rel=0.05)
    assert skip.factor == pytest.approx(1.0, abs=1e-5)
    assert plain.decades < -3.0 < residual.decades
    assert all(0.0 <= row.accuracy <= 1.0 for row in rows)


def test_batch_norm_repairs_sigmoids_and_harms_relus() -> None:
    """Xavier sigmoids pass 0.236 per layer; with BatchNorm about 1; BatchNorm under ReLU amplifies by 1.21."""
    rows = {(row.activation, row.normalized): row for row in batch_norm.run(depths=(12,), steps=3)}

    assert rows["sigmoid", False].factor == pytest.approx(0.236, rel=0.06)
    assert rows["sigmoid", True].factor == pytest.approx(1.0, abs=0.1)
    assert rows["ReLU", False].factor == pytest.approx(1.0, abs=0.12)
    assert rows["ReLU", True].factor == pytest.approx(1.211, rel=0.06)
    assert rows["sigmoid", False].decades < -5.0 < rows["sigmoid", True].decades


def test_gates_that_stay_open_keep_the_gradient_through_time() -> None:
    """Torch's LSTM loses as much as its RNN; orthogonal weights and chrono biases lose least."""
    rows = {row.kind: row for row in recurrent_length.run(lengths=(24,), steps=3, seeds=1)}

    assert rows["RNN"].factor == pytest.approx(rows["LSTM"].factor, abs=0.08)
    assert rows["RNN"].factor < 0.7 < rows["LSTM, forget bias 1"].factor
    assert rows["RNN, orthogonal"].factor > 0.85
    assert rows["LSTM, chrono"].factor > rows["LSTM, forget bias 1"].factor


def test_a_threshold_stops_what_explodes() -> None:
    """Without clipping the loss is soon not finite; a threshold of 1 cuts the steps and the loss falls."""
    off, one = clipping.run(methods=("off", "1"), steps=60, seeds=1)

    assert off.runs[0].losses[-1] > 100.0 or len(off.runs[0].losses) < 60
    assert (off.clipped, one.clipped > 0.5) == (0.0, True)
    assert one.runs[0].losses[-1] < one.runs[0].losses[0]
    assert one.factor == pytest.approx(1.0, abs=0.1)


MODULES = [batch_norm, clipping, recurrent_length, residual_depth]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_each_prints_a_table_with_a_row_per_net_and_draws(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line gives the steps; the picture is drawn where matplotlib is, and else the extra is named."""
    for name, small in (("DEPTHS", (6,)), ("LENGTHS", (10,))):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, small)
            monkeypatch.setitem(module.run.__kwdefaults__, name.lower(), small)
    picture = tmp_path / "picture.png"
    rows = module.main(["--steps", "2", "--seeds", "1", "--picture", str(picture)])
    text, notes = capsys.readouterr()

    assert text.count("%") >= len(rows)
    assert "found" in text
    assert picture.exists() == ("drawn to" in notes)
    assert picture.exists() or "pip install 'gradguard[examples]'" in " ".join(notes.split())


def test_without_matplotlib_the_table_is_printed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture that was asked for is missed with a word on how to get it; no picture, no word."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    assert _common.draw(tmp_path / "a.png", lambda figure: None) is False
    assert "it needs matplotlib" in " ".join(capsys.readouterr().err.split())
    assert _common.draw(None, lambda figure: None) is False
    assert capsys.readouterr().err == ""
