"""Refusals of damaged files, with the place of the damage in the message."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from moeless_predictors.traces import RoutingTrace, TraceFormatError, kind_of, synthetic_trace
from moeless_predictors.traces.container import BLOCK_BYTES, read_container, write_container


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "whole.trace"
    synthetic_trace(num_sequences=3, tokens_per_sequence=5, num_layers=2, num_experts=4, hidden_size=3).save(path)
    return path


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def rewritten(source: Path, target: Path, header: dict[str, Any]) -> Path:
    raw = json.dumps(header).encode()
    target.write_bytes(len(raw).to_bytes(8, "little") + raw + header_of(source)[1])
    return target


def column_begin(path: Path, name: str) -> int:
    data_begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    begin: int = header_of(path)[0][name]["data_offsets"][0]
    return data_begin + begin


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused_with_the_byte_where_it_ends(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = whole.read_bytes()
    cut = data.draw(st.integers(0, len(raw) - 1), label="cut")
    path = tmp_path_factory.getbasetemp() / "cut.trace"
    path.write_bytes(raw[:cut])
    for verify in (True, False):
        with pytest.raises(TraceFormatError, match=rf"cut\.trace: truncated: ends at byte {cut}\b"):
            RoutingTrace.open(path, verify=verify)


def test_a_cut_file_is_told_where_it_should_end(whole: Path, tmp_path: Path) -> None:
    raw = whole.read_bytes()
    (tmp_path / "cut").write_bytes(raw[:-1])
    with pytest.raises(TraceFormatError, match=f"should end at byte {len(raw)}"):
        RoutingTrace.open(tmp_path / "cut")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_changed_byte_anywhere_is_refused_or_changes_nothing(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(whole.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1), label="byte")
    raw[at] ^= data.draw(st.integers(1, 255), label="flipped bits")
    path = tmp_path_factory.getbasetemp() / "flipped.trace"
    path.write_bytes(raw)
    try:
        trace = RoutingTrace.open(path)
    except TraceFormatError:
        return
    # One kind of white space for another, in the padding of the header.
    assert at < column_begin(whole, "sequence_starts")
    original = RoutingTrace.open(whole)
    assert trace.metadata == original.metadata
    for name, column in original._columns().items():
        np.testing.assert_array_equal(trace._columns()[name], column)


def test_a_damaged_block_is_told_with_its_column_bytes_and_rows(tmp_path: Path) -> None:
    path = tmp_path / "big.trace"
    column = np.arange(BLOCK_BYTES, dtype=np.int32).reshape(-1, 4)  # 4 blocks
    write_container(path, kind="routing", fields={}, columns={"numbers": column})
    begin = column_begin(path, "numbers")
    raw = bytearray(path.read_bytes())
    raw[begin + 2 * BLOCK_BYTES + 7] ^= 1
    path.write_bytes(raw)
    first, last = begin + 2 * BLOCK_BYTES, begin + 3 * BLOCK_BYTES
    rows = BLOCK_BYTES // 16
    with pytest.raises(
        TraceFormatError, match=f"column 'numbers': bytes {first} to {last} .rows {2 * rows} to {3 * rows - 1}"
    ):
        read_container(path, kind="routing", verify=True)
    assert read_container(path, kind="routing", verify=False).columns["numbers"].shape == column.shape


def test_bytes_behind_the_last_column_are_refused(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(whole.read_bytes() + b"\0")
    with pytest.raises(TraceFormatError, match=f"ends at byte {len(whole.read_bytes())}, but the file at byte"):
        RoutingTrace.open(path)


@pytest.mark.parametrize("content", [b"PK\x03\x04 an npz file", b"sequence,position,layer\n", b"\x93NUMPY" * 20])
def test_what_is_no_trace_is_called_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    assert kind_of(path) is None
    with pytest.raises(TraceFormatError, match="other: not a trace"):
        RoutingTrace.open(path)


def test_another_safetensors_file_is_no_trace(whole: Path, tmp_path: Path) -> None:
    header, _ = header_of(whole)
    header["__metadata__"] = {"format": "pt"}
    with pytest.raises(TraceFormatError, match="not a trace: its metadata must have format 'moeless-trace', got 'pt'"):
        RoutingTrace.open(rewritten(whole, tmp_path / "model.safetensors", header))


def test_a_later_version_is_refused_by_its_number(whole: Path, tmp_path: Path) -> None:
    header, _ = header_of(whole)
    header["__metadata__"]["version"] = "2"
    with pytest.raises(TraceFormatError, match="version must be 1 for this release, got '2'"):
        RoutingTrace.open(rewritten(whole, tmp_path / "later", header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "BF16"}, "column 'phase' must have a shape"),
        ({"shape": [-15]}, "column 'phase' must have a shape"),
        ({"shape": [0, 1 << 62, 1 << 62]}, "column 'phase' must have a shape"),
        ({"shape": [14]}, "column 'phase' of shape .14. and dtype U8 takes 14 bytes"),
        ({"data_offsets": [0, 15]}, "must begin at byte"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    whole: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    header, _ = header_of(whole)
    header["phase"].update(change)
    with pytest.raises(TraceFormatError, match=message):
        RoutingTrace.open(rewritten(whole, tmp_path / "odd", header), verify=False)


def test_a_header_nested_without_end_is_refused(tmp_path: Path) -> None:
    raw = b'{"a":' + b"[" * 200_000
    (tmp_path / "deep").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(TraceFormatError, match="damaged header: nested too deeply"):
        RoutingTrace.open(tmp_path / "deep")


def test_arrivals_are_not_opened_as_routing(tmp_path: Path) -> None:
    write_container(tmp_path / "t", kind="arrivals", fields={}, columns={"arrival_s": np.zeros(3)})
    assert kind_of(tmp_path / "t") == "arrivals"
    with pytest.raises(TraceFormatError, match="kind must be 'routing' here, got 'arrivals'"):
        RoutingTrace.open(tmp_path / "t")


def test_the_safetensors_library_reads_the_columns(whole: Path) -> None:
    trace = RoutingTrace.open(whole)
    with safe_open(whole, framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("experts"), trace.experts_TLk)
        assert json.loads(file.metadata()["trace"])["num_experts"] == 4


def test_columns_are_mapped_not_loaded(whole: Path) -> None:
    array: Any = RoutingTrace.open(whole).hidden[1]
    while isinstance(array, np.ndarray) and array.base is not None and not isinstance(array, np.memmap):
        array = array.base
    assert isinstance(array, np.memmap)


def test_a_save_that_fails_leaves_what_was_there(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "t"
    shutil.copy(whole, target)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moeless_predictors.traces.container.os.fsync", full_disk)
    with pytest.raises(OSError, match=re.escape("No space left")):
        synthetic_trace(num_sequences=1).save(target)
    assert target.read_bytes() == whole.read_bytes()
    assert list(tmp_path.iterdir()) == [target]


def test_a_trace_may_be_read_by_whom_other_files_may(tmp_path: Path) -> None:
    synthetic_trace(num_sequences=1).save(tmp_path / "t")
    (tmp_path / "plain").touch()
    assert (tmp_path / "t").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    target = tmp_path / "nowhere" / "t"
    with pytest.raises(FileNotFoundError) as caught:
        synthetic_trace(num_sequences=1).save(target)
    assert caught.value.filename == str(target)


def test_what_the_library_cannot_write_is_told_with_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("moeless_predictors.traces.container.save_file", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        synthetic_trace(num_sequences=1).save(tmp_path / "t")
    assert caught.value.filename == str(tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_a_trace_can_be_saved_over_the_file_it_is_mapped_from(whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "t"
    shutil.copy(whole, target)
    trace = RoutingTrace.open(target)
    trace.save(target)
    np.testing.assert_array_equal(RoutingTrace.open(target).experts_TLk, trace.experts_TLk)
