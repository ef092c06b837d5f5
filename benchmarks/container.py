"""The Dockerfile's steps outside Docker: a clean environment, the same commands, and the server that comes of them.

    python -m benchmarks.container

A folder stands for `/`.  What needs root, or another stage's files, is said to be left out.  The server is started as
the image starts it, on loopback, asked for a decision, and told to stop.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from benchmarks.serving import observation
from protos import episode_pb2, policy_pb2, policy_pb2_grpc

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "docs" / "deploy" / "Dockerfile"
LEFT_OUT = ("useradd",)
OPEN = ["--host", "127.0.0.1", "--port", "0", "--admin-port", "0", "--http-port", "0"]
"""Over the image's own flags: ports that are free here."""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        began_s = time.monotonic()
        entry = build(Path(name))
        print(f"built in {time.monotonic() - began_s:.0f} s, {size_mb(Path(name)):.0f} MB")
        serve(entry, Path(name))


def steps() -> Iterator[tuple[str, str]]:
    """Instruction and the rest of its line, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            instruction, _, rest = line.partition(" ")
            yield instruction, rest


def build(root: Path) -> list[str]:
    """Does what can be done here; gives the command that the image starts."""
    environment, folder = dict(os.environ), root
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    for instruction, rest in steps():
        if instruction == "RUN" and not any(word in rest for word in LEFT_OUT):
            print(f"RUN {rest}", flush=True)
            subprocess.run(rest, shell=True, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        elif instruction == "COPY" and not rest.startswith("--"):
            copy(rest.split(), folder)
        elif instruction == "WORKDIR":
            folder = root / rest.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif instruction in ("ARG", "ENV"):
            variable, _, value = rest.partition("=")
            environment[variable] = value
        elif instruction == "ENTRYPOINT":
            return [re.sub(r"^/(app|data)", rf"{root}/\1", word) for word in json.loads(rest)]
        else:
            print(f"left out: {instruction} {rest}")
    raise SystemExit("there is no ENTRYPOINT")


def copy(words: list[str], folder: Path) -> None:
    *sources, target = words
    for source in sources:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, folder / target)


def serve(entry: list[str], root: Path) -> None:
    """Raises SystemExit when what was built does not serve."""
    line = [*entry, *OPEN]
    process = subprocess.Popen(line, cwd=root / "data", stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if not words:
            raise SystemExit(f"no server: {' '.join(line)}")
        with grpc.insecure_channel(words[1]) as channel:
            policy = policy_pb2_grpc.PolicyStub(channel)
            spec = policy.GetSpec(policy_pb2.GetSpecRequest(), timeout=60)
            start = policy_pb2.StartEpisodeRequest(purpose=episode_pb2.PURPOSE_DEPLOY)
            episode_id = policy.StartEpisode(start, timeout=60).episode_id
            request = policy_pb2.ActRequest(episode_id=episode_id, observation=observation(spec, 0))
            actions = policy.Act(request, timeout=60).chunk.actions
            print(f"{spec.model} answered with {list(actions.shape)} actions")
        process.terminate()
        code = process.wait(60)
        stored = list((root / "data" / "episodes").glob("*.episode"))
        print(f"it ended with code {code}, and has stored {len(stored)} episode")
    finally:
        process.kill()


def size_mb(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) / 1e6


if __name__ == "__main__":
    main()
