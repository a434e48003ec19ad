"""Lightning's Trainer with models of ours, against loops written by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="lightning is not installed")

import moe
from moe import balance
from moe.integrations.lightning import BalanceCallback

pl: Any = pytest.importorskip("lightning.pytorch")
pytestmark = [
    # Lightning's own: advice to use more workers, and what it calls of torch.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]
ROWS = torch.randn(10, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Other(pl.LightningModule):
    """A third-party module around our layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, dtype=torch.float64)
        self.moe = moe.MoELayer(8, 6, 4, 2, seed=0, aux_loss_alpha=0.5, initializer_range=0.5, **options).double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.moe(self.inner(batch)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Record(pl.Callback):
    """The metrics that are logged, with their steps."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, float]] = {}

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if "moe_max_vio" in trainer.callback_metrics:
            found = (trainer.callback_metrics[name].item() for name in ("moe_max_vio", "moe_dead_experts"))
            self.seen.setdefault(trainer.global_step, tuple(found))  # pyright: ignore[reportArgumentType]


def fit(module: Any, callbacks: list[Any], data: Any, folder: Any, **options: Any) -> None:
    settings: dict[str, Any] = dict(max_epochs=2, accelerator="cpu", devices=1, logger=False, log_every_n_steps=1)
    settings |= dict(enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    run = pl.Trainer(callbacks=callbacks, default_root_dir=folder, barebones=False, **settings | options)
    run.fit(module, DataLoader(data, batch_size=2))


@pytest.mark.parametrize("options", [{}, {"topk_method": "greedy"}], ids=["bias", "no bias"])
def test_training_equals_a_loop(options: dict[str, Any], tmp_path: Any) -> None:
    """With accumulation: Lightning divides by it in the last step of an epoch too, which has fewer micro-batches."""
    module, record = Other(**options), Record()
    alone = copy.deepcopy(module)
    fit(module, [BalanceCallback(0.25), record], ROWS, tmp_path, accumulate_grad_batches=2)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    speed = 0.25 if alone.moe.gate.e_score_correction_bias is not None else 0.0
    handle = balance.attach(alone, optimizer, bias_update_speed=speed)
    balance.set_loss_scale(alone, 1 / 2)
    for number, step in enumerate(2 * [[0, 2], [4, 6], [8]], 1):
        for start in step:
            (alone.training_step(ROWS[start : start + 2], 0) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        (load,) = handle.loads(reset=True).values()
        vio, dead = record.seen[number]
        assert vio == pytest.approx(load.max().item() / load.double().mean().item() - 1, rel=1e-6)
        assert dead == (load == 0).sum()
    for (name, tensor), exact in zip(module.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, exact, rtol=1e-9, atol=1e-12, msg=name)
    assert module.moe.gate.counter is None


class Language(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes: Any = dict(vocab_size=19, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        sizes |= dict(intermediate_size=8, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2)
        self.model = moe.Transformer(moe.ModelConfig(**sizes))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.model(batch, labels=batch)  # a mapping with a loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_an_output_is_the_result_of_a_step(tmp_path: Any) -> None:
    module, alone, ids = Language(), Language(), torch.arange(24).view(4, 6) % 19
    fit(module, [BalanceCallback(0.25)], ids, tmp_path, max_epochs=1)
    optimizer = alone.configure_optimizers()
    balance.attach(alone, optimizer, bias_update_speed=0.25)
    for batch in ids.split(2):
        alone.training_step(batch, 0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, tensor), exact in zip(module.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(tensor, exact), name


def test_without_our_layers_it_is_refused(tmp_path: Any) -> None:
    class Plain(Other):
        def __init__(self) -> None:
            super().__init__()
            self.moe = nn.Linear(8, 8, dtype=torch.float64)  # pyright: ignore

    with pytest.raises(ValueError, match=r"expected a model with a moe\.MoELayer"):
        fit(Plain(), [BalanceCallback()], ROWS, tmp_path)
