"""dstrain: train small encoders on DeepSpeed, search them with Ray Tune, compare them in MLflow.

Nothing heavy is imported here, so that `--help` and a misspelt key are answered at once.
"""

__version__ = "0.1.0"
