"""Counts, losses and the correction bias: each number by hand, and the same in every way of training."""

import copy
import dataclasses
import itertools
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe
from moe import balance
from tests.support.models import SMALL

CONFIG = dataclasses.replace(
    SMALL,
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    aux_loss_alpha=0.01,
    router_z_loss_coef=0.001,
    initializer_range=0.02,
)


def test_load_by_hand() -> None:
    ids = torch.tensor([[[0, 1], [1, 2], [2, -1]], [[3, 3], [0, 3], [1, 1]]])
    assert balance.expert_load(ids, 5).tolist() == [[1, 2, 2, 0, 0], [1, 2, 0, 3, 0]]
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert balance.expert_load(ids, 5, mask).tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 3, 0]]
    assert balance.expert_load(ids[:, :0], 5).tolist() == [[0] * 5] * 2


def test_balance_loss_by_hand() -> None:
    scores = torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]], [[0.9, 0.3, 0.6], [0.1, 0.1, 0.8]]])
    ids = torch.tensor([[[0, 1], [1, 0]], [[0, 2], [2, 1]]])
    # First sequence: counts 2, 2, 0 -> f = 3/4 * count; P = (0.35, 0.425, 0.225).
    first = 1.5 * 0.35 + 1.5 * 0.425
    # Second: counts 1, 1, 2; rows normalised to (0.5, 1/6, 1/3) and (0.1, 0.1, 0.8).
    second = 0.75 * 0.3 + 0.75 * (1 / 6 + 0.1) / 2 + 1.5 * (1 / 3 + 0.8) / 2
    assert balance.balance_loss(scores, ids).item() == pytest.approx((first + second) / 2, rel=1e-6)
    # The batch as one: counts 3, 3, 2 of 8 -> f = 3/8 * count, P the mean of all four rows.
    p = [(0.5 + 0.2 + 0.5 + 0.1) / 4, (0.25 + 0.6 + 1 / 6 + 0.1) / 4, (0.25 + 0.2 + 1 / 3 + 0.8) / 4]
    whole = 9 / 8 * p[0] + 9 / 8 * p[1] + 6 / 8 * p[2]
    assert balance.balance_loss(scores, ids, seq_aux=False).item() == pytest.approx(whole, rel=1e-6)


def test_balance_loss_of_perfect_balance_is_one() -> None:
    ids = torch.arange(8).view(1, 4, 2)
    assert balance.balance_loss(torch.rand(1, 4, 8).fill_(0.3), ids).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("seq_aux", [True, False])
def test_padding_changes_no_bit_of_any_loss(seq_aux: bool) -> None:
    logits = torch.randn(2, 5, 8)
    ids = logits.topk(3).indices
    plain = balance.balance_loss(logits.sigmoid(), ids, seq_aux=seq_aux)
    z = balance.z_loss(logits)
    # Garbage behind the padding, a sequence of padding only, and NaN.
    padded, padded_ids = torch.full((3, 9, 8), math.nan), torch.zeros(3, 9, 3, dtype=torch.int64)
    padded[:2, :5], padded_ids[:2, :5] = logits, ids
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[:2, :5] = True
    assert torch.equal(balance.balance_loss(padded.sigmoid(), padded_ids, mask, seq_aux=seq_aux), plain)
    assert torch.equal(balance.z_loss(padded, mask), z)


def test_losses_of_nothing_are_zero() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    ids = torch.zeros(2, 3, 2, dtype=torch.int64)
    assert balance.balance_loss(torch.rand(2, 3, 4), ids, mask).item() == 0
    assert balance.balance_loss(torch.rand(2, 3, 4), ids, mask, seq_aux=False).item() == 0
    assert balance.z_loss(torch.rand(2, 3, 4), mask).item() == 0
    assert balance.z_loss(torch.rand(0, 4)).item() == 0


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert balance.z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2, rel=1e-6)


def bias_of(layer: moe.MoELayer) -> Tensor:
    bias = layer.gate.e_score_correction_bias
    assert bias is not None
    return bias


class Other(nn.Module):
    """A third-party model around our layer."""

    def __init__(self, *, recompute: bool = False, **options: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16, bias=False)
        self.moe = moe.MoELayer(16, 12, n_routed_experts=6, num_experts_per_tok=2, seed=0, **options)
        self.recompute = recompute
        with torch.no_grad():
            self.inner.weight.copy_(torch.eye(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        y = checkpoint(self.moe, x, use_reentrant=False) if self.recompute else self.moe(x)
        assert isinstance(y, Tensor)
        return y


def train(model: nn.Module, batches: Tensor, *, accumulate: int, evaluate: bool, compiled: bool) -> list[Tensor]:
    """Biases after each step of a plain trainer; the loss is the mean over the step's batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balance.attach(model, optimizer, bias_update_speed=0.25)
    run = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else model
    seen = []
    for batch in batches:
        for part in batch.chunk(accumulate):
            (run(part).square().mean() / accumulate).backward()
        if evaluate:
            model.eval()
            with torch.no_grad():
                run(batch)
            run(batch)  # with gradients enabled, but in eval mode and never gone backward
            model.train()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(torch.stack([r.e_score_correction_bias.clone() for _, r in balance.routers(model)]))
    return seen


def test_bias_update_by_hand() -> None:
    model = Other()
    x = torch.randn(1, 4, 10, 16)
    load = torch.zeros(6)
    ids = model.moe.gate(x.reshape(-1, 16)).expert_ids
    for e in ids.flatten().tolist():
        load[e] += 1
    assert load.sum() == 80
    expected = 0.25 * torch.sign(load.mean() - load)
    assert expected.abs().sum() > 0.5  # otherwise this test would pass on no update
    (bias,) = train(model, x, accumulate=1, evaluate=False, compiled=False)
    assert torch.equal(bias[0], expected)


EAGER = [(*c, False) for c in itertools.product([False, True], [1, 4], [False, True]) if c != (False, 1, False)]
COMPILED = [(False, 1, False, True), (True, 4, True, True)]


@pytest.mark.parametrize(("recompute", "accumulate", "evaluate", "compiled"), EAGER + COMPILED)
def test_bias_is_the_same_in_every_trainer(recompute: bool, accumulate: int, evaluate: bool, compiled: bool) -> None:
    """Accumulation, recomputation, eval between steps and compilation are invisible to the counts."""
    torch._dynamo.reset()
    # Small integers make each token's scores tie-heavy; the batch is the same however it is cut.
    batches = torch.randint(-1, 2, (3, 4, 10, 16)).float()
    plain = train(Other(), batches, accumulate=1, evaluate=False, compiled=False)
    assert plain[-1].abs().max() >= 0.25
    again = train(Other(recompute=recompute), batches, accumulate=accumulate, evaluate=evaluate, compiled=compiled)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_aux_loss_enters_the_gradient_and_not_the_output() -> None:
    x = torch.randn(2, 5, 16)
    plain, with_loss = Other(), Other(aux_loss_alpha=0.1, router_z_loss_coef=0.01)
    a, b = plain(x), with_loss(x)
    assert torch.equal(a, b)
    balance.set_loss_scale(with_loss, 0.5)
    a.sum().backward()
    with_loss(x).sum().backward()
    _, stats = with_loss.moe(with_loss.inner(x), return_stats=True)
    (expected,) = torch.autograd.grad(stats.aux_loss, with_loss.moe.gate.weight)
    grad, without = with_loss.moe.gate.weight.grad, plain.moe.gate.weight.grad
    assert grad is not None and without is not None
    difference = grad - without
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(difference, 0.5 * expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("recompute", [False, True])
def test_transformer_adds_the_losses_or_carries_them(recompute: bool) -> None:
    """The gradient of out.loss equals that of a cross entropy computed by the caller from out.logits."""
    config = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
    ids = torch.randint(0, 61, (2, 12))
    ours, theirs = moe.Transformer(config).train(), moe.Transformer(config).train()
    for model in (ours, theirs):
        model.set_activation_checkpointing(recompute)
    out = ours(ids, labels=ids)
    assert out.loss is not None
    out.loss.backward()
    logits = theirs(ids).logits
    ce = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    ce.backward()
    assert out.loss.item() == pytest.approx(sum(part.item() for part in out.losses.values()), rel=1e-6)
    assert out.losses["ce"].item() == pytest.approx(ce.item(), rel=1e-6)
    assert out.losses["balance"] > 0.005 and out.losses["z"] > 0.001
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_mtp_layers_are_counted_and_balanced() -> None:
    model = moe.Transformer(CONFIG).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = balance.attach(model, optimizer)
    ids = torch.randint(0, 61, (2, 12))
    out = model(ids, labels=ids)
    assert out.loss is not None and out.load is not None
    out.loss.backward()
    names = [name for name, _ in balance.routers(model)]
    assert names == ["layers.1.mlp.gate", "mtp.0.block.mlp.gate"]
    assert out.load.sum(-1).tolist() == [2 * 12 * 3, 2 * 11 * 3]
    for (_, router), load in zip(balance.routers(model), out.load, strict=True):
        assert torch.equal(router.counter.grad.long(), load)
    optimizer.step()
    for (_, router), load in zip(balance.routers(model), out.load, strict=True):
        assert torch.equal(router.e_score_correction_bias, 0.001 * torch.sign(load.double().mean() - load).float())
        assert router.counter.grad is None
    report = model.load_report(reset=True)
    assert report.layers == names and torch.equal(report.load, out.load)
    worst = out.load[1].max().item() / (2 * 11 * 3 / 8) - 1
    assert report.max_vio[1] == pytest.approx(worst)
    assert model.load_report().load.sum() == 0
    handle.remove()
    before = [router.e_score_correction_bias.clone() for _, router in balance.routers(model)]
    loss = model(ids, labels=ids).loss
    assert loss is not None
    loss.backward()
    optimizer.step()
    assert all(
        torch.equal(b, r.e_score_correction_bias) for b, (_, r) in zip(before, balance.routers(model), strict=True)
    )


def test_a_step_without_tokens_leaves_the_bias_alone() -> None:
    model = Other()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balance.attach(model, optimizer)
    optimizer.step()
    bias = model.moe.gate.e_score_correction_bias
    assert bias is not None and torch.equal(bias, torch.zeros(6))


def test_attach_refuses_what_cannot_work() -> None:
    model = Other(topk_method="greedy")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no router with a correction bias"):
        balance.attach(model, optimizer)
    model = Other()
    balance.attach(model, optimizer)
    with pytest.raises(ValueError, match="already attached"):
        balance.attach(model, optimizer)


def test_bias_stays_fp32_through_every_cast() -> None:
    model = moe.Transformer(CONFIG)
    values = torch.linspace(-3, 5, 8) + 0.001
    for _, router in balance.routers(model):
        router.e_score_correction_bias.copy_(values)
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        model.to(cast)
        for _, router in balance.routers(model):
            assert router.weight.dtype == cast
            assert router.e_score_correction_bias.dtype == torch.float32
            assert torch.equal(router.e_score_correction_bias, values)
    assert "layers.1.mlp.gate.e_score_correction_bias" in model.state_dict()


def test_a_copy_is_not_attached_and_can_be(tmp_path: Path) -> None:
    model = Other()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = balance.attach(model, optimizer, bias_update_speed=0.5)
    twin = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    for other in (twin, pickled):
        its_own = torch.optim.SGD(other.parameters(), lr=0.1)
        balance.attach(other, its_own, bias_update_speed=0.5)
        other(torch.randn(1, 20, 16)).sum().backward()
        its_own.step()
        assert bias_of(other.moe).abs().max() == 0.5
    assert bias_of(model.moe).abs().max() == 0
    handle.remove()
    again = balance.attach(model, optimizer, bias_update_speed=0.5)
    handle.remove()  # a stale handle takes nothing from a new one
    model(torch.randn(1, 20, 16)).sum().backward()
    optimizer.step()
    assert bias_of(model.moe).abs().max() == 0.5
    again.remove()


def test_attach_refuses_a_speed_that_would_ruin_the_bias() -> None:
    model = Other()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for speed in (math.nan, math.inf, -0.1):
        with pytest.raises(ValueError, match="bias_update_speed"):
            balance.attach(model, optimizer, bias_update_speed=speed)


def test_a_failed_move_loses_nothing() -> None:
    """Out of memory halfway through `.cuda()` must not leave a router without its bias."""
    model = Other()
    bias = torch.linspace(-1, 1, 6)
    bias_of(model.moe).copy_(bias)

    def fails(tensor: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        model.moe.gate._apply(fails)
    assert torch.equal(bias_of(model.moe), bias)


def test_counters_follow_the_model_to_its_device() -> None:
    model = Other()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balance.attach(model, optimizer)
    model.to("meta")
    counter = model.moe.gate.counter
    assert counter is not None and counter.is_meta and counter.is_leaf and counter.requires_grad
    model.to_empty(device="cpu")  # and back, though there is nothing to copy
    counter = model.moe.gate.counter
    assert counter is not None and counter.device.type == "cpu" and counter.is_leaf and counter.requires_grad


def test_output_may_be_changed_in_place() -> None:
    layer = moe.MoELayer(16, 12, 6, 2, aux_loss_alpha=0.1)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    balance.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(2, 5, 16)
    model(x).sum().backward()
    y = layer(x)
    y += x
    y.sum().backward()
    counter = layer.gate.counter
    assert counter is not None and counter.grad is not None and counter.grad.sum() == 2 * 20


@pytest.mark.parametrize("seq_aux", [True, False])
def test_layer_losses_leave_padding_out(seq_aux: bool) -> None:
    layer = moe.MoELayer(16, 12, 6, 2, aux_loss_alpha=0.5, router_z_loss_coef=0.25, seq_aux=seq_aux, seed=0).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    mask = torch.tensor([[False, False, True, True, True, True, True], [True] * 4 + [False] * 3])
    _, stats = layer(x, token_mask=mask, return_stats=True)
    if seq_aux:
        parts = [layer(row[keep], return_stats=True)[1] for row, keep in zip(x, mask, strict=True)]
        balanced = sum(p.balance_loss for p in parts) / 2
        z = (5 * parts[0].z_loss + 4 * parts[1].z_loss) / 9
    else:
        _, alone = layer(x[mask], return_stats=True)
        balanced, z = alone.balance_loss, alone.z_loss
    torch.testing.assert_close(stats.balance_loss, balanced, rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.z_loss, z, rtol=1e-12, atol=0)
    _, blind = layer(x, return_stats=True)
    assert blind.z_loss != stats.z_loss


def test_losses_reach_a_head_of_another_kind() -> None:
    """A caller who reads `out.hidden` gets the balance losses too, at the scale that was set."""
    ids = torch.randint(0, 61, (2, 12))
    grads = []
    for alpha, scale in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.5)):
        config = dataclasses.replace(CONFIG, aux_loss_alpha=alpha, router_z_loss_coef=0.0)
        model = moe.Transformer(config).train()
        balance.set_loss_scale(model, scale)
        model(ids).hidden.square().sum().backward()
        grads.append(model.get_parameter("layers.1.mlp.gate.weight").grad)
    without, whole, half = (g for g in grads if g is not None)
    assert (whole - without).abs().max() > 1e-5
    torch.testing.assert_close(half - without, (whole - without) / 2, rtol=1e-3, atol=1e-7)


def test_report_without_mtp_keeps_its_rows() -> None:
    model = moe.Transformer(CONFIG).eval()
    ids = torch.randint(0, 61, (2, 12))
    out = model(ids)
    assert out.load is not None
    report = model.load_report()
    assert torch.equal(report.load[0], out.load[0]) and report.load[1].sum() == 0
    assert report.max_vio[1] == 0 and report.dead_experts[1] == 8


def _rank(rank: int, rendezvous: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    batches = torch.randint(-1, 2, (2, 4, 10, 16)).float()
    model = Other(aux_loss_alpha=0.1, seq_aux=False)
    mine = batches.chunk(2, dim=1)[rank]
    loss = model.moe(mine[0], return_stats=True)[1].balance_loss.detach()
    biases = train(model, mine, accumulate=1, evaluate=False, compiled=False)
    torch.save([biases, loss], f"{out}{rank}")
    torch.distributed.destroy_process_group()


def test_counts_are_summed_over_ranks(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(r, str(tmp_path / "rendezvous"), str(tmp_path / "out"))) for r in (0, 1)
    ]
    for process in ranks:
        process.start()
    torch.manual_seed(0)
    batches = torch.randint(-1, 2, (2, 4, 10, 16)).float()
    model = Other(aux_loss_alpha=0.1, seq_aux=False)
    loss = model.moe(batches[0], return_stats=True)[1].balance_loss.item()
    # The ranks' weights drift apart after the first step, for nothing averages their gradients here.
    single = train(model, batches[:1], accumulate=1, evaluate=False, compiled=False)
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    results = [torch.load(f"{tmp_path}/out{r}", weights_only=True) for r in (0, 1)]
    for biases, _ in results:
        assert torch.equal(biases[0], single[0])
    assert sum(part.item() for _, part in results) / 2 == pytest.approx(loss, rel=1e-6)


CLEAR: dict[str, Any] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "model": lambda model, optimizer: model.zero_grad(),
    "by hand": lambda model, optimizer: [setattr(parameter, "grad", None) for parameter in model.parameters()],
}


def overflowing(model: nn.Module) -> Tensor:
    """A loss with non-finite gradients; its equal tokens are so many that their load would decide every sign."""
    return model(torch.ones(1, 999, 16)).sum() * math.inf


def skip(how: str, model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler) -> None:
    """A step of two micro-batches that the scaler does not take."""
    for _ in range(2):
        scaler.scale(overflowing(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    CLEAR[how](model, optimizer)


@pytest.mark.parametrize("how", CLEAR)
@pytest.mark.parametrize("optimizer", ["plain", "fused"])
def test_a_skipped_step_counts_nothing(optimizer: str, how: str) -> None:
    """Right after `attach` and between steps: the bias is that of the steps that are taken."""
    batches = torch.randint(-1, 2, (2, 2, 4, 10, 16)).float()
    biases = []
    for skips in (False, True):
        model = Other()
        stepper = torch.optim.SGD(model.parameters(), lr=0.1, fused=optimizer == "fused")
        balance.attach(model, stepper, bias_update_speed=0.25)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for step in batches:
            if skips:
                skip(how, model, stepper, scaler)
            for part in step:
                scaler.scale(model(part).square().mean()).backward()
            scaler.step(stepper)
            scaler.update()
            CLEAR[how](model, stepper)
            biases.append(bias_of(model.moe).clone())
    assert torch.equal(biases[0], biases[2]) and torch.equal(biases[1], biases[3])
    assert not torch.equal(biases[0], biases[1])


@pytest.fixture
def accelerate() -> Iterator[Any]:
    library = pytest.importorskip("accelerate")
    library.Accelerator(cpu=True)  # sets what its optimizer reads
    yield library
    library.state.AcceleratorState._reset_state(reset_partial_state=True)
    library.state.GradientState._reset_state()


@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
def test_a_step_that_accelerate_skips_counts_nothing(accelerate: Any, when: str) -> None:
    x = torch.randint(-1, 2, (4, 10, 16)).float()
    biases = []
    for skips in (False, True):
        model = Other()
        real = torch.optim.AdamW(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        prepared = accelerate.optimizer.AcceleratedOptimizer(real, scaler=scaler)
        balance.attach(model, real if when == "before prepare" else prepared, bias_update_speed=0.25)
        if skips:
            scaler.scale(overflowing(model)).backward()
            prepared.step()
            assert prepared.step_was_skipped
            prepared.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        prepared.step()
        assert not prepared.step_was_skipped
        biases.append(bias_of(model.moe).clone())
    assert torch.equal(*biases) and biases[0].any()


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("where", ["frozen", "other optimizer", "elsewhere"])
def test_a_router_without_gradients_counts_all_micro_batches(where: str, steps: int) -> None:
    """If a trainer keeps gradients elsewhere, from the second step on: the first shows that there are none."""
    model = Other()
    weight, rest = model.moe.gate.weight, [*model.inner.parameters(), *model.moe.experts.parameters()]
    optimizer = torch.optim.SGD(rest if where == "other optimizer" else model.parameters(), lr=0.0)
    balance.attach(model, optimizer, bias_update_speed=0.25)
    if where == "frozen":
        weight.requires_grad_(False)
    else:
        weight.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    before = load = torch.zeros(6)
    for _ in range(steps + (where == "elsewhere")):
        before, load = bias_of(model.moe).clone(), torch.zeros(6)
        for x in (torch.ones(1, 999, 16), torch.randint(-1, 2, (1, 10, 16)).float()):
            load += balance.expert_load(model.moe.gate(x[0]).expert_ids, 6)
            model(x).sum().backward()
        optimizer.step()
    torch.testing.assert_close(bias_of(model.moe) - before, 0.25 * torch.sign(load.mean() - load))
