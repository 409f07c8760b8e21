import os

# Set before JAX starts: eight virtual devices let sharded code be compared with the same code on one device.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pathlib
import zlib

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from selfreg_jax.config import base_config
from selfreg_jax.data.prepare import PrepareOptions, prepare

jax.config.update("jax_default_matmul_precision", "highest")

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_configure(config):
  # The same small training step is compiled by many tests, in two processes, and by the commands that tests start:
  # these find the folder in the environment, so that nothing is written into the user's own.
  folder, seconds = str(config.cache.mkdir("jax")), 0.1
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(seconds)


@pytest.fixture(scope="session")
def golden():
  """Loads a file of reference outputs (see golden/README.md) as a dict of arrays."""

  def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
      return dict(arrays)

  return load


def rule_weight(name, shape):
  """The weight that golden/README.md's rule gives to a PyTorch parameter; float32 throughout."""
  if name.endswith("num_batches_tracked"):
    return np.asarray(0)
  z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
  if name.endswith("running_var"):
    return 1 + np.float32(0.1) * np.abs(z)
  if name.endswith("running_mean"):
    return np.float32(0.1) * z
  if len(shape) >= 2:
    return z * np.float32(np.sqrt(1 / np.prod(shape[1:])))
  return 1 + np.float32(0.1) * z if name.endswith("weight") else np.float32(0.02) * z


def unet_state_dict(num_classes, *, channels=1, upsample="bilinear", prefix=""):
  """PyTorch-named rule weights of the authors' UNet, written down independently of the converter's table."""
  shapes = {}

  def block(name, inputs, middle, outputs):
    for index, (i, o) in ((0, (inputs, middle)), (3, (middle, outputs))):
      shapes[f"{name}.double_conv.{index}.weight"] = (o, i, 3, 3)
      for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        shapes[f"{name}.double_conv.{index + 1}.{leaf}"] = () if leaf == "num_batches_tracked" else (o,)

  bilinear = upsample == "bilinear"
  deepest = 512 if bilinear else 1024
  block("inc", channels, 64, 64)
  for i, (a, b) in enumerate([(64, 128), (128, 256), (256, 512), (512, deepest)], 1):
    block(f"down{i}.maxpool_conv.1", a, b, b)
  outputs = (256, 128, 64, 64) if bilinear else (512, 256, 128, 64)
  for i, (a, b) in enumerate(zip((1024, 512, 256, 128), outputs, strict=True), 1):
    block(f"up{i}.conv", a, a // 2 if bilinear else b, b)
    if not bilinear:
      shapes[f"up{i}.up.weight"] = (a, a // 2, 2, 2)
      shapes[f"up{i}.up.bias"] = (a // 2,)
  shapes["outc.conv.weight"] = (num_classes, 64, 1, 1)
  shapes["outc.conv.bias"] = (num_classes,)
  return {prefix + name: rule_weight(name, shape) for name, shape in shapes.items()}


def swin_state_dict(num_classes, *, embed_dim=96, depths=(2, 2, 2, 2), heads=(3, 6, 12, 24), window=7, prefix=""):
  """PyTorch-named rule weights of the authors' Swin-Unet, written down independently of the converter's table."""
  shapes = {}

  def linear(name, inputs, outputs, bias=True):
    shapes[f"{name}.weight"] = (outputs, inputs)
    if bias:
      shapes[f"{name}.bias"] = (outputs,)

  def norm(name, width):
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

  def blocks(name, level):
    width = embed_dim * 2**level
    for block in (f"{name}.blocks.{j}" for j in range(depths[level])):
      norm(f"{block}.norm1", width)
      shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[level])
      linear(f"{block}.attn.qkv", width, 3 * width)
      linear(f"{block}.attn.proj", width, width)
      norm(f"{block}.norm2", width)
      linear(f"{block}.mlp.fc1", width, 4 * width)
      linear(f"{block}.mlp.fc2", 4 * width, width)

  last = len(depths) - 1
  shapes["patch_embed.proj.weight"], shapes["patch_embed.proj.bias"] = (embed_dim, 3, 4, 4), (embed_dim,)
  norm("patch_embed.norm", embed_dim)
  for level in range(last + 1):
    width = embed_dim * 2**level
    blocks(f"layers.{level}", level)
    if level < last:
      norm(f"layers.{level}.downsample.norm", 4 * width)
      linear(f"layers.{level}.downsample.reduction", 4 * width, 2 * width, bias=False)
  norm("norm", embed_dim * 2**last)
  for stage in range(last + 1):
    width = embed_dim * 2 ** (last - stage)
    if stage:
      linear(f"concat_back_dim.{stage}", 2 * width, width)
      blocks(f"layers_up.{stage}", last - stage)
    if stage < last:
      expansion = f"layers_up.{stage}.upsample" if stage else "layers_up.0"
      linear(f"{expansion}.expand", width, 2 * width, bias=False)
      norm(f"{expansion}.norm", width // 2)
  norm("norm_up", embed_dim)
  linear("up.expand", embed_dim, 16 * embed_dim, bias=False)
  norm("up.norm", embed_dim)
  shapes["output.weight"] = (num_classes, embed_dim, 1, 1)
  return {prefix + name: rule_weight(name, shape) for name, shape in shapes.items()}


def normal(seed, shape):
  """Normal float32 numbers. Not of jax.random, which is compiled anew for every shape, longer than many a test runs."""
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def uniform(seed, shape):
  """Float32 numbers in [0, 1)."""
  return jnp.asarray(np.random.default_rng(seed).random(shape), jnp.float32)


def integers(seed, shape, below):
  """Whole numbers, 0 or more."""
  return jnp.asarray(np.random.default_rng(seed).integers(0, below, shape))


def random_variables(model, images, *, seed=1, **arguments):
  """Variables of a module without the seconds that its own initialization takes to compile; all blocks are alive."""
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, **arguments))
  return filled({"params": shapes["params"], "batch_stats": shapes.get("batch_stats", {})}, seed)


def filled(shapes, seed):
  """Random variables of these shapes: He's deviations, norms that do nothing yet."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    if path[0].key == "batch_stats":
      return np.full(leaf.shape, path[-1].key == "var", leaf.dtype)
    if leaf.ndim == 1:
      return np.full(leaf.shape, path[-1].key == "scale", leaf.dtype)
    return rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def subsample(feature_map, channel_step, step):
  """A map (B, H, W, C) as the golden files keep it: (B, C, H, W), thinned out."""
  return np.moveaxis(np.asarray(feature_map), -1, 1)[:, ::channel_step, ::step, ::step]


def nhwc(array):
  return np.moveaxis(array, 1, -1)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
  """A small prepared dataset with two native sizes and three classes, learnable in a few steps.

  Bright discs (class 1) and dark squares (class 2) on noise; 4 training cases, 2 validation, 2 test cases.
  """
  return make_prepared(tmp_path_factory.mktemp("prepared"), val="45", test="67")


def make_prepared(folder, *, val, test, depths=(4, 5), training=4):
  """A dataset like that of `prepared`, with other numbers of cases.

  Args:
    folder: to write the raw files and the dataset into.
    val: names of the validation cases, one character each; they follow on the training cases.
    test: of the test cases, likewise.
    depths: slices of the cases, by turns.
    training: training cases.

  Returns:
    The prepared dataset's folder.
  """
  source = folder / "raw"
  source.mkdir()
  rng = np.random.default_rng(0)
  for number, name in enumerate([*map(str, range(training)), *val, *test]):
    shape = (36, 30, depths[1]) if number % 2 else (32, 40, depths[0])
    x, y, _ = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    center = rng.uniform(10, 22, 2)
    label = ((x - center[0]) ** 2 + (y - center[1]) ** 2 < 36).astype(np.uint8)
    label[2:8, 2:8] = 2
    image = rng.normal(0, 20, shape) + 120 * (label == 1) - 90 * (label == 2)
    affine = np.diag([2.0, 2.0, 5.0, 1.0]) if number % 2 else np.diag([-2.0, 1.5, 4.0, 1.0])
    nib.save(nib.Nifti1Image(image.astype(np.int16), affine), source / f"image_{name}.nii.gz")
    nib.save(nib.Nifti1Image(label, affine), source / f"label_{name}.nii.gz")
  output = folder / "shapes"
  prepare(
    PrepareOptions(
      dataset="msd",
      source=source,
      output=output,
      image_glob="image_*.nii.gz",
      label_glob="label_*.nii.gz",
      class_names=("disc", "square"),
      val_cases=tuple(val),
      test_cases=tuple(test),
      window=(-200.0, 200.0),
      workers=1,
    )
  )
  return output


def make_small_config(prepared):
  """A config that trains on `prepared` in seconds."""
  config = base_config()
  config.data.dir = str(prepared)
  config.data.batch_size = 4
  config.data.image_size = 32
  config.data.threads = 1
  config.model.widths = (4, 6, 8)
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 1e-2
  config.train.steps = 6
  config.train.validate_every = 3
  config.train.log_every = 2
  config.eval.batch_size = 4
  return config


@pytest.fixture
def small_config(prepared):
  return make_small_config(prepared)
