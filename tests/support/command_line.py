"""Commands that run in this process, and folders for them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moe.cli import main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command, run in this process."""
    try:
        status = main(argv)
    except SystemExit as exit_:  # tyro's way out
        status = exit_.code if isinstance(exit_.code, int) else 1
    out, err = capsys.readouterr()
    return status, out, err


def fails_in_one_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The line on stderr of a command that must fail with status 2."""
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("moesmith: ") and err.count("\n") == 1
    return err


def variant(folder: Path, into: Path, **files: str | None) -> Path:
    """A copy of the folder with other contents of some files; None leaves a file out. `__` in a name is a dot."""
    shutil.copytree(folder, into)
    for name, content in files.items():
        path = into / name.replace("__", ".")
        if content is None:
            path.unlink()
        else:
            path.write_text(content)
    return into


# Special tokens of `write_tokenizer`, its tokenizer_config.json, and chat templates.
NAMES = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>")
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}

TEMPLATES = {
    "roles": "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m['content'] | trim }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    # White space of blocks on lines of their own, a comment, and the last line break of the file.
    "lines": """
{# as most released templates are written #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{% else %}
    {% set system = 'You are a test.' %}
{%- endif %}
{{- bos_token + system + '\\n\\n' }}
  {%- for message in messages %}
    {%- if loop.index0 % 2 != (message['role'] == 'assistant') %}
      {{- raise_exception('roles must alternate') }}
    {%- endif %}
    <|{{ message.role }}|> {{ message.content }}
  {%- endfor %}

{% if add_generation_prompt %}
<|assistant|>
{% endif %}
""",
    # What templates with tools use: namespaces, macros, JSON that escapes no HTML, loop controls, tests of variables.
    "tools": """{%- macro said(m, first) %}{{ '' if first else '\\n' }}<|{{ m.role }}|>{{ m | tojson }}{% endmacro -%}
{%- set ns = namespace(first=true, count=0) -%}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}
{{ said(m, ns.first) }}{%- set ns.first = false -%}{%- set ns.count = ns.count + 1 -%}
{%- if ns.count > 2 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{{ tools is none }}{{ documents is defined }}{{ unk_token is defined }}{{ pad_token is defined }}{{ nothing }}
{{- messages | tojson(indent=2) }}{{ dict(a=1) | tojson }}{{ strftime_now('%Y') }}""",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}<|assistant|>",
}


def write_tokenizer(folder: Path, **settings: Any) -> Path:
    """A folder with a byte-level tokenizer of single bytes and special tokens, and tokenizer_config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(list(NAMES))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return folder
