"""Save fitted predictors and load them again, without pickle: arrays in a safetensors file, JSON in its metadata.

A file keeps scikit-learn's own division: the constructor's parameters, and the fitted attributes, whose names end
in an underscore. Attributes that begin with one are derived, and a predictor's `_restore` makes them again. Only
classes of the registry are loaded, and a class's module is imported only when one of its kind is.

`save_predictor` and `load_predictor` keep one predictor in a file. To keep many in one, put the arrays and the JSON
of `to_arrays` under names of your own and write them with `write_arrays`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

import moeless_predictors
from moeless_predictors.arrays import AnyArray

Document = dict[str, Any]

FORMAT = "moeless-predictor"
VERSION = 1
"""Version of the file's format; another one is refused."""

CLASSES = {
    "GatePredictor": "moeless_predictors.gate:GatePredictor",
    "HistoryPredictor": "moeless_predictors.history:HistoryPredictor",
    "LoadQuantile": "moeless_predictors.quantile:LoadQuantile",
    "PopularityPredictor": "moeless_predictors.popularity:PopularityPredictor",
    "TransitionPredictor": "moeless_predictors.transition:TransitionPredictor",
}
"""The classes that files may name, each as module:class."""

_KINDS: dict[type, str] = {dict: "an object", str: "a string"}


class PredictorFormatError(ValueError):
    """A file, or a part of one, holds no predictor that can be loaded; the message names file, field and rule."""


def save_predictor(predictor: BaseEstimator, path: str | os.PathLike[str]) -> None:
    """Write a fitted predictor to a file, all or nothing.

    Raises: NotFittedError; TypeError for a class or a value that cannot be kept; OSError.
    """
    arrays, document = to_arrays(predictor)
    write_arrays(path, arrays, document, kind=FORMAT)


def load_predictor(path: str | os.PathLike[str]) -> BaseEstimator:
    """Read what `save_predictor` wrote; its predictions are equal to the last bit.

    Raises: PredictorFormatError; OSError if the file cannot be read.
    """
    arrays, document = read_arrays(path, kind=FORMAT)
    return from_arrays(arrays, document, source=str(path))


def to_arrays(predictor: BaseEstimator) -> tuple[dict[str, AnyArray], Document]:
    """The fitted arrays by name, and a document for JSON with all else, that together make the predictor again.

    Raises: NotFittedError; TypeError for a class that is not in the registry or a value that JSON cannot hold.
    """
    cls = type(predictor)
    if CLASSES.get(cls.__name__) != f"{cls.__module__}:{cls.__qualname__}":
        raise TypeError(f"only the classes {', '.join(CLASSES)} can be saved, got {cls.__module__}.{cls.__qualname__}")
    check_is_fitted(predictor)
    arrays: dict[str, AnyArray] = {}
    names: Document = {}
    values: Document = {}
    for name, value in vars(predictor).items():
        if not _is_fitted_attribute(name):
            continue
        if not isinstance(value, np.ndarray):
            values[name] = _jsonable(value, name)
        elif value.dtype == object:  # the columns' names of a data frame
            names[name] = [_jsonable(item, name) for item in value.tolist()]
        else:
            arrays[name] = np.asarray(value, order="C")
    parameters = predictor.get_params(deep=False).items()
    document = {
        "class": cls.__name__,
        "format_version": VERSION,
        "library_version": moeless_predictors.__version__,
        "parameters": {name: _jsonable(value, name) for name, value in parameters},
        "values": values,
        "names": names,
        "arrays": {name: _described(array) for name, array in arrays.items()},
    }
    return arrays, document


def from_arrays(arrays: Mapping[str, AnyArray], document: object, *, source: str) -> BaseEstimator:
    """The predictor that `to_arrays` took apart.

    Args:
        arrays: those of this predictor alone.
        source: where they come from, for the messages of errors.
    Raises: PredictorFormatError.
    """
    if not isinstance(document, dict):
        raise PredictorFormatError(f"{source}: a predictor's document must be an object, got {document!r:.80}")
    version = document.get("format_version")
    if version != VERSION:
        raise PredictorFormatError(
            f"{source}: format_version must be {VERSION}, got {version!r}: written by another version of the library "
            f"({document.get('library_version', 'unknown')}, this one is {moeless_predictors.__version__})"
        )
    cls = _class_named(_field(document, "class", str, source), source)
    predictor = _constructed(cls, _field(document, "parameters", dict, source), source)
    _check_arrays(arrays, _field(document, "arrays", dict, source), source)
    fitted = {
        **arrays,
        **_field(document, "values", dict, source),
        **{name: np.array(items, dtype=object) for name, items in _field(document, "names", dict, source).items()},
    }
    for name in sorted(_declared_attributes(cls) - set(fitted)):
        raise PredictorFormatError(f"{source}: {cls.__name__} must have {name}, which is missing")
    for name, value in fitted.items():
        if not _is_fitted_attribute(name):
            raise PredictorFormatError(f"{source}: a fitted attribute's name must end in an underscore, got {name!r}")
        setattr(predictor, name, value)
    try:
        predictor._restore()
    except (ValueError, TypeError) as error:
        raise PredictorFormatError(f"{source}: {cls.__name__}: {error}") from error
    return predictor


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, AnyArray], document: Document, *, kind: str
) -> None:
    """Write arrays and a document to a safetensors file, all or nothing: a sibling file is written and renamed.

    Args:
        kind: what the file is, so that no reader takes it for something else.
    """
    text = json.dumps(document)
    metadata = {"format": kind, "document": text, "document_crc32": f"{zlib.crc32(text.encode()):08x}"}
    target = Path(path)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(dict(arrays), draft, metadata=metadata)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def read_arrays(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, AnyArray], Document]:
    """Read what `write_arrays` wrote.

    Raises: PredictorFormatError for a truncated file or one of another kind; OSError if it cannot be read.
    """
    _check_length(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise PredictorFormatError(f"{path}: format must be {kind!r}, got {metadata.get('format')!r}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise PredictorFormatError(f"{path}: truncated, damaged or no safetensors file: {error}") from error
    text = metadata.get("document", "")
    if metadata.get("document_crc32") != f"{zlib.crc32(text.encode()):08x}":
        raise PredictorFormatError(f"{path}: document must have the checksum document_crc32, the file is damaged")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise PredictorFormatError(f"{path}: document must be JSON: {error}") from error
    if not isinstance(document, dict):
        raise PredictorFormatError(f"{path}: document must be an object, got {document!r:.80}")
    return arrays, document


def _check_length(path: str | os.PathLike[str]) -> None:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(9)
    if len(start) < 9:
        raise PredictorFormatError(f"{path}: truncated: ends at byte {size}, within the header")
    header_end = 8 + int.from_bytes(start[:8], "little")
    if start[8:] != b"{":
        raise PredictorFormatError(f"{path}: must be a safetensors file, but byte 8 does not begin a header")
    if size < header_end:
        raise PredictorFormatError(f"{path}: truncated: ends at byte {size}, the header at byte {header_end}")


def _class_named(name: str, source: str) -> type[BaseEstimator]:
    if name not in CLASSES:
        raise PredictorFormatError(f"{source}: class must be one of {', '.join(CLASSES)}, got {name!r}")
    module, class_name = CLASSES[name].split(":")
    return cast("type[BaseEstimator]", getattr(importlib.import_module(module), class_name))


def _constructed(cls: type[BaseEstimator], parameters: Document, source: str) -> BaseEstimator:
    known = set(inspect.signature(cls).parameters)
    for name in parameters:
        if name not in known:
            raise PredictorFormatError(f"{source}: parameters of {cls.__name__} must be known to it, got {name!r}")
    # JSON knows no tuples, and scikit-learn's parameters are never lists that someone changes.
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()})


def _check_arrays(arrays: Mapping[str, AnyArray], described: Document, source: str) -> None:
    for name, expected in described.items():
        if name not in arrays:
            raise PredictorFormatError(f"{source}: array {name} is missing")
        found = _described(arrays[name])
        if found != expected:
            raise PredictorFormatError(f"{source}: array {name} must be {expected}, got {found}")
    for name in sorted(set(arrays) - set(described)):
        raise PredictorFormatError(f"{source}: array {name} belongs to no attribute")


def _described(array: AnyArray) -> Document:
    crc = zlib.crc32(np.asarray(array, order="C").tobytes())
    return {"dtype": array.dtype.name, "shape": list(array.shape), "crc32": f"{crc:08x}"}


def _declared_attributes(cls: type[BaseEstimator]) -> set[str]:
    """The fitted attributes that the class and its bases declare; it cannot predict without one of them."""
    return {name for base in cls.__mro__ for name in inspect.get_annotations(base) if _is_fitted_attribute(name)}


def _is_fitted_attribute(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_")


def _field(document: Document, name: str, kind: type, source: str) -> Any:
    value = document.get(name)
    if not isinstance(value, kind):
        raise PredictorFormatError(f"{source}: {name} must be {_KINDS[kind]}, got {value!r:.80}")
    return value


def _jsonable(value: object, name: str) -> Any:
    """The value as JSON can hold it; numpy's numbers become Python's, tuples lists."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        return [_jsonable(item, name) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} must be an array, a number, a text, None or a list of these, got {type(value).__name__}")
