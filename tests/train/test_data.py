"""Documents, the held-out split, tokenizers, packed tokens, windows and the baselines scored on them."""

import bz2
import gzip
import hashlib
import importlib
import itertools
import json
import lzma
import math
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moe.errors import ConfigError
from moe.train.baselines import bigram_nats, bits_per_byte, unigram_nats
from moe.train.data import Dataset, Sampler, document_ids, evaluation_batches, open_dataset, prepare
from moe.train.documents import (
    COPY_MIN_CHARACTERS,
    DOCUMENT_BYTES,
    Document,
    paragraphs,
    python_topics,
    read_files,
    split,
)
from moe.train.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu")


def make_documents(count: int) -> list[Document]:
    rng = np.random.default_rng(0)
    texts = ("\n\n".join(" ".join(rng.choice(WORDS, 12)) + f" {i}." for _ in range(4)) for i in range(count))
    return [Document(f"document {i}", text) for i, text in enumerate(texts)]


def test_no_paragraph_of_a_held_out_topic_is_left_in_training() -> None:
    topics = python_topics()
    training, validation = map(list, split(topics))
    names = {document.name for document in validation}
    assert names and names.isdisjoint(document.name for document in training)
    assert {d.name: d.text for d in validation} == {d.name: d.text for d in topics if d.name in names}  # whole topics

    def long_paragraphs(documents: list[Document]) -> set[str]:
        keys = (" ".join(text.split()) for document in documents for text in paragraphs(document.text))
        return {key for key in keys if len(key) >= COPY_MIN_CHARACTERS}

    assert long_paragraphs(validation).isdisjoint(long_paragraphs(training))
    raw = [topic for topic in topics if topic.name not in names]
    assert not long_paragraphs(validation).isdisjoint(long_paragraphs(raw)), "the topics do repeat each other"
    kept = sum(len(document.text) for document in training)
    assert kept > 0.8 * sum(len(topic.text) for topic in raw)


def test_a_copy_under_another_name_does_not_leak() -> None:
    documents = make_documents(40)
    validation = list(split(documents)[1])
    copy = Document("a copy", validation[0].text.replace(" ", "  "))
    training, again = map(list, split([*documents, copy]))
    if "a copy" not in {document.name for document in again}:
        assert "a copy" not in {document.name for document in training}
    assert {document.name for document in validation} <= {document.name for document in again}


def test_split_depends_on_names_only_and_leaves_no_part_empty() -> None:
    documents = make_documents(50)
    held_out = {document.name for document in split(documents)[1]}
    assert 0 < len(held_out) < 25
    assert held_out == {document.name for document in split(documents[::-1])[1]}
    for i in range(5):
        training, validation = map(list, split(documents[2 * i : 2 * i + 2]))
        assert len(training) == len(validation) == 1
    with pytest.raises(ConfigError, match="two documents"):
        split(documents[:1])
    same = "\n\n".join(["one paragraph that is long enough to count as a copy"] * 3)
    with pytest.raises(ConfigError, match="copy"):
        split([Document("a", same), Document("b", same)])


def test_documents_are_held_out_by_the_hash_of_their_name() -> None:
    def rank(document: Document) -> tuple[int, str]:
        return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big"), document.name

    few, many = make_documents(4), make_documents(300)
    below = [document for document in many if rank(document)[0] < 2**64 / 10]
    above = [document for document in many if document not in below]
    for documents in (few, many, above[:9], below[:9], above[:2], below[:2]):
        ranked = sorted(documents, key=rank)
        share = sum(rank(document)[0] < 2**64 / 10 for document in documents)
        expected = ranked[: min(max(share, 1), len(documents) - 1)]
        assert {d.name for d in split(documents)[1]} == {d.name for d in expected}


@pytest.mark.parametrize("text", ["", "\n\n", "a", "a\n\nb", "\n \na\nb\n\n\nc\n", "a\r\n\r\nb"])
def test_paragraphs_join_to_the_text(text: str) -> None:
    assert "".join(paragraphs(text)) == text


def test_long_files_become_documents(tmp_path: Path) -> None:
    (tmp_path / "with_blanks.txt").write_text("word " * 200 + "\n\n" * 1 + ("line\n" * 50 + "\n") * 200)
    (tmp_path / "lines.md").write_text("one line\n" * 10000)
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    documents = list(read_files([tmp_path]))
    assert [d.name for d in documents][:2] == ["lines.md#0", "lines.md#1"]
    for name in ("with_blanks.txt", "lines.md"):
        pieces = [d.text for d in documents if d.name.startswith(name)]
        assert "".join(pieces) == (tmp_path / name).read_text()
        assert len(pieces) > 3 and all(DOCUMENT_BYTES <= len(p) <= 2 * DOCUMENT_BYTES + 10 for p in pieces[:-1])
    assert list(read_files([tmp_path / "lines.md"])) == [d for d in documents if d.name.startswith("lines.md")]


def test_unreadable_data_is_refused_by_name(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"good\xff")
    with pytest.raises(ConfigError, match=r"bad\.txt.*UTF-8.*0xff at offset 4"):
        list(read_files([bad]))
    with pytest.raises(ConfigError, match=r"nowhere.*existing"):
        read_files([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty.*\.txt"):
        read_files([tmp_path / "empty"])


def test_tokenizer_is_a_function_of_its_text_and_round_trips() -> None:
    texts = [document.text for document in make_documents(10)]
    tokenizer = train_tokenizer(texts, 300)
    assert tokenizer.to_str() == train_tokenizer(texts, 300).to_str()
    assert tokenizer.get_vocab_size() <= 300
    for text in (texts[0], "déjà vu ☃ \x00 \t", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_users_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text"], 300)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    assert load_tokenizer(file)[1] == END_OF_TEXT
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert load_tokenizer(file)[1] == "a"
    beside.write_text(json.dumps({"eos_token": "<no such token>"}))
    with pytest.raises(ConfigError, match="no such token"):
        load_tokenizer(file)
    beside.write_text("[")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        load_tokenizer(file)
    beside.unlink()
    file.write_text("not JSON")
    with pytest.raises(ConfigError, match=r"a tokenizer\.json"):
        load_tokenizer(file)
    with pytest.raises(ConfigError, match="readable"):
        load_tokenizer(tmp_path / "nowhere.json")


def template_of(dataset: Dataset, tmp_path: Path) -> str:
    """A chat as transformers renders it with the checkpoint's files."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "exported"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in dataset.carried_files().items():
        (folder / name).write_bytes(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == dataset.end_of_text and tokenizer.pad_token == "[PAD]"
    return tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_a_users_chat_template_and_padding_travel_into_the_checkpoint(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i, document in enumerate(make_documents(4)):
        (text / f"{i}.txt").write_text(document.text)
    tokenizer = train_tokenizer(["some text"], 300)
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    said = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    beside = tmp_path / "tokenizer_config.json"
    pad = {"pad_token": {"content": "[PAD]"}, "add_bos_token": True}
    for number, (template, expected) in enumerate(
        ((said, "<user>hi"), ([{"name": "default", "template": said}, {"name": "other", "template": ""}], "<user>hi"))
    ):
        beside.write_text(json.dumps({**pad, "chat_template": template}))
        prepare(tmp_path / f"data{number}", [text], tmp_path / "tokenizer.json", 0)
        dataset = open_dataset(tmp_path / f"data{number}")
        assert template_of(dataset, tmp_path) == expected
    (tmp_path / "chat_template.jinja").write_text(said + "!")  # goes before the other, as in transformers
    dataset = prepare(tmp_path / "data", [text], tmp_path / "tokenizer.json", 0)
    assert template_of(dataset, tmp_path) == "<user>hi!"
    end, pad_id = dataset.end_of_text, dataset.tokenizer.token_to_id("[PAD]")
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": pad_id}
    assert dataset.token_ids == json.loads(dataset.carried_files()["generation_config.json"]) == ids
    beside.write_text(json.dumps({"pad_token": "<no such token>", "chat_template": 3}))
    (tmp_path / "chat_template.jinja").unlink()
    dataset = prepare(tmp_path / "plain", [text], tmp_path / "tokenizer.json", 0)
    assert "pad_token_id" not in dataset.token_ids and "chat_template.jinja" not in dataset.carried_files()


def test_packed_tokens_are_the_documents_between_end_tokens(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i, document in enumerate(make_documents(12)):
        (text / f"{i}.txt").write_text(document.text + f"\nthis spells {END_OF_TEXT} in text")
    dataset = prepare(tmp_path / "data", [text], None, 320)
    training, validation = map(list, split(read_files([text])))
    for tokens, documents in ((dataset.train, training), (dataset.validation, validation)):
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
        ends = np.flatnonzero(tokens == dataset.end_of_text)
        assert ends[0] == 0 and ends[-1] == len(tokens) - 1 and len(ends) == len(documents) + 1
        found = [dataset.tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]
        assert found == [document.text for document in documents]
    assert dataset.validation_bytes == sum(len(document.text.encode()) for document in validation)

    again = open_dataset(tmp_path / "data")
    assert np.array_equal(again.train, dataset.train) and again.facts == dataset.facts
    carried = again.carried_files()
    assert Tokenizer.from_str(carried["tokenizer.json"].decode()).to_str() == dataset.tokenizer.to_str()
    file = tmp_path / "data" / "train.bin"
    file.write_bytes(file.read_bytes()[:-2] + b"\1\0")
    with pytest.raises(ConfigError, match=r"train\.bin.*changed"):
        open_dataset(tmp_path / "data")


def test_an_epoch_predicts_each_token_at_most_once_and_almost_all() -> None:
    sampler = Sampler(np.arange(1000, dtype=np.uint16), 17, 1, seed=5)
    epochs: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    while (window := sampler.next_batch()) is not None and sampler.epoch < 2:
        epochs[sampler.epoch].append(window)
    for windows in epochs.values():
        batch = torch.cat(windows)
        assert torch.equal(batch - batch[:, :1], torch.arange(17).expand_as(batch))
        predicted = batch[:, 1:].flatten()
        assert len(predicted.unique()) == len(predicted) >= 1000 - 2 * 17
        assert not torch.equal(batch[:, 0], batch[:, 0].sort()[0])
    starts = [{int(window[0, 0]) for window in windows} for windows in epochs.values()]
    assert starts[0].isdisjoint(starts[1]), "epochs cut the text at other places"


@pytest.mark.parametrize("batches_before", [0, 1, 7, 20, 21, 45])
def test_sampler_resumes_from_its_state_anywhere(batches_before: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 500, 1000).astype(np.uint16)
    whole = Sampler(tokens, 17, 3, seed=1)
    for _ in range(batches_before):
        whole.next_batch()
    resumed = Sampler(tokens, 17, 3, seed=1)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(30):
        assert torch.equal(whole.next_batch(), resumed.next_batch())
    assert not torch.equal(Sampler(tokens, 17, 3, seed=2).next_batch(), Sampler(tokens, 17, 3, seed=1).next_batch())


def test_a_window_longer_than_the_text_is_refused() -> None:
    tokens = np.arange(20, dtype=np.uint16)
    assert torch.equal(Sampler(tokens, 20, 2, 0).next_batch()[1], torch.arange(20))
    with pytest.raises(ConfigError, match="at most 20"):
        Sampler(tokens, 21, 2, 0)


@pytest.mark.parametrize(
    ("count", "length", "batch_size"), [(100, 10, 3), (91, 10, 3), (5, 10, 3), (2, 10, 1), (11, 10, 1)]
)
def test_evaluation_predicts_every_token_but_the_first_once(count: int, length: int, batch_size: int) -> None:
    batches = list(evaluation_batches(np.arange(count, dtype=np.uint16), length, batch_size))
    predicted = torch.cat([batch[:, 1:].flatten() for batch in batches])
    assert torch.equal(predicted, torch.arange(1, count))
    assert all(len(batch) <= batch_size and batch.shape[1] <= length for batch in batches)


def test_ids_that_a_vocabulary_leaves_out_count(tmp_path: Path) -> None:
    """A model needs rows up to the largest id, which may exceed the number of tokens and 16 bits."""
    words = {"<|endoftext|>": 3, "red": 70000, "blue": 9}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="blue"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name, text in (("a", "red blue"), ("b", "blue red red")):
        (tmp_path / f"{name}.txt").write_text(text)
    data = [tmp_path / "a.txt", tmp_path / "b.txt"]
    dataset = prepare(tmp_path / "data", data, tmp_path / "tokenizer.json", 300)
    assert dataset.facts["vocab_size"] == 70001
    found = sorted([dataset.train.tolist(), dataset.validation.tolist()])
    assert found == [[3, 9, 70000, 70000, 3], [3, 70000, 9, 3]]


def test_bytes_of_first_tokens() -> None:
    """First tokens of SentencePiece: a space that decoding drops, single bytes of a character, an empty document."""
    vocabulary = {"<eos>": 0, "▁day": 1, "<0xE6>": 2, "日": 3, "x": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    validation = np.array([0, 1, 4, 0, 2, 4, 4, 0, 3, 3, 0, 0, 1, 0], dtype=np.uint16)
    dataset = Dataset(tokenizer, 0, validation, validation, {"validation_bytes": 100})
    assert dataset.scored(document_mask=False).sum() == 13 and dataset.scored_bytes(document_mask=False) == 100
    assert np.flatnonzero(~dataset.scored(document_mask=True)).tolist() == [0, 3, 7, 10, 11]
    assert dataset.scored_bytes(document_mask=True) == 100 - (3 + 1 + 3 + 0 + 3)


def test_document_ids_change_at_each_end_token() -> None:
    ids = document_ids(torch.tensor([[5, 0, 6, 7, 0, 0, 8]]), end_of_text=0)
    assert ids.tolist() == [[0, 0, 1, 1, 1, 2, 3]]


def test_baselines_by_hand() -> None:
    """Vocabulary 4; training 0 1 2 1 2 0, so the scored tokens are 1 2 1 2 0."""
    train = np.array([0, 1, 2, 1, 2, 0], dtype=np.uint16)
    p = [(1 + 3 / 4) / 8, (2 + 3 / 4) / 8, (2 + 3 / 4) / 8, (0 + 3 / 4) / 8]
    validation = np.array([0, 1, 3, 0, 2], dtype=np.uint16)
    expected = -sum(math.log(p[b]) for b in (1, 3, 0, 2))
    assert unigram_nats(train, validation, 4) == pytest.approx(expected, rel=1e-12)
    # After 0 came 1; after 1 came 2 twice; after 2 came 1 and 0; after 3 nothing.
    pairs = [
        (1 + 1 * p[1]) / (1 + 1),  # 0 -> 1
        (0 + 1 * p[3]) / (2 + 1),  # 1 -> 3
        p[0],  # 3 -> 0, backed off whole
        (0 + 1 * p[2]) / (1 + 1),  # 0 -> 2
    ]
    assert bigram_nats(train, validation, 4) == pytest.approx(-sum(map(math.log, pairs)), rel=1e-12)
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)


def test_baselines_are_distributions() -> None:
    train = np.random.default_rng(0).integers(0, 6, 200).astype(np.uint16)
    for context in range(7):
        total = sum(math.exp(-bigram_nats(train, np.array([context, b], dtype=np.uint16), 7)) for b in range(7))
        assert total == pytest.approx(1.0)


RECORDS = [{"text": f"Line one.\nDocument {i} \u00e9", "id": i, "meta": {"a": [1, None]}} for i in range(5)]
TEXTS = [record["text"] for record in RECORDS]


def write_lines(file: Path, records: list[dict[str, Any]] = RECORDS, end: str = "\n") -> Path:
    file.write_bytes("".join(json.dumps(record) + end for record in records).encode())
    return file


def compressed(file: Path, how: str) -> Path:
    content = file.read_bytes()
    target = file.with_name(f"{file.name}.{how}")
    if how == "zst":
        pyarrow = pytest.importorskip("pyarrow")
        half = len(content) // 2  # two frames, as pzstd writes
        content = b"".join(
            pyarrow.Codec("zstd").compress(part, asbytes=True) for part in (content[:half], content[half:])
        )
    else:
        content = {"gz": gzip, "bz2": bz2, "xz": lzma}[how].compress(content)
    target.write_bytes(content)
    return target


def write_parquet(file: Path, **columns: list[Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    importlib.import_module("pyarrow.parquet").write_table(pyarrow.table(columns), file)
    return file


def test_json_lines_are_one_document_a_line(tmp_path: Path) -> None:
    documents = list(read_files([write_lines(tmp_path / "x.jsonl")], "text"))
    assert documents == [Document(f"x.jsonl#{i}", text) for i, text in enumerate(TEXTS, 1)]
    windows = write_lines(tmp_path / "w.NDJSON", end="\r\n\r\n")
    windows.write_bytes(b"\xef\xbb\xbf" + windows.read_bytes().removesuffix(b"\r\n\r\n"))
    assert [d.text for d in read_files([windows], "text")] == TEXTS
    assert [d.text for d in read_files([write_lines(tmp_path / "lines.json")], "text")] == TEXTS
    (tmp_path / "array.json").write_text(json.dumps(RECORDS, indent=1))
    assert [d.text for d in read_files([tmp_path / "array.json"], "text")] == TEXTS
    with pytest.raises(ConfigError, match=r"x\.jsonl.*name of the text field.*--field"):
        read_files([tmp_path / "x.jsonl"])


@pytest.mark.parametrize("how", ["gz", "bz2", "xz", "zst"])
def test_compressed_files_are_read_whole_or_refused(how: str, tmp_path: Path) -> None:
    plain = tmp_path / "x.txt"
    plain.write_text("text\n\n" * 3)
    lines = compressed(write_lines(tmp_path / "x.jsonl", RECORDS * 200), how)
    assert [d.text for d in read_files([lines], "text")] == TEXTS * 200
    assert [d.text for d in read_files([compressed(plain, how)])] == ["text\n\n" * 3]
    lines.write_bytes(lines.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=rf"x\.jsonl\.{how}': expected a readable \.{how} file"):
        list(read_files([lines], "text"))
    lines.write_bytes(b"not compressed")
    with pytest.raises(ConfigError, match=rf"x\.jsonl\.{how}': expected a readable \.{how} file"):
        list(read_files([lines], "text"))


def test_parquet_streams_the_rows_of_one_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "[a]*?"  # which datasets would read as a pattern
    folder.mkdir()
    file = write_parquet(folder / "x.parquet", text=TEXTS, number=list(range(5)))
    assert [d.text for d in read_files([file], "text")] == TEXTS
    assert [d.name for d in read_files([folder], "text")] == [f"x.parquet#{i}" for i in range(1, 6)]
    for field, expected in (
        ("texts", r'row 1.*the field "texts".*did you mean text\?; found text, number'),
        ("number", r'row 1.*a string in "number"; found a number, 0'),
    ):
        with pytest.raises(ConfigError, match=expected):
            list(read_files([file], field))
    write_parquet(folder / "null.parquet", text=["a", None])
    with pytest.raises(ConfigError, match=r"null\.parquet, row 2.*a string.*found null"):
        list(read_files([folder / "null.parquet"], "text"))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"x\.parquet': expected a readable Parquet file"):
        list(read_files([file], "text"))


def test_without_datasets_a_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1" * 4)
    (tmp_path / "x.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd" * 4)
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("x.parquet", "x.txt.zst"):
        with pytest.raises(ConfigError, match=r'pip install -e "\.\[data\]"'):
            list(read_files([tmp_path / name], "text"))


WRONG_LINES = {
    "not JSON": ('{"text": "a"', "expected JSON; found Expecting"),
    "a word": ("text", "expected JSON; found Expecting value"),
    "two values": ('{"text": "a"} {"text": "b"}', "expected JSON; found Extra data"),
    "a missing field": (
        '{"content": "a", "id": 1}',
        'the field "text", or --field with the name .*; found content, id',
    ),
    "a field spelled otherwise": ('{"Text": "a"}', r"did you mean Text\?; found Text"),
    "no fields": ("{}", 'the field "text".*; found no field'),
    "a number": ('{"text": 3}', 'a string in "text"; found a number, 3'),
    "null": ('{"text": null}', 'a string in "text"; found null'),
    "a list": ('{"text": ["a"]}', 'a string in "text"; found an array'),
    "no object": ('["a"]', 'an object with the field "text"; found an array'),
    "a key twice": ('{"text": "a", "text": "b"}', "expected JSON; found duplicate key 'text'"),
    "NaN": ('{"text": "a", "score": NaN}', "expected JSON; found the literal NaN"),
    "half a character": (r'{"text": "\ud83d"}', 'Unicode text in "text"; found half of a surrogate pair'),
    "a chat": ('{"messages": [{"role": "user"}]}', "plain text.*, not fine-tuning data; found messages"),
    "a prompt": ('{"prompt": "a", "completion": "b"}', "fine-tuning data; found prompt, completion"),
}


@pytest.mark.parametrize("name", WRONG_LINES)
def test_a_wrong_line_is_named_by_file_and_number(name: str, tmp_path: Path) -> None:
    line, expected = WRONG_LINES[name]
    file = write_lines(tmp_path / "x.jsonl", RECORDS[:2])
    with file.open("a") as more:
        more.write(f"\n{line}\n" + json.dumps(RECORDS[2]))
    with pytest.raises(ConfigError, match=rf"--data = '.*x\.jsonl, line 4': .*{expected}") as raised:
        list(read_files([file], "text"))
    assert str(raised.value).isprintable()


def test_lines_and_files_that_are_wrong_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.train.documents.MAX_RECORD_BYTES", 2**20)
    for name, content, expected in (
        ("empty.jsonl", b"", "expected documents; found an empty file"),
        ("blank.jsonl", b"\n \r\n", "expected documents; found none"),
        ("long.jsonl", b'{"text": "' + b"a" * 2**20 + b'"}\n', "line 1': expected a line of at most 1 MiB"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "line 1': expected JSON; found 'utf-8'.*0xe9"),
        ("object.json", b'{\n"text": "a"}', "expected an array of objects, or an object in each line; found an object"),
        ("strings.json", b'["a", "b"]', "record 1': expected an object with the field"),
        ("large.json", b"[" + b" " * 2**20 + b"]", r"at most 1 MiB.*or JSON Lines"),
        ("none.json", b"[]", "expected documents; found none"),
        ("page.jsonl", b"<!DOCTYPE html>", "expected JSON; found HTML"),
        ("x.parquet", b"text", "expected a Parquet file; found other content"),
        ("lfs.parquet", b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{name}.*{expected}"):
            list(read_files([tmp_path / name], "text"))


NO_TEXT = {
    "x.csv": (b"a,b\n1,2\n", r"\.csv, which is not plain text"),
    "x.html": (b"<p>text</p>", r"\.html, which is not plain text"),
    "page.txt": (b"\n<!doctype html><p>text</p>", "found HTML or XML"),
    "x.ipynb": (b'{"cells": []}', "not plain text"),
    "lines.txt": (b'{"text": "a"}\n{"text": "b"}\n', "found JSON"),
    "lines": (b'\xef\xbb\xbf [\n {"text": "a"}]', "found JSON"),
    "x.pdf": (b"%PDF-1.7\n", "found a PDF file"),
    "x.docx": (b"PK\x03\x04", "found a zip archive"),
    "x.bin": (b"text\0text", "found binary data: a zero byte at offset 4"),
    "late.txt": (b"text\n" * 1000 + b"\0", "found binary data: a zero byte at offset 5000"),
    "x.arrow": (b"ARROW1\0\0", "found binary data"),
    "gzip.txt": (b"\x1f\x8b\x08", "found a gzip file"),
    "wide.txt": ("text".encode("utf-16"), "found UTF-16 text instead of UTF-8"),
    "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "x.parquet.gz": (b"PAR1", r"readable \.gz file"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_markup_json_and_binary_data_are_no_text(name: str, tmp_path: Path) -> None:
    content, expected = NO_TEXT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}.*{expected}"):
        list(read_files([tmp_path / name], "text"))


def test_a_named_file_of_another_suffix_is_read_if_it_is_text(tmp_path: Path) -> None:
    for name in ("main.rs", "LICENSE", "notes.log", "x.yaml"):
        (tmp_path / name).write_text("let x = {1};\n[a] {b}\n")
        assert [d.text for d in read_files([tmp_path / name])] == ["let x = {1};\n[a] {b}\n"]


def test_files_of_a_folder_that_are_left_out_are_reported(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    for name in ("a.txt", "sub/b.md", "sub/.c.txt", "sub/.hidden/d.txt", "e.csv", "f.html", "g", "h.bin"):
        (tmp_path / name).write_text("some text")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "package.json").write_text('{\n  "name": "x"\n}')
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    write_lines(tmp_path / "i.jsonl")
    found = read_files([tmp_path], "text")
    assert {d.name.partition("#")[0] for d in found} == {"a.txt", "sub/b.md", "i.jsonl"}
    left_out = {"sub/.c.txt", "sub/.hidden/", "e.csv", "f.html", "g", "h.bin", "empty.txt", "package.json", "link/"}
    assert set(found.left_out) == left_out
    dataset = prepare(tmp_path / "data", [tmp_path], None, 300)
    assert dataset.facts["left_out"]["count"] == 9 and len(dataset.facts["left_out"]["first"]) == 5

    none = tmp_path / "none"
    none.mkdir()
    for i in range(7):
        (none / f"{i}.csv").write_text("a,b")
    with pytest.raises(
        ConfigError, match=r"none': expected a folder with files of .*found 0\.csv, .*4\.csv and 2 more"
    ):
        read_files([none])


def test_data_streams_through_memory(tmp_path: Path) -> None:
    """Preparing a large file holds neither the file nor its tokens."""
    file, text = tmp_path / "x.jsonl", " ".join(WORDS)
    with file.open("w") as lines:
        for i in range(400):
            lines.write(json.dumps({"text": f"{i} " + text * 60}) + "\n")
    train_tokenizer([text], 300).save(str(tmp_path / "tokenizer.json"))
    tracemalloc.start()
    dataset = prepare(tmp_path / "data", [file], tmp_path / "tokenizer.json", 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert dataset.facts["train"]["documents"] + dataset.facts["validation"]["documents"] == 400
    assert peak < file.stat().st_size / 3, "neither all documents nor all tokens"


def test_validation_files_are_all_of_the_validation(tmp_path: Path) -> None:
    documents = make_documents(6)
    shared = "a paragraph that both have and that is long enough to be a copy"
    for i, document in enumerate(documents):
        (tmp_path / f"{i}.txt").write_text(document.text + f"\n\n{shared}\n")
    train, validation = [tmp_path / f"{i}.txt" for i in range(4)], [tmp_path / "4.txt", tmp_path / "5.txt"]
    dataset = prepare(tmp_path / "data", train, None, 300, validation_data=validation)
    assert dataset.facts["held_out"] == ["4.txt#0", "5.txt#0"]
    assert dataset.facts["train"]["documents"] == 4 and dataset.facts["dropped_paragraphs"] == 4
    decode = dataset.tokenizer.decode
    assert decode(dataset.validation.tolist()).count(shared) == 2 and shared not in decode(dataset.train.tolist())
    one = prepare(tmp_path / "one", train[:1], None, 300, validation_data=validation)
    assert one.facts["train"]["documents"] == 1, "one training document is enough"
    with pytest.raises(ConfigError, match=r"--data = .*0\.txt': expected documents that differ"):
        prepare(tmp_path / "same", train[:1], None, 300, validation_data=train)
    with pytest.raises(ConfigError, match=r"--validation-data = .*none"):
        prepare(tmp_path / "none", train, None, 300, validation_data=[tmp_path / "none"])
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(ConfigError, match=r"--validation-data = .*blank\.jsonl': expected text; found white space"):
        prepare(tmp_path / "blank", train, None, 300, validation_data=[tmp_path / "blank.jsonl"])


def test_ids_with_gaps_fit_the_vocabulary(tmp_path: Path) -> None:
    values = json.loads(train_tokenizer(["some text"], 300).to_str())
    values["model"]["vocab"]["e"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    for i, document in enumerate(make_documents(3)):
        (tmp_path / f"{i}.txt").write_text(document.text)
    dataset = prepare(tmp_path / "data", [tmp_path / f"{i}.txt" for i in range(3)], tmp_path / "tokenizer.json", 0)
    assert dataset.facts["vocab_size"] == 70_001 == dataset.train.max() + 1


def test_counts_do_not_depend_on_how_many_tokens_are_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    train, validation = (rng.integers(0, 9, size).astype(np.uint16) for size in (200, 50))
    whole = unigram_nats(train, validation, 11), bigram_nats(train, validation, 11)
    for chunk in (1, 7, 199, 200):
        monkeypatch.setattr("moe.train.baselines.CHUNK", chunk)
        assert (unigram_nats(train, validation, 11), bigram_nats(train, validation, 11)) == whole
