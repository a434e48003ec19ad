"""Run the cases of `tests.parallel.cases` over gloo.

For each number of ranks, the processes start once and run all cases. After a case fails on any rank, the remaining
cases are reported as not run, because the ranks may be out of step.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.parallel.cases import SIZES, Case, Ranks, cases, warnings_are_errors


def worker(rank: int, size: int, folder: Path, shared: Path, selected: list[Case]) -> None:
    """Run cases as one rank; writes the results to `RANK.json` in `folder`."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    alone = [dist.new_group([each]) for each in range(size)][rank]
    results = {}
    for case in selected:
        begun = time.perf_counter()
        torch.manual_seed(0)
        try:
            with warnings_are_errors():
                case.run(Ranks(rank, size, alone, shared))
        except BaseException:
            results[case.name] = {"failed": traceback.format_exc(), "seconds": time.perf_counter() - begun}
            break
        results[case.name] = {"failed": None, "seconds": time.perf_counter() - begun}
        (folder / f"{rank}.json").write_text(json.dumps(results))
    (folder / f"{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # the process groups of a failed case cannot be destroyed in order


def run_size(
    size: int, shared: Path, *, long: bool = False, only: list[str] | None = None, limit: float = 1800
) -> dict[str, Any]:
    """Run cases on `size` processes; returns {"failed": text or None, "seconds"} by case name."""
    selected = [case for case in cases(size, long=long) if not only or any(word in case.name for word in only)]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ranks = [context.Process(target=worker, args=(rank, size, folder, shared, selected)) for rank in range(size)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + limit
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
        found = []
        for rank in range(size):
            file = folder / f"{rank}.json"
            found.append(json.loads(file.read_text()) if file.exists() else {})
    results = {}
    for case in selected:
        each = [(rank, result[case.name]) for rank, result in enumerate(found) if case.name in result]
        failed = "\n".join(f"rank {rank}: {result['failed']}" for rank, result in each if result["failed"])
        if not failed and len(each) < size:
            failed = f"not run on {size - len(each)} of {size} ranks: an earlier case failed, or the ranks hang"
        seconds = max((result["seconds"] for _, result in each), default=0.0)
        results[case.name] = {"failed": failed or None, "seconds": round(seconds, 2)}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel", description=__doc__)
    parser.add_argument(
        "--ranks", type=int, nargs="+", metavar="N", default=SIZES, help="Numbers of processes (default: 1 2 4 8)"
    )
    parser.add_argument("--long", action="store_true", help="Run all cases, not only those of the default test suite")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="Run only cases whose names contain one of these words"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="Write the results to this file instead of printing them"
    )
    args = parser.parse_args()
    results, wrong = {}, 0
    with tempfile.TemporaryDirectory() as shared:
        for size in args.ranks:
            of_size = results[str(size)] = run_size(size, Path(shared), long=args.long, only=args.only)
            for name, result in of_size.items() if args.json is None else ():
                print(f"{size} ranks  {result['seconds']:7.2f} s  {name}: {'FAILED' if result['failed'] else 'ok'}")
                if result["failed"]:
                    print(result["failed"])
            wrong += sum(result["failed"] is not None for result in of_size.values())
            sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps(results))
        return 0
    print(f"{sum(map(len, results.values()))} cases, {wrong} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
