"""transformers' model with the same weights, the float64 reference, and errors relative to it."""

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cpu_work import JUDGED, Sizes, batch_of
from benchmarks.harness import once
from moe import Transformer
from moe.checkpoint.format.config_json import render_config
from moe.config import ModelConfig

BACKENDS = ("grouped_mm", "batched_mm", "eager")
BATCHED_MM_LIMIT = 2**32  # bytes of weights that it may copy: it gathers an expert's weights for every routed row


class Theirs:
    """The timed work on a transformers model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # transformers 5.24 renames past_key_values.
        self.cache = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"

    def use(self, backend: str) -> None:
        self.model.set_experts_implementation(backend)

    def train(self, ids: Tensor) -> None:
        self.model.train()
        self.model(ids, labels=ids, use_cache=False).loss.backward()

    @torch.inference_mode()
    def prefill(self, ids: Tensor, logits_to_keep: int = 1) -> tuple[Tensor, Any]:
        from transformers import DynamicCache

        self.model.eval()
        cache = DynamicCache(config=self.model.config)
        return self.model(ids, **{self.cache: cache}, logits_to_keep=logits_to_keep).logits, cache

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        logits = [self.model(ids[:, i : i + 1], **{self.cache: cache}).logits for i in range(ids.shape[1])]
        cache.crop(-ids.shape[1])
        return torch.cat(logits, dim=1)


def peer(model: Transformer, *, copy: bool = True) -> Theirs:
    """transformers' model of the same configuration, with a copy of the weights, or with the same ones."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config.from_dict(render_config(model.config, Path("config.json")))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        theirs: Any = DeepseekV3ForCausalLM(config)
    state = {name if name.startswith("lm_head") else f"model.{name}": t for name, t in model.state_dict().items()}
    if model.lm_head is None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict({name: t.clone() if copy else t for name, t in state.items()}, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # its buffers are in no file, and in float32
    return Theirs(theirs)


@dataclass(frozen=True)
class Reference:
    """Results in float64, of the work that `Sizes` selects.

    logits [1, Sizes.judged, V]; those of the decoded tokens of the first sequences of a batch, [3, decode, V]; and
    gradients of the training work by parameter, in float32.
    """

    logits: Tensor
    batch: Tensor
    gradients: dict[str, Tensor]


def reference(model: Transformer, ids: Tensor, sizes: Sizes) -> Reference:
    """Run transformers' model in float64 with its eager backend over ids [1, prefill + decode].

    It has the model's own weights, which are cast to float64 and, exactly, back.
    """
    dtype = model.embed_tokens.weight.dtype
    exact = peer(model.double(), copy=False)
    exact.use("eager")
    logits = batch = torch.empty(0)
    if sizes.judged:
        logits = exact.prefill(ids[:, : sizes.judged], logits_to_keep=0)[0]
    if "batch" in sizes.kinds:
        batch = exact.prefill(batch_of(ids, sizes)[:JUDGED], logits_to_keep=sizes.decode)[0]
    gradients = _gradients(exact, ids[:, : sizes.train]) if "train" in sizes.kinds else {}
    del exact
    gc.collect()  # before the weights are cast one after the other
    model.to(dtype)
    return Reference(logits, batch, gradients)


def _gradients(exact: Theirs, ids: Tensor) -> dict[str, Tensor]:
    # The eager backend slices one expert at a time out of the stacked parameter, and the gradient of each slice is as
    # large as the whole. A list of parameters is indexed alike, and 64 times cheaper.
    for module in list(exact.model.modules()):
        for name in ("gate_up_proj", "down_proj"):
            stacked = getattr(module, name, None)
            if isinstance(stacked, nn.Parameter):
                delattr(module, name)
                setattr(module, name, nn.ParameterList(stacked.detach().unbind()))
    exact.train(ids)
    gradients = {}
    for name, module in exact.model.named_modules():
        parts = list(module.parameters(recurse=False))
        if isinstance(module, nn.ParameterList):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]
            gradients[name.removeprefix("model.")] = torch.stack(grads).float()
        else:
            for leaf, p in module.named_parameters(recurse=False):
                assert p.grad is not None
                gradients[f"{name}.{leaf}".removeprefix("model.")] = p.grad.float()
    return gradients


Errors = dict[str, float]


def logit_errors(found: Tensor, exact: Tensor) -> Errors:
    """Errors of logits [1, S, V], see the docstring of `benchmarks.cpu`."""
    difference, exact = found.double() - exact.double(), exact.double()
    tokens = (difference.norm(dim=-1) / exact.norm(dim=-1)).flatten()
    return {
        "logits": float(tokens.quantile(0.5)),
        "logits, quartile": float(tokens.quantile(0.75)),
        "logits, largest": float(difference.abs().max() / exact.abs().max()),
    }


def gradient_errors(found: Mapping[str, Tensor], exact: dict[str, Tensor]) -> Errors:
    """Norm of the difference over the norm, of each parameter: median and largest."""
    each = []
    for name, gradient in found.items():
        g = exact[name.removeprefix("model.")]
        each.append((gradient.float() - g).norm() / g.norm().clamp_min(1e-30))
    errors = torch.stack(each)
    return {"gradients": float(errors.quantile(0.5)), "gradients, largest": float(errors.max())}


def expected_logits(exact: Reference, work: str, sizes: Sizes) -> Tensor:
    """The reference of `Task.logits`."""
    if work not in sizes.decodings:
        return exact.logits[:, : sizes.prefill]
    decoding = sizes.decodings[work]
    if decoding.batch > 1:
        return exact.batch
    return exact.logits[:, decoding.context : decoding.context + sizes.decode]


def errors(task: Any, work: str, exact: Reference, sizes: Sizes) -> Errors:
    """Errors of the logits, and for training also of the gradients, of a `Task` or one with the same methods."""
    found = logit_errors(task.logits(work), expected_logits(exact, work, sizes))
    return found | gradient_errors(task.gradients(), exact.gradients) if work == "train" else found


ROUNDINGS = {"logits": 64, "gradients": 128}


def acceptable(ours: Errors, theirs: Errors, dtype: torch.dtype) -> bool:
    """Whether no error of ours is NaN, above twice theirs, or, for a median, above its number of roundings."""
    unit = torch.finfo(dtype).eps / 2
    most = {name: min(2 * theirs[name], ROUNDINGS.get(name, math.inf) * unit) for name in ours}
    return all(ours[name] <= most[name] for name in ours)


def bytes_copied(config: ModelConfig, tokens: int) -> int:
    """Bytes of weights that batched_mm copies in one layer, in float32; 0 if it is left out because they are more."""
    rows = tokens * config.num_experts_per_tok
    copied = rows * 3 * config.hidden_size * config.moe_intermediate_size * 4
    return copied if copied <= BATCHED_MM_LIMIT else 0


def fastest_backend(theirs: Theirs, call: Callable[[], Any], tokens: int) -> str:
    """The backend with the fastest of four calls; of one call if that takes three times as long as another's best.

    The backends take turns, so that a disturbance does not decide. A forward pass has so many tokens. batched_mm is
    left out if its copies would exceed `BATCHED_MM_LIMIT`.
    """
    seconds: dict[str, float] = {}
    for backend in BACKENDS:
        if backend == "batched_mm" and not bytes_copied(theirs.model.config, tokens):
            continue
        theirs.use(backend)
        seconds[backend] = once(call)
    for _ in range(3):
        for backend in [name for name in seconds if seconds[name] < 3 * min(seconds.values())]:
            theirs.use(backend)
            seconds[backend] = min(seconds[backend], once(call))
    return min(seconds, key=lambda backend: seconds[backend])
