"""Made-up archives in the layouts of the published datasets, small and without symmetry, for tests."""

import h5py
import nibabel as nib
import numpy as np
from PIL import Image

CT_SHAPE = (10, 8, 5)
CT_AFFINE = np.array([[-0.8, 0, 0, 90], [0, 0, 3.0, -40], [0, 0.9, 0, 10], [0, 0, 0, 1.0]])  # x to the left, y up
ORGANS_8_OF_13 = {8: 1, 4: 2, 3: 3, 2: 4, 6: 5, 11: 6, 1: 7, 7: 8}  # METHOD's two lists, put together by hand


def ct_case(number):
  """Image in HU and labels of 13 organs, (x, y, z), different for each number."""
  rng = np.random.default_rng(number)
  image = rng.integers(-400, 600, CT_SHAPE).astype(np.int16)
  label = rng.integers(0, 14, CT_SHAPE).astype(np.uint8)
  return image, label


def eight_organs(label):
  reduced = np.zeros_like(label)
  for raw, organ in ORGANS_8_OF_13.items():
    reduced[label == raw] = organ
  return reduced


def write_btcv(folder, numbers, reduce=lambda label: label):
  """img and label as the challenge's archive has them."""
  for kind in ("img", "label"):
    (folder / kind).mkdir(parents=True)
  for number in numbers:
    image, label = ct_case(number)
    nib.save(nib.Nifti1Image(image, CT_AFFINE), folder / f"img/img{number:04d}.nii.gz")
    nib.save(nib.Nifti1Image(reduce(label), CT_AFFINE), folder / f"label/label{number:04d}.nii.gz")


def write_transunet_pack(folder, train, test):
  """The same cases as TransUNet's preparation stores them: transposed to (z, x, y), window, 8 organs."""
  for kind in ("train_npz", "test_vol_h5"):
    (folder / kind).mkdir(parents=True)
  for number in (*train, *test):
    image, label = ct_case(number)
    image = ((np.clip(image, -125, 275) + 125) / 400).astype(np.float32).transpose(2, 0, 1)
    label = eight_organs(label).astype(np.float32).transpose(2, 0, 1)
    if number in test:
      with h5py.File(folder / f"test_vol_h5/case{number:04d}.npy.h5", "w") as file:
        file["image"], file["label"] = image, label
      continue
    for index, (image_slice, label_slice) in enumerate(zip(image, label, strict=True)):
      np.savez(folder / f"train_npz/case{number:04d}_slice{index:03d}.npz", image=image_slice, label=label_slice)


def mr_case(patient, frame):
  """Image and labels (x, y, z) of one patient at one frame; the number of slices differs between patients."""
  rng = np.random.default_rng(100 * patient + frame)
  shape = (9, 7, 3 + patient % 2)
  return rng.integers(0, 900 + patient, shape).astype(np.int16), rng.integers(0, 4, shape).astype(np.uint8)


MR_FRAMES = {"ED": 1, "ES": 12}
MR_AFFINE = np.diag([-1.5, -1.4, 10.0, 1.0])


def write_acdc(folder, patients):
  """The challenge's folders of patients."""
  for patient in patients:
    name = f"patient{patient:03d}"
    (folder / name).mkdir(parents=True)
    lines = [*(f"{phase}: {frame}" for phase, frame in MR_FRAMES.items()), "Group: DCM", "Height: 184.0", "NbFrame: 30"]
    (folder / name / "Info.cfg").write_text("\n".join(lines))
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 3), np.int16), MR_AFFINE), folder / name / f"{name}_4d.nii.gz")
    for frame in MR_FRAMES.values():
      image, label = mr_case(patient, frame)
      nib.save(nib.Nifti1Image(image, MR_AFFINE), folder / name / f"{name}_frame{frame:02d}.nii.gz")
      nib.save(nib.Nifti1Image(label, MR_AFFINE), folder / name / f"{name}_frame{frame:02d}_gt.nii.gz")


def write_acdc_pack(folder, train, valid, test):
  """The same cases as the pack in circulation stores them: (z, x, y), each volume to [0, 1]."""
  for split, patients in (("train", train), ("valid", valid), ("test", test)):
    (folder / split).mkdir(parents=True)
    for patient in patients:
      for phase, frame in MR_FRAMES.items():
        image, label = (array.transpose(2, 0, 1) for array in mr_case(patient, frame))
        image = (image - image.min()) / (image.max() - image.min())
        if split == "test":
          np.savez(folder / split / f"case_{patient:03d}_volume_{phase}.npz", img=image, label=label)
          continue
        for index, (image_slice, label_slice) in enumerate(zip(image, label, strict=True)):
          path = folder / split / f"case_{patient:03d}_slice{phase}_{index}.npz"
          np.savez(path, img=image_slice, label=label_slice)


def tissue(number):
  """An RGB image and a mask that numbers its objects, (rows, columns); sizes differ."""
  rng = np.random.default_rng(number)
  shape = (12 + number % 3, 17)
  mask = np.zeros(shape, np.uint8)
  mask[2:6, 3:9], mask[7:11, 1:4], mask[8:10, 10:16] = 1, 2, 3 + number % 4
  return rng.integers(0, 256, (*shape, 3), np.uint8), mask


def write_picture(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path)


def write_glas(folder, train=4, test_a=2, test_b=1, grades=True):
  """The challenge's flat folder; images 2k and 2k + 1 are of one patient."""
  names = [f"train_{n}" for n in range(1, train + 1)]
  names += [f"testA_{n}" for n in range(1, test_a + 1)] + [f"testB_{n}" for n in range(1, test_b + 1)]
  for number, name in enumerate(names):
    image, mask = tissue(number)
    write_picture(folder / f"{name}.bmp", image)
    write_picture(folder / f"{name}_anno.bmp", mask)
  if grades:
    rows = [f"{name}, {number // 2}, benign, adenomatous" for number, name in enumerate(names)]
    header = "name, patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)"
    (folder / "Grade.csv").write_text("\n".join([header, *rows]) + "\n")
  return names


def write_tree(folder, parts, scale=1, suffix=""):
  """Train_Folder/img and labelcol, and so on, from {folder: {stem: number of `tissue`}}."""
  for part, numbers in parts.items():
    for stem, number in numbers.items():
      image, mask = tissue(number)
      write_picture(folder / part / "img" / f"{stem}.png", image)
      write_picture(
        folder / part / "labelcol" / f"{stem}{suffix}.png", mask if scale == 1 else (mask > 0) * np.uint8(scale)
      )


def boxes(mask):
  """Corner points of the rectangles that `tissue` draws."""
  outlines = []
  for number in sorted({*mask.ravel().tolist()} - {0}):
    rows, columns = np.nonzero(mask == number)
    left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    outlines.append([(left, top), (right, top), (right, bottom), (left, bottom)])
  return outlines


def write_outlines(path, outlines):
  """An ImageScope file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  regions = "".join(
    f'<Region Id="{n}"><Vertices>' + "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in outline) + "</Vertices></Region>"
    for n, outline in enumerate(outlines, 1)
  )
  path.write_text(f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>")


def write_monuseg(folder, train, test):
  """Both archives of the challenge, from {barcode: number of `tissue`}."""
  training, testing = folder / "MoNuSeg 2018 Training Data", folder / "MoNuSegTestData"
  for name, number in train.items():
    image, mask = tissue(number)
    write_picture(training / "Tissue Images" / f"{name}.tif", image)
    write_outlines(training / "Annotations" / f"{name}.xml", boxes(mask))
  for name, number in test.items():
    image, mask = tissue(number)
    write_picture(testing / f"{name}.tif", image)
    write_outlines(testing / f"{name}.xml", boxes(mask))
