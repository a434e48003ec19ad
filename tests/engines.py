"""Save models of every family, convert them for llama.cpp and compare logits.

Requires llama-cpp-python and the converter of the llama.cpp that it is built from. Each config without
`family_problems` is saved, converted to GGUF in fp32 and evaluated, and the logits are compared with moesmith's. The
configs of a family are its first preset with small sizes, that preset with each value in
`tests.support.export_cases.OTHERS`, and random configs of `tests.exports`. A control, with another norm_topk_prob in
the files, must differ.

The converter accepts only tokenizers of released models. Without --tokenizer it is patched to write no vocabulary.
Errors of the converter and of llama.cpp are printed but are not failures, because such a model is refused and not
computed differently. The exit status is 1 if a difference exceeds the bound.
"""

import argparse
import dataclasses
import logging
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import llama_cpp_model
from moe import ModelConfig
from moe.checkpoint.format.config_json import render_config
from moe.checkpoint.format.families import FAMILIES
from tests.exports import build, examples
from tests.support.export_cases import BASE, OTHERS, changed

BOUND = 1e-3  # relative to the largest logit; rounding reaches 3e-4, a wrong setting causes at least 2e-2
LENGTH = 24
SECONDS = 300
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
FAILED = "failed here"  # an error in this program, not in llama.cpp
TRAINING = ("initializer_range", "aux_loss_alpha", "seq_aux", "router_z_loss_coef", "mtp_loss_weight")


class RefusedError(Exception):
    """The converter or llama.cpp cannot process a model, with its message."""


def computed_otherwise(config: ModelConfig) -> str | None:
    """Return a setting of a released model that llama.cpp ignores, or None; see the rules in families.py."""
    rope = config.rope_parameters
    if config.model_type == "deepseek_v2" and config.topk_method == "group_limited_greedy" and config.n_group > 1:
        return "group_limited_greedy"
    if rope.rope_type == "yarn" and not rope.truncate:
        return "truncate"
    if rope.rope_type == "yarn" and rope.beta_fast != 32:
        return "beta_fast"
    return None


def tiny(preset: ModelConfig) -> ModelConfig:
    """Return the preset with small sizes: several experts per group, and windows shorter than the text."""
    sizes: dict[str, Any] = dict(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        first_k_dense_replace=min(preset.first_k_dense_replace, 1),
        layer_types=preset.layer_types and preset.layer_types[:4],
        sliding_window=preset.sliding_window and 5,
        shared_expert_intermediate_size=preset.shared_expert_intermediate_size and 24,
    )
    if preset.n_routed_experts:
        sizes |= dict(moe_intermediate_size=32, n_routed_experts=16, num_experts_per_tok=4)
    if preset.n_group > 1:
        sizes |= dict(n_group=4, topk_group=2)
    if preset.is_mla:
        sizes |= dict(kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
    else:
        sizes |= dict(num_key_value_heads=2, head_dim=16)
    return loadable(dataclasses.replace(preset, **sizes))


def loadable(config: ModelConfig) -> ModelConfig:
    """Return the config with sizes that llama.cpp supports.

    It supports queries without a latent only in models of 26 or 27 layers, and no grouped queries in two families. The
    hidden size of ERNIE's shared expert must be intermediate_size / num_key_value_heads.
    """
    changes: dict[str, Any] = {}
    if config.is_mla and config.num_hidden_layers != 27:
        changes["q_lora_rank"] = config.q_lora_rank or 24
    if config.model_type in ("olmoe", "dots1"):
        changes["num_key_value_heads"] = None
    if config.model_type == "ernie4_5_moe" and config.shared_width:
        changes["intermediate_size"] = (config.num_key_value_heads or config.num_attention_heads) * config.shared_width
    return dataclasses.replace(config, **changes)


def cases(model_types: list[str], count: int, seed: int) -> Iterator[tuple[str, ModelConfig]]:
    """Yield (settings, config), only the first of configs with equal files."""
    written: list[Any] = []
    for model_type in model_types:
        preset = tiny(BASE[model_type])
        rope = dataclasses.replace(preset.rope_parameters, truncate=True, beta_fast=32.0)
        base = dataclasses.replace(preset, rope_parameters=rope)
        changes = ((field, value) for field, values in OTHERS.items() for value in values if field not in TRAINING)
        configs: list[tuple[str, ModelConfig | None]] = [("preset", preset), ("preset, YaRN as in llama.cpp", base)]
        if preset.is_mla:
            latent = dataclasses.replace(base, num_hidden_layers=27, q_lora_rank=None)
            configs.append(("q_lora_rank=None", latent))
        configs += [(f"{field}={_short(value)}", changed(base, field, value)) for field, value in changes]
        for settings, config in configs:
            if config is None:
                continue
            config = loadable(config)
            if not config.family_problems():
                files = render_config(config, Path("config.json"))
                if (model_type, files) in written:
                    continue
                written.append((model_type, files))
            yield settings, config
    for number, config in examples(count, seed):
        if config.model_type in model_types and not config.family_problems():
            yield f"random {number}", loadable(config)


def _short(value: Any) -> str:
    """Format a value; for rope_parameters, the fields that differ from the defaults."""
    if not dataclasses.is_dataclass(value):
        return str(value)
    fields = ((f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value))
    return ", ".join(f"{name} {given}" for name, given, default in fields if given != default) or "default"


def evaluate(file: Path, ids: list[int]) -> torch.Tensor:
    """Return llama.cpp's logits [T, V]."""
    model = llama_cpp_model.load(file, 64, threads=1, logits_all=True)
    model.eval(ids)
    return torch.tensor(model.scores[: len(ids)])


def compare(config: ModelConfig, saved: ModelConfig, seed: int, folder: Path, options: argparse.Namespace) -> float:
    """Return the relative difference of logits between a model here and in llama.cpp, saved with config `saved`."""
    model = build(saved, seed)
    if options.tokenizer is not None:
        model.carried_files = {name: (options.tokenizer / name).read_bytes() for name in TOKENIZER}
    model.save(folder)
    ids = torch.randint(0, config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        ours = build(config, seed).eval()(ids).logits[0]
    file = folder.with_suffix(".gguf")
    try:
        llama_cpp_model.convert(folder, file, options.llama, vocabulary=options.tokenizer is not None)
        theirs = evaluate(file, ids[0].tolist())
    except (Exception, SystemExit) as error:
        raise RefusedError(f"{type(error).__name__}: {error}") from error
    return float((theirs - ours).abs().max() / ours.abs().max())


def work(result: Connection, log: Path, *args: Any) -> None:
    """Run `compare` in a child process, because llama.cpp may abort, with its output in `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    try:
        result.send(compare(*args))
    except RefusedError as error:
        result.send(str(error))
    except Exception as error:
        result.send(f"{FAILED}: {type(error).__name__}: {error}")
    os._exit(0)


def run(config: ModelConfig, saved: ModelConfig, seed: int, options: argparse.Namespace) -> float | str:
    """Return the relative difference, or an error message."""
    with tempfile.TemporaryDirectory() as root:
        log = Path(root, "log")
        here, there = multiprocessing.Pipe(duplex=False)
        arguments = (there, log, config, saved, seed, Path(root, "model"), options)
        process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
        process.start()
        there.close()
        try:
            found = here.recv() if here.poll(SECONDS) else f"no answer in {SECONDS} s"
        except EOFError:
            process.join()
            found = f"exit status {process.exitcode}"
        process.kill()
        process.join()
        if isinstance(found, str):
            lines = log.read_text(errors="replace").replace(root, "").splitlines()
            reasons = [line for line in lines if "error loading" in line or "GGML_ASSERT" in line]
            found = " / ".join([found.replace(root, ""), *reasons[-1:]])
        return found


def prepare(options: argparse.Namespace) -> None:
    """Import the modules that llama.cpp needs before the first fork; raises SystemExit if one is missing."""
    prog = "python -m tests.engines"
    if missing := llama_cpp_model.find(options.llama):
        raise SystemExit(f"{prog}: {missing}")
    if options.tokenizer is not None and not all((options.tokenizer / name).is_file() for name in TOKENIZER):
        names = " and ".join(TOKENIZER)
        raise SystemExit(f"{prog}: --tokenizer: expected a folder with {names}; found {options.tokenizer}")
    logging.getLogger().setLevel(logging.ERROR)
    import conversion  # pyright: ignore[reportMissingImports]
    import llama_cpp  # pyright: ignore[reportMissingImports]
    import torch._dynamo  # imported by the converter; it takes seconds in each process

    conversion.load_all_models()
    print(f"llama-cpp-python {llama_cpp.__version__}, {options.llama}")
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.engines", description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--llama",
        type=Path,
        metavar="FILE",
        default=os.environ.get("LLAMA"),
        help="convert_hf_to_gguf.py of llama.cpp (default: $LLAMA)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="Folder with a tokenizer that the converter accepts (default: none)",
    )
    names = ", ".join(FAMILIES)
    parser.add_argument("--only", choices=FAMILIES, metavar="FAMILY", help=f"Run only one of {names} (default: all)")
    parser.add_argument("--count", type=int, default=10, help="Random configs per family (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random configs (default: 0)")
    options = parser.parse_args()
    prepare(options)
    sizes: dict[str, int] = {}
    if options.tokenizer is not None:
        from tokenizers import Tokenizer

        sizes["vocab_size"] = max(Tokenizer.from_file(str(options.tokenizer / TOKENIZER[0])).get_vocab().values()) + 1
    config = dataclasses.replace(tiny(BASE["deepseek_v3"]), **sizes)
    flipped = run(config, dataclasses.replace(config, norm_topk_prob=False), 0, options)
    print(f"control: norm_topk_prob differs in the files: {_result(flipped)}")
    wrong = isinstance(flipped, str) or not flipped > BOUND
    counts, worst = Counter[str](), 0.0
    model_types = [options.only] if options.only else [*FAMILIES]
    for seed, (settings, config) in enumerate(cases(model_types, options.count, options.seed)):
        config = dataclasses.replace(config, **sizes)
        if config.family_problems():
            kind, result = "refused here", f"refused here: {config.family_problems()[0]}"
        else:
            found, ignored = run(config, config, seed, options), computed_otherwise(config)
            result = _result(found) + (f", expected: llama.cpp ignores {ignored}" if ignored else "")
            if isinstance(found, str):
                kind = "WRONG" if found.startswith(FAILED) else "refused by llama.cpp"
            elif ignored:
                kind = "known to differ"
            else:
                kind, worst = "equal" if found <= BOUND else "WRONG", max(worst, found)
                result += " WRONG" * (kind == "WRONG")
        counts[kind] += 1
        print(f"{config.model_type}: {settings}: {result}", flush=True)
    print(f"{', '.join(f'{n} {kind}' for kind, n in counts.items())}; worst difference {worst:.1e}")
    return int(wrong or counts["WRONG"] > 0)


def _result(found: float | str) -> str:
    return found if isinstance(found, str) else f"{found:.1e}"


if __name__ == "__main__":
    sys.exit(main())
