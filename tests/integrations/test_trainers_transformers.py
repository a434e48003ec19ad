"""transformers' Trainer with models of ours, against loops written by hand."""

import copy
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

import transformers
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback, TrainingArguments

import moe
from moe import balance
from moe.integrations.transformers import BalanceCallback
from tests.conftest import ROOT

CONFIG = moe.ModelConfig(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    moe_intermediate_size=12,
    n_routed_experts=6,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=6,
    num_nextn_predict_layers=1,
    aux_loss_alpha=0.02,
    router_z_loss_coef=0.01,
    initializer_range=0.2,
    extra={"eos_token_id": 3},
)
PLAIN = {"topk_method": "greedy", "num_nextn_predict_layers": 0, "aux_loss_alpha": 0.0, "router_z_loss_coef": 0.0}


def build(**changes: Any) -> moe.Transformer:
    return moe.Transformer(moe.ModelConfig.from_dict(CONFIG.to_dict() | changes)).double().train()


class Data(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences of 10 tokens, whose first labels are ignored: 1 to 9 of them."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 61, (count, 10), generator=generator)
        hidden = torch.randint(1, 9, (count, 1), generator=generator)
        self.labels = self.ids.masked_fill(torch.arange(10) < hidden, -100)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: Any) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


Trainer: Any = transformers.Trainer


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return None


def trainer(
    model: nn.Module, folder: Path, data: Any, callbacks: list[TrainerCallback] | None = None, **options: Any
) -> Any:
    """SGD with a constant learning rate; batches of two in the data's order."""
    settings: dict[str, Any] = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1}
    settings |= {"max_grad_norm": 0.0, "per_device_train_batch_size": 2, "num_train_epochs": 1} | options
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = TrainingArguments(str(folder), use_cpu=True, **settings)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return InOrder(
        model, arguments, train_dataset=data, eval_dataset=data, optimizers=(optimizer, constant), callbacks=callbacks
    )


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def close(found: nn.Module, expected: nn.Module) -> None:
    for (name, tensor), exact in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, exact, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_equals_a_loop(tmp_path: Path, checkpointing: bool) -> None:
    data, model, alone = Data(8), build(), build()
    options = {"gradient_checkpointing": True} if checkpointing else {}
    run = trainer(model, tmp_path, data, [BalanceCallback(0.25)], **options)
    run.train()
    assert model.activation_checkpointing == checkpointing
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    balance.attach(alone, optimizer, bias_update_speed=0.25)
    expected = []
    for start in range(0, 8, 2):
        out = alone(**data[slice(start, start + 2)])
        assert out.loss is not None
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(out.loss.item())
    assert losses(run) == pytest.approx(expected, rel=1e-6)
    close(model, alone)
    assert all(router.e_score_correction_bias.abs().max() >= 0.25 for _, router in balance.routers(model))


def test_accumulation_gives_the_mean_over_tokens(tmp_path: Path) -> None:
    """Four micro-batches with unequal numbers of predicted tokens against one batch."""
    data, model, alone = Data(16), build(**PLAIN), build(**PLAIN)
    assert len({(data[slice(i, i + 2)]["labels"] != -100).sum().item() for i in range(0, 8, 2)}) > 1
    run = trainer(model, tmp_path, data, gradient_accumulation_steps=4)
    run.train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    expected = []
    for start in (0, 8):
        batch = data[slice(start, start + 8)]
        logits = alone(batch["input_ids"]).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(run) == pytest.approx(expected, rel=1e-6)
    close(model, alone)


def test_shares_of_a_step_are_those_of_its_predicted_tokens() -> None:
    """All terms: each micro-batch's means, weighted by its predicted tokens."""
    data, model = Data(6), build()
    parts = [data[slice(start, start + 2)] for start in (0, 2, 4)]
    counts = [(part["labels"][:, 1:] != -100).sum() for part in parts]
    total = torch.stack(counts).sum()
    for items in (total, total.item(), total.float()):
        for part, count in zip(parts, counts, strict=True):
            whole, share = model(**part), model(**part, num_items_in_batch=items)
            torch.testing.assert_close(share.loss, whole.loss * count / total, rtol=1e-12, atol=0)
            assert share.losses.keys() == whole.losses.keys() == {"ce", "mtp", "balance", "z"}
            for name, mean in whole.losses.items():
                torch.testing.assert_close(share.losses[name], mean * count / total, rtol=1e-12, atol=0)
    nothing = model(parts[0]["input_ids"], labels=torch.full_like(parts[0]["labels"], -100), num_items_in_batch=0)
    assert nothing.loss == 0


def test_evaluation_and_prediction(tmp_path: Path) -> None:
    data, model = Data(6), build(**PLAIN)
    run = trainer(model, tmp_path, data, per_device_eval_batch_size=6)
    with torch.no_grad():
        expected = model.eval()(**data[slice(0, 6)])
    assert expected.loss is not None
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-6)
    found: Any = run.predict(data)
    torch.testing.assert_close(torch.as_tensor(found.predictions), expected.logits, rtol=1e-6, atol=1e-6)
    without: Any = run.predict([{"input_ids": row} for row in data.ids])
    assert without.predictions.shape == (6, 10, 61)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    data, options = Data(12), {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole, resumed = build(), build()
    trainer(whole, tmp_path / "whole", data, [BalanceCallback(0.25)], num_train_epochs=2, **options).train()
    first = trainer(build(), tmp_path / "run", data, [BalanceCallback(0.25)], max_steps=2, **options)
    first.train()
    again = trainer(resumed, tmp_path / "run", data, [BalanceCallback(0.25)], num_train_epochs=2, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    for (name, tensor), exact in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(tensor, exact), name
    resumed.save(tmp_path / "saved")
    assert torch.equal(moe.load(tmp_path / "saved").state_dict()["norm.weight"], resumed.state_dict()["norm.weight"])


class Other(nn.Module):
    """A third-party model around our layer, with the interface that a Trainer expects."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, dtype=torch.float64)
        self.moe = moe.MoELayer(8, 6, 4, 2, seed=0, aux_loss_alpha=0.5, initializer_range=0.5, **options).double()
        with torch.no_grad():
            self.inner.weight.copy_(torch.eye(8))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.moe(self.inner(x))
        return {"loss": (y - x).square().mean(), "y": y}


class Rows(Data):
    def __init__(self, count: int) -> None:
        self.ids = torch.randn(count, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def __getitem__(self, i: Any) -> dict[str, Tensor]:
        return {"x": self.ids[i], "labels": torch.zeros(()) if isinstance(i, int) else torch.zeros(2)}


@pytest.mark.parametrize("options", [{}, {"topk_method": "greedy"}], ids=["bias", "no bias"])
def test_injected_losses_are_scaled_as_the_trainer_scales_its_own(tmp_path: Path, options: dict[str, Any]) -> None:
    """Over the micro-batches of each step; the last step of an epoch has fewer."""
    data, model = Rows(10), Other(**options)
    alone = copy.deepcopy(model)
    run = trainer(model, tmp_path, data, [BalanceCallback(0.25)], gradient_accumulation_steps=2, num_train_epochs=2)
    run.train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    speed = 0.25 if alone.moe.gate.e_score_correction_bias is not None else 0.0
    handle = balance.attach(alone, optimizer, bias_update_speed=speed)
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    steps = 2 * [[0, 2], [4, 6], [8]]
    assert len(logged) == len(steps)
    for step, entry in zip(steps, logged, strict=True):
        balance.set_loss_scale(alone, 1 / len(step))
        for start in step:
            (alone(**data[slice(start, start + 2)])["loss"] / len(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        (load,) = handle.loads(reset=True).values()
        assert load.sum() == len(step) * 2 * 5 * 2
        assert entry["moe_max_vio"] == pytest.approx(load.max().item() / load.double().mean().item() - 1)
        assert entry["moe_dead_experts"] == (load == 0).sum()
    close(model, alone)
    assert model.moe.gate.counter is None  # detached at the end


def test_an_interrupted_run_does_not_keep_the_model_attached(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    run = trainer(Other(), tmp_path, Rows(4), [BalanceCallback(), Stop()])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.pop_callback(Stop)
    run.train()


def test_a_gradient_scaler_scales_injected_losses() -> None:
    from moe.integrations.balancing import Balancing

    data, model = Rows(2), Other()
    alone = copy.deepcopy(model)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # pyright: ignore[reportPrivateImportUsage]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancing = Balancing(0.25)
    balancing.start(model, optimizer)
    for _ in range(2):
        balancing.scale(model, 1, scaler)
        scaler.scale(model(**data[slice(0, 2)])["loss"]).backward()
        scaler.step(optimizer)
        scaler.update(new_scale=2.0**4)
        optimizer.zero_grad()
    plain = torch.optim.SGD(alone.parameters(), lr=0.1)
    balance.attach(alone, plain, bias_update_speed=0.25)
    for _ in range(2):
        alone(**data[slice(0, 2)])["loss"].backward()
        plain.step()
        plain.zero_grad()
    close(model, alone)


def test_models_of_transformers_are_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = dict.fromkeys(("num_local_experts", "num_attention_heads", "num_key_value_heads"), 2)
    config = MixtralConfig(vocab_size=61, hidden_size=16, intermediate_size=8, num_hidden_layers=1, **sizes)
    run = trainer(MixtralForCausalLM(config), tmp_path, Data(2), [BalanceCallback()])
    with pytest.raises(ValueError, match=r"a model with a moe\.MoELayer .*; found MixtralForCausalLM"):
        run.train()
    run = trainer(build(), tmp_path, Data(2), [BalanceCallback()], label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing_factor = 0\.1: expected 0 for moe\.Transformer"):
        run.train()


def test_a_tokenizer_and_tensorboard(tmp_path: Path) -> None:
    """They read and write attributes of a model's config."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1, "<end>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    model = build()
    given: Any = model.config
    run = trainer(model, tmp_path, Data(2), report_to=["tensorboard"])
    run.callback_handler.callbacks.insert(0, BalanceCallback())
    run.processing_class = tokenizer
    run.train()
    assert model.config is given and given.pad_token_id == 1 and given.eos_token_id == 2
    assert given.use_cache is False and given == CONFIG and given.to_dict() == CONFIG.to_dict()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "train/moe_max_vio", "train/moe_dead_experts"} <= set(events.Tags()["scalars"])


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hf_trainer.py", "--out", "run", "--steps", "5"])
    runpy.run_path(str(ROOT / "examples" / "hf_trainer.py"), run_name="__main__")
    assert "moe_max_vio" in capsys.readouterr().out
    biases = [router.e_score_correction_bias for _, router in balance.routers(moe.load("run/checkpoint"))]
    assert all(bias.abs().max() > 0 for bias in biases)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
