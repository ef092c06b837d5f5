"""Where LIBERO's files lie on this machine, and how its packages are imported without a question or a display."""

from __future__ import annotations

import ctypes.util
import importlib.util
import logging
import os
import tempfile
import zlib
from pathlib import Path
from types import ModuleType

CHECKOUT = Path(__file__).resolve().parent.parent
SHARED_ASSETS = CHECKOUT.parent / "shared" / "libero_assets"

_RENDER_LIBRARY = {"osmesa": "OSMesa", "egl": "EGL"}
_INSTALL_HINT = {"osmesa": "apt-get install libosmesa6", "egl": "apt-get install libegl1"}


class SimulatorUnavailable(RuntimeError):
    """A package, a system library or LIBERO's assets are missing; the message names what to install."""


def choose_renderer() -> None:
    """Set MUJOCO_GL unless the caller did: EGL where an NVIDIA GPU is seen, OSMesa (software) elsewhere."""
    gpu = Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists()
    os.environ.setdefault("MUJOCO_GL", "egl" if gpu else "osmesa")


def require_renderer() -> None:
    """Raise SimulatorUnavailable with one clear line when the chosen renderer's system library is missing."""
    renderer = os.environ.get("MUJOCO_GL", "")
    library = _RENDER_LIBRARY.get(renderer)
    if library and ctypes.util.find_library(library) is None:
        raise SimulatorUnavailable(
            f"MUJOCO_GL={renderer} needs the system library lib{library}: {_INSTALL_HINT[renderer]}"
        )


def libero_root() -> Path:
    """The folder of the installed `libero.libero` package, found without importing it (the import asks questions)."""
    spec = importlib.util.find_spec("libero")
    if spec is None or spec.origin is None:
        raise SimulatorUnavailable("LIBERO is not installed: pip install --no-deps hf-libero==0.1.4 (extra `sim`)")
    return Path(spec.origin).parent / "libero"


def assets_path() -> Path | None:
    """LIBERO_ASSETS, else the shared tree beside the checkout, else the package's own; None: LIBERO downloads it."""
    if named := os.environ.get("LIBERO_ASSETS"):
        if not Path(named).is_dir():
            raise SimulatorUnavailable(f"LIBERO_ASSETS must name a folder, got {named!r}")
        return Path(named)
    candidates = (SHARED_ASSETS, libero_root() / "assets")
    return next((path for path in candidates if path.is_dir()), None)


def has_libero() -> bool:
    """Whether LIBERO tasks can be built here without a download: the package and an asset tree are present."""
    return importlib.util.find_spec("libero") is not None and assets_path() is not None


def asset_tree() -> str:
    """The name of the asset tree for reports: "stand-in visuals (<path>)" or "original (<path>)"."""
    path = assets_path()
    if path is None:
        return "original (downloaded by hf-libero)"
    note = path / "README.md"
    stand_in = note.is_file() and "stand-in" in note.read_text(encoding="utf-8")
    shown = "../shared/libero_assets" if path == SHARED_ASSETS else path.name
    return f"{'stand-in visuals' if stand_in else 'original'} ({shown})"


def load_robosuite() -> ModuleType:
    """Import robosuite quietly, headless."""
    require_renderer()
    logging.getLogger("robosuite_logs").disabled = True  # its warnings about an optional private macro file
    import robosuite

    return robosuite


def load_libero() -> ModuleType:
    """Import `libero.libero.envs` with our own config file and asset tree; never asks, never imports torch."""
    load_robosuite()
    root, tree = libero_root(), assets_path()
    os.environ.setdefault("LIBERO_CONFIG_PATH", str(_config_folder(root, tree or root / "assets")))
    import libero.libero
    import libero.libero.envs

    if tree is not None:
        libero.libero._assets_path_cache = str(tree)  # what get_assets_path() answers from then on
    return libero.libero.envs


def _config_folder(root: Path, tree: Path) -> Path:
    """A folder with the config.yaml that LIBERO's import asks for; without one it would question the user."""
    paths = {
        "assets": tree,
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "datasets": root.parent / "datasets",
        "init_states": root / "init_files",
    }
    text = "".join(f"{key}: {path}\n" for key, path in paths.items())
    folder = Path(tempfile.gettempdir()) / f"vla-rl-libero-{os.getuid()}-{zlib.crc32(text.encode()):08x}"
    folder.mkdir(exist_ok=True)
    partial = folder / f"config.{os.getpid()}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / "config.yaml")
    return folder
