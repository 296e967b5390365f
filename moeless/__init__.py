"""Serve Mixture-of-Experts language models with serverless experts."""

__version__ = "0.1.0"
