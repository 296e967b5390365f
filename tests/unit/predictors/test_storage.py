from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression

from moeless_predictors.popularity import PopularityPredictor
from moeless_predictors.quantile import LoadQuantile, draw_batches, load_moments
from moeless_predictors.storage import (
    FORMAT,
    PredictorFormatError,
    from_arrays,
    load_predictor,
    read_arrays,
    save_predictor,
    to_arrays,
    write_arrays,
)
from moeless_predictors.transition import TransitionPredictor
from tests.unit.predictors.support import Routing, random_routing, routings
from tests.unit.predictors.test_sklearn_checks import ARRAY_PREDICTORS

Document = dict[str, Any]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    routing = random_routing(0)
    path = tmp_path / "layer.safetensors"
    save_predictor(TransitionPredictor(smoothing=2.5).fit(routing.X_nS, routing.y_nE), path)
    return path


@pytest.mark.parametrize("predictor", ARRAY_PREDICTORS, ids=repr)
@settings(max_examples=20, deadline=None)
@given(routing=routings())
def test_a_loaded_predictor_predicts_the_same_bits(
    predictor: BaseEstimator, routing: Routing, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "one.safetensors"
    fitted = clone(predictor).set_params(top_k=routing.top_k).fit(routing.X_nS, routing.y_nE)
    save_predictor(fitted, path)
    loaded = load_predictor(path)
    assert type(loaded) is type(fitted)
    assert loaded.get_params() == fitted.get_params()
    assert loaded.predict_proba(routing.X_nS).tobytes() == fitted.predict_proba(routing.X_nS).tobytes()
    assert loaded.predict_load(routing.X_nS).tobytes() == fitted.predict_load(routing.X_nS).tobytes()


@pytest.mark.parametrize("predictor", ARRAY_PREDICTORS, ids=repr)
def test_a_loaded_predictor_learns_on_as_the_original_would(predictor: BaseEstimator, tmp_path: Path) -> None:
    first, second = random_routing(1), random_routing(2)
    fitted = clone(predictor).fit(first.X_nS, first.y_nE)
    save_predictor(fitted, tmp_path / "one.safetensors")
    loaded = load_predictor(tmp_path / "one.safetensors").partial_fit(second.X_nS, second.y_nE)
    fitted.partial_fit(second.X_nS, second.y_nE)
    assert loaded.predict_proba(first.X_nS).tobytes() == fitted.predict_proba(first.X_nS).tobytes()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), quantile=st.sampled_from([0.9, (0.5, 0.9)]))
def test_a_loaded_quantile_gives_the_same_bounds(
    seed: int, quantile: float | tuple[float, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "quantile.safetensors"
    routing = random_routing(seed)
    proba_nE = PopularityPredictor().fit(routing.X_nS, routing.y_nE).predict_proba(routing.X_nS)
    fitted = LoadQuantile(quantile).fit(draw_batches(proba_nE, routing.y_nE, sizes=(1, 8), batches_per_size=5))
    moments = load_moments(proba_nE)
    fitted.update(*moments, routing.y_nE.sum(axis=0), len(proba_nE))
    save_predictor(fitted, path)
    loaded = load_predictor(path)
    assert loaded.get_params() == fitted.get_params()
    assert loaded.upper(*moments, 20).tobytes() == fitted.upper(*moments, 20).tobytes()


def test_what_was_taken_apart_is_not_changed_by_learning_on() -> None:
    routing = random_routing(0)
    proba_nE = PopularityPredictor().fit(routing.X_nS, routing.y_nE).predict_proba(routing.X_nS)
    quantile = LoadQuantile().fit(draw_batches(proba_nE, routing.y_nE, sizes=(8,), batches_per_size=5))
    arrays, document = to_arrays(quantile)
    quantile.update(*load_moments(proba_nE), routing.y_nE.sum(axis=0), len(proba_nE))
    for array in arrays.values():
        array.flags.writeable = False
    before = from_arrays(arrays, document, source="memory")
    assert before.miscoverage_.tolist() != quantile.miscoverage_.tolist()
    before.update(*load_moments(proba_nE), routing.y_nE.sum(axis=0), len(proba_nE))
    assert before.miscoverage_.tolist() == quantile.miscoverage_.tolist()


def test_names_of_columns_are_kept() -> None:
    predictor = PopularityPredictor().fit(np.zeros((2, 2)), np.eye(2))
    predictor.feature_names_in_ = np.array(["hot", "cold"], dtype=object)
    loaded = from_arrays(*to_arrays(predictor), source="memory")
    assert loaded.feature_names_in_.tolist() == ["hot", "cold"]


def test_the_document_is_json_and_tells_what_wrote_it(saved: Path) -> None:
    _, document = read_arrays(saved, kind=FORMAT)
    assert json.loads(json.dumps(document)) == document
    assert document["class"] == "TransitionPredictor"
    assert document["parameters"]["smoothing"] == 2.5
    assert document["library_version"]


def test_loading_a_baseline_does_not_import_torch(saved: Path) -> None:
    code = (
        "import sys; from moeless_predictors.storage import load_predictor; "
        f"load_predictor({str(saved)!r}); sys.exit('torch' in sys.modules or 'moeless_predictors.gate' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("moeless_predictors.storage.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_predictor(PopularityPredictor().fit(np.zeros((1, 1)), np.ones((1, 2))), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_predictor_that_is_not_fitted_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NotFittedError):
        save_predictor(PopularityPredictor(), tmp_path / "one.safetensors")


def test_a_class_outside_the_registry_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="only the classes .* can be saved, got sklearn.linear_model"):
        save_predictor(LinearRegression().fit([[0], [1]], [0, 1]), tmp_path / "one.safetensors")


def test_a_value_that_json_cannot_hold_is_not_saved() -> None:
    predictor = PopularityPredictor().fit(np.zeros((1, 1)), np.ones((1, 2)))
    predictor.extra_ = [1, object()]
    with pytest.raises(TypeError, match="extra_ must be an array, a number, a text, None or a list of these"):
        to_arrays(predictor)


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = tmp_path_factory.getbasetemp() / "whole.safetensors"
    if not whole.exists():
        routing = random_routing(0)
        save_predictor(TransitionPredictor().fit(routing.X_nS, routing.y_nE), whole)
    content = whole.read_bytes()
    cut = whole.with_name("cut.safetensors")
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(PredictorFormatError, match="cut.safetensors: truncated"):
        load_predictor(cut)


@settings(max_examples=60)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_nothing(
    position: float, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    routing = random_routing(0)
    fitted = TransitionPredictor().fit(routing.X_nS, routing.y_nE)
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    save_predictor(fitted, path)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        loaded = load_predictor(path)
    except PredictorFormatError:
        return
    assert loaded.predict_proba(routing.X_nS).tobytes() == fitted.predict_proba(routing.X_nS).tobytes()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file, as numpy writes them", b"\x80\x04\x95 pickle" * 9])
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(PredictorFormatError, match="foreign: "):
        load_predictor(path)


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(PredictorFormatError, match="format must be 'moeless-predictor', got None"):
        load_predictor(tmp_path / "model.safetensors")
    write_arrays(tmp_path / "set.safetensors", {"weight": np.zeros(2)}, {}, kind="moeless-predictors")
    with pytest.raises(PredictorFormatError, match="format must be 'moeless-predictor', got 'moeless-predictors'"):
        load_predictor(tmp_path / "set.safetensors")


@pytest.mark.parametrize(("text", "rule"), [("{", "document must be JSON"), ("[1]", "document must be an object")])
def test_a_file_whose_document_cannot_be_read_is_refused(text: str, rule: str, tmp_path: Path) -> None:
    metadata = {"format": FORMAT, "document": text, "document_crc32": f"{zlib.crc32(text.encode()):08x}"}
    save_file({"counts_": np.zeros(2)}, tmp_path / "layer.safetensors", metadata=metadata)
    with pytest.raises(PredictorFormatError, match=f"layer.safetensors: {rule}"):
        load_predictor(tmp_path / "layer.safetensors")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_predictor(tmp_path / "none.safetensors")


def _without(*keys: str) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return change


def _with(value: object, *keys: str) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(2, "format_version"), "format_version must be 1, got 2: written by another version"),
        (_without("format_version"), "format_version must be 1, got None"),
        (_with("Popen", "class"), "class must be one of GatePredictor, .*, got 'Popen'"),
        (_without("class"), "class must be a string, got None"),
        (_with([], "parameters"), r"parameters must be an object, got \[\]"),
        (_with(1, "parameters", "depth"), "parameters of TransitionPredictor must be known to it, got 'depth'"),
        (_with("max", "parameters", "combine"), "TransitionPredictor: combine must be 'mean' or 'product', got 'max'"),
        (_without("arrays", "targets_"), "array targets_ belongs to no attribute"),
        (_with([1, 8], "arrays", "targets_", "shape"), "array targets_ must be .*1, 8.*, got "),
        (_with("00000000", "arrays", "targets_", "crc32"), "array targets_ must be .*00000000.*, got "),
        (_with({}, "arrays", "more_"), "array more_ is missing"),
        (_without("values", "num_tokens_"), "TransitionPredictor must have num_tokens_, which is missing"),
        (_with(1, "values", "fit"), "a fitted attribute's name must end in an underscore, got 'fit'"),
        (_with("many", "values", "num_tokens_"), "TransitionPredictor: "),
    ],
)
def test_a_document_that_breaks_a_rule_is_refused(
    saved: Path, change: Callable[[Document], None], message: str
) -> None:
    arrays, document = read_arrays(saved, kind=FORMAT)
    change(document)
    write_arrays(saved, arrays, document, kind=FORMAT)
    with pytest.raises(PredictorFormatError, match=f"layer.safetensors: {message}"):
        load_predictor(saved)


def test_a_missing_array_is_refused(saved: Path) -> None:
    arrays, document = read_arrays(saved, kind=FORMAT)
    del arrays["transitions_"]
    with pytest.raises(PredictorFormatError, match="set.safetensors, layer 3: array transitions_ is missing"):
        from_arrays(arrays, document, source="set.safetensors, layer 3")


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    predictor = TransitionPredictor().fit(np.eye(2), np.eye(2))
    predictor.sources_ = np.ones(3)
    with pytest.raises(PredictorFormatError, match=r"memory: TransitionPredictor: transitions_ must have the shape"):
        from_arrays(*to_arrays(predictor), source="memory")


def test_a_document_that_is_no_object_is_refused() -> None:
    with pytest.raises(PredictorFormatError, match=r"memory: a predictor's document must be an object, got \[1\]"):
        from_arrays({}, [1], source="memory")
