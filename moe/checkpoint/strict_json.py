"""JSON as the standard has it, for files from strangers."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError


def parse_json(data: bytes, path: Path) -> Any:
    """The value in `data`, which came from `path`.

    Raises `CheckpointError` for what Python's parser would let pass: a key twice in one object, NaN and Infinity,
    numbers too large for a float; and for what it would answer with another exception: bad UTF-8, deep nesting.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, "not valid JSON", found=str(error)) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {twice[:80]!r} twice in one object")
    return values


def _no_constant(text: str) -> Any:
    raise ValueError(f"the literal {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]}, too large for a float")
    return value
