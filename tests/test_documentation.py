"""README, docs/ and examples/ are true: programs run, commands exist, links lead somewhere, figures are those of files.

The output of `train --preset tiny` is compared in `tests/train/test_tiny.py`, and figures of clusters in
`tests/planning/test_cluster.py`.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import random
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from moe.checkpoint.format.families import FAMILIES
from moe.cli import COMMANDS, main
from moe.cli.options import parse
from moe.counts import count_parameters
from moe.recipes.countdown import Problem
from moe.recipes.countdown_text import chain_of_thought
from tests.conftest import ROOT
from tests.skeletons import RELEASES

PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
README, TRAINING, CHECKPOINTS, PLANNING, RESULTS = (
    PAGES[name]
    for name in ("README.md", *(f"docs/{each}.md" for each in ("training", "checkpoints", "planning", "results")))
)
EXAMPLES = {path.name: path for path in sorted(ROOT.glob("examples/*")) if path.name != "__pycache__"}


def blocks(kind: str) -> list[tuple[str, str]]:
    """Page and text of every fenced block of a kind."""
    found = (
        (page, re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)) for page, text in PAGES.items()
    )
    return [(page, block) for page, each in found for block in each]


PROGRAMS = blocks("python")
CONSOLE = [(page, line) for page, block in blocks("console") for line in block.splitlines()]


def contents() -> set[str]:
    """The files and folders of the clone where a program that is started in it would leave something."""
    folders = (ROOT, ROOT / "docs", ROOT / "examples")
    found = (path for folder in folders for path in folder.iterdir())
    return {
        str(path) for path in found if not path.name.startswith((".", "__pycache__")) and path.suffix != ".egg-info"
    }


BEFORE = contents()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands of the pages need: texts, a configuration, a checkpoint and a short run."""
    folder = tmp_path_factory.mktemp("workplace")
    texts = [f"The number {i} is followed by {i + 1}, and {i * i} is its square." * 4 for i in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(lines)
    (folder / "heldout.jsonl").write_text(json.dumps({"text": "Squares of numbers are never negative. " * 30}) + "\n")
    (folder / "more.json").write_text(
        json.dumps([{"text": "A number that is not followed by another is the last one."}])
    )
    pairs = [{"prompt": f"After {i} comes", "completion": f" {i + 1}."} for i in range(20)]
    (folder / "examples.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "vowels.py").write_text(next(program for _, program in PROGRAMS if program.startswith("class Vowels")))
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("Numbers are written from left to right.\n" * 20)
    (folder / "model.json").write_text(json.dumps(moe.preset("tiny").to_dict()))
    moe.Transformer(moe.preset("tiny")).save(folder / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_command("moesmith train --data corpus.jsonl --out runs/tiny", patch)
    return folder


QUICK = "--steps 2 --batch-size 2 --seq-length 32 --warmup 1 --optimizer adamw"


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `moesmith` command in this process, in the working folder. Training takes two small steps and draws nothing."""
    words = shlex.split(line)[1:]
    if words[0] in ("train", "sft"):
        words += QUICK.split()
        for module in ("moe.train.run", "moe.recipes.sft"):
            monkeypatch.setattr(f"{module}._plot", lambda *_: [])
            monkeypatch.setattr(f"{module}.SAMPLE_NEW_TOKENS", 2)
    if words[0] == "grpo":
        few = "--steps 1 --batch-size 4 --accumulation 1 --group-size 2 --max-new-tokens 4 --seq-length 128"
        words += few.split()
        monkeypatch.setattr("moe.recipes.grpo_run.GrpoRun._plot", lambda *_: [])
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # set by the commands otherwise, and for good
    assert main(words) == 0


def parse_training(words: list[str]) -> Any:
    module = importlib.import_module("moe.cli.train")
    return parse(module.Args, "train", words)


def check_benchmark(words: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"benchmarks.{words[0]}").add_arguments(parser)
    parser.parse_args(words[1:])


def check_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a line of a console block; what takes minutes, or several machines, is only parsed."""
    words = shlex.split(line)
    if line.startswith("pip install "):
        assert line in NEWCOMER
    elif words[0] == "moesmith" and "&&" in words:
        for each in line.split(" && "):
            check_command(each, monkeypatch)
    elif words[:2] == ["moesmith", "train"] and ("--preset" in words or "--resume" in words):
        parse_training(words[2:])
    elif words[0] == "moesmith" and words[1] in ("distill", "recipe"):
        parse(importlib.import_module(f"moe.cli.{words[1]}").Args, words[1], words[2:])
    elif words[0] == "moesmith":
        run_command(line, monkeypatch)
    elif words[0] == "torchrun":
        parse_training(words[words.index("moe") + 2 :])
    elif words[:3] == ["python", "-m", "benchmarks"]:
        check_benchmark(words[3:])
    else:
        assert words[:2] == ["python", "-c"] and words[3] == ">"
        done = subprocess.run([sys.executable, "-c", words[2]], capture_output=True, text=True, check=True)
        Path(words[4]).write_text(done.stdout)


NEWCOMER = [
    'pip install torch==2.13.0 -e ".[plot]" && moesmith train --preset tiny',
    'pip install torch==2.13.0 -e ".[test]" && python -m pytest -n 2',
]


def torchrun(script: Path, folder: Path) -> str:
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(len(PROGRAMS)), ids=[f"{page}-{i}" for i, (page, _) in enumerate(PROGRAMS)])
def test_program_runs_as_printed(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, program = PROGRAMS[number]
    if program.startswith("# torchrun"):
        script = tmp_path / "own.py"
        script.write_text(program)
        torchrun(script, tmp_path)
    else:
        exec(compile(program, f"program {number}", "exec"), {"__name__": "__main__"})


def test_there_are_short_programs() -> None:
    assert len(PROGRAMS) >= 8
    assert all(len(program.strip().splitlines()) <= 14 for _, program in PROGRAMS)


@pytest.mark.parametrize(("page", "line"), CONSOLE)
def test_command_of_a_console_block(page: str, line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    check_command(line, monkeypatch)


def test_the_batch_job_is_a_script_that_trains() -> None:
    ((_, script),) = blocks("bash")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    parse_training(script.replace("\\\n", "").partition("-m moe train ")[2].split("\n")[0].replace('"', "").split())


def test_every_block_has_a_kind_that_is_tested() -> None:
    kinds = {
        kind
        for text in PAGES.values()
        for kind in re.findall(r"^```(\w*)\n(?:.*?)^```", text, re.DOTALL | re.MULTILINE)
    }
    assert kinds == {"python", "console", "text", "bash"}


def test_every_command_in_a_sentence_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Its name, and every option that it is given; the other words may be placeholders."""
    found: dict[tuple[str, str], set[str]] = {}
    for text in PAGES.values():
        for code in re.findall(r"`((?:moesmith|python -m (?:benchmarks|tests\.))[^`\n]*)`", text):
            program, _, rest = code.removeprefix("python -m ").replace(".", " ").partition(" ")
            name, *options = rest.split() or [""]
            if name:
                found.setdefault((program, name), set()).update(each for each in options if each.startswith("--"))
    assert {name for program, name in found if program == "moesmith"} == set(COMMANDS)
    for (program, name), options in found.items():
        if program == "tests":
            module = importlib.util.find_spec(f"tests.{name}")
            assert module is not None and module.origin is not None, name
            file = Path(module.origin)
            text = "".join(each.read_text() for each in (file, file.with_name("__main__.py")) if each.exists())
        else:
            with pytest.raises(SystemExit) as stop:
                run: Callable[[list[str]], int] = main
                if program == "benchmarks":
                    run = importlib.import_module("benchmarks.__main__").main
                sys.exit(run([name, "--help"]))
            assert not stop.value.code
            text = capsys.readouterr().out
        assert all(re.search(rf"{option}\b", text) for option in options), (program, name, options)


def test_the_two_commands_a_newcomer_types() -> None:
    assert re.findall(r"^pip install torch==.*$", README, re.MULTILINE) == NEWCOMER


def test_the_readme_is_short_and_shows_a_part_of_the_first_run() -> None:
    assert len(README.splitlines()) <= 150
    (shown,) = (text for page, text in blocks("text") if page == "README.md")
    (whole,) = (text for page, text in blocks("text") if page == "docs/training.md")
    assert whole.startswith(shown)
    picture = ROOT / "docs" / "images" / "loss.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 100_000


def anchors(text: str) -> set[str]:
    """What GitHub names the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    files = [ROOT / page for page in (*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")]
    wrong, linked = [], set()
    for file in files:
        for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            linked.add(target)
            if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
                wrong.append(f"{file.relative_to(ROOT)}: {link}")
    assert not wrong
    assert {ROOT / page for page in PAGES} - linked == {ROOT / "README.md"} - linked


def test_the_error_of_a_truncated_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    moe.Transformer(moe.preset("tiny")).save("checkpoint")
    shard = Path("checkpoint/model.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(moe.CheckpointError) as caught:
        moe.load("checkpoint")
    assert [f"{caught.value}\n"] == [text for page, text in blocks("text") if page == "docs/checkpoints.md"]
    assert len(blocks("text")) == 4  # this one, the two of the first run, and a chain of thought


def test_the_chain_of_thought() -> None:
    (shown,) = (text for page, text in blocks("text") if page == "docs/recipes.md")
    problem = Problem((3, 7, 25), 46)
    completion = shown.removeprefix(f"{problem.prompt}\n").removesuffix("\n")
    assert completion in {chain_of_thought(problem, random.Random(seed)) for seed in range(1000)}


def test_the_families_in_the_table() -> None:
    table = CHECKPOINTS[CHECKPOINTS.index("| family |") :].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(FAMILIES)
    assert f"checkpoints of {len(FAMILIES)} families" in README


def test_counts_in_the_text() -> None:
    counts = count_parameters(moe.preset("deepseek_v3"))
    for number in (counts.total, counts.activated, counts.activated_without_embedding):
        assert f"{number:,}" in CHECKPOINTS
    release = RELEASES["deepseek_v3"]
    assert f"{release.tensors:,} tensors and {release.nbytes:,} bytes" in " ".join(PLANNING.split())


def test_the_figures_of_placement(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r'^python -c "(.*)" > zipf.json$', PLANNING, re.MULTILINE)[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    file = workplace / "zipf.json"
    file.write_text(done.stdout)
    figures = []
    for physical in ("256", "288"):
        assert main(["place", str(file), "--gpus", "32", "--physical-experts", physical]) == 0
        figures += re.findall(r"^all layers +(\S+) +(\S+)", capsys.readouterr().out, re.MULTILINE)
    (before, moved), (_, replicated) = figures
    text = " ".join(PLANNING.split())
    for said in (
        f"busiest GPU has {before} times the mean",
        f"reduces this to {moved} times",
        f"has {replicated} times",
    ):
        assert said in text


def recorded(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "benchmarks" / "results" / name).read_text().splitlines()]


def test_the_speeds_of_a_model() -> None:
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    older: dict[str, dict[str, float]] = {}
    names = {
        "train": "training step, 512 tokens",
        "prefill": "prefill, 1,024 tokens",
        "decode": "decode after 1,024 tokens",
        "short": "decode after 64 tokens",
        "batch 8": "decode, batch of 8 after 256 tokens",
        "batch 32": "decode, batch of 32 after 256 tokens",
    }

    def name_of(work: str, variant: str) -> str:
        return names[work] + ("" if variant == "plain" else f", {variant}")

    for each in recorded("cpu.jsonl"):
        assert each["commit"][:12] in RESULTS and each["versions"]["transformers"] in RESULTS
        beside, variant = each.get("beside", "transformers"), each.get("variant", "plain")
        ours, theirs = (each["tokens"] / each[who]["median_s"] for who in ("ours", "peer"))
        share, ratio = each["limit_s"] / each["ours"]["median_s"], ours / theirs
        one_decimal = each["work"] not in ("train", "prefill")
        mine, other = (f"{rate:,.{1 if one_decimal and rate < 100 else 0}f}" for rate in (ours, theirs))
        cells = f"{mine} ({share:.0%}) | {other} | {ratio:.2f}"
        if beside == "4565dc56" and each["dtype"] == "fp32":
            assert f"{ratio:.2f}" in RESULTS.partition("**In fp32**")[2].partition("**llama.cpp**")[0]
        elif beside == "4565dc56":
            older.setdefault(each["work"], {})[variant] = ratio
        elif beside == "llama.cpp" or each["preset"] == "bench_1500m":
            assert f"| {name_of(each['work'], variant)} | {cells} |\n" in RESULTS
        else:
            row = each["device"].split("(")[0].split()[0], each["work"], variant
            found.setdefault(row, {})[each["dtype"]] = cells
    for (device, work, variant), cells in found.items():
        name = name_of(work, variant)
        assert f"| {device}: {name} | {cells.get('fp32', '| |')} | {cells['bf16']} |\n" in RESULTS
    for work, ratios in older.items():
        cells = " | ".join(f"{ratios[each]:.2f}" if each in ratios else "" for each in ("plain", "packed", "int8"))
        assert f"| {names[work]} | {cells} |\n" in RESULTS


def test_the_times_of_a_layer() -> None:
    times: dict[tuple[str, str, int], dict[str, float]] = {}
    for each in recorded("layer.jsonl"):
        assert each["commit"] in RESULTS and each["status"] == "right" and each["other_cores"] < 0.2
        cell = each["shape"], each["op"], each["tokens"]
        times.setdefault(cell, {})[each["candidate"]] = 1000 * each["eager"]["median_s"]
    names = {"2048x1408x64x6": "V2-Lite", "2048x1024x64x8": "OLMoE"}
    for (shape, op, tokens), found in times.items():
        ours, theirs = found["moesmith"], found["transformers-grouped_mm"]
        mine, other = (f"{ms:,.{0 if ms >= 1000 else 1}f}" for ms in (ours, theirs))
        assert f"| {names[shape]}, {op} | {tokens:,} | {mine} | {other} | {theirs / ours:.2f} |\n" in RESULTS


def test_the_seconds_of_loading() -> None:
    for each in recorded("load.jsonl"):
        row = f" | {each['median_s']:.2f} | {each['times_readinto']:.2f} | {each['peak_share']:.2f} |\n"
        assert each["reader"] == "safetensors" or row in RESULTS


def test_an_example_is_short_and_says_how_it_is_run() -> None:
    assert set(EXAMPLES) == {"custom_kernel.py", "ddp_layer.py", "finetune.py", "hf_trainer.py", "trl_countdown.py"}
    for name, path in EXAMPLES.items():
        text = path.read_text()
        assert 20 <= len(text.splitlines()) <= 60
        assert re.search(
            rf"^    (python|torchrun) .*\bexamples/{name}", ast.get_docstring(ast.parse(text)) or "", re.MULTILINE
        )


def test_example_of_a_layer_under_ddp(tmp_path: Path) -> None:
    said = torchrun(EXAMPLES["ddp_layer.py"], tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert losses[-1] < 0.5 * losses[0]
    assert not list(tmp_path.iterdir())


def test_example_of_fine_tuning(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = workplace / "runs/tiny/checkpoint"
    text, out = workplace / "notes/a.txt", tmp_path / "finetuned"
    monkeypatch.setattr(
        sys, "argv", ["finetune.py", f"{checkpoint}", "--text", f"{text}", "--out", f"{out}", "--steps", "2"]
    )
    runpy.run_path(str(EXAMPLES["finetune.py"]), run_name="__main__")
    before, after = moe.load(checkpoint), moe.load(out)
    assert not torch.equal(before.embed_tokens.weight, after.embed_tokens.weight)
    assert (out / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_example_of_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of its docstring, beside ours alone."""
    from benchmarks.__main__ import main as benchmarks

    monkeypatch.chdir(ROOT)  # where the benchmarks are run
    (line,) = re.findall(r"^    python -m benchmarks (.*)$", EXAMPLES["custom_kernel.py"].read_text(), re.MULTILINE)
    file = tmp_path / "results.jsonl"
    assert benchmarks([*line.split(), "--peers", "--seconds", "0", "--json", str(file)]) == 0
    records = [json.loads(each) for each in file.read_text().splitlines()]
    yours = [each for each in records if each["candidate"].endswith("custom_kernel.py:sorted_experts")]
    assert [each["status"] for each in yours] == ["right", "right"]  # forward, train


def test_nothing_is_left_in_the_clone() -> None:
    """The last test here, after all that runs programs and commands."""
    assert contents() == BEFORE
