"""Load randomly damaged checkpoints, and check that each is refused or read correctly.

    python -m tests.fuzz --count 2000 --seed 1       counts of results; exit status 1 if one of the last four is not 0
    python -m tests.fuzz --seed 1 --only 17          one case, with its changes and result

Each case changes headers, their lengths, the length of the data, or the index of a small model in several files, in one
to three places, and calls `moe.load`. The families alternate. The results are:

    refused        a `CheckpointError` of one line about a file of the folder
    unchanged      loaded, and every tensor is bit-equal to the original's
    legal          loaded with other values, which are those that the safetensors library reads from the same files: for
                   example, two tensors of the same shape have exchanged their offsets
    crash          any other exception, lack of memory, or the end of the process
    hang           no answer within --timeout seconds
    silent         loaded, and neither unchanged nor legal
    disagreement   a header is accepted, but the safetensors library refuses the file or reads other names, dtypes,
                   shapes or bytes

The cases run in one process, which is replaced when it dies. It may use 256 MiB more than after loading each original.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import random
import re
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("refused", "unchanged", "legal", "crash", "hang", "silent", "disagreement")
BAD = KINDS[3:]
INDEX = "model.safetensors.index.json"
MEMORY = 256 * 2**20
START_SECONDS = 120


@dataclass(frozen=True)
class Verdict:
    kind: str
    why: str
    changes: tuple[str, ...] = ()


# Damage: functions of a file's content that return the new content and a description.

Damage = Callable[[random.Random, bytes], tuple[bytes, str]]

_ODD_BYTES = b'0123456789{}[]",:\\ \t\n\0\x1f\x7f\x80\xc3\xff-+.eEnulaINf_'
_ODD_NUMBERS = ("0", "-1", "1", "-0", "1.0", "1e3", "9", "2147483648", "4294967296", "9223372036854775807")
_ODD_NUMBERS += ("9223372036854775808", "18446744073709551615", "18446744073709551616", "1" * 400, "01", "NaN", "0x10")
_ODD_VALUES = (None, True, -1, 0, 1.5, "", "F32", [], {}, [0, 0], [[]], {"a": 1}, "\0", "é", "\ud800", [2**63], 10**30)


def header_span(content: bytes) -> tuple[int, int]:
    return (8, 8 + int.from_bytes(content[:8], "little")) if content[8:9] == b"{" else (0, len(content))


def _span(content: bytes) -> tuple[int, int]:
    """Return the span of the JSON text: the header of a weight file, or the whole index."""
    return (0, len(content)) if content[:1] == b"{" else header_span(content)


def flip(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    at, bit = rng.randrange(_span(content)[1]), rng.randrange(8)
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :], f"bit {bit} of byte {at}"


def insert(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    start, end = _span(content)
    at, new = rng.randint(start, end), bytes([rng.choice(_ODD_BYTES)])
    return adjust_length(rng, content, content[:at] + new + content[at:], 1), f"{new!r} at byte {at}"


def delete(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    start, end = _span(content)
    at, count = rng.randrange(start, end), rng.choice((1, 1, 2, 20))
    count = min(count, end - at)
    return adjust_length(rng, content, content[:at] + content[at + count :], -count), f"{count} bytes gone at {at}"


def replace(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    at, new = rng.randrange(*_span(content)), bytes([rng.choice(_ODD_BYTES)])
    return content[:at] + new + content[at + 1 :], f"{new!r} for byte {at}"


def number(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Replace a number by one near it, its double or half, or one that parsers often mishandle."""
    start, end = _span(content)
    found = list(re.finditer(rb"(?<=[\[:, ])\d+", content[start:end]))
    one = rng.choice(found)
    value = int(one[0])
    near = [str(value + step) for step in (1, -1, 4, -4)] + [str(2 * value), str(value // 2)]
    new = rng.choice((*near, *_ODD_NUMBERS)).encode()
    a, b = start + one.start(), start + one.end()
    changed = adjust_length(rng, content, content[:a] + new + content[b:], len(new) - (b - a), always=True)
    return changed, f"{new.decode()[:30]} for {value}"


def adjust_length(rng: random.Random, old: bytes, new: bytes, by: int, *, always: bool = False) -> bytes:
    """Adjust a header's length by `by`, usually; an index has no length."""
    if old[:1] == b"{" or not (always or rng.random() < 0.8):
        return new
    length = int.from_bytes(old[:8], "little") + by
    return max(0, length).to_bytes(8, "little") + new[8:]


def structure(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Delete, duplicate, rename, replace or swap a part of the JSON."""
    start, end = _span(content)
    values = json.loads(content[start:end])
    places = list(_places(values))
    owner, key = rng.choice(places)
    action = rng.choice(("delete", "rename", "value", "swap", "add", "twice"))
    twice = ""
    if action == "delete":
        del owner[key]
    elif action == "rename":
        owner[rng.choice((str(key) + "x", str(key)[:-1], "", "a\nb", "x" * 1025, "__metadata__"))] = owner.pop(key)
    elif action == "value":
        owner[key] = rng.choice(_ODD_VALUES)
    elif action == "swap":
        other, name = rng.choice(places)
        owner[key], other[name] = other[name], owner[key]
    elif action == "add":
        owner[rng.choice(("x", "shape", "dtype", "é", "model.norm.weight"))] = owner[key]
    else:
        twice = f"{json.dumps(key)}: {json.dumps(owner[key])}"
    text = json.dumps(values, ensure_ascii=rng.random() < 0.5).encode("utf-8", "replace")
    if twice:
        text = text[:-1] + b", " + twice.encode() + b"}"
    length = len(text).to_bytes(8, "little") if start else b""
    return length + text + content[end:], f"{action} {key!r}"


def _places(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield value, key
            yield from _places(inner)


def offsets(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Exchange the data of two tensors, usually of the same shape."""
    start, end = header_span(content)
    values = json.loads(content[start:end])
    entries = [(name, entry) for name, entry in values.items() if name != "__metadata__"]
    name, entry = rng.choice(entries)
    alike = [(n, e) for n, e in entries if e["shape"] == entry["shape"] and n != name]
    other, its = rng.choice(alike if alike and rng.random() < 0.7 else entries)
    entry["data_offsets"], its["data_offsets"] = its["data_offsets"], entry["data_offsets"]
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text + content[end:], f"offsets of {name} and {other}"


def spelling(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Write the same JSON in another legal form."""
    start, end = _span(content)
    values = json.loads(content[start:end])
    order = list(values)
    rng.shuffle(order)
    text = json.dumps({key: values[key] for key in order}, indent=rng.choice((None, 0, 3))).encode("utf-8", "replace")
    letter = rng.choice("aeo_.")
    text = text.replace(f"{letter}d".encode(), f"\\u{ord(letter):04x}d".encode()) if rng.random() < 0.3 else text
    text += rng.choice((b"", b" ", b"\n" * 7, b"\t \r\n" * 300))
    return (len(text).to_bytes(8, "little") if start else b"") + text + content[end:], "spelling"


def prefix(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    length = int.from_bytes(content[:8], "little")
    near = (length + 1, length - 1, length + 8, 2 * length, len(content), len(content) - 8, 0, 1, 2)
    new = rng.choice((*near, 2**24, 2**31, 2**32 + length, 2**63, 2**64 - 1)) % 2**64
    return new.to_bytes(8, "little") + content[8:], f"header length {new}"


def size(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    by = rng.choice((1, 1, 4, 8, 64, 4096))
    if rng.random() < 0.5:
        return content[:-by], f"{by} bytes cut"
    return content + bytes(rng.choices(range(256), k=by)), f"{by} bytes more"


def cut(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    at = rng.randrange(len(content))
    return content[:at], f"cut at byte {at}"


def place(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Change a file, a tensor or the metadata in the index."""
    values = json.loads(content)
    names = values["weight_map"]
    name, other = rng.choice(list(names)), rng.choice(list(names.values()))
    odd = ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "\0.safetensors", "", ".", 3, None, [other])
    new: Any = rng.choice((other, other, other + "x", *odd))
    if rng.random() < 0.2:
        values["metadata"] = rng.choice(({}, None, {"total_size": rng.choice(_ODD_VALUES)}, {"total_size": 10**6}))
        return json.dumps(values).encode(), f"metadata {values['metadata']!r}"
    names[rng.choice((name, name, name + "x"))] = new
    return json.dumps(values).encode(), f"{name} in {new!r}"


_TEXTS: tuple[Damage, ...] = (flip, flip, insert, delete, replace, number, number, structure, structure)
HEADERS: tuple[Damage, ...] = (*_TEXTS, spelling, offsets, offsets, prefix, size, cut)
INDEXES: tuple[Damage, ...] = (*_TEXTS, spelling, place, place, cut)


def damage(rng: random.Random, files: dict[str, bytes]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Damage some files; return the changed ones and descriptions."""
    changed: dict[str, bytes] = {}
    changes = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = INDEX if rng.random() < 0.25 else rng.choice([name for name in files if name != INDEX])
        content = changed.get(name, files[name])
        if len(content) < 9 or _span(content)[0] >= min(_span(content)[1], len(content)) - 1:
            continue
        what = rng.choice(INDEXES if name == INDEX else HEADERS)
        if _span(content)[1] > len(content):  # an earlier change has broken its length
            what = size
        try:
            changed[name], done = what(rng, content)
        except (ValueError, LookupError, TypeError, AttributeError):  # an earlier change prevents this one
            changed[name], done = replace(rng, content)
        changes.append(f"{name}: {what.__name__}: {done}")
    return changed, tuple(changes)


class Lab:
    """A valid folder that can be damaged and restored repeatedly."""

    def __init__(self, folder: Path, family: str = "deepseek_v3") -> None:
        import torch

        import moe
        from moe.checkpoint import save
        from moe.checkpoint.format.layout import layout
        from tests.support.checkpoint_cases import BY_FAMILY, as_kimi_k25

        torch.set_num_threads(1)
        config = BY_FAMILY[family]
        few: dict[str, Any] = dict(num_hidden_layers=2, layer_types=config.layer_types and config.layer_types[:2])
        if config.n_routed_experts:
            few |= dict(n_routed_experts=4, n_group=min(config.n_group, 2), topk_group=1, num_experts_per_tok=2)
        self.config = dataclasses.replace(config, **few)
        model = moe.Transformer(self.config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        self.folder = folder
        save(model, folder, max_shard_bytes=120_000)
        if family == "kimi_k25":
            as_kimi_k25(folder)
        self.files = {path.name: path.read_bytes() for path in folder.glob("model*")}
        self.specs = [spec for spec in layout(self.config).values() if not spec.repeat]
        self.state = moe.load(folder).state_dict()

    def case(self, seed: int, index: int) -> Verdict:
        changed, changes = damage(random.Random(f"{seed}:{index}"), self.files)
        return dataclasses.replace(self.judge(changed), changes=(f"family: {self.config.model_type}", *changes))

    def judge(self, changed: dict[str, bytes]) -> Verdict:
        """Judge the folder with some files replaced, and restore them afterwards."""
        for name, content in changed.items():
            (self.folder / name).write_bytes(content)
        try:
            for name, content in changed.items():
                if name != INDEX and (why := self._disagreement(name, content)):
                    return Verdict("disagreement", why)
            return self._load()
        except Exception as error:
            return Verdict("crash", f"{type(error).__name__}: {error}"[:500])
        finally:
            for name in changed:
                (self.folder / name).write_bytes(self.files[name])

    def _disagreement(self, name: str, content: bytes) -> str:
        """Describe how the safetensors library reads an accepted file differently; "" if it does not."""
        from safetensors import SafetensorError, deserialize

        from moe import CheckpointError
        from moe.checkpoint.format.header import read_header

        try:
            ours = read_header(self.folder / name)
        except CheckpointError:
            return ""
        try:
            theirs = dict(deserialize(content))
        except SafetensorError as error:
            return f"{name}: the library refuses it: {error}"
        if ours.keys() != theirs.keys():
            return f"{name}: other names: {sorted(ours.keys() ^ theirs.keys())[:3]}"
        for tensor, info in ours.items():
            their = theirs[tensor]
            mine = info.dtype, list(info.shape), content[info.offset : info.offset + info.nbytes]
            if mine != (their["dtype"], their["shape"], bytes(their["data"])):
                return f"{name}: {tensor}: another dtype, shape or bytes"
        return ""

    def _load(self) -> Verdict:
        import moe
        from moe import CheckpointError

        try:
            state = moe.load(self.folder).state_dict()
        except CheckpointError as error:
            inside = Path(error.path) == self.folder or Path(error.path).parent == self.folder
            if not inside or not str(error).isprintable() or len(str(error)) > 2000:
                return Verdict("crash", f"the error is not one line about a file of the folder: {error!r}"[:500])
            return Verdict("refused", str(error))
        return self.compare(state)

    def compare(self, state: dict[str, Any]) -> Verdict:
        """Compare a model's tensors with the original's, and with those that the library reads."""
        import torch
        from safetensors.torch import load

        def same(a: torch.Tensor, b: torch.Tensor) -> bool:
            return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))

        def bits(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.contiguous().view(-1).view(torch.uint8)

        if state.keys() != self.state.keys():
            return Verdict("silent", "other parameters")
        different = [name for name, tensor in state.items() if not same(tensor, self.state[name])]
        if not different:
            return Verdict("unchanged", "")
        theirs: dict[str, torch.Tensor] = {}
        for path in self.folder.glob("model*.safetensors"):
            theirs |= load(path.read_bytes())
        for spec in self.specs:
            if spec.name not in theirs or not same(spec.stored(state[spec.parameter]), theirs[spec.name]):
                return Verdict("silent", f"{spec.name} is neither the original's nor the file's")
        return Verdict("legal", different[0])


def work(seed: int, place: Path) -> None:
    """Run the cases whose numbers arrive on stdin, in new folders in `place`, and print their verdicts."""
    from moe.checkpoint.format.families import FAMILIES

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    root = Path(tempfile.mkdtemp(dir=place))
    logging.getLogger("moe").setLevel(logging.ERROR)  # every load of a vision tower warns
    labs = [Lab(root / family, family) for family in FAMILIES]
    for lab in labs:
        lab.judge({})
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    print("ready", file=answers)
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(labs[int(line) % len(labs)].case(seed, int(line)))), file=answers)


class Worker:
    """Process that runs cases, replaced when it dies or hangs."""

    def __init__(self, command: list[str], seconds: float) -> None:
        self.command, self.seconds = command, seconds
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, index: int) -> Verdict:
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if self._answer(START_SECONDS) != b"ready\n":
                self.stop()
                raise SystemExit("fuzz: the worker process does not start")
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{index}\n".encode())
            self.process.stdin.flush()
            line = self._answer(self.seconds)
        except BrokenPipeError:
            line = b""
        if line:
            answer = json.loads(line)
            return Verdict(answer["kind"], answer["why"], tuple(answer["changes"]))
        if line is None:
            self.stop()
            return Verdict("hang", f"no answer in {self.seconds:g} s")
        status = self.process.wait()
        self.stop()
        return Verdict("crash", f"the process ended with status {status}")

    def _answer(self, seconds: float) -> bytes | None:
        """Read a line; b"" at the end of the output, None after a timeout."""
        assert self.process is not None and self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            return self.process.stdout.readline() if selector.select(seconds) else None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def execute(worker: Worker, indexes: range, seed: int) -> int:
    """Run the cases, print the counts, and return the exit status."""
    counts: Counter[str] = Counter()
    shown = 0
    status = 0
    try:
        for index in indexes:
            verdict = worker.ask(index)
            counts[verdict.kind] += 1
            alone = len(indexes) == 1
            if alone or (verdict.kind in BAD and shown < 20):
                shown += 1
                print(f"{verdict.kind}: python -m tests.fuzz --seed {seed} --only {index}: {verdict.why}")
                for change in verdict.changes:
                    print(f"    {change}")
    except KeyboardInterrupt:
        print("interrupted")
        status = 130
    finally:
        worker.stop()
    print(f"{counts.total()} cases, seed {seed}: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS))
    return status or int(any(counts[kind] for kind in BAD))


def _number(least: int) -> Callable[[str], int]:
    def number_from(text: str) -> int:
        if not text.isdecimal() or len(text) > 18 or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least {least}")
        return int(text)

    return number_from


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seconds above 0, at most 3600")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--count", type=_number(1), default=2000, help="Number of cases (default: 2000)")
    parser.add_argument("--seed", type=_number(0), default=0, help="Seed of the cases (default: 0)")
    parser.add_argument("--only", type=_number(0), metavar="I", help="Run only this case")
    parser.add_argument(
        "--timeout", type=_seconds, default=10.0, help="Seconds until a case counts as hung (default: 10)"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        return work(options.seed, options.worker)
    indexes = range(options.count) if options.only is None else range(options.only, options.only + 1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        command = [sys.executable, "-m", "tests.fuzz", "--worker", place, "--seed", str(options.seed)]
        raise SystemExit(execute(Worker(command, options.timeout), indexes, options.seed))


if __name__ == "__main__":
    main()
