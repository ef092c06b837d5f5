"""What the real lerobot makes of a data set; run by an interpreter that has lerobot (benchmarks/lerobot_export.py).

    python benchmarks/lerobot_reader.py FOLDER OUT.npz

Imports nothing of ours.  Leaves every column of every frame as LeRobotDataset gives it, images as uint8 (F, H, W, 3),
and what else lerobot says of the data set as JSON in the entry "report".
"""

# pyright: reportMissingImports=false
# (lerobot lives in an environment of its own)

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lerobot.configs.types import FeatureType
from lerobot.datasets.aggregate import aggregate_datasets
from lerobot.datasets.compute_stats import aggregate_stats, get_feature_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.utils import dataset_to_policy_features
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.act.processor_act import make_act_pre_post_processors


def main(folder: Path, out: Path) -> None:
    began_s = time.perf_counter()
    dataset = LeRobotDataset("local/exported", root=folder)
    columns: dict[str, list] = {}
    for frame in range(len(dataset)):
        for name, value in dataset[frame].items():
            columns.setdefault(name, []).append(pixels(value) if name in dataset.meta.camera_keys else as_array(value))
    report = {
        "read_s": time.perf_counter() - began_s,
        "fps": dataset.fps,
        "episodes": dataset.num_episodes,
        "robot_type": dataset.meta.robot_type,
        "policy_features": sorted(dataset_to_policy_features(dataset.meta.features)),
        "stats_apart": stats_apart(dataset),
        "act_loss": act_loss(dataset),
        "schema_differences": schema_differences(folder, dataset),
        "merged_frames": merged_frames(folder, dataset),
    }
    arrays = {name: np.array(values) for name, values in columns.items()}
    entries: dict[str, Any] = {"report": np.array(json.dumps(report)), **arrays}
    np.savez(out, **entries)


def pixels(image_3HW: torch.Tensor) -> np.ndarray:
    return (255 * image_3HW).round().to(torch.uint8).permute(1, 2, 0).numpy()


def as_array(value: object) -> object:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def stats_apart(dataset: LeRobotDataset) -> dict[str, float]:
    """The greatest difference between our stats.json and what lerobot computes from the same columns, by statistic.

    Relative to the column's range; quantiles of lerobot's are of a histogram of 5000 bins.
    """
    apart: dict[str, float] = {}
    table = dataset.hf_dataset.with_format("numpy")
    for name, feature in dataset.features.items():
        if feature["dtype"] in ("image", "video", "string"):
            continue
        values, episodes = np.stack(list(table[name])), np.stack(list(table["episode_index"]))
        of_episodes = [
            {name: get_feature_stats(values[episodes == e].astype(np.float64), axis=0, keepdims=values.ndim == 1)}
            for e in np.unique(episodes)
        ]
        theirs, ours = aggregate_stats(of_episodes)[name], dataset.meta.stats[name]
        spread = np.maximum(theirs["max"] - theirs["min"], 1e-6)
        for statistic, value in theirs.items():
            scale = 1 if statistic == "count" else spread
            difference = float(np.max(np.abs(ours[statistic] - value) / scale))
            apart[statistic] = max(apart.get(statistic, 0.0), difference)
    return apart


def act_loss(dataset: LeRobotDataset) -> float:
    """The loss of one training step of LeRobot's ACT, fresh and small, on two frames."""
    features = dataset_to_policy_features(dataset.meta.features)
    config = ACTConfig(
        input_features={name: f for name, f in features.items() if f.type is not FeatureType.ACTION},
        output_features={name: f for name, f in features.items() if f.type is FeatureType.ACTION},
        chunk_size=3,
        n_action_steps=3,
        dim_model=32,
        dim_feedforward=32,
        pretrained_backbone_weights=None,
        device="cpu",
    )
    times = [step / dataset.fps for step in config.action_delta_indices]
    asking = LeRobotDataset(dataset.repo_id, root=dataset.root, delta_timestamps={"action": times})
    prepare, _ = make_act_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    batch = next(iter(torch.utils.data.DataLoader(asking, batch_size=2, shuffle=False)))
    loss, _ = ACTPolicy(config).forward(prepare(batch))
    loss.backward()
    return loss.item()


def schema_differences(folder: Path, dataset: LeRobotDataset) -> list[str]:
    """Where our files differ from those that lerobot writes for the same features: columns, types, entries of info."""
    own = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    features = {n: {k: v for k, v in f.items() if k != "info"} for n, f in dataset.features.items() if n not in own}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "theirs"
        fps = round(dataset.fps)  # lerobot reads any, but its encoder takes whole numbers only
        theirs = LeRobotDataset.create("local/theirs", fps, features, root=root, robot_type="x")
        for _ in range(2):
            theirs.add_frame({"task": "t", **{name: blank(feature) for name, feature in features.items()}})
        theirs.save_episode()
        theirs.finalize()
        found = []
        for path in (
            "data/chunk-000/file-000.parquet",
            "meta/episodes/chunk-000/file-000.parquet",
            "meta/tasks.parquet",
        ):
            a, b = (kinds(pq.read_schema(r / path)) for r in (folder, root))
            found += [f"{path}: {n}: ours {a.get(n)}, theirs {b.get(n)}" for n in {**a, **b} if a.get(n) != b.get(n)]
        ours, info = dataset.meta.info, theirs.meta.info
        found += [f"info.json: {name}" for name in {*ours} ^ {*info}]
        found += [
            f"info.json: {n}: {f}"
            for n, f in ours["features"].items()
            if {**f, "info": {*f.get("info", ())}} != (g := info["features"][n]) | {"info": {*g.get("info", ())}}
        ]
    return found


def kinds(schema: pa.Schema) -> dict[str, str]:
    """Column -> type; text is text, however pandas stores it."""
    return {
        name: str(kind).replace("large_string", "string") for name, kind in zip(schema.names, schema.types, strict=True)
    }


def blank(feature: dict) -> object:
    if feature["dtype"] == "string":
        return ""
    dtype = np.uint8 if feature["dtype"] in ("image", "video") else np.dtype(feature["dtype"])
    return np.zeros(feature["shape"], dtype)


def merged_frames(folder: Path, dataset: LeRobotDataset) -> int:
    """How many frames lerobot has after merging the data set with itself."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "merged"
        aggregate_datasets(["local/a", "local/b"], "local/merged", roots=[folder, folder], aggr_root=root)
        merged = LeRobotDataset("local/merged", root=root)
        assert merged[len(dataset)].keys() == dataset[0].keys()
        return len(merged)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
