import pathlib

import pytest

from benchmarks import startup
from benchmarks.measuring import NotComparableError


def start_that_gives(cached, compiled):
  def start(cache):
    if cache == "off":
      return {"train/total": compiled}
    pathlib.Path(cache, "program").write_bytes(b"12345")
    return {"train/total": cached}

  return start


def test_a_row_tells_the_size_of_the_cache():
  row = startup.measure("UNet", start_that_gives(0.5, 0.5), rounds=1)
  assert row.details["cache_bytes"] == 5
  assert row.ratio > 0


def test_first_steps_that_differ_give_no_ratio():
  with pytest.raises(NotComparableError, match=r"UNet: .*0\.5.*0\.6"):
    startup.measure("UNet", start_that_gives(0.5, 0.6), rounds=1)
