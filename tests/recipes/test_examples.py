"""Examples for fine-tuning: tokens and labels, against hand-made ones and TRL's; wrong lines; the split."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

import moe
from moe.checkpoint.chat import ChatTemplate
from moe.recipes.examples import Encoder, ExampleError, open_examples, prepare_examples
from moe.recipes.packing import pack
from moe.train.tokenizer import train_tokenizer
from tests.support.examples import TEMPLATE, sums, tokenizer_folder, write_examples

END, USER, ASSISTANT, SYSTEM = "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tokenizer_folder(tmp_path / "tokenizer")


def encoder_of(folder: Path) -> Encoder:
    return Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")), END, folder)


def shown(encoder: Encoder, record: Any) -> list[tuple[str, bool]]:
    """The example as runs of text: what is not trained on, and what is."""
    example = encoder.encode(record)
    runs: list[tuple[list[int], bool]] = []
    for token, trained in zip(example.ids, example.trained, strict=True):
        if not runs or runs[-1][1] != trained:
            runs.append(([], trained))
        runs[-1][0].append(token)
    return [(encoder.tokenizer.decode(ids, skip_special_tokens=False), trained) for ids, trained in runs]


def said(*messages: str) -> list[dict[str, str]]:
    return [dict(zip(("role", "content"), each.split(": ", 1), strict=True)) for each in messages]


def test_a_completion_and_its_end_are_trained_on(folder: Path) -> None:
    encoder = encoder_of(folder)
    example = encoder.encode({"prompt": "ab", "completion": "c", "id": 7})
    a, b, c = (encoder.tokenizer.token_to_id(letter) for letter in "abc")
    assert example.ids == [a, b, c, encoder.end] and example.trained == [False, False, True, True]
    assert shown(encoder, {"prompt": "", "completion": "c"}) == [(f"c{END}", True)]
    assert shown(encoder, {"prompt": "a", "completion": ""}) == [("a", False), (END, True)]
    assert shown(encoder, {"prompt": f"a{END}", "completion": ""}) == [(f"a{END}", False), (END, True)]


def test_special_tokens_in_the_text_are_tokens_and_the_end_is_there_once(folder: Path) -> None:
    encoder = encoder_of(folder)
    encoder.tokenizer.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>")])
    example = encoder.encode({"prompt": USER, "completion": f"<think>a</think>{END}"})
    names = [encoder.tokenizer.id_to_token(token) for token in example.ids]
    assert names == [USER, "<think>", "a", "</think>", END] and example.trained == [False, True, True, True, True]


def merging() -> Encoder:
    """A tokenizer with the token "ab"."""
    tokenizer = train_tokenizer(["ab ab ab ab"], 258)
    assert tokenizer.encode("ab").tokens == ["ab"]
    return Encoder(tokenizer, "<|endoftext|>", Path())


def test_a_token_across_the_boundary_is_not_made() -> None:
    """The prompt keeps the tokens that it has alone; where none would span it, tokens are those of the whole text."""
    encoder = merging()
    example = encoder.encode({"prompt": "cab", "completion": "ab"})
    assert [encoder.tokenizer.id_to_token(token) for token in example.ids] == ["c", "ab", "ab", "<|endoftext|>"]
    assert encoder.tokenizer.encode("ca" + "b").tokens == ["c", "ab"]
    example = encoder.encode({"prompt": "ca", "completion": "bab"})
    assert [encoder.tokenizer.id_to_token(token) for token in example.ids] == ["c", "a", "b", "ab", "<|endoftext|>"]
    assert example.trained == [False, False, True, True, True]


def test_messages_of_the_assistant_are_trained_on(folder: Path) -> None:
    encoder = encoder_of(folder)
    messages = said("system: s", "user: u", "assistant: a", "user: v", "assistant: bb")
    before = f"{SYSTEM}s{END}\n{USER}u{END}\n{ASSISTANT}"
    between = f"{USER}v{END}\n{ASSISTANT}"
    first, second = f"a{END}\n", f"bb{END}\n"
    assert shown(encoder, {"messages": messages}) == [(before, False), (first, True), (between, False), (second, True)]
    parts = {"prompt": messages[:4], "completion": messages[4:]}
    assert shown(encoder, parts) == [(before + first + between, False), (second, True)]
    example = encoder.encode({"messages": messages})
    whole = ChatTemplate.read(folder).render(messages, add_generation_prompt=False)
    assert example.ids == encoder.tokenizer.encode(whole, add_special_tokens=False).ids


# TRL's own: it sets an option by the name that transformers has deprecated.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_tokens_and_labels_are_those_of_trl(folder: Path, tmp_path: Path) -> None:
    """TRL's SFTTrainer prepares the same data: completion_only_loss, and assistant_only_loss for messages."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    marked = "{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}\n"
    marked = TEMPLATE.replace("{{ '<|' + m.role + '|>' + m.content + eos_token }}\n", marked)
    marked = marked.replace(
        "{% endfor %}", "{% endgeneration %}{% else %}{{ m.content + eos_token }}\n{% endif %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(marked)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, num_local_experts=2,
        )
    )  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = "<|pad|>"
    conversations = [said("user: u", "assistant: a", "user: v", "assistant: bb"), said("user: x\n", "assistant: <y>")]
    forms: dict[str, list[Any]] = {
        "text": [*sums(5), {"prompt": "a", "completion": f"b{END}"}, {"prompt": f"{USER}ü", "completion": " 日本"}],
        "parts": [{"prompt": each[:-1], "completion": each[-1:]} for each in conversations],
        "messages": [{"messages": each} for each in conversations],
    }
    encoder = encoder_of(folder)
    for name, records in forms.items():
        settings: Any = dict(use_cpu=True, bf16=False, report_to=[], max_length=64, disable_tqdm=True)
        arguments = trl.SFTConfig(str(tmp_path / name), assistant_only_loss=name == "messages", **settings)
        data = datasets.Dataset.from_list(records)
        prepared = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train_dataset
        for record, theirs in zip(records, prepared, strict=True):
            ours = encoder.encode(record)
            labels = [token if trained else -100 for token, trained in zip(ours.ids, ours.trained, strict=True)]
            assert (ours.ids, labels) == (theirs["input_ids"], theirs["labels"]), record


FORGETFUL = "{% for m in messages %}{{ '<|' + m.role + '|>' + (m.content if loop.last else '') }}{% endfor %}"
WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([1], 'an object with "prompt" and "completion", or "messages"; found an array, [1]'),
    "a text": ({"text": "a"}, '"prompt" and "completion", or "messages"; found text'),
    "no completion": ({"prompt": "a"}, "found prompt"),
    "both forms": ({"prompt": "a", "completion": "b", "messages": []}, "found prompt, completion, messages"),
    "a number": ({"prompt": "a", "completion": 3}, 'a text in "completion"; found a number, 3'),
    "a number as messages": ({"prompt": 3, "completion": "a"}, 'messages in "prompt"; found a number, 3'),
    "half a character": ({"prompt": "a", "completion": "\ud83d"}, "Unicode text in \"completion\"; found half"),
    "nothing": ({"prompt": "", "completion": ""}, "a token to predict; found an empty prompt and completion"),
    "no messages": ({"messages": []}, 'messages in "messages"; found an array, []'),
    "no role": ({"messages": [{"content": "a"}]}, '"role" and "content" in "messages"; found an object'),
    "no text": ({"messages": [{"role": "user", "content": None}]}, 'a text in "content"; found null'),
    "no assistant": ({"messages": said("user: a")}, 'a message with the role "assistant" to train on; found 1 others'),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_named_by_file_and_number(name: str, folder: Path, tmp_path: Path) -> None:
    record, expected = WRONG[name]
    file = write_examples(tmp_path / "x.jsonl", [*sums(3), record])
    with pytest.raises(moe.ConfigError) as raised:
        prepare_examples(tmp_path / "data", [file], folder, 64)
    assert f"{file}, line 4" in str(raised.value) and expected in str(raised.value)
    assert not (tmp_path / "data").exists()


def test_what_a_template_cannot_do_is_refused(folder: Path, tmp_path: Path) -> None:
    messages = said("user: a", "assistant: b", "user: c", "assistant: d")
    for template, found in (
        (FORGETFUL, "another text before or in message 2"),
        (TEMPLATE + "{{ raise_exception('no') }}", "the chat template failed: no"),
        (None, "no chat template"),
    ):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        file = write_examples(tmp_path / "x.jsonl", [{"messages": messages}])
        with pytest.raises(moe.ConfigError, match=rf"x\.jsonl, line 1.*chat template.*found {found}"):
            prepare_examples(tmp_path / "data", [file], folder, 64)
    with pytest.raises(ExampleError, match="found no field"):
        encoder_of(folder).encode({})


def test_examples_are_split_by_prompt_and_kept(folder: Path, tmp_path: Path) -> None:
    records = [{"prompt": each["prompt"], "completion": word} for each in sums(60) for word in ("one", "two")]
    records.append({"prompt": "long", "completion": "x" * 64})
    file = write_examples(tmp_path / "x.jsonl", records)
    data = prepare_examples(tmp_path / "data", [file], folder, 64)
    assert data.facts["left_out"] == {"count": 1, "longest": 4 + 64 + 1}
    assert data.facts["train"]["examples"] + data.facts["validation"]["examples"] == 120
    texts = []
    for part in (data.train, data.validation):
        pieces = [part.tokens[a:b].tolist() for a, b in zip(part.starts, part.starts[1:], strict=False)]
        texts.append([data.tokenizer.decode(ids, skip_special_tokens=False) for ids in pieces])
    assert sorted(texts[0] + texts[1]) == sorted(each["prompt"] + each["completion"] + END for each in records[:-1])
    prompts = [{text.partition("=")[0] for text in part} for part in texts]
    assert not prompts[0] & prompts[1] and 1 <= len(prompts[1]) <= 20
    again = open_examples(tmp_path / "data")
    assert np.array_equal(again.train.tokens, data.train.tokens) and again.facts == data.facts
    (tmp_path / "data" / "train.safetensors").write_bytes(b"other")
    with pytest.raises(moe.ConfigError, match="the examples with which the run started"):
        open_examples(tmp_path / "data")


def test_examples_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    one = write_examples(tmp_path / "one.jsonl", sums(1) * 3)
    with pytest.raises(moe.ConfigError, match=r"two prompts or more, .*found one prompt"):
        prepare_examples(tmp_path / "data", [one], folder, 64)
    two = prepare_examples(tmp_path / "data", [one], folder, 64, validation_data=[one])
    assert two.facts["train"]["examples"] == two.facts["validation"]["examples"] == 3
    with pytest.raises(moe.ConfigError, match=r"at most 4 tokens; the shortest has 6 \(--seq-length\)"):
        prepare_examples(tmp_path / "data", [one], folder, 4)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "a.txt").write_text("a")
    for name, expected in (
        ("bad.jsonl", r"bad\.jsonl, line 1': expected JSON"),
        ("a.txt", "expected JSON Lines or JSON; found a .txt file"),
        ("nowhere", "an existing file or folder"),
    ):
        with pytest.raises(moe.ConfigError, match=expected):
            prepare_examples(tmp_path / "data", [tmp_path / name], folder, 64)
    array = tmp_path / "all" / "x.json"
    array.parent.mkdir()
    array.write_text(json.dumps(sums(4)))
    (array.parent / "notes.txt").write_text("not read")
    assert prepare_examples(tmp_path / "all data", [array.parent], folder, 64).facts["train"]["examples"] <= 3


def test_packing_by_hand() -> None:
    assert pack([3, 5, 2, 4, 1], 6) == [[1, 4], [3, 2], [0]]
    assert pack([], 6) == [] and pack([6, 6], 6) == [[0], [1]]
    for lengths in ([7], [0]):
        with pytest.raises(ValueError, match="expected 1 to 6"):
            pack(lengths, 6)


def test_rows_contain_every_example_once_and_are_few() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        row = int(rng.integers(4, 60))
        lengths = rng.integers(1, row + 1, int(rng.integers(1, 200))).tolist()
        rows = pack(lengths, row)
        assert sorted(example for each in rows for example in each) == list(range(len(lengths)))
        assert all(sum(lengths[example] for example in each) <= row for each in rows)
        assert len(rows) <= 11 / 9 * max(-(-sum(lengths) // row), sum(2 * length > row for length in lengths)) + 1
