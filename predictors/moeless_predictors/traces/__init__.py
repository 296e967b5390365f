"""Traces: which experts each token went to (routing), and when requests came (arrivals). docs/traces.md.

Needs numpy and safetensors; traces.statistics scikit-learn, and the heat map (traces.plots) matplotlib.
"""

from moeless_predictors.traces.arrivals import ArrivalTrace
from moeless_predictors.traces.container import TraceFormatError, kind_of
from moeless_predictors.traces.importing import Imported, import_trace
from moeless_predictors.traces.importing_routing import ImportOptions
from moeless_predictors.traces.routing import DECODE, PREFILL, RoutingTrace, TraceMetadata, concat
from moeless_predictors.traces.synthetic import synthetic_trace

__all__ = [
    "DECODE",
    "PREFILL",
    "ArrivalTrace",
    "ImportOptions",
    "Imported",
    "RoutingTrace",
    "TraceFormatError",
    "TraceMetadata",
    "concat",
    "import_trace",
    "kind_of",
    "synthetic_trace",
]
