"""Every knob with its default, unit and range: see `selfreg_jax/config.py`, where they are written down and checked.

The defaults are the authors' settings for their UNet on Synapse. Other files in this folder start from them and change
what their experiment needs.

  python train.py --config=configs/default.py --config.data.dir=DATA --workdir=RUN
"""

from selfreg_jax.config import base_config as get_config

__all__ = ["get_config"]
