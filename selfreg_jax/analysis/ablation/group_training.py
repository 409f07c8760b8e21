"""Trains the runs of a group in one program; each run's workdir is what `train.py` would have left."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn

import jax
from rich.console import Console

from selfreg_jax import config as configs
from selfreg_jax import mesh as meshes
from selfreg_jax import workdir as workdirs
from selfreg_jax.analysis.ablation import memory, records
from selfreg_jax.analysis.ablation.design import Run
from selfreg_jax.analysis.ablation.grouping import Group
from selfreg_jax.analysis.ablation.program import GroupProgram, build_run, with_raw_key, with_typed_key
from selfreg_jax.analysis.monitor import Monitor
from selfreg_jax.data import augment, pipeline
from selfreg_jax.errors import FaultError, UserError
from selfreg_jax.evaluation.inference import make_apply
from selfreg_jax.training import checkpoints
from selfreg_jax.training.checkpoints import CheckpointWriter
from selfreg_jax.training.feed import Feed
from selfreg_jax.training.logging import RunLogger
from selfreg_jax.training.loop import (
  MetricAccumulator,
  Saver,
  TrainingDivergedError,
  conclude,
  explain_failure,
  introduce,
  record_training,
)
from selfreg_jax.training.plan import Plan, make_plan
from selfreg_jax.training.signals import StopRequest, TrainingInterruptedError, stop_requests
from selfreg_jax.training.start import Start, begin
from selfreg_jax.training.step import StackedMetrics, TrainState
from selfreg_jax.training.validation import Validation, ValidationInterruptedError

FolderOf = Callable[[Run], pathlib.Path]
_MIB = 2**20


def train_group(
  group: Group,
  folder_of: FolderOf,
  *,
  devices: Sequence[jax.Device],
  memory_limit: int | None = None,
  console: Console,
) -> None:
  """Trains, or continues, the runs of a group, as many of them at once as fit into memory.

  All runs see the same batches; augmentation, initial weights and channel pairs follow each run's own seed. A run that
  stops early, or whose loss is no longer finite, is no more validated or saved (its place in the program computes on
  for nothing), and the others go on.

  Args:
    group: see `grouping.group_runs`; none of its runs is settled.
    folder_of: the workdir of a run.
    devices: of this process; the runs are dealt to them evenly.
    memory_limit: bytes that may be used on each device; None takes what is free.
    console: where to print.

  Raises:
    UserError: the config, the data or a workdir cannot be used, or not even one run fits into memory.
    TrainingInterruptedError: SIGTERM, SIGINT or SIGHUP came; the last step is finished and saved.
    FaultError: data could not be read, or a checkpoint not written.
  """
  for runs in resumable_parts(group.runs, folder_of):
    plans = _plans(runs, folder_of, devices[0])
    for program in _fitting_programs(runs, plans[0], devices, memory_limit, console):
      chosen = [plans[runs.index(run)] for run in program.group.runs]
      _train(program, chosen, [folder_of(run) for run in program.group.runs], console)


def resumable_parts(runs: Sequence[Run], folder_of: FolderOf) -> list[list[Run]]:
  """Deals runs into parts, each of which can go on from a step that all of its runs have a checkpoint of.

  Runs that have begun are one part where that costs none of them more than its newest checkpoint, as after a kill
  between the checkpoints of two runs. Else those whose newest steps are equal are a part each. Those that have not
  begun are a part of their own.
  """
  steps = {run.name: sorted(_steps(folder_of(run))) for run in runs}
  fresh = [run for run in runs if not steps[run.name]]
  begun = [run for run in runs if steps[run.name]]
  in_common = _in_common([steps[run.name] for run in begun])
  if in_common and all(in_common >= steps[run.name][-2:][0] for run in begun):
    together = [begun]
  else:
    newest = dict.fromkeys(steps[run.name][-1] for run in begun)
    together = [[run for run in begun if steps[run.name][-1] == step] for step in newest]
  return [part for part in (*together, fresh) if part]


def _in_common(steps: Sequence[Collection[int]]) -> int:
  """The newest step that all have a checkpoint of; 0 where there is none."""
  return max(set.intersection(*map(set, steps)), default=0) if steps else 0


def _steps(folder: pathlib.Path) -> set[int]:
  return {checkpoint.step for checkpoint in checkpoints.find(folder)}


def _plans(runs: Sequence[Run], folder_of: FolderOf, device: jax.Device) -> list[Plan]:
  """A plan for each run; the dataset, which is the same for all, is read and checked once."""
  first = make_plan(runs[0].config, folder_of(runs[0]), [device])
  return [dataclasses.replace(first, config=configs.with_absolute_paths(run.config)) for run in runs]


def _fitting_programs(
  runs: Sequence[Run],
  plan: Plan,
  devices: Sequence[jax.Device],
  memory_limit: int | None,
  console: Console,
) -> Iterator[GroupProgram]:
  """Compiled programs for all of the runs, as few as fit into memory one after another."""
  group = Group.of(runs)
  batch = plan.stream()[0] | {"tables": augment.ResizeTables.build(plan.dataset.shapes, plan.config.data.image_size)}
  shapes = jax.eval_shape(lambda: batch)

  @functools.cache
  def program(first: int, number: int) -> GroupProgram:
    start = time.monotonic()
    console.print(f"compiling one program for {number} run(s) ...", highlight=False)
    made = GroupProgram(group.part(first, number), plan, devices, shapes)
    needed = memory.needed_bytes(made.compiled)
    size = "" if needed is None else f", {needed / _MIB:.0f} MiB on each of {len(made.layout.devices)} device(s)"
    console.print(f"compiled in {time.monotonic() - start:.0f} s{size}", highlight=False)
    return made

  limit = memory_limit or memory.available_bytes(devices)
  most = -(-len(runs) // len(devices))
  at_once = most
  if limit is not None and memory.needed_bytes(program(0, len(runs)).compiled) is not None:
    at_once = memory.largest_fitting(
      most,
      limit,
      lambda number: memory.needed_bytes(program(0, min(number * len(devices), len(runs))).compiled),
    )
  if not at_once:
    needed = memory.needed_bytes(program(0, min(len(devices), len(runs))).compiled)
    given = f"--memory_gib allows {limit / _MIB:.0f} MiB" if memory_limit else f"{limit / _MIB:.0f} MiB are free"
    raise UserError(
      f"one run on a device takes {needed / _MIB:.0f} MiB, and {given}: the largest number that fits is 0; use a "
      "smaller config.run.data.batch_size, config.run.train.accumulate, config.run.model.remat=True"
      + (" or a larger --memory_gib" if memory_limit else "")
    )
  if at_once < most:
    console.print(f"{at_once} run(s) fit on a device at once, of {most}: they are trained in turns", highlight=False)
  for first in range(0, len(runs), at_once * len(devices)):
    yield program(first, min(at_once * len(devices), len(runs) - first))


class _Member:
  """One run of a group: its workdir, log, checkpoints and early stopping.

  Attributes:
    run: the run.
    plan: its plan.
    best: its best validation so far.
    logger: its log.
    active: whether it is still trained for something.
  """

  def __init__(self, run: Run, plan: Plan, folder: pathlib.Path, start: Start, logger: RunLogger, saver: Saver):
    self.run = run
    self.plan = plan
    self.best = start.best
    self.logger = logger
    self.active = True
    self._folder = folder
    self._saver = saver
    self._schedule = build_run(plan, plan.config)[2]
    self._record = records.read(folder, run.config)

  def record(self, steps: list[dict[str, float]], pace: dict[str, float], state: TrainState, done: int) -> None:
    """Writes metrics; raises TrainingDivergedError."""
    explain = functools.partial(explain_failure, self.plan)
    record_training(self.logger, steps, pace, state, done, self._schedule, explain)

  def validate(self, validation: Validation, state: TrainState, done: int, stop: Callable[[], bool]) -> None:
    """Validates and saves; raises ValidationInterruptedError where the group is to stop first."""
    val_dice = validation.run(self.logger, state, done, stop=stop)
    self.best.update(val_dice, done)
    self._saver.save(state, self.best, val_dice)

  def save(self, state: TrainState) -> None:
    """Saves a state that was not validated."""
    self._saver.save(state, self.best, None)

  def end(self, done: int, seconds: float, *, finished: bool = False, diverged: str = "") -> None:
    """Takes the run out of the group; what it has so far is on disk."""
    self._saver.finish()
    if finished:
      conclude(self.logger, self._folder, done)
    record = dataclasses.replace(
      self._record,
      steps=done,
      seconds=self._record.seconds + seconds,
      finished=finished,
      diverged=diverged,
      on_nonfinite=records.remedy(self.run.config),
    )
    records.write(self._folder, record)
    self.active = False


def _begin_together(
  runs: Sequence[Run], plans: Sequence[Plan], folders: Sequence[pathlib.Path], console: Console
) -> list[Start]:
  """Starts at the newest step that all runs have; what some of them have beyond it is made again."""
  while True:
    steps = [_steps(folder) for folder in folders]
    in_common = _in_common(steps)
    if any(steps) and not in_common:
      raise FaultError(
        f"{', '.join(run.name for run in runs)}: a damaged checkpoint was set aside, and now they have no step in "
        "common; run the same command again, and they go on apart"
      )
    for run, folder, saved in zip(runs, folders, steps, strict=True):
      if saved and max(saved) > in_common:
        console.print(
          f"{run.name}: goes back from step {max(saved)} to {in_common}, where the others of its group are",
          markup=False,
          highlight=False,
        )
        checkpoints.forget_after(folder, in_common)
    starts = []
    for plan, folder in zip(plans, folders, strict=True):
      model, optimizer, _ = build_run(plan, plan.config)
      start = begin(folder, plan, model, optimizer, override=False)
      # On the host: one device need not have room for the states of all.
      starts.append(dataclasses.replace(start, state=jax.device_get(with_raw_key(start.state))))
    if len({start.step for start in starts}) == 1:  # else a damaged checkpoint was set aside
      return starts


def _train(program: GroupProgram, plans: Sequence[Plan], folders: Sequence[pathlib.Path], console: Console) -> None:
  plan, layout = plans[0], program.layout
  runs = program.group.runs
  with contextlib.ExitStack() as stack:
    for folder in folders:
      stack.enter_context(workdirs.hold(folder))
    starts = _begin_together(runs, plans, folders, console)
    members = []
    for run, own, folder, start in zip(runs, plans, folders, starts, strict=True):
      own.config.init_from = start.init_from
      with workdirs.must_be_writable(folder):
        members.append(_enter(stack, run, own, folder, start))
    start_step = starts[0].step
    states = layout.stack([start.state for start in starts])
    del starts
    console.print(
      f"training {len(runs)} run(s) at once from step {start_step} to {plan.steps}: {', '.join(r.name for r in runs)}",
      highlight=False,
    )
    stop = stack.enter_context(stop_requests())
    feed = stack.enter_context(
      Feed(
        pipeline.iterate(
          plan.stream(), start_step, threads=plan.config.data.threads, prefetch=plan.config.data.prefetch
        ),
        functools.partial(meshes.replicate, mesh=layout.mesh),
        start_step=start_step,
        timeout=plan.config.data.timeout,
        describe=plan.case_names,
      )
    )
    _Loop(program, members, states, feed, stop, console).run(start_step)


def _enter(stack: contextlib.ExitStack, run: Run, plan: Plan, folder: pathlib.Path, start: Start) -> _Member:
  """Opens a run's workdir until the stack unwinds."""
  writer = stack.enter_context(CheckpointWriter(folder, plan.manifest.fingerprint()))
  workdirs.write_config(folder, plan.config)
  # The lines of many runs would drown each other on the screen; each has its own log.
  silent = Console(quiet=True, force_terminal=False)
  logger = stack.enter_context(
    RunLogger(folder, start_step=start.step, validated=start.best.validated, steps=plan.steps, console=silent)
  )
  introduce(logger, start.state, plan, start.step)
  for line in start.notes:
    logger.say(line)
  return _Member(run, plan, folder, start, logger, Saver(writer, logger, plan.config, plan.manifest))


class _Loop:
  """The training loop of a group: that of `training.loop`, for each of its runs."""

  def __init__(
    self,
    program: GroupProgram,
    members: Sequence[_Member],
    states: Any,
    feed: Feed,
    stop: StopRequest,
    console: Console,
  ):
    self._program = program
    self._members = members
    self._states = states
    self._feed = feed
    self._stop = stop
    self._console = console
    self._plan = plan = members[0].plan
    model = build_run(plan, plan.config)[0]
    self._validation = Validation(plan.config, plan.manifest, make_apply(model), plan.mesh)
    self._monitor = Monitor(plan.config, plan.manifest, model, plan.mesh)
    self._accumulator = MetricAccumulator(plan.config.data.batch_size, feed)
    self._start = time.monotonic()

  def run(self, start_step: int) -> None:
    """Trains from a step to the end, or until all runs have stopped early."""
    plan, config = self._plan, self._plan.config
    tables = augment.ResizeTables.build(plan.dataset.shapes, config.data.image_size)
    tables = meshes.replicate(tables, self._program.layout.mesh)
    numbers, done = self._program.numbers(), start_step
    try:
      if start_step and plan.validates_at(start_step):
        self._validate(start_step)  # of those that were stopped before it
      while done < plan.steps:
        if done % plan.validate_every == 0:
          self._stop_stale(done)
        if not any(member.active for member in self._members):
          return
        batch = self._feed.next() | {"tables": tables}
        self._states, metrics = self._program.compiled(numbers, self._states, batch)
        self._accumulator.add(metrics)
        done += 1
        stopping = bool(self._stop) and done < plan.steps
        validates = plan.validates_at(done)
        due = bool(config.train.checkpoint_every) and done % config.train.checkpoint_every == 0
        analyses = bool(config.train.analyze_every) and done % config.train.analyze_every == 0
        if validates or stopping or due or analyses or done % config.train.log_every == 0:
          self._record(done)
        if analyses and not stopping:
          for member, state in self._active():
            self._monitor.run(member.logger, state, done)
        if validates and not stopping:
          self._validate(done)
        elif due and not stopping:
          for member, state in self._active():
            member.save(state)
        if validates or due or analyses:
          self._accumulator.restart()
        if stopping:
          self._leave(done, start_step)
    except ValidationInterruptedError:
      self._leave(done, start_step)
    for member, _ in self._active():
      member.end(done, self._seconds(), finished=True)

  def _active(self) -> Iterator[tuple[_Member, TrainState]]:
    for place, member in enumerate(self._members):
      if member.active:
        yield member, with_typed_key(self._program.layout.take(self._states, place))

  def _seconds(self) -> float:
    """Of each run so far: they share the time."""
    return (time.monotonic() - self._start) / len(self._members)

  def _record(self, done: int) -> None:
    collected, pace = self._accumulator.take()
    # What a record looks at, without the weights.
    small = self._states.replace(params={}, batch_stats={}, opt_state=(), ema={})
    totals = []
    for place, member in enumerate(self._members):
      if not member.active:
        continue
      steps = [StackedMetrics(metrics.values[place], metrics.names).named() for metrics in collected]
      state = with_typed_key(self._program.layout.take(small, place))
      try:
        member.record(steps, pace, state, done)
        totals.append(steps[-1]["total"])
      except TrainingDivergedError as error:
        member.logger.say(str(error))
        self._console.print(f"{member.run.name}: {error}", markup=False, highlight=False)
        member.end(error.step, self._seconds(), diverged=str(error))
    if totals:
      spread = f"total {min(totals):.4f} to {max(totals):.4f} in {len(totals)} run(s)"
      pace_line = f"{pace['slices_per_second']:.1f} slices/s each"
      self._console.print(f"step {done}  {spread}  {pace_line}", markup=False, highlight=False)

  def _validate(self, done: int) -> None:
    """Validates those that have not been at this step."""
    for member, state in self._active():
      if member.best.validated < done:
        member.validate(self._validation, state, done, lambda: bool(self._stop))
    scores = {member.run.name: member.best.dice for member in self._members if member.active}
    best = ", ".join(f"{name} {dice:.4f}" for name, dice in scores.items() if dice is not None)
    self._console.print(f"step {done}  best validation Dice so far: {best}", markup=False, highlight=False)

  def _stop_stale(self, done: int) -> None:
    for member in self._members:
      if member.active and member.best.is_stale(done, self._plan.patience):
        member.logger.say(f"stopped  early: no better validation Dice for {self._plan.config.train.patience} epochs")
        member.end(done, self._seconds(), finished=True)

  def _leave(self, done: int, start_step: int) -> NoReturn:
    for member, state in self._active():
      if done > start_step and member.best.validated < done:
        member.save(state)
      member.end(done, self._seconds())
    raise TrainingInterruptedError(
      f"stopped by {self._stop.signal_name} after step {done}, which is saved; the same command continues"
    )
