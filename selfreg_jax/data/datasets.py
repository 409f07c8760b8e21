"""What each dataset is: which files make a case, and the names of the classes.

Nothing here opens an image. Faults of single files (a label without its image, a case found twice) are collected in
`RawDataset.faults`, so that they can be reported together with what reading the files brings up; a mistake in the
request or in `dataset.json` is a UserError at once.
"""

import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from selfreg_jax.errors import UserError

DATASETS = ("msd", "phantom")
BACKGROUND = "background"
MAX_CLASSES = 256  # labels are stored as uint8

_EXTENSIONS = (".nii.gz", ".nii")
_CHANNEL_SUFFIX = re.compile(r"(.+)_(\d{4})")  # nnU-Net's case_0000.nii.gz is channel 0 of case
_DESCRIPTION = "dataset.json"


@dataclasses.dataclass(frozen=True)
class Pair:
  """The two files of a case.

  Attributes:
    id: name of the case, unique in the dataset and usable as a file name.
    image: the image's file.
    label: the label's file.
    group: what the case shares with others that no split may part it from (the patient); None where nothing is known.
  """

  id: str
  image: pathlib.Path
  label: pathlib.Path
  group: str | None = None


@dataclasses.dataclass(frozen=True)
class RawDataset:
  """What a source folder holds.

  Attributes:
    pairs: the complete cases, by id.
    classes: class names by id; the first is the background.
    ids: the ids of all cases, those in `faults` included.
    test_ids: ids of the cases that the folder itself marks as test cases.
    faults: one line for each case whose files do not pair.
    notes: what is left out on purpose, for the user to know.
  """

  pairs: tuple[Pair, ...]
  classes: tuple[str, ...]
  ids: tuple[str, ...]
  test_ids: tuple[str, ...] = ()
  faults: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


def find_msd(source: pathlib.Path, classes: tuple[str, ...] | None = None) -> RawDataset:
  """Finds the cases of a folder laid out like the Medical Segmentation Decathlon or like nnU-Net's raw datasets.

  `imagesTr` and `labelsTr` hold the cases to train on; where `labelsTs` is present, `imagesTs` and `labelsTs` hold test
  cases. Image names may carry nnU-Net's channel suffix `_0000`.

  Args:
    source: the folder that holds `dataset.json`.
    classes: class names by id, instead of those in `dataset.json`.

  Returns:
    The dataset.

  Raises:
    UserError: the folder is not laid out that way, is empty, has several channels or labels of a kind not supported.
  """
  path = source / _DESCRIPTION
  if not path.is_file():
    raise UserError(
      f"{source}: no {_DESCRIPTION}. Give the folder that holds {_DESCRIPTION}, imagesTr and labelsTr, or say how the "
      "files are named with --image_glob, --label_glob and --num_classes (or --class_names)"
    )
  description = read_json(path)
  channels = description.get("channel_names", description.get("modality", {}))
  if len(channels) > 1:
    raise UserError(f"{path}: {len(channels)} channels ({listed(map(str, channels.values()))}); only one is supported")
  classes = classes or parse_labels(description.get("labels"), path)
  training = _find_folder_pair(source, "imagesTr", "labelsTr")
  test = _find_folder_pair(source, "imagesTs", "labelsTs") if (source / "labelsTs").is_dir() else _Found()
  test_ids = tuple(case_id for case_id in test.ids if case_id not in test.unlabelled)
  notes = [f"imagesTs: {len(test.unlabelled)} image(s) without a label are left out"] if test.unlabelled else []
  if not (source / "labelsTs").is_dir() and (unlabelled := _nifti_files(source / "imagesTs")):
    notes.append(f"imagesTs: {len(unlabelled)} image(s) are left out, there is no labelsTs")
  twice = sorted(set(training.ids) & set(test_ids))
  faults = [
    *training.faults,
    *(f"{name}: image without a label" for name in training.unlabelled.values()),
    *test.faults,
  ]
  faults += [f"{case_id}: in imagesTr and in imagesTs; a case belongs to one split" for case_id in twice]
  pairs = [pair for pair in (*training.pairs, *test.pairs) if pair.id not in twice]
  ids = sorted({*training.ids, *test_ids})
  if not ids:
    raise UserError(f"{source}: no .nii or .nii.gz file in imagesTr or labelsTr")
  return RawDataset(tuple(pairs), classes, tuple(ids), test_ids, tuple(faults), tuple(notes))


def find_by_globs(
  source: pathlib.Path, image_glob: str, label_glob: str, classes: tuple[str, ...] | None = None
) -> RawDataset:
  """Finds cases by the names of their files: the text that `*` matches is the case's id, and equal ids pair.

  Several stars are joined by "_" and path separators in a match become "_", so that `*/image_*.nii.gz` makes
  `train/image_A.nii.gz` the case `train_A`. A file that both patterns match belongs to the one with more literal text
  (`*.nii.gz` and `*_seg.nii.gz` tell images from labels). Files whose name begins with a dot are ignored.

  Args:
    source: the folder below which to look.
    image_glob: pattern of the images, relative to `source`; `**` stands for any folders.
    label_glob: pattern of the labels.
    classes: class names by id; None takes them from `source/dataset.json`.

  Returns:
    The dataset.

  Raises:
    UserError: a pattern is unusable or matches nothing, or the class names are not known.
  """
  images, labels = _glob(source, image_glob, "--image_glob"), _glob(source, label_glob, "--label_glob")
  images_give_way = _literals(label_glob) >= _literals(image_glob)
  for path in images.keys() & labels.keys():
    del (images if images_give_way else labels)[path]
  for matches, flag, pattern in ((images, "--image_glob", image_glob), (labels, "--label_glob", label_glob)):
    if not matches:
      raise UserError(f"{source}: no file matches {flag}={pattern}")
  if classes is None:
    description = source / _DESCRIPTION
    if not description.is_file():
      raise UserError(
        "which classes do the labels have? Give --class_names=a,b,c (without the background) or "
        f"--num_classes=N (with it); {source} has no {_DESCRIPTION}"
      )
    classes = parse_labels(read_json(description).get("labels"), description)
  found = _pair_up(source, _by_id(images), _by_id(labels))
  faults = [*found.faults, *(f"{name}: image without a label" for name in found.unlabelled.values())]
  return RawDataset(found.pairs, classes, found.ids, (), tuple(faults))


@dataclasses.dataclass(frozen=True)
class _Found:
  """Cases of one pair of folders or patterns; `unlabelled` has images without labels by id, `ids` holds theirs too."""

  pairs: tuple[Pair, ...] = ()
  ids: tuple[str, ...] = ()
  faults: tuple[str, ...] = ()
  unlabelled: dict[str, str] = dataclasses.field(default_factory=dict)


def _pair_up(
  source: pathlib.Path, images: dict[str, list[pathlib.Path]], labels: dict[str, list[pathlib.Path]]
) -> _Found:
  pairs, faults, unlabelled = [], [], {}
  ids = sorted({*images, *labels})
  for case_id in ids:
    image_files, label_files = images.get(case_id, []), labels.get(case_id, [])
    if not case_id:
      faults += [f"{relative(path, source)}: the * matches nothing here" for path in (*image_files, *label_files)]
      continue
    faults += [
      f"{listed(relative(path, source) for path in files)}: {len(files)} {what}s of one case, {case_id!r}"
      for files, what in ((image_files, "image"), (label_files, "label"))
      if len(files) > 1
    ]
    if not label_files:
      unlabelled[case_id] = relative(image_files[0], source)
    elif not image_files:
      faults += [f"{relative(path, source)}: label without an image (case {case_id!r})" for path in label_files]
    elif len(image_files) == len(label_files) == 1:
      pairs.append(Pair(case_id, image_files[0], label_files[0]))
  return _Found(tuple(pairs), tuple(ids), tuple(faults), unlabelled)


def _find_folder_pair(source: pathlib.Path, image_folder: str, label_folder: str) -> _Found:
  labels = _by_id({path: _stem(path) for path in _nifti_files(source / label_folder)})
  stems = {path: _stem(path) for path in _nifti_files(source / image_folder)}
  bases = {path: _without_channel(stem, labels) for path, stem in stems.items()}
  channels = sorted({stems[path].rsplit("_", 1)[1] for path, base in bases.items() if base != stems[path]} - {"0000"})
  if channels:
    raise UserError(
      f"{source / image_folder}: images of several channels (_{channels[0]} beside _0000); only one is supported: "
      "keep the files of one channel, named _0000"
    )
  return _pair_up(source, _by_id(bases), labels)


def _without_channel(stem: str, labels: dict[str, Any]) -> str:
  """`case_0000` -> `case` where that is a label's name; a case may itself be called `scan_0001`."""
  match = _CHANNEL_SUFFIX.fullmatch(stem)
  return match[1] if match and stem not in labels and match[1] in labels else stem


def _nifti_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Entries named .nii or .nii.gz, folders so named included (reading reports them), without macOS's `._*` files."""
  entries = sorted(folder.iterdir()) if folder.is_dir() else []
  return [path for path in entries if path.name.endswith(_EXTENSIONS) and not path.name.startswith(".")]


def _stem(path: pathlib.Path) -> str:
  return path.name.removesuffix(".gz").removesuffix(".nii")


def _by_id(ids: dict[pathlib.Path, str]) -> dict[str, list[pathlib.Path]]:
  return {
    case_id: [path for _, path in group]
    for case_id, group in itertools.groupby(
      sorted((case_id, path) for path, case_id in ids.items()), key=lambda item: item[0]
    )
  }


def _glob(source: pathlib.Path, pattern: str, flag: str) -> dict[pathlib.Path, str]:
  """The files that match, each with its case id."""
  if pathlib.PurePath(pattern).is_absolute() or "*" not in pattern:
    raise UserError(f"{flag}={pattern}: give a pattern relative to --source, with a * where the case's name stands")
  try:
    regex = re.compile(_glob_regex(pattern))
    paths = [path for path in source.glob(pattern) if not path.name.startswith(".")]
  except (ValueError, re.error) as error:
    raise UserError(f"{flag}={pattern}: {error}") from error
  matches = {path: regex.fullmatch(relative(path, source)) for path in paths}
  return {
    path: "_".join(text.replace("/", "_").replace("\\", "_") for text in match.groups() if text)
    for path, match in matches.items()
    if match
  }


def _glob_regex(pattern: str) -> str:
  """A regular expression with one group for each `*` or `**` of the pattern."""
  pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pathlib.PurePath(pattern).as_posix())
  meaning = {"**/": "(?:(.+)/)?", "**": "(.*)", "*": "([^/]*)", "?": "[^/]"}
  return "".join(
    meaning.get(piece) or (piece.replace("[!", "[^") if piece.startswith("[") else re.escape(piece)) for piece in pieces
  )


def _literals(pattern: str) -> int:
  return len(re.sub(r"[*?]", "", pattern))


def relative(path: pathlib.Path, source: pathlib.Path) -> str:
  """A path as the user should read it: relative to the source folder where it lies below it."""
  return path.relative_to(source).as_posix() if path.is_relative_to(source) else str(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file that holds one JSON object; raises UserError if it does not."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path}: cannot be read as JSON ({error})") from error
  if not isinstance(content, dict):
    raise UserError(f"{path}: holds a JSON {type(content).__name__}, not an object")
  return content


def parse_labels(labels: Any, path: pathlib.Path) -> tuple[str, ...]:
  """Class names by id from the `labels` of a `dataset.json`.

  Args:
    labels: {"0": "background", "1": "x"} (Medical Segmentation Decathlon) or {"background": 0, "x": 1} (nnU-Net v2).
    path: the file, for messages.

  Returns:
    The names; ids run from 0 without gaps.

  Raises:
    UserError: anything else, regions (lists of ids) and nnU-Net's "ignore" label among it.
  """
  if not isinstance(labels, dict) or not labels:
    raise UserError(f'{path}: no "labels"; they name the classes, for instance {{"0": "background", "1": "liver"}}')
  if "ignore" in labels or "ignore" in labels.values():
    raise UserError(f'{path}: an "ignore" label is not supported; every voxel needs a class')
  if any(isinstance(value, list) for value in labels.values()):
    raise UserError(f"{path}: region-based labels (lists of ids) are not supported; give each class one id")
  msd_style = all(key.isdecimal() for key in labels)
  by_id = {}
  for key, value in labels.items():
    class_id, name = (key, value) if msd_style else (value, key)
    if not str(class_id).isdecimal() or not isinstance(name, str):
      raise UserError(f"{path}: label {key!r}: {value!r} is neither id: name nor name: id")
    by_id.setdefault(int(class_id), []).append(name)
  repeated = {class_id: names for class_id, names in by_id.items() if len(names) > 1}
  if repeated or sorted(by_id) != list(range(len(by_id))):
    raise UserError(f"{path}: label ids must run from 0 without gaps, each once; they are {sorted(labels.items())}")
  return check_classes(tuple(by_id[class_id][0] for class_id in range(len(by_id))), str(path))


def requested_classes(class_names: Sequence[str] | None, num_classes: int | None) -> tuple[str, ...] | None:
  """Class names by id from `--class_names` (foreground only) or `--num_classes` (background counted); None if neither.

  Raises:
    UserError: the two disagree, or the names are unusable.
  """
  if class_names is None and num_classes is None:
    return None
  if num_classes is not None and num_classes < 2:
    raise UserError(f"--num_classes={num_classes}: at least 2, the background and a class")
  if class_names is None:
    return check_classes((BACKGROUND, *(f"class_{index}" for index in range(1, num_classes))), "--num_classes")
  if BACKGROUND in class_names:
    raise UserError(f"--class_names: leave {BACKGROUND!r} out, it is implied as class 0")
  if num_classes is not None and num_classes != len(class_names) + 1:
    raise UserError(
      f"--class_names names {len(class_names)} classes and the background; --num_classes={num_classes} disagrees"
    )
  return check_classes((BACKGROUND, *class_names), "--class_names")


def check_classes(classes: tuple[str, ...], where: str) -> tuple[str, ...]:
  """Returns the class names; raises UserError unless they are 2 to 256 different, non-empty ones."""
  if not 2 <= len(classes) <= MAX_CLASSES:
    raise UserError(f"{where}: {len(classes)} classes with the background; 2 to {MAX_CLASSES} are possible")
  if not all(name.strip() for name in classes) or len(set(classes)) < len(classes):
    raise UserError(f"{where}: class names must be different and not empty, they are {', '.join(classes)}")
  return classes


def listed(names: Iterable[str], limit: int = 8) -> str:
  """The first names, separated by commas, and how many more there are."""
  names = list(names)
  return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
