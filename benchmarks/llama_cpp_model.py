"""llama.cpp's model of the same weights: conversion with its converter, and the work of `benchmarks.cpu` on it."""

import contextlib
import importlib.util
import io
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu_work import Sizes
from moe import Transformer

F32, F16 = 0, 1  # GGML_TYPE_F32 and GGML_TYPE_F16


def find(converter: Path | None) -> str | None:
    """Make the converter's modules importable; return what is missing, if anything."""
    if converter is None or not converter.is_file():
        return f"--llama: expected convert_hf_to_gguf.py of llama.cpp; found {converter}"
    if not (converter.parent / "conversion").is_dir():
        return "--llama: expected a folder named conversion beside it; found none"
    if importlib.util.find_spec("llama_cpp") is None:
        return "--llama: no module named llama_cpp; expected llama-cpp-python"
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    return None


def convert(folder: Path, file: Path, converter: Path, dtype: str = "f32", *, vocabulary: bool = False) -> None:
    """Run the converter in this process. It accepts only released tokenizers, so it writes no vocabulary by default."""
    import conversion  # pyright: ignore[reportMissingImports]

    find_class, words = conversion.get_model_class, sys.argv

    def without_vocabulary(*args: Any, **options: Any) -> Any:
        def set_vocab(self: Any) -> None:
            self._set_vocab_none()
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

        found = find_class(*args, **options)
        found.set_vocab = set_vocab
        return found

    if not vocabulary:
        conversion.get_model_class = without_vocabulary
    sys.argv = [str(converter), str(folder), "--outfile", str(file), "--outtype", dtype]
    try:
        runpy.run_path(str(converter), run_name="__main__")
    finally:
        sys.argv, conversion.get_model_class = words, find_class


def load(file: Path, length: int, threads: int, cache: int = F32, **options: Any) -> Any:
    """The model of a GGUF file, for texts of this length."""
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    # The package's defaults for YaRN replace the file's values; negative ones do not.
    yarn = dict(yarn_attn_factor=-1.0, yarn_beta_fast=-1.0, yarn_beta_slow=-1.0)
    given = dict(type_k=cache, type_v=cache, n_threads=threads, n_threads_batch=threads, **yarn)
    return Llama(str(file), n_ctx=length, **given, **options)


class LlamaCpp:
    """The work on llama.cpp's model with the same weights, with the methods of `Task`; of one sequence, untrained.

    Raises RuntimeError with the reason if the converter or llama.cpp refuses the model.
    """

    name, cpu, kinds = "llama.cpp", 0.0, ("prefill", "decode", "short")

    def __init__(self, model: Transformer, ids: Tensor, sizes: Sizes, converter: Path, dtype: str) -> None:
        self._ids, self._sizes = ids[0].tolist(), sizes
        root = Path(tempfile.mkdtemp(prefix="moesmith-llama-"))
        try:
            model.save(root / "model")
            with contextlib.redirect_stderr(io.StringIO()):
                convert(root / "model", root / "model.gguf", converter, {"fp32": "f32"}.get(dtype, dtype))
            shutil.rmtree(root / "model")
            cache = F32 if dtype == "fp32" else F16
            threads = torch.get_num_threads()
            self._model = load(root / "model.gguf", len(self._ids), threads, cache, verbose=False, use_mmap=False)
        except (Exception, SystemExit) as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        finally:
            shutil.rmtree(root, ignore_errors=True)

    def _evaluate(self, ids: Sequence[int], past: int, *, every: bool = False) -> Tensor:
        """Logits [1, n, V] of the last token, or of each, after `past` tokens in the cache."""
        import numpy as np

        model, found = self._model, []
        model._ctx.kv_cache_seq_rm(-1, past, -1)
        for start in range(0, len(ids), model.n_batch):
            piece = ids[start : start + model.n_batch]
            model._batch.set_batch(batch=piece, n_past=past + start, logits_all=every)
            model._ctx.decode(model._batch)
            count = len(piece) if every else 1
            logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(count, model._n_vocab))
            found.append(torch.from_numpy(logits.copy()))
        return torch.cat(found if every else found[-1:])[None]

    def _decode(self, context: int) -> Tensor:
        following = range(context, context + self._sizes.decode)
        return torch.cat([self._evaluate(self._ids[i : i + 1], i) for i in following], dim=1)

    def logits(self, work: str) -> Tensor:
        if work == "prefill":
            return self._evaluate(self._ids[: self._sizes.prefill], 0, every=True)
        context = self._sizes.decodings[work].context
        self._evaluate(self._ids[:context], 0)
        return self._decode(context)

    def call(self, work: str) -> Callable[[], Any]:
        """The call to time; of decoding, until other work is done."""
        if work == "prefill":
            return lambda: self._evaluate(self._ids[: self._sizes.prefill], 0)
        context = self._sizes.decodings[work].context
        self._evaluate(self._ids[:context], 0)
        return lambda: self._decode(context)
