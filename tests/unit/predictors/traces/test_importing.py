"""Files of others become traces by what is in them, or are refused with the line or row of the fault."""

from __future__ import annotations

import gzip
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeless_predictors.traces import (
    DECODE,
    PREFILL,
    ArrivalTrace,
    ImportOptions,
    RoutingTrace,
    TraceFormatError,
    import_trace,
    synthetic_trace,
)

ROUTING_CSV = """sequence,position,layer,expert_0,expert_1,weight_0,weight_1
a,0,0,1,0,0.75,0.25
a,0,1,2,3,0.5,0.5
a,1,0,0,3,0.5,0.5
a,1,1,3,1,1.0,0.0
b,7,0,2,1,0.5,0.5
b,7,1,0,1,0.5,0.5
"""
AZURE_CSV = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109"
)
MOONCAKE = [
    {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 1500, "input_length": 600, "output_length": 6, "hash_ids": [0, 2]},
]


def as_routing(path: Path, options: ImportOptions | None = None) -> RoutingTrace:
    trace = import_trace(path, options).trace
    assert isinstance(trace, RoutingTrace)
    return trace


def as_arrivals(path: Path) -> ArrivalTrace:
    trace = import_trace(path).trace
    assert isinstance(trace, ArrivalTrace)
    return trace


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.fixture
def source() -> RoutingTrace:
    return synthetic_trace(num_sequences=3, tokens_per_sequence=6, num_layers=2, num_experts=8)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def test_npz_with_8_bit_weights_and_categories_is_read(tmp_path: Path, source: RoutingTrace) -> None:
    path = npz(
        tmp_path / "x.npz",
        experts=source.experts_TLk,
        weights_u8=np.round(source.weights_TLk.astype(float) * 255).astype(np.uint8),
        token_ids=source.token_ids_T,
        sequence_lengths=[6, 6, 6],
        category=np.array(["law", "law", "art"]),
    )
    trace = as_routing(path, ImportOptions(model="m", num_experts=8, phase=PREFILL))
    np.testing.assert_array_equal(trace.experts_TLk, source.experts_TLk)
    np.testing.assert_allclose(trace.weights_TLk, source.weights_TLk, atol=0.003)
    assert trace.token_ids_T is not None
    np.testing.assert_array_equal(trace.token_ids_T, source.token_ids_T)
    assert trace.labels == ("law", "law", "art")
    assert (trace.metadata.model, trace.metadata.source, set(trace.phase_T)) == ("m", "x.npz", {PREFILL})


def test_npz_with_ids_and_weights_is_read_whatever_its_name(tmp_path: Path, source: RoutingTrace) -> None:
    path = npz(tmp_path / "y.npz", ids=source.experts_TLk, weights=source.weights_TLk, seq_len=[6, 6, 6])
    renamed = path.rename(tmp_path / "deepseek.csv")
    imported = import_trace(renamed)
    assert isinstance(imported.trace, RoutingTrace)
    np.testing.assert_array_equal(imported.trace.weights_TLk, source.weights_TLk)
    assert imported.trace.metadata.model == "deepseek"
    assert imported.trace.num_experts == int(source.experts_TLk.max()) + 1
    assert any("how many experts" in notice for notice in imported.notices)


def test_npz_with_the_columns_of_a_trace_is_read(tmp_path: Path, source: RoutingTrace) -> None:
    states = np.ones((18, 4), np.float16)
    path = npz(
        tmp_path / "z.npz",
        **{"experts": source.experts_TLk, "weights": source.weights_TLk, "hidden.1": states},
        sequence_starts=source.sequence_starts_S1,
        phase=np.zeros(18, int),
        positions=source.positions_T + 3,
        steps=np.arange(18),
        colour=np.zeros(3),
    )
    imported = import_trace(path)
    trace = imported.trace
    assert isinstance(trace, RoutingTrace)
    assert trace.steps_T is not None
    assert (trace.positions_T[0], trace.steps_T[-1], set(trace.phase_T), trace.hidden_layers) == (
        3,
        17,
        {PREFILL},
        (1,),
    )
    np.testing.assert_array_equal(trace.sequence_starts_S1, source.sequence_starts_S1)
    assert any("left out: colour" in notice for notice in imported.notices)


def test_ids_that_count_up_within_every_sequence_are_positions(tmp_path: Path, source: RoutingTrace) -> None:
    base = {"experts": source.experts_TLk, "weights": source.weights_TLk, "sequence_lengths": [6, 6, 6]}
    counting = np.concatenate([np.arange(6) + start for start in (100, 7, 50)])
    imported = import_trace(npz(tmp_path / "c.npz", **base, token_ids=counting))
    assert isinstance(imported.trace, RoutingTrace)
    assert imported.trace.token_ids_T is None
    assert imported.trace.positions_T.tolist() == counting.tolist()
    assert any("they are positions" in notice for notice in imported.notices)
    counting[4] = 0
    kept = as_routing(npz(tmp_path / "k.npz", **base, token_ids=counting))
    assert kept.token_ids_T is not None
    assert kept.positions_T.tolist() == list(range(6)) * 3


def test_few_ids_that_happen_to_rise_stay_token_ids(tmp_path: Path, source: RoutingTrace) -> None:
    short = source.take_sequences([0])
    arrays = {"experts": short.experts_TLk[:3], "weights": short.weights_TLk[:3], "sequence_lengths": [3]}
    assert as_routing(npz(tmp_path / "s.npz", **arrays, token_ids=[5, 6, 7])).token_ids_T is not None


def test_weights_of_zero_belong_to_experts_that_were_chosen(tmp_path: Path, source: RoutingTrace) -> None:
    weights = np.array(source.weights_TLk)
    weights[3, 1, 1] = 0
    trace = as_routing(npz(tmp_path / "w.npz", ids=source.experts_TLk, weights=weights, seq_len=[18]))
    assert trace.weights_TLk[3, 1, 1] == 0
    assert trace.experts_TLk[3, 1, 1] == source.experts_TLk[3, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": None}, "arrays experts, weights without sequence_lengths, seq_len or sequence_starts; known for"),
        ({"seq_len": None, "sequence_starts": [2, 20]}, "'sequence_starts' must be whole numbers from 0"),
        ({"seq_len": [6, 6]}, "must add up to the 18 tokens, got 12"),
        ({"ids": np.zeros((18, 2, 2), int)}, "only one of the arrays experts, ids"),
        ({"experts": np.zeros((18, 2))}, "'experts' must hold whole numbers of shape"),
        ({"experts": np.zeros((18, 2, 2), int)}, "row 0, layer 0: the experts of a token must differ"),
        ({"weights": np.array([None, 1], dtype=object)}, "array 'weights' cannot be read: Object arrays"),
        ({"weights": None, "weights_u8": np.zeros((18, 2, 2), int)}, "'weights_u8' must be uint8, got int64"),
    ],
)
def test_npz_that_breaks_a_rule_is_refused(
    tmp_path: Path, source: RoutingTrace, change: dict[str, Any], message: str
) -> None:
    arrays = {"experts": source.experts_TLk, "weights": source.weights_TLk, "seq_len": [6, 6, 6]} | change
    path = npz(tmp_path / "bad.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(TraceFormatError, match=message) as caught:
        import_trace(path)
    assert str(path) in str(caught.value)


def test_a_cut_or_damaged_npz_is_refused(tmp_path: Path, source: RoutingTrace) -> None:
    path = tmp_path / "cut.npz"
    np.savez(path, ids=source.experts_TLk, weights=source.weights_TLk, seq_len=[6, 6, 6])
    raw = path.read_bytes()
    path.write_bytes(raw[:-30])
    with pytest.raises(TraceFormatError, match=r"cut\.npz: damaged or truncated NPZ"):
        import_trace(path)
    at = raw.index(source.experts_TLk.tobytes())
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(TraceFormatError, match=r"cut\.npz: array 'ids' cannot be read"):
        import_trace(path)


def test_routing_csv_is_read(tmp_path: Path) -> None:
    trace = as_routing(written(tmp_path / "r.csv", ROUTING_CSV))
    assert (trace.num_tokens, trace.num_sequences, trace.num_layers, trace.num_experts, trace.top_k) == (3, 2, 2, 4, 2)
    assert trace.experts_TLk.tolist() == [[[1, 0], [2, 3]], [[0, 3], [3, 1]], [[2, 1], [0, 1]]]
    assert trace.weights_TLk[0, 0].tolist() == [0.75, 0.25]
    assert trace.positions_T.tolist() == [0, 1, 7]
    assert set(trace.phase_T) == {DECODE}


def test_routing_csv_with_every_optional_column_is_read_compressed(tmp_path: Path) -> None:
    head, *lines = ROUTING_CSV.splitlines()
    extra = {"a,0": "11,0,5,law", "a,1": "12,1,6,law", "b,7": "13,1,7,art"}
    text = "\n".join([head + ",token_id,phase,step,label", *(f"{line},{extra[line[:3]]}" for line in lines)])
    path = tmp_path / "r.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    trace = as_routing(path)
    assert trace.token_ids_T is not None
    assert trace.steps_T is not None
    assert trace.token_ids_T.tolist() == [11, 12, 13]
    assert trace.phase_T.tolist() == [0, 1, 1]
    assert trace.steps_T.tolist() == [5, 6, 7]
    assert trace.labels == ("law", "art")
    assert trace.metadata.model == "r"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a,1,0,0,3,0.5,0.5", "a,1,0,0,3,0.5", "line 4: must have 7 cells, got 6"),
        ("a,1,0,0,3,0.5,0.5", "a,1,0,x,3,0.5,0.5", "line 4: expert_0 must be a whole number, got 'x'"),
        ("a,1,0,0,3,0.5,0.5", "a,1,0,0,3,nan,0.5", "line 4: weight_0 must be finite and >= 0, got nan"),
        ("a,1,0,0,3,0.5,0.5", "a,1,0,0,-3,0.5,0.5", "line 4: expert_1 must be from 0"),
        ("a,1,0,0,3,0.5,0.5\n", "", "line 4: layer must be 0, got 1"),
        ("a,1,1,3,1,1.0,0.0\n", "", "line 5: the token before must have the 2 layers of the first, got 1"),
        ("b,7,1,0,1,0.5,0.5\n", "", "line 7: the token before must have the 2 layers"),
        ("a,1,", "a,0,", "line 4: position must be above 0"),
        (
            "b,7,0,2,1,0.5,0.5\nb,7,1,0,1,0.5,0.5\n",
            "b,7,0,2,1,1,0\nb,7,1,0,1,1,0\na,9,0,0,1,1,0\n",
            "line 8: the lines of a",
        ),
        ("layer,", "depth,", "line 1: columns are missing: layer"),
        ("weight_1", "weight_1,colour", "line 1: columns that are unknown or come twice: colour"),
        ("a,0,0,1,0,", "a,0,0,1,1,", "row 0, layer 0: the experts of a token must differ"),
        ("a,0,0,1,0,0.75", 'a,0,0,1,0,"0.75', "line 7: unexpected end of data"),
        (ROUTING_CSV.partition("\n")[2], "", "at least one line of routing"),
        ("weight_1", "weight_2", "line 1: columns are missing: weight_1"),
    ],
)
def test_a_fault_in_routing_csv_is_told_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in ROUTING_CSV
    path = written(tmp_path / "bad.csv", ROUTING_CSV.replace(old, new))
    with pytest.raises(TraceFormatError, match=message) as caught:
        import_trace(path)
    assert str(path) in str(caught.value)


def test_azure_csv_is_read(tmp_path: Path) -> None:
    trace = as_arrivals(written(tmp_path / "azure.csv", AZURE_CSV))
    assert trace.arrival_s.tolist() == pytest.approx([0, 4.314579], abs=1e-6)
    assert trace.prompt_tokens.tolist() == [374, 396]
    assert trace.output_tokens.tolist() == [44, 109]


def test_azure_csv_with_time_zones_is_read(tmp_path: Path) -> None:
    text = AZURE_CSV.replace("6805900", "680590+00:00").replace("9951690", "995169+00:00")
    assert as_arrivals(written(tmp_path / "a.csv", text)).duration_s == pytest.approx(4.314579, abs=1e-6)


def test_mooncake_lines_are_read_with_their_blocks(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, MOONCAKE)).encode()))
    trace = as_arrivals(path)
    assert trace.arrival_s.tolist() == [0, 1.5]
    assert [trace.blocks_of(request).tolist() for request in range(2)] == [[0, 1], [0, 2]]


def test_plain_arrivals_are_read_from_csv_and_npz(tmp_path: Path) -> None:
    from_csv = as_arrivals(written(tmp_path / "p.csv", "arrival_s,prompt_tokens,output_tokens\n5,1,2\n5.25,3,4\n"))
    from_npz = as_arrivals(npz(tmp_path / "p.npz", arrival_s=[5, 5.25], prompt_tokens=[1, 3], output_tokens=[2, 4]))
    for trace in (from_csv, from_npz):
        assert trace.arrival_s.tolist() == [0, 0.25]
        assert trace.prompt_tokens.tolist() == [1, 3]
        assert trace.output_tokens.tolist() == [2, 4]


def test_requests_out_of_order_are_put_in_order_with_a_notice(tmp_path: Path) -> None:
    text = "arrival_s,prompt_tokens,output_tokens\n7,1,1\n5,2,2\n6,3,3\n"
    imported = import_trace(written(tmp_path / "o.csv", text))
    assert isinstance(imported.trace, ArrivalTrace)
    assert imported.trace.prompt_tokens.tolist() == [2, 3, 1]
    assert imported.notices == ("requests were put in order of arrival: 1 came before the one above them",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AZURE_CSV.replace("396,109", "396"), "line 3: must have 3 cells, got 2"),
        (AZURE_CSV.replace("396", "many"), "line 3: ContextTokens cannot be read: .*'many'"),
        (AZURE_CSV.replace("396", "-1"), "line 3: prompt tokens must be from 0"),
        (AZURE_CSV.replace("2023-11-16 18:15:50", "yesterday"), "line 3: TIMESTAMP cannot be read"),
        (AZURE_CSV.partition("\r\n")[0], "at least one request, got none"),
        ("", "at least one request, got none"),
        (
            "when,what\n1,2\n",
            "unknown: got the columns 'when, what' in line 1; known formats: .* BurstGPT",
        ),
        ("arrival_s,prompt_tokens,output_tokens\ninf,1,1\n", "line 2: the time must be finite, got inf"),
        (json.dumps(MOONCAKE[0]) + '\n{"timestamp": 3', "line 2: no JSON at column"),
        (json.dumps(MOONCAKE[0]) + '\n{"timestamp": 3}', "line 2: must have timestamp"),
        (
            json.dumps(MOONCAKE[0]) + '\n{"timestamp": 3, "input_length": 1, "output_length": 1}',
            "line 2: hash_ids must be in",
        ),
        (json.dumps(MOONCAKE[0] | {"hash_ids": ["x"]}), "line 1: hash_ids must be a list of 64-bit whole"),
    ],
)
def test_a_fault_in_an_arrival_file_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path / "bad", text)
    with pytest.raises(TraceFormatError, match=message) as caught:
        import_trace(path)
    assert str(path) in str(caught.value)


def test_a_cut_gzip_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(MOONCAKE[0] | {"timestamp": i * 37 % 1009}) for i in range(2000))
    raw = gzip.compress(text.encode())
    path = tmp_path / "m.gz"
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(TraceFormatError, match=r"m\.gz: damaged or truncated gzip"):
        import_trace(path)
    path.write_bytes(b"\x80\x81\x82" * 100)
    with pytest.raises(TraceFormatError, match=r"m\.gz: must be an NPZ file or UTF-8 text"):
        import_trace(path)


@pytest.mark.parametrize(
    ("name", "num_tokens", "num_sequences", "num_experts", "first_position"),
    [
        ("gpt-oss-20b-mmlu", 93_413, 293, 32, 160),
        ("deepseek-v2-lite-intent", 8_222, 127, 64, 0),
        ("deepseek-v2-lite-law", 8_327, 33, 64, 0),
    ],
)
def test_recorded_routing_is_imported_whole(
    tmp_path: Path,
    name: str,
    num_tokens: int,
    num_sequences: int,
    num_experts: int,
    first_position: int,
) -> None:
    trace = as_routing(_data(f"routing/{name}.npz"))
    trace.save(tmp_path / "t")
    opened = RoutingTrace.open(tmp_path / "t")
    assert (opened.num_tokens, opened.num_sequences, opened.num_experts) == (num_tokens, num_sequences, num_experts)
    assert opened.token_ids_T is None
    assert opened.positions_T[0] == first_position


@pytest.mark.parametrize(
    ("name", "num_requests", "has_blocks"),
    [("AzureLLMInferenceTrace_conv.csv", 19_366, False), ("mooncake_conversation_trace.jsonl.gz", 12_031, True)],
)
def test_recorded_arrivals_are_imported_whole(name: str, num_requests: int, has_blocks: bool) -> None:
    trace = as_arrivals(_data(f"arrivals/{name}"))
    assert (trace.num_requests, trace.block_hashes is not None) == (num_requests, has_blocks)


def _data(name: str) -> Path:
    folder = os.environ.get("MOELESS_DATA")
    path = Path(folder or "", name)
    if folder is None or not path.exists():
        pytest.skip(f"needs {name} in the folder that MOELESS_DATA names")
    return path


def test_a_routing_csv_without_gate_weights_gets_equal_ones_with_a_notice(tmp_path: Path) -> None:
    lines = [line.rsplit(",", 2)[0] for line in ROUTING_CSV.splitlines()]
    imported = import_trace(written(tmp_path / "w.csv", "\n".join(lines)))
    assert isinstance(imported.trace, RoutingTrace)
    assert imported.trace.experts_TLk.tolist() == [[[1, 0], [2, 3]], [[0, 3], [3, 1]], [[2, 1], [0, 1]]]
    assert set(imported.trace.weights_TLk.ravel().tolist()) == {0.5}
    assert any("no gate weights" in notice for notice in imported.notices)


def test_a_routing_csv_of_other_column_names_with_lists_of_experts_is_read(tmp_path: Path) -> None:
    text = 'token_idx,layer_id,expert_ids\n0,0,1 0\n0,1,"[2, 3]"\n1,0,0;3\n1,1,3 1\n0,0,2 1\n0,1,0 1\n'
    trace = as_routing(written(tmp_path / "l.csv", text))
    assert trace.experts_TLk.tolist() == [[[1, 0], [2, 3]], [[0, 3], [3, 1]], [[2, 1], [0, 1]]]
    assert trace.sequence_starts_S1.tolist() == [0, 2, 3]
    with pytest.raises(TraceFormatError, match="line 3: must have 4 cells, got 5"):
        import_trace(written(tmp_path / "k.csv", text.replace("[2, 3]", "[2, 3, 1]")))


def test_npz_without_gate_weights_gets_equal_ones_with_a_notice(tmp_path: Path, source: RoutingTrace) -> None:
    imported = import_trace(npz(tmp_path / "n.npz", experts=source.experts_TLk, seq_len=[6, 6, 6]))
    assert isinstance(imported.trace, RoutingTrace)
    assert set(imported.trace.weights_TLk.ravel().tolist()) == {1 / source.top_k}
    assert any("no gate weights" in notice for notice in imported.notices)


@pytest.mark.parametrize("with_sessions", [False, True])
def test_burstgpt_csv_is_read_without_its_failed_requests(tmp_path: Path, with_sessions: bool) -> None:
    session, cells = ("Session ID,Elapsed time,", "ab-1,2,") if with_sessions else ("", "")
    text = (
        f"Timestamp,{session}Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        f"5,{cells}ChatGPT,472,18,490,Conversation log\n"
        f"45.5,{cells}ChatGPT,1087,230,1317,Conversation log\n"
        f"60,{cells}GPT-4,33,0,33,API log\n"
        f"118,{cells}GPT-4,417,276,693,Conversation log\n"
    )
    imported = import_trace(written(tmp_path / "BurstGPT_1.csv", text))
    assert isinstance(imported.trace, ArrivalTrace)
    assert imported.trace.arrival_s.tolist() == [0, 40.5, 113]
    assert imported.trace.prompt_tokens.tolist() == [472, 1087, 417]
    assert imported.trace.output_tokens.tolist() == [18, 230, 276]
    assert imported.notices == ("requests without response tokens failed when they were recorded: 1 left out",)


def test_servegen_workload_is_read(tmp_path: Path) -> None:
    text = "request_id,timestamp,input_tokens,output_tokens,image_tokens\n0,0.5,10,20,0\n1,1.25,15,25,400\n"
    trace = as_arrivals(written(tmp_path / "workload.csv", text))
    assert trace.arrival_s.tolist() == [0, 0.75]
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == ([10, 15], [20, 25])


def esft_logs(folder: Path, trace: RoutingTrace, *, first_layer: int = 1) -> Path:
    """As ESFT writes them: a file for each layer, a line for each sequence."""
    folder.mkdir(parents=True)
    starts = trace.sequence_starts_S1
    for layer in range(trace.num_layers):
        lines = []
        for begin, end in pairwise(starts.tolist()):
            experts = trace.experts_TLk[begin:end, layer].ravel().tolist()
            weights = [round(float(weight), 4) for weight in trace.weights_TLk[begin:end, layer].ravel()]
            lines.append("\t".join(map(str, experts)) + "\t\t" + "\t".join(map(str, weights)) + "\n")
        (folder / f"expert_weights_{first_layer + layer}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def long_source() -> RoutingTrace:
    return synthetic_trace(num_sequences=3, tokens_per_sequence=8, num_layers=11, num_experts=8, top_k=2, seed=4)


def test_esft_logs_are_read_layer_by_layer(tmp_path: Path, long_source: RoutingTrace) -> None:
    (tmp_path / "intent").mkdir()
    imported = import_trace(esft_logs(tmp_path / "intent" / "logs", long_source))
    trace = imported.trace
    assert isinstance(trace, RoutingTrace)
    np.testing.assert_array_equal(trace.experts_TLk, long_source.experts_TLk)
    np.testing.assert_allclose(trace.weights_TLk, long_source.weights_TLk, atol=1e-3)
    np.testing.assert_array_equal(trace.sequence_starts_S1, long_source.sequence_starts_S1)
    assert any("a token has: 2, the largest number" in notice for notice in imported.notices)
    assert any("in the logs they are 1 to 11" in notice for notice in imported.notices)


def test_esft_logs_of_several_processes_follow_each_other(tmp_path: Path, long_source: RoutingTrace) -> None:
    for rank, sequences in ((0, [0, 1]), (1, [2])):
        esft_logs(tmp_path / "logs" / f"rank_{rank}", long_source.take_sequences(sequences))
    trace = as_routing(tmp_path / "logs", ImportOptions(top_k=2))
    np.testing.assert_array_equal(trace.experts_TLk, long_source.experts_TLk)
    assert trace.num_sequences == 3


def test_the_esft_log_of_one_layer_is_read(tmp_path: Path, long_source: RoutingTrace) -> None:
    logs = esft_logs(tmp_path / "logs", long_source)
    log = logs / "expert_weights_3.txt"
    compressed = tmp_path / "log.gz"
    compressed.write_bytes(gzip.compress(log.read_bytes()))
    for path in (log, compressed):
        trace = as_routing(path, ImportOptions(top_k=2))
        np.testing.assert_array_equal(trace.experts_TLk, long_source.experts_TLk[:, 2:3])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\t\t", "\t", "line 1: must hold tab-separated experts, an empty cell, gate weights"),
        ("\t\t0", "\t\tx0", "line 1: must hold tab-separated .*x0"),
        ("\t\t", "\t7\t\t", "line 1: must have as many gate weights as experts, 17, got 16"),
        ("\n", "\n\n", "line 2: must hold tab-separated"),
    ],
)
def test_a_fault_in_an_esft_log_is_told_with_its_line(
    tmp_path: Path, long_source: RoutingTrace, old: str, new: str, message: str
) -> None:
    log = esft_logs(tmp_path / "logs", long_source) / "expert_weights_2.txt"
    log.write_text(log.read_text().replace(old, new, 1))
    with pytest.raises(TraceFormatError, match=message) as caught:
        import_trace(tmp_path / "logs")
    assert str(log) in str(caught.value)


def test_esft_logs_that_do_not_fit_together_are_refused(tmp_path: Path, long_source: RoutingTrace) -> None:
    logs = esft_logs(tmp_path / "logs", long_source)
    with pytest.raises(TraceFormatError, match="top_k must divide the number of experts of every line, got 3"):
        import_trace(logs, ImportOptions(top_k=3))
    second = logs / "expert_weights_2.txt"
    second.write_text("".join(second.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(TraceFormatError, match=r"_2.txt: must have 3 lines as expert_weights_1.txt, got 2"):
        import_trace(logs)
    with pytest.raises(TraceFormatError, match="a folder must hold ESFT's expert logs, .* got logs"):
        import_trace(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,0,0,,0,0\n600,1.5,2.2,Weibull,0.3,0.2\n", "holds a ServeGen client's rates by window, no requests"),
        ('{"0": {"input_tokens": "{1: 0.5}"}}', "holds a ServeGen client's length distributions, no requests"),
        (
            '{"request_id": 0, "type": "text", "input_length": 271, "hash_ids": [0]}\n',
            "holds a ServeGen offline batch, whose requests have no arrival times",
        ),
        ('{"token_scores": {"1": {"0": 0.01}}}', "holds ESFT's scores by expert, no tokens"),
        ('{"experts": {"1": [4]}, "shared_experts": false}', "holds ESFT's choice of experts to train, no tokens"),
        ("PAR1\x15\x04", "Parquet cannot be read"),
    ],
)
def test_a_published_file_that_holds_no_trace_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path / "published", text)
    with pytest.raises(TraceFormatError, match=message) as caught:
        import_trace(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "timestamp",
    ["9" * 5_000, "9" * 400, "[" * 100_000, "true"],
    ids=["more digits than Python reads", "beyond a float", "deep", "flag"],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_json_that_cannot_be_read_is_refused(tmp_path: Path, timestamp: str, is_first: bool) -> None:
    path = tmp_path / "arrivals.jsonl"
    bad = f'{{"timestamp": {timestamp}, "input_length": 1, "output_length": 2}}\n'
    sound = bad.replace(timestamp, "1")
    path.write_text(bad + sound if is_first else sound + bad)
    with pytest.raises(TraceFormatError, match=r"arrivals.jsonl: line \d|format unknown"):
        import_trace(path)
