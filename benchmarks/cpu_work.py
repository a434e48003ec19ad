"""The work that `benchmarks.cpu` times, on moesmith's model, and the process that does it with another commit's `moe`.

That process runs this file. So it imports nothing else of this repository, and of `moe` it uses only the configuration,
the model and the cache.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe
from moe import Transformer
from moe.cache import Cache
from moe.config import ModelConfig, RopeParameters

KINDS = ("train", "prefill", "decode", "short", "batch")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
JUDGED = 3  # sequences of a batch whose logits are compared with the reference


@dataclass(frozen=True)
class Decoding:
    """Decoding of `batch` sequences after a prefill of `context` tokens each."""

    batch: int
    context: int


@dataclass(frozen=True)
class Sizes:
    """Amount of work: kinds, tokens of each, timed rounds, and sizes for the ceilings (matrix width, bytes)."""

    train: int = 512
    prefill: int = 1024
    decode: int = 16
    short: int = 64
    batches: tuple[int, ...] = (8, 32)
    batch_context: int = 256
    rounds: int = 7
    matmul: int = 4096
    read: int = 2**29
    kinds: tuple[str, ...] = KINDS

    @property
    def decodings(self) -> dict[str, Decoding]:
        single = {"decode": Decoding(1, self.prefill), "short": Decoding(1, self.short)}
        found = {work: decoding for work, decoding in single.items() if work in self.kinds}
        if "batch" in self.kinds:
            found |= {f"batch {batch}": Decoding(batch, self.batch_context) for batch in self.batches}
        return found

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of each work."""
        whole = {work: getattr(self, work) for work in ("train", "prefill") if work in self.kinds}
        return whole | {work: decoding.batch * self.decode for work, decoding in self.decodings.items()}

    @property
    def judged(self) -> int:
        """Tokens of the text whose logits are compared with the reference; 0 if only batches are."""
        ends = [d.context + self.decode for d in self.decodings.values() if d.batch == 1]
        return max(ends + [self.prefill] * ("train" in self.kinds or "prefill" in self.kinds), default=0)


class Ours:
    """The timed work on a `moe.Transformer`."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def train(self, ids: Tensor) -> None:
        self.model.train()
        loss = self.model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()

    @torch.inference_mode()
    def prefill(self, ids: Tensor, logits_to_keep: int = 1) -> tuple[Tensor, Cache]:
        self.model.eval()
        cache = Cache(self.model.config)
        return self.model(ids, cache=cache, logits_to_keep=logits_to_keep).logits, cache

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache: Cache) -> Tensor:
        """Logits of ids [B, n], a token at a time; afterwards the cache is restored."""
        length = cache.length
        logits = [self.model(ids[:, i : i + 1], cache=cache).logits for i in range(ids.shape[1])]
        cache.truncate(length)
        return torch.cat(logits, dim=1)


def batch_of(ids: Tensor, sizes: Sizes) -> Tensor:
    """Different sequences for batches, [B, batch_context + decode], from ids [1, prefill + decode]."""
    length, most = sizes.batch_context + sizes.decode, max(sizes.batches)
    return torch.stack([ids[0].roll(-5 * row)[:length] for row in range(most)])


class Task:
    """The work of one side, `Ours` or one with the same methods, on ids [1, prefill + decode]."""

    def __init__(self, side: Any, ids: Tensor, sizes: Sizes) -> None:
        self.side, self.ids, self.sizes = side, ids, sizes

    def _text(self, work: str) -> tuple[Tensor, Tensor]:
        """Prompt, and tokens to decode after it."""
        decoding = self.sizes.decodings[work]
        ids = self.ids if decoding.batch == 1 else batch_of(self.ids, self.sizes)[: decoding.batch]
        return ids[:, : decoding.context], ids[:, decoding.context : decoding.context + self.sizes.decode]

    def logits(self, work: str) -> Tensor:
        """Logits of the text of train and prefill, and of the decoded tokens otherwise, of at most 3 sequences."""
        if work not in self.sizes.decodings:
            return self.side.prefill(self.ids[:, : self.sizes.prefill], logits_to_keep=0)[0]
        prompt, following = self._text(work)
        _, cache = self.side.prefill(prompt)
        return self.side.decode(following, cache)[:JUDGED]

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the training work by parameter."""
        self.side.train(self.ids[:, : self.sizes.train])
        found = {name: p.grad for name, p in self.side.model.named_parameters()}
        self.side.model.zero_grad()
        return found

    def call(self, work: str) -> Callable[[], Any]:
        """The call to time."""
        if work == "train":

            def train() -> None:
                self.side.train(self.ids[:, : self.sizes.train])
                self.side.model.zero_grad()

            return train
        if work == "prefill":
            return lambda: self.side.prefill(self.ids[:, : self.sizes.prefill])
        prompt, following = self._text(work)
        _, cache = self.side.prefill(prompt)
        return lambda: self.side.decode(following, cache)


PAUSE = 0.02  # seconds in which threads that wait actively for work fall asleep


def settings(config: Any) -> dict[str, Any]:
    """Fields of a configuration that have other values than by default, as JSON values."""
    found = {}
    for field in dataclasses.fields(config):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        value = getattr(config, field.name)
        if value != default:
            found[field.name] = settings(value) if dataclasses.is_dataclass(value) else value
    return found


def rebuild(values: dict[str, Any], dtype: str, weights: str) -> Transformer:
    """A model with these `settings` and the weights of a safetensors file.

    Fields that this commit does not have are ignored: the comparison of logits shows if they have an effect.
    """
    from safetensors.torch import load_file

    values = {**values, "rope_parameters": RopeParameters(**_known(RopeParameters, values.get("rope_parameters", {})))}
    # Another seed, so that weights that are not loaded are noticed.
    model = Transformer(ModelConfig(**_known(ModelConfig, values)), seed=1).to(DTYPES[dtype])
    model.load_state_dict(load_file(weights))
    return model


def _known(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in names}


def serve() -> None:
    """Answer requests on stdin, a JSON object per line, on stdout; see `benchmarks.cpu_against`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the benchmark, which then ends this process
    task, calls = Task(None, torch.empty(0), Sizes()), {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            match request["do"]:
                case "build":
                    calls.clear()
                    task.side = None
                    torch.set_num_threads(request["threads"])
                    model = rebuild(request["config"], request["dtype"], request["weights"])
                    task = Task(Ours(model), torch.tensor(request["ids"]), Sizes(**request["sizes"]))
                    answer["moe"] = moe.__file__
                case "logits":
                    save({"logits": task.logits(request["work"])}, request["file"])
                case "gradients":
                    save(task.gradients(), request["file"])
                case "time":
                    work = request["work"]
                    calls[work] = calls.get(work) or task.call(work)
                    time.sleep(PAUSE)
                    start = time.perf_counter()
                    calls[work]()
                    answer["seconds"] = time.perf_counter() - start
                    time.sleep(PAUSE)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer | {"cpu": time.process_time()}), file=answers, flush=True)


def save(tensors: dict[str, Tensor], file: str) -> None:
    from safetensors.torch import save_file

    Path(file).unlink(missing_ok=True)  # the last one may still be mapped
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


if __name__ == "__main__":
    serve()
