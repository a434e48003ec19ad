"""TRL's SFTTrainer, which demands a model of transformers, with our experts beside eager ones."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import moe.integrations.transformers as integration

trl: Any = pytest.importorskip("trl")
datasets: Any = pytest.importorskip("datasets")
# TRL's own: it sets an option by the name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
integration.register()
WORDS = ["the", "expert", "that", "a", "token", "chooses", "is", "of", "no", "other", "than", "it"]


def tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *dict.fromkeys(WORDS)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    names: Any = dict(pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def test_fine_tuning_equals_eager(tmp_path: Path) -> None:
    texts = [" ".join(WORDS[i % 5 :: 1 + i % 3]) for i in range(8)]
    sizes: Any = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2) | {"num_local_experts": 6}
    whole = MixtralForCausalLM(
        MixtralConfig(vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, **sizes)
    )

    def train(implementation: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = copy.deepcopy(whole)
        model.set_experts_implementation(implementation)
        settings: Any = dict(max_steps=4, learning_rate=0.01, per_device_train_batch_size=2, report_to=[])
        settings |= dict(gradient_accumulation_steps=2, logging_steps=1, save_strategy="no", disable_tqdm=True)
        arguments = trl.SFTConfig(str(tmp_path / implementation), use_cpu=True, bf16=False, max_length=16, **settings)
        data = datasets.Dataset.from_list([{"text": text} for text in texts])
        run = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer())
        run.train()
        assert implementation == "eager" or len(integration.check(run.model)) == 2
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry], model.state_dict()

    (ours, weights), (theirs, exact) = train("moesmith"), train("eager")
    assert ours == pytest.approx(theirs, rel=1e-4) and ours[-1] < ours[0]
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, exact[name], rtol=1e-3, atol=1e-4, msg=name)
