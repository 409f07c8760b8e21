"""What each dataset is: which files make a case, and the names of the classes.

Folders of one's own are here; the four published datasets have modules of their own that say the same of them. Nothing
here opens an image. Faults of single files (a label without its image, a case found twice) are collected in
`RawDataset.faults`, so that they can be reported together with what reading the files brings up; a mistake in the
request or in `dataset.json` is a UserError at once.
"""

import dataclasses
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selfreg_jax.data import images, json_files
from selfreg_jax.data.cases import LabelRule
from selfreg_jax.data.readers import ImageCase, NiftiCase, Reader
from selfreg_jax.errors import UserError

DATASETS = ("synapse", "acdc", "glas", "monuseg", "msd", "phantom")
BACKGROUND = "background"
MAX_CLASSES = 256  # labels are stored as uint8

_EXTENSIONS = (".nii.gz", ".nii")
CHANNEL_SUFFIX = re.compile(r"(.+)_(\d{4})")  # nnU-Net's case_0000.nii.gz is channel 0 of case
_DESCRIPTION = "dataset.json"
_MOST_JSON_BYTES = 1 << 25  # of descriptions and lists of cases; a million ids take 20 MB
_DEEPEST = 5  # folders between --source and the files of an archive that was unpacked with all its own folders


@dataclasses.dataclass(frozen=True)
class RawCase:
  """The files of a case.

  Attributes:
    id: name of the case, unique in the dataset and usable as a file name.
    reader: the files, and how they are read.
    group: what must not be parted by a split (the patient); None where nothing is known.
  """

  id: str
  reader: Reader
  group: str | None = None


@dataclasses.dataclass(frozen=True)
class RawDataset:
  """What a source folder holds.

  Attributes:
    cases: the complete cases, by id.
    classes: class names by id; the first is the background.
    labels: what the values of label files mean.
    ids: the ids of all cases, those in `faults` included.
    val_ids: ids of the cases that the folder itself marks as validation cases.
    test_ids: ids of the cases that the folder itself, or the published split, marks as test cases.
    faults: one line for each case whose files do not pair.
    notes: what is left out on purpose, for the user to know.
    kind: "volume" or "image".
    unit: of the spacings: "mm", "voxel" or "pixel".
    orientation: "ras" or "stored" where the request does not say.
    packed: whether intensities and orientation were settled by whoever made the files.
    channels: of every image; None where only the images tell.
    val_fraction: share of the training cases to draw for validation where the request does not say.
    test_fraction: share of the cases to draw for testing, likewise.
  """

  cases: tuple[RawCase, ...]
  classes: tuple[str, ...]
  labels: LabelRule
  ids: tuple[str, ...]
  val_ids: tuple[str, ...] = ()
  test_ids: tuple[str, ...] = ()
  faults: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()
  kind: str = "volume"
  unit: str = "mm"
  orientation: str = "ras"
  packed: bool = False
  channels: int | None = None
  val_fraction: float = 0.2
  test_fraction: float = 0.0

  @property
  def groups(self) -> dict[str, str]:
    """The group of each id; where nothing is known of a case, it is its own."""
    return {case_id: case_id for case_id in self.ids} | {case.id: case.group or case.id for case in self.cases}


def find_msd(source: pathlib.Path, classes: tuple[str, ...] | None = None) -> RawDataset:
  """Finds the cases of a folder laid out like the Medical Segmentation Decathlon or like nnU-Net's raw datasets.

  `imagesTr` and `labelsTr` hold the cases to train on; where `labelsTs` is present, `imagesTs` and `labelsTs` hold test
  cases. Image names may carry nnU-Net's channel suffixes `_0000`, `_0001`; the Decathlon's images of several channels
  have a fourth axis instead.

  Args:
    source: the folder that holds `dataset.json`.
    classes: class names by id, instead of those in `dataset.json`.

  Returns:
    The dataset.

  Raises:
    UserError: the folder is not laid out that way, is empty, or has labels of a kind not supported.
  """
  path = source / _DESCRIPTION
  if not path.is_file():
    raise UserError(
      f"{source}: no {_DESCRIPTION}. Give the folder that holds {_DESCRIPTION}, imagesTr and labelsTr, or say how the "
      "files are named with --image_glob, --label_glob and --num_classes (or --class_names)"
    )
  description = read_json(path)
  channels = description.get("channel_names", description.get("modality")) or {"0": ""}
  if not isinstance(channels, (dict, list)):
    raise UserError(f'{path}: "channel_names" (or "modality") names the channels, for instance {{"0": "CT"}}')
  classes = classes or parse_labels(description.get("labels"), path)
  training = _find_folder_pair(source, "imagesTr", "labelsTr")
  test = _find_folder_pair(source, "imagesTs", "labelsTs") if (source / "labelsTs").is_dir() else Found()
  test_ids = tuple(case_id for case_id in test.ids if case_id not in test.unlabelled)
  notes = [f"imagesTs: {len(test.unlabelled)} image(s) without a label are left out"] if test.unlabelled else []
  if not (source / "labelsTs").is_dir() and (unlabelled := nifti_files(source / "imagesTs")):
    notes.append(f"imagesTs: {len(unlabelled)} image(s) are left out, there is no labelsTs")
  twice = sorted(set(training.ids) & set(test_ids))
  faults = [
    *training.faults,
    *(f"{name}: image without a label" for name in training.unlabelled.values()),
    *test.faults,
  ]
  faults += [f"{case_id}: in imagesTr and in imagesTs; a case belongs to one split" for case_id in twice]
  found = [case for case in (*training.cases, *test.cases) if case.id not in twice]
  ids = sorted({*training.ids, *test_ids})
  if not ids:
    raise UserError(f"{source}: no .nii or .nii.gz file in imagesTr or labelsTr")
  return RawDataset(
    tuple(found),
    classes,
    LabelRule(len(classes)),
    tuple(ids),
    test_ids=test_ids,
    faults=tuple(faults),
    notes=tuple(notes),
    channels=len(channels),
  )


def names_images(image_glob: str) -> bool:
  """Whether patterns ask for 2-D images (PNG, BMP, TIFF) rather than volumes, by their endings; UserError for both."""
  answers = {pattern.lower().endswith(images.EXTENSIONS) for pattern in _patterns(image_glob)}
  if len(answers) > 1:
    raise UserError(f"--image_glob={image_glob}: the channels of a case are volumes or images, not both")
  return answers.pop()


def _patterns(image_glob: str) -> list[str]:
  return [pattern.strip() for pattern in image_glob.split(",")]


def find_by_globs(
  source: pathlib.Path, image_glob: str, label_glob: str, classes: tuple[str, ...] | None = None
) -> RawDataset:
  """Finds cases by the names of their files: the text that `*` matches is the case's id, and equal ids pair.

  Several stars are joined by "_" and path separators in a match become "_", so that `*/image_*.nii.gz` makes
  `train/image_A.nii.gz` the case `train_A`. A file that several patterns match belongs to the one with the most literal
  text (`*.nii.gz` and `*_seg.nii.gz` tell images from labels). Files whose name begins with a dot are ignored.

  Args:
    source: the folder below which to look.
    image_glob: pattern of the images, relative to `source`; `**` stands for any folders. Several patterns, separated by
      commas, are channels. Their endings tell NIfTI volumes from PNG, BMP and TIFF images.
    label_glob: pattern of the labels.
    classes: class names by id; None takes them from `source/dataset.json`.

  Returns:
    The dataset.

  Raises:
    UserError: a pattern is unusable or matches nothing, or the class names are not known.
  """
  two_dimensional = names_images(image_glob)
  patterns = [*(("--image_glob", pattern) for pattern in _patterns(image_glob)), ("--label_glob", label_glob)]
  matches = _each_file_once([_glob(source, pattern, flag) for flag, pattern in patterns], [p for _, p in patterns])
  for (flag, pattern), matching in zip(patterns, matches, strict=True):
    if not matching:
      raise UserError(f"{source}: no file matches {flag}={pattern}")
  if classes is None:
    description = source / _DESCRIPTION
    if not description.is_file():
      raise UserError(
        "which classes do the labels have? Give --class_names=a,b,c (without the background) or "
        f"--num_classes=N (with it); {source} has no {_DESCRIPTION}"
      )
    classes = parse_labels(read_json(description).get("labels"), description)
  *by_channel, labels = map(by_id, matches)
  found = pair_up(source, by_channel, labels, ImageCase if two_dimensional else NiftiCase)
  faults = [*found.faults, *(f"{name}: image without a label" for name in found.unlabelled.values())]
  what = {"kind": "image", "unit": "pixel", "orientation": "stored"} if two_dimensional else {}
  return RawDataset(found.cases, classes, LabelRule(len(classes)), found.ids, faults=tuple(faults), **what)


def _each_file_once(
  matches: Sequence[dict[pathlib.Path, str]], patterns: Sequence[str]
) -> list[dict[pathlib.Path, str]]:
  """Leaves a file that several patterns match to the one with the most literal text, the last of those."""
  ranks = [(len(re.sub(r"[*?]", "", pattern)), index) for index, pattern in enumerate(patterns)]
  owner: dict[pathlib.Path, tuple[int, int]] = {}
  for rank, matching in zip(ranks, matches, strict=True):
    for path in matching:
      owner[path] = max(rank, owner.get(path, rank))
  return [
    {path: case_id for path, case_id in matching.items() if owner[path] == rank}
    for rank, matching in zip(ranks, matches, strict=True)
  ]


@dataclasses.dataclass(frozen=True)
class Found:
  """Cases of one pair of folders or patterns; `unlabelled` has images without labels by id, `ids` holds theirs too."""

  cases: tuple[RawCase, ...] = ()
  ids: tuple[str, ...] = ()
  faults: tuple[str, ...] = ()
  unlabelled: dict[str, str] = dataclasses.field(default_factory=dict)


def pair_up(
  source: pathlib.Path,
  channels: Sequence[Mapping[str, list[pathlib.Path]]],
  labels: Mapping[str, list[pathlib.Path]],
  reader: type[ImageCase] | type[NiftiCase],
) -> Found:
  """Puts images and labels of equal ids together; what does not come as one label and one image a channel is a fault.

  Args:
    source: folder to which file names in messages are relative.
    channels: the image files by case id, for each channel.
    labels: the label files by case id.
    reader: what reads such a case.

  Returns:
    The cases and the faults.
  """
  found, faults, unlabelled = [], [], {}
  ids = sorted({*labels, *itertools.chain.from_iterable(channels)})
  for case_id in ids:
    images_by_channel, label_files = [files.get(case_id, []) for files in channels], labels.get(case_id, [])
    image_files = list(itertools.chain.from_iterable(images_by_channel))
    if not case_id:
      faults += [f"{relative(path, source)}: the * matches nothing here" for path in (*image_files, *label_files)]
      continue
    faults += [
      f"{listed(relative(path, source) for path in files)}: {len(files)} {what}s of one case, {case_id!r}"
      for files, what in (*((files, "image") for files in images_by_channel), (label_files, "label"))
      if len(files) > 1
    ]
    if not label_files:
      unlabelled[case_id] = relative(image_files[0], source)
    elif not image_files:
      faults += [f"{relative(path, source)}: label without an image (case {case_id!r})" for path in label_files]
    elif missing := [index for index, files in enumerate(images_by_channel) if not files]:
      names = listed(relative(path, source) for path in image_files)
      faults.append(f"{names}: channel(s) {listed(map(str, missing))} of case {case_id!r} are missing")
    elif len(label_files) == 1 and all(len(files) == 1 for files in images_by_channel):
      found.append(RawCase(case_id, reader(tuple(image_files), label_files[0])))
  return Found(tuple(found), tuple(ids), tuple(faults), unlabelled)


def _find_folder_pair(source: pathlib.Path, image_folder: str, label_folder: str) -> Found:
  labels = by_id({path: nifti_stem(path) for path in nifti_files(source / label_folder)})
  channels: dict[int, dict[pathlib.Path, str]] = {0: {}}
  for path in nifti_files(source / image_folder):
    channel, base = _split_channel(nifti_stem(path), labels)
    channels.setdefault(channel, {})[path] = base
  by_channel = [by_id(channels.get(channel, {})) for channel in range(max(channels) + 1)]
  return pair_up(source, by_channel, labels, NiftiCase)


def _split_channel(stem: str, labels: Mapping[str, Any]) -> tuple[int, str]:
  """`case_0001` -> 1, `case` where that is a label's name; a case may itself be called `scan_0001`."""
  match = CHANNEL_SUFFIX.fullmatch(stem)
  return (int(match[2]), match[1]) if match and stem not in labels and match[1] in labels else (0, stem)


def nifti_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Entries named .nii or .nii.gz, folders so named included (reading reports them), without macOS's `._*` files."""
  entries = sorted(folder.iterdir()) if folder.is_dir() else []
  return [path for path in entries if path.name.endswith(_EXTENSIONS) and not path.name.startswith(".")]


def nifti_stem(path: pathlib.Path) -> str:
  """The name without .nii or .nii.gz."""
  return path.name.removesuffix(".gz").removesuffix(".nii")


def by_id(ids: Mapping[pathlib.Path, str]) -> dict[str, list[pathlib.Path]]:
  """Files by the id that each was given, both sorted."""
  return {
    case_id: [path for _, path in group]
    for case_id, group in itertools.groupby(
      sorted((case_id, path) for path, case_id in ids.items()), key=lambda item: item[0]
    )
  }


def folders_below(source: pathlib.Path) -> list[pathlib.Path]:
  """The source folder and those below it, as deep as archives unpack, sorted; hidden ones and macOS's are left out."""
  found = []
  for path, folders, _ in os.walk(source, followlinks=True):
    folder = pathlib.Path(path)
    found.append(folder)
    deepest = len(folder.relative_to(source).parts) >= _DEEPEST
    folders[:] = [] if deepest else sorted(name for name in folders if not name.startswith((".", "__")))
  return found


def numbered(
  source: pathlib.Path, folder: pathlib.Path, ending: str, *patterns: re.Pattern[str]
) -> tuple[list[dict[tuple[str, ...], tuple[pathlib.Path, ...]]], list[str]]:
  """Sorts the files of a pack's folder by what their names say.

  Args:
    source: folder to which file names in messages are relative.
    folder: holds the files; may be missing.
    ending: of the files that must match one of the patterns.
    patterns: of names. The group "slice" is the number of a slice, the others name the case.

  Returns:
    For each pattern the files of each case, in the order of their numbers; and the faults: files of other names, and
    cases that lack a slice or have one twice.
  """
  found = [{} for _ in patterns]
  faults = []
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    if path.name.startswith(".") or not path.name.endswith(ending):
      continue
    matches = [pattern.fullmatch(path.name) for pattern in patterns]
    if not any(matches):
      faults.append(f"{relative(path, source)}: is not named as the files of the pack are")
    for match, by_case in zip(matches, found, strict=True):
      if match:
        parts = match.groupdict()
        number = int(parts.pop("slice", 0))
        by_case.setdefault(tuple(parts.values()), []).append((number, path))
  for case, files in itertools.chain.from_iterable(by_case.items() for by_case in found):
    files.sort()
    numbers = [number for number, _ in files]
    name = f"{relative(folder, source)}: case {' '.join(case)}"
    if missing := sorted({*range(numbers[-1])} - {*numbers}):
      faults.append(f"{name}: slice(s) {listed(map(str, missing))} of {numbers[-1] + 1} are missing")
    if len({*numbers}) < len(numbers):
      faults.append(f"{name}: a slice is there twice ({listed(path.name for _, path in files)})")
  return [{case: tuple(path for _, path in files) for case, files in by_case.items()} for by_case in found], faults


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


def relative(path: pathlib.Path, source: pathlib.Path) -> str:
  """A path as the user should read it: relative to the source folder where it lies below it."""
  return path.relative_to(source).as_posix() if path.is_relative_to(source) else str(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file that holds one JSON object; raises UserError if it does not."""
  try:
    return json_files.load_object(path, _MOST_JSON_BYTES)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error


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
  if not all(name.strip() and name.isprintable() for name in classes) or len(set(classes)) < len(classes):
    raise UserError(f"{where}: class names must be different, printable and not empty, they are {', '.join(classes)}")
  return classes


def listed(names: Iterable[str], limit: int = 8) -> str:
  """The first names, separated by commas, and how many more there are."""
  names = list(names)
  return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
