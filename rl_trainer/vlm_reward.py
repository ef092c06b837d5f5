"""The process reward model of the paper: a pretrained Qwen2-VL with an adapter, asked whether the task is completed.

    <image> The task is {instruction}, is it completed?   ->   the next token, "1" or "0"

It judges the frames that a trajectory keeps, which are at the policy's size, and reads the instruction back from the
policy's prompt.  Needs transformers 5 (its image processor does without torchvision) and peft.

Shapes: B batch, L prompt tokens (padded), n observations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from policy_server.vla.config import PLACEHOLDER, VLAConfig
from policy_server.vla.preprocessing import Prepared
from policy_server.vla.tokenizer import Tokenizer
from rl_trainer.answering_model import ANSWERS, AnsweringModel

IMAGE = "<|image_pad|>"
CONVERSATION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>The task is {instruction}, is it completed?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


class Wording:
    """What a policy was told, from the tokens it was told it with."""

    def __init__(self, config: VLAConfig, tokenizer: Tokenizer):
        self._before, _, self._after = config.prompt_template.partition(PLACEHOLDER)
        self._backend = tokenizer.backend

    def __call__(self, observation: Prepared) -> str:
        """The instruction, in lower case as the policy reads it."""
        text = self._backend.decode(observation.input_ids.tolist()).strip()
        return text.removeprefix(self._before.strip()).removesuffix(self._after.strip()).strip()


class VlmReward(AnsweringModel):
    """A Qwen2-VL of which an adapter alone is trained.  Raises ValueError when its tokenizer lacks an answer."""

    kind = "vlm"
    predict_batch = 16

    def __init__(self, model: PeftModel, source: str, wording: Wording):
        """source: folder or hub id of the base, for its tokenizer and image processor."""
        self.model, self._wording = model, wording
        self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        self._images: Any = Qwen2VLImageProcessorPil.from_pretrained(source)
        tokens = self._tokenizer.get_vocab()
        if missing := [token for token in (*ANSWERS, IMAGE) if token not in tokens]:
            raise ValueError(
                f"the tokenizer of {source} must have the tokens {ANSWERS} and {IMAGE}, it lacks {missing}"
            )
        self._answer_ids, self._image_id = [tokens[answer] for answer in ANSWERS], tokens[IMAGE]

    @classmethod
    def adapted(
        cls,
        source: str,
        policy: VLAConfig,
        tokenizer: Tokenizer,
        *,
        rank: int,
        alpha: int,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> VlmReward:
        """A fresh adapter on all linear layers of the base at `source`, a folder or a hub id."""
        lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear")
        return cls(get_peft_model(_base(source, device, dtype), lora), source, Wording(policy, tokenizer))

    @classmethod
    def load(
        cls, folder: Path, policy: VLAConfig, tokenizer: Tokenizer, *, device: str = "cpu", dtype: str = "float32"
    ) -> VlmReward:
        """What save() left, on the base that it names."""
        source = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        if source is None:
            raise ValueError(f"{folder}: the adapter must name the model it belongs to, got none")
        model = PeftModel.from_pretrained(_base(source, device, dtype), str(folder))
        return cls(model, source, Wording(policy, tokenizer))

    def save(self, folder: Path) -> None:
        """The adapter in peft's layout."""
        # Copies, since the optimiser's parameters are views of one vector.
        adapter = {name: tensor.clone() for name, tensor in self.model.state_dict().items() if "lora_" in name}
        self.model.save_pretrained(str(folder), state_dict=adapter, save_embedding_layers=False)

    def _logits(self, observations: Sequence[Prepared]) -> torch.Tensor:
        """float32 (B, 2): no, yes."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in self._inputs(observations).items()}
        logits_B1V = self.model(**inputs, logits_to_keep=1, use_cache=False).logits
        return logits_B1V[:, -1, self._answer_ids].float()

    def _inputs(self, observations: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        """Rows of L tokens, padded on the left so that all end where the answer begins; a token per merged patch."""
        images = self._images(images=[observation.image for observation in observations], return_tensors="pt")
        tokens_B = images["image_grid_thw"].prod(-1) // self._images.merge_size**2
        texts = [
            CONVERSATION.format(image=IMAGE * int(count), instruction=self._wording(observation))
            for count, observation in zip(tokens_B, observations, strict=True)
        ]
        words = self._tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        return {
            "input_ids": words["input_ids"],
            "attention_mask": words["attention_mask"],
            "mm_token_type_ids": (words["input_ids"] == self._image_id).int(),
            "pixel_values": images["pixel_values"],
            "image_grid_thw": images["image_grid_thw"],
        }


def _base(source: str, device: str, dtype: str) -> Any:
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(source, dtype=getattr(torch, dtype))
    return model.to(device)
