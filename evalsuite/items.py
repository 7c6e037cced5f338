"""What a metric keeps of one sample, as a line of JSON and back: for metrics that are made from all samples together.

Texts, numbers, booleans, null, lists and tables with text keys are themselves. All else that a metric may keep is a
table of one key that begins with `$`: `{"$tuple": [1, 2]}`, `{"$int64": 3}`, `{"$float64": "nan"}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

# Scalars and elements of arrays: what has a value in JSON.
_DTYPES = {
    name: np.dtype(name) for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
        "float64",
    )
}  # fmt: skip


def dumps(item: object) -> str:
    """`item` as ASCII. Raises TypeError for what has no form here, naming its type."""
    return json.dumps(_plain(item), ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def loads(text: str) -> Any:
    """What `dumps` was given. Raises ValueError for anything it does not write."""
    try:
        return _item(json.loads(text, parse_constant=_no_constant))
    except (TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not what a metric keeps of a sample ({error})") from None


def _plain(item: object) -> object:
    if item is None or type(item) in (str, bool, int):
        return item
    if type(item) is float:
        return item if math.isfinite(item) else {"$float": str(item)}
    if type(item) is list:
        return [_plain(each) for each in item]
    if isinstance(item, tuple):
        return {"$tuple": [_plain(each) for each in item]}
    if isinstance(item, set | frozenset):
        return {"$set": sorted((_plain(each) for each in item), key=repr)}
    if isinstance(item, dict):
        if all(type(key) is str and not key.startswith("$") for key in item):
            return {key: _plain(value) for key, value in item.items()}
        return {"$dict": [[_plain(key), _plain(value)] for key, value in item.items()]}
    if isinstance(item, np.generic) and str(item.dtype) in _DTYPES:
        return {f"${item.dtype}": _number(item.item())}
    if isinstance(item, np.ndarray) and str(item.dtype) in _DTYPES:
        return {"$array": [str(item.dtype), list(item.shape), [_number(each) for each in item.ravel().tolist()]]}
    if isinstance(item, np.ndarray) and item.dtype.kind == "U":
        return {"$texts": [list(item.shape), item.ravel().tolist()]}
    for plain in (str, int, float):
        if isinstance(item, plain):  # a kind of one of them, such as an enumeration's member
            return _plain(plain.__str__(item) if plain is str else plain(item))
    raise TypeError(f"a {type(item).__module__}.{type(item).__qualname__} cannot be kept in a record")


def _number(value: Any) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _item(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_item(each) for each in plain]
    if not isinstance(plain, dict):
        return plain
    (kind, value), *more = plain.items() or [("", None)]
    if not kind.startswith("$"):
        return {key: _item(each) for key, each in plain.items()}
    if more:
        raise ValueError(f"{kind} stands beside other keys")
    if kind[1:] in _DTYPES:
        return _DTYPES[kind[1:]].type(value)
    if kind not in _KINDS:
        raise ValueError(f"{kind} is unknown")
    return _KINDS[kind](value)


def _array(value: Any) -> Any:
    dtype, shape, flat = value
    return np.array(flat, dtype=_DTYPES[dtype]).reshape(shape)


_KINDS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$tuple": lambda value: tuple(_item(each) for each in value),
    "$set": lambda value: {_item(each) for each in value},
    "$dict": lambda value: {_item(key): _item(each) for key, each in value},
    "$array": _array,
    "$texts": lambda value: np.array(value[1], dtype=np.str_).reshape(value[0]),
}


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
