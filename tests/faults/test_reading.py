"""Data that cannot be read in the middle of a run: by an error, and never at all."""

import time

import pytest

from selfreg_jax.data import pipeline
from selfreg_jax.errors import FaultError
from selfreg_jax.training import loop
from tests.faults import harness

FIELDS = {"data__timeout": 5.0, "train__steps": 30, "train__validate_every": 30}
# Reading fails or hangs from this slice of the stream on; each process starts with it, before train.py.
BREAK = """
import runpy, sys, time
from selfreg_jax.data import pipeline
read = pipeline.SliceDataset.read
def breaking(self, position, record):
  if position >= 100:
    {fault}
  return read(self, position, record)
pipeline.SliceDataset.read = breaking
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FAULTS = {"error": "raise OSError(5, 'Input/output error')", "hang": "time.sleep(3600)"}


@pytest.mark.parametrize("threads", [0, 4])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_breaks(prepared, tmp_path, fault, threads):
  program = tmp_path / "broken.py"
  program.write_text(BREAK.format(fault=FAULTS[fault]))
  flags = harness.train_flags(prepared, tmp_path / "run", data__threads=threads, **FIELDS)
  run = harness.Run(program, str(harness.ROOT / "train.py"), *flags, log=tmp_path / "log.txt")
  # 100 slices are 12 whole batches and half of one.
  assert run.until(lambda: harness.last_step(tmp_path / "run") >= 12)
  start = time.monotonic()
  what = {"error": "could not be read (OSError: [Errno 5] Input/output error)", "hang": "config.data.timeout"}[fault]
  run.check_clear(1, "the batch of step 12", what, "its cases: ")
  seconds = time.monotonic() - start
  print(f"\n{fault}, {threads} threads: the process was gone {seconds:.1f} s after its last step")
  assert harness.steps_saved(tmp_path / "run")[-1] == 12
  harness.train_whole(prepared, tmp_path / "run", tmp_path / "again.txt", **FIELDS)
  assert harness.resumptions(tmp_path / "run") == [12]


def test_a_hanging_read_does_not_outlast_the_timeout(prepared, tmp_path, monkeypatch):
  config = harness.make_config(prepared, **FIELDS | {"data__timeout": 2.0})
  read = pipeline.SliceDataset.read

  def hanging(self, position, record):
    if position >= 40:
      time.sleep(60)
    return read(self, position, record)

  monkeypatch.setattr(pipeline.SliceDataset, "read", hanging)
  with pytest.raises(FaultError, match="the batch of step 5 has taken more than 2 s"):
    loop.train_and_evaluate(config, tmp_path)
