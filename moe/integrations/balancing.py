"""Load balancing in trainers of other libraries: the common part of their callbacks."""

from typing import Any

from torch import Tensor, nn

from moe import balance


class Balancing:
    """Attachment by `moe.balance.attach`, loss scale and metrics of one training run.

    Args:
        bias_update_speed, group: see `moe.balance.attach`. If the model has no correction bias, loads are only counted.
    """

    def __init__(self, bias_update_speed: float = 0.001, group: Any = None) -> None:
        self.bias_update_speed, self.group = bias_update_speed, group
        self._handle: balance.Handle | None = None

    def start(self, model: nn.Module, optimizer: Any) -> None:
        """Attach to the model, after detaching from an interrupted run."""
        self.stop()
        found = [router for _, router in balance.routers(model)]
        if not found:
            expected = "a model with a moe.MoELayer (routers of other libraries are not supported)"
            raise ValueError(f"balancing: nothing to balance; expected {expected}; found {type(model).__name__}")
        biased = any(router.e_score_correction_bias is not None for router in found)
        speed = self.bias_update_speed if biased else 0.0
        self._handle = balance.attach(model, optimizer, bias_update_speed=speed, group=self.group)

    def scale(self, model: nn.Module, micro_batches: int, scaler: Any) -> None:
        """Scale injected losses as the trainer scales its loss: by 1 / micro_batches and any gradient scaler."""
        factor: float | Tensor = 1.0 if scaler is None else scaler.get_scale()
        balance.set_loss_scale(model, factor / micro_batches)

    def metrics(self) -> dict[str, float]:
        """Return "moe_max_vio" of the worst layer and "moe_dead_experts" of all layers, since the last call."""
        return load_metrics(self._handle.loads(reset=True) if self._handle is not None else {})

    def stop(self) -> None:
        """Detach from the model. A second call does nothing."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def load_metrics(loads: dict[str, Tensor]) -> dict[str, float]:
    """Return MaxVio of the worst layer and the dead experts of all layers, from loads int64 [E]; {} without layers."""
    reports = [balance.LoadReport([name], load[None].cpu()) for name, load in loads.items()]
    if not reports:
        return {}
    return {
        "moe_max_vio": max(report.max_vio[0] for report in reports),
        "moe_dead_experts": float(sum(report.dead_experts[0] for report in reports)),
    }
