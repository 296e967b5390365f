"""Names of the formats that can be imported, and of published files that hold no trace.

Called by traces.importing for a file of no known format, so that its error says what the file is and what is known.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from moeless_predictors.traces.container import TraceFormatError

KNOWN_FORMATS = (
    "routing NPZ (experts or ids; sequence_lengths, seq_len or sequence_starts)",
    "routing CSV (sequence, position, layer, expert_0.., weight_0..)",
    "ESFT expert logs (a folder of expert_weights_<layer>.txt)",
    "arrivals CSV of Azure (TIMESTAMP, ContextTokens, GeneratedTokens), of BurstGPT (Timestamp, Request tokens, "
    "Response tokens), of ServeGen (timestamp, input_tokens, output_tokens) or plain (arrival_s, prompt_tokens, "
    "output_tokens)",
    "arrivals JSON lines of Mooncake (timestamp, input_length, output_length)",
)

_SERVEGEN_RATES = re.compile(r"[\d.]+,[\d.e+-]+,[\d.e+-]+,[A-Za-z]*,[^,]*,[^,]*")
_PARQUET = b"PAR1"


def unknown_format(path: Path, found: str) -> TraceFormatError:
    """The error for a file of no known format.

    Args:
        found: its columns, arrays or keys.
    """
    return TraceFormatError(f"{path}: format unknown: got {found}; known formats: {'; '.join(KNOWN_FORMATS)}")


def refuse_without_trace(path: Path, first_bytes: bytes, first_line: str) -> None:
    """Raises TraceFormatError for a published file that is recognised but holds neither routing nor arrivals."""
    if first_bytes.startswith(_PARQUET):
        raise TraceFormatError(f"{path}: Parquet cannot be read: convert it to a routing NPZ or CSV")
    if _SERVEGEN_RATES.fullmatch(first_line.strip()):
        raise TraceFormatError(
            f"{path}: holds a ServeGen client's rates by window, no requests: generate a workload with ServeGen "
            "and import the CSV that its save_requests_to_csv writes"
        )
    match _first_object(first_line):
        case {"token_scores": _} | {"gate_scores": _}:
            fault = "holds ESFT's scores by expert, no tokens: import its folder of expert_weights_<layer>.txt"
        case {"experts": _, "shared_experts": _}:
            fault = "holds ESFT's choice of experts to train, no tokens: import the expert logs that it was made from"
        case {"timestamp": _}:
            return
        case {"request_id": _, "input_length": _}:
            fault = "holds a ServeGen offline batch, whose requests have no arrival times"
        case dict() as entry if entry and all(key.isdecimal() for key in entry):
            fault = (
                "holds a ServeGen client's length distributions, no requests: generate a workload with ServeGen and "
                "import the CSV that its save_requests_to_csv writes"
            )
        case _:
            return
    raise TraceFormatError(f"{path}: {fault}")


def _first_object(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or nested too deeply
        return None
