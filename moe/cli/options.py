"""How the options of every command are read, and how --help shows them.

A command's `Args` is a frozen dataclass. Each field is an option, the string below it is the help text, and `Option` in
`Annotated` says what the type cannot. Fields that are dataclasses add their own fields, under their docstring.
"""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import re
import shutil
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from moe.checkpoint.format.contents import WITHOUT_MTP
from moe.checkpoint.format.dtypes import ALIASES, FLOATING, SAFETENSORS, parse_dtype
from moe.errors import CheckpointError, ConfigError, ParallelError, Place, did_you_mean, one_line

DTYPES = tuple(SAFETENSORS)
COMPUTE_DTYPES = ("auto", *FLOATING)

# Type of a value -> its placeholder in --help, and its name in errors.
_VALUES: dict[Any, tuple[str, str]] = {
    int: ("INT", "an integer"),
    float: ("FLOAT", "a number"),
    str: ("TEXT", "text"),
    Path: ("PATH", "a path"),
}
_TEXT_COLUMN, _MAX_WIDTH = 24, 100

_Args = TypeVar("_Args")


class UsageError(Exception):
    """Words that are not the arguments of a command."""


@dataclass(frozen=True)
class Option:
    """Metadata of a field.

    Attributes:
        metavar: placeholder for the value.
        positional: the value is given without an option.
        repeated: the option is given once per value, instead of once with all values.
        alias: another name of the option, shown first.
        text: help text; default: the string below the field.
    """

    metavar: str = ""
    positional: bool = False
    repeated: bool = False
    alias: str = ""
    text: str = ""


@dataclass(frozen=True)
class Field:
    """A field of an `Args`.

    Attributes:
        name: of the field.
        kind: its type, without `Annotated` and None.
        default: MISSING for a required argument.
        section: heading above the option in --help.
    """

    name: str
    kind: Any
    default: Any
    section: str
    option: Option
    documented: str

    @cached_property
    def flags(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.option.alias, option(self.name))))

    @cached_property
    def value(self) -> Any:
        """The type of one value."""
        return get_args(self.kind)[0] if get_origin(self.kind) is tuple else self.kind

    @cached_property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.value) if get_origin(self.value) is Literal else ()

    @cached_property
    def metavar(self) -> str:
        name = f"{{{','.join(self.choices)}}}" if self.choices else _VALUES[self.value][0]
        name = self.option.metavar or name
        return f"{name} ..." if self.takes_several else name

    @property
    def takes_several(self) -> bool:
        return get_args(self.kind)[1:] == (...,) and not self.option.repeated

    @cached_property
    def invocation(self) -> str:
        if self.option.positional:
            return self.metavar
        if self.kind is bool:  # what is off by default is only ever switched on
            negated = "" if self.default is False else "[no-]"
            return f"--{negated}{self.flags[-1][2:]} {self.option.metavar}".rstrip()
        return f"{', '.join(self.flags)} {self.metavar}"

    @cached_property
    def text(self) -> str:
        """The help text, with the default unless it says that itself."""
        text = " ".join((self.option.text or self.documented).split())
        if self.default in (MISSING, None, ()) or self.default is False or "Default: " in text:
            return text
        shown = "on" if self.default is True else f"{self.default:g}" if self.kind is float else self.default
        shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
        return f"{text} Default: {shown}."

    def read(self, word: str) -> Any:
        """The value of a word; dtypes may have the names that torch gives them."""
        known = next((each for each in (word, _spelling(word)) if each in self.choices), None)
        if known is not None:
            return known
        expected, hint = f"one of {', '.join(self.choices)}", did_you_mean(word, self.choices)
        if not self.choices:
            # An empty word, such as a variable of the shell that is not set, would be the current folder.
            with contextlib.suppress(ValueError):
                if word or self.value is not Path:
                    return self.value(word)
            expected = _VALUES[self.value][1]
        raise argparse.ArgumentTypeError(f"expected {expected}; found {one_line(repr(word))}{hint}")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        # argparse would report a missing argument before an unknown one, and only some of them.
        common: dict[str, Any] = {"default": argparse.SUPPRESS}
        if self.option.positional:
            parser.add_argument(self.name, metavar=self.metavar, type=self.read, nargs="?")
        elif self.kind is bool:
            parser.add_argument(*self.flags, dest=self.name, action="store_true", **common)
            parser.add_argument(f"--no-{self.flags[-1][2:]}", dest=self.name, action="store_false", **common)
        else:
            several = get_origin(self.kind) is tuple and not self.option.repeated
            nargs = "+" if self.takes_several else len(get_args(self.kind)) if several else None
            action = "append" if self.takes_several or self.option.repeated else "store"
            parser.add_argument(*self.flags, dest=self.name, type=self.read, nargs=nargs, action=action, **common)

    def value_of(self, found: Any) -> Any:
        """The field's value from what argparse found."""
        if self.takes_several:
            if len(found) > 1:
                raise UsageError(f"{self.flags[-1]}: expected all values after one option; found {len(found)} options")
            found = found[0]
        return tuple(found) if get_origin(self.kind) is tuple else found


class _Parser(argparse.ArgumentParser):
    """argparse, with our help and one line for an error."""

    def __init__(self, name: str, description: str, fields: list[Field]) -> None:
        super().__init__(prog=f"moesmith {name}", description=description, allow_abbrev=False)
        self.fields = fields
        for field in fields:
            field.add_to(self)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("ignored explicit argument", "expected no value; found")
        message = re.sub(r"expected (one|at least one) argument$", r"expected \1 value; found none", message)
        message = re.sub(r"expected (\d+) arguments$", r"expected \1 values; found fewer", message)
        raise UsageError(one_line(message, 1000))

    def format_help(self) -> str:
        width = max(40, min(shutil.get_terminal_size().columns, _MAX_WIDTH))
        required = [field.invocation for field in self.fields if field.default is MISSING]
        optional = [f"[{each.invocation}]" for each in self.fields if each.option.positional and each.default is None]
        lines = [_wrapped(" ".join(["usage:", self.prog, *required, *optional, "[OPTIONS]"]), width, 7), ""]
        lines += [f"{_wrapped(each, width)}\n" for each in (self.description or "").split("\n\n")]
        for section, fields in groupby(self.fields, key=lambda field: field.section):
            rows = [(field.invocation, field.text) for field in fields]
            if section == "Options":
                rows.append(("-h, --help", "Print this help."))
            lines += [f"{section}:", *(_row(left, text, width) for left, text in rows), ""]
        return "\n".join(lines)


def parse(command: type[_Args], name: str, words: Sequence[str]) -> _Args:
    """The arguments of `moesmith NAME`.

    If the command has them, its function `expand` rewrites the words first, and its method `check` raises ConfigError
    for wrong values.

    Raises UsageError for words that are not its arguments. Leaves by SystemExit after --help.
    """
    words = getattr(command, "expand", list)(words)
    fields = list(fields_of(command))
    parser = _Parser(name, command.__doc__ or "", fields)
    spelled = (re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word) for word in words)
    found, unknown = parser.parse_known_args(list(spelled))
    if unknown:
        raise UsageError(_unknown(unknown[0], parser))
    values = {name: value for name, value in vars(found).items() if value is not None}
    given = {field.name: field.value_of(values[field.name]) for field in fields if field.name in values}
    missing = [field for field in fields if field.default is MISSING and field.name not in given]
    if missing:
        names = ", ".join(field.metavar if field.option.positional else field.flags[-1] for field in missing)
        raise UsageError(f"{names}: required but missing")
    args = _built(command, given)
    getattr(args, "check", lambda: None)()
    return args


def fields_of(command: Any, section: str = "Options") -> Iterator[Field]:
    """All fields of an `Args`, those of fields that are dataclasses included; positional ones first."""
    hints, texts = get_type_hints(command, include_extras=True), _texts(command)
    found = [_field(each, hints[each.name], texts.get(each.name, ""), section) for each in dataclasses.fields(command)]
    for field in sorted(found, key=lambda field: not field.option.positional):
        if dataclasses.is_dataclass(field.kind):
            yield from fields_of(field.kind, (field.kind.__doc__ or "").removesuffix("."))
        else:
            yield field


def in_options(error: Exception, args: Any) -> str:
    """The message of an error as `WHERE: expected X; found Y`, naming the option where the library names a parameter.

    `args` is None for an error found before there are any.
    """
    names = set() if args is None else {field.name for field in fields_of(type(args))}
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.filename2 is None:
        message = f"{one_line(error.filename)}: {error.strerror}"
    if isinstance(error, ConfigError):
        found = message[len(f"{error.field} = ") : -len(f": expected {error.allowed}")]
        expected, did, hint = error.allowed.partition("; did you mean ")
        where = option(error.field) if error.field in names else error.field
        shown = "" if error.value is None or "; found " in expected else f"; found {found}"
        if isinstance(error.value, Place):
            where, shown = f"{where}: {one_line(error.value, 1000)}", ""
        message = f"{where}: expected {expected}{shown}{did}{hint}"
    if isinstance(error, ParallelError):
        found = re.fullmatch(r"(\w+) = (\S+): (expected .*)", message)
        if found and found[1] in names:
            message = f"{option(found[1])}: {found[3]}; found {found[2]}"
    if isinstance(error, CheckpointError) and "dtype" in names:
        message = re.sub(r"\bdtype=torch\.(?=\w)", "--dtype ", message)
    if "mtp" in names:
        return message
    return message.replace(
        WITHOUT_MTP, WITHOUT_MTP.replace("mtp=False (--no-mtp)", "--speculative off") if "speculative" in names else ""
    )


def option(name: str) -> str:
    """The option for a field of a command's `Args`."""
    return f"--{name.replace('_', '-')}"


def dtype_option(allowed: tuple[str, ...]) -> Option:
    """Shows the names of dtypes; the command reads the option with `read_dtype`, which also accepts other spellings."""
    return Option(f"{{{','.join(allowed)}}}")


def read_dtype(value: str, allowed: tuple[str, ...]) -> str:
    """The one of `allowed` that --dtype names, also in the spelling of torch (float32) or safetensors (F32)."""
    return parse_dtype(_spelling(value), "--dtype", allowed)


def _spelling(word: str) -> str:
    """Our name of the dtype that torch or safetensors calls `word`; `word` itself if there is none."""
    return ALIASES.get(f"torch.{word}", ALIASES.get(word.lower(), word))


def _unknown(word: str, parser: _Parser) -> str:
    """The message for a word that is not an argument."""
    shown = one_line(word.partition("=")[0] if word.startswith("-") else word)
    if not word.startswith("-"):
        names = [field.metavar for field in parser.fields if field.option.positional]
        return f"{shown}: unexpected argument; expected {f'one {names[0]}' if names else 'options only'}"
    hint = did_you_mean(shown, parser._option_string_actions)
    return f"{shown}: unknown option{hint or f'; {parser.prog} --help lists the options'}"


def _field(field: "dataclasses.Field[Any]", kind: Any, text: str, section: str) -> Field:
    found = Option()
    if get_origin(kind) is Annotated:
        kind, found = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (each for each in get_args(kind) if each is not types.NoneType)
    default = field.default if field.default_factory is MISSING else field.default_factory
    return Field(field.name, kind, default, "Arguments" if found.positional else section, found, text)


def _built(command: type[_Args], given: dict[str, Any]) -> _Args:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(command):  # pyright: ignore[reportArgumentType]
        if field.default_factory is not MISSING:
            values[field.name] = _built(get_type_hints(command)[field.name], given)
        elif field.name in given:
            values[field.name] = given[field.name]
    return command(**values)


def _texts(command: Any) -> dict[str, str]:
    """Name of a field -> the string below it, those of base classes included."""
    found: dict[str, str] = {}
    for each in command.__mro__[-2::-1]:  # without object
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = text
    return found


def _wrapped(text: str, width: int, indent: int = 0) -> str:
    """Lines of whole words, all but the first indented."""
    gap, text = " " * indent, " ".join(text.split())
    return textwrap.fill(text, width, subsequent_indent=gap, break_long_words=False, break_on_hyphens=False)


def _row(left: str, text: str, width: int) -> str:
    """Lines of --help: `left` beside the text, or above it if it is too wide."""
    lines = textwrap.indent(_wrapped(text, width - _TEXT_COLUMN), " " * _TEXT_COLUMN)
    if len(left) > _TEXT_COLUMN - 4:
        return f"  {left}\n{lines}"
    return f"  {left:<{_TEXT_COLUMN - 2}}{lines[_TEXT_COLUMN:]}"
