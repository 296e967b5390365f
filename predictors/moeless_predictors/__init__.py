"""Predict the load of each expert in the layers and steps to come, with scikit-learn's estimator conventions.

Needs numpy and scikit-learn only, so that the simulator, the controller and a notebook can use it without torch.
No predictor is here yet.
"""

__version__ = "0.1.0"
