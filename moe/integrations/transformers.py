"""`experts_implementation="moesmith"` for MoE models of Hugging Face transformers, and load balancing in its Trainer.

    moe.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moesmith")
    model.set_experts_implementation("moesmith")  # or later, on any model
    Trainer(moe.Transformer(config), ..., callbacks=[moe.integrations.transformers.BalanceCallback()])

Source: the experts interface of transformers, `transformers/integrations/moe.py`.
"""

import functools
import re
import warnings
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moe.errors import ConfigError
from moe.integrations.balancing import Balancing
from moe.model import Transformer
from moe.ops import grouped_mm, moe_mlp, permute, unpermute
from moe.ops.library import without_autocast

try:
    from transformers import __version__ as _found
    from transformers.activations import SiLUActivation
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface, _default_apply_gate
    from transformers.modeling_utils import PreTrainedModel
    from transformers.trainer_callback import TrainerCallback
except ImportError as error:
    raise ImportError(f"moe.integrations.transformers requires transformers 5.17 or later: {error}") from error
if tuple(int(part) for part in _found.split(".")[:2]) < (5, 17):
    raise ImportError(f"moe.integrations.transformers requires transformers 5.17 or later; found {_found}")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_REMEDY = "dequantise the model or choose another experts_implementation"


def register() -> None:
    """Register "moesmith" as an experts implementation of transformers, for this process. A second call does nothing.

    Pass it to `from_pretrained(..., experts_implementation=)` or `model.set_experts_implementation()`. It runs
    `experts_forward`, for inference and training, compiled or not. It has no effect on models whose experts do not
    use transformers' experts interface (Llama 4, JetMoe); a warning then states the class, and `check` raises.
    """
    ExpertsInterface.register("moesmith", experts_forward)
    # FP8 experts have a separate registry; without an entry they would fail with a misleading KeyError.
    FP8ExpertsInterface.register("moesmith", experts_forward)
    # transformers has no hook to check a model for an implementation, so the warning wraps the method that selects it.
    if PreTrainedModel.get_correct_experts_implementation is not _warns_of_eager_experts:
        PreTrainedModel.get_correct_experts_implementation = _warns_of_eager_experts


_choose = PreTrainedModel.get_correct_experts_implementation


@functools.wraps(_choose)
def _warns_of_eager_experts(self: Any, requested_experts: str | None) -> str:
    chosen = _choose(self, requested_experts)
    if chosen == "moesmith" and not self._can_set_experts_implementation():
        # A composite model is skipped, because its parts are checked separately, each with its own model_type.
        config = self.config
        alone = not any(getattr(part, "model_type", "auto") for part in config.sub_configs.values())
        if alone and re.search(r"'\w*(num|n)_\w*experts'", str(config.to_dict())):
            problem = "its experts do not use transformers' experts interface and are not replaced"
            warnings.warn(f'experts_implementation="moesmith": {type(self).__name__}: {problem}', stacklevel=3)
    return chosen


def check(model: nn.Module) -> list[str]:
    """Return the names of the experts modules of `model` that run on "moesmith".

    Raises ConfigError if there are none, or if one has another implementation.
    """
    flags = ("has_gate", "has_bias", "is_transposed")  # set by the interface
    found: dict[str, Any] = {
        name: each for name, each in model.named_modules() if all(hasattr(each, flag) for flag in flags)
    }
    if not found:
        allowed = "a model whose experts use transformers' experts interface"
        raise ConfigError("experts_implementation", "moesmith", f"{allowed}; {type(model).__name__} has none")
    for name, module in found.items():
        if module.config._experts_implementation != "moesmith":
            raise ConfigError(f"{name}: experts_implementation", module.config._experts_implementation, '"moesmith"')
    return list(found)


class BalanceCallback(TrainerCallback):
    """Trainer callback that calls `moe.balance.attach`, scales the balance losses and logs expert load.

    Works with every model that contains `moe.MoELayer`s, such as `moe.Transformer`. Balance losses that enter through
    autograd are scaled as the Trainer scales its loss: by the micro-batches of the step and the fp16 gradient scaler.
    Training logs and `state.log_history` get "moe_max_vio" and "moe_dead_experts"; see `Balancing.metrics`. Callbacks
    before this one do not see them, and those of `report_to` come first. For TensorBoard and others, add this callback
    with `trainer.callback_handler.callbacks.insert(0, BalanceCallback())`.

    Routers of transformers' own models are not supported, regardless of their experts implementation. Use transformers'
    balance loss for them (`output_router_logits`).

    Args:
        bias_update_speed, group: see `moe.balance.attach`.

    Raises ValueError at the start of training if the model has no `moe.MoELayer`, or for label smoothing with a
    `moe.Transformer`, because the Trainer would smooth labels that are not shifted.
    """

    def __init__(self, bias_update_speed: float = 0.001, group: Any = None) -> None:
        self._balancing = Balancing(bias_update_speed, group)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if args.label_smoothing_factor and isinstance(given["model"], Transformer):
            # The Trainer shifts labels for transformers' classes only.
            raise ValueError(f"label_smoothing_factor = {args.label_smoothing_factor}: expected 0 for moe.Transformer")
        self._balancing.start(given["model"], given["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        micro_batches = args.gradient_accumulation_steps
        with suppress(TypeError):  # data without a length
            batches = len(given["train_dataloader"])
            left = batches - round((state.epoch or 0) % 1 * batches)
            micro_batches = min(micro_batches, left)  # the last step of an epoch may have fewer
        self._balancing.scale(given["model"], micro_batches, getattr(given["optimizer"], "scaler", None))

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if "loss" in given["logs"]:  # training logs, not evaluation logs
            metrics = self._balancing.metrics()
            given["logs"].update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._balancing.stop()


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of an experts module of transformers: hidden_states [T, D] -> [T, D], in the same dtype.

    The class of `experts` is decorated with `use_experts_implementation`. Its flags has_gate, has_bias, is_transposed,
    is_concatenated and has_post_expert_norm are respected. SwiGLU experts run `moe_mlp`, without calling hooks of the
    activation module. Experts with another activation or gate run `permute`, `grouped_mm` and `unpermute` around the
    module's `_apply_gate` or `act_fn`.

    top_k_index [T, K] has any integer dtype; top_k_weights [T, K] have any floating dtype and are used in float32 or
    wider. An expert is absent if its id is -1 or equals the number of experts on this rank, as in eager mode; under
    expert parallelism, also if its id exceeds that number. Absent experts add nothing, and their weights get a zero
    gradient. Other ids out of range raise IndexError (on CPU; a device assertion on CUDA).

    Sums accumulate in float32 or wider for any dtype. Identical inputs give bit-identical results. Under autocast
    products are cast, as for any matrix product.

    Raises ConfigError for expert weights that are not dense tensors of float32, float64, bfloat16 or float16 (quantised
    or sharded ones), and for interleaved weights without an `_apply_gate` that handles them.
    """
    up, down = _weight(experts, "gate_up_proj" if experts.has_gate else "up_proj"), _weight(experts, "down_proj")
    up_bias = down_bias = None
    if experts.has_bias:
        up_bias = _weight(experts, "gate_up_proj_bias" if experts.has_gate else "up_proj_bias")
        down_bias = _weight(experts, "down_proj_bias")
    # Compared on the class, because Dynamo does not support a bound method's __func__.
    own_gate = "_apply_gate" in vars(experts) or type(experts)._apply_gate is not _default_apply_gate
    default_gate = experts.has_gate and not own_gate
    if default_gate and not experts.is_concatenated:
        raise ConfigError(
            f"{type(experts).__name__}.is_concatenated", False, "True, or an _apply_gate that takes interleaved rows"
        )

    # transformers 5.17 has no such attribute; its expert parallelism gives other ranks' slots the id E only.
    sharded = getattr(experts, "_is_expert_parallel", False)
    expert_ids = top_k_index.to(torch.int64)
    absent = expert_ids >= down.shape[0] if sharded else expert_ids == down.shape[0]
    expert_ids = expert_ids.masked_fill(absent, -1)
    weights = top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32))

    post_norm = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
    if default_gate and post_norm is None and _is_silu(experts.act_fn):
        if experts.is_transposed:
            up, down = up.mT, down.mT
        y = moe_mlp(hidden_states, up, down, weights, expert_ids, gate_up_bias=up_bias, down_bias=down_bias)
        return y.to(hidden_states.dtype)

    if not experts.is_transposed:
        up, down = up.mT, down.mT
    permuted = permute(hidden_states, expert_ids, down.shape[0])
    rows = _linear(permuted.rows, up, up_bias, permuted.offsets)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = _linear(rows, down, down_bias, permuted.offsets)
    if post_norm is not None:
        # Rows past the last offset are zero, for which a norm may give NaN, and NaN times a zero gradient is NaN.
        here = torch.arange(rows.shape[0], device=rows.device) < permuted.offsets[-1]
        rows = post_norm(torch.where(here[:, None], rows, 1))
    return unpermute(rows, permuted.position, weights).to(hidden_states.dtype)


def _weight(experts: Any, name: str) -> Tensor:
    weight = getattr(experts, name, None)
    where = f"{type(experts).__name__}.{name}"
    if not isinstance(weight, Tensor) or is_traceable_wrapper_subclass(weight):
        raise ConfigError(where, type(weight).__name__, f"a dense tensor; {_REMEDY}")
    if weight.dtype not in _DTYPES:
        raise ConfigError(where, weight.dtype, f"float32, float64, bfloat16 or float16; {_REMEDY}")
    return weight


def _is_silu(act_fn: Any) -> bool:
    return act_fn is F.silu or type(act_fn) in (nn.SiLU, SiLUActivation)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    out = grouped_mm(rows, weight, offsets)
    if bias is None:
        return out
    # A product with ones instead of a gather keeps rows past the last offset zero, and its gradient is summed in order.
    # It is exact. Autocast is off, because eager mode does not cast the bias.
    with without_autocast(rows.device.type):
        return out + grouped_mm(bias.new_ones(rows.shape[0], 1), bias[:, None], offsets)
