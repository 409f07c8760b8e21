"""What the published datasets of the paper are, and what was published on them.

Facts that weights trained on these datasets, and tables about them, rest on.
"""

import dataclasses

from selfreg_jax.data.manifest import DatasetInfo, Intensity

SYNAPSE = DatasetInfo(
  kind="volume",
  classes=(
    "background",
    "aorta",
    "gallbladder",
    "left kidney",
    "right kidney",
    "liver",
    "pancreas",
    "spleen",
    "stomach",
  ),
  channels=1,
  intensity=Intensity("window", -125.0, 275.0),  # HU
  orientation="stored",
  axis=2,
)

ACDC = DatasetInfo(
  kind="volume",
  classes=("background", "right ventricle", "myocardium", "left ventricle"),
  channels=1,
  intensity=Intensity("minmax"),
  orientation="stored",
  axis=2,
)

GLAS = DatasetInfo(
  kind="image",
  classes=("background", "gland"),
  channels=3,
  intensity=Intensity("byte"),
  orientation="stored",
  axis=2,
)

MONUSEG = DatasetInfo(
  kind="image",
  classes=("background", "nucleus"),
  channels=3,
  intensity=Intensity("byte"),
  orientation="stored",
  axis=2,
)

PUBLISHED: dict[str, DatasetInfo] = {"synapse": SYNAPSE, "acdc": ACDC, "glas": GLAS, "monuseg": MONUSEG}


@dataclasses.dataclass(frozen=True)
class PublishedScore:
  """A published mean over the test cases of a dataset, measured in the paper protocol.

  Attributes:
    method: the network and what was added to it.
    dice: mean Dice in percent.
    hd95: mean 95th percentile of the surface distances, in voxels; None where none was published.
    note: where the number comes from, if not from the table of the SelfReg-UNet paper.
  """

  method: str
  dice: float
  hd95: float | None = None
  note: str = ""


SCORES_SOURCE = "Zhu et al., SelfReg-UNet, MICCAI 2024, doi 10.1007/978-3-031-72111-3_56"

PUBLISHED_SCORES: dict[str, tuple[PublishedScore, ...]] = {
  "synapse": (
    PublishedScore("UNet", 76.85, 39.70),
    PublishedScore("TransUNet", 77.48, 31.69),
    PublishedScore("Swin-Unet", 79.13, 21.55, note="independent re-runs: 76.0 to 78.0"),
    PublishedScore("UNet + SCR + IFD", 80.34, note="from the gain of 3.49 that the text states"),
    PublishedScore("SelfReg-UNet", 80.54),
  ),
  "acdc": (
    PublishedScore("Swin-Unet", 90.00),
    PublishedScore("SelfReg-UNet", 91.49),
    PublishedScore("nnU-Net", 91.61),
  ),
  "glas": (
    PublishedScore("UNet", 85.45),
    PublishedScore("UNet + IFD", 89.38, note="ablation"),
    PublishedScore("UCTransNet", 90.18),
    PublishedScore("UNet + SCR", 90.66, note="ablation"),
    PublishedScore("UNet + SCR + IFD", 90.93, note="ablation"),
    PublishedScore("SelfReg-UNet", 91.62, note="an independent re-run got 89.30"),
  ),
  "monuseg": (
    PublishedScore("UNet", 76.45, note="others measured 78.23"),
    PublishedScore("UNet + IFD", 79.38, note="ablation"),
    PublishedScore("UNet + SCR", 79.92, note="ablation"),
    PublishedScore("UNet + SCR + IFD", 80.18, note="the paper's SelfReg-UNet"),
  ),
}
