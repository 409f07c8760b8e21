"""What a run tells: a live bar or plain lines, `train.log`, `metrics.jsonl`, TensorBoard events, curves and panels."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from selfreg_jax.errors import FaultError, UserError
from selfreg_jax.training.signals import TrainingInterruptedError

METRICS_FILE = "metrics.jsonl"
LOG_FILE = "train.log"
CURVES_FILE = "curves.png"
PANELS_FOLDER = "panels"
_SECONDS_BETWEEN_SIGNS_OF_LIFE = 5
_MOST_LEGEND_ENTRIES = 17  # more would hide the curves


class TensorBoardWriter:
  """TensorBoard event files without TensorFlow, with the method names of clu's writers.

  Every event is written at once, by the caller: the queue and the thread of tensorboardX's own writer hang for ever
  when the disk is full.
  """

  def __init__(self, directory: str | os.PathLike, *, purge_step: int | None = None):
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    self._events = EventsWriter(os.path.join(directory, "events"))
    if purge_step is not None:  # what was shown of later steps belongs to an interrupted run
      self._events.write_event(event_pb2.Event(step=purge_step, file_version="brain.Event:2"))
      started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._events.write_event(event_pb2.Event(step=purge_step, session_log=started))

  def _write(self, step: int, content: Any) -> None:
    self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=content))

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes named numbers."""
    for name, value in scalars.items():
      self._write(step, summary.scalar(name.replace(" ", "_"), value))  # TensorBoard allows no spaces

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes named (H, W, 3) uint8 pictures."""
    for name, image in images.items():
      self._write(step, summary.image(name, image, dataformats="HWC"))

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes the config as a table."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in hparams.items())
    self._write(0, summary.text("config", f"| field | value |\n|---|---|\n{rows}"))

  def flush(self) -> None:
    """Writes out what is buffered."""
    self._events.flush()

  def close(self) -> None:
    """Flushes and closes the file."""
    self._events.close()


class RunLogger:
  """Everything that a training run writes for people, under one workdir.

  Attributes:
    console: where lines go.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    start_step: int,
    validated: int,
    steps: int,
    console: Console | None = None,
  ):
    """Opens the files of a run.

    Args:
      workdir: the folder, which exists.
      start_step: that the run goes on from; what was recorded after it is forgotten.
      validated: step of the last validation that counts.
      steps: of the whole run.
      console: where lines go; None for standard output.
    """
    self.workdir = pathlib.Path(workdir)
    self.console = console or Console(highlight=False, soft_wrap=True)
    self._steps = steps
    self._log = (self.workdir / LOG_FILE).open("a")
    _drop_lines_after(self.workdir / METRICS_FILE, start_step, validated)
    self._metrics = (self.workdir / METRICS_FILE).open("a")
    self._board = TensorBoardWriter(self.workdir / "tensorboard", purge_step=start_step + 1 if start_step else None)
    self._warned = False
    self._last_sign = time.monotonic()
    self._progress = Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      MofNCompleteColumn(),
      TimeElapsedColumn(),
      TextColumn("left"),
      TimeRemainingColumn(),
      TextColumn("{task.fields[status]}"),
      console=self.console,
      transient=True,
      disable=not self.console.is_terminal,
    )
    self._task = self._progress.add_task("training", total=steps, completed=start_step, status="")

  def __enter__(self) -> "RunLogger":
    self._progress.start()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
    self._progress.stop()
    if error is not None:  # what the screen is told, for those who look later
      told = isinstance(error, UserError | FaultError | TrainingInterruptedError)
      self.note(str(error) if told else f"{kind.__name__}: {error}")
    for stream in (self._log, self._metrics, self._board):
      with self._tolerated():
        stream.close()

  @contextlib.contextmanager
  def _tolerated(self) -> Iterator[None]:
    """A journal that cannot be written (a full disk) is told once on the screen and stops no run: checkpoints do."""
    try:
      yield
    except OSError as error:
      if not self._warned:
        self._warned = True
        self.console.print(
          f"warning  {self.workdir}: logs, curves and panels cannot be written ({error.strerror}); training goes on",
          markup=False,
        )

  def say(self, text: str) -> None:
    """A line on the screen and in `train.log`."""
    self.console.print(text, markup=False)
    self.note(text)
    self._last_sign = time.monotonic()

  def note(self, text: str) -> None:
    """A line in `train.log` only."""
    with self._tolerated():
      self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
      self._log.flush()

  def advance(self, step: int) -> None:
    """Moves the bar to a step."""
    self._progress.update(self._task, completed=step, status="")
    self._sign_of_life(f"step {step}/{self._steps}")

  def alive(self, what: str) -> None:
    """Shows what the run is busy with besides training steps."""
    self._progress.update(self._task, status=what)
    self._sign_of_life(what)

  def _sign_of_life(self, text: str) -> None:
    """Without a terminal, and so without a bar: a line after a few seconds in which nothing else was said."""
    if not self.console.is_terminal and time.monotonic() - self._last_sign > _SECONDS_BETWEEN_SIGNS_OF_LIFE:
      self.say(text)

  def scalars(self, step: int, scalars: Mapping[str, float], line: str) -> None:
    """Records named numbers of a step, and says them in a line."""
    with self._tolerated():
      self._metrics.write(json.dumps({"step": step, **{name: _json(value) for name, value in scalars.items()}}) + "\n")
      self._metrics.flush()
      self._board.write_scalars(step, scalars)
      self._board.flush()
    self.say(line)

  def panel(self, step: int, picture: np.ndarray) -> None:
    """Writes an (H, W, 3) uint8 picture to `panels/` and to TensorBoard."""
    folder = self.workdir / PANELS_FOLDER
    with self._tolerated():
      folder.mkdir(exist_ok=True)
      Image.fromarray(picture).save(folder / f"step_{step:07d}.png")
      self._board.write_images(step, {"validation": picture})

  def hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes the config to TensorBoard."""
    with self._tolerated():
      self._board.write_hparams(hparams)

  def arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> pathlib.Path:
    """Writes named arrays as an .npz file for inspection; returns its path."""
    path = self.workdir / name
    with self._tolerated():
      temporary = path.with_name(f"partial.{name}")
      np.savez(temporary, **arrays)
      temporary.replace(path)
    return path

  def curves(self) -> None:
    """Draws `curves.png` from `metrics.jsonl`: losses, regularization terms, learning rate, validation Dice."""
    path = self.workdir / CURVES_FILE
    temporary = path.with_name("curves.partial.png")
    with self._tolerated():
      draw_curves(read_lines(self.workdir / METRICS_FILE)).savefig(temporary, dpi=110)
      temporary.replace(path)


class SilentLogger:
  """What the other processes of a run have for a `RunLogger`: the first one speaks for all."""

  def __init__(self, workdir: str | os.PathLike, *, start_step: int, validated: int, steps: int):
    del start_step, validated, steps
    print(f"process {jax.process_index()}: what happens is told by process 0 and in {workdir}/{LOG_FILE}", flush=True)

  def __enter__(self) -> "SilentLogger":
    return self

  def __exit__(self, *exception) -> None:
    pass

  def _nothing(self, *arguments: Any, **named: Any) -> None:
    del arguments, named

  say = note = advance = alive = scalars = panel = hparams = curves = _nothing


def draw_curves(lines: list[dict[str, Any]]) -> Figure:
  """Curves of a run.

  Args:
    lines: the objects of `metrics.jsonl`.

  Returns:
    A figure of four plots over the step.
  """
  plots = {
    "loss": ["train/total", "train/ce", "train/dice"],
    "self-regularization (unweighted)": ["train/scr", "train/ifd"],
    "learning rate": ["train/learning_rate"],
    "validation Dice": ["val/dice"],
  }
  # In the order of the classes; a dict keeps the first of equal names.
  classes = list(dict.fromkeys(name for line in lines for name in line if name.startswith("val/dice/")))
  figure = Figure(figsize=(11, 7))
  # Fixed margins: to lay it out, matplotlib would draw everything twice, and this is drawn after every validation.
  figure.subplots_adjust(left=0.065, right=0.985, bottom=0.07, top=0.955, wspace=0.15, hspace=0.27)
  for axes, (title, names) in zip(figure.subplots(2, 2).flat, plots.items(), strict=True):
    if title == "validation Dice":
      for name in classes:
        _plot(axes, lines, name, linewidth=0.8, alpha=0.6)
    for name in names:
      _plot(axes, lines, name, linewidth=1.8, color="black" if name == "val/dice" else None)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if 0 < len(axes.get_lines()) <= _MOST_LEGEND_ENTRIES:
      axes.legend(fontsize=7)
  return figure


def _plot(axes: Any, lines: list[dict[str, Any]], name: str, **style: Any) -> None:
  points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
  if points:
    steps, values = zip(*points, strict=True)
    label = name.split("/")[-1] if name != "val/dice" else "mean"
    axes.plot(steps, values, marker="." if len(points) < 40 else None, label=label, **style)


def _json(value: float) -> float | None:
  return float(value) if np.isfinite(value) else None


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The objects of a file of JSON lines; a line that was cut by a kill or a full disk is left out."""
  found = []
  for line in path.read_text().splitlines():
    with contextlib.suppress(ValueError):
      found.append(json.loads(line))
  return found


def _drop_lines_after(path: pathlib.Path, step: int, validated: int) -> None:
  """Forgets what an interrupted run recorded beyond its last checkpoint: those steps and validations are made again."""
  if not path.exists():
    return
  kept = [line for line in read_lines(path) if line["step"] <= (validated if "val/dice" in line else step)]
  temporary = path.with_name(path.name + ".partial")
  temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
  temporary.replace(path)
