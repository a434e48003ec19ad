"""Inject defects into moe/parallel, one at a time; a case must fail for each. python -m tests.parallel_defects"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Defect:
    """A replacement of `old`, which occurs once in `file`, that the cases whose names contain `case` must detect."""

    name: str
    file: str
    old: str
    new: str
    ranks: int
    case: str


def dispatch(name: str, old: str, new: str, case: str = "dispatch", ranks: int = 4) -> Defect:
    return Defect(name, "moe/parallel/dispatch.py", old, new, ranks, case)


def apply(name: str, old: str, new: str, case: str, ranks: int = 4) -> Defect:
    return Defect(name, "moe/parallel/apply.py", old, new, ranks, case)


DEFECTS = (
    dispatch(
        "a token sent twice to one rank", ".masked_fill(repeated, -1).sort(", ".masked_fill(repeated & False, -1).sort("
    ),
    dispatch("experts of the next rank", "start = self.transport.rank *", "start = (self.transport.rank ^ 1) *"),
    dispatch(
        "slots of other ranks computed here", "torch.where(here, ids - start, -1)", "torch.where(here, ids - start, 0)"
    ),
    dispatch(
        "gradients of tokens lost",
        "*(ops.unpermute(grad, position) for grad in grads[:2])",
        "*(i * ops.unpermute(grad, position) for i, grad in enumerate(grads[:2]))",
    ),
    dispatch(
        "gradients of weights in the wrong order",
        '"gradient of weights", grad_weights,',
        '"gradient of weights", grad_weights.flip(0),',
    ),
    dispatch(
        "results returned in the wrong order",
        "return ops.unpermute(rows, sent.position)",
        "return ops.unpermute(rows.flip(0), sent.position)",
    ),
    dispatch(
        "scales of FP8 shifted",
        "scales, codes = _typed(rows[:, :at]",
        "scales, codes = 2 * _typed(rows[:, :at]",
        "payload fp8",
    ),
    dispatch(
        "weights in half precision",
        "torch.cat((_bytes(weights), ",
        "torch.cat((_bytes(weights.half().to(weights.dtype)), ",
    ),
    apply(
        "expert gradients summed instead of averaged",
        "return grads[0] / ctx.ranks, None",
        "return grads[0], None",
        "recomputed, ep 4",
    ),
    apply(
        "expert gradients averaged twice",
        "return grads[0] / ctx.ranks, None",
        "return grads[0] / ctx.ranks**2, None",
        "recomputed, ep 4",
    ),
    apply(
        "losses weighted by the counts of one rank",
        "return everywhere.clamp_min(1).double() / dist.get_world_size()",
        "return torch.stack(list(counts)).clamp_min(1).double()",
        "padded",
    ),
    apply("the norm of one rank", "        dist.all_reduce(total)", "        pass", "plain"),
    apply("the norm of one rank, with a log", "total = _sum_in_step(", "_sum_in_step(", "recomputed, ep 4"),
    apply("replicas counted in the norm", "return world // parts", "return 1", "padded, ep 2 shard 2 replicate 2"),
    Defect(
        "all ranks initialize the first experts",
        "moe/parallel/tensor_parts.py",
        "first_expert=part[0].start",
        "first_expert=0",
        4,
        "initial values",
    ),
    apply(
        "a rank holds the experts of the next rank",
        "start = ep.get_local_rank() * share",
        "start = (ep.get_local_rank() ^ 1) * share",
        "recomputed, ep 4",
    ),
    apply(
        "router cast like other parameters",
        "exact = MixedPrecisionPolicy(param_dtype=wide",
        "exact = MixedPrecisionPolicy(param_dtype=config.param_dtype",
        "mixed precision",
        2,
    ),
    Defect(
        "bias update by the counts of one rank",
        "moe/balance.py",
        'flat = first.global_batch.sum(flat, "bias update")',
        "pass",
        4,
        "recomputed, ep 4",
    ),
    Defect(
        "global loss over one rank",
        "moe/balance.py",
        '(batch or GlobalBatch()).sum(torch.cat((load.flatten(), tokens)), "balance loss")',
        "torch.cat((load.flatten(), tokens))",
        4,
        "global loss",
    ),
)


def verdict(defect: Defect) -> str:
    """Inject a defect; returns "killed", "survived", or "broken" if something other than an assertion failed."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for folder in ("moe", "kernels", "tests"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        file = copy / defect.file
        text = file.read_text()
        assert text.count(defect.old) == 1, f"{defect.name}: {text.count(defect.old)} places"
        file.write_text(text.replace(defect.old, defect.new))
        out = copy / "results.json"
        command = [sys.executable, "-m", "tests.parallel", "--ranks", str(defect.ranks)]
        command += ["--only", defect.case, "--json", str(out)]
        subprocess.run(command, cwd=copy, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        if not out.exists():
            return "broken"
        results = json.loads(out.read_text())[str(defect.ranks)]
    assert results, f"{defect.name}: no case is called {defect.case}"
    failed = [result["failed"] for result in results.values() if result["failed"]]
    return "survived" if not failed else "killed" if any("AssertionError" in text for text in failed) else "broken"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.parallel_defects", description=str(__doc__).partition(". ")[0] + "."
    )
    parser.parse_args()
    wrong = 0
    for defect in DEFECTS:
        found = verdict(defect)
        wrong += found != "killed"
        print(f"{found}: {defect.name} ({defect.file})", flush=True)
    print(f"killed {len(DEFECTS) - wrong} of {len(DEFECTS)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
