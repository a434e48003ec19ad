"""Training states and Hugging Face folders of models on meshes, as cases of `tests.parallel`.

What needs another number of ranks than its case has, or dies, runs in a process of its own:
python -m tests.parallel.checkpoint_cases digests|killed|transformers FOLDER.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from huggingface_hub import constants
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe
from moe import balance
from moe.checkpoint.convert import convert
from moe.checkpoint.writing.atomic import saved_steps
from moe.errors import CheckpointError
from moe.model import Transformer
from moe.parallel import (
    StateWriter,
    clip_grad_norm,
    export,
    hf_io,
    load,
    load_latest,
    make_mesh,
    parallelize,
    states,
)
from moe.train.optimizer import build_optimizers
from tests.parallel import cases as common
from tests.parallel.cases import Case, Ranks

MESHES = {
    2: [(2, 2, 1), (1, 2, 1)],
    4: [(2, 4, 1), (2, 2, 2), (4, 4, 1), (1, 4, 1)],
    8: [(2, 8, 1), (4, 8, 1), (2, 4, 2), (8, 2, 4)],
}


def cases(size: int, *, long: bool) -> list[Case]:
    found = []
    if size == 4 or (long and size > 1):
        some = MESHES[size] if long else [mesh for mesh in MESHES[size] if mesh[2] == 1]
        found += [Case("state across meshes", partial(state_across_meshes, meshes=some))]
        some = MESHES[size] if long else MESHES[size][:2]
        found += [Case(f"folder {how}", partial(folder, how=how, meshes=some)) for how in FOLDERS]
    if size == 2:
        found += [Case("state damaged", damaged), Case("save failed", failed), Case("save killed", killed)]
    if size == 4:
        found += [Case("folder in transformers", in_transformers)]
    return found


class Run:
    """A model on a mesh that trains, each rank on its part of a batch that is the same for every mesh."""

    def __init__(self, mesh: tuple[int, int, int], *, optimizer: Any = "muon", seed: int = 1) -> None:
        ep, shard, replicate = mesh
        self.mesh = make_mesh(ep=ep, dp_shard=shard, dp_replicate=replicate)
        self.model = parallelize(Transformer(common._config(), seed=seed).double(), self.mesh)
        self.optimizers = build_optimizers(self.model, optimizer, 0.01, 0.1)
        balance.attach(self.model, self.optimizers[-1], bias_update_speed=0.01)
        self.model.train()

    def steps(self, first: int, last: int) -> None:
        each = common.BATCH // dist.get_world_size()
        share = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 40, (common.BATCH, common.LENGTH), generator=generator)[share]
            out = self.model(ids, labels=ids)
            assert out.loss is not None
            out.loss.backward()
            clip_grad_norm(self.model.parameters(), 0.5)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """All of them whole: model/..., optimizer/..."""
        return {name: common.whole(tensor) for name, tensor in states._tensors(self.model, self.optimizers).items()}

    def here(self) -> dict[str, str]:
        """Digests of what this rank holds."""
        tensors: dict[str, Any] = states._tensors(self.model, self.optimizers)
        return digests({n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()})


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Of each tensor, and of each expert's part of those that stack experts."""
    found = {}
    for name, tensor in tensors.items():
        parts = list(tensor) if ".experts." in name and tensor.ndim == 3 else [tensor]
        for expert, part in enumerate(parts):
            content = part.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            found[f"{name}[{expert}]" if len(parts) > 1 else name] = hashlib.sha256(content).hexdigest()
    return found


def elsewhere(what: str, folder: Path, ranks: Ranks) -> Any:
    """What a process of its own, which rank 0 starts, prints as JSON."""
    answer: list[Any] = [None]
    if ranks.rank == 0:
        command = [sys.executable, "-m", "tests.parallel.checkpoint_cases", what, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        answer = [json.loads(done.stdout) if done.returncode == 0 else done.stderr[-5000:]]
    dist.broadcast_object_list(answer, src=0)
    assert not isinstance(answer[0], str), answer[0]
    return answer[0]


# ---- training states ----


def state_across_meshes(ranks: Ranks, meshes: list[tuple[int, int, int]]) -> None:
    """Saved while training goes on; then loaded on this mesh, others, other numbers of ranks, and on none.

    Every expert and moment has the bits it had when `save` was called, and three more steps give those of the unbroken
    run: bit for bit on its mesh, up to the order of sums in float64 on others.
    """
    first, *others = meshes
    continued = first, others[-1]
    folder = ranks.folder / f"across-{ranks.size}"
    unbroken = Run(first)
    unbroken.steps(0, 3)
    saved = digests(unbroken.tensors())
    writer, go = StateWriter(folder, unbroken.mesh, keep=2), threading.Event()
    write = states._Writer.write_data

    def late(*args: Any) -> Any:
        assert go.wait(60)  # until everything has changed
        return write(*args)

    with mock.patch.object(states._Writer, "write_data", late):
        path = writer.save(unbroken.model, unbroken.optimizers, {"step": 3, "sampler": {"position": 7}})
        unbroken.steps(3, 6)
        assert not path.exists()
        go.set()
        writer.wait()
    after = unbroken.tensors()
    assert path.exists() and all(digests(after)[name] != digest for name, digest in saved.items() if "exp_avg" in name)

    for mesh in (first, *others):
        run = Run(mesh, seed=2)
        values = load_latest(folder, run.model, run.optimizers)
        assert values is not None and (values["step"], values["sampler"]) == (3, {"position": 7})
        found = run.tensors()
        assert digests(found) == saved, mesh
        if mesh not in continued:
            continue
        run.steps(3, 6)
        for name, tensor in run.tensors().items():
            if mesh == first:
                assert torch.equal(tensor, after[name]), name
            elif name.startswith("model/"):
                way = (after[name] - found[name]).abs().max().item()
                assert (tensor - after[name]).abs().max().item() <= 1e-6 * way, (name, mesh)
    for count, found in elsewhere("digests", folder, ranks).items():
        assert found == saved, f"{count} ranks"


def _load_elsewhere(folder: Path, rank: int, count: int, out: Path) -> None:
    torch.set_num_threads(1)
    if count > 1:
        rendezvous = f"file://{out}.rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count)
        run = Run((count, count, 1), seed=2)
        assert load_latest(folder, run.model, run.optimizers) is not None
        found = run.tensors()
    else:
        model = Transformer(common._config(), seed=2).double()
        optimizers = build_optimizers(model, "muon", 0.01, 0.1)
        assert len(optimizers) == 3  # torch's Muon among them, which a mesh has not
        with common.warnings_are_errors():
            assert load_latest(folder, model, optimizers) is not None
        found = states._tensors(model, optimizers)
    if rank == 0:
        out.write_text(json.dumps(digests(found)))


def damaged(ranks: Ranks) -> None:
    """One error on all ranks that says what is wrong, and nothing has changed."""
    good = ranks.folder / "damage" / "good"
    run = Run((2, 2, 1), optimizer="adamw")
    run.steps(0, 1)
    writer = StateWriter(good, run.mesh)
    writer.save(run.model, run.optimizers, {"step": 1})
    writer.wait()
    run.steps(1, 2)
    before = run.here()

    def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
        return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))

    def flip(content: bytes) -> bytes:
        at = content.index(b"data/0") + 600  # in the values of the first tensor
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    damages: dict[str, tuple[Callable[[Path], object], str]] = {
        "lost": (lambda path: (path / "__1_0.distcp").unlink(), "__1_0.distcp: incomplete"),
        "short": (rewrite("__0_0.distcp", lambda content: content[:-1]), "__0_0.distcp: incomplete"),
        "flipped": (rewrite("__1_0.distcp", flip), "__1_0.distcp: bytes changed"),
        "no metadata": (lambda path: (path / ".metadata").unlink(), ".metadata: incomplete"),
        "bad metadata": (rewrite(".metadata", lambda content: b"\xff" * len(content)), "not a training state"),
        "foreign metadata": (
            rewrite(".metadata", lambda content: b"cposix\nsystem\n(S'true'\ntR.".ljust(len(content))),
            "posix.system does not belong",
        ),
        "bad values": (rewrite("state.json", lambda content: content[:-5]), "not a training state"),
    }
    for name, (damage, expected) in damages.items():
        folder = good.with_name(name)
        if ranks.rank == 0:
            shutil.copytree(good, folder)
            damage(folder / "step-000001")
        dist.barrier()
        _refused(folder, run, expected)
    others: dict[str, tuple[dict[str, Any], str, str]] = {
        "shape": ({"hidden_size": 24}, "adamw", "embed_tokens.weight: shape or dtype"),
        "missing": ({"num_hidden_layers": 4}, "adamw", "missing; expected"),
        "unexpected": ({"num_hidden_layers": 2}, "adamw", "unexpected"),
        "optimizer": ({}, "muon", "the state of another optimizer than BatchedMuon"),
    }
    for change, optimizer, expected in others.values():
        with mock.patch.dict(common.SMALL, change):
            _refused(good, Run((2, 2, 1), optimizer=optimizer), expected)
    assert run.here() == before
    assert load_latest(good, run.model, run.optimizers) is not None
    assert run.here() != before


def _refused(folder: Path, run: Run, expected: str) -> None:
    before = run.here()
    try:
        load_latest(folder, run.model, run.optimizers)
    except CheckpointError as error:
        assert expected in str(error) and "\n" not in str(error), f"{folder.name}: {error}"
    else:
        raise AssertionError(f"{folder.name}: loaded")
    assert run.here() == before


def failed(ranks: Ranks) -> None:
    """A disk that is full for one rank is an error on all, at the next call; the state before it stays, and the next
    save goes well. Old states go, and what a killed save has left."""
    folder = ranks.folder / "failed"
    run = Run((2, 2, 1))
    writer = StateWriter(folder, run.mesh, keep=2)
    writer.save(run.model, run.optimizers, {"step": 1})
    writer.wait()
    write = states._Writer.write_data

    def full(self: Any, *args: Any) -> Any:
        if ranks.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args)

    for told in (writer.wait, lambda: writer.save(run.model, run.optimizers, {"step": 3})):
        with mock.patch.object(states._Writer, "write_data", full):
            writer.save(run.model, run.optimizers, {"step": 2})
            try:
                told()
            except CheckpointError as error:
                assert "step-000002" in str(error) and "rank 1: OSError: [Errno 28] No space" in str(error), error
            else:
                raise AssertionError("a failed save was lost")
        assert [path.name for path in saved_steps(folder)] == ["step-000001"]
    for step in (2, 2, 3, 1_000_000):
        writer.save(run.model, run.optimizers, {"step": step})
    writer.wait()
    assert [path.name for path in saved_steps(folder)] == ["step-000003", "step-1000000"]
    if ranks.rank == 0:
        shutil.copytree(folder / "step-000003", folder / "step-000009.partial")
    dist.barrier()
    values = load_latest(folder, run.model, run.optimizers)
    assert values is not None and values["step"] == 1_000_000
    assert not list(folder.glob("*.partial"))
    assert load_latest(ranks.folder / "nowhere", run.model, run.optimizers) is None


# The rank that is killed, and the function that it does not come back from, or does not begin.
KILLS = {
    "before writing": (1, "write_data", "before"),
    "half a file": (1, "write_data", "half"),
    "before the metadata": (0, "finish", "before"),
    "before the rename": (0, "rename", "before"),
    "after the rename": (0, "rename", "after"),
}


def killed(ranks: Ranks) -> None:
    """kill -9 of one rank in the middle of its second save: the first is loaded, or the second if it had its name."""
    folder = ranks.folder / "killed"
    told = elsewhere("killed", folder, ranks)
    for name, (rank, _, _) in KILLS.items():
        signalled, other = told[name]
        assert signalled == -signal.SIGKILL and other == 17, (name, rank, told[name])  # the other rank has an error
        model = Transformer(common._config(), seed=2)
        values = load_latest(folder / name, model, [])
        assert values is not None
        step = 2 if name == "after the rename" else 1
        assert values["step"] == step, name
        expected = Transformer(common._config(), seed=step)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True)), name


def _save_until_killed(folder: Path, rank: int, kill: tuple[int, str, str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=2)
    mesh = make_mesh(ep=2)
    writer = StateWriter(folder, mesh)
    for step in (1, 2):
        model = parallelize(Transformer(common._config(), seed=step), mesh)
        if step == 2 and rank == kill[0]:
            _plant(kill[1], kill[2])
        writer.save(model, [], {"step": step})
        try:
            writer.wait()
        except CheckpointError:
            os._exit(17)
    os._exit(0)


def _plant(function: str, moment: str) -> None:
    owner: Any = os if function == "rename" else states._Writer
    real = getattr(owner, function)

    def dying(*args: Any, **kwargs: Any) -> None:
        if function == "rename" and Path(args[1]).name != "step-000002":
            return real(*args, **kwargs)
        if moment == "after":
            real(*args, **kwargs)
        if moment == "half":
            (Path(args[0].path) / "__1_0.distcp").write_bytes(b"PK")
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, function, dying)


# ---- Hugging Face folders ----

FOLDERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"config": {"n_routed_experts": 6, "n_group": 2, "topk_group": 1}, "dtype": torch.bfloat16},
    "shards": {"max_shard_bytes": 20_000},
}


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made, apart from views of what the model holds."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        tensors: list[Any] = list(model.state_dict().values())
        self.held = {_memory(t.to_local() if isinstance(t, DTensor) else t) for t in tensors}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if type(out) is Tensor and _memory(out) not in self.held:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def folder(ranks: Ranks, how: str, meshes: list[tuple[int, int, int]]) -> None:
    """Exported, the bytes of `save`; loaded, the bits of `moe.load`, on every mesh; errors on all ranks."""
    settings = FOLDERS[how]
    config = common._config(**settings.get("config", {}))
    dtype = settings.get("dtype", torch.float32)
    shards = {name: value for name, value in settings.items() if name == "max_shard_bytes"}

    def built() -> Transformer:
        model = Transformer(config, seed=1).to(dtype)
        for i, (_, router) in enumerate(balance.routers(model)):
            router.e_score_correction_bias += torch.arange(config.n_routed_experts) / (7 + i)
        model.carried_files = {"tokenizer.json": b"{}"}
        return model

    whole = ranks.folder / f"whole {how}"
    alone = built()
    if ranks.rank == 0:
        moe.checkpoint.save(alone, whole, **shards)
    dist.barrier()
    biggest = max(tensor.nbytes for name, tensor in alone.state_dict().items() if ".experts." not in name)
    assert biggest < alone.get_parameter("layers.1.mlp.experts.gate_up_proj").nbytes / 2
    for mesh in meshes:
        ep, shard, replicate = mesh
        if config.n_routed_experts % ep:
            continue
        there = make_mesh(ep=ep, dp_shard=shard, dp_replicate=replicate)
        model = parallelize(built(), there)
        out = ranks.folder / f"exported {how} {mesh}"
        with Largest(model) as largest:
            export(model, out, **shards)
        # Nothing was put together but tensors of the files, one at a time (and messages of a few hundred bytes).
        assert largest.bytes <= biggest, (largest.bytes, biggest)
        if ranks.rank == 0:
            names = sorted(path.name for path in whole.iterdir())
            assert names == sorted(path.name for path in out.iterdir())
            for name in names:
                assert (out / name).read_bytes() == (whole / name).read_bytes(), (name, mesh)
        dist.barrier()
        loaded = load(out, there)
        expected = moe.load(whole)
        assert not loaded.training and loaded.carried_files == expected.carried_files
        for name, tensor in expected.state_dict().items():
            found = loaded.state_dict()[name]
            assert found.dtype == tensor.dtype and torch.equal(common.whole(found), tensor), (name, mesh)
    _errors(ranks, whole, built())
    if how == "rows":
        _other_layouts(ranks, whole)
        _on_the_hub(ranks, whole)


def _other_layouts(ranks: Ranks, whole: Path) -> None:
    """Quantised tensors, and all experts of a layer in one, where ranks hold some rows of each expert."""
    there = make_mesh(ep=2)
    for name, settings in {"fp8": {"dtype": "fp8", "block_size": (4, 4)}, "stacked": {"table": "stacked"}}.items():
        source, again, out = (ranks.folder / f"{what} {name}" for what in ("converted", "saved", "exported"))
        if ranks.rank == 0:
            convert(whole, source, overwrite=True, **settings)  # pyright: ignore[reportArgumentType]
            moe.load(source).save(again)
        dist.barrier()
        loaded = load(source, there)
        for key, tensor in moe.load(source).state_dict().items():
            assert torch.equal(common.whole(loaded.state_dict()[key]), tensor), (name, key)
        export(loaded, out)
        for file in again.iterdir():
            assert (out / file.name).read_bytes() == file.read_bytes(), (name, file.name)


def _on_the_hub(ranks: Ranks, whole: Path) -> None:
    """A name and a revision mean what they mean to `moe.load`; another revision is there, of another dtype."""
    there, repository = make_mesh(), ranks.folder / f"hub of {ranks.size}" / "models--org--model"
    if ranks.rank == 0:
        (repository / "refs").mkdir(parents=True)
        for revision, commit, dtype in (("main", "a" * 40, "bf16"), ("v1", "b" * 40, None)):
            (repository / "refs" / revision).write_text(commit)
            convert(whole, repository / "snapshots" / commit, dtype=dtype)
    dist.barrier()
    cached = mock.patch.multiple(constants, HF_HUB_CACHE=str(repository.parent), HF_HUB_OFFLINE=True)
    expected = moe.load(whole).state_dict()
    with cached:
        assert load("org/model", there).norm.weight.dtype == torch.bfloat16
        for name, revision in (("org/model@v1", None), ("org/model", "v1"), (str(repository), "v1")):
            for key, tensor in load(name, there, revision=revision).state_dict().items():
                assert torch.equal(common.whole(tensor), expected[key]), (name, key)
        _raises(lambda: load("org/model", there, revision="v2"), "org/model@v2: no such folder; the Hub is offline")
        _raises(lambda: load(whole, there, revision="v1"), "a folder, which has no revisions")


def _errors(ranks: Ranks, whole: Path, model: Transformer) -> None:
    """What one rank alone can see."""
    there = make_mesh()
    parallelize(model, there)
    _raises(lambda: export(model, whole / "config.json"), "not a folder")
    with mock.patch.object(hf_io, "check_repeats", side_effect=OSError("bad sector") if ranks.rank == 1 else None):
        _raises(lambda: load(whole, there), "OSError: bad sector")


def _raises(call: Callable[[], object], expected: str) -> None:
    try:
        call()
    except CheckpointError as error:
        assert expected in str(error), error
    else:
        raise AssertionError(f"no error: {expected}")


def in_transformers(ranks: Ranks) -> None:
    """Every expert in transformers' model of an exported folder has the bits it has here."""
    run = Run((2, 4, 1))
    run.model.float()
    out = ranks.folder / "for transformers"
    export(run.model, out)
    found = elsewhere("transformers", out, ranks)
    mine = digests({n: common.whole(t) for n, t in run.model.state_dict().items() if n.startswith("layers.1.mlp.exp")})
    assert found == mine


def _transformers(folder: Path) -> dict[str, str]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    return digests({n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.layers.1.mlp.exp")})


def main(what: str, folder: Path) -> None:
    if what == "digests":
        found = {}
        for count in (1, 2):
            out = folder.with_name(f"{folder.name}-digests-{count}")
            assert _fork([(_load_elsewhere, folder, rank, count, out) for rank in range(count)]) == [0] * count
            found[count] = json.loads(out.read_text())
    elif what == "killed":
        folder.mkdir()
        found = {}
        for name, kill in KILLS.items():
            codes = _fork([(_save_until_killed, folder / name, rank, kill) for rank in range(2)])
            found[name] = codes[kill[0]], codes[1 - kill[0]]
    else:
        found = _transformers(folder)
    print(json.dumps(found))


def _fork(calls: list[tuple[Any, ...]]) -> list[int | None]:
    """Calls, each in a process, and how they ended."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function, args=args) for function, *args in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
