"""The command line: what it prints, its exit status, and that a user's mistake is one line."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import moe
from moe.cli import COMMANDS, main
from moe.cli.generate import GrowingText, end_ids, read_tokenizer
from tests.support.checkpoint_cases import V3
from tests.support.command_line import fails_in_one_line, run, variant


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_fits_a_terminal(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(capsys, command, "--help")
    assert (status, err) == (0, "")
    assert f"usage: moesmith {command}" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "{None" not in out and "True,False" not in out  # one style of options


def test_help_needs_no_torch_and_answers_at_once():
    helps = ";".join(f"call({argv})" for argv in [["--help"], *([name, "--help"] for name in COMMANDS)])
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name != "torch", "somebody imports torch"
sys.meta_path.insert(0, Refuse())
from moe.cli import main
def call(argv):
    try:
        assert main(argv) == 0
    except SystemExit as exit_:
        assert exit_.code == 0
{helps}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def seconds() -> float:
        """Seconds of processor time, which do not depend on what else runs."""
        before = os.times()
        subprocess.run([sys.executable, "-m", "moe", "generate", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.5


def test_top_level(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(capsys, "--help")
    assert status == 0 and all(f"  {name} " in out for name in COMMANDS)
    assert max(map(len, out.splitlines())) <= 80
    assert run(capsys, "--version")[1].startswith("moesmith ")
    status, out, err = run(capsys)
    assert (status, out) == (2, "") and "usage: moesmith" in err
    assert "did you mean inspect?" in fails_in_one_line(capsys, "inspekt")
    assert "expected one of train, sft, " in fails_in_one_line(capsys, "xyzzy")


@pytest.mark.parametrize(
    ("preset", "numbers"),
    [
        ("deepseek_v3", ["671,026,419,200", "37,552,297,472", "36,625,618,432", "684,489,845,504"]),
        ("deepseek_v2", ["235,741,434,880"]),
        ("deepseek_v2_lite", ["15,706,484,224"]),
    ],
)
def test_inspect_preset(capsys, preset, numbers):
    status, out, err = run(capsys, "inspect", preset)
    assert (status, err) == (0, "")
    for number in numbers:
        assert number in out.split()
    status, out, _ = run(capsys, "inspect", preset, "--json")
    facts = json.loads(out)
    assert f"{facts['parameters']['total']:,}" == numbers[0]
    assert facts["config"]["hidden_size"] > 0


def test_inspect_refuses_what_is_neither(capsys):
    line = fails_in_one_line(capsys, "inspect", "no/such")
    assert "expected a folder (no such folder; " in line and "), or one of the presets tiny, " in line


def test_train_refuses_gpus_that_are_not_there(capsys, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = fails_in_one_line(capsys, "train", "--device", "cuda", "--out", str(tmp_path / "run"))
    assert "--device: expected a GPU; found none usable by torch" in line
    assert not (tmp_path / "run").exists()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    line = fails_in_one_line(capsys, "train", "--device", "cuda", "--out", str(tmp_path / "run"))
    assert "each of the 2 processes" in line and "found 1" in line


def test_doctor(capsys):
    import torch

    status, out, err = run(capsys, "doctor")
    assert (status, err) == (0, "")
    assert f"torch: {torch.__version__}" in out and "moe_mlp: " in out
    facts = json.loads(run(capsys, "doctor", "--json")[1])
    assert facts["cpu"]["cores"] >= 1
    assert set(facts["kernels"]["cpu"]) == set(facts["kernels"]["cuda"])
    assert facts["distributed"]["gloo"] is torch.distributed.is_gloo_available()


def test_doctor_knows_every_operator(capsys):
    import moe.ops

    facts = json.loads(run(capsys, "doctor", "--json")[1])
    functions = {name for name in moe.ops.__all__ if name[0].islower()}
    assert set(facts["kernels"]["cpu"]) == functions


TEXT = ["How many are there? Übergrößenträger, naïve façade, 你好 world 🙂.", "zwölf Boxkämpfer jagen Viktor"] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random model with a byte-level tokenizer, whose tokens split characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    import moe

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    config = dataclasses.replace(moe.preset("tiny"), vocab_size=tokenizer.get_vocab_size(), num_nextn_predict_layers=0)
    path = tmp_path_factory.mktemp("cli") / "model"
    model = moe.Transformer(config)
    model.carried_files["tokenizer.json"] = tokenizer.to_str().encode()
    model.save(path)
    return path


def test_inspect_folder_reads_headers_only(capsys, folder, tmp_path):
    status, out, err = run(capsys, "inspect", str(folder))
    assert (status, err) == (0, "") and "exactly the tensors that the configuration requires" in " ".join(out.split())
    facts = json.loads(run(capsys, "inspect", str(folder), "--json")[1])
    assert facts["stored"]["values"] == facts["parameters"]["with_mtp"]

    sparse = variant(folder, tmp_path / "sparse")
    file = sparse / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    size = file.stat().st_size
    os.truncate(file, header)
    os.truncate(file, size)  # the weights are a hole now, which nobody may notice
    assert (
        run(capsys, "inspect", str(sparse), "--json")[1]
        == json.dumps(facts | {"model": str(sparse), "stored": facts["stored"] | {"folder": str(sparse)}}) + "\n"
    )


def test_verify(capsys, folder, tmp_path):
    status, out, err = run(capsys, "inspect", str(folder), "--verify")
    assert (status, err, out.count("\n")) == (0, "", 1) and "every byte is unchanged since it was saved: " in out
    facts = json.loads(run(capsys, "inspect", str(folder), "--verify", "--json")[1])["verified"]
    assert facts["findings"] == [] and facts["tensors"] > 20 and facts["folder"] == str(folder)

    damaged = variant(folder, tmp_path / "damaged", tokenizer__json=None)
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    status, out, err = run(capsys, "inspect", str(damaged), "--verify")
    bit, gone = out.splitlines()
    assert bit.startswith("model.safetensors: model.") and ": bytes changed since it was saved; expected sha256 " in bit
    assert gone == "tokenizer.json: missing"
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"moesmith inspect: {damaged}: not as it was saved; ") and err.endswith(
        "; found 2 differences\n"
    )
    status, out, _ = run(capsys, "inspect", str(damaged), "--verify", "--json")
    assert status == 2
    assert [finding["file"] for finding in json.loads(out)["verified"]["findings"]] == [
        "model.safetensors",
        "tokenizer.json",
    ]

    (damaged / "model.safetensors").rename(damaged / "model-1.safetensors")
    _, out, _ = run(capsys, "inspect", str(damaged), "--verify")
    assert len(out.splitlines()) == 21 and out.splitlines()[-1].endswith("more; --json has them all")


def test_what_cannot_be_verified(capsys, folder, tmp_path):
    theirs = variant(folder, tmp_path / "theirs", moesmith__manifest__json=None)
    error = fails_in_one_line(capsys, "inspect", str(theirs), "--verify")
    assert f"{theirs}: cannot be verified without moesmith.manifest.json" in error
    assert run(capsys, "inspect", str(theirs))[0] == 0
    assert "a folder to verify, not a preset" in fails_in_one_line(capsys, "inspect", "tiny", "--verify")
    assert "no such folder" in fails_in_one_line(capsys, "inspect", "no/such", "--verify")
    broken = variant(folder, tmp_path / "broken", moesmith__manifest__json="{")
    assert "moesmith.manifest.json: not valid JSON" in fails_in_one_line(capsys, "inspect", str(broken), "--verify")


def test_verifying_shows_its_progress_on_a_terminal(folder):
    terminal, stderr = os.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", "moe", "inspect", str(folder), "--verify"],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        check=True,
    )
    os.close(stderr)
    shown = os.read(terminal, 2**16).decode()
    os.close(terminal)
    assert done.stdout.startswith(str(folder).encode())
    assert "verifying" in shown and "MB" in shown


def test_corrupt_folders(capsys, folder, tmp_path):
    no_json = variant(folder, tmp_path / "a", config__json="{")
    assert str(no_json / "config.json") in fails_in_one_line(capsys, "inspect", str(no_json))
    bad_value = (folder / "config.json").read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 99')
    bad = variant(folder, tmp_path / "b", config__json=bad_value)
    assert "num_experts_per_tok = 99" in fails_in_one_line(capsys, "inspect", str(bad))
    truncated = variant(folder, tmp_path / "c")
    os.truncate(truncated / "model.safetensors", 1000)
    assert "model.safetensors" in fails_in_one_line(capsys, "inspect", str(truncated))
    assert "model.safetensors" in fails_in_one_line(capsys, "generate", str(truncated), "--prompt", "a")
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails_in_one_line(capsys, "inspect", str(tmp_path / "empty"))

    silent = variant(folder, tmp_path / "d", tokenizer__json=None)
    assert "tokenizer.json: no such file" in fails_in_one_line(capsys, "generate", str(silent), "--prompt", "a")
    odd = variant(folder, tmp_path / "e", tokenizer__json="[]")
    assert "not a tokenizer" in fails_in_one_line(capsys, "generate", str(odd), "--prompt", "a")
    endless = variant(folder, tmp_path / "f", generation_config__json='{"eos_token_id": "x"}')
    assert "eos_token_id" in fails_in_one_line(capsys, "generate", str(endless), "--prompt", "a")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["added_tokens"].append({**vocabulary["added_tokens"][0], "id": 5000, "content": "<far>"})
    far = variant(folder, tmp_path / "g", tokenizer__json=json.dumps(vocabulary))
    message = fails_in_one_line(capsys, "generate", str(far), "--prompt", "a<far>")
    assert "the tokenizer does not belong to this model; expected ids below 300; found 300" in message


GENERATE, PLAN = ("generate", "folder", "--prompt", "a"), ("plan", "tiny", "--gpu", "h100", "--gpus", "8")
CONVERT, CUT = ("convert", "{folder}", "--out", "{out}"), ("cut", "{folder}", "--out", "{out}")


@pytest.mark.parametrize(
    ("command", "option", "value", "expected"),
    [
        (GENERATE, "--temperature", "-1", "a finite number of at least 0"),
        (GENERATE, "--temperature", "nan", "a finite number of at least 0"),
        (GENERATE, "--top-p", "0", "a number above 0, at most 1"),
        (GENERATE, "--top-k", "-1", "0 (all) or more"),
        (GENERATE, "--max-new-tokens", "0", "1 or more"),
        (GENERATE, "--seed", "-1", "an integer from 0"),
        (GENERATE, "--min-p", "-0.5", "a number from 0 to 1"),
        (GENERATE, "--min-p", "nan", "a number from 0 to 1"),
        (GENERATE, "--repetition-penalty", "0", "a finite number above 0"),
        (GENERATE, "--system", "brief", "--chat as well; found --system alone"),
        (("train",), "--lr", "nan", "a finite number above 0"),
        (("train",), "--dispatch", "bf16", "one of same, fp8"),
        (PLAN, "--ep", "3", "a divisor of the "),
        (PLAN, "--sequence", "0", "a positive integer"),
        (PLAN, "--gpus-per-node", "0", "a positive integer"),
        (PLAN, "--moments", "fp64", "one of bf16, fp32"),
        (PLAN, "--dtype", "fp16", "fp8 or bf16 with --gpu"),
        (PLAN, "--matmul-share", "2", "a fraction above 0, at most 1"),
        (PLAN, "--latency-us", "-1", "a finite number of at least 0"),
        (PLAN, "--bandwidth", "0", "a number above 0"),
        (PLAN, "--price", "nan", "a finite number of at least 0"),
        (PLAN, "--train-tokens", "many", "a"),
        (("plan", "tiny"), "--gpus", "0", "a positive integer"),
        (("plan", "tiny"), "--tokens", "0", "a positive integer"),
        (("plan", "tiny"), "--memory", "80", "at least 1MiB"),
        (("place", "{loads}", "--gpus", "2"), "--physical-experts", "3", "a multiple of"),
        (("place", "{loads}", "--physical-experts", "4"), "--gpus", "0", ""),
        (("place", "{loads}", "--physical-experts", "4", "--gpus", "2"), "--nodes", "0", ""),
        (("place", "{loads}", "--physical-experts", "4", "--gpus", "2"), "--groups", "3", ""),
        ((*CONVERT, "--dtype", "fp8"), "--block-size", "0 128", "two integers from 1 to"),
        (CONVERT, "--scale-fmt", "ue8m0", "none without --dtype fp8"),
        (CONVERT, "--max-shard-size", "5XB", "a size"),
        ((*CUT, "--experts", "0"), "--layers", "9", "ascending numbers from 0 to"),
        ((*CUT, "--experts", "0"), "--layers", "x", "numbers and"),
        ((*CUT, "--layers", "0"), "--experts", "1,0", "ascending numbers from 0 to"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_option(capsys, folder, tmp_path, command, option, value, expected):
    (tmp_path / "loads.json").write_text('{"load": [[1, 2, 3, 4]]}')
    places = {"folder": folder, "out": tmp_path / "out", "loads": tmp_path / "loads.json"}
    words = [word.format(**places) for word in command]
    line = fails_in_one_line(capsys, *words, option, *value.split())
    assert line.startswith(f"moesmith {command[0]}: {option}: expected {expected}")
    assert [path.name for path in tmp_path.iterdir()] == ["loads.json"]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_reports_a_mistake(capsys, monkeypatch, rank):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    status, out, err = run(capsys, "train", "--steps", "0")
    expected = (0, "", "") if rank else (2, "", "moesmith train: --steps: expected 1 or more; found 0\n")
    assert (status, out, err) == expected


def test_generate_mistakes(capsys, folder, tmp_path):
    assert "no such folder" in fails_in_one_line(capsys, "generate", str(tmp_path / "no"), "--prompt", "a")
    assert "--prompt: expected some text; found ''" in fails_in_one_line(
        capsys, "generate", str(folder), "--prompt", ""
    )
    assert "UTF-8" in fails_in_one_line(capsys, "generate", str(folder), "--prompt", "\udcff")
    device = fails_in_one_line(capsys, "generate", str(folder), "--prompt", "a", "--device", "abacus")
    assert "--device: expected a device of this machine" in device


def generate(capsys, folder: Path, *options: str) -> list[dict]:
    status, out, err = run(capsys, "generate", str(folder), "--json", "--dtype", "fp64", *options)
    assert (status, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


def test_generate_prints_what_json_says(capsys, folder):
    (result,) = generate(capsys, folder, "--prompt", "How many", "--max-new-tokens", "10")
    assert len(result["token_ids"]) == 10 and result["finish_reason"] == "length"
    options = ["--prompt", "How many", "--max-new-tokens", "10", "--dtype", "fp64"]
    status, out, _ = run(capsys, "generate", str(folder), *options)
    assert (status, out) == (0, "How many" + result["text"] + "\n")


def test_a_batch_is_its_prompts_one_by_one(capsys, folder):
    prompts = ["How", "zwölf Boxkämpfer jagen", "🙂"]
    options = ["--max-new-tokens", "8"]
    alone = [generate(capsys, folder, "--prompt", prompt, *options)[0] for prompt in prompts]
    together = generate(capsys, folder, *(part for prompt in prompts for part in ("--prompt", prompt)), *options)
    assert [r["token_ids"] for r in together] == [r["token_ids"] for r in alone]

    shown = ["--dtype", "fp64", *options, *(part for prompt in prompts for part in ("--prompt", prompt))]
    out = run(capsys, "generate", str(folder), *shown)[1]
    assert out == "\n\n".join(r["prompt"] + r["text"] for r in alone) + "\n"


@pytest.mark.parametrize(
    ("generation", "expected"),
    [(None, {5}), ({}, set()), ({"eos_token_id": None}, set()), ({"eos_token_id": [7, 8]}, {7, 8})],
)
def test_end_ids_are_those_of_transformers(tmp_path, generation, expected):
    transformers = pytest.importorskip("transformers")
    model = moe.Transformer(dataclasses.replace(V3, extra={"eos_token_id": 5}))
    if generation is not None:
        model.carried_files["generation_config.json"] = json.dumps(generation).encode()
    model.save(tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").generation_config.eos_token_id
    assert end_ids(tmp_path / "m") == expected == set(theirs if isinstance(theirs, list) else [theirs]) - {None}


def test_a_text_ends_at_any_of_the_end_ids(capsys, folder, tmp_path):
    options = ["--prompt", "How many", "--max-new-tokens", "8"]
    ids = generate(capsys, folder, *options)[0]["token_ids"]
    end = ids[5]
    stops = variant(folder, tmp_path / "stops", generation_config__json=json.dumps({"eos_token_id": [299, end]}))
    (result,) = generate(capsys, stops, *options)
    assert result["finish_reason"] == "eos"
    assert result["token_ids"] == ids[: ids.index(end) + 1]


def test_a_seed_repeats_and_another_does_not(capsys, folder):
    def draw(seed: str) -> list[int]:
        options = ["--prompt", "How", "--temperature", "1", "--top-k", "100", "--top-p", "0.99", "--seed", seed]
        return generate(capsys, folder, *options, "--max-new-tokens", "8")[0]["token_ids"]

    assert draw("1") == draw("1") != draw("2")


def test_prompt_from_standard_input(capsys, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("zwölf\n"))
    assert generate(capsys, folder, "--prompt", "-", "--max-new-tokens", "1")[0]["prompt"] == "zwölf"


def test_growing_text_holds_back_incomplete_characters(folder):
    tokenizer = read_tokenizer(folder)
    for whole in TEXT:
        ids = tokenizer.encode(whole).ids
        for cut in (1, 3):
            text = GrowingText(tokenizer, ids[:cut])
            start = tokenizer.decode(ids[:cut])
            for token in ids[cut:]:
                text.append(token, ended=False)
                assert "\ufffd" not in text.text or "\ufffd" in start
            text.finish("length")
            assert start.endswith("\ufffd") or start + text.text == whole

    face = tokenizer.encode("🙂").ids
    assert len(face) > 1
    text = GrowingText(tokenizer, tokenizer.encode("a").ids)
    text.append(face[0], ended=False)
    assert text.text == ""
    text.finish("length")
    assert set(text.text) == {"\ufffd"}


def test_interrupt(folder):
    command = [sys.executable, "-m", "moe", "generate", str(folder), "--prompt", "zw", "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that runs the suite in the background has it ignore the signal, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.read(4)  # it generates
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (130, b"moesmith generate: interrupted\n")
    finally:
        process.kill()


def test_a_closed_pipe_is_exit_status_1_without_a_message():
    process = subprocess.Popen(
        [sys.executable, "-m", "moe", "inspect", "deepseek_v3"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait(timeout=30) == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    def bug(_: object) -> int:
        raise RuntimeError("ours")

    monkeypatch.setattr("moe.cli.doctor.run", bug)
    with pytest.raises(RuntimeError, match="ours"):
        main(["doctor"])


def test_a_full_disk_is_one_line(capsys, monkeypatch):
    def full(_: object) -> int:
        raise OSError(28, "No space left on device", "out.json")

    monkeypatch.setattr("moe.cli.doctor.run", full)
    assert "out.json: No space left on device" in fails_in_one_line(capsys, "doctor")
