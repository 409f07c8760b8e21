"""GlaS and MoNuSeg: H&E images and masks, as the challenges' archives or as the tree in circulation.

    GlaS      train_1.bmp, train_1_anno.bmp, testA_1.bmp, testB_1.bmp, ..., Grade.csv    in one folder
    MoNuSeg   .../Tissue Images/TCGA-18-5592-01Z-00-DX1.tif     beside   .../Annotations/TCGA-18-5592-01Z-00-DX1.xml
              .../MoNuSegTestData/TCGA-2Z-A9J9-01A-01-TS1.tif   and .xml beside each other; "test" in the folder's name
    tree      Train_Folder/img/1.png, Train_Folder/labelcol/1.png (or 1_anno.png); likewise Val_Folder and Test_Folder

Masks hold a number for each object, or 255; above 0 is class 1. Patients are kept together: by `Grade.csv` for GlaS, by
the first three fields of the TCGA barcode for MoNuSeg; where neither is there each image stands for itself.
"""

import collections
import csv
import io
import pathlib
import re
from collections.abc import Callable, Mapping

from selfreg_jax.data import datasets, images
from selfreg_jax.data.cases import LabelRule
from selfreg_jax.data.datasets import Found, RawCase, RawDataset
from selfreg_jax.data.manifest import DatasetInfo
from selfreg_jax.data.published import GLAS, MONUSEG
from selfreg_jax.data.readers import ImageCase
from selfreg_jax.errors import UserError

Parts = dict[str, Found]  # what each split of the source holds
Layout = Callable[[pathlib.Path, pathlib.Path], Parts]  # (source, folder) -> parts

_GRADES = "Grade.csv"
_GLAS_IMAGE = re.compile(r"(train|testA|testB)_(\d+)")
_ANNOTATION = "_anno"
_TREE = {"Train_Folder": "train", "Val_Folder": "val", "Test_Folder": "test"}
_TEST = re.compile(r"Test|TEST|(?<![a-z])test")  # MoNuSegTestData, but not "latest"
_BARCODE = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}")


def find_glas(source: pathlib.Path) -> RawDataset:
  """Finds the images of the GlaS archive or tree.

  Args:
    source: the folder, or any above it.

  Returns:
    The dataset.

  Raises:
    UserError: neither layout is there, or one of them twice, or `Grade.csv` is no table of patients.
  """
  layouts = dict.fromkeys(_tree_roots(source), _tree)
  for folder in datasets.folders_below(source):
    in_tree = folder.parent.name in _TREE
    if not in_tree and any(_GLAS_IMAGE.fullmatch(path.stem) for path in _image_files(folder)):
      layouts[folder] = _glas_archive
  folder, parts = _only(source, layouts, "train_1.bmp beside train_1_anno.bmp")
  patients = _patients(folder / _GRADES)
  return _dataset(parts, GLAS, patients.get, f"{_GRADES} does not name them" if patients else f"there is no {_GRADES}")


def find_monuseg(source: pathlib.Path) -> RawDataset:
  """Finds the images of the MoNuSeg archives or of the tree.

  Args:
    source: the folder, or any above it.

  Returns:
    The dataset.

  Raises:
    UserError: neither layout is there, or one of them twice.
  """
  layouts = dict.fromkeys(_tree_roots(source), _tree)
  if any(path.suffix.lower() == ".xml" for folder in datasets.folders_below(source) for path in folder.iterdir()):
    layouts[source] = _monuseg_archive
  _, parts = _only(source, layouts, '"Tissue Images"/*.tif beside Annotations/*.xml')
  return _dataset(parts, MONUSEG, _tcga_patient, "their names hold no TCGA barcode")


def _tcga_patient(case_id: str) -> str | None:
  match = _BARCODE.search(case_id)
  return match[0] if match else None


def _only(source: pathlib.Path, layouts: Mapping[pathlib.Path, Layout], example: str) -> tuple[pathlib.Path, Parts]:
  """The one folder that holds the dataset, and its parts."""
  if not layouts:
    raise UserError(
      f"{source}: holds neither the archive ({example}) nor the tree (Train_Folder/img, Train_Folder/labelcol)"
    )
  if len(layouts) > 1:
    names = datasets.listed(datasets.relative(folder, source) for folder in layouts)
    raise UserError(f"{source}: holds the dataset more than once ({names}); give the folder of one")
  ((folder, layout),) = layouts.items()
  return folder, layout(source, folder)


def _tree_roots(source: pathlib.Path) -> list[pathlib.Path]:
  return sorted({folder.parent for folder in datasets.folders_below(source) if folder.name in _TREE})


def _tree(source: pathlib.Path, root: pathlib.Path) -> Parts:
  parts = {}
  for name, split in _TREE.items():
    pictures = {path: _tree_id(path.stem, split) for path in _image_files(root / name / "img")}
    masks = {
      path: _tree_id(path.stem.removesuffix(_ANNOTATION), split) for path in _image_files(root / name / "labelcol")
    }
    parts[split] = datasets.pair_up(source, [datasets.by_id(pictures)], datasets.by_id(masks), ImageCase)
  return parts


def _tree_id(stem: str, split: str) -> str:
  """Images that are only numbered are numbered in each folder anew: 1 of Train_Folder is the archive's train_1."""
  return f"{split}_{stem}" if stem.isdecimal() else stem


def _glas_archive(source: pathlib.Path, folder: pathlib.Path) -> Parts:
  pictures: dict[str, dict[pathlib.Path, str]] = {"train": {}, "test": {}}
  masks: dict[str, dict[pathlib.Path, str]] = {"train": {}, "test": {}}
  for path in _image_files(folder):
    case_id = path.stem.removesuffix(_ANNOTATION)
    if _GLAS_IMAGE.fullmatch(case_id):
      kind = masks if path.stem.endswith(_ANNOTATION) else pictures
      kind["train" if case_id.startswith("train") else "test"][path] = case_id
  return {
    split: datasets.pair_up(source, [datasets.by_id(pictures[split])], datasets.by_id(masks[split]), ImageCase)
    for split in pictures
  }


def _monuseg_archive(source: pathlib.Path, folder: pathlib.Path) -> Parts:
  pictures: dict[str, dict[pathlib.Path, str]] = {"train": {}, "test": {}}
  outlines: dict[str, dict[pathlib.Path, str]] = {"train": {}, "test": {}}
  for below in datasets.folders_below(folder):
    # The folder's own name counts too, and is not written in a source like ".".
    name = datasets.relative(below.absolute(), folder.absolute().parent)
    split = "test" if _TEST.search(name) else "train"
    pictures[split] |= {path: path.stem for path in _image_files(below)}
    outlines[split] |= {
      path: path.stem for path in sorted(below.iterdir()) if path.suffix.lower() == ".xml" and path.name[0] != "."
    }
  return {
    split: datasets.pair_up(source, [datasets.by_id(pictures[split])], datasets.by_id(outlines[split]), ImageCase)
    for split in pictures
  }


def _image_files(folder: pathlib.Path) -> list[pathlib.Path]:
  entries = sorted(folder.iterdir()) if folder.is_dir() else []
  return [path for path in entries if path.suffix.lower() in images.EXTENSIONS and not path.name.startswith(".")]


def _patients(path: pathlib.Path) -> dict[str, str]:
  """The patient of each image from the columns `name` and `patient ID`; empty where there is no such file."""
  if not path.exists():
    return {}
  try:
    text = path.read_text(encoding="utf-8-sig")
    table = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    columns = {(name or "").strip().lower(): name for name in table.fieldnames or ()}
    name, patient = columns["name"], columns["patient id"]
    rows = [(row[name].strip(), row[patient].strip()) for row in table if row[name]]
  except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError) as error:
    raise UserError(f"{path}: is no table with the columns 'name' and 'patient ID' ({error})") from error
  if unknown := [name for name, patient in rows if not patient]:
    raise UserError(f"{path}: no patient ID for {datasets.listed(unknown)}")
  return {name: f"patient_{patient}" for name, patient in rows}


def _dataset(parts: Parts, info: DatasetInfo, patient: Callable[[str], str | None], why_unknown: str) -> RawDataset:
  faults = [fault for found in parts.values() for fault in found.faults]
  faults += [f"{name}: image without a label" for found in parts.values() for name in found.unlabelled.values()]
  ids = [case_id for found in parts.values() for case_id in found.ids]
  twice = {case_id for case_id, count in collections.Counter(ids).items() if count > 1}
  faults += [f"{case_id}: in two folders; an image belongs to one split" for case_id in sorted(twice)]
  ungrouped = [case_id for case_id in ids if patient(case_id) is None]
  notes = [f"{len(ungrouped)} of {len(ids)} images are not grouped by patient: {why_unknown}"] if ungrouped else []
  return RawDataset(
    tuple(RawCase(case.id, case.reader, patient(case.id)) for found in parts.values() for case in found.cases),
    info.classes,
    LabelRule(len(info.classes), instances=True, hint="a mask of 0 and numbers above is expected"),
    tuple(sorted({*ids})),
    val_ids=tuple(case_id for case_id in parts["val"].ids if case_id not in twice) if "val" in parts else (),
    test_ids=tuple(case_id for case_id in parts["test"].ids if case_id not in twice),
    faults=tuple(faults),
    notes=tuple(notes),
    kind=info.kind,
    unit="pixel",
    orientation=info.orientation,
    channels=info.channels,
  )
