"""Seconds from a volume to its class map through the paper's UNet: `SlicePredictor` against slice by slice in PyTorch.

The other side is what published code does: cubic zoom of one slice by scipy, forward pass of one slice, argmax, nearest
zoom of the classes back. Its zooms keep the last line, which scipy's default loses at some sizes; that costs nothing.
The forward pass alone is compared with PyTorch's eager one and with that through torch.compile; the faster counts.
Both networks hold the same weights. On a GPU both compute in bfloat16 (PyTorch by autocast). Equal: the class maps, in
all but 1e-4 of the voxels (ties of the argmax), in bfloat16 in all but 2 %.

python -m benchmarks.volume_inference [--short] [--json] [--slices=30,75,150] [--rounds=3]
"""

import argparse
import functools
import multiprocessing
from typing import Any

import jax
import numpy as np
from scipy import ndimage

import selfreg_jax as sr
from benchmarks import made_data, measuring
from benchmarks.measuring import NotComparableError
from selfreg_jax import mesh as meshes
from selfreg_jax.evaluation.inference import SlicePredictor, make_apply

_CLASSES = 9
_BATCH = 24  # the config's default for evaluation
_MOST_DIFFERING = {"float32": 1e-4, "bfloat16": 0.02}
_LOGITS = {"float32": 2e-3, "bfloat16": 0.1}  # largest difference, relative to the largest logit
_TARGETS = {"cpu": 0.95, "gpu": 0.7}
_SCALE = 1 / 65535


def dtype() -> str:
  """What both sides compute in: float32 on a CPU, bfloat16 elsewhere."""
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def make_network(widths: tuple[int, ...]) -> Any:
  """PyTorch's UNet for evaluation, with weights under which the classes differ from pixel to pixel."""
  import torch

  from benchmarks import torch_models

  torch.manual_seed(0)
  network = torch_models.UNet(_CLASSES, widths=widths).eval()
  for module in network.modules():
    if isinstance(module, torch.nn.Conv2d):
      torch.nn.init.kaiming_normal_(module.weight)
  return network.to(torch_models.device(), memory_format=torch.channels_last)


class Ours:
  """This package's prediction.

  Args:
    network: whose weights to take.
    widths: of the network.
    size: pixels a side that it sees.
  """

  def __init__(self, network: Any, widths: tuple[int, ...], size: int):
    model = sr.UNet(num_classes=_CLASSES, widths=widths, dtype=dtype())
    weights = {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}
    mesh = meshes.make_mesh(jax.devices()[:1])
    variables = jax.device_put(sr.from_pytorch(weights, model), meshes.replicated(mesh))
    self.forward = functools.partial(make_apply(model), variables)
    self._predictor = SlicePredictor(size, _BATCH, mesh)

  def __call__(self, slices: np.ndarray) -> np.ndarray:
    """(S, rows, columns, 1) stored values -> (S, rows, columns) uint8 classes."""
    return self._predictor.classes(self.forward, slices, scale=_SCALE)


class Theirs:
  """Prediction slice by slice in PyTorch.

  Args:
    network: in evaluation mode.
    size: pixels a side that it sees.
    compiled: through torch.compile.
  """

  def __init__(self, network: Any, size: int, *, compiled: bool = False):
    import torch

    self._network = torch.compile(network) if compiled else network
    self._size = size

  def forward(self, images: np.ndarray) -> Any:
    """(B, size, size, 1) float32 -> logits (B, classes, size, size), a tensor on the device."""
    import torch

    from benchmarks import torch_models

    device = torch_models.device()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype() == "bfloat16")
    with torch.inference_mode(), autocast:
      batch = torch.from_numpy(np.moveaxis(images, -1, 1)).to(device)
      logits, _ = self._network(batch.contiguous(memory_format=torch.channels_last))
      if logits.is_cuda:
        torch.cuda.synchronize()
      return logits

  def __call__(self, slices: np.ndarray) -> np.ndarray:
    """(S, rows, columns, 1) stored values -> (S, rows, columns) uint8 classes."""
    classes = np.empty(slices.shape[:3], np.uint8)
    rows, columns = slices.shape[1:3]
    for index, stored in enumerate(slices[..., 0]):
      image = stored.astype(np.float32) * np.float32(_SCALE)
      image = ndimage.zoom(image, (self._size / rows, self._size / columns), order=3, mode="mirror")
      found = self.forward(image[None, ..., None])[0].argmax(dim=0).to("cpu").numpy().astype(np.uint8)
      classes[index] = ndimage.zoom(found, (rows / self._size, columns / self._size), order=0, mode="nearest")
    return classes


def require_equal_maps(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Compares two class maps.

  Args:
    ours: (S, rows, columns).
    theirs: likewise.

  Returns:
    The share of voxels that differ.

  Raises:
    NotComparableError: too many do, or there is one class only.
  """
  share = float(np.mean(ours != theirs))
  allowed = _MOST_DIFFERING[dtype()]
  if share > allowed:
    raise NotComparableError(f"class maps: a share of {share:.2g} of the voxels differs, {allowed} is allowed")
  if len(np.unique(theirs)) < 2:
    raise NotComparableError("class maps: they hold one class only, so that their being equal shows nothing")
  return share


def peak_memory(side: str, count: int, shape: tuple[int, int], widths: tuple[int, ...], size: int) -> float:
  """Memory that predicting a volume takes beyond the loaded networks and the volume, in a process of its own, in MiB.

  Args:
    side: "ours" or "other".
    count: slices of the volume.
    shape: (rows, columns).
    widths: of the network.
    size: pixels a side that it sees.

  Returns:
    The resident memory at its highest, less what it was before.
  """
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    return pool.apply(_peak_memory, (side, count, shape, widths, size))


def _peak_memory(side: str, count: int, shape: tuple[int, int], widths: tuple[int, ...], size: int) -> float:
  slices, _ = made_data.slices(count, shape, 1, "uint16", 0)
  network = make_network(widths)
  predict = Ours(network, widths, size) if side == "ours" else Theirs(network, size)
  return measuring.peak_growth(lambda: predict(slices))


def _options() -> argparse.Namespace:
  parser = measuring.parser(__doc__)
  parser.add_argument(
    "--slices",
    type=lambda text: tuple(map(measuring.positive, text.split(","))),
    help="of the volumes, small to large; 30,75,150, or 8,30 with --short",
  )
  parser.add_argument("--rounds", type=measuring.positive, default=3, help="timed runs of each side")
  options = parser.parse_args()
  measuring.require("torch")
  return options


def _forward_row(ours: Ours, network: Any, size: int, options: argparse.Namespace, notes: list[str]) -> measuring.Row:
  """A batch through the network alone, against the faster of PyTorch's two ways."""
  images = np.random.default_rng(0).random((_BATCH, size, size, 1), np.float32)
  name = f"forward pass alone, {_BATCH} slices"
  sides = {"ours": lambda: jax.block_until_ready(ours.forward(images))}
  for way in ("eager",) if options.short else ("eager", "torch.compile"):
    theirs = Theirs(network, size, compiled=way != "eager")
    try:
      logits = np.moveaxis(theirs.forward(images).float().cpu().numpy(), 1, -1)
    except Exception as error:
      if way == "eager":
        raise
      notes.append(measuring.without_compiler(name, error))
      continue
    measuring.require_equal(f"{name} ({way})", ours.forward(images), logits, rtol=_LOGITS[dtype()])
    sides[way] = functools.partial(theirs.forward, images)
  timings = measuring.alternate(sides, rounds=options.rounds)
  mine = timings.pop("ours")
  way = min(timings, key=lambda way: timings[way].median)
  target = None if options.short else _TARGETS.get(jax.default_backend())
  others = {way: timing.to_json() for way, timing in timings.items()}
  return measuring.timed_row(f"{name} ({way})", mine, timings[way], target=target, all_pytorch=others)


def main() -> None:
  """Measures and prints."""
  options = _options()
  widths, size, shape = (64, 128, 256, 512, 512), 224, (512, 512)
  if options.short:
    widths, size, shape = (8, 16, 16), 64, (128, 128)
  counts = options.slices or ((8, 30) if options.short else (30, 75, 150))
  network = make_network(widths)
  ours, theirs = Ours(network, widths, size), Theirs(network, size)
  volume, _ = made_data.slices(counts[-1], shape, 1, "uint16", 0)

  differing = require_equal_maps(ours(volume[: counts[0]]), theirs(volume[: counts[0]]))
  notes: list[str] = []
  rows = [_forward_row(ours, network, size, options, notes)]
  for count in counts:
    part = volume[:count]
    sides = {"ours": functools.partial(ours, part), "other": functools.partial(theirs, part)}
    timings = measuring.alternate(sides, rounds=options.rounds, warmup=0)
    name = f"{count} slices of {shape[0]}x{shape[1]}"
    rows.append(measuring.timed_row(name, timings["ours"], timings["other"]))
  for count in sorted({counts[0], counts[-1]}):
    memory = {side: peak_memory(side, count, shape, widths, size) for side in ("ours", "other")}
    rows.append(measuring.Row(f"peak memory, {count} slices", memory["ours"], memory["other"], unit="MiB"))
  measuring.present(
    "A volume through the paper's UNet" if not options.short else "A volume through a narrow UNet",
    rows,
    as_json=options.json,
    short=options.short,
    device=measuring.device_kind(),
    other="PyTorch, slice by slice",
    notes=[
      *notes,
      f"Share of voxels whose class differs: {differing:.2g}. Ours in batches of {_BATCH}.",
      "Memory: of the host, beyond networks and volume, the programs that are compiled included.",
    ],
  )


if __name__ == "__main__":
  measuring.run(main)
