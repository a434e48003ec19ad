"""The transformer against transformers' models and modules, its cache, its masks, and compilation."""

import dataclasses
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe
from moe.attention import MLA, softmax_scale
from moe.cache import Cache
from moe.loss import next_token_loss
from moe.model import Transformer
from moe.rope import inverse_frequencies, rope_tables
from moe.uncast import Uncast
from tests.support.models import GROUPED, SMALL

YARN = moe.RopeParameters(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=8, mscale=0.7, mscale_all_dim=1.0
)
SHAPES = {
    "mla": SMALL,
    "mla-no-q-lora": dataclasses.replace(SMALL, q_lora_rank=None),
    "mla-yarn": dataclasses.replace(SMALL, rope_parameters=YARN),
    "mla-wide-v": dataclasses.replace(SMALL, v_head_dim=16, kv_lora_rank=40),
    "gqa": GROUPED,
    "gqa-tied": dataclasses.replace(GROUPED, tie_word_embeddings=True, qk_norm="none", attention_bias=True),
}


def model_of(config: moe.ModelConfig, **options: Any) -> Transformer:
    model = Transformer(config, **options).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("norm.weight", "bias")):  # ones and zeros would hide a swap
                tensor.copy_(torch.linspace(-0.3, 0.4, tensor.numel()) + (0 if name.endswith("bias") else 1))
    return model


def close(found: Tensor, expected: Tensor, relative: float = 2e-5) -> None:
    """Within `relative` of the largest value, which must be worth comparing to."""
    scale = expected.abs().max()
    assert scale > 0.1
    assert (found - expected).abs().max() <= relative * scale


@pytest.mark.parametrize("name", SHAPES)
def test_cache_equals_no_cache(name: str) -> None:
    model = model_of(SHAPES[name])
    ids = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        full = model(ids).logits
        for cuts in ((1,) * 40, (13,) + (1,) * 27, (5, 9, 1, 25), (20, 20), (40,)):
            cache = Cache(model.config)
            pieces = [model(part, cache=cache).logits for part in ids.split(list(cuts), dim=1)]
            close(torch.cat(pieces, 1), full)
            assert cache.length == 40


def test_absorbed_equals_expanded_for_any_number_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(SHAPES["mla-yarn"]).double()
    ids = torch.randint(0, 61, (2, 30))
    results = []
    for absorb in (True, False):
        monkeypatch.setattr(MLA, "_absorbing_is_cheaper", lambda *_, answer=absorb: answer)
        cache = Cache(model.config)
        with torch.no_grad():
            results.append(torch.cat([model(part, cache=cache).logits for part in ids.split([9, 4, 1, 16], dim=1)], 1))
    close(results[0], results[1], 1e-12)


def test_latent_cache_size() -> None:
    config = dataclasses.replace(moe.preset("deepseek_v3"), num_hidden_layers=1, first_k_dense_replace=1)
    config = dataclasses.replace(config, vocab_size=16, hidden_size=32, intermediate_size=16, num_attention_heads=2)
    model = Transformer(config).to(torch.bfloat16).eval()
    cache = Cache(config)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)
        model(torch.zeros(1, 97, dtype=torch.int64), cache=cache)
    assert cache.nbytes * 61 == 70_272 * 100  # bytes a token over 61 layers, from DeepSeek's own sizes


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_position_and_no_loss(side: str) -> None:
    model = model_of(dataclasses.replace(SMALL, num_nextn_predict_layers=2)).double().train()
    ids = torch.randint(0, 61, (2, 12))
    padded = torch.randint(0, 61, (2, 17))
    mask = torch.zeros(2, 17, dtype=torch.int64)
    window = slice(5, 17) if side == "left" else slice(0, 12)
    padded[:, window], mask[:, window] = ids, 1
    plain, with_padding = model(ids, labels=ids), model(padded, labels=padded, attention_mask=mask)
    close(with_padding.logits[:, window], plain.logits, 1e-12)
    for name in ("ce", "mtp"):
        assert with_padding.losses[name].item() == pytest.approx(plain.losses[name].item(), rel=1e-12)
    assert with_padding.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    assert torch.equal(plain.load, with_padding.load)


def test_documents_see_and_predict_only_themselves() -> None:
    model = model_of(dataclasses.replace(SMALL, num_nextn_predict_layers=1)).double().train()
    a, b = torch.randint(0, 61, (1, 7)), torch.randint(0, 61, (1, 9))
    packed = torch.cat((a, b), 1)
    documents = torch.tensor([[3] * 7 + [4] * 9])
    out = model(packed, labels=packed, document_ids=documents)
    alone = [model(x, labels=x) for x in (a, b)]
    close(out.logits, torch.cat([o.logits for o in alone], 1), 1e-12)
    for part, lost in (("ce", 1), ("mtp", 2)):
        counts = [7 - lost, 9 - lost]
        expected = sum(o.losses[part].item() * n for o, n in zip(alone, counts, strict=True)) / sum(counts)
        assert out.losses[part].item() == pytest.approx(expected, rel=1e-12)


def test_loss_is_the_shifted_cross_entropy() -> None:
    model = model_of(SMALL)
    ids = torch.randint(0, 61, (2, 9))
    labels = ids.clone()
    labels[0, 3:6] = -100
    out = model(ids, labels=labels)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert out.loss is not None and out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert set(out.losses) == {"ce"}
    nothing = model(ids, labels=torch.full_like(ids, -100))
    assert nothing.loss is not None and nothing.loss.item() == 0
    close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])


def test_ids_and_labels_may_be_int32() -> None:
    model, ids = model_of(SHAPES["gqa-tied"]), torch.randint(0, 61, (2, 24))
    wide, narrow = (model(i, labels=i, document_ids=torch.zeros_like(i)) for i in (ids, ids.int()))
    assert wide.loss is not None and narrow.loss is not None and torch.equal(wide.loss, narrow.loss)


def test_positions_may_be_negative() -> None:
    """Rotations are relative, so left padding may be counted from below zero."""
    model, ids = model_of(SMALL).double(), torch.randint(0, 61, (2, 9))
    close(model(ids, position_ids=torch.arange(-20, -11).expand(2, 9)).logits, model(ids).logits, 1e-12)


@pytest.mark.parametrize("wrong", [-1, -100, 61, 2**31 - 1])
def test_ids_and_labels_out_of_range_are_named(wrong: int) -> None:
    model = model_of(dataclasses.replace(SMALL, num_nextn_predict_layers=2)).train()
    ids = torch.randint(0, 61, (2, 9))
    bad = ids.clone()
    bad[1, 4] = wrong
    with pytest.raises(IndexError, match=rf"^input_ids\[1, 4\] = {wrong}: expected 0 to 60$"):
        model(bad, labels=ids)
    if wrong != -100:
        with pytest.raises(IndexError, match=rf"^labels\[1, 4\] = {wrong}: expected 0 to 60, or -100$"):
            model(ids, labels=bad)
        padding = torch.ones_like(ids)
        padding[1, 4:] = 0
        assert model(ids, labels=bad, attention_mask=padding).loss.isfinite()
        # A label that mtp.1 alone predicts, since its document begins before.
        with pytest.raises(IndexError, match=rf"^labels\[1, 4\] = {wrong}: "):
            model(ids, labels=bad.index_fill(1, torch.tensor([5]), -100), document_ids=torch.zeros_like(ids))


PACKED = [[4, 7, 5], [1, 2, 3, 9, 1], [16], [2, 14]]


@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_mtp_of_packed_documents_is_that_of_each_alone(lengths: list[int]) -> None:
    """Loads and all losses equal those of the documents one by one and as a padded batch."""
    config = dataclasses.replace(
        SMALL, num_nextn_predict_layers=2, aux_loss_alpha=0.1, router_z_loss_coef=0.01, seq_aux=False
    )
    model = model_of(config).double().train()
    documents = [torch.randint(0, 61, (1, length)) for length in lengths]
    ids = torch.cat(documents, 1)
    which = torch.repeat_interleave(torch.tensor(lengths)).expand(1, -1)
    packed = model(ids, labels=ids, document_ids=which)
    rows, mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64), torch.zeros(len(lengths), max(lengths))
    for row, real, document in zip(rows, mask, documents, strict=True):
        row[: document.shape[1]], real[: document.shape[1]] = document[0], 1
    padded = model(rows, labels=rows, attention_mask=mask.long())
    alone = [model(document, labels=document) for document in documents]
    loads = [nn.functional.pad(out.load, (0, 0, 0, len(packed.load) - len(out.load))) for out in alone]
    load = torch.stack(loads).sum(0)
    assert torch.equal(packed.load, load) and torch.equal(padded.load, load)
    for name, value in padded.losses.items():
        assert packed.losses[name].item() == pytest.approx(value.item(), rel=1e-12), name


def random_batch(rows: int, length: int) -> dict[str, Tensor]:
    """Some labels left out, padding on either side, packed documents."""
    ids, at = torch.randint(0, 61, (rows, length)), torch.arange(length)
    cut = torch.randint(0, length + 1, (rows, 1))
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(torch.rand(rows, length) < torch.rand(rows, 1), -100),
        "attention_mask": torch.where(torch.rand(rows, 1) < 0.5, at < cut, at >= cut).long(),
        "document_ids": (torch.rand(rows, length) < 0.3).long().cumsum(1),
    }


@pytest.mark.parametrize("seq_aux", [True, False])
def test_counts_are_those_of_the_losses(seq_aux: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(
        SMALL, num_nextn_predict_layers=3, aux_loss_alpha=0.1, router_z_loss_coef=0.01, seq_aux=seq_aux
    )
    model, seen = model_of(config).train(), []
    monkeypatch.setattr(model.global_batch, "weigh", lambda means, *rest: seen.append(rest) or list(means))
    for length in (1, 2, 3, 11):
        batch = random_batch(5, length)
        for left_out in ((), ("attention_mask",), ("document_ids",), ("labels",), ("attention_mask", "document_ids")):
            given = {name: tensor for name, tensor in batch.items() if name not in left_out}
            counts = model.loss_counts(**given)
            assert len(counts) == (8 if "labels" in left_out else 12)
            model(**given)
            found, keys = seen.pop()
            assert len(keys) >= 3 and {"balance.0", "z.0"} <= set(keys)
            for key, count in zip(keys, found, strict=True):
                assert count == counts[key], (key, length, left_out)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("labelled", [True, False])
def test_micro_batches_of_a_step_are_one_batch(labelled: bool, empty: bool) -> None:
    """Gradients and losses of unequal micro-batches, one of them possibly empty, against those of all rows."""
    config = dataclasses.replace(SMALL, num_nextn_predict_layers=2, aux_loss_alpha=0.1, router_z_loss_coef=0.01)
    micro = [random_batch(rows, 11) for rows in (1, 3, 2)]
    if empty:
        micro[1] = {**micro[1], "attention_mask": torch.zeros(3, 11, dtype=torch.int64)}
    whole = {name: torch.cat([batch[name] for batch in micro]) for name in micro[0]}
    if not labelled:
        for batch in (whole, *micro):
            del batch["labels"]
    alone, model = (model_of(config).double().train() for _ in range(2))

    def value(out: Any) -> Tensor:
        return out.hidden.sum() if out.loss is None else out.loss

    one = alone(**whole)
    value(one).backward()
    losses: dict[str, float] = {}
    with model.global_batch.step([model.loss_counts(**batch) for batch in micro]):
        for batch in micro:
            out = model(**batch)
            value(out).backward()
            for name, part in (*out.losses.items(), ("sum", value(out))):
                losses[name] = losses.get(name, 0.0) + part.item()
    assert losses == pytest.approx({**{n: v.item() for n, v in one.losses.items()}, "sum": value(one).item()}, rel=1e-9)
    for (name, found), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-11, msg=name)
    assert torch.equal(value(model(**micro[0])), value(alone(**micro[0]))), "the step is over"


def test_a_step_of_nothing_has_a_loss_of_zero() -> None:
    model = model_of(dataclasses.replace(SMALL, num_nextn_predict_layers=1, aux_loss_alpha=0.1)).train()
    batch = {**random_batch(2, 5), "attention_mask": torch.zeros(2, 5, dtype=torch.int64)}
    with model.global_batch.step([model.loss_counts(**batch)] * 2):
        for _ in range(2):
            out = model(**batch)
            out.loss.backward()
            assert out.loss == 0 and not any(out.losses.values())
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_step_requires_the_counts_of_its_losses() -> None:
    model, ids = model_of(SMALL).train(), torch.randint(0, 61, (2, 5))
    with (
        pytest.raises(ValueError, match=r"expected counts of all terms; found none of ce\.0"),
        model.global_batch.step([model.loss_counts(ids)]),
    ):
        model(ids, labels=ids)
    assert model(ids, labels=ids).loss is not None


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_cache_forgets_and_selects(name: str) -> None:
    model = model_of(SHAPES[name]).double()
    ids = torch.randint(0, 61, (3, 20))
    with torch.no_grad():
        cache = Cache(model.config)
        model(ids, cache=cache)
        cache.truncate(12)
        cache.select(torch.tensor([2, 0]))
        again = torch.randint(0, 61, (2, 5))
        found = model(again, cache=cache).logits
        expected = model(torch.cat((ids[[2, 0], :12], again), 1)).logits[:, 12:]
        close(found, expected, 1e-12)
        with pytest.raises(ValueError, match="the cache holds 2 sequences: found 1"):
            model(again[:1], cache=cache)
        with pytest.raises(ValueError, match="length = 18: expected 0 to 17"):
            cache.truncate(18)
        cache.truncate(0)
        close(model(ids[:1], cache=cache).logits, model(ids[:1]).logits, 1e-12)


def test_mtp_is_transformers_mtp_layer() -> None:
    """eh_proj's order, the norms, the block and the head, against an implementation that is not ours."""
    from transformers import DeepseekV3Config
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

    config = dataclasses.replace(SMALL, num_nextn_predict_layers=1)
    model = model_of(config).train()
    hf = DeepseekV3Config(
        **{f: getattr(config, f) for f in ("vocab_size", "hidden_size", "moe_intermediate_size", "kv_lora_rank")},
        **{f: getattr(config, f) for f in ("n_routed_experts", "n_shared_experts", "q_lora_rank", "v_head_dim")},
        **{f: getattr(config, f) for f in ("qk_nope_head_dim", "qk_rope_head_dim", "n_group", "topk_group")},
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts_per_tok=3,
        first_k_dense_replace=0,
        num_hidden_layers=3,
    )
    hf._attn_implementation = "eager"
    theirs = MtpLayer(hf, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, 0)
    names = {"norm.weight": "post_norm.weight"}
    state = model.mtp[0].state_dict()
    theirs.load_state_dict({names.get(k, k.replace("block.", "mtp_block.")): v for k, v in state.items()})

    ids = torch.randint(0, 61, (2, 11))
    out = model(ids, labels=ids)
    cos, sin = rope_tables(config.rope_parameters, config.rope_dim, torch.arange(10).expand(2, 10))
    tables = (torch.cat((cos, cos), -1).squeeze(2), torch.cat((sin, sin), -1).squeeze(2))
    causal = torch.full((10, 10), float("-inf")).triu(1)[None, None]
    embedding = model.embed_tokens(ids[:, 1:])
    h = theirs(embedding, out.hidden[:, :-1], tables, causal, None, None)
    logits = model.head(h)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 2:].flatten())
    assert out.losses["mtp"].item() == pytest.approx(expected.item(), rel=1e-5)
    ours, _ = model.mtp[0](out.hidden[:, :-1], embedding, Uncast(cos, sin), None, None)
    close(ours, h)
    assert out.loss is not None
    total = out.losses["ce"] + 0.3 * out.losses["mtp"]
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-6)


def test_second_mtp_module_reads_the_first() -> None:
    model = model_of(dataclasses.replace(SMALL, num_nextn_predict_layers=2)).train()
    ids = torch.randint(0, 61, (1, 8))
    out = model(ids, labels=ids)
    rope = rope_tables(SMALL.rope_parameters, SMALL.rope_dim, torch.arange(8)[None])
    first, _ = model.mtp[0](
        out.hidden[:, :7], model.embed_tokens(ids[:, 1:]), Uncast(*(t[:, :7] for t in rope)), None, None
    )
    rope = Uncast(*(t[:, :6] for t in rope))
    second, _ = model.mtp[1](first[:, :6], model.embed_tokens(ids[:, 2:]), rope, None, None)
    one = next_token_loss(model.head(first), ids, 2, None, None).value
    two = nn.functional.cross_entropy(model.head(second)[0, :5], ids[0, 3:])
    assert out.losses["mtp"].item() == pytest.approx((one.item() + two.item()) / 2, rel=1e-6)
    short = model(ids[:, :1], labels=ids[:, :1])  # no token ahead: no MTP loss, and no NaN
    assert short.loss is not None and short.loss.item() == 0


def family(name: str) -> tuple[moe.ModelConfig, nn.Module]:
    """A tiny transformers model of a grouped-query family and our config of the same shape."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "num_experts_per_tok": 3, "initializer_range": 0.3, "rms_norm_eps": 1e-5}
    common = moe.ModelConfig(
        **shape,
        intermediate_size=20,
        moe_intermediate_size=20,
        n_routed_experts=6,
        scoring_func="softmax",
        topk_method="greedy",
        rope_parameters=moe.RopeParameters(1e6),
    )
    rope = {"rope_type": "default", "rope_theta": 1e6}
    if name == "mixtral":
        theirs = MixtralConfig(**shape, intermediate_size=20, num_local_experts=6, rope_parameters=rope)
        return common, MixtralForCausalLM(theirs)
    shape |= {"head_dim": 8}  # not a declared parameter of the class
    theirs = Qwen3MoeConfig(**shape, moe_intermediate_size=20, num_experts=6, norm_topk_prob=True, rope_parameters=rope)
    return dataclasses.replace(common, head_dim=8, qk_norm="head"), Qwen3MoeForCausalLM(theirs)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_grouped_query_shapes_match_transformers(name: str) -> None:
    config, theirs = family(name)
    model = Transformer(config).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "norm" in key:
                p.copy_(torch.linspace(0.5, 1.5, p.numel()))
    state = {key.removeprefix("model."): value for key, value in theirs.state_dict().items()}
    model.load_state_dict(state)
    ids = torch.randint(0, 61, (2, 21))
    with torch.no_grad():
        close(model(ids).logits, theirs.eval()(ids).logits)
        mask = torch.ones_like(ids)
        mask[0, :6] = 0
        ours = model(ids, attention_mask=mask).logits
        expected = theirs(ids, attention_mask=mask).logits
        close(ours[mask.bool()], expected[mask.bool()])


def test_yarn_by_hand_and_from_transformers() -> None:
    """The numbers of DeepSeek-V3's own configuration, then transformers' function over other settings."""
    v3, lite = moe.preset("deepseek_v3"), moe.preset("deepseek_v2_lite")
    assert softmax_scale(v3) == pytest.approx(0.135234, abs=5e-7)
    assert softmax_scale(lite) == pytest.approx(0.114721, abs=5e-7)
    frequencies = inverse_frequencies(v3.rope_parameters, 64, torch.device("cpu"))
    plain = 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(frequencies[:11].double(), plain[:11], rtol=1e-6, atol=0)
    torch.testing.assert_close(frequencies[23:].double(), plain[23:] / 40, rtol=1e-6, atol=0)
    assert (frequencies[11:23] < plain[11:23]).all() and (frequencies[11:23] > plain[11:23] / 40).all()

    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for factor, mscale, all_dim, original in itertools.product((1.0, 40.0), (0.707, 1.0), (None, 1.3), (64, 4096)):
        values = {"rope_theta": 1e4, "factor": factor, "mscale": mscale, "mscale_all_dim": all_dim}
        values |= {"original_max_position_embeddings": original, "rope_type": "yarn"}
        given = {k: v for k, v in values.items() if v is not None}
        config = DeepseekV3Config(qk_rope_head_dim=64, max_position_embeddings=163840, rope_parameters=dict(given))
        expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
        ours = moe.RopeParameters(**given)
        assert torch.equal(inverse_frequencies(ours, 64, torch.device("cpu")), expected)
        cos, _ = rope_tables(ours, 64, torch.zeros(1, 1, dtype=torch.int64))
        assert cos[0, 0, 0, 0].item() == pytest.approx(attention_factor, rel=1e-6)


def test_activation_checkpointing_changes_no_bit() -> None:
    config = dataclasses.replace(SMALL, num_nextn_predict_layers=1, aux_loss_alpha=0.01)
    ids = torch.randint(0, 61, (2, 12))
    results = []
    for on in (False, True):
        model = model_of(config).train()
        model.set_activation_checkpointing(on)
        loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_same_seed_same_bits_and_no_global_generator() -> None:
    state = torch.get_rng_state()
    a, b, c = (Transformer(SMALL, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    first, other = (model.get_parameter("layers.1.mlp.gate.weight") for model in (a, c))
    assert not torch.equal(first, other)
    assert not torch.equal(first, a.get_parameter("layers.2.mlp.gate.weight"))


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "mixtral_8x7b", "qwen3_30b_a3b"])
def test_presets_build_on_meta(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(moe.preset(name))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    totals = {"mixtral_8x7b": 46_702_792_704, "qwen3_30b_a3b": 30_532_122_624, "deepseek_v2_lite": 15_706_484_224}
    if name in totals:
        assert sum(p.numel() for p in model.parameters()) == totals[name]


def test_model_compiles_with_dynamic_shapes_and_trains() -> None:
    torch._dynamo.reset()
    config = dataclasses.replace(SMALL, num_hidden_layers=2, num_nextn_predict_layers=1, aux_loss_alpha=0.01)
    model = model_of(config).double().train()  # compiled, CPU attention sums in another order
    run = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (6, 9):
        ids = torch.randint(0, 61, (2, length))
        results = []
        for f in (model, run):
            model.zero_grad()
            out = f(ids, labels=ids)
            assert out.loss is not None
            out.loss.backward()
            results.append([out.loss.detach(), out.load, *(p.grad for p in model.parameters())])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


def test_bf16_autocast_trains_with_fp32_weights() -> None:
    model = model_of(SMALL).train()
    ids = torch.randint(0, 61, (2, 12))
    exact = model(ids, labels=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids)
    assert out.loss is not None and exact.loss is not None and out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    assert out.loss.item() != exact.loss.item()
    out.loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


TOKENS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": TOKENS[0]}, ValueError, "input_ids has shape (5,): expected [B, S]"),
        ({"input_ids": TOKENS[0, 0]}, ValueError, "input_ids has shape (): expected [B, S]"),
        ({"input_ids": TOKENS[None]}, ValueError, "input_ids has shape (1, 2, 5): expected [B, S]"),
        ({"input_ids": TOKENS.float()}, TypeError, "input_ids is torch.float32: expected int64"),
        # As wide as the model: a tied head would take it for hidden states.
        ({"input_ids": torch.ones(24, 24)}, TypeError, "input_ids is torch.float32: expected int64"),
        ({"input_ids": TOKENS.bool()}, TypeError, "input_ids is torch.bool: expected int64"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids is a list: expected a tensor, int64 [B, S]"),
        ({"input_ids": TOKENS + 61}, IndexError, "input_ids[0, 0] = 61: expected 0 to 60"),
        ({"input_ids": TOKENS - 3}, IndexError, "input_ids[0, 0] = -3: expected 0 to 60"),
        ({"labels": TOKENS.float()}, TypeError, "labels is torch.float32: expected int64 or int32"),
        ({"labels": TOKENS.bool()}, TypeError, "labels is torch.bool: expected int64 or int32"),
        ({"labels": TOKENS.byte()}, TypeError, "labels is torch.uint8: expected int64 or int32"),
        ({"labels": True}, TypeError, "labels is a bool: expected a tensor (2, 5)"),
        ({"labels": TOKENS[:, 1:]}, ValueError, "labels has shape (2, 4): expected (2, 5)"),
        ({"labels": TOKENS, "logits_to_keep": 1}, ValueError, "labels need the logits of all positions"),
        ({"logits_to_keep": -1}, ValueError, "logits_to_keep = -1"),
        ({"position_ids": torch.arange(5)[None]}, ValueError, "position_ids has shape (1, 5): expected (2, 5)"),
        ({"position_ids": TOKENS.float()}, ValueError, "position_ids is floating point: expected integers"),
        ({"document_ids": TOKENS.float()}, ValueError, "document_ids is floating point: expected integers"),
        ({"attention_mask": TOKENS.float()}, ValueError, "attention_mask is floating point: expected booleans or"),
        ({"attention_mask": TOKENS[:, 1:]}, ValueError, "attention_mask has shape (2, 4): expected (2, 5)"),
        ({"attention_mask": [[1] * 5] * 2}, TypeError, "attention_mask is a list: expected a tensor (2, 5)"),
        ({"cache": {}}, TypeError, "cache is a dict: expected a moe.cache.Cache"),
    ],
)
def test_a_wrong_call_names_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    for config in (SMALL, SHAPES["gqa-tied"]):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            Transformer(config)(**{"input_ids": TOKENS, **arguments})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("tiny", "config = 'tiny': expected a ModelConfig, such as moe.preset('tiny'); moe.load reads a folder"),
        ("mixtral_8x7b", "expected a ModelConfig, such as moe.preset('mixtral_8x7b')"),
        ({"vocab_size": 3}, "config = {'vocab_size': 3}: expected a ModelConfig, such as moe.preset('tiny')"),
        (None, "config = None: expected a ModelConfig"),
    ],
)
def test_a_model_is_made_of_a_config(config: Any, message: str) -> None:
    with pytest.raises(moe.ConfigError, match=re.escape(message)):
        Transformer(config)


def test_a_model_shows_its_sizes() -> None:
    for config, attention in (
        (SMALL, "heads=2, latent=12, nope=6, rope=4, value=8"),
        (GROUPED, "heads=2, kv_heads=1, head_dim=6, rope_dim=6, qk_norm=head, sinks=False"),
    ):
        model = Transformer(config)
        shown = repr(model)
        count = sum(p.numel() for p in model.parameters())
        assert shown.startswith(
            f"Transformer(\n  deepseek_v3, {count:,} parameters\n  (embed_tokens): Embedding(61, 24)\n"
        )
        assert shown.count(f"\n        {attention}\n") == 2  # of three layers, two are alike
        assert (
            "Experts(num_experts=8, width=24, hidden=16, bias=False)" in shown and "RMSNorm((24,), eps=1e-06" in shown
        )
