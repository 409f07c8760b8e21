"""Prepared datasets of images, and runs on them, written by hand."""

import dataclasses
import shutil

import jax
import numpy as np

from selfreg_jax.data import manifest as manifests
from selfreg_jax.data.manifest import Case, DatasetInfo, Intensity, Manifest
from selfreg_jax.models.factory import abstract_variables, build_model
from selfreg_jax.training.checkpoints import CheckpointWriter
from tests.conftest import make_small_config


def write_image_dataset(folder, *, folds=(), count=6, size=(40, 52)):
  """Bright discs on darker noise in RGB, of differing sizes; two for testing and, without folds, one to validate."""
  rng = np.random.default_rng(4)
  (folder / "cases").mkdir(parents=True)
  cases = {}
  for number in range(count):
    rows, columns = size[0] + 3 * number, size[1] - 2 * number
    y, x = np.mgrid[:rows, :columns]
    center = rng.uniform(14, 24, 2)
    label = ((y - center[0]) ** 2 + (x - center[1]) ** 2 < 81).astype(np.uint8)
    image = np.clip(rng.normal(60, 15, (rows, columns, 3)) + 120 * label[..., None], 0, 255).astype(np.uint8)
    case_id = f"tissue_{number}"
    np.save(folder / "cases" / f"{case_id}.image.npy", image[None])
    np.save(folder / "cases" / f"{case_id}.label.npy", label[None])
    checksums = {kind: manifests.checksum(folder / f"cases/{case_id}.{kind}.npy") for kind in ("image", "label")}
    cases[case_id] = Case(
      id=case_id, image=f"cases/{case_id}.image.npy", label=f"cases/{case_id}.label.npy", shape=(1, rows, columns, 3),
      spacing=(1.0, 1.0, 1.0), axcodes=None, affine=None, file_shape=(rows, columns), header=None, group=case_id,
      sources={"image": f"{case_id}.png", "label": f"{case_id}_mask.png"}, checksums=checksums,
      class_voxels=(int((label == 0).sum()), int(label.sum())), foreground_slices=(0,),
    )  # fmt: skip
  ids = tuple(cases)
  train, val = (ids[:-2], ()) if folds else (ids[:-3], ids[-3:-2])
  manifest = Manifest(
    dataset="made up", kind="image", unit="pixel", classes=("background", "gland"), channels=3,
    intensity=Intensity("byte"), dtype="uint8", scale=1 / 255, orientation="stored", axis=2,
    splits={"train": train, "val": val, "test": ids[-2:]}, folds=tuple(folds), cases=cases, source="",
  )  # fmt: skip
  manifests.save(manifest, folder)
  return manifest


def write_pack_dataset(folder, prepared):
  """`prepared` as if it came from a pack: no affine, no header, spacings of one voxel."""
  manifest = manifests.load(prepared)
  shutil.copytree(prepared / "cases", folder / "cases")
  cases = {}
  for case in manifest.cases.values():
    slices, rows, columns, _ = case.shape
    plain = {"axcodes": None, "affine": None, "header": None, "spacing": (1.0, 1.0, 1.0)}
    cases[case.id] = dataclasses.replace(case, file_shape=(rows, columns, slices), **plain)
  packed = dataclasses.replace(manifest, cases=cases, unit="voxel")
  manifests.save(packed, folder)
  return packed


def write_run(data, workdir, *, seed=0, fold=-1):
  """A workdir of a network with random weights: it need not be good to be scored."""
  config = make_small_config(data)
  config.data.fold = fold
  info = DatasetInfo.of(manifests.load(data))
  model = build_model(config.model, len(info.classes))
  shapes, rng = abstract_variables(model, config.data.image_size, info.channels), np.random.default_rng(seed)
  variables = {
    "params": jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes["params"]),
    "batch_stats": jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes["batch_stats"]),
  }
  workdir.mkdir(parents=True)
  with CheckpointWriter(workdir) as writer:
    writer.save_weights(variables, config, info)
  return workdir
