"""Reads a LeRobotDataset v3.0 recording by recording: its columns, and what one camera saw (protos/lerobot.py).

Anybody's data set will do: ours, whose frames may hold several ticks, and others', with a frame for every tick.  One
data file is in memory at a time.  Needs pyarrow, and av for videos.  Shapes: F frames of a recording.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from protos import image, lerobot

NEEDED = (lerobot.ACTION, "timestamp", "index", "task_index")


class UnreadableDataset(ValueError):
    """A data set that cannot be learned from.  The message names it, what was got and what is expected."""


class UnreadableRecording(ValueError):
    """One of its recordings that cannot be read.  The message says why."""


class LerobotDataset:
    """The data set in a folder.

    camera: its images are read.  Raises UnreadableDataset for another version, for columns that are missing, and
    without the packages that it takes.
    """

    def __init__(self, folder: Path, camera: str):
        self.folder = folder
        try:
            self._info = json.loads((folder / lerobot.INFO).read_text(encoding="utf-8"))
            self.features: dict[str, dict[str, Any]] = self._info["features"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnreadableDataset(f"{folder}: not a LeRobot data set: {error!r}") from error
        version = self._info.get("codebase_version")
        if version != lerobot.VERSION:
            raise UnreadableDataset(
                f"{folder}: codebase_version must be {lerobot.VERSION}, got {version}; lerobot converts older ones"
            )
        self.camera = lerobot.IMAGES + camera
        images = sorted(name for name, feature in self.features.items() if feature["dtype"] in ("image", "video"))
        if self.camera not in images:
            available = [name.removeprefix(lerobot.IMAGES) for name in images]
            raise UnreadableDataset(f"{folder}: camera {camera!r} is missing, available: {available}")
        if missing := [name for name in NEEDED if name not in self.features]:
            raise UnreadableDataset(f"{folder}: columns {missing} are missing, available: {sorted(self.features)}")
        self._columns = [name for name in self.features if name not in images]
        if not self.is_film:
            self._columns.append(self.camera)
        tasks = self._read(folder / lerobot.TASKS)
        (names,) = (name for name in tasks.column_names if name != "task_index")  # pandas' index, however it is called
        self.tasks: dict[int, str] = dict(zip(tasks["task_index"].to_pylist(), tasks[names].to_pylist(), strict=True))

    @property
    def fps(self) -> float:
        return float(self._info["fps"])

    @property
    def is_film(self) -> bool:
        """Whether the camera's images lie in videos."""
        return self.features[self.camera]["dtype"] == "video"

    def recordings(self) -> Iterator[Recording]:
        """In order.  Raises UnreadableDataset."""
        path: Path | None = None
        table, first = None, 0
        for row in self._rows():
            place = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
            here = self.folder / self._info["data_path"].format(**place)
            if here != path:
                path, table = here, self._read(here, self._columns)
                first = table["index"][0].as_py()
            assert table is not None
            yield Recording(self, row, table.slice(row["dataset_from_index"] - first, row["length"]))

    def film_path(self, row: dict[str, Any]) -> Path:
        """The video that holds a recording's frames."""
        place = {name: row[f"videos/{self.camera}/{name}"] for name in ("chunk_index", "file_index")}
        return self.folder / self._info["video_path"].format(video_key=self.camera, **place)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for path in sorted((self.folder / lerobot.EPISODES).parents[1].glob("*/*.parquet")):
            table = self._read(path)
            yield from table.select([n for n in table.column_names if not n.startswith("stats/")]).to_pylist()

    def _read(self, path: Path, columns: list[str] | None = None) -> Any:
        """The table in a file."""
        try:
            import pyarrow.parquet as pq  # only this source of demonstrations needs it

            return pq.ParquetFile(path).read(columns)
        except ImportError as error:
            raise UnreadableDataset(f"{self.folder}: reading it needs pyarrow: pip install pyarrow av") from error
        except (OSError, ValueError) as error:
            raise UnreadableDataset(f"{path}: not a readable parquet file: {error}") from error


class Recording:
    """One episode of F frames.  table: its rows, pyarrow's."""

    def __init__(self, dataset: LerobotDataset, row: dict[str, Any], table: Any):
        self.dataset = dataset
        self._row, self._table = row, table

    @property
    def name(self) -> str:
        return f"{self.dataset.folder.name}/{self._row['episode_index']}"

    @property
    def instruction(self) -> str:
        return self.dataset.tasks[self._table["task_index"][0].as_py()]

    def column(self, name: str) -> np.ndarray:
        """(F, width) of a column of numbers."""
        column = self._table[name].combine_chunks()
        flat = column.flatten() if hasattr(column, "flatten") else column
        return flat.to_numpy(zero_copy_only=False).reshape(len(self._table), -1)

    def text(self, name: str) -> str:
        """Of a column of text that says the same in every frame."""
        return self._table[name][0].as_py()

    def pixels(self, which_D: np.ndarray) -> np.ndarray:
        """uint8 (D, H, W, 3) of these frames, in ascending order.  Raises UnreadableRecording."""
        return np.stack(self._film(which_D) if self.dataset.is_film else self._stills(which_D))

    def _stills(self, which_D: np.ndarray) -> list[np.ndarray]:
        column = self._table[self.dataset.camera]
        try:
            return [decode(column[f].as_py()["bytes"]) for f in which_D.tolist()]
        except image.ImageError as error:
            raise UnreadableRecording(str(error)) from error

    def _film(self, which_D: np.ndarray) -> list[np.ndarray]:
        try:
            import av
            from av.error import FFmpegError
        except ImportError as error:
            raise UnreadableDataset(f"{self.dataset.folder}: its videos need av: pip install av") from error
        path, begins_s = self.dataset.film_path(self._row), self._row[f"videos/{self.dataset.camera}/from_timestamp"]
        wanted_s = begins_s + self.column("timestamp")[which_D, 0].astype(np.float64)
        found: list[np.ndarray] = []
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                container.seek(int(begins_s / (stream.time_base or 1)), stream=stream)  # to the key frame before
                for frame in container.decode(stream):
                    if abs((frame.time or 0) - wanted_s[len(found)]) < 0.5 / self.dataset.fps:
                        found.append(frame.to_ndarray(format="rgb24"))
                        if len(found) == len(wanted_s):
                            return found
        except (OSError, FFmpegError) as error:
            raise UnreadableRecording(f"{path.name}: {error}") from error
        raise UnreadableRecording(f"{path.name}: has no frame at {wanted_s[len(found)]:.3f} s")


def decode(data: bytes) -> np.ndarray:
    """uint8 (H, W, 3) of a PNG or JPEG.  Raises ImageError."""
    return image.decode_jpeg(data) if data.startswith(b"\xff\xd8") else image.decode_png(data)
