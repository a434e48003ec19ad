"""Cases that compare several processes with one; each is called on every rank, and asserts.

The single process runs the same code on the whole batch, in float64, so that routing cannot differ. Results are
compared element by element.
"""

import contextlib
import copy
import dataclasses
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import moe
from moe import balance
from moe.attention import MLA
from moe.layer import MoELayer
from moe.model import Transformer
from moe.ops import Routing
from moe.parallel import apply, divide_experts, make_mesh, parallelize
from moe.parallel.apply import ParallelConfig, clip_grad_norm
from moe.parallel.dispatch import AllToAllDispatcher, Traffic
from moe.parallel.tensor_parts import part_like, region
from moe.parallel.transport import AllToAll
from moe.train.optimizer import build_optimizers, orthogonalize
from tests.support.bound import UNIT, excess

SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Ranks:
    """This rank. `alone` is a process group that contains only it; all numbers of ranks share `folder`."""

    rank: int
    size: int
    alone: Any
    folder: Path

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Result of `make`, which is called once, on rank 0."""
        file = self.folder / f"{name}.pt"
        if self.rank == 0 and not file.exists():
            torch.save(make(), file)
        dist.barrier()
        return torch.load(file, weights_only=False)


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Ranks], None]


@contextlib.contextmanager
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # From torch.compile itself, when it inspects unsharded parameters.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf Tensor")
        yield


def cases(size: int, *, long: bool) -> list[Case]:
    """The cases for `size` ranks, in the order in which they run."""
    found = [Case(f"dispatch {name}", partial(dispatch, how=name)) for name in ROUTINGS]
    found += [Case(f"payload {name}", partial(payload, how=name)) for name in ("bf16", "fp8", "autocast")]
    found.append(Case("a layer in another model", foreign))
    found.append(Case("groups of the global batch", groups))
    if size == 2 or (size == 4 and long):
        found += [Case(f"unequal micro-batches, {how}", partial(unequal, how=how)) for how in ("mesh", "average")]
    if size <= 2:
        found.append(Case("parts as units of FSDP", units))
    if size in (2, 8):
        found.append(Case("mixed precision", mixed_precision))
    if size == 2 and long:
        found.append(Case("compiled", compiled))
    if size == 2:
        found.append(Case("passes without gradients", without_gradients))
        found.append(Case("skipped steps", skipped_steps))
        found.append(Case("out of order", out_of_order))
    if size == 8:
        found.append(Case("refusals", refusals))
    for mesh, hows in meshes(size, long=long).items():
        name = f"ep {mesh[0]} shard {mesh[1]} replicate {mesh[2]}"
        found.append(Case(f"initial values, {name}", partial(initial_values, mesh=mesh)))
        if long or mesh in ((2, 2, 1), (2, 4, 1)):
            found.append(Case(f"muon, {name}", partial(muon, mesh=mesh)))
        found += [Case(f"training {how}, {name}", partial(training, mesh=mesh, how=how)) for how in hows]
    from tests.parallel import checkpoint_cases  # which imports this module

    return found + checkpoint_cases.cases(size, long=long)


# (ep, dp_shard, dp_replicate): models that train on this mesh in the default test suite.
MESHES: dict[int, dict[tuple[int, int, int], list[str]]] = {
    1: {(1, 1, 1): ["plain", "accumulated"]},
    2: {
        (1, 2, 1): ["plain"],
        (2, 2, 1): ["plain", "recomputed", "accumulated", "padded", "global loss", "documents"],
        (2, 1, 2): ["plain"],
    },
    4: {(2, 4, 1): ["plain", "global loss"], (4, 4, 1): ["recomputed"], (2, 2, 2): ["padded"]},
    8: {(4, 8, 1): ["plain"], (2, 4, 2): []},
}


def meshes(size: int, *, long: bool) -> dict[tuple[int, int, int], list[str]]:
    """Models for each mesh; with `long`, two for every mesh of up to 4 ranks, and one for some meshes of 8."""
    if not long:
        return MESHES[size]
    divisors = [d for d in (1, 2, 4) if size % d == 0]
    pairs = (
        list(itertools.product(divisors, divisors)) if size < 8 else [(1, 8), (2, 8), (8, 8), (4, 4), (8, 2), (2, 1)]
    )
    each, hows = (2 if size < 8 else 1), itertools.cycle(MODELS)
    return {(ep, shard, size // shard): [next(hows) for _ in range(each)] for ep, shard in pairs}


def refused(call: Callable[[], object], *words: str, kind: type[Exception] = moe.ParallelError) -> None:
    """Check that a call raises an error of `kind`, in one line that contains `words`."""
    try:
        call()
    except kind as error:
        text = str(error)
        assert "\n" not in text and all(word in text for word in words), text
    else:
        raise AssertionError(f"not refused: {words}")


def close(result: Tensor, expected: Tensor, what: str) -> None:
    """Compare element by element, up to the order of summation in float64; rows of zeros must be equal."""
    result, expected = result.detach(), expected.detach()
    assert result.shape == expected.shape, f"{what}: {tuple(result.shape)} instead of {tuple(expected.shape)}"
    scale = expected.abs().amax(-1, keepdim=True) if expected.ndim > 1 and expected.numel() else expected.abs()
    limit = 2.0**12 * UNIT[torch.float64] * (scale + 2.0**-10 * _largest(expected)) * torch.ones_like(expected)
    factor = excess(result.double(), expected.double(), limit)
    assert factor <= 1, f"{what}: {factor:.3g} times the bound"


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


# ---- one layer ----

EXPERTS, WIDTH, HIDDEN, TOP_K = 16, 12, 10, 3


def _balanced(rank: int, size: int) -> tuple[int, Tensor]:
    return 9, torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(9)])


def _uneven(rank: int, size: int) -> tuple[int, Tensor]:
    tokens = 1 + 5 * rank
    return tokens, torch.stack([torch.randperm(EXPERTS - 3)[:TOP_K] for _ in range(tokens)])


def _zero_send(rank: int, size: int) -> tuple[int, Tensor]:
    tokens = 0 if rank == size - 1 else 6
    return tokens, torch.randint(0, EXPERTS, (tokens, TOP_K))


def _absent(rank: int, size: int) -> tuple[int, Tensor]:
    """All slots of one rank are -1, and some slots of the others."""
    ids = torch.randint(0, EXPERTS, (6, TOP_K))
    return 6, torch.where(torch.rand(6, TOP_K) < (1.1 if rank == 0 else 0.4), -1, ids)


def _zero_receive(rank: int, size: int) -> tuple[int, Tensor]:
    """No token needs the experts of the last rank."""
    return 7, torch.randint(0, max(EXPERTS - EXPERTS // size, 1), (7, TOP_K))


def _one_expert(rank: int, size: int) -> tuple[int, Tensor]:
    return 5, torch.full((5, TOP_K), 3)


def _empty(rank: int, size: int) -> tuple[int, Tensor]:
    return 0, torch.empty(0, TOP_K, dtype=torch.int64)


def _every_expert(rank: int, size: int) -> tuple[int, Tensor]:
    return 3, torch.arange(EXPERTS).expand(3, EXPERTS).flip(1).contiguous()


ROUTINGS: dict[str, Callable[[int, int], tuple[int, Tensor]]] = {
    "balanced": _balanced,
    "uneven": _uneven,
    "zero-send": _zero_send,
    "absent slots": _absent,
    "zero-receive": _zero_receive,
    "one expert": _one_expert,
    "all empty": _empty,
    "every expert": _every_expert,
}


def _layer(**more: Any) -> MoELayer:
    layer = MoELayer(WIDTH, HIDDEN, EXPERTS, TOP_K, n_shared_experts=1, expert_bias=True, seed=3, **more).double()
    with torch.no_grad():  # nonzero biases and larger weights, so that a missing term shows
        for i, parameter in enumerate(layer.parameters()):
            generator = torch.Generator().manual_seed(100 + i)
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return layer


def _parts(how: str, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x [T, D], weights [T, K] and expert ids [T, K] of each rank; equal on all ranks."""
    parts = []
    for rank in range(size):
        torch.manual_seed(1000 + rank)
        tokens, ids = ROUTINGS[how](rank, size)
        x = torch.randn(tokens, WIDTH, dtype=torch.float64)
        parts.append((x, torch.rand(ids.shape, dtype=torch.float64), ids))
    return parts


def _through(layer: MoELayer, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = layer(x, routing=Routing(weights, ids, torch.zeros(len(x), EXPERTS, dtype=torch.float64)))
    (y * torch.arange(1.0, WIDTH + 1, dtype=torch.float64)).square().sum().backward()
    assert x.grad is not None and weights.grad is not None
    return y.detach(), x.grad, weights.grad


def dispatch(ranks: Ranks, how: str) -> None:
    """Compare outputs and gradients of tokens, weights and experts with those of the whole layer on all tokens."""
    parts = _parts(how, ranks.size)
    whole = _layer()
    expected = _through(whole, *(torch.cat(column) for column in zip(*parts, strict=True)))
    begin = sum(len(x) for x, _, _ in parts[: ranks.rank])
    mine = slice(begin, begin + len(parts[ranks.rank][0]))

    mesh = make_mesh(ep=ranks.size)
    layer = divide_experts(_layer(), mesh.experts["ep"], name="layer")
    dispatcher = layer.dispatcher
    assert isinstance(dispatcher, AllToAllDispatcher) and isinstance(dispatcher.transport, AllToAll)
    log = dispatcher.transport.log
    # Twice: nothing may be left over from the first call, and gradients accumulate.
    for times in (1, 2):
        before = log.count
        results = _through(layer, *parts[ranks.rank])
        assert log.count - before == 7  # for any routing
        for result, whole_result, what in zip(results, expected, ("y", "gradient of x", "of weights"), strict=True):
            close(result, whole_result[mine], what)
        for name, parameter in layer.experts.named_parameters():
            gradient = whole.experts.get_parameter(name).grad
            assert gradient is not None and isinstance(parameter.grad, DTensor)
            share = region(parameter)[0] if isinstance(parameter, DTensor) else slice(None)
            mean = times / ranks.size * gradient[share]
            close(parameter.grad.to_local(), mean, f"gradient of {name}")
    x, weights, ids = parts[ranks.rank]
    sent = dispatcher.dispatch(x, Routing(weights, ids, weights))
    _check_traffic(sent.traffic, parts, ranks)
    sent.wait()
    transport = dispatcher.transport
    leaving, received = [1] * ranks.size, [1] * ranks.size
    moving = transport.start("rows", x.new_ones(ranks.size, 2), leaving, received)
    refused(
        lambda: transport.wait("rows", moving.clone()),
        "rows: expected the tensor that `start` returned; found another one or a copy",
    )
    transport.wait("rows", moving)
    assert torch.equal(moving, torch.ones_like(moving))


def _check_traffic(traffic: Traffic, parts: list[tuple[Tensor, Tensor, Tensor]], ranks: Ranks) -> None:
    """Count, with sets, the distinct ranks to which each token is sent."""
    each = EXPERTS // ranks.size
    sent = [
        [sum(to in {int(i) // each for i in row if i >= 0} for row in ids) for to in range(ranks.size)]
        for _, _, ids in parts
    ]
    assert list(traffic.sent) == sent[ranks.rank]
    assert list(traffic.received) == [row[ranks.rank] for row in sent]
    k = parts[0][2].shape[1]
    assert (traffic.bytes_out, traffic.bytes_back) == (WIDTH * 8 + k * (8 + 4), WIDTH * 8)


def payload(ranks: Ranks, how: str) -> None:
    """Rows in bf16 are received unchanged; rows in fp8 as their quantised values, with exact gradients.

    Under autocast, rows are sent in the dtype that the experts would cast them to.
    """
    mesh = make_mesh(ep=ranks.size)
    torch.manual_seed(ranks.rank)
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    tokens = 0 if ranks.rank == 1 else 11
    x = (torch.randn(tokens, 200) * 10).to(dtype).requires_grad_()
    ids = torch.randint(0, EXPERTS, (tokens, TOP_K))
    weights = torch.ones(tokens, TOP_K)
    kind: Any = "fp8" if how == "fp8" else "same"
    dispatcher = AllToAllDispatcher(AllToAll(mesh.experts["ep"].get_group(), "layer"), EXPERTS, payload=kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        sent = dispatcher.dispatch(x, Routing(weights, ids, weights))
        rows, _, here = sent.wait()
        y = dispatcher.combine(rows * (here >= 0).any(-1, keepdim=True), sent)
    dtype = torch.float32 if how == "fp8" else torch.bfloat16
    assert y.dtype == dtype
    reached = [len({int(i) // (EXPERTS // ranks.size) for i in row}) for row in ids]
    times = torch.tensor(reached, dtype=torch.int64)[:, None]
    arrived = x.detach().to(dtype)
    if how == "fp8":
        blocks = torch.nn.functional.pad(arrived, (0, 56)).view(tokens, 2, 128)
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448
        arrived = ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).view(tokens, 256)[:, :200]
    assert sent.traffic.bytes_out == (200 + 2 * 4 if how == "fp8" else 200 * 2) + TOP_K * 8
    total = torch.zeros_like(arrived, dtype=torch.float32)
    for i in range(max(reached, default=0)):
        total = total + torch.where(i < times, arrived.float(), 0)
    assert torch.equal(y, total.to(dtype))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, times.to(x.dtype).expand_as(x))


# ---- a model ----

BATCH, LENGTH = 8, 12
SMALL: dict[str, Any] = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
    intermediate_size=20,
    moe_intermediate_size=8,
    n_routed_experts=16,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    aux_loss_alpha=0.01,
    max_position_embeddings=64,
    initializer_range=0.2,
)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"activation_checkpointing": True},
    "accumulated": {"accumulation": 2},
    "padded": {"padding": True},
    "global loss": {"padding": True, "config": {"seq_aux": False, "router_z_loss_coef": 0.01}},
    "documents": {"documents": True},
}
STEPS = 20


def _config(**more: Any) -> moe.ModelConfig:
    return dataclasses.replace(moe.preset("tiny"), **{**SMALL, **more})


def _batches(how: dict[str, Any]) -> list[list[dict[str, Tensor]]]:
    """Arguments of the model for the whole batch: [step][micro-batch]."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for _ in range(STEPS):
        micro = []
        for _ in range(how.get("accumulation", 1)):
            ids = torch.randint(0, 40, (BATCH, LENGTH), generator=generator)
            batch = {"input_ids": ids, "labels": ids}
            if how.get("padding"):
                lengths = torch.randint(0, LENGTH + 1, (BATCH, 1), generator=generator)
                lengths[0] = LENGTH
                batch["attention_mask"] = (torch.arange(LENGTH) < lengths).long()
            if how.get("documents"):
                batch["document_ids"] = (torch.rand(BATCH, LENGTH, generator=generator) < 0.3).long().cumsum(1)
            micro.append(batch)
        steps.append(micro)
    return steps


@dataclass
class Trace:
    """Record of a run: gradients of the first step, values of each step, and the final parameters."""

    gradients: dict[str, Tensor]
    norms: list[float]
    losses: list[dict[str, float]]
    loads: list[Tensor]
    parameters: dict[str, Tensor]
    biases: dict[str, Tensor]
    collectives: list[int]
    expert_ids: list[Tensor]


def whole(tensor: Tensor) -> Tensor:
    """Gather a whole tensor on every rank."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (region(tensor), tensor.to_local().detach()))
    out = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)
    for where, part in parts:
        out[where] = part
    assert not out.isnan().any(), "no rank holds a part of the tensor"
    return out


def _train(
    model: Transformer,
    how: dict[str, Any],
    share: slice,
    group: Any,
    clip: Callable[[Any, float], Tensor],
    log: Any = None,
) -> Trace:
    optimizers = build_optimizers(model, how.get("optimizer", "adamw"), 0.01, 0.1)
    balance.attach(model, optimizers[-1], bias_update_speed=0.01, group=group)
    model.train()
    trace = Trace({}, [], [], [], {}, {}, [], [])
    for _, router in balance.routers(model):
        _note_ids(router, trace.expert_ids)
    for step, micro in enumerate(_batches(how)):
        losses: dict[str, float] = {}
        load: Any = 0
        for batch in micro:
            out = model(**{name: tensor[share] for name, tensor in batch.items()})
            assert out.loss is not None and out.load is not None
            (out.loss / len(micro)).backward()
            for name, value in (*out.losses.items(), ("sum", out.loss.detach())):
                losses[name] = losses.get(name, 0.0) + value.item() / len(micro)
            load = load + out.load
        if step == 0:
            trace.gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        trace.norms.append(clip(model.parameters(), 0.5).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        trace.losses.append(losses)
        trace.loads.append(load)
        if log is not None:
            trace.collectives.append(log.count)
    trace.parameters = {name: whole(parameter) for name, parameter in model.named_parameters()}
    trace.biases = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return trace


def _note_ids(router: Any, noted: list[Tensor]) -> None:
    """Record the ids [T, K] of every call of a router."""
    route = router.route

    def noting(logits: Tensor) -> Routing:
        routing = route(logits)
        noted.append(routing.expert_ids)
        return routing

    router.route = noting


def built(how: dict[str, Any] | None = None) -> Transformer:
    return Transformer(_config(**(how or {}).get("config", {})), seed=1).double()


def token_batch(step: int, rank: int) -> dict[str, Tensor]:
    """Two sequences for a rank, with labels."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    ids = torch.randint(0, 40, (2, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids}


def training(ranks: Ranks, mesh: tuple[int, int, int], how: str) -> None:
    """Compare twenty steps on a mesh with those of one process on the whole batch."""
    settings = MODELS[how]

    def in_one_process() -> Trace:
        alone = built(settings)
        for _, router in balance.routers(alone):
            router.global_batch.restrict(ranks.alone)
        return _train(alone, settings, slice(None), ranks.alone, nn.utils.clip_grad_norm_)

    expected: Trace = ranks.once(f"training {how}", in_one_process)
    ep, shard, replicate = mesh
    config = ParallelConfig(activation_checkpointing=settings.get("activation_checkpointing", False))
    there = make_mesh(ep=ep, dp_shard=shard, dp_replicate=replicate)
    model = parallelize(built(settings), there, config)
    each = BATCH // ranks.size
    share = slice(ranks.rank * each, (ranks.rank + 1) * each)
    # The norm is computed differently with a log and without one.
    clip = partial(clip_grad_norm, log=there.log if how == "recomputed" else None)
    found = _train(model, settings, share, None, clip, there.log)
    assert (how == "global loss") == any(entry.operation == "balance loss" for entry in there.log.entries)

    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        close(found.gradients[name], gradient, f"gradient of {name}")
    for name, bias in expected.biases.items():
        assert torch.equal(found.biases[name], bias), f"{name} differs"
        everywhere = [torch.empty_like(bias) for _ in range(ranks.size)]
        dist.all_gather(everywhere, found.biases[name])
        assert all(torch.equal(other, bias) for other in everywhere)
    assert any(bias.abs().max() > 0.05 for bias in expected.biases.values())  # they moved
    for step, (norm, exact) in enumerate(zip(found.norms, expected.norms, strict=True)):
        assert abs(norm - exact) <= 1e-9 * exact, f"step {step}: norm {norm} instead of {exact}"
        load = found.loads[step].clone()
        dist.all_reduce(load)
        assert torch.equal(load, expected.loads[step])
        for name, value in expected.losses[step].items():
            mean = torch.tensor(found.losses[step][name], dtype=torch.float64)
            dist.all_reduce(mean)
            assert abs(mean.item() / ranks.size - value) <= 1e-9 * abs(value), f"step {step}: loss {name}"
    for name, parameter in expected.parameters.items():
        # Relative to the distance travelled, because the optimizer divides by the gradients' scale.
        way = (parameter - built(settings).get_parameter(name)).abs().max().item()
        error = (found.parameters[name] - parameter).abs().max().item()
        assert error <= 1e-6 * way, f"{name} after {STEPS} steps: error {error}, distance {way}"
    chosen = found.expert_ids
    if settings.get("activation_checkpointing"):  # each forward pass, followed by its layers in reverse
        layers = len(expected.expert_ids) // STEPS
        steps = [chosen[i : i + 2 * layers] for i in range(0, len(chosen), 2 * layers)]
        assert all(torch.equal(a, b) for step in steps for a, b in zip(step, reversed(step), strict=True))
        chosen = [ids for step in steps for ids in step[:layers]]
    for mine, ids in zip(chosen, expected.expert_ids, strict=True):
        part = len(ids) // ranks.size
        assert torch.equal(mine, ids[ranks.rank * part : (ranks.rank + 1) * part]), "expert ids differ"
    counts: list[Any] = [None] * ranks.size
    dist.all_gather_object(counts, found.collectives)
    assert all(other == counts[0] for other in counts), "ranks performed different collectives"


def muon(ranks: Ranks, mesh: tuple[int, int, int]) -> None:
    """Compare three steps of Muon, with given gradients, with those of one process.

    The bits of a bf16 product depend on the number of matrices (oneDNN handles large ones), and the iterations amplify
    a difference. The assembly of whole matrices is therefore checked bit for bit with a function that has no sums. With
    the iterations themselves, each update is checked up to their rounding: 15 products of 2^-8 in norm, each at most
    doubled by those that follow.
    """
    for function, bound in ((_times_peak, 0.0), (orthogonalize, 15 * 2 * 2**-8)):
        with mock.patch("moe.train.optimizer.orthogonalize", function):
            alone = Transformer(_config(), seed=1)
            before = {name: parameter.detach().clone() for name, parameter in alone.named_parameters()}
            ep, shard, replicate = mesh
            there = make_mesh(ep=ep, dp_shard=shard, dp_replicate=replicate)
            model = parallelize(Transformer(_config(), seed=1), there)
            pairs = [(parameter, model.get_parameter(name)) for name, parameter in alone.named_parameters()]
            steppers = [o for m in (alone, model) for o in build_optimizers(m, "muon", 0.02, 0.1)]
            for step in range(3):
                torch.manual_seed(step)
                for parameter, mine in pairs:
                    parameter.grad = torch.randn_like(parameter)
                    mine.grad = part_like(parameter.grad, mine)
                for stepper in steppers:
                    stepper.step()
        for (name, start), (parameter, mine) in zip(before.items(), pairs, strict=True):
            axes = tuple(range(-min(parameter.ndim, 2), 0))
            way = torch.linalg.vector_norm(parameter - start, dim=axes)
            error = torch.linalg.vector_norm(whole(mine) - parameter, dim=axes)
            assert (way > 0).all() and (error <= bound * way).all(), f"{name}: relative error {(error / way).max()}"


def _times_peak(matrices: Tensor) -> Tensor:
    return matrices * matrices.abs().amax((-2, -1), keepdim=True)


def initial_values(ranks: Ranks, mesh: tuple[int, int, int]) -> None:
    """`materialize` gives the values of one process, bit for bit, and experts that differ from each other."""
    expected = Transformer(_config(), seed=7)
    with torch.device("meta"):
        model = Transformer(_config(), seed=0)
    ep, shard, replicate = mesh
    parallelize(model, make_mesh(ep=ep, dp_shard=shard, dp_replicate=replicate))
    apply.materialize(model, seed=7)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(whole(model.state_dict()[name]), tensor), name
    experts = whole(model.state_dict()["layers.1.mlp.experts.down_proj"]).flatten(1)
    assert (torch.cdist(experts, experts) + torch.eye(len(experts)) > 0.1).all()


def mixed_precision(ranks: Ranks) -> None:
    """With bf16 parameters, routers, logits, correction biases and routing weights stay float32."""
    config = _config(aux_loss_alpha=0.0, num_nextn_predict_layers=0)
    model = Transformer(config, seed=1)
    mesh = make_mesh(ep=ranks.size)
    parallelize(model, mesh, ParallelConfig(param_dtype=torch.bfloat16))
    balance.attach(model, torch.optim.AdamW(model.parameters()), bias_update_speed=0.01)
    seen: dict[str, set[torch.dtype]] = {"logits": set(), "weights": set(), "rows": set(), "rotations": set()}

    def rotations(_: Any, args: tuple[Any, ...]) -> None:
        seen["rotations"].update(table.dtype.to_real() for table in args[1].tensors)  # one is complex

    def spy(layer: MoELayer) -> None:
        logits, experts = layer.gate.logits, layer.experts

        gate = whole(layer.gate.weight)

        def checked(x: Tensor) -> Tensor:
            out = logits(x)
            seen["logits"].add(out.dtype)
            seen["rows"].add(x.dtype)
            assert torch.equal(out, x.float() @ gate.T)  # the weights are float32 values that bf16 cannot represent
            return out

        layer.gate.logits = checked  # pyright: ignore[reportAttributeAccessIssue]
        experts.register_forward_pre_hook(lambda _, args: seen["weights"].add(args[1].dtype) and None)

    for layer in model.modules():
        if isinstance(layer, MoELayer):
            spy(layer)
        if isinstance(layer, MLA):
            layer.register_forward_pre_hook(rotations)
    ids = torch.randint(0, 40, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    out = model(ids, labels=ids)
    assert out.loss is not None
    out.loss.backward()
    assert seen == {name: {torch.bfloat16 if name == "rows" else torch.float32} for name in seen}
    for _, router in balance.routers(model):
        assert router.e_score_correction_bias.dtype == torch.float32
        assert router.weight.dtype == torch.float32 and router.weight.grad is not None
        assert router.weight.grad.dtype == torch.float32

    # As accurate as the model in bf16 in one process: at most twice its median error against float64.
    exact = Transformer(config, seed=1).double().eval()
    eager = Transformer(config, seed=1).to(torch.bfloat16).eval()
    model.eval()
    with torch.no_grad():
        logits = [m(ids).logits.double() for m in (model, eager, exact)]
    found, plain = ((part - logits[2]).norm(dim=-1).flatten().median() for part in logits[:2])
    assert 0 < found <= 2 * plain, (found, plain)


def compiled(ranks: Ranks) -> None:
    """Compiled blocks with recomputation give the gradients of the eager model."""
    config = _config()
    ids = torch.randint(0, 40, (2, LENGTH), generator=torch.Generator().manual_seed(ranks.rank))
    gradients = []
    for kind in (False, True):
        model = parallelize(
            Transformer(config, seed=1).double(),
            make_mesh(ep=ranks.size),
            ParallelConfig(compile=kind, compile_backend="aot_eager", activation_checkpointing=True),
        )
        for _ in range(2):
            out = model(ids, labels=ids)
            assert out.loss is not None
            out.loss.backward()
        gradients.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, name)


def foreign(ranks: Ranks) -> None:
    """One layer in a model that is not a `Transformer`, where ranks average the other gradients themselves."""

    def build() -> nn.Sequential:
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(6, WIDTH), _layer(), nn.Linear(WIDTH, 2)).double()

    torch.manual_seed(7)
    x = torch.randn(ranks.size, 5, 6, dtype=torch.float64)
    alone = build()
    alone(x).square().mean().backward()

    model = build()
    layer = model[1]
    assert isinstance(layer, MoELayer)
    divide_experts(layer, make_mesh(ep=ranks.size).experts["ep"])
    model(x[ranks.rank : ranks.rank + 1]).square().mean().backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        if not isinstance(gradient, DTensor):
            dist.all_reduce(gradient)
            gradient = gradient / ranks.size
        expected = alone.get_parameter(name).grad
        assert expected is not None
        close(whole(gradient), expected, name)


def units(ranks: Ranks) -> None:
    """Submodules that a user shards separately, with FSDP's default of casting all floating-point arguments."""
    half, exact = MixedPrecisionPolicy(param_dtype=torch.bfloat16), MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (ranks.size,))
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(ranks.rank))

    def run(parts: Sequence[str], policy: MixedPrecisionPolicy) -> list[Tensor]:
        layer = _layer().float()
        for part in parts:
            fully_shard(layer.get_submodule(part), mesh=mesh, mp_policy=policy)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        given = x.clone().requires_grad_()
        y = layer(given)
        before = y.detach().clone()
        y.add_(1)
        y.float().square().sum().backward()
        assert given.grad is not None
        # A separate unit of shared experts changes the order of summation in the gradient of x.
        grad = [] if "shared_experts" in parts else [given.grad]
        return [before, *(whole(p.grad) for p in layer.parameters() if p.grad is not None), *grad]

    for policy in (half, exact):
        expected = run([], policy)
        assert expected[0].dtype == (policy.param_dtype or torch.float32)
        for parts in (["experts"], ["gate"], ["shared_experts"], ["experts", "gate", "shared_experts"]):
            for found, alone in zip(run(parts, policy), expected, strict=False):
                assert torch.equal(found, alone), (parts, policy)

    ids = torch.randint(0, 40, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    logits = []
    for casts in (False, True):
        model = Transformer(_config(), seed=1)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=casts)
        for block in (*model.layers, *model.mtp):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=half)
        out = model(ids, labels=ids)
        assert out.loss is not None
        out.loss.backward()
        logits.append(out.logits)
    assert torch.equal(*logits)  # only activations are cast, and they are already bf16


def groups(ranks: Ranks) -> None:
    """The balance loss sums over the group given to `attach`; a copy of the layer has its own loss scale."""

    def one_layer(rank: int) -> tuple[MoELayer, Tensor]:
        settings: dict[str, Any] = dict(topk_method="greedy", scoring_func="softmax", aux_loss_alpha=1.0, seq_aux=False)
        layer = MoELayer(16, 8, 8, 2, seed=3, initializer_range=0.5, **settings).double()
        return layer, torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)

    def loss(layer: MoELayer, x: Tensor) -> Tensor:
        return layer(x, return_stats=True)[1].balance_loss.detach()

    def exact(layer: MoELayer, mine: Tensor, everybody: list[Tensor]) -> Tensor:
        """E / (K T) sum_i count_i P_i, with counts of all ranks and P of this rank."""
        loads = [layer(x, return_stats=True)[1].load for x in everybody]
        share = layer.gate(mine.flatten(0, 1)).scores.mean(0)
        tokens = sum(x.shape[0] * x.shape[1] for x in everybody)
        return (torch.stack(loads).sum(0) * share).sum().detach() * 8 / (2 * tokens)

    layer, x = one_layer(ranks.rank)
    everybody = [one_layer(rank)[1] for rank in range(ranks.size)]
    counted = exact(layer.eval(), x, everybody)
    close(loss(layer.train(), x), counted, "loss of all ranks")
    handle = balance.attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1), group=ranks.alone)
    alone = exact(layer.eval(), x, [x])
    close(loss(layer.train(), x), alone, "loss of this rank")
    assert ranks.size == 1 or (counted - alone).abs() > 1e-4
    for when in ("attached", "removed"):
        copied = copy.deepcopy(layer)  # as averages of weights do
        balance.set_loss_scale(copied, 0.5)
        assert layer.gate.global_batch.loss_scale == 1.0, when
        close(loss(copied, x), alone, f"loss of a copy, {when}")
        assert pickle.loads(pickle.dumps(copied)).gate.counter is None
        handle.remove()


def unequal(ranks: Ranks, how: str) -> None:
    """Compare a step of unequal micro-batches on each rank with all rows in one batch.

    The second micro-batch is all padding on the last rank, and the third on every rank. Run on a mesh, and with
    gradients averaged over ranks, as DDP does.
    """
    config: dict[str, Any] = {"num_nextn_predict_layers": 2, "router_z_loss_coef": 0.01}
    generator = torch.Generator().manual_seed(5)
    micro = []
    for rows in ([2, 1, 3, 2, 1, 4, 2, 2], [1, 3, 2, 2, 4, 1, 1, 2], [1] * 8):
        parts = []
        for rank in range(ranks.size):
            shape = rows[rank], LENGTH
            ids = torch.randint(0, 40, shape, generator=generator)
            lengths = torch.randint(0, LENGTH + 1, (shape[0], 1), generator=generator)
            all_padding = len(micro) == 2 or (len(micro) == 1 and rank == ranks.size - 1)
            real = (torch.arange(LENGTH) < lengths) & torch.tensor(not all_padding)
            documents = (torch.rand(shape, generator=generator) < 0.3).long().cumsum(1)
            parts.append({"input_ids": ids, "labels": ids, "attention_mask": real.long(), "document_ids": documents})
        micro.append(parts)
    alone, model = built({"config": config}).train(), built({"config": config}).train()
    together = [part for parts in micro for part in parts]
    expected = alone(**{name: torch.cat([part[name] for part in together]) for name in together[0]})
    expected.loss.backward()

    if how == "mesh":
        parallelize(model, make_mesh(ep=ranks.size))
    mine = [parts[ranks.rank] for parts in micro]
    losses = {name: torch.zeros((), dtype=torch.float64) for name in expected.losses}
    with model.global_batch.step([model.loss_counts(**batch) for batch in mine]):
        for batch in mine:
            out = model(**batch)
            assert out.loss is not None
            out.loss.backward()
            for name, value in out.losses.items():
                losses[name] += value / ranks.size
    for name, value in losses.items():
        dist.all_reduce(value)
        close(value, expected.losses[name], f"loss {name}")
    for name, parameter in alone.named_parameters():
        gradient = model.get_parameter(name).grad
        assert parameter.grad is not None and gradient is not None, name
        if how == "average":
            dist.all_reduce(gradient)
            gradient /= ranks.size
        close(whole(gradient), parameter.grad, f"gradient of {name}")


def skipped_steps(ranks: Ranks) -> None:
    """Tokens whose gradients were cleared do not count in the bias update on a mesh either."""
    biases = []
    for clear in (None, "optimizer", "model"):
        model = parallelize(built(), make_mesh(ep=ranks.size))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        balance.attach(model, optimizer, bias_update_speed=0.5)
        if clear:
            for _ in range(2):
                ids = torch.full((9, LENGTH), 7)
                out = model(ids, labels=ids)
                assert out.loss is not None
                out.loss.backward()
            (optimizer if clear == "optimizer" else model).zero_grad()
        for step in range(2):
            out = model(**token_batch(step, ranks.rank))
            assert out.loss is not None
            out.loss.backward()
        optimizer.step()
        biases.append(torch.cat([router.e_score_correction_bias for _, router in balance.routers(model)]))
    assert biases[0].any() and all(torch.equal(bias, biases[0]) for bias in biases[1:])


def without_gradients(ranks: Ranks) -> None:
    """After a pass without gradients, `parameters()` has no copies, and the next pass uses the current weights."""
    model, alone = parallelize(built(), make_mesh(ep=ranks.size)), built()
    ids = token_batch(0, ranks.rank)["input_ids"]
    parameters = dict(model.named_parameters())
    tokens = moe.generate(model, ids, max_new_tokens=2)  # the first pass, in inference mode
    assert torch.equal(tokens, moe.generate(alone, ids, max_new_tokens=2))
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())

    def step() -> float:
        out = model(**token_batch(1, ranks.rank))
        assert out.loss is not None
        out.loss.backward()
        with torch.no_grad():
            model(ids)
        return clip_grad_norm(model.parameters(), 1.0).item()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    balance.attach(model, optimizer, bias_update_speed=0.0)
    before = {name: whole(parameter) for name, parameter in parameters.items()}
    norm = step()
    squares = [whole(parameter.grad).square().sum() for parameter in parameters.values() if parameter.grad is not None]
    assert norm > 1 and len(squares) == len(parameters)
    assert abs(torch.stack(squares).sum().sqrt().item() - 1) < 1e-5  # all were clipped
    optimizer.step()
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert not torch.equal(whole(parameter), before[name]), name
            alone.get_parameter(name).copy_(whole(parameter))
        close(model.eval()(ids).logits, alone.eval()(ids).logits, "logits of the new weights")


def out_of_order(ranks: Ranks) -> None:
    """Calls in the wrong order, and repeated division, are rejected in one line."""
    mesh = make_mesh(ep=ranks.size)
    model = built()
    balance.attach(model, torch.optim.SGD(model.parameters()))
    refused(lambda: parallelize(model, mesh), "after parallelize")
    model = built()
    optimizer = torch.optim.SGD(model.parameters())
    parallelize(model, mesh)
    refused(lambda: balance.attach(model, optimizer), "after parallelize", kind=ValueError)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    refused(lambda: model.train()(ids, labels=ids), "2 or more, for mtp.0", kind=ValueError)
    refused(lambda: moe.generate(model, ids, max_new_tokens=1, eos_token_id=0), "eos_token_id", kind=ValueError)
    refused(lambda: moe.generate(model, ids, max_new_tokens=1, speculative="on"), "on a mesh", kind=ValueError)
    layer = divide_experts(_layer(), mesh.experts["ep"])
    refused(lambda: divide_experts(layer, mesh.experts["ep"]), "already")
    model = built()
    first = next(module for module in model.modules() if isinstance(module, MoELayer))
    divide_experts(first, mesh.experts["ep"])
    refused(lambda: parallelize(model, mesh), "already")
    refused(lambda: model.save(ranks.folder / f"refused-{ranks.rank}"), "moe.parallel.export", kind=moe.CheckpointError)


def refusals(ranks: Ranks) -> None:
    """Meshes and models that do not fit together are rejected in one line with the numbers."""
    size = ranks.size
    refused(lambda: make_mesh(ep=0), "ep = 0")
    refused(lambda: make_mesh(ep=3), "ep = 3", f"{size} ranks")
    refused(lambda: make_mesh(dp_shard=2 * size), f"dp_replicate x dp_shard = 1 x {2 * size}: expected {size}")
    refused(lambda: make_mesh(dp_replicate=3), f"dp_replicate x dp_shard = 3 x {size // 3}: expected {size}")
    mesh = make_mesh(ep=size)
    refused(lambda: parallelize(Transformer(_config(n_routed_experts=12, n_group=4)), mesh), f"{size}", "12 experts")
    model = parallelize(Transformer(_config()), mesh)
    refused(lambda: parallelize(model, mesh), "already")
    refused(lambda: model.save(ranks.folder / "refused"), "moe.parallel.export", kind=moe.CheckpointError)
    refused(lambda: divide_experts(_layer(), mesh.experts["ep"], payload="int4"), "payload", "int4")  # pyright: ignore[reportArgumentType]
