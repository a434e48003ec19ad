"""How the options of every command are read and shown."""

import dataclasses
import re
import shutil
import textwrap
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from moe.checkpoint.format.comparison import WITHOUT_MTP
from moe.checkpoint.format.dtypes import FLOATING, OTHERS, SAFETENSORS, parse_dtype
from moe.errors import CheckpointError, ConfigError, ParallelError, did_you_mean

UNSET = tyro.conf.arg(help_behavior_hint="")
"""For an option that is None by default: its text says what that means."""

DTYPES = tuple(SAFETENSORS)
COMPUTE_DTYPES = ("auto", *FLOATING)

_EMPTY = Path("\0")  # of an empty word, which for pathlib is the current folder

_Args = TypeVar("_Args")
_registry = ConstructorRegistry()


def parse(command: type[_Args], name: str, arguments: Sequence[str]) -> _Args:
    """The arguments of `moesmith NAME`.

    If the command has them, its function `expand` rewrites the words first, and its method `check` raises ConfigError
    for wrong values.

    Leaves by SystemExit after --help, and for what is no option or cannot be parsed. Values are checked after tyro,
    which would put an error that is raised meanwhile into a box of several lines.
    """
    arguments = getattr(command, "expand", list)(arguments)
    with _registry:
        args = tyro.cli(
            command,
            prog=f"moesmith {name}",
            description=_wrapped(command.__doc__ or ""),
            args=arguments,
            config=(tyro.conf.DisallowNone,),  # bool | None is --x/--no-x, as bool is
        )
    _check_choices(args)
    _check_paths(args)
    getattr(args, "check", lambda: None)()
    return args


def in_options(error: Exception, args: Any) -> str:
    """The message of an error of the library, naming the option of the command where it names a parameter."""
    message, names = str(error), set(_fields(args))
    if isinstance(error, (ConfigError, ParallelError)):
        message = re.sub(r"^\w+(?= = )", lambda name: option(name[0]) if name[0] in names else name[0], message)
    if isinstance(error, CheckpointError) and "dtype" in names:
        message = re.sub(r"\bdtype=torch\.(?=\w)", "--dtype ", message)
    return message if "mtp" in names else message.replace(WITHOUT_MTP, "")


def option(name: str) -> str:
    """The option for a field of a command's `Args`."""
    return f"--{name.replace('_', '-')}"


def _fields(args: Any) -> dict[str, tuple[Any, Any]]:
    """Name -> type and value of all fields of a dataclass, those of fields that are dataclasses included."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, kind in get_type_hints(type(args)).items():
        value = getattr(args, name)
        found |= _fields(value) if dataclasses.is_dataclass(value) else {name: (kind, value)}
    return found


def _check_choices(args: Any) -> None:
    for name, (kind, value) in _fields(args).items():
        choices = _choices(kind)
        if choices and value is not None and value not in choices:
            raise ConfigError(option(name), value, f"one of {', '.join(choices)}{did_you_mean(value, choices)}")


def _check_paths(args: Any) -> None:
    """Raise ConfigError for an empty word, such as a variable of the shell that is not set."""
    for name, (_, value) in _fields(args).items():
        if any(each is _EMPTY for each in (value if isinstance(value, tuple) else (value,))):
            raise ConfigError(option(name), "", "a path")


def dtype_option(allowed: tuple[str, ...]) -> Any:
    """Shows the names of dtypes; the command reads the option with `read_dtype`, which knows other spellings, too."""
    return tyro.conf.arg(metavar=f"{{{','.join(allowed)}}}", help_behavior_hint="")


def read_dtype(value: str, allowed: tuple[str, ...]) -> str:
    """The one of `allowed` that --dtype names; float32 and the like, as torch has them, are understood, too."""
    return parse_dtype(_spelling(value), "--dtype", allowed)


def _spelling(word: str) -> str:
    """Our name of the dtype that is torch's `word`, or safetensors'; `word` itself if it is neither."""
    return OTHERS.get(f"torch.{word}", OTHERS.get(word.lower(), word))


def _wrapped(text: str) -> str:
    """Paragraphs that fit the terminal. tyro joins lines, but not those that begin with a space."""
    width = shutil.get_terminal_size().columns
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n\n".join(textwrap.fill(paragraph, width, subsequent_indent="  ") for paragraph in paragraphs)


def _choices(kind: Any) -> tuple[str, ...]:
    """The values of a Literal, or of one that may be None; empty for other types."""
    kinds = [kind]
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [each for each in get_args(kind) if each is not types.NoneType]
    return get_args(kinds[0]) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else ()


@_registry.primitive_rule
def _one_of(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Literals: any word, which `_check_choices` compares; dtypes in every spelling that `read_dtype` knows."""
    names = _choices(info.type)
    if not names:
        return None

    def read(words: list[str]) -> str:
        known = _spelling(words[0])
        return known if known in names else words[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(names)}}}",
        instance_from_str=read,
        is_instance=lambda value: value is None or value in names,
        str_from_instance=lambda value: [str(value)],
    )


@_registry.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Paths, with an empty word as `_EMPTY`."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: Path(words[0]) if words[0] else _EMPTY,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )
