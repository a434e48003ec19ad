"""Runs the cases of `tests.parallel.cases` over gloo: python -m tests.parallel [--ranks N ...] [--long] [--json FILE].

The processes of one size start once and run all its cases. A case that fails on any rank ends that size, because its
ranks no longer agree on what comes next; what was left is reported as not run.
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
    os._exit(0)  # the groups of a failed case cannot be taken down in order


def run_size(
    size: int, shared: Path, *, long: bool = False, only: list[str] | None = None, limit: float = 1800
) -> dict[str, Any]:
    """case name -> {"failed": None or text, "seconds"} over `size` processes."""
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
            failed = f"not run on {size - len(each)} of {size} ranks: an earlier case failed, or they hung"
        seconds = max((result["seconds"] for _, result in each), default=0.0)
        results[case.name] = {"failed": failed or None, "seconds": round(seconds, 2)}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=SIZES, help="numbers of processes")
    parser.add_argument("--long", action="store_true", help="the whole matrix, not what the default suite runs")
    parser.add_argument("--only", nargs="+", help="cases whose names have one of these in them")
    parser.add_argument("--json", type=Path, help="write the results here, too, and print no table")
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
