"""The pickle in a saved state: only what belongs there, whatever release of Python has written it."""

import io
import os
import pickle
import pickletools
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from moe.parallel.state_parts import _Unpickler

MEMBER = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT


class By:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def read(value: Any) -> Any:
    text = pickle.dumps(value)
    pickletools.dis(text, out=io.StringIO())
    return _Unpickler(io.BytesIO(text)).load()


@pytest.mark.parametrize(
    "pickled",
    [By(getattr, _MEM_FORMAT_ENCODING, MEMBER.name), By(_MEM_FORMAT_ENCODING, MEMBER.value), MEMBER],
    ids=["by name", "by value", "as here"],
)
def test_the_member_of_an_enumeration(pickled: Any) -> None:
    assert read(pickled) is MEMBER


@pytest.mark.parametrize(
    "pickled",
    [
        By(os.system, "true"),
        By(getattr, _MEM_FORMAT_ENCODING, "__init_subclass__"),
        By(getattr, "text", "format"),
        By(getattr, By(getattr, _MEM_FORMAT_ENCODING, "__class__"), "mro"),
    ],
    ids=["system", "attribute of the class", "attribute of a string", "chain"],
)
def test_nothing_else_is_called(pickled: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="does not belong into a state"):
        read(pickled)
