"""ACDC: cardiac MR at end diastole (ED) and end systole (ES), as raw archive or as the pack in circulation.

Both lie under the source folder, however deep:

    raw    patient001/Info.cfg                          which frames are ED and ES
           patient001/patient001_frame01.nii.gz         and patient001_frame01_gt.nii.gz, for these two frames
    pack   train/case_001_sliceED_0.npz                 img and label (x, y), in [0, 1] already
           valid/case_019_sliceES_3.npz                 likewise
           test/case_002_volume_ED.npz                  img and label (z, x, y)

A case is one patient at one phase, and the two of a patient are never parted. Of an archive with `training` and
`testing`, the 100 patients of `training` are taken, as in the papers. There is no published split of them: 70, 10 and
20 % of the patients are drawn with --seed. The pack brings its own split, by folder.
"""

import itertools
import pathlib
import re

from selfreg_jax.data import datasets
from selfreg_jax.data.cases import LabelRule
from selfreg_jax.data.datasets import RawCase, RawDataset
from selfreg_jax.data.published import ACDC
from selfreg_jax.data.readers import NiftiCase, SlicePack, VolumePack
from selfreg_jax.errors import UserError

PHASES = ("ED", "ES")

# 70 / 10 / 20: of the 80 % that are not for testing, an eighth is for validation.
TEST_FRACTION = 0.2
VAL_FRACTION = 0.125

_PATIENT = re.compile(r"patient\d{3}")
_CASE = r"(?:case|patient)_?(?P<patient>\d+)"
_SLICE = re.compile(_CASE + r"_slice_?(?P<phase>ED|ES)_?(?P<slice>\d+)\.npz", re.IGNORECASE)
_VOLUME = re.compile(_CASE + r"_volume_?(?P<phase>ED|ES)\.npz", re.IGNORECASE)
_PACK_SPLITS = {"train": "train", "valid": "val", "val": "val", "test": "test"}
_IMAGE_KEY = "img"
_LABELS = LabelRule(len(ACDC.classes), hint="1 right ventricle, 2 myocardium, 3 left ventricle are expected")


def find(source: pathlib.Path) -> RawDataset:
  """Finds the cases of the raw archive or of the pack, whichever lies below the source folder.

  Args:
    source: the folder, or any above it.

  Returns:
    The dataset.

  Raises:
    UserError: neither layout is there, or both, or one of them twice.
  """
  folders = datasets.folders_below(source)
  raw = sorted({path.parent for path in folders if _PATIENT.fullmatch(path.name)})
  left_out = [path for path in raw if path.name == "testing" and path.parent / "training" in raw]
  raw = [path for path in raw if path not in left_out]
  packs = sorted({path.parent for path in folders if path.name in _PACK_SPLITS and any(path.glob("*.npz"))})
  found = [*raw, *packs]
  if not found:
    raise UserError(
      f"{source}: holds neither the archive (patient001/Info.cfg, patient001/patient001_frame01.nii.gz and _gt.nii.gz) "
      "nor the pack (train/case_001_sliceED_0.npz, valid/..., test/case_002_volume_ED.npz)"
    )
  if len(found) > 1:
    names = datasets.listed(datasets.relative(path, source) for path in found)
    raise UserError(f"{source}: holds the dataset more than once ({names}); give the folder of one")
  return _find_raw(source, raw[0], left_out) if raw else _find_pack(source, packs[0])


def _find_raw(source: pathlib.Path, folder: pathlib.Path, left_out: list[pathlib.Path]) -> RawDataset:
  found, ids, faults = [], [], []
  for patient in sorted(path for path in folder.iterdir() if path.is_dir() and _PATIENT.fullmatch(path.name)):
    try:
      frames = _frames(patient / "Info.cfg")
    except ValueError as error:
      ids.append(patient.name)
      faults.append(f"{datasets.relative(patient / 'Info.cfg', source)}: {error}")
      continue
    for frame in frames:
      case_id = f"{patient.name}_frame{frame:02d}"
      ids.append(case_id)
      image, label = (_existing(patient / f"{case_id}{suffix}.nii.gz") for suffix in ("", "_gt"))
      if missing := [path for path in (image, label) if not path.exists()]:
        faults += [f"{datasets.relative(path, source)}: is missing (Info.cfg names the frame)" for path in missing]
      else:
        found.append(RawCase(case_id, NiftiCase((image,), label), group=patient.name))
  notes = [f"{datasets.relative(path, source)}: left out; the papers split the training patients" for path in left_out]
  notes.append(
    "no split of the archive is published: unless named, 10 % and 20 % of the patients are drawn with --seed"
  )
  return RawDataset(
    tuple(found),
    ACDC.classes,
    _LABELS,
    tuple(ids),
    faults=tuple(faults),
    notes=tuple(notes),
    orientation=ACDC.orientation,
    channels=ACDC.channels,
    val_fraction=VAL_FRACTION,
    test_fraction=TEST_FRACTION,
  )


def _existing(path: pathlib.Path) -> pathlib.Path:
  """The file, or the one that was unpacked from it."""
  return path if path.exists() or not path.with_suffix("").exists() else path.with_suffix("")


def _frames(path: pathlib.Path) -> list[int]:
  """The numbers of the two frames from lines like `ED: 1`; raises ValueError with what is wrong."""
  try:
    lines = [line.partition(":") for line in path.read_text(encoding="utf-8").splitlines()]
  except FileNotFoundError:
    raise ValueError("is missing") from None
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"cannot be read ({error})") from error
  values = {key.strip(): value.strip() for key, _, value in lines}
  frames = [values.get(phase, "") for phase in PHASES]
  if not all(frame.isdecimal() for frame in frames) or frames[0] == frames[1]:
    raise ValueError(
      f"needs two lines 'ED: 1' and 'ES: 12' with two frame numbers; it says {frames[0]!r}, {frames[1]!r}"
    )
  return [int(frame) for frame in frames]


def _find_pack(source: pathlib.Path, folder: pathlib.Path) -> RawDataset:
  found: dict[str, RawCase] = {}
  splits: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
  faults = []
  for name, split in _PACK_SPLITS.items():
    (slices, volumes), folder_faults = datasets.numbered(source, folder / name, ".npz", _SLICE, _VOLUME)
    faults += folder_faults
    readers = [(key, SlicePack(files, _IMAGE_KEY)) for key, files in slices.items()]
    readers += [(key, VolumePack(file, _IMAGE_KEY)) for key, (file, *_) in volumes.items()]
    for (number, phase), reader in readers:
      patient = f"patient{int(number):03d}"
      case_id = f"{patient}_{phase.upper()}"
      if case_id not in found:
        found[case_id] = RawCase(case_id, reader, group=patient)
        splits[split].add(case_id)
      else:
        names = [datasets.relative(r.image_files[0], source) for r in (found[case_id].reader, reader)]
        faults.append(f"{', '.join(names)}: {phase.upper()} of {patient} twice")
  groups = {split: {found[case_id].group for case_id in ids} for split, ids in splits.items()}
  notes = [
    f"{patient}: one phase in {one}, one in {other}; scores will be better than on patients never seen"
    for one, other in itertools.combinations(splits, 2)
    for patient in sorted(groups[one] & groups[other])
  ]
  return RawDataset(
    tuple(found[case_id] for case_id in sorted(found)),
    ACDC.classes,
    _LABELS,
    tuple(sorted(found)),
    val_ids=tuple(sorted(splits["val"])),
    test_ids=tuple(sorted(splits["test"])),
    faults=tuple(faults),
    notes=tuple(notes),
    unit="voxel",
    packed=True,
    orientation=ACDC.orientation,
    channels=ACDC.channels,
  )
