"""Load balancing for models with `moe.MoELayer`s in Lightning's Trainer.

module = ...  # a LightningModule
Trainer(callbacks=[moe.integrations.lightning.BalanceCallback()]).fit(module, data)
"""

from typing import Any

from moe.integrations.balancing import Balancing

try:
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]
except ImportError:
    try:
        from pytorch_lightning import Callback  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"moe.integrations.lightning requires lightning or pytorch-lightning: {error}") from error


class BalanceCallback(Callback):  # pyright: ignore[reportGeneralTypeIssues]
    """Callback that calls `moe.balance.attach`, scales the balance losses and logs expert load.

    Balance losses that enter through autograd are divided by `accumulate_grad_batches` and multiplied by the scale of
    the precision plugin, as Lightning does with the loss (with manual optimization, the module must divide its loss).
    Every `log_every_n_steps` steps the callback logs "moe_max_vio" and "moe_dead_experts"; see `Balancing.metrics`.

    Args:
        bias_update_speed, group: see `moe.balance.attach`.
        optimizer: index of the optimizer whose steps update the bias, among those of the module.

    Raises ValueError at the start of training if the module contains no `moe.MoELayer`.
    """

    def __init__(self, bias_update_speed: float = 0.001, group: Any = None, optimizer: int = 0) -> None:
        super().__init__()
        self._balancing, self._optimizer = Balancing(bias_update_speed, group), optimizer
        self._logged = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._balancing.start(pl_module, trainer.optimizers[self._optimizer])
        self._logged = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._balancing.scale(pl_module, trainer.accumulate_grad_batches, scaler)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps
        if every and step // every > self._logged // every:
            self._logged = step
            for name, value in self._balancing.metrics().items():
                pl_module.log(name, value, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._balancing.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._balancing.stop()
