import argparse
import json
import os

import numpy as np
import pytest

from benchmarks import measuring
from benchmarks.measuring import NotComparableError, Row, Timing


def test_sides_take_turns_in_changing_order():
  calls = []
  sides = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
  timings = measuring.alternate(sides, rounds=3, warmup=1)
  assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
  assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_a_spent_budget_ends_the_rounds_but_leaves_three():
  timings = measuring.alternate({"a": lambda: None}, rounds=50, budget=0.0)
  assert len(timings["a"].seconds) == 3


def test_what_differs_is_refused():
  theirs = np.asarray([1.0, -200.0])
  measuring.require_equal("sums", theirs + 0.19, theirs, rtol=1e-3)
  with pytest.raises(NotComparableError, match=r"sums: the two sides differ by 0\.21"):
    measuring.require_equal("sums", theirs + 0.21, theirs, rtol=1e-3)
  with pytest.raises(NotComparableError, match="shapes"):
    measuring.require_equal("sums", theirs[:1], theirs, rtol=1e-3)
  with pytest.raises(NotComparableError, match="nan"):
    measuring.require_equal("sums", theirs * np.nan, theirs, rtol=1e-3)


def test_an_error_of_comparison_is_one_line_and_exit_code_1(capsys):
  def main():
    raise NotComparableError("loss: the two sides differ")

  with pytest.raises(SystemExit) as stopped:
    measuring.run(main)
  assert stopped.value.code == 1
  assert capsys.readouterr().err == "error: not comparable, so no ratio is given: loss: the two sides differ\n"


def test_rows_as_json(capsys):
  rows = [
    measuring.timed_row("step", Timing((1.0, 3.0, 2.0)), Timing((4.0, 4.0, 4.0)), target=1.25, batch_size=4),
    Row("memory", 10.0, unit="MiB"),
  ]
  measuring.present("Step", rows, as_json=True, other="PyTorch", notes=["a note"])
  content = json.loads(capsys.readouterr().out)
  step, memory = content["rows"]
  assert (step["ours"], step["other"], step["ratio"], step["target"]) == (2.0, 4.0, 0.5, 1.25)
  assert step["ratios"] == [0.25, 0.75, 0.5]
  assert step["details"]["ours"] == {"median": 2.0, "quartiles": [1.5, 2.5], "seconds": [1.0, 3.0, 2.0]}
  assert step["details"]["ratio_quartiles"] == [0.375, 0.625]  # of 1/4, 3/4 and 2/4: round by round
  assert step["details"]["batch_size"] == 4
  assert memory["ratio"] is None
  assert memory["unit"] == "MiB"
  assert content["other"] == "PyTorch"
  assert content["notes"] == ["a note"]
  assert content["machine"]["cores"] >= 1


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be set back here")
def test_the_peak_of_a_call_is_counted_from_its_begin():
  def fill(mib):
    np.ones(mib * 2**17)  # float64; freed at once, so that only the peak tells of it

  assert 60 < measuring.peak_growth(lambda: fill(64)) < 80
  assert measuring.peak_growth(lambda: fill(16)) < 30


def test_the_ratio_is_that_of_the_rounds_and_lies_between_its_quartiles():
  """The machine slows down to a fifth after the first round, between the two sides of the second one."""
  row = measuring.timed_row("step", Timing((1.0, 1.0, 5.0, 5.0, 5.0)), Timing((2.0, 10.0, 10.0, 10.0, 10.0)))
  assert row.ratio == 0.5
  low, high = row.details["ratio_quartiles"]
  assert low <= row.ratio <= high


def test_what_else_the_machine_does_is_seen(monkeypatch):
  reads = iter(["cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1", "cpu  160 0 90 880 70 0 0 0 0 0\ncpu0 1"])
  monkeypatch.setattr(measuring.pathlib.Path, "read_text", lambda path: next(reads))
  monkeypatch.setattr(measuring.time, "sleep", lambda seconds: None)
  assert measuring.busy_share() == pytest.approx(0.5)  # 100 of 200 ticks


def test_a_missing_package_ends_the_command_before_it_computes(capsys):
  measuring.require("numpy")
  with pytest.raises(SystemExit) as stopped:
    measuring.require("numpy", "no_such_package")
  assert stopped.value.code == 2
  assert "no_such_package not installed: pip install -r benchmarks/requirements.txt" in capsys.readouterr().err


def test_short_forms_and_busy_machines_are_told(capsys, monkeypatch):
  row = measuring.timed_row("step", Timing((1.0,)), Timing((2.0,)), target=1.25)
  for share, busy in ((0.0, False), (0.9, True)):
    monkeypatch.setattr(measuring, "_busy_before", share)
    measuring.present("Step", [row], as_json=True, short=busy)
    content = json.loads(capsys.readouterr().out)
    assert content["short"] == busy
    assert content["rows"][0]["target"] == (None if busy else 1.25)
    assert ["BUSY" in note for note in content["notes"]] == ([False, True] if busy else [])


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_numbers_of_rounds_are_whole_and_positive(text):
  assert measuring.positive("3") == 3
  with pytest.raises(argparse.ArgumentTypeError, match=text):
    measuring.positive(text)


def test_rows_as_a_table(capsys):
  rows = [Row("SCR", 2.5, 5.0, unit="% added", target=3.0, target_of_ours=True)]
  measuring.present("Added", rows, as_json=False)
  output = capsys.readouterr().out
  assert "0.500" in output
  assert "ours <= 3" in output


@pytest.mark.parametrize("network", ["unet", "swin_unet"])
def test_both_sides_take_the_same_step(network):
  pytest.importorskip("torch", reason="PyTorch is installed by `make bench` only")
  from benchmarks import steps

  setting = steps.Setting(network, "selfreg", batch_size=2, short=True)
  steps.require_equal_steps(steps.Ours(setting), steps.Theirs(setting))
  other = steps.Theirs(setting)
  other.config.loss.ifd_weight = 0.0
  with pytest.raises(NotComparableError, match="total"):
    steps.require_equal_steps(steps.Ours(setting), other)
