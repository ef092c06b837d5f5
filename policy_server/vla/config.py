"""What a checkpoint's config.json says: OpenVLA's published format, and a few fields of ours.

A field of ours that is absent means OpenVLA exactly.  Shapes of the published vision towers come from TOWERS, by their
timm names; any other tower is described in config.json itself, under `vision_towers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

ImagePath = Literal["libero", "plain", "processor"]

PLACEHOLDER = "{instruction}"
OPENVLA_PROMPT = f"In: What action should the robot take to {PLACEHOLDER}?\nOut:"
ONE_TOWER_PROJECTOR = "no-align+gelu-mlp"
TWO_TOWER_PROJECTOR = "no-align+fused-gelu-mlp"


class ConfigError(ValueError):
    """A config.json that does not describe a model we know."""


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """One vision transformer."""

    image_size: int
    """Side of its square input, pixels."""
    patch_size: int
    width: int
    depth: int
    """Blocks in the checkpoint."""
    heads: int
    mlp_width: int
    output_block: int
    """The block whose output is the feature, without the final norm; OpenVLA: depth - 2."""
    class_token: bool = False
    register_tokens: int = 0
    layer_scale: bool = False
    final_norm: bool = True
    """Whether the checkpoint holds a final norm; never applied."""
    attention_pool: bool = False
    """Whether the checkpoint holds a pooling head; never applied."""
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of pixels in [0, 1]; a checkpoint's preprocessor_config.json has the last word."""
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size or self.width % self.heads:
            raise ConfigError(
                f"a tower's image_size must be a multiple of its patch_size and width of heads, got {self.image_size}"
                f" and {self.patch_size}, {self.width} and {self.heads}"
            )
        if not 0 <= self.output_block < self.depth:
            raise ConfigError(f"output_block must be in [0, {self.depth - 1}], got {self.output_block}")

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """Class and register tokens, before the patches."""
        return int(self.class_token) + self.register_tokens


TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": TowerConfig(
        image_size=224, patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096, output_block=22,
        class_token=True, register_tokens=4, layer_scale=True,
        pixel_mean=(0.484375, 0.455078125, 0.40625), pixel_std=(0.228515625, 0.2236328125, 0.224609375),
    ),
    "vit_so400m_patch14_siglip_224": TowerConfig(
        image_size=224, patch_size=14, width=1152, depth=27, heads=16, mlp_width=4304, output_block=25,
        attention_pool=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The decoder; the defaults are Llama-2-7B's, as the published text_config leaves them out."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    vocab_size: int = 32064
    """Rows of the embedding, padding included."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ConfigError(
                f"hidden_size must be a multiple of 2 * num_attention_heads, got {self.hidden_size} and"
                f" {self.num_attention_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


# What the decoder does not implement, with the one value it does.
LLAMA_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}


# Keys of config.json that follow from the others.
DERIVED = ("model_type", "arch_specifier", "image_sizes", "use_fused_vision_backbone")


@dataclass(frozen=True, kw_only=True)
class VLAConfig:
    """The whole model."""

    towers: tuple[TowerConfig, ...]
    """One or two; all see the same image."""
    tower_names: tuple[str, ...]
    """Their timm names."""
    llm: LlamaConfig
    norm_stats: Mapping[str, Mapping[str, Any]]
    """Data set -> {"action": {"q01", "q99", "mask", ...}, "proprio": {"q01", "q99", ...}}, lists of numbers."""
    n_action_bins: int = 256
    pad_to_multiple_of: int = 64
    """Rows of the embedding beyond the vocabulary."""
    pad_token_id: int = 32000
    state_dim: int = 0
    """S: numbers of the robot's state, read as one token after the patches; 0 for none."""
    state_names: tuple[str, ...] = ()
    """S names, as arms call them."""
    patch_merge: int = 1
    """Side of the square of patches that become one token before the projector."""
    chunk_length: int = 1
    """K: actions of one answer."""
    prompt_template: str = OPENVLA_PROMPT
    """With {instruction}, which is put in lower case."""
    image_path: ImagePath = "libero"
    """What happens to an image before the towers, see preprocessing.py."""
    camera: str = "agentview"
    """Name of the image the model reads."""
    camera_size: int = 0
    """Side of the image a simulated camera sends, pixels; 0 takes what the image path was made for."""
    tick_rate_hz: float = 0.0
    """Control rate of the training data; 0 when unknown."""
    other: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that we do not read, kept for those who do."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.towers) <= 2:
            raise ConfigError(f"a model has one or two vision towers, got {len(self.towers)}")
        if len({(t.image_size, t.patches_per_side) for t in self.towers}) > 1:
            raise ConfigError("both vision towers must have the same image and patch grid")
        if self.towers[0].patches_per_side % self.patch_merge:
            raise ConfigError(
                f"patch_merge must divide {self.towers[0].patches_per_side} patches a side, got {self.patch_merge}"
            )
        if self.image_path not in get_args(ImagePath):
            raise ConfigError(f"image_path must be one of {list(get_args(ImagePath))}, got {self.image_path!r}")
        if PLACEHOLDER not in self.prompt_template:
            raise ConfigError(f"prompt_template must contain {PLACEHOLDER}, got {self.prompt_template!r}")
        if self.state_names and len(self.state_names) != self.state_dim:
            raise ConfigError(
                f"state_names must have state_dim = {self.state_dim} entries, got {len(self.state_names)}"
            )
        if self.chunk_length < 1 or self.state_dim < 0:
            raise ConfigError(
                f"chunk_length must be >= 1 and state_dim >= 0, got {self.chunk_length}, {self.state_dim}"
            )
        for key, statistics in self.norm_stats.items():
            for part in ("action", "proprio")[: 1 + (self.state_dim > 0)]:
                if missing := {"q01", "q99"} - statistics.get(part, {}).keys():
                    raise ConfigError(f"norm_stats[{key!r}][{part!r}] must hold q01 and q99, without {sorted(missing)}")
        if not self.norm_stats or len({len(s["action"]["q01"]) for s in self.norm_stats.values()}) != 1:
            raise ConfigError("norm_stats must hold at least one data set, all with actions of the same dimension")

    @property
    def image_size(self) -> int:
        return self.towers[0].image_size

    @property
    def sent_size(self) -> int:
        """Side of the image a simulated camera should send, pixels."""
        return self.camera_size or (256 if self.image_path == "libero" else self.image_size)

    @property
    def vision_width(self) -> int:
        """Channels of one image token before the projector."""
        return sum(tower.width for tower in self.towers) * self.patch_merge**2

    @property
    def num_image_tokens(self) -> int:
        return (self.towers[0].patches_per_side // self.patch_merge) ** 2

    @property
    def num_context_tokens(self) -> int:
        """Tokens between BOS and the rest of the prompt: the image's, then the state's."""
        return self.num_image_tokens + (self.state_dim > 0)

    @property
    def vocabulary(self) -> int:
        """Size without the padding rows: what the action bins are counted from."""
        return self.llm.vocab_size - self.pad_to_multiple_of

    @property
    def action_begin(self) -> int:
        """Id of the first of the n_action_bins action tokens, the last ids of the vocabulary."""
        return self.vocabulary - self.n_action_bins

    @property
    def action_dim(self) -> int:
        """A."""
        return len(next(iter(self.norm_stats.values()))["action"]["q01"])

    @property
    def action_tokens(self) -> int:
        """N = K * A."""
        return self.chunk_length * self.action_dim

    @property
    def max_prompt_tokens(self) -> int:
        """What the decoder's positions leave for the prompt."""
        return self.llm.max_position_embeddings - self.num_context_tokens - self.action_tokens

    @classmethod
    def from_json(cls, path: Path | str) -> VLAConfig:
        """Raises ConfigError."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"config.json is not readable JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config.json must hold an object, got {type(values).__name__}")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VLAConfig:
        """Parses the published format.  Raises ConfigError."""
        try:
            return cls._parsed(values)
        except ConfigError:
            raise
        except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"an entry is missing or of the wrong kind: {type(error).__name__}: {error}") from error

    @classmethod
    def _parsed(cls, values: Mapping[str, Any]) -> VLAConfig:
        if values.get("model_type") != "openvla":
            raise ConfigError(f'model_type must be "openvla", got {values.get("model_type")!r}')
        names = tuple(values.get("timm_model_ids") or ())
        towers = _towers(names, values.get("vision_towers"), values.get("image_sizes"))
        expected = TWO_TOWER_PROJECTOR if len(towers) == 2 else ONE_TOWER_PROJECTOR
        if values.get("arch_specifier") != expected:
            raise ConfigError(f"arch_specifier must be {expected!r} here, got {values.get('arch_specifier')!r}")
        own = {f.name for f in fields(cls)} - {"towers", "tower_names", "llm", "other"}
        derived = {*DERIVED, "timm_model_ids", "vision_towers", "text_config"}
        chosen: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key in own
        }
        chosen.setdefault("norm_stats", {})
        other = {key: value for key, value in values.items() if key not in own | derived}
        llm = _llama(values.get("text_config") or {})
        return cls(towers=towers, tower_names=names, llm=llm, other=other, **chosen)

    def to_dict(self) -> dict[str, Any]:
        """The published format; from_dict(to_dict()) is the same config."""
        names = [f.name for f in fields(self) if f.name not in ("towers", "tower_names", "llm", "other")]
        published = {"norm_stats", "n_action_bins", "pad_to_multiple_of", "pad_token_id"}
        defaults = {f.name: f.default for f in fields(self)}
        own = {n: getattr(self, n) for n in names if n in published or getattr(self, n) != defaults[n]}
        llm = {f.name: getattr(self.llm, f.name) for f in fields(self.llm)}
        values = {
            **self.other,
            "model_type": "openvla",
            "arch_specifier": TWO_TOWER_PROJECTOR if len(self.towers) == 2 else ONE_TOWER_PROJECTOR,
            "timm_model_ids": list(self.tower_names),
            "image_sizes": [self.image_size] * len(self.towers),
            "use_fused_vision_backbone": len(self.towers) == 2,
            "text_config": {"model_type": "llama", "pad_token_id": self.pad_token_id, **llm},
            **own,
        }
        if any(name not in TOWERS for name in self.tower_names):
            values["vision_towers"] = [{f.name: getattr(t, f.name) for f in fields(t)} for t in self.towers]
        return values


def _towers(
    names: Sequence[str], described: Sequence[Mapping[str, Any]] | None, image_sizes: Sequence[int] | None
) -> tuple[TowerConfig, ...]:
    if described is not None:
        tuples = [{k: tuple(v) if isinstance(v, list) else v for k, v in tower.items()} for tower in described]
        return tuple(_record(TowerConfig, tower, "vision_towers") for tower in tuples)
    unknown = [name for name in names if name not in TOWERS]
    if unknown or not names:
        raise ConfigError(
            f"unknown vision tower {unknown or names}; known are {sorted(TOWERS)}, others need vision_towers"
        )
    sizes = image_sizes or [TOWERS[name].image_size for name in names]
    return tuple(replace(TOWERS[name], image_size=size) for name, size in zip(names, sizes, strict=True))


def _llama(values: Mapping[str, Any]) -> LlamaConfig:
    for key, implemented in LLAMA_FIXED.items():
        if values.get(key, implemented) != implemented:
            raise ConfigError(f"text_config.{key} must be {implemented!r}, got {values[key]!r}")
    llm = _record(
        LlamaConfig, {k: v for k, v in values.items() if k in LlamaConfig.__dataclass_fields__}, "text_config"
    )
    kv_heads = values.get("num_key_value_heads", llm.num_attention_heads)
    if kv_heads != llm.num_attention_heads:
        raise ConfigError(f"text_config.num_key_value_heads must be {llm.num_attention_heads}, got {kv_heads}")
    return llm


def _record(kind: type, values: Mapping[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def nano_config(norm_stats: Mapping[str, Mapping[str, Any]], **overrides: Any) -> VLAConfig:
    """The embedded default's architecture: 2.0 M parameters, one 128 px image, eight state numbers, eight actions."""
    tower = TowerConfig(
        image_size=128, patch_size=16, width=128, depth=3, heads=4, mlp_width=512, output_block=2, final_norm=False
    )
    llm = LlamaConfig(
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=3,
        num_attention_heads=5,
        vocab_size=NANO_TEXT_VOCABULARY + 256,
        max_position_embeddings=256,
    )
    values: dict[str, Any] = {
        "towers": (tower,),
        "tower_names": ("vit_nano_patch16_128",),
        "llm": llm,
        "norm_stats": norm_stats,
        "pad_to_multiple_of": 0,
        "pad_token_id": 2,
        "state_dim": 8,
        "patch_merge": 2,
        "chunk_length": 8,
        "prompt_template": PLACEHOLDER,
        "image_path": "plain",
        "tick_rate_hz": 20.0,
    }
    return VLAConfig(**{**values, **overrides})


NANO_TEXT_VOCABULARY = 512
"""Entries of nano's own tokenizer."""
