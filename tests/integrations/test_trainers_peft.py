"""PEFT's adapters on models of ours, in transformers' Trainer and in plain loops."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

from transformers import Trainer, TrainingArguments

import moe
from moe import balance
from moe.integrations.transformers import BalanceCallback

peft: Any = pytest.importorskip("peft")
# PEFT knows that transformers has the experts of this model_type stacked, under names of which ours are some; and that
# "all-linear" means lm_head too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*embedding layer:UserWarning:peft"),
]
CONFIG: Any = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
CONFIG |= dict(moe_intermediate_size=12, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=1)
CONFIG |= dict(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6, aux_loss_alpha=0.02)
IDS = torch.randint(0, 61, (8, 10), generator=torch.Generator().manual_seed(0))
DATA: Any = [{"input_ids": ids, "labels": ids} for ids in IDS]


def adapted(**settings: Any) -> Any:
    torch.manual_seed(0)
    model: Any = moe.Transformer(moe.ModelConfig(**CONFIG)).train()
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **{"target_modules": "all-linear"} | settings))


def test_adapters_train_in_the_trainer_and_are_saved(tmp_path: Path) -> None:
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings: Any = dict(max_steps=3, learning_rate=0.05, save_strategy="no", report_to=[], disable_tqdm=True)
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, **settings)
    run = Trainer(model, arguments, train_dataset=DATA, callbacks=[BalanceCallback(0.25)])
    run.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    biases = {name for name in before if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2 and changed > biases and all("lora_" in name for name in changed - biases)
    assert {"q_proj", "kv_b_proj", "gate", "experts"} <= {name.split(".")[-4] for name in changed - biases}

    logits = model.eval()(IDS).logits
    run.save_model(str(tmp_path / "adapter"))
    whole: Any = moe.Transformer(moe.ModelConfig(**CONFIG))
    loaded: Any = peft.PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()
    for (_, router), (_, trained) in zip(balance.routers(loaded), balance.routers(model), strict=True):
        router.e_score_correction_bias.copy_(trained.e_score_correction_bias)  # no adapter has it
    assert torch.equal(loaded(IDS).logits, logits)
    merged = model.merge_and_unload()
    assert type(merged) is moe.Transformer
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    merged.save(tmp_path / "merged")
    torch.testing.assert_close(moe.load(tmp_path / "merged")(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_router_that_is_trained_whole() -> None:
    """The copy that PEFT makes of it counts and is balanced, if the model is wrapped before it is attached."""
    model = adapted(target_modules=["q_proj"], modules_to_save=["gate"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle = balance.attach(model, optimizer, bias_update_speed=0.25)
    out = model(IDS, labels=IDS)
    out.loss.backward()
    optimizer.step()
    loads = {name: load for name, load in handle.loads().items() if load.sum() > 0}
    assert [name.endswith("gate.modules_to_save.default") for name in loads] == [True, True]
    assert torch.equal(torch.stack(list(loads.values())), out.load)
    for name, router in balance.routers(model):
        load = loads.get(name, torch.zeros(6))
        assert torch.equal(router.e_score_correction_bias, 0.25 * torch.sign(load.double().mean() - load).float())
