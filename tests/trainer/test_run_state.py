"""What a run leaves is whole or as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_trainer.run_state import held, replaced


def test_a_folder_is_one_trainers_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder), pytest.raises(ValueError, match=f"{folder} is in use by another trainer"), held(folder):
        pass
    with held(folder):
        assert folder.is_dir()


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    for content in ("first", "second"):
        with replaced(folder) as fresh:
            (fresh / content).write_text(content)
        assert [path.name for path in folder.iterdir()] == [content]
    with pytest.raises(KeyboardInterrupt), replaced(folder) as fresh:
        (fresh / "third").write_text("half of")
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["second"]
    with replaced(folder) as fresh:
        assert not any(fresh.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
