"""TRL's trainers with models of transformers: our experts beside eager ones, and replayed routing."""

import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moe
import moe.integrations.transformers as integration
from moe.integrations.trl import ReplayCallback
from tests.conftest import ROOT
from tests.support.routed import Seen

trl: Any = pytest.importorskip("trl")
datasets: Any = pytest.importorskip("datasets")
# TRL's own: it sets an option by the name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`\\w*gradient_checkpointing\\w*` is deprecated:FutureWarning")
integration.register()
WORDS = ["the", "expert", "that", "a", "token", "chooses", "is", "of", "no", "other", "than", "it"]


def tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *dict.fromkeys(WORDS)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    names: Any = dict(pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def test_fine_tuning_equals_eager(tmp_path: Path) -> None:
    texts = [" ".join(WORDS[i % 5 :: 1 + i % 3]) for i in range(8)]
    sizes: Any = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2) | {"num_local_experts": 6}
    whole = MixtralForCausalLM(
        MixtralConfig(vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, **sizes)
    )

    def train(implementation: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = copy.deepcopy(whole)
        model.set_experts_implementation(implementation)
        settings: Any = dict(max_steps=4, learning_rate=0.01, per_device_train_batch_size=2, report_to=[])
        settings |= dict(gradient_accumulation_steps=2, logging_steps=1, save_strategy="no", disable_tqdm=True)
        arguments = trl.SFTConfig(str(tmp_path / implementation), use_cpu=True, bf16=False, max_length=16, **settings)
        data = datasets.Dataset.from_list([{"text": text} for text in texts])
        callbacks = [ReplayCallback()] if implementation == "moesmith" else []
        run = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks)
        run.train()
        for entry in run.state.log_history[:-1] if callbacks else []:
            assert 0 <= entry["moe_max_vio"] <= 2 and "moe_dead_experts" in entry and "moe_recorded" not in entry
            assert sum(name.startswith("moe_max_vio/") for name in entry) == 2
        assert implementation == "eager" or len(integration.check(run.model)) == 2
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry], model.state_dict()

    (ours, weights), (theirs, exact) = train("moesmith"), train("eager")
    assert ours == pytest.approx(theirs, rel=1e-4) and ours[-1] < ours[0]
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, exact[name], rtol=1e-3, atol=1e-4, msg=name)


CONFIG = moe.ModelConfig(
    model_type="deepseek_v3",
    vocab_size=16,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    moe_intermediate_size=12,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    initializer_range=0.3,
)
PROMPTS = ["the expert that a token chooses", "a token", "no other than it", "of the expert"]
# Many words, so that advantages differ from zero.
REWARDS: Any = [lambda completions, **_: [float(len(set(text.split()))) for text in completions]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported moe.Transformer with a tokenizer."""
    where = tmp_path_factory.mktemp("exported") / "model"
    torch.manual_seed(0)
    moe.save(moe.Transformer(CONFIG), where)
    tokenizer().save_pretrained(where)
    return where


def grpo(folder: Path, out: Path, callback: ReplayCallback, model: Any = None, **options: Any) -> Any:
    model = model or AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moesmith")
    peft_config = options.pop("peft_config", None)
    settings: Any = dict(max_steps=4, learning_rate=0.02, per_device_train_batch_size=4, report_to=[], logging_steps=1)
    settings |= dict(num_generations=4, max_completion_length=8, save_strategy="no", disable_tqdm=True, bf16=False)
    arguments = trl.GRPOConfig(str(out), use_cpu=True, **settings | options)
    data = datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    words = AutoTokenizer.from_pretrained(folder)
    sets: Any = dict(train_dataset=data, eval_dataset=data, processing_class=words, callbacks=[callback])
    return trl.GRPOTrainer(model, REWARDS, arguments, peft_config=peft_config, **sets)


def qwen3_moe() -> Any:
    sizes: Any = dict.fromkeys(("hidden_size", "moe_intermediate_size", "vocab_size"), 16) | {"num_experts": 8}
    sizes |= dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_experts_per_tok"), 2) | {"head_dim": 8}
    config = Qwen3MoeConfig(**sizes, num_hidden_layers=3, mlp_only_layers=[0], intermediate_size=16)
    model = Qwen3MoeForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation("moesmith")
    return model


SCHEDULES: dict[str, dict[str, Any]] = {
    "aligned": dict(gradient_accumulation_steps=2),
    # Old log-probabilities, several iterations over batches that are split and shuffled, evaluation in between.
    "iterations": dict(
        num_iterations=2, steps_per_generation=4, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1
    ),
    "autocast": dict(num_iterations=2, bf16=True),
    "reference": dict(num_iterations=2, beta=0.1, gradient_checkpointing=False, generation_batch_size=16),
    "balance loss": dict(num_iterations=2, router_aux_loss_coef=0.01),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_grpo_trains_with_the_experts_of_generation(folder: Path, tmp_path: Path, schedule: str) -> None:
    """Element by element at the experts; the routers learn; values are logged; nothing is left."""
    callback = ReplayCallback()
    # TRL's balance loss requires a config of which DeepSeek-V3's has no part.
    model = qwen3_moe() if schedule == "balance loss" else None
    run = grpo(folder, tmp_path, callback, model, **SCHEDULES[schedule])
    seen = Seen(run.model)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.train()
    assert seen.trained and not seen.wrong
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 4 and all(entry["moe_recorded"] == 1 for entry in logs)
    changed = [entry["moe_router_agreement"] < 1 and entry["moe_weight_difference"] > 1e-3 for entry in logs]
    # The policy differs from the one that generated, but not in the first step of each batch.
    every = run.args.steps_per_generation * run.num_iterations // run.args.gradient_accumulation_steps
    assert changed == [step % every > 0 for step in range(4)]
    names = {f"moe_max_vio/model.layers.{i}.mlp.gate" for i in (1, 2)} | {"moe_max_vio", "moe_dead_experts"}
    assert all(names <= entry.keys() and 0 <= entry["moe_max_vio"] <= 3 for entry in logs)
    json.dumps(logs)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.endswith("bias"), name
    hooks = [h for m in run.model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert hooks and not any("ReplayCallback" in repr(hook) for hook in hooks)
    assert not callback._records.ids


def test_grpo_without_replay_trains_other_experts(folder: Path, tmp_path: Path) -> None:
    run = grpo(folder, tmp_path, ReplayCallback(replay=False), **SCHEDULES["iterations"])
    seen = Seen(run.model)
    run.train()
    assert seen.wrong
    assert any(entry.get("moe_router_agreement", 1) < 1 for entry in run.state.log_history)


@pytest.mark.parametrize("existing", [False, True])
def test_an_adapter_is_replayed_and_its_reference_is_not(folder: Path, tmp_path: Path, existing: bool) -> None:
    """The reference is the model without adapters, or with a copy of the adapter that the trainer was given."""
    peft = pytest.importorskip("peft")
    given = config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moesmith")
    if existing:
        model, given = peft.get_peft_model(model, config), None
    run = grpo(folder, tmp_path, ReplayCallback(), model, peft_config=given, num_iterations=2, beta=0.1)
    inner = run.model.get_base_model()
    seen, layer = Seen(inner), inner.model.layers[0].self_attn.o_proj
    compute, passes = run._get_per_token_logps_and_entropies, []

    def negated() -> None:
        for name, module in inner.named_modules():
            if name.endswith("mlp.gate"):
                module.weight.data.neg_()

    def spied(*args: Any, **kwargs: Any) -> Any:
        reference = layer.active_adapters == ["ref"] if existing else layer.disable_adapters
        passes.append(reference)
        if not reference:
            return compute(*args, **kwargs)
        assert not seen.wrong
        negated()
        found = compute(*args, **kwargs)
        negated()
        assert seen.wrong
        seen.wrong.clear()
        return found

    run._get_per_token_logps_and_entropies = spied
    run.train()
    assert passes.count(True) == 2 and passes.count(False) >= 4 and not seen.wrong
    assert all(entry["moe_recorded"] == 1 for entry in run.state.log_history if "loss" in entry)


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trl_countdown.py", "--out", "run", "--steps", "2"])
    runpy.run_path(str(ROOT / "examples" / "trl_countdown.py"), run_name="__main__")
    assert capsys.readouterr().out.count("'moe_recorded': 1.0") == 2
    base, trained = moe.load("run/base"), moe.load("run/trained")
    assert not torch.equal(base.embed_tokens.weight, trained.embed_tokens.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
