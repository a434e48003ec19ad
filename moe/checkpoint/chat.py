"""Chat templates of checkpoint folders: they turn messages into the text format that a model was trained on.

They are rendered as by `apply_chat_template` of transformers, in the same sandbox: a template is code from an untrusted
file.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from moe.checkpoint.format.auxiliary import special_token, templates
from moe.checkpoint.format.files import read_bounded
from moe.checkpoint.format.folder import MAX_CONFIG_BYTES, MAX_CONFIG_VALUES, member
from moe.checkpoint.format.strict_json import last_values, parse_as_python
from moe.errors import CheckpointError

_SETTINGS, _TOKENS, _TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The default chat template of a folder.

    Attributes:
        file: its file, for errors.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], file: Path) -> None:
        self.file, self._tokens = file, dict(tokens)
        self._compiled = self._attempt(lambda: _environment().from_string(source))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the template that transformers uses.

        That is chat_template.jinja, with other templates in a folder beside it. Without any of these files, it is the
        chat_template of tokenizer_config.json: one text, or several with names, of which "default" is used.

        Raises CheckpointError if there is none, or none called "default".
        """
        settings, file = _object(folder, _SETTINGS), folder / _TEMPLATE
        sources: Any = {Path(name).stem: _text(folder, name) for name in templates(folder)}
        if file.is_file():
            sources["default"] = _text(folder, _TEMPLATE)
        elif not sources:
            sources, file = settings.get("chat_template"), folder / _SETTINGS
            if isinstance(sources, list) and all(isinstance(each, dict) for each in sources):
                sources = {each.get("name"): each.get("template") for each in sources}
        if sources is None:
            problem = "no chat template"
            raise CheckpointError(folder, problem, expected=f"{_TEMPLATE}, or a chat_template in {_SETTINGS}")
        source = sources.get("default") if isinstance(sources, dict) else sources
        if not isinstance(source, str):
            found = f"templates called {', '.join(map(str, sources))}" if isinstance(sources, dict) else repr(sources)
            raise CheckpointError(file, "chat_template", expected='a text, or one called "default"', found=found)
        values = settings if "added_tokens_decoder" in settings else settings | _object(folder, _TOKENS)
        tokens = {name: special_token(values, name) for name in _NAMED_TOKENS}
        return cls(source, {name: token for name, token in tokens.items() if token is not None}, file)

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Return the conversation as text, by default up to the beginning of the model's next message.

        Raises CheckpointError for every exception in the template, deliberate (a role that it rejects) or not.
        """
        settings: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return self._attempt(lambda: self._compiled.render(messages=messages, **settings, **self._tokens))

    def _attempt(self, act: Any) -> Any:
        try:
            return act()
        except Exception as error:  # a template can raise anything
            problem = f"the chat template failed: {error or type(error).__name__}"
            raise CheckpointError(self.file, problem) from error


def _environment() -> Any:
    """transformers' environment: no attribute with an underscore, nothing that changes an object, no files, no code."""
    from jinja2 import TemplateError, ext, nodes, runtime, utils
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} marks what the model has written, for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

        def _unchanged(self, caller: runtime.Macro) -> str:
            return caller()

    class Namespace(utils.Namespace):
        def __init__(*args: Any, **values: Any) -> None:
            self, values = args[0], dict(*args[1:], **values)
            utils.Namespace.__init__(self)
            for name, value in values.items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace takes no attribute called {name!r}")
            utils.Namespace.__setitem__(self, name, value)

    class Dict:
        """A callable like `dict` that hides the type, from which a template could reach others."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda layout: datetime.now().strftime(layout),
        dict=Dict(),
        namespace=Namespace,
    )
    return environment


def _text(folder: Path, name: str) -> str:
    try:
        return read_bounded(member(folder, name), MAX_CONFIG_BYTES).decode()
    except UnicodeDecodeError:
        raise CheckpointError(folder / name, "not text in UTF-8") from None


def _object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder; empty without the file."""
    if not (folder / name).is_file():
        return {}
    content = read_bounded(member(folder, name), MAX_CONFIG_BYTES)
    values = last_values(parse_as_python(content, folder / name, max_values=MAX_CONFIG_VALUES))
    if not isinstance(values, dict):
        raise CheckpointError(folder / name, "not a JSON object", found=repr(values)[:80])
    return values
