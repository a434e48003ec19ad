"""Files that a folder's own files refer to travel with it, or the reference goes and a warning says so."""

import base64
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from moe import CheckpointError
from moe.checkpoint.convert import convert, cut
from moe.checkpoint.format import auxiliary
from moe.checkpoint.format.auxiliary import (
    MAX_AUXILIARY_FILES,
    MAX_CODE_BYTES,
    MAX_LICENSE_BYTES,
    PATTERNS,
    read_auxiliary,
)
from moe.checkpoint.format.manifest import verify
from tests.support.checkpoint_cases import V3, assert_same, build, configure

CODE = "configuration_tiny.TinyConfig"
MODEL = "modeling_tiny.TinyForCausalLM"
MAP = {"AutoConfig": CODE, "AutoModelForCausalLM": MODEL}

# As Kimi's: ranks of byte strings in base64, and Python beside it.
TOKENIZER = """
import base64
from transformers import PreTrainedTokenizer
from .alphabet import PLACES
VOCAB_FILES_NAMES = {"vocab_file": "tiny.tiktoken"}
class TinyTokenizer(PreTrainedTokenizer):
    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]
    def __init__(self, vocab_file, **settings):
        self.ranks = {}
        with open(vocab_file) as file:
            for line in file:
                token, rank = line.split()
                self.ranks[base64.b64decode(token).decode()] = int(rank) + PLACES
        self.tokens = {rank: token for token, rank in self.ranks.items()}
        super().__init__(**settings)
    @property
    def vocab_size(self):
        return len(self.ranks)
    def get_vocab(self):
        return dict(self.ranks)
    def _tokenize(self, text, **settings):
        return list(text)
    def _convert_token_to_id(self, token):
        return self.ranks[token]
    def _convert_id_to_token(self, index):
        return self.tokens[index]
"""
CONFIGURATION = """
from transformers import DeepseekV3Config
class TinyConfig(DeepseekV3Config):
    model_type = "deepseek_v3"
    from_the_folder = True
"""
MODELING = """
from transformers import DeepseekV3ForCausalLM
from .configuration_tiny import TinyConfig
class TinyForCausalLM(DeepseekV3ForCausalLM):
    config_class = TinyConfig
"""
ALPHABET = "PLACES = 7\n"
VOCABULARY = b"".join(b"%b %d\n" % (base64.b64encode(bytes([97 + i])), i) for i in range(8))
TEXT_FILES = {
    "tokenization_tiny.py": TOKENIZER,
    "alphabet.py": ALPHABET,
    "configuration_tiny.py": CONFIGURATION,
    "modeling_tiny.py": MODELING,
    "tokenizer_config.json": json.dumps(
        {"auto_map": {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]}, "unk_token": None},
    ),
    "chat_template.jinja": "{{ messages[0]['content'] }}",
    "additional_chat_templates/tool.jinja": "tool {{ messages[0]['content'] }}",
}
FILES = {name: text.encode() for name, text in TEXT_FILES.items()} | {"tiny.tiktoken": VOCABULARY}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("carried") / "released"
    build(V3).save(folder)
    put(folder, FILES)
    configure(folder, auto_map=MAP)
    return folder


@pytest.fixture
def released(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "released")


def save(source: Path, target: Path) -> None:
    moe.load(source, progress=False).save(target)


def save_without_the_map(source: Path, target: Path) -> None:
    """As for a family whose files are written under the name of another."""
    model = moe.load(source, progress=False)
    model.config = dataclasses.replace(model.config, extra={})
    model.save(target)


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "save": save,
    "save over another": lambda source, target: (build(V3).save(target), save(source, target)),
    "save over itself": lambda source, target: (shutil.copytree(source, target), save(target, target)),
    "convert": lambda source, target: convert(source, target, dtype="BF16", progress=False),
    "convert to fp8": lambda source, target: convert(source, target, dtype="fp8", block_size=(8, 8), progress=False),
    "cut": lambda source, target: cut(source, target, layers=[0, 2], experts=[0, 1, 2], compare=False, progress=False),
    "cut of a save": lambda source, target: (
        save(source, target.with_name("between")),
        cut(target.with_name("between"), target, layers=[0, 1], experts=[3, 4, 5], compare=False, progress=False),
    ),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies code to a cache of its own before it imports it."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("way", WAYS)
def test_the_result_works_as_its_source_does(
    released: Path, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    WAYS[way](released, out)
    assert {name: (out / name).read_bytes() for name in FILES} == FILES
    assert config_of(out)["auto_map"] == MAP
    assert not caplog.records
    assert not verify(out).findings
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer("cab")["input_ids"] == [9, 7, 8] and tokenizer.decode([8, 14]).replace(" ", "") == "bh"
    said = tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False, chat_template="tool")
    assert said == "tool hi"
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert type(config).__name__ == "TinyConfig" and config.from_the_folder
    if way == "save":
        theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, experts_implementation="eager")
        assert type(theirs).__name__ == "TinyForCausalLM"
        ids = torch.tensor([[8, 14, 9]])
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, moe.load(out)(ids).logits, atol=1e-4, rtol=0)


def test_a_model_carries_them_without_its_folder(released: Path, tmp_path: Path) -> None:
    files = FILES | {"generation_config.json": b'{"a": 1}\r\n', "tokenizer.model": bytes(range(256))}
    put(released, files)
    model = moe.load(released)
    assert model.carried_files == files
    shutil.rmtree(released)
    model.save(tmp_path / "out")
    assert_same(moe.load(tmp_path / "out"), model)
    assert moe.load(tmp_path / "out").carried_files == files
    model.carried_files["../escape"] = b""
    with pytest.raises(CheckpointError, match=r"carried_files\['\.\./escape'\] is not an auxiliary file"):
        model.save(tmp_path / "out")


@pytest.mark.parametrize("way", ["save", "convert", "cut"])
def test_a_reference_to_nothing_goes_with_one_warning(
    released: Path, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (released / "configuration_tiny.py").unlink()  # which modeling_tiny.py imports
    (released / "alphabet.py").unlink()  # which tokenization_tiny.py imports
    configure(released, auto_map=MAP | {"AutoModel": "org/repository--modeling.Model"})
    WAYS[way](released, tmp_path / "out")
    assert config_of(tmp_path / "out")["auto_map"] == {"AutoModel": "org/repository--modeling.Model"}
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer == {"unk_token": None}
    left = {path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".py"}
    assert left == set()
    [record] = caplog.records
    assert record.name == "moe" and record.levelno == logging.WARNING
    for part in (
        "auto_map.AutoConfig of config.json, because there is no configuration_tiny.py",
        "auto_map.AutoModelForCausalLM of config.json, because there is no configuration_tiny.py",
        "auto_map.AutoTokenizer of tokenizer_config.json, because there is no alphabet.py",
    ):
        assert part in record.getMessage()


def test_files_named_in_json_that_python_alone_reads(
    released: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers reads tokenizer_config.json with Python's parser: NaN is a number, the last of two values counts."""
    path = released / "tokenizer_config.json"
    path.write_text(path.read_text()[:-1] + ', "model_max_length": NaN, "unk_token": "a", "unk_token": null}')
    moe.load(released).save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {n for n in FILES if n.endswith(".py")}
    assert (tmp_path / "out" / "tiny.tiktoken").exists()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert moe.load(released).carried_files.keys() == FILES.keys()
    assert not caplog.messages
    text = path.read_text(encoding="utf-8-sig")
    path.write_text(text[:-1])
    assert "tokenization_tiny.py" not in moe.load(released).carried_files
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("files that it may name are not copied: ")
    path.write_text(text)
    (released / "alphabet.py").unlink()
    moe.load(released).save(tmp_path / "without")
    assert "auto_map" not in json.loads((tmp_path / "without" / "tokenizer_config.json").read_text())


def test_a_model_that_was_made_without_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build(V3)
    model.config = moe.ModelConfig.from_dict(V3.to_dict() | {"extra": {"auto_map": MAP, "bos_token_id": 1}})
    model.save(tmp_path / "out")
    assert "auto_map" not in config_of(tmp_path / "out") and config_of(tmp_path / "out")["bos_token_id"] == 1
    assert len(caplog.records) == 1 and "modeling_tiny.py" in caplog.text


def test_code_that_nothing_names_any_more(released: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_without_the_map(released, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {"tokenization_tiny.py", "alphabet.py"}
    assert "modeling_tiny.py, because no other file names it" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("table", ["stacked", "deepseek"])
def test_code_for_another_layout_is_left_out(
    released: Path, table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would find none of its experts, and transformers would initialise them at random."""
    configure(released, auto_map=MAP | {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]})
    convert(released, tmp_path / "out", table=table, progress=False)
    assert config_of(tmp_path / "out")["auto_map"] == {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]}
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {"tokenization_tiny.py", "alphabet.py"}
    assert [record.getMessage() for record in caplog.records] == [
        "not written: auto_map.AutoConfig of config.json, because its code reads another layout; "
        "auto_map.AutoModelForCausalLM of config.json, because its code reads another layout"
    ]


KEPT_MAPS: tuple[Any, ...] = (
    None,
    1,
    "a.C",
    [],
    {},
    [None],
    {"A": None},
    {"A": 3},
    {"A": {"B": "a.C"}},
    {"A": "x/y--a.C"},
)
LOST = ("../outside.C", "/etc/passwd.C", "a/b.C", "C", "", ".C", "a\nb.C", "a.b.C", "..outside.C", "outside.C")
LOST_MAPS = (
    *({"AutoConfig": name} for name in LOST),
    {"AutoTokenizer": ["../outside.C", None]},
    ["../outside.C", None],
)


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_odd_references_never_leave_the_folder(released: Path, place: str, tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text("secret")
    for i, auto_map in enumerate((*KEPT_MAPS, *LOST_MAPS)):
        (released / place).write_text(json.dumps(json.loads((released / place).read_text()) | {"auto_map": auto_map}))
        model = moe.load(released)
        assert b"secret" not in model.carried_files.values()
        model.save(tmp_path / f"out-{i}")
        kept = json.loads((tmp_path / f"out-{i}" / place).read_text())
        assert kept["auto_map"] == auto_map if i < len(KEPT_MAPS) else "auto_map" not in kept


def test_one_of_two_tokenizers(released: Path, tmp_path: Path) -> None:
    pair = {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", "tokenization_fast.TinyTokenizerFast"]}
    (released / "tokenizer_config.json").write_text(json.dumps({"b": "é", "auto_map": pair, "a": 1e-5}))
    save(released, tmp_path / "out")
    text = (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert json.loads(text)["auto_map"] == {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]}
    assert list(json.loads(text)) == ["b", "auto_map", "a"] and '"b": "é"' in text


def test_imports_are_followed_as_transformers_does(tmp_path: Path) -> None:
    from transformers.dynamic_module_utils import get_relative_import_files

    sources = {
        "a.py": "from .b import x\n  from .c import (y,\n z)\nfrom . import d\nimport .e\nfrom .n.m import o",
        "b.py": "from .a import x  # a cycle\r\nfrom .h import *\r\n",
        "c.py": '"""\nfrom .i import in_a_text\n"""\n# from .j import x\nx = 1; from .k import y\n',
    }
    sources |= {f"{name}.py": "" for name in "dehijk"}
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "n.m.py").touch()  # transformers looks for this, which Python cannot import
    theirs = {Path(path).name for path in get_relative_import_files(tmp_path / "a.py")} | {"a.py"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "a.C"}}))
    assert read_auxiliary(tmp_path).keys() == theirs - {"n.m.py"} == {f"{name}.py" for name in "abcehi"}


@pytest.mark.parametrize("name", ["modeling_tiny.py", "tiny.tiktoken", "additional_chat_templates/tool.jinja"])
def test_a_link_that_leads_out_is_refused(released: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    (released / name).unlink()
    (released / name).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="a symbolic link that leads out") as caught:
        moe.load(released)
    assert caught.value.path == released / name


def test_a_linked_folder_of_templates_is_refused(released: Path, tmp_path: Path) -> None:
    shutil.move(released / "additional_chat_templates", tmp_path / "outside")
    (released / "additional_chat_templates").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="additional_chat_templates: a symbolic link that leads out"):
        moe.load(released)


def test_a_snapshot_of_the_hub(released: Path, tmp_path: Path) -> None:
    """Its files are links to the blobs of the same repository."""
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    for i, path in enumerate(sorted(path for path in released.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(released)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(i))
        link.symlink_to(os.path.relpath(blobs / str(i), link.parent))
    assert moe.load(snapshot).carried_files == FILES


def test_what_is_downloaded_holds_what_travels() -> None:
    from fnmatch import fnmatch

    names = {*FILES, "tiktoken.model", "hy.tiktoken", "spm.model", "chat_template.json", "tokenizer.4.0.0.json"}
    names |= {"LICENSE", "LICENSE-MODEL"}
    assert not [name for name in names if not any(fnmatch(name, pattern) for pattern in PATTERNS)]
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "figures/a.png", "README.md"):
        assert not any(fnmatch(name, pattern) for pattern in PATTERNS)


def test_files_named_by_tokenizer_config(released: Path) -> None:
    values = json.loads(FILES["tokenizer_config.json"])
    values |= {"fast_tokenizer_files": ["tokenizer.4.0.0.json", "tokenizer.json"], "vocab_file": "words.txt"}
    values |= {
        "a_file": "config.json",
        "e_file": "hf_quant_config.json",
        "b_file": "../outside.txt",
        "c_file": "/etc/passwd",
        "d_file": "README.md",
    }
    (released / "tokenizer_config.json").write_text(json.dumps(values))
    put(released, {"tokenizer.4.0.0.json": b"{}", "words.txt": b"a\n", "README.md": b"", "hf_quant_config.json": b"{}"})
    (released.parent / "outside.txt").touch()
    found = moe.load(released).carried_files
    assert found.keys() - FILES.keys() == {"tokenizer.4.0.0.json", "words.txt"}


def test_limits_of_carried_files(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load accepts what a save accepts, and vice versa."""
    model = moe.load(released)
    cases: list[tuple[str, Any, str]] = [
        ("modeling_tiny.py", b"#" * (MAX_CODE_BYTES + 1), "too large"),
        ("tokenizer.json", b"[" * 101, "too large"),
        ("unnamed.bin", b"", "auto_map names"),
        ("model.safetensors.index.json", b"", "auto_map names"),
        ("hf_quant_config.json", b"{}", "auto_map names"),
        ("tokenizer_config.json", "{}", "expected bytes; found str"),
        ("sub/tokenizer.json", b"", "auto_map names"),
        ("config.json", b"{}", "auto_map names"),
        ("additional_chat_templates/../x.jinja", b"", "auto_map names"),
    ]
    for name, content, problem in cases:
        monkeypatch.setattr(auxiliary, "MAX_AUXILIARY_BYTES", 100 if name == "tokenizer.json" else 2**26)
        before = dict(model.carried_files)
        model.carried_files[name] = content
        with pytest.raises(CheckpointError, match=rf"carried_files\['{name}'\] .*{problem}"):
            model.save(tmp_path / "out")
        model.carried_files = before
        assert not (tmp_path / "out").exists()
    (released / "modeling_tiny.py").write_bytes(b"#" * (MAX_CODE_BYTES + 1))
    with pytest.raises(CheckpointError, match=r"modeling_tiny\.py: file too large"):
        moe.load(released)


def test_as_many_files_as_can_be_read(released: Path, tmp_path: Path) -> None:
    templates = {f"additional_chat_templates/t{i}.jinja": b"x" for i in range(MAX_AUXILIARY_FILES - len(FILES))}
    put(released, templates)
    model = moe.load(released)
    model.save(tmp_path / "out")
    assert moe.load(tmp_path / "out").carried_files == FILES | templates
    model.carried_files["additional_chat_templates/more.jinja"] = b"x"
    with pytest.raises(CheckpointError, match="too many carried_files; expected at most 128; found 129"):
        model.save(tmp_path / "more")
    put(released, {"additional_chat_templates/more.jinja": b"x"})
    with pytest.raises(CheckpointError, match="expected at most 128; found 129"):
        moe.load(released)


def test_a_folder_with_code_of_its_users_is_not_replaced(released: Path) -> None:
    (released / "train.py").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds other files; .*; found train\.py"):
        build(V3).save(released)
    (released / "train.py").rename(released / "additional_chat_templates" / "train.py")
    with pytest.raises(CheckpointError, match=r"found additional_chat_templates/train\.py"):
        build(V3).save(released)


def test_files_that_stay_in_a_folder_are_those_that_something_names(
    released: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokenizer stays; the code for the model goes with the configuration that named it."""
    build(V3).save(released)
    kept = {name for name in FILES if (released / name).exists()}
    assert kept == FILES.keys() - {"modeling_tiny.py", "configuration_tiny.py"}
    assert [record.getMessage() for record in caplog.records] == [
        "not written: configuration_tiny.py, because no other file names it; "
        "modeling_tiny.py, because no other file names it"
    ]
    build(V3).save(released)
    assert not verify(released).findings


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"auto_map": ', b"\xff", b"[" * 1000])
def test_a_malformed_tokenizer_config_travels_as_it_is(released: Path, content: bytes, tmp_path: Path) -> None:
    (released / "tokenizer_config.json").write_bytes(content)
    save(released, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == content


def test_licences_travel_and_a_description_of_another_model_does_not(released: Path, tmp_path: Path) -> None:
    licences = {"LICENSE": b"MIT", "LICENSE-MODEL": b"a", "LICENSE.txt": b"x" * MAX_LICENSE_BYTES}
    others = {"README.md": b"# Tiny", "LICENSE-LONG": b"x" * (MAX_LICENSE_BYTES + 1), "my LICENSE": b"b"}
    put(released, licences | others)
    (released / "LICENSES").mkdir()
    (tmp_path / "elsewhere").write_bytes(b"not of this model")
    (released / "LICENSE-LINK").symlink_to(tmp_path / "elsewhere")
    model = moe.load(released)
    assert model.carried_files == FILES | licences
    model.save(tmp_path / "saved")
    convert(released, tmp_path / "converted", dtype="bf16")
    cut(released, tmp_path / "cut", layers=[0], experts=[0, 3, 6, 9], compare=False)
    for name in ("saved", "converted", "cut"):
        written = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        assert licences.items() <= written.items() and not others.keys() & written.keys()
        assert not verify(tmp_path / name).findings
    model.carried_files = {}
    model.save(tmp_path / "saved")  # a folder of a save, which keeps what it has
    assert (tmp_path / "saved" / "LICENSE").read_bytes() == b"MIT"
    model.carried_files = {"LICENSE": others["LICENSE-LONG"]}
    too_large = rf"carried_files\['LICENSE'\] is too large; expected at most {MAX_LICENSE_BYTES} bytes"
    with pytest.raises(CheckpointError, match=too_large):
        model.save(tmp_path / "long")
