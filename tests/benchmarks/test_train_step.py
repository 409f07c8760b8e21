import pytest

from benchmarks import train_step
from benchmarks.measuring import Timing
from benchmarks.regularization_cost import added_percent
from benchmarks.steps import Setting


def test_the_faster_of_pytorchs_ways_counts():
  timings = {"ours": Timing((2.0, 2.0, 3.0)), "eager": Timing((4.0, 4.0, 4.0)), "compiled": Timing((1.0, 1.0, 1.0))}
  facts = {"compile_seconds": 9.0, "operations": 8e9}
  step, throughput, arithmetic, compilation = train_step._time_rows(Setting("unet"), timings, facts, rate=16e9)
  assert (step.name, step.ours, step.other, step.ratio) == ("unet baseline: step (compiled)", 2.0, 1.0, 2.0)
  assert step.details["all_pytorch"]["eager"]["median"] == 4.0
  assert (throughput.ours, throughput.other, throughput.ratio) == (2.0, 4.0, 0.5)  # batches of 4
  assert throughput.higher_is_better
  assert (arithmetic.ours, arithmetic.spread) == (4.0, "25% of XLA's large matmul: 16")
  assert compilation.ours == 9.0


def test_a_short_form_has_no_target():
  timings = {"ours": Timing((2.0,)), "eager": Timing((4.0,))}
  facts = {"compile_seconds": 9.0, "operations": 8e9}
  for short, target in ((True, None), (False, train_step.TIME_TARGETS["cpu"]["unet"])):
    assert train_step._time_rows(Setting("unet", short=short), dict(timings), facts, rate=1e9)[0].target == target


def test_what_a_term_adds_is_taken_round_by_round():
  """A machine that slows down by half between two rounds changes nothing."""
  added = added_percent(Timing((1.1, 2.2, 3.3)), Timing((1.0, 2.0, 3.0)))
  assert added.seconds == pytest.approx((10, 10, 10))
