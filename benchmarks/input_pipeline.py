"""Slices a second from files to augmented batches, and the share of training that is spent waiting for them.

Ours: memory maps, Grain, `Feed` and the jitted augmentation on the device, as the training loop runs them. The other
one: a .npz file a slice, scipy's rotations and zooms, PyTorch's DataLoader with a worker process for each core. Both
begin every timed run with empty queues, on made-up slices of 512x512 (CT) and 522x775 (RGB, histology). Equal: for the
same draws, images to 1e-4 and labels to the pixel, but on the line that scipy's zoom loses and, after a rotation, near
the pixels whose source lies on an edge between two others.

python -m benchmarks.input_pipeline [--short] [--json]
"""

import contextlib
import functools
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import made_data, measuring
from benchmarks.measuring import NotComparableError
from selfreg_jax import mesh as meshes
from selfreg_jax.config import base_config
from selfreg_jax.data import augment, conversion, pipeline
from selfreg_jax.data.manifest import Manifest
from selfreg_jax.training import loop
from selfreg_jax.training.feed import Feed
from selfreg_jax.training.step import named_key

_TARGET = 10.0
_MOST_WAITING = 0.02


class Ours:
  """Batches as training makes them.

  Args:
    directory: of the prepared dataset.
    manifest: its manifest.
    size: pixels a side of the augmented slices.
    batch_size: slices.
  """

  def __init__(self, directory: str, manifest: Manifest, *, size: int, batch_size: int):
    config = base_config()
    config.data.image_size, config.data.batch_size = size, batch_size
    self._read = {"threads": config.data.threads, "prefetch": config.data.prefetch}
    self._dataset = pipeline.SliceDataset(directory, manifest)
    self._sampling = pipeline.Sampling(batch_size, seed=0)
    self._mesh = meshes.make_mesh(jax.devices()[:1])
    self._tables = meshes.replicate(augment.ResizeTables.build(self._dataset.shapes, size), self._mesh)
    self._key = named_key(jax.random.key(0), "input")
    self._augment = meshes.jit_for(self._mesh, loop.make_input_fn(config, manifest.scale))

  def __call__(self, batches: int) -> None:
    """Makes so many batches and reads no further, the queues being empty at first."""
    stream = pipeline.batches(self._dataset, self._sampling)[:batches]
    with Feed(
      pipeline.iterate(stream, 0, **self._read),
      functools.partial(meshes.place_batch, mesh=self._mesh),
      start_step=0,
      timeout=60.0,
      describe=str,
    ) as feed:
      for _ in range(batches):
        jax.block_until_ready(self._augment(self._key, feed.next() | {"tables": self._tables}))


def write_slices(directory: str, manifest: Manifest, folder: str) -> list[str]:
  """Writes the training slices as the other side reads them; returns the files."""
  files = []
  for case in manifest.split("train"):
    arrays = (np.load(pathlib.Path(directory, name)) for name in (case.image, case.label))
    for number, (image, label) in enumerate(zip(*arrays, strict=True)):
      image = image.astype(np.float32) * np.float32(manifest.scale)
      files.append(os.path.join(folder, f"{case.id}_{number:03d}.npz"))
      np.savez(files[-1], image=image[..., 0] if manifest.channels == 1 else image, label=label)
  return files


def require_equal_slices(name: str, files: list[str], *, size: int) -> None:
  """Augments some slices on both sides with the same draws and compares.

  Args:
    name: of what is compared.
    files: of the other side; the first ones are taken.
    size: pixels a side.

  Raises:
    NotComparableError: they differ.
  """
  from benchmarks import torch_data

  chosen = files[:8]
  loaded = [dict(np.load(file)) for file in chosen]
  images = np.stack([arrays["image"].reshape(*arrays["label"].shape, -1) for arrays in loaded])
  labels = np.stack([arrays["label"] for arrays in loaded])
  keys = jax.random.split(jax.random.key(1), len(chosen))
  recipe = augment.Augmentation()
  tables = augment.ResizeTables.build([labels.shape[1:]], size)
  index = np.zeros(len(chosen), np.int32)
  ours = jax.jit(functools.partial(augment.augment, scale=1.0, augmentation=recipe))(
    keys, images, labels, index, tables
  )
  draws = jax.tree.map(np.asarray, augment.draw(keys, recipe))
  for i, arrays in enumerate(loaded):
    pair = arrays["image"], arrays["label"]
    if draws.flip_rows[i] or draws.flip_columns[i]:
      pair = torch_data.turn(*pair, quarter_turns=draws.quarter_turns[i], axis=int(draws.flip_columns[i]))
    elif draws.angle[i]:
      pair = torch_data.rotate(*pair, angle=draws.angle[i])
    image, label = torch_data.resize(*pair, size)
    differing = np.abs(np.asarray(ours[0][i]) - image.reshape(size, size, -1))[:-1, :-1] > 1e-4
    shares = float(differing.mean()), float(np.mean((np.asarray(ours[1][i]) != label)[:-1, :-1]))
    allowed = (0.02, 1e-3) if draws.angle[i] else (0.0, 0.0)
    if any(share > most for share, most in zip(shares, allowed, strict=True)):
      raise NotComparableError(f"{name}: shares {shares} of pixels of slice {i} differ in image and label")


def measure(
  name: str, *, shape: tuple[int, int], channels: int, size: int, batch_size: int, batches: int, rounds: int
) -> measuring.Row:
  """Compares both sides on made-up slices of one kind.

  Args:
    name: of the row.
    shape: native (rows, columns).
    channels: 1 or 3.
    size: pixels a side after the resize.
    batch_size: slices.
    batches: of a timed run.
    rounds: timed runs of each side.

  Returns:
    The row: slices a second and core.
  """
  from benchmarks import torch_data

  with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as folder:
    manifest = made_data.write_dataset(
      directory, cases=3, count=batches * batch_size // 2, shape=shape, channels=channels
    )
    files = write_slices(directory, manifest, folder)
    require_equal_slices(name, files, size=size)
    ours = Ours(directory, manifest, size=size, batch_size=batch_size)
    loader = torch_data.loader(files, size=size, batch_size=batch_size, workers=conversion.cpus())
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: ours(batches), "other": lambda: [None for _ in loader]}
    timings = measuring.alternate(sides, rounds=rounds)
  slices = batches * batch_size
  rates = {side: slices / conversion.cpus() / timing.median for side, timing in timings.items()}
  bounds = (sorted(slices / conversion.cpus() / seconds for seconds in timing.quartiles) for timing in timings.values())
  return measuring.Row(
    name,
    rates["ours"],
    rates["other"],
    unit="slices/s/core",
    spread="; ".join(f"{low:.4g}..{high:.4g}" for low, high in bounds),
    target=_TARGET,
    higher_is_better=True,
    details={side: timing.to_json() for side, timing in timings.items()},
  )


def waiting_share(*, short: bool) -> measuring.Row:
  """Trains the paper's UNet on slices of 512x512 for some steps and reads what was recorded."""
  shape = (64, 64) if short else (512, 512)
  # While the step is compiled, batches are read ahead: few here, and used up before the last half is measured.
  steps = 16
  with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as workdir:
    made_data.write_dataset(directory, cases=5, count=8, shape=shape)
    config = base_config()
    config.data.dir, config.data.batch_size = directory, 4
    config.train.steps, config.train.log_every = steps, steps // 2
    config.data.prefetch = 1
    if short:
      config.data.image_size, config.model.widths = 32, (8, 8, 8)
    with contextlib.redirect_stdout(sys.stderr):
      loop.train_and_evaluate(config, workdir, devices=jax.devices()[:1])
    lines = [json.loads(line) for line in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]
  shares = [line["train/waiting_for_data"] for line in lines if "train/waiting_for_data" in line]
  return measuring.Row(
    "training: share of time waiting for data",
    shares[-1],
    unit="",
    target=_MOST_WAITING,
    target_of_ours=True,
    details={"shares": shares},
  )


def main() -> None:
  """Measures and prints."""
  options = measuring.parser(__doc__).parse_args()
  measuring.require("torch")
  amount = {"batch_size": 24, "batches": 10, "rounds": 5}
  kinds = {
    "CT, 512x512 to 224x224": {"shape": (512, 512), "channels": 1, "size": 224},
    "RGB, 522x775 to 224x224": {"shape": (522, 775), "channels": 3, "size": 224},
  }
  if options.short:
    amount = {"batch_size": 4, "batches": 2, "rounds": 3}
    kinds = {"CT, 128x128 to 64x64": {"shape": (128, 128), "channels": 1, "size": 64}}
  rows = [measure(name, **kind, **amount) for name, kind in kinds.items()]
  rows.append(waiting_share(short=options.short))
  measuring.present(
    "Input pipeline, augmentation included",
    rows,
    as_json=options.json,
    short=options.short,
    device=measuring.device_kind(),
    other="npz + scipy + DataLoader",
    notes=[f"Batches of {amount['batch_size']}; {conversion.cpus()} worker processes on the other side."],
  )


if __name__ == "__main__":
  measuring.run(main)
