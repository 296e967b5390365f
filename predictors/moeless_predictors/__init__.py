"""Predict the load of each expert in the layers and steps to come, with scikit-learn's estimator conventions.

Needs numpy, scikit-learn, numba and safetensors only, so that simulator, controller and a notebook can use it without
torch; the gate predictor alone needs that. docs/predictors.md says which predictor is for what.
"""

__version__ = "0.1.0"
