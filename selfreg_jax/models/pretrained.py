"""PyTorch weights to a workdir that eval.py and config.init_from take, and back to a file that PyTorch loads.

python -m selfreg_jax.models.pretrained --config=configs/NAME.py [--config.field=value ...] INPUT WORKDIR
python -m selfreg_jax.models.pretrained --export=FILE.safetensors [--checkpoint=best|latest] WORKDIR

INPUT is a .pth, .safetensors or .npz file with the authors' names. What prediction must know of the data (classes,
intensities, orientation) are the published facts of config.data.name, else those of the prepared dataset in
config.data.dir.

An entry point only: it stands above training, whatever its folder says.
"""

import functools
import pathlib
import time

from absl import app, flags
from ml_collections import config_flags

from selfreg_jax.errors import UserError, check_config_file, parse_flags, run_command

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file that describes the network of INPUT.")
_EXPORT = flags.DEFINE_string("export", None, "Write the weights of WORKDIR to this .safetensors or .npz file.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "best", ["best", "latest"], "With --export: which checkpoint.")


def main(argv: list[str]) -> int:
  """Converts or exports as the parsed flags say; returns the exit code."""
  names = argv[1:]
  return run_command(lambda: _export(names) if _EXPORT.value is not None else _convert(names))


def _convert(names: list[str]) -> None:
  if len(names) != 2 or not all(names):
    raise UserError("give INPUT, a file of weights, and WORKDIR, the folder to write")
  if _CONFIG.value is None:
    raise UserError("--config names the config file that describes the network, such as configs/synapse_swin_unet.py")
  check_config_file(_CONFIG)
  source, workdir = names
  if not pathlib.Path(source).exists():
    raise UserError(f"{source}: no such file")
  # Imported after the flags were checked: a wrong flag is told at once, not after JAX has started.
  from selfreg_jax.training import interchange

  start = time.monotonic()
  for line in interchange.write_workdir(source, workdir, _CONFIG.value):
    print(line)
  print(f"done in {time.monotonic() - start:.0f} s; next:")
  print(f"  python eval.py --workdir={workdir} --input=FOLDER --output=FOLDER   (predict)")
  print(f"  python eval.py --workdir={workdir} --data=PREPARED                  (score)")
  print(f"  python train.py --config=... --config.init_from={workdir} --workdir=OTHER")


def _export(names: list[str]) -> None:
  if len(names) != 1 or not all(names):
    raise UserError("--export takes one argument, WORKDIR")
  if _CONFIG.value is not None:
    raise UserError("--export takes the network from the workdir; leave --config out")
  from selfreg_jax.training import interchange

  for line in interchange.export(names[0], _EXPORT.value, checkpoint=_CHECKPOINT.value):
    print(line)


if __name__ == "__main__":
  app.run(main, flags_parser=functools.partial(parse_flags, most_arguments=2))
