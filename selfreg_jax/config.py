"""Every knob of a run, with its unit, range and source; and the check that a config makes sense before any compute."""

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections

from selfreg_jax import loss_parts
from selfreg_jax.data.published import PUBLISHED
from selfreg_jax.errors import UserError

ConfigDict = ml_collections.ConfigDict

# Fields that change what is seen on the screen or how fast data are read, but no number of a run: a workdir may be
# continued with other values.
HARMLESS = (
  "on_save_error",
  "data.dir",
  "data.verify",
  "data.threads",
  "data.prefetch",
  "data.timeout",
  "train.checkpoint_every",
  "train.on_nonfinite",  # no number of a run that was finite so far
  "train.most_skips",
  "train.log_every",
  "train.analyze_every",
  "eval.batch_size",
)


def base_config(network: str = "unet") -> ConfigDict:
  """The defaults: a network of the paper with the authors' settings for their UNet on Synapse.

  Args:
    network: "unet" or "swin_unet"; the section `model` holds the fields of this network only.
  """
  config = ConfigDict()
  config.seed = 0  # of initial weights, augmentation, channel pairs and, unless data.order_seed says so, shuffling
  # What to start from instead of random weights: a workdir (of train.py or of selfreg_jax.models.pretrained) or a file
  # of PyTorch weights (.pth, .safetensors, .npz). A head for another number of classes is initialized anew.
  config.init_from = ""
  # What to do when a checkpoint cannot be written (a full disk): "stop", or "continue" with a warning and try again at
  # the next one. The checkpoints before it are whole either way.
  config.on_save_error = "stop"

  config.data = data = ConfigDict()
  data.name = ""  # published dataset of the recipe, whose classes the data must have: "synapse", "acdc", ...; "": any
  data.dir = ""  # folder that `python -m selfreg_jax.data.prepare` wrote
  data.fold = -1  # of a dataset prepared with folds: the one held out for validation, from 0; -1 without folds
  data.batch_size = 24  # slices of a global batch, over all devices
  data.image_size = 224  # pixels a side of what the network sees; slices are resized to it by cubic splines
  data.order_seed = -1  # of the order in which slices are drawn, alone; -1: follows `seed`
  data.foreground_fraction = 0.0  # share of slices drawn among those with foreground, 0..1; 0 is the authors' sampling
  data.verify = True  # read every file once at the start and compare checksums (about a second per gigabyte)
  data.threads = 4  # reading threads; 0 reads slice after slice
  data.prefetch = 8  # batches held ready
  data.timeout = 60.0  # seconds without a batch after which reading is taken to hang, and the run stops; > 0

  config.augment = augment = ConfigDict()  # the recipe of TransUNet and of the authors
  augment.turn_flip_probability = 0.5  # of a quarter turn and a flip, 0..1
  augment.rotate_probability = 0.5  # of a rotation by a small angle, among the slices not turned, 0..1
  augment.max_angle = 20  # degrees, 0..180; whole angles in [-max_angle, max_angle)

  config.model = _NETWORKS[network]()

  config.loss = loss = ConfigDict()
  loss.ce_weight = 0.4  # of the cross-entropy, >= 0
  loss.dice_weight = 0.6  # of the soft Dice loss, >= 0
  loss.scr_weight = 0.015  # of semantic consistency regularization; 0 switches it off; the paper's best value is 0.015
  loss.ifd_weight = 0.015  # of internal feature distillation; 0 switches it off; likewise
  loss.ifd_order = "response"  # how IFD orders channels: "response" (the authors' code) or "index" (the paper's text)
  loss.ifd_p = 2.0  # exponent of IFD, > 0
  loss.ifd_stop_gradient = "none"  # half without gradient: "none" (the authors' code) or "top" (the paper's text)
  # Parts of SCR: a name, or "package.module:function" of your own; see `self_regularization` in selfreg_jax/losses.py.
  loss.scr_teacher = "final"  # map that supervises: "final" (the method) or "deepest_decoder"
  loss.scr_pairing = "random"  # of channels: "random" (the method), "index" (fixed) or "cosine" (by similarity)
  loss.scr_pool = "average"  # how the larger map is brought to the smaller one's size
  loss.deep_supervision_weight = 0.0  # of the decoder stages' own heads (model.deep_supervision), >= 0

  config.optimizer = optimizer = ConfigDict()
  optimizer.name = "sgd"  # "sgd", "adamw" or "adam"
  optimizer.learning_rate = 0.01  # of the first step, > 0
  optimizer.momentum = 0.9  # of sgd, 0..1
  optimizer.weight_decay = 1e-4  # sgd and adam: added to the gradient, as in PyTorch; adamw: decoupled
  optimizer.clip_norm = 0.0  # gradients of a larger global L2 norm are scaled down to it, before weight decay; 0: never
  optimizer.schedule = "poly"  # "poly", "cosine" (warm restarts, stepped once an epoch) or "constant"
  optimizer.poly_power = 0.9  # of poly: rate * (1 - step / steps) ** power
  optimizer.cosine_period = 10  # of cosine: epochs between restarts
  optimizer.cosine_minimum = 1e-4  # of cosine: lowest rate

  config.train = train = ConfigDict()
  # Passes over the training slices: steps = epochs * ceil(slices / batch_size), as the authors count. Batches are
  # always full: the last one of an epoch goes on with the first slices of the next.
  train.epochs = 150
  train.steps = 0  # steps instead of epochs; 0 follows epochs
  train.validate_every = 1000  # steps between validations, each with a checkpoint (the last step has one); 0: an epoch
  train.patience = 0  # epochs without a better validation Dice after which to stop early; 0: never
  train.checkpoint_every = 0  # steps between further checkpoints, for machines that may be taken away; 0: none
  # Micro-batches that a batch is taken in, one after another: memory of a part of the batch, its gradients summed. CE
  # and SCR are those of the whole batch; Dice, IFD and batch statistics those of each micro-batch.
  train.accumulate = 1
  # Decay of an exponential moving average of the weights, which validation and evaluation then use; 0: no average.
  train.ema_decay = 0.0
  # A loss or gradient that is not finite: "stop" (the batch is saved for inspection), or "skip" the update, up to
  # most_skips times in a row; the schedule of the rate counts updates.
  train.on_nonfinite = "stop"
  train.most_skips = 5
  train.log_every = 50  # steps between lines of metrics; in between nothing is read from the device
  # Steps between measurements of how much the channels of each block repeat each other, on a few validation slices
  # (selfreg_jax.analysis looks at more, afterwards); 0: never.
  train.analyze_every = 0

  config.eval = evaluation = ConfigDict()
  evaluation.batch_size = 24  # slices of a batch in validation and evaluation, rounded up to a multiple of the devices
  return config


def select_terms(config: ConfigDict, variant: str) -> ConfigDict:
  """Switches off the self-regularization terms that a variant of a recipe does without.

  Args:
    config: of the whole method; changed in place.
    variant: what stands behind the colon of `--config=configs/NAME.py:variant`: "baseline" (neither), "scr", "ifd" or
      "selfreg" (both).

  Returns:
    The config.

  Raises:
    UserError: there is no such variant.
  """
  if variant not in VARIANTS:
    raise UserError(f"--config=...:{variant}: the variants are {', '.join(VARIANTS)}")
  for term in ("scr", "ifd"):
    if term not in VARIANTS[variant]:
      config.loss[f"{term}_weight"] = 0.0
  return config


def _unet() -> ConfigDict:
  model = ConfigDict()
  model.name = "unet"
  model.widths = (64, 128, 256, 512, 512)  # channels of the stem and of each down stage
  model.upsample = "bilinear"  # or "transpose"
  model.deep_supervision = (
    False  # 1x1 heads on the decoder's stages, for loss.deep_supervision_weight; in training only
  )
  model.remat = False  # recompute the insides of a block in the backward pass: less memory, more time
  model.dtype = "float32"  # of the computation: "float32" or "bfloat16"; parameters, losses and logits stay float32
  return model


def _swin_unet() -> ConfigDict:
  model = ConfigDict()
  model.name = "swin_unet"
  model.embed_dim = 96  # channels of the first stage; each further one has twice as many
  model.depths = (2, 2, 2, 2)  # transformer blocks of each encoder stage, and of the decoder stage of its resolution
  model.heads = (3, 6, 12, 24)  # attention heads of each stage; they divide its channels
  model.window = 7  # tokens a side of an attention window; a token of the first stage has 4x4 pixels
  model.deep_supervision = (
    False  # 1x1 heads on the decoder's stages, for loss.deep_supervision_weight; in training only
  )
  model.drop_path = 0.2  # highest rate at which a residual branch is dropped in training, 0 <= rate < 1
  model.remat = False  # recompute the insides of a block in the backward pass: less memory, more time
  model.dtype = "float32"  # of the computation: "float32" or "bfloat16"; parameters, losses and logits stay float32
  return model


_NETWORKS: dict[str, Callable[[], ConfigDict]] = {"unet": _unet, "swin_unet": _swin_unet}
NETWORKS = tuple(_NETWORKS)

VARIANTS = {"baseline": (), "scr": ("scr",), "ifd": ("ifd",), "selfreg": ("scr", "ifd")}

# Fields that shape the weights: a checkpoint cannot be continued under other values.
WEIGHT_SHAPING = ("name", "widths", "upsample", "embed_dim", "depths", "heads", "window", "deep_supervision")


_SHARE = (lambda value: 0 <= value <= 1, "between 0 and 1")
_POSITIVE = (lambda value: value > 0, "greater than 0")
_NOT_NEGATIVE = (lambda value: value >= 0, "at least 0")
_AT_LEAST_1 = (lambda value: value >= 1, "at least 1")


def _is_list_of_counts(value: Any) -> bool:
  return all(isinstance(count, int) and not isinstance(count, bool) and count >= 1 for count in value)


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
  return (lambda value: value in choices), f"one of {', '.join(map(repr, choices))}"


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
  "seed": (lambda value: 0 <= value < 2**31, "between 0 and 2**31 - 1"),
  "on_save_error": _one_of("stop", "continue"),
  "data.name": _one_of("", *PUBLISHED),
  "data.dir": (bool, "the folder of a prepared dataset (--config.data.dir=DIR)"),
  "data.fold": (lambda value: value >= -1, "the number of a fold, from 0, or -1"),
  "data.batch_size": _AT_LEAST_1,
  "data.image_size": (lambda value: value >= 2, "at least 2"),
  "data.order_seed": (lambda value: -1 <= value < 2**31, "between 0 and 2**31 - 1, or -1"),
  "data.foreground_fraction": _SHARE,
  "data.threads": _NOT_NEGATIVE,
  "data.prefetch": _AT_LEAST_1,
  "data.timeout": _POSITIVE,
  "augment.turn_flip_probability": _SHARE,
  "augment.rotate_probability": _SHARE,
  "augment.max_angle": (lambda value: 0 <= value <= 180, "between 0 and 180 degrees"),
  "model.name": _one_of(*NETWORKS),
  "model.widths": (
    lambda value: len(value) >= 3 and all(isinstance(width, int) and width >= 2 and width % 2 == 0 for width in value),
    "at least three even numbers of channels",
  ),
  "model.upsample": _one_of("bilinear", "transpose"),
  "model.embed_dim": _AT_LEAST_1,
  "model.depths": (
    lambda value: len(value) >= 2 and _is_list_of_counts(value),
    "blocks of each of two or more stages, at least 1 each",
  ),
  "model.heads": (_is_list_of_counts, "attention heads of each stage, at least 1 each"),
  "model.window": (lambda value: value >= 2, "at least 2"),
  "model.drop_path": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
  "model.dtype": _one_of("float32", "bfloat16"),
  "loss.ce_weight": _NOT_NEGATIVE,
  "loss.dice_weight": _NOT_NEGATIVE,
  "loss.scr_weight": _NOT_NEGATIVE,
  "loss.ifd_weight": _NOT_NEGATIVE,
  "loss.ifd_order": _one_of("response", "index"),
  "loss.ifd_p": _POSITIVE,
  "loss.ifd_stop_gradient": _one_of("none", "top"),
  "loss.deep_supervision_weight": _NOT_NEGATIVE,
  "optimizer.name": _one_of("sgd", "adamw", "adam"),
  "optimizer.learning_rate": _POSITIVE,
  "optimizer.momentum": _SHARE,
  "optimizer.weight_decay": _NOT_NEGATIVE,
  "optimizer.clip_norm": _NOT_NEGATIVE,
  "optimizer.schedule": _one_of("poly", "cosine", "constant"),
  "optimizer.poly_power": _POSITIVE,
  "optimizer.cosine_period": _AT_LEAST_1,
  "optimizer.cosine_minimum": _NOT_NEGATIVE,
  "train.epochs": _AT_LEAST_1,
  "train.steps": _NOT_NEGATIVE,
  "train.validate_every": _NOT_NEGATIVE,
  "train.patience": _NOT_NEGATIVE,
  "train.checkpoint_every": _NOT_NEGATIVE,
  "train.accumulate": _AT_LEAST_1,
  "train.ema_decay": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
  "train.on_nonfinite": _one_of("stop", "skip"),
  "train.most_skips": _AT_LEAST_1,
  "train.log_every": _AT_LEAST_1,
  "train.analyze_every": _NOT_NEGATIVE,
  "eval.batch_size": _AT_LEAST_1,
}


def validate(config: ConfigDict, *, needs_data: bool = True) -> None:
  """Checks names, types and ranges of a whole config.

  Args:
    config: to be checked against `base_config`.
    needs_data: whether `data.dir` must be given.

  Raises:
    UserError: all that is wrong, a line each; an unknown field with the nearest valid name.
  """
  problems = list(_structure_problems(config, base_config(_network(config)), prefix=""))
  if not problems:
    flat = flatten(config)
    problems = [f"{name} = {value!r} must be a finite number" for name, value in flat.items() if _is_infinite(value)]
    problems += [
      f"{name} = {value!r} must be {_RULES[name][1]}"
      for name, value in flat.items()
      if name in _RULES and not _RULES[name][0](value) and (needs_data or name != "data.dir")
    ]
    problems = problems or list(_joint_problems(config))
  if problems:
    raise UserError("the config cannot be used:\n  " + "\n  ".join(f"config.{problem}" for problem in problems))


def _network(config: ConfigDict) -> str:
  """The network whose fields the section `model` should hold; the first where it names none that exists."""
  name = config.model.get("name") if isinstance(config.get("model"), ConfigDict) else None
  if isinstance(name, str) and name not in NETWORKS:
    raise UserError(f"config.model.name = {name!r} must be {_RULES['model.name'][1]}")
  return name if isinstance(name, str) else NETWORKS[0]


def _is_infinite(value: Any) -> bool:
  return isinstance(value, float) and not math.isfinite(value)


def _joint_problems(config: ConfigDict) -> Iterator[str]:
  if config.loss.ce_weight == config.loss.dice_weight == 0:
    yield "loss.ce_weight and config.loss.dice_weight are both 0: nothing would supervise the prediction"
  for field, shipped in loss_parts.SHIPPED.items():
    try:
      if config.loss[field] not in shipped:  # which need no check, and would start JAX
        loss_parts.resolve(field, config.loss[field])
    except UserError as error:
      yield str(error).removeprefix("config.")
  if config.model.deep_supervision != (config.loss.deep_supervision_weight > 0):
    yield (
      f"model.deep_supervision = {config.model.deep_supervision} does not go with "
      f"config.loss.deep_supervision_weight = {config.loss.deep_supervision_weight}: the heads need a weight above 0, "
      "and the weight needs the heads"
    )
  yield from {"unet": _unet_problems, "swin_unet": _swin_unet_problems}[config.model.name](config)
  optimizer = config.optimizer
  if optimizer.schedule == "cosine" and optimizer.cosine_minimum > optimizer.learning_rate:
    yield f"optimizer.cosine_minimum = {optimizer.cosine_minimum} is above the learning rate {optimizer.learning_rate}"


def _unet_problems(config: ConfigDict) -> Iterator[str]:
  downs = len(config.model.widths) - 1
  if config.data.image_size < 2**downs:
    yield f"data.image_size = {config.data.image_size} is too small for {downs} down stages: at least {2**downs}"


def _swin_unet_problems(config: ConfigDict) -> Iterator[str]:
  # Here, because importing a config file should not start JAX.
  from selfreg_jax.models.swin_unet import architecture_problem, nearest_sizes, size_multiple

  model, size = config.model, config.data.image_size
  if model.embed_dim % 2:
    yield f"model.embed_dim = {model.embed_dim} must be even: IFD compares two halves of the channels"
  if problem := architecture_problem(model.embed_dim, model.depths, model.heads):
    yield f"model: {problem}"
    return
  multiple = size_multiple(model.depths, model.window)
  if size % multiple:
    yield (
      f"data.image_size = {size} must be a multiple of {multiple} with windows of {model.window} and "
      f"{len(model.depths)} stages; use {nearest_sizes(size, multiple)}, or another config.model.window"
    )


def _structure_problems(config: ConfigDict, base: ConfigDict, prefix: str) -> Iterator[str]:
  for name in config:
    if name not in base:
      try:
        getattr(base, name)
      except AttributeError as error:  # ml_collections names the nearest field, if there is one
        hint = str(error).partition("\n")[2] or f"Fields: {', '.join(base)}"
        network = f" of a {base.name}" if prefix == "model." else ""
        yield f"{prefix}{name} is not a field{network}. {hint}"
  for name, default in base.items():
    if name not in config:
      yield f"{prefix}{name} is missing; start from selfreg_jax.config.base_config()"
    elif isinstance(default, ConfigDict) and isinstance(config[name], ConfigDict):
      yield from _structure_problems(config[name], default, f"{prefix}{name}.")
    elif not _same_kind(config[name], default):
      yield f"{prefix}{name} = {config[name]!r} must be a {type(default).__name__}, not a {type(config[name]).__name__}"


def _same_kind(value: Any, default: Any) -> bool:
  if isinstance(value, bool) or isinstance(default, bool):
    return isinstance(value, bool) and isinstance(default, bool)
  if isinstance(default, float):
    return isinstance(value, int | float)
  return isinstance(value, list | tuple) if isinstance(default, tuple) else isinstance(value, type(default))


def with_absolute_paths(config: ConfigDict) -> ConfigDict:
  """A copy whose paths hold wherever the next command is called from."""
  absolute = config.copy_and_resolve_references()
  if config.data.dir:
    absolute.data.dir = os.path.abspath(config.data.dir)
  if config.init_from:
    absolute.init_from = os.path.abspath(config.init_from)
  return absolute


def flatten(config: ConfigDict) -> dict[str, Any]:
  """Field values by dotted name, tuples as lists, as they go to JSON."""
  flat = {}
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      flat |= {f"{name}.{inner}": leaf for inner, leaf in flatten(value).items()}
    else:
      flat[name] = list(value) if isinstance(value, tuple) else value
  return flat


def to_json(config: ConfigDict) -> dict[str, Any]:
  """The config as nested plain JSON values."""
  return {
    name: to_json(value) if isinstance(value, ConfigDict) else (list(value) if isinstance(value, tuple) else value)
    for name, value in config.items()
  }


def from_json(content: dict[str, Any]) -> ConfigDict:
  """The reverse of `to_json`."""
  return ConfigDict(
    {
      name: from_json(value) if isinstance(value, dict) else (tuple(value) if isinstance(value, list) else value)
      for name, value in content.items()
    }
  )


def differences(ours: ConfigDict, theirs: ConfigDict) -> list[str]:
  """Fields that differ between two configs and change the numbers of a run, as "field: theirs -> ours" lines.

  A field that one of them lacks, being older than the field, counts with its default.
  """
  new, old = (flatten(base_config(_network(config))) | flatten(config) for config in (ours, theirs))
  return [
    f"config.{name}: {old.get(name)!r} -> {new.get(name)!r}"
    for name in sorted(new.keys() | old.keys())
    if name not in HARMLESS and old.get(name) != new.get(name)
  ]
