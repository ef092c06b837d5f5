"""Decisions a second of a bare pass, beside transformers' generate() on the same shapes and weights in one run.

    python -m benchmarks.decode [--shape nano|openvla-7b] [--batches 1 8 16 32] [--seconds 10] [--device cuda]

Contenders, in turn in short slices: our pass, captured as CUDA graphs where there is CUDA; the same without; and what
one would write first, the towers and LlamaForCausalLM.generate() over their features, greedy, with its own cache.
All hold the same random weights.  Beside the rates: time by phase, memory, how far captured and eager answers are
apart, and the limit that reading all weights once for each token sets, from the speed of a copy measured here.

Prints a table, writes benchmarks/results/decode-SHAPE.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from benchmarks.update import Config as UpdateConfig
from benchmarks.update import build, library_llama
from policy_server.vla.decoding import Decoded, decode
from policy_server.vla.graphs import PassGraphs
from policy_server.vla.model import VLA, collate
from policy_server.vla.passes import DecodeInput, PassShape
from policy_server.vla.preprocessing import Prepared

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS = 24
COPY_BYTES = 2**30
PHASES = ("vision", "prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Measure bare decoding."""

    shape: Literal["nano", "openvla-7b"] = "nano"
    """The larger one in bfloat16."""
    batches: tuple[int, ...] = (1, 8, 16, 32)
    seconds: float = 10.0
    """Of each contender at each batch, in slices of a second."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 1


@dataclass
class Tally:
    """What one contender did."""

    passes_s: list[float] = field(default_factory=list)
    phases_s: list[tuple[float, float, float]] = field(default_factory=list)

    def row(self, batch: int) -> dict[str, float]:
        mean_s = float(np.mean(self.passes_s))
        row = {"decisions_per_s": batch / mean_s, "pass_p50_ms": 1e3 * float(np.median(self.passes_s))}
        if self.phases_s:
            phases_ms = 1e3 * np.median(self.phases_s, axis=0)
            row |= {f"{name}_ms": float(ms) for name, ms in zip(PHASES, phases_ms, strict=True)}
        return row


def main(config: DecodeConfig) -> None:
    torch.set_num_threads(config.threads)
    vla = build(UpdateConfig(shape=config.shape, weights="lora", device=config.device)).eval().requires_grad_(False)
    library = library_llama(vla, share=True).eval().requires_grad_(False)
    vla.language_model.fuse()
    shapes = [PassShape(batch=batch, prompt_length=PROMPT_TOKENS) for batch in config.batches]
    graphs = PassGraphs(vla, shapes, requests_of(vla, 1, temperature=1.0)[0])
    rows = []
    for batch in config.batches:
        requests = requests_of(vla, batch)
        contenders: dict[str, Callable[[], Decoded | None]] = {
            "captured": lambda requests=requests: decode(vla, requests, graphs=graphs),
            "eager": lambda requests=requests: decode(vla, requests),
            "generate": lambda requests=requests: generate(vla, library, requests),
        }
        tallies = {name: Tally() for name in contenders}
        for one in contenders.values():
            one()
        for _ in range(max(1, round(config.seconds))):
            for name, one in contenders.items():
                repeat(one, tallies[name], config.device)
        rows.append(
            {
                "batch": batch,
                **{name: tally.row(batch) for name, tally in tallies.items()},
                **apart(vla, requests, graphs),
            }
        )
        print_row(rows[-1])
    about = {"device": device_name(config.device), "config": asdict(config), **limits(vla, config.device)}
    print(f"{about['device']}: weights {about['weights_gb']:.2f} GB, read at {about['read_gb_per_s']:.0f} GB/s")
    (RESULTS / f"decode-{config.shape}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def requests_of(vla: VLA, batch: int, *, temperature: float = 0.0) -> list[DecodeInput]:
    """Noise and prompts of one length: the library needs no padding."""
    draw, config = np.random.default_rng(0), vla.config
    return [
        DecodeInput(
            prepared=Prepared(
                image=draw.integers(0, 256, (config.image_size, config.image_size, 3), dtype=np.uint8),
                input_ids=np.concatenate(([1], draw.integers(3, 300, PROMPT_TOKENS - 1))),
                state=draw.normal(size=config.state_dim).astype(np.float32) if config.state_dim else None,
            ),
            temperature=temperature,
            seed=row,
        )
        for row in range(batch)
    ]


@torch.inference_mode()
def generate(vla: VLA, library: Any, requests: Sequence[DecodeInput]) -> None:
    """Tokens of the whole vocabulary, as the published code gets them.  library: a LlamaForCausalLM."""
    prompts = collate([request.prepared for request in requests]).to(vla.device)
    x = vla.embed_prompts(prompts.input_ids_BL, vla.context(prompts))
    tokens = vla.config.action_tokens
    library.generate(
        inputs_embeds=x,
        attention_mask=torch.ones(x.shape[:2], dtype=torch.long, device=x.device),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    ).cpu()


def repeat(one: Callable[[], Decoded | None], tally: Tally, device: str) -> None:
    """For a second, and at least once."""
    until_s = time.perf_counter() + 1.0
    while True:
        began_s = time.perf_counter()
        decoded = one()
        tally.passes_s.append(time.perf_counter() - began_s)
        if decoded is not None:
            tally.phases_s.append((decoded.vision_s, decoded.prefill_s, decoded.decode_s))
        if time.perf_counter() > until_s:
            return


def apart(vla: VLA, requests: Sequence[DecodeInput], graphs: PassGraphs) -> dict[str, float]:
    """How far captured and eager answers are apart: of log-probabilities, where the tokens before are the same."""
    captured, eager = decode(vla, requests, graphs=graphs), decode(vla, requests)
    same = np.cumprod(captured.token_ids_BN == eager.token_ids_BN, axis=1).astype(bool)
    gap = np.abs(captured.token_logprobs_BN - eager.token_logprobs_BN)[same]
    memory = torch.cuda.max_memory_allocated() / 1e9 if vla.device.type == "cuda" else 0.0
    return {"same_tokens": float(same.mean()), "logprob_gap": float(gap.max(initial=0.0)), "peak_memory_gb": memory}


def limits(vla: VLA, device: str) -> dict[str, float]:
    """The bytes of the decoder, read once for each token, and how fast this device reads."""
    weights = sum(p.numel() * p.element_size() for p in vla.parameters())
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    copy, best_s = torch.empty_like(source), np.inf
    for _ in range(5):
        began_s = time.perf_counter()
        copy.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - began_s)
    return {"weights_gb": weights / 1e9, "read_gb_per_s": 2 * COPY_BYTES / best_s / 1e9}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else "CPU"


def print_row(row: dict) -> None:
    print(f"batch {row['batch']}")
    for name in ("captured", "eager", "generate"):
        own = row[name]
        phases = "".join(f"   {name} {own[f'{name}_ms']:.1f}" for name in PHASES if f"{name}_ms" in own)
        rate = own["decisions_per_s"]
        ratio = rate / row["generate"]["decisions_per_s"]
        print(f"  {name:10}{rate:8.1f} decisions/s  {ratio:5.2f}x  pass {own['pass_p50_ms']:.1f} ms{phases}")
    print(
        f"  captured against eager: {row['same_tokens']:.1%} of the tokens the same, log-probabilities within"
        f" {row['logprob_gap']:.1e}; {row['peak_memory_gb']:.1f} GB at most",
        flush=True,
    )


if __name__ == "__main__":
    main(tyro.cli(DecodeConfig, description=__doc__))
