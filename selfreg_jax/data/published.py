"""What the published datasets of the paper are: facts that weights trained on them, and tables about them, rest on."""

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
