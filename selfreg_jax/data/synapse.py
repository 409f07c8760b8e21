"""Synapse: the abdominal CT of the BTCV challenge, as raw archive or as the pack that TransUNet made of it.

Both lie under the source folder, however deep:

    raw    img/img0001.nii.gz                  HU
           label/label0001.nii.gz              13 organs, reduced here to the pack's 8; or those 8 (--labels=8)
    pack   train_npz/case0005_slice000.npz     image and label (x, y), in [0, 1] and 8 organs already
           test_vol_h5/case0001.npy.h5         image and label (z, x, y)

Case ids are the four digits. The split is the published one; validation cases are taken from its training cases.
"""

import pathlib
import re

from selfreg_jax.data import datasets
from selfreg_jax.data.cases import LabelRule
from selfreg_jax.data.datasets import RawCase, RawDataset
from selfreg_jax.data.published import SYNAPSE
from selfreg_jax.data.readers import NiftiCase, SlicePack, VolumePack
from selfreg_jax.errors import UserError

TRAIN = tuple(f"{case:04d}" for case in (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40))
TEST = tuple(f"{case:04d}" for case in (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38))

# Ids 1 to 13 of the challenge's label files; those that are among the classes of the pack keep their names.
RAW_ORGANS = (
  "spleen",
  "right kidney",
  "left kidney",
  "gallbladder",
  "esophagus",
  "liver",
  "stomach",
  "aorta",
  "vena cava",
  "portal and splenic vein",
  "pancreas",
  "right adrenal gland",
  "left adrenal gland",
)

_SLICE = re.compile(r"case(?P<case>\d{4})_slice(?P<slice>\d+)\.npz")
_VOLUME = re.compile(r"case(?P<case>\d{4})\.npy\.h5")
_IMAGE_KEY = "image"


def label_rule(organs: int | None, packed: bool) -> LabelRule:
  """What the values of label files mean.

  Args:
    organs: 13 for the challenge's ids, 8 for labels that have been reduced already; None: 13, but a file that holds no
      id above 8, which 13 organs of an abdomen cannot do, is refused.
    packed: whether the files are the pack's, which holds 8 organs.

  Returns:
    The rule.

  Raises:
    UserError: 13 organs were asked for in a pack.
  """
  if packed and organs == 13:
    raise UserError("--labels=13: the pack holds 8 organs; leave --labels out")
  if packed or organs == 8:
    hint = "labels of 8 organs are expected" + ("" if packed else ", as --labels=8 says; the archive's own have 13")
    return LabelRule(len(SYNAPSE.classes), hint=hint)
  table = tuple(SYNAPSE.classes.index(name) if name in SYNAPSE.classes else 0 for name in ("background", *RAW_ORGANS))
  if organs == 13:
    return LabelRule(len(SYNAPSE.classes), table, hint="labels of the 13 BTCV organs are expected, as --labels=13 says")
  hint = (
    "labels of the 13 BTCV organs are expected (say --labels=13 if they are that, --labels=8 if they have been reduced "
    "to the 8 of the pack)"
  )
  return LabelRule(len(SYNAPSE.classes), table, must_exceed=8, hint=hint)


def find(source: pathlib.Path, *, organs: int | None = None) -> RawDataset:
  """Finds the cases of the raw archive or of the pack, whichever lies below the source folder.

  Args:
    source: the folder, or any above it.
    organs: of the archive's label files; see `label_rule`.

  Returns:
    The dataset.

  Raises:
    UserError: neither layout is there, or both, or one of them twice, or the pack with 13 organs.
  """
  folders = datasets.folders_below(source)
  images = [path for path in folders if path.name == "img"]
  raw = [path.parent for path in images if (path.parent / "label").is_dir()]
  packs = sorted({path.parent for path in folders if path.name in ("train_npz", "test_vol_h5")})
  found = [*raw, *packs]
  if not found:
    raise UserError(
      f"{source}: holds neither the archive (img/img0001.nii.gz beside label/label0001.nii.gz) nor the pack "
      "(train_npz/case0005_slice000.npz, test_vol_h5/case0001.npy.h5)"
    )
  if len(found) > 1:
    names = datasets.listed(datasets.relative(path, source) for path in found)
    raise UserError(f"{source}: holds the dataset more than once ({names}); give the folder of one")
  labels = label_rule(organs, packed=not raw)
  if not raw:
    return _find_pack(source, packs[0], labels)
  unlabelled = [datasets.relative(path, source) for path in images if path.parent not in raw]
  notes = [f"{name}: left out, there are no labels beside it" for name in unlabelled]
  return _find_raw(source, raw[0], labels, notes)


def _find_raw(source: pathlib.Path, folder: pathlib.Path, labels: LabelRule, notes: list[str]) -> RawDataset:
  ids, faults = {"img": {}, "label": {}}, []
  for prefix, by_path in ids.items():
    for path in datasets.nifti_files(folder / prefix):
      match = re.fullmatch(prefix + r"(\d{4})", datasets.nifti_stem(path))
      if match is None:
        faults.append(f"{datasets.relative(path, source)}: is not named {prefix}0001.nii.gz or likewise")
      else:
        by_path[path] = match[1]
  found = datasets.pair_up(source, [datasets.by_id(ids["img"])], datasets.by_id(ids["label"]), NiftiCase)
  faults += [*found.faults, *(f"{name}: image without a label" for name in found.unlabelled.values())]
  return RawDataset(
    tuple(RawCase(case.id, case.reader, group=case.id) for case in found.cases),
    SYNAPSE.classes,
    labels,
    found.ids,
    test_ids=tuple(case_id for case_id in found.ids if case_id in TEST),
    faults=tuple(faults),
    notes=(*notes, *_notes(found.ids)),
    orientation=SYNAPSE.orientation,
    channels=SYNAPSE.channels,
  )


def _find_pack(source: pathlib.Path, folder: pathlib.Path, labels: LabelRule) -> RawDataset:
  (slices,), faults = datasets.numbered(source, folder / "train_npz", ".npz", _SLICE)
  (volumes,), volume_faults = datasets.numbered(source, folder / "test_vol_h5", ".h5", _VOLUME)
  readers = {case: SlicePack(files, _IMAGE_KEY) for (case,), files in slices.items()}
  readers |= {case: VolumePack(file, _IMAGE_KEY) for (case,), (file,) in volumes.items()}
  twice = sorted({*slices} & {*volumes})
  faults += [*volume_faults, *(f"case {case}: in train_npz and in test_vol_h5" for (case,) in twice)]
  ids = tuple(sorted(readers))
  return RawDataset(
    tuple(RawCase(case, readers[case], group=case) for case in ids),
    SYNAPSE.classes,
    labels,
    ids,
    test_ids=tuple(sorted(case for (case,) in volumes)),
    faults=tuple(faults),
    notes=_notes(ids),
    unit="voxel",
    packed=True,
    orientation=SYNAPSE.orientation,
    channels=SYNAPSE.channels,
  )


def _notes(ids: tuple[str, ...]) -> tuple[str, ...]:
  notes = []
  for name, split in (("training", TRAIN), ("test", TEST)):
    if missing := [case_id for case_id in split if case_id not in ids]:
      notes.append(f"{len(missing)} of the {len(split)} published {name} cases are missing: {datasets.listed(missing)}")
  if others := sorted({*ids} - {*TRAIN, *TEST}):
    notes.append(f"in neither part of the published split, taken for training: {datasets.listed(others)}")
  return tuple(notes)
