"""How the options of every command are read and shown."""

import shutil
import textwrap
import types
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from moe.checkpoint.dtypes import FLOATING, OTHERS, SAFETENSORS, parse_dtype
from moe.errors import did_you_mean

UNSET = tyro.conf.arg(help_behavior_hint="")
"""For an option that is None by default: its text says what that means."""

DTYPES = tuple(SAFETENSORS)
COMPUTE_DTYPES = ("auto", *FLOATING)

_Args = TypeVar("_Args")
_registry = ConstructorRegistry()


def parse(command: type[_Args], name: str, arguments: Sequence[str]) -> _Args:
    """The arguments of `moesmith NAME`. Leaves by SystemExit after --help, and for wrong arguments."""
    with _registry:
        return tyro.cli(
            command,
            prog=f"moesmith {name}",
            description=_wrapped(command.__doc__ or ""),
            args=arguments,
            config=(tyro.conf.DisallowNone,),  # bool | None is --x/--no-x, as bool is
        )


def dtype_option(allowed: tuple[str, ...]) -> Any:
    """Shows the names of dtypes; the command reads the option with `read_dtype`, which knows other spellings, too."""
    return tyro.conf.arg(metavar=f"{{{','.join(allowed)}}}", help_behavior_hint="")


def read_dtype(value: str, allowed: tuple[str, ...]) -> str:
    """The one of `allowed` that --dtype names; float32 and the like, as torch has them, are understood, too."""
    return parse_dtype(OTHERS.get(f"torch.{value}", value), "--dtype", allowed)


def _wrapped(text: str) -> str:
    """Paragraphs that fit the terminal. tyro joins lines, but not those that begin with a space."""
    width = shutil.get_terminal_size().columns
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n\n".join(textwrap.fill(paragraph, width, subsequent_indent="  ") for paragraph in paragraphs)


@_registry.primitive_rule
def _one_of(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Literals, with a hint for a misspelt one."""
    kinds = [info.type]
    if get_origin(info.type) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(info.type) if kind is not types.NoneType]
    if len(kinds) != 1 or get_origin(kinds[0]) is not Literal:
        return None
    names = get_args(kinds[0])

    def read(words: list[str]) -> str:
        if words[0] not in names:
            hint = did_you_mean(words[0], names)
            raise ValueError(f"{words[0]!r}: expected one of {', '.join(names)}{hint}")
        return words[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(names)}}}",
        instance_from_str=read,
        is_instance=lambda value: value is None or value in names,
        str_from_instance=lambda value: [str(value)],
    )
