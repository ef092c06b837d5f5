"""Writes a LeRobotDataset v3.0, episode by episode, as lerobot 0.4.4 itself lays it out (protos/lerobot.py).

An episode is a row group of a data file and, as video, a stretch of a film; a file that has grown to its limit is
followed by another.  Images lie in the data files, as PNG, or in the films.  Needs pyarrow, and av for videos.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from protos import image, lerobot
from robot_client.lerobot.film import VIDEO_FILE_MB, Codec, Film
from robot_client.lerobot.statistics import Stats, image_statistics, merged, statistics

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

DATA_FILE_MB = 100
EPISODES_AT_ONCE = 100
"""Rows of meta/episodes that are written together."""
Features = Mapping[str, Mapping[str, Any]]


class DatasetWriter:
    """One data set in a folder that must not exist yet.

    features: the columns but LeRobot's own five, as meta/info.json describes them; images are "image" or "video".
    codec and crf: of the videos; the lower the crf, the better the pictures.
    """

    def __init__(
        self,
        folder: Path,
        features: Features,
        *,
        fps: float,
        robot_type: str,
        codec: Codec = "h264",
        crf: int = 18,
        data_file_mb: float = DATA_FILE_MB,
    ):
        folder.mkdir(parents=True)
        own = {name: {"dtype": "int64", "shape": (1,), "names": None} for name in OWN}
        self._features = {**features, **own, "timestamp": {**own["index"], "dtype": "float32"}}
        self._folder, self._fps, self._robot_type = folder, fps, robot_type
        self._films = {
            name: Film(folder, name, fps=fps, codec=codec, crf=crf)
            for name, feature in self._features.items()
            if feature["dtype"] == "video"
        }
        self._data = Parquet(folder, lerobot.DATA, limit_mb=data_file_mb)
        self._episodes = Parquet(folder, lerobot.EPISODES, limit_mb=DATA_FILE_MB)
        self._rows: list[dict[str, Any]] = []
        self._tasks: dict[str, int] = {}
        self._stats: dict[str, Stats] = {}
        self._frames = self._count = 0

    def add(
        self, columns: Mapping[str, np.ndarray], frames: Mapping[str, Sequence[np.ndarray]], instructions: Sequence[str]
    ) -> None:
        """One episode of F frames.

        columns: (F, width), every feature but images and LeRobot's own five.  frames: F images uint8 (H, W, 3) for
        each camera's column.  instructions: F.
        """
        length = len(instructions)
        index = np.arange(length)
        tasks = [self._tasks.setdefault(instruction, len(self._tasks)) for instruction in instructions]
        own = {
            "timestamp": (index / self._fps).astype(np.float32),
            "frame_index": index,
            "episode_index": np.full(length, self._count),
            "index": self._frames + index,
            "task_index": np.array(tasks),
        }
        columns = {**columns, **{name: column[:, None] for name, column in own.items()}}
        stats = {name: statistics(column) for name, column in columns.items() if column.dtype != object}
        stats |= {name: image_statistics(pixels) for name, pixels in frames.items()}
        stretches = [film.add(frames[name]) for name, film in self._films.items()]
        at = self._data.write(self._table(columns, frames))
        self._rows.append(
            {
                "episode_index": self._count,
                "tasks": list(dict.fromkeys(instructions)),
                "length": length,
                **{f"data/{name}": number for name, number in at.items()},
                "dataset_from_index": self._frames,
                "dataset_to_index": self._frames + length,
                **{name: value for stretch in stretches for name, value in stretch.items()},
                **{f"stats/{name}/{s}": v.tolist() for name, values in stats.items() for s, v in values.items()},
            }
        )
        self._stats = {name: merged(self._stats.get(name), new) for name, new in stats.items()}
        self._frames, self._count = self._frames + length, self._count + 1
        if len(self._rows) >= EPISODES_AT_ONCE:
            self._write_rows()

    def finish(self) -> None:
        """After this the data set can be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._write_rows()
        self._episodes.close()
        self._data.close()
        for name, film in self._films.items():
            film.close()
            self._features[name] = {**self._features[name], "info": film.info()}
        tasks = pa.table({"task_index": list(self._tasks.values()), lerobot.TASK_NAMES: list(self._tasks)})
        pq.write_table(tasks.replace_schema_metadata(PANDAS), self._folder / lerobot.TASKS)
        stats = {name: {s: v.tolist() for s, v in values.items()} for name, values in self._stats.items()}
        self._write_json(lerobot.STATS, stats)
        self._write_json(lerobot.INFO, self._info())

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": lerobot.VERSION,
            "robot_type": self._robot_type,
            "total_episodes": self._count,
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": lerobot.FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": int(self._fps) if self._fps == int(self._fps) else self._fps,
            "splits": {"train": f"0:{self._count}"},
            "data_path": lerobot.DATA,
            "video_path": lerobot.VIDEO if self._films else None,
            "features": self._features,
        }

    def _table(self, columns: Mapping[str, np.ndarray], frames: Mapping[str, Sequence[np.ndarray]]) -> pa.Table:
        import pyarrow as pa

        arrays, known = {}, {}
        for name, feature in self._features.items():
            if feature["dtype"] == "image":
                pngs = [
                    {"bytes": image.encode_png(pixels), "path": f"frame-{f:06d}.png"}
                    for f, pixels in enumerate(frames[name])
                ]
                arrays[name] = pa.array(pngs, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
                known[name] = {"_type": "Image"}
            elif feature["dtype"] != "video":
                width, value = feature["shape"][0], {"dtype": feature["dtype"], "_type": "Value"}
                flat = pa.array(columns[name].reshape(-1), pa.type_for_alias(feature["dtype"]))
                arrays[name] = flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
                known[name] = value if width == 1 else {"feature": value, "length": width, "_type": "List"}
        # What the `datasets` library reads the columns' kinds from.
        return pa.table(arrays, metadata={"huggingface": json.dumps({"info": {"features": known}})})

    def _write_rows(self) -> None:
        import pyarrow as pa

        if self._rows:
            at = self._episodes.place
            rows = [{**row, **{f"meta/episodes/{name}": number for name, number in at.items()}} for row in self._rows]
            self._episodes.write(pa.Table.from_pylist(rows))
            self._rows = []

    def _write_json(self, path: str, content: dict[str, Any]) -> None:
        (self._folder / path).write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")


OWN = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""The columns that every LeRobot data set has."""
PANDAS = {
    "pandas": json.dumps(
        {
            "index_columns": [lerobot.TASK_NAMES],
            "column_indexes": [
                {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
            ],
            "columns": [
                {
                    "name": "task_index",
                    "field_name": "task_index",
                    "pandas_type": "int64",
                    "numpy_type": "int64",
                    "metadata": None,
                },
                {
                    "name": None,
                    "field_name": lerobot.TASK_NAMES,
                    "pandas_type": "unicode",
                    "numpy_type": "object",
                    "metadata": None,
                },
            ],
        }
    )
}
"""What makes pandas take the instructions as the index."""


class Parquet:
    """Tables one after another, in files of about limit_mb."""

    def __init__(self, folder: Path, pattern: str, *, limit_mb: float):
        self._folder, self._pattern, self._limit_mb = folder, pattern, limit_mb
        self._number = 0
        self._writer: pq.ParquetWriter | None = None

    @property
    def place(self) -> dict[str, int]:
        """Where the next table goes."""
        return lerobot.place(self._number)

    @property
    def _path(self) -> Path:
        return self._folder / self._pattern.format(**self.place)

    def write(self, table: pa.Table) -> dict[str, int]:
        """Where it was written."""
        import pyarrow.parquet as pq

        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)
        at = self.place
        if self._path.stat().st_size >= self._limit_mb * 2**20:
            self.close()
            self._number += 1
        return at

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
