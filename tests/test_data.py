"""Documents, the held-out split, tokenizers, packed tokens, windows and the baselines scored on them."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from moe.errors import ConfigError
from moe.train.baselines import bigram_nats, bits_per_byte, unigram_nats
from moe.train.data import Dataset, Sampler, document_ids, evaluation_batches, open_dataset, prepare
from moe.train.documents import (
    COPY_MIN_CHARACTERS,
    DOCUMENT_BYTES,
    Document,
    Documents,
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
