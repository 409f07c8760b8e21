"""A training step of the paper's networks on both sides, from the same weights and on the same batch.

Ours is the step that training compiles (`make_train_step` through `mesh.jit_for`, the state donated), without
augmentation; theirs is plain PyTorch. Forward pass, loss, backward pass and SGD with momentum and weight decay.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import selfreg_jax as sr
from benchmarks import measuring
from benchmarks.measuring import require_equal
from selfreg_jax import losses
from selfreg_jax import mesh as meshes
from selfreg_jax.config import base_config, select_terms
from selfreg_jax.features import COLLECTION, Features
from selfreg_jax.models.factory import build_model, initial_variables
from selfreg_jax.models.swin_unet import DropPath
from selfreg_jax.training import optimizer as optimizers
from selfreg_jax.training.step import TrainState, create_state, make_loss, make_train_step, named_key

NETWORKS = ("unet", "swin_unet")
CLASSES = 9
RATE = 0.01
_STEPS = 10**6  # of the learning rate's schedule, so long that the rate stands still


def parse_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
  """The command's flags, with those of all benchmarks of steps: which networks, batch size, rounds.

  Args:
    parser: of `measuring.parser`, with the benchmark's own flags.

  Returns:
    The flags; defaults that depend on the device or on --short are filled in, `networks` holds names.
  """
  parser.add_argument("--network", choices=("both", *NETWORKS), default="both")
  parser.add_argument("--batch_size", type=measuring.positive, help="slices of a batch; 4 on a CPU, 24 on a GPU")
  parser.add_argument("--rounds", type=measuring.positive, help="timed steps of each side; 9, or 3 with --short")
  parser.add_argument("--budget", type=float, default=900.0, help="seconds of turns; three rounds at least")
  flags = parser.parse_args()
  measuring.require("torch")
  flags.networks = NETWORKS if flags.network == "both" else (flags.network,)
  flags.batch_size = flags.batch_size or ((2 if flags.short else 4) if jax.default_backend() == "cpu" else 24)
  flags.rounds = flags.rounds or (3 if flags.short else 9)
  return flags


def settings(flags: argparse.Namespace, network: str, variants: Sequence[str]) -> list["Setting"]:
  """A setting for each variant of the loss, as the flags ask: in float32 on a CPU, in bfloat16 elsewhere."""
  dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return [Setting(network, variant, flags.batch_size, flags.short, dtype) for variant in variants]


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is trained.

  Attributes:
    network: "unet" or "swin_unet".
    variant: "baseline", "scr", "ifd" or "selfreg".
    batch_size: slices.
    short: a narrow network on small images.
    dtype: of the computation, "float32" or "bfloat16".
  """

  network: str
  variant: str = "baseline"
  batch_size: int = 4
  short: bool = False
  dtype: str = "float32"

  @property
  def size(self) -> int:
    """Pixels a side of the images."""
    return 56 if self.short else 224

  def __str__(self) -> str:
    return f"batches of {self.batch_size}, {self.size}x{self.size}, {self.dtype}"

  def config(self) -> Any:
    """A run's config with the recipe's values."""
    config = select_terms(base_config(self.network), self.variant)
    config.model.dtype = self.dtype
    config.optimizer.learning_rate = RATE
    if self.short:
      narrow = {"unet": {"widths": (8, 16, 16)}, "swin_unet": {"embed_dim": 24, "depths": (2, 2), "heads": (2, 4)}}
      config.model.update(narrow[self.network])
    return config

  def batch(self) -> dict[str, np.ndarray]:
    """A made-up batch: "image" (B, H, W, 1) in [0, 1] and "label" (B, H, W), blocks of classes of 8x8 pixels."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, CLASSES, (self.batch_size, self.size // 8, self.size // 8)).astype(np.int32)
    label = cells.repeat(8, axis=1).repeat(8, axis=2)
    noise = rng.normal(0, 0.1, label.shape)
    return {"image": np.clip(label / CLASSES + noise, 0, 1)[..., None].astype(np.float32), "label": label}


class Ours:
  """This package's step.

  Attributes:
    state: of the training; replaced by every step.
    compiled: the program.
    compile_seconds: what tracing and compiling it took.
    operations: floating-point operations of a step, as counted before the compiler rewrites them.
    metrics: of the latest step.
  """

  def __init__(self, setting: Setting):
    self.setting = setting
    config = setting.config()
    self.model = build_model(config.model, CLASSES)
    schedule = optimizers.make_schedule(config.optimizer, _STEPS, steps_per_epoch=_STEPS)
    self._optimizer = optimizers.make_optimizer(config.optimizer, schedule)
    self._mesh = meshes.make_mesh(jax.devices()[:1])
    self._batch = meshes.place_batch(setting.batch(), self._mesh)
    self._step = meshes.jit_for(
      self._mesh,
      make_train_step(self.model, make_loss(config.loss), self._optimizer),
      donate_argnums=0,
      out_shardings=meshes.replicated(self._mesh),
    )
    self.state: TrainState | None = None
    self.metrics: dict[str, jax.Array] = {}

  def start(self, variables: Mapping[str, Any] | None = None) -> None:
    """Begins with these variables (copies of them: the step overwrites its own), or with random ones."""
    key = jax.random.key(0)
    create = functools.partial(create_state, optimizer=self._optimizer, key=key)
    if variables is None:
      begin = lambda: create(initial_variables(self.model, key, self.setting.size, channels=1))  # noqa: E731
      self.state = jax.jit(begin, out_shardings=meshes.replicated(self._mesh))()
    else:
      copies = jax.tree.map(jnp.array, dict(variables))
      self.state = jax.device_put(create({"batch_stats": {}} | copies), meshes.replicated(self._mesh))

  def compile(self) -> None:
    """Compiles the step for the state that `start` made."""
    begin = time.perf_counter()
    self.compiled = meshes.compile_ahead(self._step, self.state, self._batch)
    self.compile_seconds = time.perf_counter() - begin
    # A GPU's compiler hands products to libraries, which a compiled program's own count leaves out.
    self.operations = self._step.lower(self.state, self._batch).cost_analysis()["flops"]

  def __call__(self) -> None:
    """One step."""
    self.state, self.metrics = self.compiled(self.state, self._batch)
    jax.block_until_ready(self.metrics)

  def draws(self) -> tuple[np.ndarray, list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """What the next step computes and draws on its way, by a forward pass with the same keys.

    Returns:
      logits (B, H, W, classes); the factors (B,) of the drop paths that drop at all, in the order of computation; the
      channel pairs of SCR, position by position.
    """
    key = jax.random.fold_in(self.state.key, self.state.step)

    @jax.jit
    def forward(variables: Any, images: jax.Array) -> tuple:
      factors = []

      def watch(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if isinstance(context.module, DropPath) and context.module.rate > 0:
          before, after = (x.astype(jnp.float32) for x in (args[0], result))
          axes = tuple(range(1, before.ndim))
          factors.append(jnp.sum(before * after, axes) / jnp.sum(before**2, axes))
        return result

      with nn.intercept_methods(watch):
        logits, updated = self.model.apply(
          variables,
          images,
          train=True,
          mutable=["batch_stats", COLLECTION],
          rngs={"dropout": named_key(key, "dropout")},
        )
      return logits, factors, Features.from_sown(updated[COLLECTION])

    logits, factors, features = forward(self.state.variables, self._batch["image"])
    pairs = []

    def record(
      key: jax.Array, student: jax.Array, target: jax.Array, axis_name: losses.AxisName
    ) -> tuple[jax.Array, jax.Array]:
      drawn = losses.random_pairing(key, student, target, axis_name)
      pairs.append(tuple(np.asarray(indices) for indices in drawn))
      return drawn

    # Draws depend on the number of channels only.
    pixels = jax.tree.map(lambda x: x[:1, :1, :1], features)
    losses.self_regularization(pixels, named_key(key, "loss"), scr_weight=1.0, ifd_weight=0, pairing=record)
    return np.asarray(logits), [np.asarray(factor) for factor in factors], pairs


class Theirs:
  """PyTorch's step.

  Attributes:
    network: the module, in channels_last.
    terms: of the latest step's loss: "total" and, where they take part, "scr" and "ifd" without their weights.
  """

  def __init__(self, setting: Setting, *, compiled: bool = False):
    import torch

    from benchmarks import torch_models

    self.setting, self._torch = setting, torch
    self.config = setting.config()
    self.device = torch_models.device()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    model = self.config.model
    if setting.network == "unet":
      network = torch_models.UNet(CLASSES, widths=model.widths)
    else:
      network = torch_models.SwinUNet(
        CLASSES, setting.size, model.embed_dim, model.depths, model.heads, model.window, model.drop_path
      )
    self.network = network.to(self.device, memory_format=torch.channels_last)
    optimizer = self.config.optimizer
    self._optimizer = torch.optim.SGD(
      self.network.parameters(),
      lr=RATE,
      momentum=optimizer.momentum,
      weight_decay=optimizer.weight_decay,
      fused=True,
    )
    batch = setting.batch()
    image = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).to(self.device)
    self._image = image.contiguous(memory_format=torch.channels_last)
    self._label = torch.from_numpy(batch["label"]).long().to(self.device)
    self._pairs = None
    self._forward = torch.compile(self._logits_and_terms) if compiled else self._logits_and_terms
    self.terms: dict[str, Any] = {}

  def weights(self) -> dict[str, np.ndarray]:
    """Copies of all weights, by PyTorch's names."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in self.network.state_dict().items()}

  def fix(self, factors: list[np.ndarray] | None, pairs: list[tuple[np.ndarray, np.ndarray]] | None) -> None:
    """Uses these draws (see `Ours.draws`) instead of its own; None goes back to drawing."""
    tensor = functools.partial(self._torch.tensor, device=self.device)
    self._pairs = None if pairs is None else [tuple(tensor(i) for i in pair) for pair in pairs]
    if self.setting.network == "swin_unet":
      places = [place for place in self.network.drop_paths() if place.rate > 0]
      for place, factor in zip(places, [None] * len(places) if factors is None else factors, strict=True):
        place.factors = None if factor is None else tensor(factor)

  def _logits_and_terms(self) -> tuple[Any, dict[str, Any]]:
    from benchmarks import torch_losses

    torch, loss = self._torch, self.config.loss
    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting.dtype == "bfloat16"):
      logits, taps = self.network(self._image)
    logits = logits.float()
    ce = torch.nn.functional.cross_entropy(logits, self._label)
    total = loss.ce_weight * ce + loss.dice_weight * torch_losses.soft_dice(logits, self._label)
    terms = torch_losses.self_regularization(taps, loss.scr_weight, loss.ifd_weight, self._pairs)
    for name, weight in (("scr", loss.scr_weight), ("ifd", loss.ifd_weight)):
      if name in terms:
        total = total + weight * terms[name]
    return logits, terms | {"total": total}

  def logits(self) -> np.ndarray:
    """Logits of the training batch, (B, H, W, classes), without a step."""
    with self._torch.no_grad():
      return self._logits_and_terms()[0].permute(0, 2, 3, 1).cpu().numpy()

  def __call__(self) -> None:
    """One step."""
    self._optimizer.zero_grad(set_to_none=True)
    _, self.terms = self._forward()
    self.terms["total"].backward()
    self._optimizer.step()
    if self.device.type == "cuda":
      self._torch.cuda.synchronize()


# Largest difference, relative to the largest value of each comparison. In bfloat16 both sides round after every layer.
_TOLERANCES = {
  "float32": {"logits": 2e-3, "terms": 2e-4, "head": 5e-3, "first": 5e-2},
  "bfloat16": {"logits": 0.1, "terms": 2e-2, "head": 0.1},
}
_HEADS = {"unet": "outc.conv.weight", "swin_unet": "output.weight"}
_FIRSTS = {"unet": "inc.double_conv.0.weight", "swin_unet": "patch_embed.proj.weight"}


Draws = tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]


def require_equal_steps(ours: Ours, theirs: Theirs) -> Draws:
  """Takes one step on both sides with the same weights and draws, and compares.

  Logits, the loss and its terms SCR and IFD, and what the step changed about the head's and the first layer's weights.

  Args:
    ours: not yet started; afterwards compiled and one step on.
    theirs: as made; afterwards one step on.

  Returns:
    The draws of the step: factors of the drop paths, channel pairs.

  Raises:
    NotComparableError: they differ by more than rounding does.
  """
  setting = ours.setting
  tolerances = _TOLERANCES[setting.dtype]
  before = theirs.weights()
  ours.start(sr.from_pytorch(before, ours.model))
  logits, factors, pairs = ours.draws()
  theirs.fix(factors, pairs)
  name = f"{setting.network} {setting.variant}"
  require_equal(f"{name}: logits", logits, theirs.logits(), rtol=tolerances["logits"])
  ours.compile()
  ours()
  theirs()
  theirs.fix(None, None)
  for term, value in theirs.terms.items():
    require_equal(f"{name}: {term}", ours.metrics[term], value.item(), rtol=tolerances["terms"])
  after_ours, after_theirs = sr.to_pytorch(ours.state.variables, ours.model, image_size=setting.size), theirs.weights()
  for what, layer in (("head", _HEADS[setting.network]), ("first", _FIRSTS[setting.network])):
    if what in tolerances:
      changes = (after[layer] - before[layer] for after in (after_ours, after_theirs))
      require_equal(f"{name}: update of {layer}", *changes, rtol=tolerances[what])
  return factors, pairs


def require_compiled_equals_eager(compiled: Theirs, eager: Theirs, draws: Draws) -> None:
  """Takes one step of PyTorch with and without torch.compile, from the same weights and with the same draws.

  Args:
    compiled: as made; afterwards one step on.
    eager: likewise.
    draws: of `require_equal_steps`.

  Raises:
    NotComparableError: terms of the loss or weights differ by more than rounding does.
  """
  setting = compiled.setting
  tolerances = _TOLERANCES[setting.dtype]
  name, layer = f"{setting.network} {setting.variant}: torch.compile", _HEADS[setting.network]
  before = eager.weights()
  require_equal(f"{name}: weights", compiled.weights()[layer], before[layer], rtol=0.0)
  for side in (compiled, eager):
    side.fix(*draws)
    side()
    side.fix(None, None)
  for term, value in eager.terms.items():
    require_equal(f"{name}: {term}", compiled.terms[term].item(), value.item(), rtol=tolerances["terms"])
  changes = (side.weights()[layer] - before[layer] for side in (compiled, eager))
  require_equal(f"{name}: update of {layer}", *changes, rtol=tolerances["head"])
