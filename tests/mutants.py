"""Put defects into operators, router and kernels one at a time, and check that an assertion of a test fails.

    python -m tests.mutants --named                    the defects listed in tests/support/defects.py
    python -m tests.mutants --seed 1 --count 60        random ones, from the syntax tree
    python -m tests.mutants --seed 1 --count 60 --list

Each mutant runs in a copy of the tree. It is killed if an assertion of a test fails (or of torch.testing, or a guard
band) and the same test passes without the defect. Other exceptions, crashes and hangs prove nothing: a mutant that
causes only these is broken, and counts neither as killed nor as survived.
"""

import argparse
import ast
import faulthandler
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.defects import EQUIVALENT, NAMED, Defect

ROOT = Path(__file__).parents[1]
TREE = ("moe", "kernels", "tests", "benchmarks", "pyproject.toml")
TEST_SECONDS, RUN_SECONDS = 60, 900
MAX_CRASHES, MAX_ERRORS = 4, 40  # processes and other exceptions per mutant


@dataclass(frozen=True)
class Mutant:
    """A replacement of `old` at position `at` of a file by `new`."""

    file: str
    at: int
    old: str
    new: str
    name: str = ""

    def apply(self, text: str) -> str:
        assert text.startswith(self.old, self.at), f"{self.file} has changed since the mutant was created"
        return text[: self.at] + self.new + text[self.at + len(self.old) :]

    def lines(self, text: str) -> tuple[int, str, str]:
        """Return the number of the first changed line, the changed lines, and their new text."""
        mutated, start = self.apply(text), text.rfind("\n", 0, self.at) + 1
        shift = len(self.new) - len(self.old)
        stop = text.find("\n", self.at + len(self.old))
        old, new = text[start:stop].splitlines(), mutated[start : stop + shift].splitlines()
        same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
        number = text.count("\n", 0, start) + 1 + same
        return number, "\n".join(old[same:]).strip(), "\n".join(new[same:]).strip()


@dataclass(frozen=True)
class Stage:
    """Test files to run; tests whose names contain one of `first` run, in that order."""

    files: tuple[str, ...]
    first: tuple[str, ...] = ("",)
    interpreted: bool = False


OPS, CONTRACT, ROUTING = "tests/ops/test_ops.py", "tests/ops/test_contract.py", "tests/ops/test_routing.py"
MATMUL, QUANTIZATION, INT8 = "tests/ops/test_matmul.py", "tests/ops/test_quantization.py", "tests/ops/test_int8.py"
OFFSETS, PACKED, ANY = "tests/kernels/offsets.py", "tests/model/test_packed.py", ""
WITHOUT_A_GPU = Stage(
    ("tests/kernels/test_kernels.py",), ("launches", "grid", "compiled_for", "waits", "names_no_expert", "refused")
)


def on_kernels(*first: str, files: tuple[str, ...] = (OPS, OFFSETS)) -> tuple[Stage, ...]:
    return Stage(files, first, interpreted=True), WITHOUT_A_GPU


STAGES: dict[str, tuple[Stage, ...]] = {
    "moe/ops/activation.py": (Stage((OPS, CONTRACT), ("swiglu", "test_moe_mlp", "gradients", ANY)),),
    "moe/ops/grouped_gemm.py": (Stage((OPS, CONTRACT), ("grouped_mm", "gradients", ANY)),),
    "moe/ops/int8.py": (Stage((INT8, CONTRACT, "tests/ops/test_flops.py")),),
    "moe/ops/mlp.py": (Stage((OPS, CONTRACT), ("test_moe_mlp", ANY)),),
    "moe/ops/permutation.py": (Stage((OPS, CONTRACT), ("permute", "test_moe_mlp", ANY)),),
    "moe/ops/matmul.py": (Stage((MATMUL, OPS, CONTRACT), ("product", "grouped_mm", "test_moe_mlp", ANY)),),
    "moe/ops/quantization.py": (Stage((QUANTIZATION, CONTRACT)),),
    "moe/ops/routing.py": (Stage((ROUTING, CONTRACT)),),
    "moe/checkpoint/format/families.py": (Stage(("tests/checkpoint/test_config.py",)),),
    "moe/config.py": (Stage(("tests/checkpoint/test_exports.py",)),),
    "moe/counts.py": (Stage(("tests/model/test_counts.py",)),),
    "moe/attention.py": (Stage(("tests/model/test_attention_blocks.py", "tests/model/test_model.py")),),
    "moe/linear.py": (Stage((MATMUL,)),),
    "moe/ops/packed.py": (Stage((PACKED,)),),
    "moe/packed.py": (Stage((PACKED,)),),
    "moe/rope.py": (Stage(("tests/model/test_model.py",)),),
    "moe/speculative.py": (Stage(("tests/model/test_speculative.py",), ("drafts_are", "rejection", ANY)),),
    "moe/router.py": (Stage(("tests/layer/test_layer.py", ROUTING, "tests/layer/test_balance.py")),),
    "moe/planning/expert_cache.py": (Stage(("tests/planning/test_expert_cache.py",)),),
    "moe/planning/placement.py": (Stage(("tests/planning/test_placement.py",)),),
    "moe/replay.py": (Stage(("tests/model/test_replay.py",)),),
    "moe/recipes/grpo.py": (Stage(("tests/recipes/test_grpo.py",)),),
    "moe/recipes/rollout.py": (Stage(("tests/recipes/test_rollout.py",)),),
    "moe/recipes/task.py": (Stage(("tests/recipes/test_task.py",)),),
    "moe/recipes/countdown.py": (Stage(("tests/recipes/test_countdown.py",)),),
    "moe/recipes/distill.py": (Stage(("tests/recipes/test_distill.py",), ("divergence", "loss_of_a_step")),),
    "moe/recipes/examples.py": (Stage(("tests/recipes/test_examples.py",), ("completion", "boundary", "messages")),),
    "moe/recipes/packing.py": (Stage(("tests/recipes/test_examples.py",), ("packing", "rows")),),
    "moe/recipes/sft.py": (Stage(("tests/recipes/test_sft.py",), ("batch", "packed", "masked")),),
    "moe/trace.py": (Stage(("tests/model/test_trace.py",)),),
    "moe/integrations/trl.py": (Stage(("tests/integrations/test_trl.py",), ("DeepseekV", "passes", ANY)),),
    "kernels/moe_triton/activation.py": on_kernels("swiglu", "clamped", "test_moe_mlp["),
    "kernels/moe_triton/grouped_gemm.py": on_kernels("grouped_mm", "offsets.py", "test_moe_mlp["),
    "kernels/moe_triton/mlp.py": on_kernels(
        "test_moe_mlp[", "clamped", "not_here", "no_expert", "beside_transformers", "offsets.py"
    ),
    "kernels/moe_triton/permutation.py": on_kernels(
        "permute", "not_here", "no_expert", "test_moe_mlp[", "grouped_mm[", "offsets.py"
    ),
    "kernels/moe_triton/routing.py": on_kernels(ANY, files=(ROUTING,)),
    "kernels/moe_triton/tiling.py": on_kernels("grouped_mm", "test_moe_mlp["),
}
SLOW = ("many_experts", "transformers", "compile", "127x129", "257x65", "256x128")  # run last in their stage

# Files of which only some functions compute results.
PARTS = {
    "kernels/moe_triton/tiling.py": ("even", "last_stride_one"),
    "moe/attention.py": ("_attend_in_blocks", "_attend_absorbed"),
    "moe/checkpoint/format/families.py": ("_late_windows_read",),
    "moe/config.py": ("has_experts",),
    "moe/counts.py": ("activated",),
    "moe/integrations/trl.py": ("_Chosen", "_Records"),
    "moe/recipes/distill.py": ("kl_divergence",),
    "moe/recipes/examples.py": ("encode_completion", "_encode_parts"),
    "moe/recipes/sft.py": ("batch_of",),
}
SPEED = re.compile(r"num_warps|num_stages|BLOCK\w*|COLUMNS|SLOTS|debug|sanitize_overflow|asserted|_by_onednn|_CHUNK")
REFUSALS = ("device_assert", "_assert_async", "msg")
DEFINITIONS = ("define", "define_gradient")
OTHER = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}
OPPOSITE = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "amax": "amin"}


class Sites:
    """Places in a file where a small change alters results."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def position(self, line: int, column: int) -> int:
        start = self.starts[line - 1]  # columns are counted in bytes
        return start + len(self.text[start : self.starts[line]].encode()[:column].decode())

    def span(self, node: ast.expr | ast.keyword | ast.FunctionDef) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.position(node.lineno, node.col_offset), self.position(node.end_lineno, node.end_col_offset)

    def between(self, left: ast.expr, right: ast.expr, symbol: str) -> int:
        end, start = self.span(left)[1], self.span(right)[0]
        assert "#" not in self.text[end:start], "a comment inside an expression"
        return self.text.index(symbol, end, start)

    def walk(self, node: ast.AST) -> Iterator[tuple[int, str, str]]:
        """Yield (position, text, replacement)."""
        if self.skipped(node):
            return
        yield from self.of(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "format_spec"):
                continue
            if name == "test" and isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise):
                continue  # checks of arguments
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.walk(child)

    def skipped(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
            return True
        if isinstance(node, ast.FunctionDef):  # fakes compute only shapes
            return node.name.endswith("_fake") or SPEED.fullmatch(node.name) is not None
        if isinstance(node, ast.keyword):
            return SPEED.fullmatch(node.arg or "") is not None
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            return SPEED.fullmatch(node.targets[0].id) is not None
        if isinstance(node, ast.Compare):  # comparisons of devices
            return isinstance(node.left, ast.Attribute) and node.left.attr == "type"
        if isinstance(node, ast.Call):
            return called(node) in (*REFUSALS, *DEFINITIONS)
        return False

    def of(self, node: ast.AST) -> Iterator[tuple[int, str, str]]:
        if isinstance(node, ast.BinOp) and type(node.op) in OTHER:
            yield from self.operator(node.left, node.op, node.right)
            if isinstance(node.op, ast.BitAnd):
                (start, end), at = self.span(node), self.between(node.left, node.right, "&")
                for alone in (self.text[start:at].rstrip(), self.text[at + 1 : end].lstrip()):
                    yield start, self.text[start:end], alone
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OTHER:
            yield from self.operator(node.left, node.ops[0], node.comparators[0])
        elif isinstance(node, ast.UnaryOp):
            (start, end), sign = self.span(node), 3 if isinstance(node.op, ast.Not) else 1
            yield start, self.text[start:end], self.text[start + sign : end].lstrip()
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            (start, end), value = self.span(node), node.value
            new = not value if isinstance(value, bool) else 1 - value if value in (0, 1) else value + 1
            yield start, self.text[start:end], repr(new)
        elif isinstance(node, ast.Call) and called(node) == "where" and len(node.args) == 3:
            (start, middle), (other, end) = self.span(node.args[1]), self.span(node.args[2])
            swapped = self.text[other:end] + self.text[middle:other] + self.text[start:middle]
            yield start, self.text[start:end], swapped
        elif isinstance(node, ast.Call) and called(node) in OPPOSITE:
            end, name = self.span(node.func)[1], called(node)
            yield end - len(name), name, OPPOSITE[name]
        elif isinstance(node, ast.keyword) and node.arg in OPPOSITE:
            yield self.span(node)[0], node.arg, OPPOSITE[node.arg]

    def operator(self, left: ast.expr, op: ast.AST, right: ast.expr) -> Iterator[tuple[int, str, str]]:
        old, new = OTHER[type(op)]
        yield self.between(left, right, old), old, new


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def random_mutants(file: str, text: str) -> list[Mutant]:
    tree = ast.parse(text)
    parts = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in PARTS.get(file, ())]
    sites, seen = Sites(text), set()
    for node in parts or tree.body:
        seen |= set(sites.walk(node))
    return [Mutant(file, *site) for site in sorted(seen) if site[1] != site[2]]


def named_mutants(texts: dict[str, str]) -> list[Mutant]:
    found = []
    for defect in NAMED:
        mutants = mutants_of(defect, texts[defect.file])
        if len(mutants) != 1:
            where = f"{defect.file}: {defect.function}: {defect.name}"
            raise SystemExit(f"{where}: expected one occurrence of {defect.old!r}; found {len(mutants)}")
        found += mutants
    return found


def mutants_of(defect: Defect, text: str) -> list[Mutant]:
    """Return a mutant for each occurrence of the defect's text in its function."""
    sites, places = Sites(text), set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == defect.function:
            start, stop = sites.span(node)
            places |= {start + found.start() for found in re.finditer(re.escape(defect.old), text[start:stop])}
    return [Mutant(defect.file, at, defect.old, defect.new, defect.name) for at in sorted(places)]


def equivalents(texts: dict[str, str]) -> dict[tuple[str, str], str]:
    """Map (file, mutated text) of each equivalent mutant to the reason."""
    return {
        (defect.file, mutant.apply(texts[defect.file])): defect.name
        for defect in EQUIVALENT
        for mutant in mutants_of(defect, texts[defect.file])
    }


@dataclass(frozen=True)
class Outcome:
    verdict: str  # killed, survived or broken
    why: str


class Lab:
    """Runs tests in copies of the tree, with and without a defect."""

    def __init__(self, folder: Path, stages: dict[str, tuple[Stage, ...]] = STAGES) -> None:
        self.stages, self.tree = stages, folder / "tree"
        ignore = shutil.ignore_patterns("__pycache__", "results")
        for name in TREE:  # once, because the tree may be edited meanwhile
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.tree / name, ignore=ignore)
            else:
                shutil.copy(ROOT / name, self.tree / name)
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped = threading.Event()
        self.sound: dict[str, bool] = {}

    def judge(self, mutant: Mutant) -> Outcome:
        errors: Counter[str] = Counter()
        for stage in self.stages[mutant.file]:
            outcome = self.run(stage, mutant)
            if outcome.verdict == "killed":
                if not self.passes(stage, outcome.why):
                    return Outcome("broken", f"{outcome.why} fails without the defect")
                return outcome
            if outcome.verdict == "broken":
                errors[outcome.why] += 1
        return Outcome("broken", errors.most_common(1)[0][0]) if errors else Outcome("survived", "")

    def passes(self, stage: Stage, test: str) -> bool:
        if test not in self.sound:
            alone = Stage((test,), interpreted=stage.interpreted)
            self.sound[test] = self.run(alone, None).verdict == "survived"
        return self.sound[test]

    def run(self, stage: Stage, mutant: Mutant | None) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="mutant-", dir=self.tree.parent) as folder:
            root = Path(shutil.copytree(self.tree, Path(folder) / "tree"))
            if mutant is not None:
                path = root / mutant.file
                path.write_text(mutant.apply(path.read_text()))
            return self.test(stage, root)

    def test(self, stage: Stage, root: Path) -> Outcome:
        record = root / "record.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.mutants"]
        command += ["-p", "tests.support.kernels"] if stage.interpreted else []
        command += [f"--record={record}", f"--first={json.dumps(stage.first)}", *stage.files]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
        env |= {"TRITON_INTERPRET": "1"} if stage.interpreted else {}
        entries: list[dict] = []
        for _ in range(MAX_CRASHES):
            if self.stopped.is_set():
                return Outcome("broken", "interrupted")
            before = len(entries)
            process = subprocess.Popen(
                command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            self.running.add(process)
            try:
                output = process.communicate(timeout=RUN_SECONDS)[0].strip()
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                return Outcome("broken", "timeout")
            finally:
                self.running.discard(process)
            entries = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
            if not entries:
                return Outcome("broken", output.splitlines()[-1] if output else "no output")
            if "error" in entries[-1] or len(entries) == before:
                break  # otherwise a test ended the process: run the remaining ones
        return verdict(entries)

    def stop(self) -> None:
        self.stopped.set()
        for process in tuple(self.running):
            process.terminate()


def verdict(entries: list[dict]) -> Outcome:
    """Judge a record: killed by an assertion, broken if there were only other failures, or survived."""
    for entry in entries:
        if entry.get("numeric"):
            return Outcome("killed", entry["test"])
    kinds = Counter(entry["error"] for entry in entries if entry.get("error"))
    if kinds:
        return Outcome("broken", kinds.most_common(1)[0][0])
    ends = sum("error" in entry for entry in entries)
    return Outcome("broken", "crash or hang") if len(entries) > 2 * ends else Outcome("survived", "")


class Recorder:
    """Pytest plugin in the copy, which orders tests, records results, and stops at the first failed assertion."""

    def __init__(self, record: Path, first: list[str]) -> None:
        self.path, self.first = record, first
        self.error, self.numeric, self.errors = "", False, 0

    def write(self, **entry: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        done = {json.loads(line)["test"] for line in lines}

        def rank(item: pytest.Item) -> tuple[bool, int]:
            place = next((i for i, part in enumerate(self.first) if part in item.nodeid), -1)
            return any(part in item.nodeid for part in SLOW), place

        items[:] = sorted((i for i in items if i.nodeid not in done and rank(i)[1] >= 0), key=rank)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.error, self.numeric = "", False
        self.write(test=nodeid)
        faulthandler.dump_traceback_later(TEST_SECONDS, exit=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> None:
        if call.excinfo is None or call.excinfo.errisinstance(pytest.skip.Exception):
            return
        self.error, self.numeric = call.excinfo.typename, is_numeric(call.excinfo)
        self.errors += 1
        if self.numeric or self.errors >= MAX_ERRORS:
            item.session.shouldstop = self.error

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.write(test=nodeid, error=self.error, numeric=self.numeric)


def is_numeric(found: pytest.ExceptionInfo) -> bool:
    """Whether an assertion of the tests or of torch.testing failed, and not one of the code under test."""
    path = Path(found.traceback[-1].path).absolute()
    of_tests = path.is_relative_to(ROOT / "tests")
    return found.errisinstance(AssertionError) and (of_tests or path.parts[-3:-1] == ("torch", "testing"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", default="", help="file for the results of tests")
    parser.addoption("--first", default='[""]', help="JSON list of substrings of the names of tests to run, in order")


def pytest_configure(config: pytest.Config) -> None:
    record, first = str(config.getoption("--record")), str(config.getoption("--first"))
    if record:
        import moe

        assert Path(str(moe.__file__)).is_relative_to(config.rootpath), f"the tests would import {moe.__file__}"
        config.pluginmanager.register(Recorder(Path(record), json.loads(first)))


def show(mutant: Mutant, text: str, why: str = "") -> str:
    number, old, new = mutant.lines(text)
    title = ": ".join(part for part in (f"{mutant.file}:{number}", mutant.name, why) if part)
    return "\n".join(
        [title, *(f"  - {line}" for line in old.splitlines()), *(f"  + {line}" for line in new.splitlines())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="Seed for the choice of random mutants (default: 0)")
    parser.add_argument("--count", type=_positive, default=20, help="Number of random mutants (default: 20)")
    parser.add_argument("--named", action="store_true", help="Run all named defects instead")
    parser.add_argument("--list", action="store_true", help="Print the mutants and exit")
    parser.add_argument("--file", action="append", help="Substring of file names; may be repeated (default: all files)")
    parser.add_argument("--jobs", type=_positive, default=2, help="Number of parallel runs (default: 2)")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            raise SystemExit(execute(options, Lab(Path(folder))))
    except KeyboardInterrupt:
        print("interrupted")
        raise SystemExit(130) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a positive integer below 10^9")
    return int(text)


def execute(options: argparse.Namespace, lab: Lab) -> int:
    """Run mutants; return the exit status: 1 if a named defect is not killed, 2 if none is selected, 130 on Ctrl-C."""
    texts = {file: (lab.tree / file).read_text() for file in STAGES}
    files = [f for f in texts if not options.file or any(part in f for part in options.file)]
    mutants = []
    if files and options.named:
        mutants = [m for m in named_mutants(texts) if m.file in files]
    elif files:
        every = [m for f in files for m in random_mutants(f, texts[f])]
        mutants = random.Random(options.seed).sample(every, min(options.count, len(every)))
    if not mutants:
        asked = " ".join(options.file or ())
        print(f"--file {asked}: no mutants; expected a part of {', '.join(texts)}", file=sys.stderr)
        return 2
    if options.list:
        print(*(show(m, texts[m.file]) for m in mutants), sep="\n")
        return 0

    reasons = equivalents(texts)
    explained = {m: reason for m in mutants if (reason := reasons.get((m.file, m.apply(texts[m.file]))))}
    mutants = [m for m in mutants if m not in explained]
    outcomes: dict[Mutant, Outcome] = {}
    pool, interrupted = ThreadPoolExecutor(options.jobs), False
    try:
        futures = {pool.submit(lab.judge, m): m for m in mutants}
        for future in as_completed(futures):
            mutant, outcome = futures[future], future.result()
            outcomes[mutant] = outcome
            print(
                f"[{len(outcomes)}/{len(mutants)}] {outcome.verdict}: {show(mutant, texts[mutant.file], outcome.why)}",
                flush=True,
            )
    except KeyboardInterrupt:
        print("interrupted")
        interrupted = True
        pool.shutdown(wait=False, cancel_futures=True)
        lab.stop()
    pool.shutdown()
    of = {kind: [m for m, o in outcomes.items() if o.verdict == kind] for kind in ("killed", "survived", "broken")}
    print(f"\nkilled {len(of['killed'])} of {len(of['killed']) + len(of['survived'])} seeded")
    for kind in ("survived", "broken"):
        for mutant in of[kind]:
            print(f"{kind}: {show(mutant, texts[mutant.file], outcomes[mutant].why)}")
    for mutant, reason in explained.items():
        print(f"not run, equivalent: {show(mutant, texts[mutant.file], reason)}")
    if interrupted:
        return 130
    return int(options.named and len(of["killed"]) < len(mutants))


if __name__ == "__main__":
    main()
