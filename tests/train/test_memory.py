"""What cannot fit is refused before anything is written; the bound is below what a step keeps, and not far below."""

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import moe
from moe import ConfigError
from moe.cli import main
from moe.counts import count_parameters
from moe.train import memory
from moe.train.memory import activation_bytes, check_memory, state_bytes
from moe.train.optimizer import build_optimizers
from moe.train.run import train
from moe.train.settings import Settings
from tests.support.checkpoint_cases import BY_FAMILY

CPU = torch.device("cpu")


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: (nbytes, "this machine's memory"))


def kept_bytes(config: moe.ModelConfig, settings: Settings) -> int:
    """Bytes of the tensors that a forward pass leaves for the backward pass, parameters aside, each storage once."""
    model = moe.Transformer(config)
    model.set_activation_checkpointing(settings.activation_checkpointing)
    ids = torch.randint(0, config.vocab_size, (settings.batch_size, settings.seq_length))
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.dtype == "bf16"),
    ):
        out = model(ids, labels=ids, document_ids=torch.zeros_like(ids) if settings.document_mask else None)
    keep(out.logits)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen2_moe", "ernie4_5_moe", "qwen3"])
def test_activations_are_at_least_those_of_the_bound(family: str, dtype: Any, recompute: bool) -> None:
    config = BY_FAMILY[family]
    config = dataclasses.replace(config, moe_intermediate_size=40) if config.has_experts else config
    settings = Settings(batch_size=3, seq_length=48, dtype=dtype, activation_checkpointing=recompute)
    for document_mask in (False, True):
        settings = dataclasses.replace(settings, document_mask=document_mask)
        bound, kept = activation_bytes(config, settings, 3), kept_bytes(config, settings)
        assert kept / 8 < bound <= kept
    # A tensor that is counted twice would show: these are large beside everything else.
    wide = dataclasses.replace(config, vocab_size=20_000)
    assert activation_bytes(wide, settings, 3) > 0.6 * kept_bytes(wide, settings) / (
        1 + config.num_nextn_predict_layers
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "ernie4_5_moe", "qwen3"])
def test_states_are_those_of_the_optimizers(family: str, name: Any) -> None:
    model = moe.Transformer(BY_FAMILY[family])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers = build_optimizers(model, name, 0.1, 0.1)
    for optimizer in optimizers:
        optimizer.step()
    states = [value for o in optimizers for state in o.state.values() for value in state.values() if value.ndim]
    weights = sum(2 * parameter.nbytes for parameter in model.parameters())
    expected = weights, sum(state.nbytes for state in states)
    assert state_bytes(model.config, Settings(optimizer=name), 1) == expected


@pytest.mark.parametrize(
    ("mesh", "experts", "others"),
    [  # of how many ranks each has one's share
        (dict(), 8, 8),
        (dict(ep=4), 8, 8),
        (dict(ep=8, dp_shard=2, dp_replicate=4), 8, 2),
        (dict(dp_replicate=8), 1, 1),
        (dict(dp_shard=4, dp_replicate=2), 4, 4),
        (dict(ep=4, dp_shard=1, dp_replicate=8), 4, 1),
    ],
)
def test_ranks_share_the_states(mesh: Any, experts: int, others: int) -> None:
    config = dataclasses.replace(BY_FAMILY["mixtral"], n_routed_experts=8)
    counts = count_parameters(config)
    shares = counts.routed_experts / experts + (counts.total - counts.routed_experts) / others
    found = state_bytes(config, Settings(optimizer="adamw", **mesh), 8)
    assert found == (round(8 * shares), round(8 * shares))


def test_the_bound_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW on one process: 16 bytes per parameter, or, with activations, those without the gradients' 4."""
    config = dataclasses.replace(BY_FAMILY["mixtral"], vocab_size=500)
    settings = Settings(optimizer="adamw", batch_size=1, seq_length=4)
    states = 16 * count_parameters(config).total
    how: Any = dict(device=CPU, vocab_size=500)
    free(monkeypatch, states)
    check_memory(config, settings, **how)
    free(monkeypatch, states - 1)
    with pytest.raises(ConfigError, match=r"^--preset = 'tiny': expected a run that fits into this machine's memory"):
        check_memory(config, settings, **how)

    large = dataclasses.replace(settings, batch_size=100, seq_length=64)
    activations = activation_bytes(config, large, 100)
    assert activations > states
    free(monkeypatch, states * 3 // 4 + activations)
    check_memory(config, large, **how)
    free(monkeypatch, states * 3 // 4 + activations - 1)
    with pytest.raises(ConfigError, match=r"^--batch-size = 100: expected a run that fits"):
        check_memory(config, large, **how)
    free(monkeypatch, states // 4 + activations)  # before its only step an optimizer has no state
    check_memory(config, dataclasses.replace(large, steps=1), **how)
    free(monkeypatch, states + 1)
    with pytest.raises(ConfigError, match=r"^--seq-length = 2000: expected .*; use shorter sequences"):
        check_memory(config, dataclasses.replace(settings, seq_length=2000), **how)


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BY_FAMILY["mixtral"]
    settings = Settings(optimizer="adamw", batch_size=4, seq_length=4, dp_replicate=2)
    alone, cut = (sum(state_bytes(config, settings, ranks)) for ranks in (2, 4))
    assert alone == pytest.approx(2 * cut, abs=4)
    how: Any = dict(device=CPU, vocab_size=config.vocab_size)
    for ranks, here, needed in ((2, 2, 2 * alone), (4, 4, 4 * cut), (4, 2, 2 * cut), (2, 1, alone)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        free(monkeypatch, needed + 4)
        check_memory(config, settings, ranks=ranks, **how)
        free(monkeypatch, needed - 4)
        with pytest.raises(ConfigError, match="--preset"):
            check_memory(config, settings, ranks=ranks, **how)
    # Each process has a GPU of its own.
    free(monkeypatch, alone + 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_memory(config, settings, ranks=2, device=torch.device("cuda"), vocab_size=config.vocab_size)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--preset", "deepseek_v3"],
            "moesmith train: --preset: expected a run that fits into this machine's memory; found 7,6",
        ),
        (["--preset", "deepseek_v3", "--optimizer", "adamw"], "10,1"),
        (["--preset", "mixtral_8x7b", "--activation-checkpointing"], "a smaller model or, under torchrun, more ranks"),
        (["--batch-size", "1000000"], "moesmith train: --batch-size: expected a run that fits"),
        (["--batch-size", "1000000", "--activation-checkpointing", "--dtype", "bf16"], "fewer sequences"),
        (["--accumulation", "1000000000"], "moesmith train: --accumulation: expected a run that fits"),
        (["--accumulation", "1000000000"], "fewer forward passes per step"),
        (["--seq-length", "10000000"], "moesmith train: --seq-length: expected at most the model's"),
    ],
)
@pytest.mark.parametrize("again", [[], ["--overwrite"], ["--auto-resume"]], ids=lambda words: "".join(words))
def test_commands_that_cannot_fit(
    options: list[str],
    said: str,
    again: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    free(monkeypatch, 64 * 2**30)
    monkeypatch.setattr("moe.train.run.prepare", None)  # the data is not read
    monkeypatch.setattr("moe.train.run.Transformer", None)
    assert main(["train", *options, *again, "--out", str(tmp_path / "new" / "run")]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and said in shown.err and not shown.out
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_stays_where_another_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_text('{"preset": "tiny", "steps": 1, "seq_length": 4}')
    free(monkeypatch, 2**20)
    with pytest.raises(ConfigError, match=r"found [\d.]+ GiB needed at least, 0\.0 GiB free"):
        train(Settings(), folder, overwrite=True, console=Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "settings.json"]


def test_what_is_free_is_the_machines_own_figure() -> None:
    """No preset that fits the machine is refused."""
    available, _ = memory.free_bytes(CPU)
    assert 0 < available < 2**63
    assert math.isfinite(available)
    check_memory(moe.preset("tiny"), Settings(), device=CPU)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--preset", "mixtral_8x7b", "--bias-update-speed", "0.1"],
            "--bias-update-speed: expected the default 0.01: mixtral_8x7b has no correction bias",
        ),
        (["--dispatch", "fp8"], "--dispatch: expected same if --ep is 1"),
    ],
)
def test_options_without_effect_are_refused(
    options: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free(monkeypatch, 2**60)
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()
