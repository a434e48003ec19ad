"""MoELayer against the formula in float64 and transformers' layer, and how it is called, compiled and initialised."""

import copy
import dataclasses
import inspect
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe
from moe.config import MoEConfig, RouterConfig
from moe.layer import MoELayer
from moe.router import Router

OPTIONS: list[dict[str, Any]] = [
    {"n_shared_experts": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    {"n_shared_experts": 2, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    {"topk_method": "noaux_tc", "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 16.0},
    {"n_shared_experts": 1, "shared_expert_intermediate_size": 14, "shared_expert_gate": True, "router_bias": True},
    {"scoring_func": "softmax", "topk_method": "noaux_tc", "moe_norm_min": 0.4, "n_shared_experts": 1},
    {"expert_bias": True, "router_bias": True, "swiglu_limit": 0.5, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
]


def biased_layer(options: dict[str, Any]) -> MoELayer:
    layer = MoELayer(24, 10, n_routed_experts=8, num_experts_per_tok=3, initializer_range=0.3, seed=0, **options)
    if layer.gate.e_score_correction_bias is not None:
        layer.gate.e_score_correction_bias.copy_(torch.linspace(-0.4, 0.6, 8))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):  # which begin at zero
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return layer


def formula(layer: MoELayer, x: Tensor, options: dict[str, Any]) -> Tensor:
    """The layer from the text of DeepSeek-V3 and V2, in float64, one token and one expert at a time."""
    weights = {name: p.double() for name, p in layer.state_dict().items()}
    out = []
    for token in x.double().reshape(-1, 24):
        logits = weights["gate.weight"] @ token + weights.get("gate.bias", torch.zeros(8, dtype=torch.float64))
        softmax = options.get("scoring_func") == "softmax"
        scores = logits.softmax(0) if softmax else logits.sigmoid()
        choice = scores + weights.get("gate.e_score_correction_bias", torch.zeros(8, dtype=torch.float64))
        groups = choice.view(options.get("n_group", 1), -1)
        top2 = options.get("topk_method", "noaux_tc") == "noaux_tc"
        rank = groups.topk(min(2, groups.shape[1])).values.sum(1) if top2 else groups.amax(1)
        allowed = rank.topk(options.get("topk_group", 1)).indices.tolist()
        size = groups.shape[1]
        candidates = [e for e in range(8) if e // size in allowed]
        chosen = sorted(candidates, key=lambda e: -choice[e].item())[:3]
        least = torch.tensor(options.get("moe_norm_min", 0.0), dtype=torch.float64)
        norm = max(sum(scores[e] for e in chosen), least) if options.get("norm_topk_prob", True) else 1.0
        y = torch.zeros(24, dtype=torch.float64)
        for e in chosen:
            pre, value = weights["experts.gate_up_proj"][e] @ token, torch.zeros(24, dtype=torch.float64)
            if options.get("expert_bias"):
                pre, value = pre + weights["experts.gate_up_proj_bias"][e], weights["experts.down_proj_bias"][e]
            gate, up = pre.chunk(2)
            limit = options.get("swiglu_limit", float("inf"))
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + options.get("swiglu_beta", 0.0)
            hidden = gate * (options.get("swiglu_alpha", 1.0) * gate).sigmoid() * up
            value = value + weights["experts.down_proj"][e] @ hidden
            y = y + scores[e] / norm * options.get("routed_scaling_factor", 1.0) * value
        if options.get("n_shared_experts"):
            gate = weights["shared_experts.gate_proj.weight"] @ token
            up = weights["shared_experts.up_proj.weight"] @ token
            shared = weights["shared_experts.down_proj.weight"] @ (gate * gate.sigmoid() * up)
            weight = weights.get("shared_expert_gate.weight")
            y = y + (shared if weight is None else (weight @ token).sigmoid() * shared)
        out.append(y)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("options", OPTIONS)
def test_layer_is_the_formula(options: dict[str, Any]) -> None:
    layer = biased_layer(options)
    x = torch.randn(2, 7, 24)
    expected = formula(layer, x, options)
    assert expected.abs().mean() > 0.05
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    exact = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-7)  # the fp32 correction bias is exact in float64


def test_layer_matches_transformers_forward_and_backward() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=24,
        moe_intermediate_size=10,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
    )
    layer = biased_layer(OPTIONS[0])
    theirs = DeepseekV3MoE(config).double()
    theirs.load_state_dict(layer.state_dict())
    ours = layer.double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    theirs.gate.e_score_correction_bias.data = theirs.gate.e_score_correction_bias.data.float().double()
    ya, yb = ours(a), theirs(b)
    # transformers computes router logits in fp32 whatever the model's dtype
    torch.testing.assert_close(ya, yb, rtol=1e-5, atol=1e-6)
    g = torch.randn_like(x)
    ya.backward(g)
    yb.backward(g)
    assert a.grad is not None and a.grad.abs().mean() > 0.01
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    reference = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        expected = reference[name].grad
        assert expected is not None
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item(), msg=name)


def test_padding_is_invisible_whatever_it_holds() -> None:
    layer = biased_layer(OPTIONS[0]).double().train()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    y, stats = layer(x, return_stats=True)
    y.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    padded = torch.full((2, 8, 24), torch.nan, dtype=torch.float64)
    padded[:, 3:] = x
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 3:] = True
    out, padded_stats = layer(padded, token_mask=mask, return_stats=True)
    out.square().sum().backward()
    torch.testing.assert_close(out[:, 3:], y, rtol=1e-12, atol=1e-13)
    assert torch.equal(out[:, :3], torch.zeros_like(out[:, :3]))
    assert torch.equal(padded_stats.load, stats.load)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def test_routing_override() -> None:
    layer = biased_layer(OPTIONS[0]).double()
    x = torch.randn(1, 8, 24, dtype=torch.float64)
    routing = layer.gate(x[0])
    assert torch.equal(layer(x, routing=routing), layer(x))
    # Replayed ids in another order: the weights come from the router's own scores, with their gradient.
    torch.testing.assert_close(layer(x, routing=routing.expert_ids.flip(1)), layer(x), rtol=1e-12, atol=1e-13)
    # Forced balance: every expert gets 3 of 24.
    forced = (torch.arange(24) % 8).view(8, 3)
    y, stats = layer(x, routing=forced, return_stats=True)
    assert stats.load.tolist() == [3] * 8
    y.sum().backward()
    assert layer.gate.weight.grad is not None and layer.gate.weight.grad.abs().sum() > 0
    w = layer.gate(x[0]).scores.gather(1, forced)
    torch.testing.assert_close(layer.gate.replay(layer.gate.logits(x[0]), forced).weights, w / w.sum(1, True) * 2.5)
    # An expert that is not there takes no share.
    one = torch.tensor([[3, -1, -1]] * 8)
    replayed = layer.gate.replay(layer.gate.logits(x[0]), one).weights
    torch.testing.assert_close(replayed, torch.tensor([[2.5, 0.0, 0.0]] * 8, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [-2, -100, 8, 2**40])
def test_an_expert_that_is_not_there_is_named(wrong: int) -> None:
    """For ids that replace the selection and for a whole routing, in training and in eval mode."""
    layer = biased_layer(OPTIONS[0])
    x, ids = torch.randn(6, 24), torch.randint(0, 8, (6, 3))
    ids[4, 1], ids[2, 2] = wrong, -1
    routing = moe.Routing(torch.ones(6, 3), ids, torch.ones(6, 8))
    for call in (
        lambda: layer(x, routing=ids),
        lambda: layer(x, routing=routing),
        lambda: layer.gate.replay(layer.gate.logits(x), ids),
        lambda: moe.balance.expert_load(ids, 8),
        lambda: moe.balance.balance_loss(torch.rand(6, 8), ids),
    ):
        for training in (True, False):
            layer.train(training)
            with pytest.raises(IndexError, match=rf"^expert_ids\[4, 1\] = {wrong}: expected 0 to 7, or -1$"):
                call()


def test_any_leading_shape_is_accepted() -> None:
    layer = biased_layer(OPTIONS[0])
    x = torch.randn(6, 24)
    y = layer(x)
    assert torch.equal(layer(x[None]), y[None])
    assert torch.equal(layer(x.view(2, 3, 24)).flatten(0, 1), y)
    assert torch.equal(layer(x.view(1, 2, 3, 24)).view(6, 24), y)
    assert layer(x[:0]).shape == (0, 24)


def test_nan_in_one_token_touches_no_other() -> None:
    layer = biased_layer(OPTIONS[0]).double()
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    clean = layer(x)
    x[0, 2] = torch.nan
    dirty = layer(x)
    keep = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(dirty[0, keep], clean[0, keep], rtol=1e-12, atol=1e-13)
    assert dirty[0, 2].isnan().all()


def test_initialisation_depends_on_seed_and_name_alone() -> None:
    state = torch.get_rng_state()
    a, b = (MoELayer(24, 10, 8, 3, n_shared_experts=1, seed=s) for s in (1, 1))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is not ours to move
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    c = MoELayer(24, 10, 8, 3, n_shared_experts=1, seed=2)
    assert not any(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
    flat = a.experts.gate_up_proj.flatten(1)
    assert torch.pdist(flat).min() > 0.1  # experts pairwise distinct
    assert a.experts.gate_up_proj.std().item() == pytest.approx(0.02, rel=0.05)
    wider = MoELayer(24, 10, 16, 3, n_shared_experts=1, seed=1)
    assert torch.equal(wider.experts.down_proj[:8], a.experts.down_proj)  # a rank can make just its own experts
    with torch.device("meta"):
        assert MoELayer(24, 10, 8, 3).experts.down_proj.is_meta


def test_layers_of_one_model_differ_and_follow_manual_seed() -> None:
    def two() -> list[MoELayer]:
        torch.manual_seed(7)
        return [MoELayer(24, 10, 8, 3) for _ in range(2)]

    (a, b), (c, d) = two(), two()
    assert not torch.equal(a.experts.down_proj, b.experts.down_proj)
    assert not torch.equal(a.gate.weight, b.gate.weight)
    assert torch.equal(a.gate.weight, c.gate.weight) and torch.equal(b.gate.weight, d.gate.weight)


def test_released_biases_need_fp32() -> None:
    """Why the bias is never bf16: at 3.0, updates of 0.001 vanish and neighbours merge."""
    router = Router(4, RouterConfig(4, 1, norm_topk_prob=False))
    with torch.no_grad():
        router.weight.zero_()
    bias = torch.tensor([3.000, 3.001, 3.002, 2.999])
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias.copy_(bias)
    routing = router.to(torch.bfloat16)(torch.randn(5, 4, dtype=torch.bfloat16))
    assert routing.expert_ids.tolist() == [[2]] * 5
    assert bias.bfloat16().argmax() != 2


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("on_meta", [False, True])
def test_an_assigned_state_leaves_the_bias_float32(given: torch.dtype, on_meta: bool) -> None:
    """Like a state that is copied; the other tensors keep the dtype that was given."""
    source = biased_layer(OPTIONS[0])
    state = {name: tensor.to(given) for name, tensor in source.state_dict().items()}
    with torch.device("meta" if on_meta else "cpu"):
        layer: Any = nn.Sequential(biased_layer(OPTIONS[0]))
    keys = layer.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, assign=True)
    assert not keys.missing_keys and not keys.unexpected_keys
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.endswith("correction_bias") else given), name
        assert torch.equal(tensor.double(), state[name.removeprefix("0.")].double())
    assert layer(torch.randn(2, 3, 24, dtype=given)).dtype == given
    # Past `load_state_dict`, as accelerate does with a dtype and FSDP1 with buffer_dtype.
    gate, given_bias = layer[0].gate, state["gate.e_score_correction_bias"]
    gate._buffers["e_score_correction_bias"] = given_bias
    layer(torch.randn(2, 3, 24, dtype=given))
    gate.move_bias(torch.full((8,), 0.001))
    assert torch.equal(gate.e_score_correction_bias, given_bias.float() + 0.001)
    # What is not in the state stays, and is what it was.
    del state["gate.e_score_correction_bias"]
    kept = biased_layer(OPTIONS[0])
    kept.load_state_dict(state, strict=False, assign=True)
    assert kept.gate.e_score_correction_bias is not None and source.gate.e_score_correction_bias is not None
    assert torch.equal(kept.gate.e_score_correction_bias, source.gate.e_score_correction_bias)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[4], OPTIONS[6]])
def test_an_output_can_be_changed_in_place(options: dict[str, Any]) -> None:
    """A view could not be changed after a pass without gradients. Changes reach no input."""
    layer, x = biased_layer(options), torch.randn(2, 5, 24)
    mask = torch.ones(2, 5, dtype=torch.bool)
    for token_mask in (None, mask):
        with torch.no_grad():
            y = layer(x, token_mask)
        before = x.clone()
        y += torch.ones(24, requires_grad=True)
        y.sum().backward()
        assert torch.equal(x, before)
        y = layer(x, token_mask)
        assert not y._is_view()
        y.add_(x).sum().backward()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_routing_is_float32_in_half_precision_and_under_autocast(half: torch.dtype) -> None:
    layer, x = biased_layer(OPTIONS[0]), torch.randn(50, 24)
    router = layer.gate
    expected, exact = F.linear(x, router.weight), router(x)
    with torch.autocast("cpu", half):
        assert torch.equal(router.logits(x), expected)
        routing = router(x)
        assert layer(x).dtype == half
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(routing.scores, exact.scores) and torch.equal(routing.expert_ids, exact.expert_ids)
    expected = F.linear(x.to(half).float(), router.weight.to(half).float())
    assert torch.equal(router.to(half).logits(x.to(half)), expected)


def test_layer_compiles_with_dynamic_shapes() -> None:
    dtype = torch.float64  # the compiled graph sums in another order
    torch._dynamo.reset()
    layer = biased_layer({**OPTIONS[0], "aux_loss_alpha": 0.1}).to(dtype).train()
    run = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 6, 9):
        x = torch.randn(2, length, 24, dtype=dtype)
        grads = []
        for f in (layer, run):
            layer.zero_grad()
            a = x.clone().requires_grad_()
            y = f(a)
            F.mse_loss(y, torch.ones_like(y)).backward()
            grads.append((y.detach(), a.grad, *(p.grad for p in layer.parameters())))
        for eager, compiled in zip(*grads, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-12)


def test_public_signature_of_the_readme() -> None:
    layer = moe.MoELayer(hidden_size=8, moe_intermediate_size=4, n_routed_experts=4, num_experts_per_tok=2)
    y, stats = layer(torch.randn(3, 8), return_stats=True)
    assert stats.load.dtype == torch.int64 and stats.load.sum() == 6 and stats.aux_loss.item() == 0
    assert y.isfinite().all()


def test_arguments_are_those_of_the_config_and_a_seed() -> None:
    """They are listed once, in moe/config.py; editors and `inspect` see all of them."""
    own, config = inspect.signature(MoELayer).parameters, inspect.signature(MoEConfig).parameters
    assert [(p.name, p.kind, p.default) for p in own.values() if p.name != "seed"] == [
        (p.name, p.kind, p.default) for p in config.values()
    ]
    assert list(own)[:4] == ["hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"]
    assert own["seed"].default is None and own["seed"].kind is inspect.Parameter.KEYWORD_ONLY
    with pytest.raises(moe.ConfigError, match="n_groups = 2: expected no such field; did you mean n_group"):
        MoELayer(24, 10, 8, 3, n_groups=2)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_from_config(options: dict[str, Any]) -> None:
    """A layer of a model's config is the layer of the same settings."""
    settings = {
        **options,
        "aux_loss_alpha": 0.5,
        "seq_aux": False,
        "router_z_loss_coef": 0.25,
        "initializer_range": 0.5,
    }
    config = moe.ModelConfig(
        hidden_size=24,
        moe_intermediate_size=10,
        n_routed_experts=8,
        num_experts_per_tok=3,
        **settings,
        vocab_size=5,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=7,
    )
    ours, theirs = MoELayer.from_config(config, seed=3), MoELayer(24, 10, 8, 3, **settings, seed=3)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert ours.gate.selection == theirs.gate.selection and ours.experts.activation == theirs.experts.activation
    for config in (ours.config, theirs.config):
        assert (config.aux_loss_alpha, config.seq_aux, config.router_z_loss_coef) == (0.5, False, 0.25)
    plain = MoEConfig(24, 10, 8, 3, **settings)
    assert all(getattr(plain, f.name) == getattr(config, f.name) for f in dataclasses.fields(MoEConfig))


def test_the_docstrings_explain_every_argument() -> None:
    documented = inspect.getdoc(MoELayer) or ""
    for name in inspect.signature(MoELayer).parameters:
        assert re.search(rf"^ +[\w, ]*\b{name}\b[\w, ]*: \w", documented, re.MULTILINE), name
    own = {f.name for f in dataclasses.fields(moe.ModelConfig)} - {f.name for f in dataclasses.fields(MoEConfig)}
    documented = inspect.getdoc(moe.ModelConfig) or ""
    for f in dataclasses.fields(moe.ModelConfig):
        assert re.search(rf"\b{f.name}\b", documented), f.name
        assert f.name not in own or re.search(rf"^ +[\w, ]*\b{f.name}\b[\w, ]*: ", documented, re.MULTILINE), f.name


def test_a_layer_shows_its_sizes() -> None:
    shown = repr(MoELayer(24, 10, 8, 3, n_group=4, topk_group=2, n_shared_experts=2, expert_bias=True))
    assert (
        shown
        == """MoELayer(
  hidden_size=24, moe_intermediate_size=10, n_routed_experts=8, num_experts_per_tok=3
  (gate): Router(num_experts=8, width=24, top_k=3, scoring_func=sigmoid, n_group=4, topk_group=2, correction_bias=True)
  (experts): Experts(num_experts=8, width=24, hidden=10, bias=True)
  (shared_experts): MLP(
    (gate_proj): Linear(in_features=24, out_features=20, bias=False)
    (up_proj): Linear(in_features=24, out_features=20, bias=False)
    (down_proj): Linear(in_features=20, out_features=24, bias=False)
  )
)"""
    )


IDS = torch.zeros(6, 3, dtype=torch.int64)
GOOD = moe.Routing(torch.ones(6, 3), IDS, torch.ones(6, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x is a list: expected a tensor of float32, float64, bfloat16 or float16"),
        ({"x": torch.ones(6, 24, dtype=torch.int64)}, TypeError, "x is torch.int64: expected a tensor of float32"),
        (
            {"x": torch.ones(6, 24, dtype=torch.float64)},
            TypeError,
            "x is torch.float64: expected torch.float32, as the",
        ),
        ({"x": torch.ones(6, 24, dtype=torch.bfloat16)}, TypeError, "x is torch.bfloat16: expected torch.float32"),
        ({"x": torch.ones(24)}, ValueError, "x has shape (24,): expected [..., S, 24]"),
        ({"x": torch.ones(6, 23)}, ValueError, "x has shape (6, 23): expected [..., S, 24]"),
        ({"token_mask": torch.ones(6)}, ValueError, "token_mask is torch.float32"),
        ({"token_mask": [True] * 6}, TypeError, "token_mask is a list: expected a tensor, torch.bool"),
        (
            {"token_mask": torch.ones(5, dtype=torch.bool)},
            ValueError,
            "token_mask is torch.bool (5,): expected torch.bool",
        ),
        ({"routing": (torch.ones(6, 3), IDS)}, TypeError, "routing is a tuple: expected a moe.Routing, or a tensor"),
        *(
            ({"routing": routing}, TypeError, f"routing: expert_ids are {ids.dtype}: expected a tensor of torch.int64")
            for ids in (IDS.float(), IDS.int(), IDS.bool())
            for routing in (ids, GOOD._replace(expert_ids=ids))
        ),
        *(
            ({"routing": routing}, ValueError, f"routing: expert_ids have shape {tuple(ids.shape)}: expected [6, K]")
            for ids in (IDS[:5], IDS[None], IDS[:, 0])
            for routing in (ids, GOOD._replace(expert_ids=ids))
        ),
        ({"routing": IDS + 8}, IndexError, "expert_ids[0, 0] = 8: expected 0 to 7, or -1"),
        ({"routing": IDS - 2}, IndexError, "expert_ids[0, 0] = -2: expected 0 to 7, or -1"),
        ({"routing": GOOD._replace(expert_ids=IDS + 9)}, IndexError, "expert_ids[0, 0] = 9: expected 0 to 7"),
        ({"routing": GOOD._replace(expert_ids=IDS.tolist())}, TypeError, "routing: expert_ids are list: expected a"),
        (
            {"routing": GOOD._replace(weights=torch.ones(6, 2))},
            ValueError,
            "routing: weights have shape (6, 2): expected [6, 3]",
        ),
        ({"routing": GOOD._replace(weights=IDS)}, TypeError, "routing: weights are torch.int64: expected a tensor of"),
        ({"routing": GOOD._replace(scores=None)}, TypeError, "routing: scores are NoneType: expected a tensor of"),
        (
            {"routing": GOOD._replace(scores=torch.ones(6, 7))},
            ValueError,
            "routing: scores have shape (6, 7): expected [6, 8]",
        ),
    ],
)
@pytest.mark.parametrize("shared", [0, 1])
def test_a_wrong_call_names_the_argument(arguments: Any, error: type[Exception], message: str, shared: int) -> None:
    layer = MoELayer(24, 10, 8, 3, n_shared_experts=shared, aux_loss_alpha=0.1)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        layer(**{"x": torch.ones(6, 24), **arguments})


def test_what_a_layer_is_made_of() -> None:
    with pytest.raises(moe.ConfigError, match=r"config = 'tiny': expected a moe\.config\.MoEConfig"):
        MoELayer.from_config("tiny")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"^MoELayer\.__init__\(\) missing 1 required"):
        MoELayer(24, 10, 8)  # pyright: ignore[reportCallIssue]
    # Ids of another number of experts, and a routing without scores where no loss reads them, are as good as any.
    layer = MoELayer(24, 10, 8, 3)
    assert layer(torch.ones(6, 24), routing=IDS[:, :1]).isfinite().all()
    assert layer(torch.ones(6, 24), routing=GOOD._replace(scores=None)).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(6, 24, dtype=torch.bfloat16)).isfinite().all()
