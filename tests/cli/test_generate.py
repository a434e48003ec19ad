"""`moesmith generate`: where a text ends, what is printed of it, and conversations."""

import dataclasses
import io
import itertools
import json
import os
import pty
import random
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

import moe
from moe.cli.generate import Args, GrowingText, read_tokenizer
from moe.cli.options import parse
from moe.cli.train import _generate
from moe.ops.packed import can_pack
from moe.sampling import Sampling
from moe.train.run import SAMPLING
from tests.support.command_line import NAMES, SETTINGS, TEMPLATES, fails_in_one_line, run, variant, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random model whose tokens are bytes, with a chat template; it has 96 positions."""
    path = tmp_path_factory.mktemp("chat") / "model"
    files = write_tokenizer(path.parent / "files")
    sizes = {"vocab_size": 256 + len(NAMES), "max_position_embeddings": 96, "num_nextn_predict_layers": 0}
    model = moe.Transformer(dataclasses.replace(moe.preset("tiny"), **sizes))  # pyright: ignore[reportArgumentType]
    model.carried_files = {file.name: file.read_bytes() for file in files.iterdir()}
    model.carried_files["chat_template.jinja"] = TEMPLATES["roles"].encode()
    model.save(path)
    return path


def generate(capsys, folder: Path, *options: str) -> list[dict]:
    status, out, err = run(capsys, "generate", str(folder), "--json", *options)
    assert (status, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


def until_a_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """(text before the first stop, whether there is one) by definition: one character at a time."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


def pieces(letters: str) -> Tokenizer:
    """A tokenizer whose tokens are all texts of one to three of these letters."""
    texts = ["".join(text) for length in (1, 2, 3) for text in itertools.product(letters, repeat=length)]
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, texts[0]))
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def test_stops_are_found_however_tokens_cut_them() -> None:
    """Random texts in random tokens, against the definition; text once shown is never taken back."""
    draw, letters = random.Random(0), "abc🙂é\n"
    tokenizer = pieces(letters)
    stopped = 0
    for _ in range(500):
        cut = ["".join(draw.choices(letters, k=draw.randint(1, 3))) for _ in range(draw.randint(0, 8))]
        stops = ["".join(draw.choices(letters, k=draw.randint(1, 4))) for _ in range(draw.randint(0, 4))]
        growing, shown = GrowingText(tokenizer, [0], stops), ""
        expected, found = until_a_stop("".join(cut), stops)
        for piece in cut:
            token = tokenizer.token_to_id(piece)
            assert token is not None
            if growing.reason is None:
                growing.append(token, ended=False)
            assert growing.text.startswith(shown) and expected.startswith(growing.text)
            shown = growing.text
        growing.finish("length")
        assert (growing.text, growing.reason == "stop") == (expected, found)
        stopped += found
    assert 150 < stopped < 350


def test_the_stop_that_is_complete_first_within_a_token_counts() -> None:
    tokenizer = pieces("abc")
    growing = GrowingText(tokenizer, [0], ["abc", "b"])
    growing.append(tokenizer.encode("abc").ids[0], ended=False)
    assert growing.text == until_a_stop("abc", ["abc", "b"])[0] == "a"


def test_only_what_may_begin_a_stop_is_held_back(tmp_path):
    tokenizer = read_tokenizer(write_tokenizer(tmp_path))
    growing = GrowingText(tokenizer, tokenizer.encode("?").ids, ["abc", "b!"])
    for token, shown in zip(tokenizer.encode("xababx").ids, ["x", "x", "x", "xab", "xab", "xababx"], strict=True):
        growing.append(token, ended=False)
        assert growing.text == shown
    growing.append(tokenizer.encode("a").ids[0], ended=False)
    assert growing.text == "xababx"
    growing.finish("length")
    assert growing.text == "xababxa"


def test_a_special_token_can_be_a_stop(tmp_path):
    tokenizer = read_tokenizer(write_tokenizer(tmp_path))
    growing = GrowingText(tokenizer, [0], ["<|user|>"])
    for token in tokenizer.encode("ab<|user|>").ids:
        growing.append(token, ended=False)
    assert (growing.text, growing.reason, len(growing.token_ids)) == ("ab", "stop", 3)


def test_stops_of_the_command(capsys, folder):
    options = ["--prompt", "How", "--max-new-tokens", "40"]
    (free,) = generate(capsys, folder, *options)
    stop = free["text"][6:9]
    (stopped,) = generate(capsys, folder, *options, "--stop", "no such text", "--stop", stop)
    assert stopped["text"] == until_a_stop(free["text"], [stop])[0] and stopped["finish_reason"] == "stop"
    assert stopped["token_ids"] == free["token_ids"][: len(stopped["token_ids"])]
    out = run(capsys, "generate", str(folder), *options, "--stop", stop)[1]
    assert out == f"How{stopped['text']}\n"
    assert "--stop: expected some text; found ''" in fails_in_one_line(capsys, "generate", "f", *options, "--stop", "")
    assert "UTF-8" in fails_in_one_line(capsys, "generate", str(folder), *options, "--stop", "\udcff")


def test_speed_is_printed_on_stderr(capsys, folder):
    status, out, err = run(capsys, "generate", str(folder), "--prompt", "ab", "--prompt", "x", "--max-new-tokens", "5")
    assert status == 0 and "tokens/s" not in out
    assert re.fullmatch(r"10 tokens in \d+\.\d s, \d+\.\d tokens/s\n", err)


def test_speculative_decoding(capsys, folder, tmp_path):
    model = moe.load(folder)
    drafting = moe.Transformer(dataclasses.replace(model.config, num_nextn_predict_layers=2))
    drafting.carried_files = model.carried_files
    drafting.save(tmp_path / "drafting")
    prompts = ["--prompt", "ab", "--prompt", "x", "--max-new-tokens", "30"]
    for dtype in ("fp64", "bf16"):
        options = [*prompts, "--dtype", dtype]
        plain = generate(capsys, tmp_path / "drafting", *options, "--speculative", "off")
        found = generate(capsys, tmp_path / "drafting", *options, "--speculative", "on")
        assert [result["speculative"] for result in plain] == [None, None]
        calls = [call + 1 for call in found[0]["speculative"]["close_calls"]]
        if dtype == "fp64":
            assert [result["token_ids"] for result in found] == [result["token_ids"] for result in plain]
            assert not calls
        measured = found[1]["speculative"]
        assert measured["on"] and measured["drafted"] > measured["accepted"] >= 0 <= measured["logit_difference"]
        status, _, err = run(capsys, "generate", str(tmp_path / "drafting"), *options, "--speculative", "on")
        lines = err.splitlines()
        assert status == 0 and "60 tokens in" in lines[0]
        expected = rf"\d+% of {measured['drafted']} drafts accepted, {measured['tokens_per_pass']:.2f} tokens per pass"
        assert re.fullmatch(rf"speculative: {expected}, \d+\.\d tokens/s; without drafts \d+\.\d tokens/s", lines[1])
        close = (
            "speculative: the best two logits of tokens {} of text 1 are equal within rounding; there, plain decoding"
        )
        assert any(line.startswith(close.format(", ".join(map(str, calls)))) for line in lines) == bool(calls)
    (auto,) = generate(capsys, tmp_path / "drafting", "--prompt", "x", "--max-new-tokens", "64")
    assert auto["speculative"]["drafted"] and len(auto["token_ids"]) == 64
    (none,) = generate(capsys, folder, "--prompt", "x", "--max-new-tokens", "64")
    assert none["speculative"] is None
    line = fails_in_one_line(capsys, "generate", str(folder), "--prompt", "x", "--speculative", "on")
    assert "--speculative: expected a model with multi-token prediction modules; found none" in line
    line = fails_in_one_line(capsys, "generate", str(folder), "--prompt", "x", "--speculative", "yes")
    assert "--speculative: expected one of auto, on, off; found 'yes'" in line


def test_sampling_options_reach_the_model(capsys, folder):
    options = ["--prompt", "ab", "--max-new-tokens", "20"]
    plain = generate(capsys, folder, *options)
    penalised = generate(capsys, folder, *options, "--repetition-penalty", "50")
    assert len(set(penalised[0]["token_ids"])) == 20 > len(set(plain[0]["token_ids"]))
    assert generate(capsys, folder, *options, "--temperature", "9", "--min-p", "1", "--seed", "0") == [
        plain[0] | {"seconds": pytest.approx(0, abs=60)}
    ]


def test_options_that_need_others(capsys):
    assert "--prompt: expected at least one, or --chat for a conversation; found neither" in fails_in_one_line(
        capsys, "generate", "f"
    )
    line = fails_in_one_line(capsys, "generate", "f", "--chat", "--json")
    assert "--json: expected a --prompt as well; found --json alone" in line


def test_a_text_ends_with_the_positions(capsys, folder):
    (result,) = generate_with_note(capsys, folder, 86, "--prompt", "a" * 10)
    assert (len(result["token_ids"]), result["finish_reason"]) == (86, "length")
    (result,) = generate(capsys, folder, "--prompt", "a" * 10, "--max-new-tokens", "86")
    assert len(result["token_ids"]) == 86
    results = generate_with_note(capsys, folder, 1, "--prompt", "a", "--prompt", "a" * 95)
    assert [len(result["token_ids"]) for result in results] == [1, 1]
    for length in (96, 97, 5000):
        line = fails_in_one_line(capsys, "generate", str(folder), "--prompt", "a" * length)
        assert line.startswith("moesmith generate: --prompt: expected fewer tokens than") and len(line) < 500
        assert line.endswith(f"expected fewer tokens than the model's 96 positions; found {length}\n")


def generate_with_note(capsys, folder: Path, room: int, *options: str) -> list[dict]:
    status, out, err = run(capsys, "generate", str(folder), "--json", *options)
    assert status == 0 and err == f"note: stopped after {room} new tokens, at the last of the model's 96 positions\n"
    return [json.loads(line) for line in out.splitlines()]


def test_with_int8_weights(capsys, folder):
    (found,) = generate(capsys, folder, "--prompt", "abc", "--max-new-tokens", "6", "--quantize", "int8")
    model = moe.quantize(moe.load(folder), "int8")
    ids = torch.tensor([read_tokenizer(folder).encode("abc").ids])
    expected = moe.generate(model, ids, max_new_tokens=6)[0, ids.shape[1] :].tolist()
    assert found["token_ids"] == expected[: len(found["token_ids"])]
    line = fails_in_one_line(capsys, "generate", str(folder), "--prompt", "a", "--quantize", "int4")
    assert line == "moesmith generate: --quantize: expected one of int8; found 'int4'; did you mean int8?\n"


def test_with_packed_weights(capsys, folder):
    line = fails_in_one_line(capsys, "generate", str(folder), "--prompt", "a", "--pack", "--quantize", "int8")
    assert line == "moesmith generate: --pack: expected no --quantize; found --quantize int8 as well\n"
    line = fails_in_one_line(capsys, "generate", str(folder), "--prompt", "a", "--pack")
    assert line.startswith("moesmith generate: --pack: expected torch.bfloat16 on a CPU" if can_pack() else "moesmith")
    if can_pack():
        options = ("--prompt", "abc", "--max-new-tokens", "6", "--dtype", "bf16")
        (found,) = generate(capsys, folder, *options, "--pack")
        model = moe.load(folder, dtype=torch.bfloat16).pack()
        ids = torch.tensor([read_tokenizer(folder).encode("abc").ids])
        expected = moe.generate(model, ids, max_new_tokens=6)[0, ids.shape[1] :].tolist()
        assert found["token_ids"] == expected[: len(found["token_ids"])]


def test_logits_that_are_not_numbers(capsys, folder, tmp_path):
    model = moe.load(folder)
    model.norm.weight.data[3] = float("nan")
    model.save(tmp_path / "nan")
    line = fails_in_one_line(capsys, "generate", str(tmp_path / "nan"), "--prompt", "a", "--json")
    assert f"{tmp_path / 'nan'}: step 1: the logits of sequence 0 contain NaN; expected finite numbers" in line


def test_a_tokenizer_that_truncates_and_pads(capsys, folder, tmp_path):
    """Truncation and padding that training left in tokenizer.json are ignored for prompts, as in transformers."""
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    settings["padding"] = {"strategy": {"Fixed": 20}, "pad_id": 0, "pad_token": "x", "pad_type_id": 0}
    settings["padding"] |= {"direction": "Right", "pad_to_multiple_of": None}
    odd = variant(folder, tmp_path / "odd", tokenizer__json=json.dumps(settings))
    options = ["--prompt", "abcabc", "--max-new-tokens", "3"]
    found, expected = generate(capsys, odd, *options), generate(capsys, folder, *options)
    assert found[0]["token_ids"] == expected[0]["token_ids"]


def rendered(*messages: tuple[str, str]) -> str:
    """The template of the fixture, in Python."""
    parts = [f"<|{role}|>{content.strip()}<|end|>" for role, content in messages]
    return "".join(("<|begin|>", *parts, "<|assistant|>"))


def test_chat_is_the_rendered_prompt(capsys, folder):
    for messages, options in (
        ([("user", "Hi")], ["--prompt", "Hi"]),
        ([("system", "Be brief."), ("user", "<|end|> 🙂")], ["--system", "Be brief.", "--prompt", "<|end|> 🙂"]),
        ([("system", ""), ("user", "")], ["--system", "", "--prompt", ""]),
    ):
        (plain,) = generate(capsys, folder, "--prompt", rendered(*messages), "--max-new-tokens", "8")
        (chat,) = generate(capsys, folder, "--chat", *options, "--max-new-tokens", "8")
        assert (chat["prompt"], chat["token_ids"]) == (messages[-1][1], plain["token_ids"])
        status, out, _ = run(capsys, "generate", str(folder), "--chat", *options, "--max-new-tokens", "8")
        assert (status, out) == (0, chat["text"] + "\n")


def test_several_chats_are_one_batch(capsys, folder):
    prompts = ["Hi", "How are you?"]
    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    together = generate(capsys, folder, "--chat", "--dtype", "fp64", "--max-new-tokens", "6", *options)
    for prompt, result in zip(prompts, together, strict=True):
        alone = generate(capsys, folder, "--chat", "--dtype", "fp64", "--max-new-tokens", "6", "--prompt", prompt)
        assert result["token_ids"] == alone[0]["token_ids"]
    out = run(capsys, "generate", str(folder), "--chat", "--dtype", "fp64", "--max-new-tokens", "6", *options)[1]
    assert out == "\n\n".join(result["text"] for result in together) + "\n"


def test_without_a_template(capsys, folder, tmp_path):
    plain = variant(folder, tmp_path / "plain", chat_template__jinja=None)
    for options in ([], ["--prompt", "a"]):
        line = fails_in_one_line(capsys, "generate", str(plain), "--chat", *options)
        assert line == (
            f"moesmith generate: {plain}: no chat template; expected chat_template.jinja, "
            "or a chat_template in tokenizer_config.json\n"
        )
    refusing = variant(folder, tmp_path / "refusing", chat_template__jinja="{{ raise_exception('no roles\\nhere') }}")
    line = fails_in_one_line(capsys, "generate", str(refusing), "--chat", "--prompt", "a")
    assert "chat_template.jinja: the chat template failed: no roles" in line
    silent = variant(folder, tmp_path / "silent", chat_template__jinja="{# nothing #}")
    line = fails_in_one_line(capsys, "generate", str(silent), "--chat", "--prompt", "a")
    assert "chat_template.jinja: the chat template renders a message as no text" in line


def test_a_conversation_continues_with_its_history(capsys, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\n  what?  \n/quit\nnever read\n"))
    options = ["--max-new-tokens", "6", "--stop", "\udcff".encode("utf-8", "replace").decode()]
    status, out, err = run(capsys, "generate", str(folder), "--chat", "--system", "S", *options)
    assert status == 0 and err.count("tokens/s") == 2 == err.count("\n")
    (first,) = generate(capsys, folder, "--prompt", rendered(("system", "S"), ("user", "Hi")), *options)
    history = [("system", "S"), ("user", "Hi"), ("assistant", first["text"]), ("user", "what?")]
    (second,) = generate(capsys, folder, "--prompt", rendered(*history), *options)
    assert out == f"{first['text']}\n{second['text']}\n"


def test_how_a_conversation_ends(capsys, folder, monkeypatch):
    for said, answers in (("", 0), ("/quit", 0), ("Hi", 1), ("Hi\n", 1)):
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        status, out, err = run(capsys, "generate", str(folder), "--chat", "--max-new-tokens", "1")
        assert (status, err.count("tokens/s")) == (0, answers)
        assert out if answers else not out
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(["a" * 20] * 9)))
    status, out, err = run(capsys, "generate", str(folder), "--chat", "--max-new-tokens", "1")
    assert status == 2
    assert re.search(
        r"\nmoesmith generate: --chat: expected fewer tokens in the whole conversation than the model's 96 positions; "
        r"found \d+\n$",
        err,
    )


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        master, child = pty.openpty()
        self.master = master
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moe", "generate", *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            env=os.environ | {"TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(child)
        self.seen = ""

    def wait_for(self, pattern: str) -> None:
        end = time.monotonic() + 60
        while not re.search(pattern, self.seen):
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 1)[0]:
                try:
                    data = os.read(self.master, 4096)
                except OSError:  # the other side is closed
                    data = b""
                assert data, f"ended: {self.seen!r}"
                self.seen += data.decode(errors="replace").replace("\r\n", "\n")

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self.master, text.encode())

    def status(self) -> int:
        """The exit status, after all output was read."""
        while select.select([self.master], [], [], 0.2)[0] or self.process.poll() is None:
            try:
                self.seen += os.read(self.master, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError:
                break
        return self.process.wait(timeout=60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_a_conversation_on_a_terminal(folder):
    terminal = Terminal(str(folder), "--chat", "--max-new-tokens", "80")
    try:
        terminal.wait_for(r"/quit or Ctrl-D ends the conversation\.\n(.|\n)*> $")
        terminal.type("Hi\n")
        terminal.wait_for(r"tokens/s\n(.|\n)*> $")
        terminal.type("\x04")
        assert terminal.status() == 0
        assert terminal.seen.endswith("\n") and "moesmith" not in terminal.seen and "Traceback" not in terminal.seen
    finally:
        terminal.close()


@pytest.mark.parametrize("at", ["builtins.input", "moe.generation.sample"], ids=["asking", "answering"])
def test_an_interrupted_conversation_ends_in_one_line(capsys, folder, monkeypatch, at):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    monkeypatch.setattr(at, interrupt)
    assert run(capsys, "generate", str(folder), "--chat") == (130, "\n", "moesmith generate: interrupted\n")


def test_texts_of_all_kinds_stream_as_they_decode(tmp_path):
    """Random tokens, among them parts of characters and special tokens: the pieces shown are the whole text."""
    draw = random.Random(1)
    byte_level = read_tokenizer(write_tokenizer(tmp_path))
    words = ["ab", "<|user|>", "é", "🙂", "\n", "你好", "\ufffd"]
    every = [[token] for token in range(byte_level.get_vocab_size())]
    check_streams(byte_level, draw, [byte_level.encode(word).ids for word in words] * 20 + every)

    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {"▁": 256, "▁a": 257, "b": 258, "你": 259}
    fallback = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fallback.decoder = decoders.Sequence(parts)  # pyright: ignore[reportAttributeAccessIssue]
    fallback.add_special_tokens(["<end>"])
    # Whole characters: among bytes that are none, this decoder loses the characters beside them.
    check_streams(fallback, draw, [[256], [257], [258], [259], [260], *(list(c.encode()) for c in "é🙂好x")])


def check_streams(tokenizer: Tokenizer, draw: random.Random, words: list[list[int]]) -> None:
    prompt = tokenizer.encode("b").ids
    before = tokenizer.decode(prompt)
    assert before
    for _ in range(300):
        ids = [token for word in draw.choices(words, k=draw.randint(1, 12)) for token in word]
        growing, shown = GrowingText(tokenizer, prompt), ""
        for token in ids:
            growing.append(token, ended=False)
            assert growing.text.startswith(shown)
            shown = growing.text
        growing.finish("length")
        assert before + growing.text == tokenizer.decode(prompt + ids)


def test_prompts_of_special_tokens(capsys, folder):
    (result,) = generate(capsys, folder, "--prompt", "<|begin|><|user|>", "--max-new-tokens", "4")
    assert result["prompt"] == "<|begin|><|user|>" and len(result["token_ids"]) == 4
    assert SETTINGS["bos_token"] in result["prompt"]


@pytest.mark.parametrize(
    ("text", "prompt"),
    [("a b\nc", "a b"), ("\n \n it's\n", " it's"), ("--chat x", "--chat x"), ("-\n-1", "-1"), ("é🙂", "é🙂")],
)
def test_the_command_that_train_suggests_draws_as_its_sample(text, prompt):
    suggested = _generate("a folder", text)
    assert suggested is not None
    program, command, *words = shlex.split(suggested)
    args = parse(Args, command, words)
    assert (program, command, args.folder, args.prompt) == ("moesmith", "generate", "a folder", (prompt,))
    assert args.sampling == Sampling(**SAMPLING) == Sampling(temperature=0.7, top_p=0.9)  # pyright: ignore[reportArgumentType]


def test_without_a_line_to_continue_train_suggests_nothing():
    assert _generate("folder", "\n \n-\n") is None
