"""Made-up evaluations: what `write_report` is given after `eval.py` has scored a dataset."""

import numpy as np
from scipy import ndimage

from selfreg_jax.data import manifest as manifests
from selfreg_jax.evaluation import protocols


def make_case(case_id, shape, *, spacing=(1.0, 1.0, 1.0), axcodes=None):
  return manifests.Case(
    id=case_id,
    image=f"cases/{case_id}.image.npy",
    label=f"cases/{case_id}.label.npy",
    shape=shape,
    spacing=spacing,
    axcodes=axcodes,
    affine=None,
    file_shape=shape[1:3],
    header=None,
    group=case_id,
    sources={},
    checksums={},
    class_voxels=(),
    foreground_slices=(),
  )


def make_manifest(cases, **change):
  fields = {
    "dataset": "msd",
    "kind": "volume",
    "unit": "mm",
    "classes": ("background", "disc", "ring"),
    "channels": 1,
    "intensity": manifests.Intensity("window", -100.0, 100.0),
    "dtype": "uint16",
    "scale": 1 / 65535,
    "orientation": "ras",
    "axis": 2,
    "splits": {"train": (), "val": (), "test": tuple(case.id for case in cases)},
    "folds": (),
    "source": "raw",
  }
  return manifests.Manifest(cases={case.id: case for case in cases}, **fields | change)


def evaluation(manifest, load_case, *, split="test", config=None, options=None):
  """The arguments of `write_report` besides the path: every case is loaded and scored."""
  scores = {protocol: {} for protocol in protocols.PROTOCOLS}
  for case in manifest.cases.values():
    _, truth, prediction = load_case(case.id)
    spacing = case.spacing
    if manifest.kind == "image":
      truth, prediction, spacing = truth[0], prediction[0], spacing[1:]
    tables = protocols.evaluate_protocols(prediction, truth, num_classes=manifest.num_classes, spacing=spacing)
    for protocol, table in tables.items():
      scores[protocol][case.id] = table
  summary = {
    "protocols": {
      name: protocols.summarize(table, manifest.classes, protocol=name, resamples=100) for name, table in scores.items()
    },
    "cases": len(manifest.cases),
    "data": {"directory": "data/made_up", "split": split, "fingerprint": manifest.fingerprint()},
    "config": config or {"optimizer": {"learning_rate": 0.05}},
    "checkpoint": {"step": 900, "val_dice": 0.8312},
    "versions": {"python": "3.11", "jax": "0.10.2"},
  }
  if options is not None:
    summary["options"] = options
  ids = list(manifest.cases)
  return {"summary": summary, "scores": scores, "manifest": manifest, "case_ids": ids, "load_case": load_case}


def discs(shape, rng, *, errors):
  """A disc (class 1) in a ring (class 2) that grow and shrink along the slices, and a shifted prediction of them."""
  slices, rows, columns = shape
  y, x = np.mgrid[:rows, :columns]
  center = rng.uniform(0.42, 0.58, 2) * (rows, columns)
  distance = np.hypot(y - center[0], x - center[1])
  middle = np.linspace(-1.2, 1.2, slices) if slices > 1 else np.zeros(1)
  radius = np.sqrt(np.clip(1 - middle**2, 0, None))[:, None, None] * min(rows, columns) / 3
  truth = np.where(distance < 0.6 * radius, 1, np.where(distance < radius, 2, 0)).astype(np.uint8)
  prediction = np.roll(truth, errors, axis=(1, 2))
  return truth, prediction


def images_dataset(count=6, *, shape=(60, 90), dataset="glas", **options):
  """RGB photographs of glands, as it were; the later ones predicted worse."""
  rng = np.random.default_rng(1)
  arrays = {}
  for number in range(count):
    truth, prediction = discs((1, *shape), rng, errors=(number, 2 * number))
    truth, prediction = (truth > 0).astype(np.uint8), (prediction > 0).astype(np.uint8)
    tissue = ndimage.gaussian_filter(rng.normal(size=(1, *shape, 3)), (0, 2, 2, 0))
    colors = np.where(truth[..., None] > 0, (150, 80, 160), (225, 170, 200)) + 120 * tissue
    arrays[f"image_{number}"] = (np.clip(colors, 0, 255).astype(np.uint8), truth, prediction)
  cases = [make_case(case_id, image.shape) for case_id, (image, _, _) in arrays.items()]
  change = {"kind": "image", "unit": "pixel", "classes": ("background", "gland"), "channels": 3, "dtype": "uint8"}
  intensity = manifests.Intensity("byte")
  manifest = make_manifest(cases, dataset=dataset, intensity=intensity, scale=1 / 255, orientation="stored", **change)
  return evaluation(manifest, arrays.__getitem__, **options)


def volumes_dataset(count=3, *, shape=(9, 40, 30), axcodes=("S", "R", "A"), spacing=(5.0, 1.0, 2.0), **options):
  """Volumes of a disc in a ring, of noise that WebP cannot make small; the later ones predicted worse."""
  arrays = {}

  def load_case(case_id):
    if case_id not in arrays:
      number = int(case_id.split("_")[1])
      rng = np.random.default_rng(number)
      truth, prediction = discs(shape, rng, errors=(number % 7, number % 5))
      image = rng.integers(0, 65536, (*shape, 1)).astype(np.uint16)
      arrays.clear()
      arrays[case_id] = (image, truth, prediction)
    return arrays[case_id]

  cases = [make_case(f"case_{n}", (*shape, 1), spacing=spacing, axcodes=axcodes) for n in range(count)]
  return evaluation(make_manifest(cases), load_case, **options)
