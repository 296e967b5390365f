"""Traces: which experts each token went to (routing), and when requests came (arrivals). docs/traces.md.

Needs numpy and safetensors; the heat map (traces.plots) matplotlib.
"""

from moeless_predictors.traces.container import TraceFormatError, kind_of
from moeless_predictors.traces.routing import DECODE, PREFILL, RoutingTrace, TraceMetadata, concat
from moeless_predictors.traces.synthetic import synthetic_trace

__all__ = [
    "DECODE",
    "PREFILL",
    "RoutingTrace",
    "TraceFormatError",
    "TraceMetadata",
    "concat",
    "kind_of",
    "synthetic_trace",
]
