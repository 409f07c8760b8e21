"""The training loop: `train_and_evaluate(config, workdir)` is all that `train.py` calls."""
