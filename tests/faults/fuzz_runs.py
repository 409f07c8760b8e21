"""Runs commands on fuzzed inputs, in this process or in watched ones, and judges what they did and said."""

import contextlib
import dataclasses
import io
import math
import multiprocessing
import os
import pathlib
import queue
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback

import numpy as np
from rich.console import Console

from selfreg_jax.data import manifest, prepare
from selfreg_jax.errors import run_command
from tests.faults import fuzz_inputs

SECONDS = 30  # of processor time: the clock depends on what else the machine does
_PATIENCE = 4 * SECONDS  # by the clock, after which a process hangs
MOST_MIB = 4096
_ADDRESS_SPACE = 16 << 30  # keeps the machine alive where the check of memory is about to fail
_MESSAGE = re.compile(r"(error|warning): |  |prepared \d")  # how the lines that commands print to stderr begin


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of an input: "success", "refused" or what is wrong with how the command ended."""

  command: str
  kind: str
  what: str
  verdict: str
  said: str
  seconds: float
  peak_mib: float

  @property
  def wrong(self):
    return self.verdict not in ("success", "refused") or self.seconds > SECONDS or self.peak_mib > MOST_MIB


def run_prepare(one, folder):
  """Lays an input out in a new folder and prepares it; returns (exit code, what was said on stderr)."""
  arguments = fuzz_inputs.lay_out(one, folder)
  code, said = _captured(lambda: prepare.main([*arguments, f"--output={folder / 'out'}", "--workers=1"]))
  if code == 0:
    for case in manifest.load(folder / "out", verify=True).cases.values():
      if not np.isfinite(np.load(folder / "out" / case.image, mmap_mode="r", allow_pickle=False)).all():
        return 0, f"{said}\nvalues that are not finite"
  return code, said


def run_predict(one, folder, predictor):
  """Predicts a folder of this file and a healthy one, as `eval.py --input` does."""
  from selfreg_jax.evaluation import prediction

  source = folder / "raw"
  fuzz_inputs.write(source / one.name, one.content)
  healthy = {"nifti": ("nifti", "image", ".nii.gz"), "png": ("png", "image", ".png"), "tiff": ("tiff", "image", ".tif")}
  place = healthy[one.kind]
  fuzz_inputs.write(source / f"good{place[2]}", fuzz_inputs.healthy()[place][0])
  console = Console(file=io.StringIO(), width=200)
  code, said = _captured(
    lambda: run_command(
      lambda: prediction.predict_folder(predictor, source, folder / "out", probabilities=False, console=console)
    )
  )
  if not list((folder / "out").glob("good*")):
    return code, f"{said}\nthe healthy file was not predicted"
  return code, said


def run_load(one, folder):
  """Loads a prepared dataset whose file of this name is the input."""
  fuzz_inputs.lay_out_prepared(one, folder)
  return _captured(lambda: run_command(lambda: manifest.load(folder, verify=True)))


def _captured(command):
  """(exit code, stderr) of a command; None and the traceback where it raised.

  Of stderr, what C libraries write to the file descriptor is caught, too. The streams are as strict as a terminal's:
  not every text can be printed.
  """
  with tempfile.TemporaryFile() as file, _descriptor(2, file.fileno()):
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    errors = os.fdopen(os.dup(file.fileno()), "w", encoding="utf-8", errors="backslashreplace")
    with errors, contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
      try:
        code = command()
      except Exception:
        return None, traceback.format_exc()
    file.seek(0)
    return code, file.read().decode(errors="replace")


@contextlib.contextmanager
def _descriptor(number, other):
  """A file descriptor leads where another one does."""
  kept = os.dup(number)
  os.dup2(other, number)
  try:
    yield
  finally:
    os.dup2(kept, number)
    os.close(kept)


def judge(code, said, named):
  """Whether a command ended well: in success, or with exit code 2 and one error that names the file, or one of them."""
  strange = [line for line in said.splitlines() if line and not _MESSAGE.match(line)]
  if code not in (0, 2) or strange:
    return f"exit code {code}, {' | '.join(strange[-3:])}"
  errors = [line for line in said.splitlines() if line.startswith("error: ")]
  if len(errors) != (code == 2):
    return f"exit code {code} with {len(errors)} errors"
  if code == 2 and not any(name in said[said.index("error: ") :] for name in named):
    return "the error does not name the file"
  return "refused" if code == 2 else "success"


# Processes that do this, watched for how long they take, for the memory they take and for dying.


def _serve(connection, workdirs):
  """Works on the inputs that come through a pipe; the modules are imported, and the networks compiled, once."""
  import resource

  resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
  predictors = {}
  with tempfile.TemporaryDirectory(prefix="selfreg_jax_fuzz.") as base, open(os.devnull, "w") as nowhere:
    sys.stdout = nowhere
    connection.send("ready")
    while (task := connection.recv()) is not None:
      command, one = task
      folder, start = pathlib.Path(base, "input"), time.process_time()
      _reset_peak()
      if command == "prepare":
        code, said = run_prepare(one, folder)
      elif command == "load":
        code, said = run_load(one, folder)
      else:
        kind = "volume" if one.kind == "nifti" else "image"
        if kind not in predictors:
          predictors[kind] = _load_predictor(workdirs[kind])
        code, said = run_predict(one, folder, predictors[kind])
      seconds = time.process_time() - start
      connection.send((judge(code, said, one.named), said, seconds, _peak_mib()))
      shutil.rmtree(folder, ignore_errors=True)


def _load_predictor(workdir):
  from selfreg_jax import predictor

  return predictor.load(workdir)


def _reset_peak():
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def _peak_mib():
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


class _Worker:
  """A process that is started anew after it hung or died."""

  def __init__(self, workdirs):
    self._workdirs = workdirs
    self._process = None

  def run(self, command, one):
    """The outcome of one input."""
    if self._process is None:
      self._start()
    self._connection.send((command, one))
    try:
      if self._connection.poll(_PATIENCE):
        return Outcome(command, one.kind, one.what, *self._connection.recv())
      verdict = "hangs"
    except EOFError:
      self._process.join()
      verdict = f"died with exit code {self._process.exitcode}"
    self.stop()
    return Outcome(command, one.kind, one.what, verdict, "", math.nan, math.nan)

  def _start(self):
    context = multiprocessing.get_context("spawn")
    self._connection, other = context.Pipe()
    self._process = context.Process(target=_serve, args=(other, self._workdirs), daemon=True)
    self._process.start()
    other.close()
    self._connection.recv()

  def stop(self):
    if self._process is not None:
      self._process.kill()
      self._process.join()
      self._process = None


def run_all(tasks, workdirs, processes=2):
  """Runs (command, input) pairs in watched processes; the outcomes come in any order."""
  waiting, outcomes = queue.SimpleQueue(), []
  lock = threading.Lock()
  iterator = iter(tasks)

  def work():
    worker = _Worker(workdirs)
    try:
      while True:
        with lock:  # tasks are made one at a time: some bombs have many megabytes
          task = next(iterator, None)
        if task is None:
          return
        outcomes.append(worker.run(*task))
    except Exception as error:
      waiting.put(error)
    finally:
      worker.stop()

  threads = [threading.Thread(target=work) for _ in range(processes)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if not waiting.empty():
    raise waiting.get()
  return outcomes


def table(outcomes):
  """The outcomes of each command and kind in a table of Markdown."""
  lines = ["| command | kind | inputs | success | refused | longest (processor) | peak memory |", "|" + " --- |" * 7]
  for command, kind in dict.fromkeys((outcome.command, outcome.kind) for outcome in sorted(outcomes, key=_order)):
    some = [outcome for outcome in outcomes if (outcome.command, outcome.kind) == (command, kind)]
    counts = [sum(outcome.verdict == verdict for outcome in some) for verdict in ("success", "refused")]
    seconds, peak = max(outcome.seconds for outcome in some), max(outcome.peak_mib for outcome in some)
    lines.append(f"| {command} | {kind} | {len(some)} | {counts[0]} | {counts[1]} | {seconds:.1f} s | {peak:.0f} MiB |")
  return "\n".join(lines)


def _order(outcome):
  return outcome.command, outcome.kind
