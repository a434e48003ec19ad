"""Routing replay of `moe.integrations.trl` with transformers alone: routers, generation, training passes, metrics."""

import importlib
import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.integrations.transformers import register
from moe.integrations.trl import ROUTERS, ReplayCallback, choose
from tests.support.routed import Seen

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
register()
SPEC = find_spec("transformers")
assert SPEC is not None and SPEC.origin is not None
SOURCES = {path: path.read_text() for path in sorted(Path(SPEC.origin).parent.glob("models/*/modeling_*.py"))}
D, E, K = 12, 8, 2
SIZES = {
    "hidden_size": D,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), K),
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 2.5,
    "use_expert_bias": True,
}
CHOSEN = {"GptOssTopKRouter", *(f"GraniteMoe{kind}TopKRouter" for kind in ("", "Shared", "Hybrid"))}
SOFTMAX = {"DeepseekV2TopkRouter", "JambaTopKRouter", "MixtralTopKRouter", "HunYuanMoEV1Gate"}
SOFTMAX |= {"OlmoeTopKRouter", "FlexOlmoTopKRouter", "Ernie4_5_MoeTopKRouter"}
SOFTMAX |= {f"{qwen}TopKRouter" for qwen in ("Qwen2Moe", "Qwen3Moe", "Qwen3Next", "Qwen3_5Moe")}
NORMALISED = {"MixtralTopKRouter", "HunYuanMoEV1Gate", "Ernie4_5_MoeTopKRouter"}
NORMALISED |= {"Qwen3_5MoeTopKRouter", "MiniMaxM2TopKRouter"}


def build(name: str, normalised: bool) -> tuple[Any, list[Tensor]]:
    """A router with random parameters, and what it is called with besides hidden states."""
    paths = [path for path, text in SOURCES.items() if re.search(rf"^class {name}\(", text, re.MULTILINE)]
    if not paths:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    package = f"transformers.models.{paths[0].parent.name}"
    module = importlib.import_module(f"{package}.{paths[0].stem}")
    for config_class in vars(module).values():
        if not inspect.isclass(config_class) or not config_class.__module__.startswith(package + ".configuration"):
            continue
        config: Any = config_class()
        for field, value in {**SIZES, "norm_topk_prob": normalised}.items():
            if hasattr(config, field):
                setattr(config, field, value)
        try:
            router = getattr(module, name)(config)
        except AttributeError:  # the config of another part of the model
            continue
        for tensor in (*router.parameters(), *router.buffers()):
            nn.init.normal_(tensor, std=0.5)
        return router, [torch.randn(E)] if len(inspect.signature(router.forward).parameters) > 1 else []
    raise AssertionError(f"{name}: no config class of {package} has what it reads")


def exact(router: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Weights [T, K] of given ids in float64, by the rule of the router's class."""
    name = type(router).__name__
    weight = (router.wg if name == "HunYuanMoEV1Gate" else router).weight
    logits = x.double() @ weight.double().T
    if isinstance(getattr(router, "bias", None), Tensor):
        logits = logits + router.bias.double()
    if name in CHOSEN:
        return logits.gather(1, ids).softmax(1)
    weights = (logits.softmax(1) if name in SOFTMAX else logits.sigmoid()).gather(1, ids)
    if name in NORMALISED or getattr(router, "norm_topk_prob", False):
        weights = weights / weights.sum(1, keepdim=True)
    return weights * getattr(router, "routed_scaling_factor", 1.0)


def gradients(router: Any, x: Tensor, weights: Tensor, factors: Tensor) -> list[Tensor]:
    parameters = [x, *(p for p in router.parameters() if p.requires_grad)]
    found = torch.autograd.grad((weights * factors).sum(), parameters, allow_unused=True, retain_graph=True)
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_weights_follow_the_rule_of_the_router(name: str, normalised: bool) -> None:
    router, beside = build(name, normalised)
    x, factors = torch.randn(40, D, requires_grad=True), torch.rand(40, K)
    output = router(x, *beside)
    if output[2].is_floating_point():
        pytest.skip(
            f"{name} of transformers {transformers.__version__} returns (ids, weights, logits), which is refused"
        )
    again = choose(router, output[2], (x, *beside), {}, output)
    for given, expected in zip(again, output, strict=True):
        assert torch.equal(given, expected)
    same = gradients(router, x, again[1], factors), gradients(router, x, output[1], factors)
    assert len(same[0]) == len(same[1]) > 1
    for given, expected in zip(*same, strict=True):
        assert torch.equal(given, expected)

    ids = torch.rand(40, E).argsort(1)[:, :K]
    assert (ids != output[2]).any()
    logits, weights, chosen = choose(router, ids, (x, *beside), {}, output)
    assert torch.equal(logits, output[0]) and chosen is ids
    torch.testing.assert_close(weights.double(), exact(router, x, ids), rtol=1e-5, atol=1e-6)
    found, known = gradients(router, x, weights, factors), gradients(router, x, exact(router, x, ids), factors)
    assert len(found) == len(known) and all((grad != 0).any() for grad in found)
    for given, expected in zip(found, known, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_a_router_that_chooses_in_another_way_is_refused() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            first = x.topk(K, dim=-1).indices
            weights, ids = x.scatter(1, first, 0.0).topk(K, dim=-1)
            return x, weights, ids

    class Argmax(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            weights, ids = x.max(dim=-1, keepdim=True)
            return x, weights, ids

    for router in (Twice(), Argmax()):
        x = torch.randn(5, E)
        output = router(x)
        with pytest.raises(ConfigError, match=r"^router = '\w+': expected a router with one top-k over the scores of"):
            choose(router, output[2], (x,), {}, output)


HEADS: Any = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32, "hidden_size": 16}
HEADS |= {"num_hidden_layers": 2, "intermediate_size": 24, "num_experts_per_tok": 2, "max_position_embeddings": 64}
HEADS |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": E},
    "Qwen3Moe": {"num_experts": E, "moe_intermediate_size": 12, "head_dim": 8},
    "GptOss": {"num_local_experts": E, "head_dim": 8},
    "DeepseekV3": {"n_routed_experts": E, "moe_intermediate_size": 12, "first_k_dense_replace": 0, "n_group": 4}
    | {"topk_group": 2, "n_shared_experts": 1, "head_dim": 4, **LATENT},
}
# In generation only: groups whose scores are masked, another bias argument, recurrent layers.
MORE: dict[str, dict[str, Any]] = {
    "DeepseekV2": MODELS["DeepseekV3"] | {"topk_method": "group_limited_greedy"},
    "MiniMaxM2": {"num_local_experts": E, "head_dim": 8},
    "Lfm2Moe": {"num_experts": E, "moe_intermediate_size": 12, "num_dense_layers": 0}
    | {"layer_types": ["full_attention", "conv"]},
    "Qwen3Next": {"num_experts": E, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "head_dim": 8}
    | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
PROMPTS = torch.tensor([[0, 0, 5, 6, 7], [0, 8, 9, 10, 11], [12, 13, 14, 15, 16], [0, 0, 5, 6, 7]])
EOS = 1


def tiny(kind: str = "Mixtral", **changes: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**HEADS | (MODELS | MORE)[kind] | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation("moesmith")
    return model.train()


def attached(model: Any, **options: Any) -> ReplayCallback:
    callback = ReplayCallback(**options)
    callback.attach(model)
    return callback


def rollout(model: Any, prompts: Tensor = PROMPTS, new: int = 12, **options: Any) -> list[list[int]]:
    """Sequences as GRPOTrainer trains on them: prompt and completion up to the first end, without padding."""
    out = model.generate(
        prompts,
        attention_mask=(prompts != 0).long(),
        do_sample=True,
        max_new_tokens=new,
        disable_compile=True,
        **options,
    )
    rows = []
    for prompt, row in zip(prompts.tolist(), out.tolist(), strict=True):
        completion = row[len(prompt) :]
        end = completion.index(EOS) + 1 if EOS in completion else len(completion)
        rows.append([token for token in prompt if token] + completion[:end])
    return rows


def padded(rows: list[list[int]], left: int = 0, right: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and mask: prompts of unequal length as in GRPOTrainer, with padding on both sides."""
    width = max(map(len, rows))
    mask = torch.zeros(len(rows), left + width + right, dtype=torch.int64)
    tokens = torch.zeros_like(mask)
    for i, row in enumerate(rows):
        start = left + (width - len(row)) * (i % 2)
        tokens[i, start : start + len(row)], mask[i, start : start + len(row)] = torch.tensor(row), 1
    return tokens, mask


def train(model: Any, rows: list[list[int]], **padding: int) -> Tensor:
    """Log-probabilities of the rows' tokens, in one pass; with their gradients if these are enabled."""
    tokens, mask = padded(rows, **padding)
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    found = logits[:, :-1].float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    found = found[(mask[:, 1:] * mask[:, :-1]).bool()]
    if torch.is_grad_enabled():
        found.sum().backward()
    return found.detach()


def changed(model: Any) -> None:
    """Change all routers, as optimizer steps do, so that many tokens would get other experts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name or ".router." in name:
                parameter += 0.3 * torch.randn_like(parameter)


def grads(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS | MORE)
def test_training_passes_have_the_experts_of_generation(kind: str) -> None:
    """Element by element at the experts, for shuffled and split rows, with and without gradient, after changes."""
    model = tiny(kind)
    callback, seen = attached(model), Seen(model)
    rows = rollout(model)
    assert len({len(row) for row in rows}) > 1
    order = torch.randperm(4).tolist()
    parts = [rows[i] for i in order[:2]], [rows[i] for i in order[2:]]
    with torch.no_grad():
        train(model, rows, left=3)
    for part in parts:
        changed(model)
        train(model, part, left=1, right=2)
    assert not seen.wrong and len(seen.trained) == 4 * sum(map(len, rows))
    metrics = callback.metrics()
    assert metrics["moe_recorded"] == 1 and metrics["moe_router_agreement"] < 1
    for name, grad in grads(model).items():
        assert (grad != 0).any(), name

    callback.detach()
    callback = attached(model, replay=False)
    rows = rollout(model)
    changed(model)
    train(model, rows)
    assert seen.wrong and callback.metrics()["moe_router_agreement"] < 1


def test_load_is_that_of_the_passes_with_gradient() -> None:
    model = tiny()
    callback, seen = attached(model), Seen(model)
    rows = rollout(model)
    changed(model)
    train(model, rows, left=2)
    loads: dict[str, Tensor] = {}
    for layer, _, ids, _ in seen.trained:
        loads.setdefault(layer.replace("experts", "gate"), torch.zeros(E))[list(ids)] += 1
    with torch.no_grad():
        train(model, rows)
    metrics = callback.metrics()
    vio = {f"moe_max_vio/{name}": (load.max() / load.mean() - 1).item() for name, load in loads.items()}
    dead = sum((load == 0).sum().item() for load in loads.values())
    assert len(vio) == 2 and sum(load.sum() for load in loads.values()) == 2 * 2 * sum(map(len, rows))
    expected = {**vio, "moe_max_vio": max(vio.values()), "moe_dead_experts": dead, "moe_recorded": 1}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics.keys() - expected.keys() == {"moe_router_agreement", "moe_weight_difference"}
    assert callback.metrics() == {}
    callback.detach()
    callback.attach(model)
    train(model, rows)  # nothing was generated
    assert callback.metrics().keys() == {*vio, "moe_max_vio", "moe_dead_experts"}


def test_agreement_and_difference_of_weights_of_one_layer() -> None:
    model = tiny(num_hidden_layers=1)
    callback, seen = attached(model), Seen(model)
    rows = rollout(model)
    gate = model.model.layers[0].mlp.gate
    old = gate.weight.detach().clone()
    with torch.no_grad():
        gate.weight += 0.2 * torch.randn_like(old)
    hidden: list[Tensor] = []
    gate.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach().reshape(-1, 16)))
    train(model, rows)
    metrics = callback.metrics()

    mask = padded(rows)[1]
    x, texts = hidden[-1][mask.flatten().bool()].double(), [text for _, text, _, _ in seen.trained]
    agreed, slots, difference = 0, 0, 0.0
    for state, text, (_, _, ids, last) in zip(x, texts, seen.trained, strict=True):
        recorded = seen.generated.get(("model.layers.0.mlp.experts", text))
        if recorded is None:
            assert last
            continue
        now, then = ((state @ w.double().T).softmax(-1) for w in (gate.weight, old))
        assert ids in recorded and set(then.topk(2).indices.tolist()) == set(ids)
        agreed += len(set(now.topk(2).indices.tolist()) & set(ids))
        slots += 2
        chosen = torch.tensor(ids)
        change = now[chosen] / now[chosen].sum() - then[chosen] / then[chosen].sum()
        difference = max(difference, change.abs().max().item())
    assert agreed < slots and metrics["moe_router_agreement"] == pytest.approx(agreed / slots)
    assert metrics["moe_weight_difference"] == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_replay_of_equal_routing_changes_no_bit(kind: str) -> None:
    model = tiny(kind)
    callback = attached(model)
    rows = rollout(model)
    found = train(model, rows), grads(model)
    assert callback.metrics()["moe_router_agreement"] == 1
    callback.detach()
    model.zero_grad()
    assert torch.equal(found[0], train(model, rows))
    assert found[1].keys() == grads(model).keys()
    for name, grad in grads(model).items():
        assert torch.equal(found[1][name], grad), name
        assert (grad != 0).any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_replays_too(reentrant: bool) -> None:
    """Gradient checkpointing gives the gradients of the whole graph, and changes no metric."""
    model = tiny()
    callback = attached(model)
    rows = rollout(model)
    changed(model)
    train(model, rows)
    expected, metrics = grads(model), callback.metrics()
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    train(model, rows)
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert callback.metrics() == metrics and metrics["moe_router_agreement"] < 1


def test_rounding_in_bf16_changes_experts_and_replay_restores_them() -> None:
    model = tiny(num_hidden_layers=4).bfloat16()
    prompts = torch.randint(2, 32, (16, 6))
    free = attached(model, replay=False)
    seen = Seen(model)
    rows = rollout(model, prompts, new=24)
    train(model, rows)
    assert seen.wrong and free.metrics()["moe_router_agreement"] < 1
    free.detach()
    attached(model)
    seen.wrong.clear()
    rows = rollout(model, prompts, new=24)
    train(model, rows)
    assert not seen.wrong


def test_other_rows_are_routed_normally_and_counted() -> None:
    model = tiny()
    callback = attached(model)
    rows = rollout(model)
    other = [[3, 4, *rows[0]], [*rows[1][:-3], 31, 30, 29], [2, 3, 4]]
    changed(model)
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    seen, free = Seen(model), Seen(plain)
    train(model, [rows[0], *other])
    train(plain, [rows[0], *other])
    ours, theirs = ({(layer, text): ids for layer, text, ids, _ in each.trained} for each in (seen, free))
    for row in other:
        for layer in (0, 1):
            for end in range(1, len(row) + 1):
                at = f"model.layers.{layer}.mlp.experts", tuple(row[:end])
                assert ours[at] == theirs[at]
    assert ours != theirs
    share = (len(rows[0]) - 1) / sum(len(row) - 1 for row in [rows[0], *other])
    assert callback.metrics()["moe_recorded"] == pytest.approx(share)


def test_records_are_those_of_the_last_batch() -> None:
    """Several calls of `generate` are one batch; the first after a training pass begins another."""
    model = tiny()
    callback = attached(model)
    for _ in range(3):
        rows = rollout(model) + rollout(model, PROMPTS[1:3])
        changed(model)
        train(model, rows)
        train(model, rows)
        assert callback.metrics()["moe_recorded"] == 1
        sizes = {tuple(each.shape) for each in callback._records.ids.values()}
        ((size, top_k),) = sizes
        assert top_k == 2 and size <= 4 * (5 + 12) + 2 * (5 + 12) and len(callback._records.ids) == 2
        assert {each.dtype for each in callback._records.ids.values()} == {torch.int16}


def test_evaluation_is_left_alone() -> None:
    model = tiny()
    callback = attached(model)
    rows = rollout(model)
    seen = Seen(model)
    changed(model)
    model.eval()
    evaluated = rollout(model)
    with torch.no_grad():
        train(model, evaluated)
        train(model, rows)
    assert callback.metrics() == {}
    plain = {(layer, text): ids for layer, text, ids, _ in seen.trained}
    model.train()
    seen.trained.clear()
    train(model, rows)
    assert callback.metrics()["moe_recorded"] == 1  # records survive
    assert any(plain[layer, text] != ids for layer, text, ids, _ in seen.trained)


def test_nothing_is_left_after_detaching() -> None:
    model = tiny()
    callback = attached(model)
    callback.attach(model)  # again, after an interrupted run
    rollout(model)
    callback.detach()
    callback.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not callback._records.ids and callback._generation is None


def test_what_cannot_be_recorded_is_refused() -> None:
    model, callback = tiny(), ReplayCallback()

    def begin(model: Any = model, **settings: Any) -> None:
        callback.on_train_begin(SimpleNamespace(**settings), None, None, model=model)

    for name in ("use_vllm", "use_transformers_continuous_batching", "torch_compile"):
        with pytest.raises(ConfigError, match=rf"^{name} = True: expected False, because routing cannot be recorded$"):
            begin(**{name: True})
    for name, value, only in (("use_cache", False, True), ("num_beams", 2, 1)):
        with pytest.raises(
            ConfigError, match=rf"^generation_kwargs: {name} = {value}: expected {only}, because routing"
        ):
            begin(generation_kwargs={name: value})
    model.set_experts_implementation("eager")
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.experts: experts_implementation = 'eager'"):
        begin()
    sizes: Any = HEADS | {"num_local_experts": E}
    sparse = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**sizes))
    sparse.set_experts_implementation("moesmith")
    with pytest.raises(ConfigError) as caught:
        begin(sparse)
    assert str(caught.value) == (
        "PhimoeForCausalLM: modules beside model.layers.0.mlp.experts = 'PhimoeTopKRouter': "
        "expected one router of moe.integrations.trl.ROUTERS"
    )
    assert not any(m._forward_hooks for m in model.modules())

    model.set_experts_implementation("moesmith")
    begin(generation_kwargs={"use_cache": True})
    with pytest.raises(
        ConfigError, match=r"^attention_mask of generate = '\w+': expected 2-D, as with the dynamic cache$"
    ):
        rollout(model, cache_implementation="static")
    cache = transformers.DynamicCache()
    tokens = torch.full((1, 5), 3)
    with torch.no_grad():
        model(input_ids=tokens, **cached(cache))
        model(input_ids=tokens[:, :1], **cached(cache))
        cache.crop(-2)
        with pytest.raises(
            ConfigError, match=r"^tokens in the cache of generate = 4: expected 6, because as many were"
        ):
            model(input_ids=tokens[:, :1], **cached(cache))


def cached(cache: Any) -> dict[str, Any]:
    """The argument for a KV cache, by its name in the installed transformers."""
    names = inspect.signature(transformers.MixtralModel.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def test_a_router_whose_weights_do_not_follow_from_its_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    gate = type(model.model.layers[0].mlp.gate)
    forward = gate.forward

    def noisy(self: Any, x: Tensor) -> Any:
        logits, weights, ids = forward(self, x)
        return logits, weights * torch.rand_like(weights), ids

    monkeypatch.setattr(gate, "forward", noisy)
    attached(model)
    with pytest.raises(
        ConfigError, match=r"^model\.layers\.0\.mlp\.gate: router = 'MixtralTopKRouter': expected a router"
    ):
        rollout(model)
