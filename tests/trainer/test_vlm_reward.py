"""A Qwen2-VL in the reward model's place: a tiny random one, with a tokenizer made here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("peft", reason="a VLM's adapter needs peft")
pytest.importorskip(
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl", reason="Qwen2-VL without torchvision: transformers 5"
)

import tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from policy_server.vla.checkpoint import Checkpoint, load_checkpoint
from policy_server.vla.config import OPENVLA_PROMPT, PLACEHOLDER
from policy_server.vla.preprocessing import Prepared
from rl_trainer.optimizer import Optimizer
from rl_trainer.reward_model import load_reward_model, train_reward_model
from rl_trainer.vlm_reward import VlmReward, Wording
from tests.trainer.test_reward_model import BRIGHT, DARK, seen, toy_config

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as the hub would give it: model, tokenizer, image processor."""
    folder = tmp_path_factory.mktemp("tiny_qwen")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[*SPECIAL, "<|video_pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the task is completed"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=SPECIAL[0]).save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    ids = {token: backend.token_to_id(token) for token in [*SPECIAL, "<|video_pad|>"]}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tiny_vla: Path) -> Checkpoint:
    return load_checkpoint(tiny_vla)


@pytest.fixture
def model(tiny_qwen: str, checkpoint: Checkpoint) -> VlmReward:
    torch.manual_seed(0)
    return VlmReward.adapted(tiny_qwen, checkpoint.config, checkpoint.tokenizer, rank=4, alpha=8)


@pytest.fixture
def observations(checkpoint: Checkpoint) -> list[Prepared]:
    return [seen(checkpoint, DARK), seen(checkpoint, BRIGHT, "pick up the milk and place it in the basket")]


def test_the_instruction_is_read_back_from_the_policys_prompt(checkpoint: Checkpoint) -> None:
    for template in (checkpoint.config.prompt_template, OPENVLA_PROMPT):
        config = replace(checkpoint.config, prompt_template=template)
        ids = checkpoint.tokenizer.encode_prompt(template.replace(PLACEHOLDER, "pick up the milk"))
        observation = Prepared(image=np.zeros((32, 32, 3), np.uint8), input_ids=ids, state=None)
        assert Wording(config, checkpoint.tokenizer)(observation) == "pick up the milk"


def test_a_prediction_depends_on_frame_and_instruction_and_not_on_its_neighbours(
    model: VlmReward, observations: list[Prepared]
) -> None:
    together = model.predict(observations)
    apart = [float(model.predict([observation])[0]) for observation in observations]
    np.testing.assert_allclose(together, apart, atol=1e-5)
    other_frame = replace(observations[0], image=observations[1].image)
    other_words = replace(observations[0], input_ids=observations[1].input_ids)
    changed = model.predict([other_frame, other_words])
    assert ((together >= 0) & (together <= 1)).all() and (np.abs(changed - together[0]) > 1e-6).all()


def test_a_prediction_is_the_share_of_1_against_0_among_the_next_tokens(
    model: VlmReward, observations: list[Prepared]
) -> None:
    inputs = model._inputs(observations[:1])
    with torch.no_grad():
        next_token_V = torch.softmax(model.model(**inputs).logits[0, -1].double(), 0)
    zero, one = (model._tokenizer.get_vocab()[answer] for answer in "01")
    expected = next_token_V[one] / (next_token_V[zero] + next_token_V[one])
    assert model.predict(observations[:1])[0] == pytest.approx(float(expected), abs=1e-6)


def test_a_step_of_the_adapter_alone_lowers_the_loss_and_what_is_saved_predicts_the_same(
    model: VlmReward, observations: list[Prepared], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    parameters, target_B = model.parameters(), np.array([1.0, 0.0])
    assert parameters and all("lora_" in name for name in parameters)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in parameters}
    assert {"q_proj", "down_proj", "qkv", "fc1"} <= adapted and "lm_head" not in adapted
    optimizer = Optimizer(parameters, weight_decay=0.0, clip_norm=1.0, ema=0)
    fresh, loss = model.predict(observations), model.loss(observations, target_B)
    loss.backward()
    optimizer.collect_gradients()
    optimizer.step(1e-2)
    assert model.loss(observations, target_B).item() < loss.item()
    model.save(tmp_path / "vlm")
    loaded = VlmReward.load(tmp_path / "vlm", checkpoint.config, checkpoint.tokenizer)
    assert (loaded.predict(observations) == model.predict(observations)).all()
    assert (loaded.predict(observations) != fresh).all()


def test_the_command_trains_an_adapter_and_its_folder_is_loaded_as_what_it_is(
    tmp_path: Path, tiny_vla: Path, tiny_qwen: str, checkpoint: Checkpoint, observations: list[Prepared]
) -> None:
    config = toy_config(tmp_path, tiny_vla, vlm=tiny_qwen, steps=2, batch_size=4, lora_rank=2)
    train_reward_model(config)
    model = load_reward_model(config.out, checkpoint.config, checkpoint.tokenizer)
    assert isinstance(model, VlmReward)
    predicted = model.predict(observations)
    assert ((predicted > 0) & (predicted < 1)).all()
