"""Actions to token ids and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from policy_server.vla.action_tokens import ActionTokens, UnknownStatistics, statistics_key
from policy_server.vla.config import nano_config
from tests.vla.conftest import STATISTICS


def test_a_round_trip_moves_an_action_by_half_a_bin_at_most(rng: np.random.Generator):
    table = ActionTokens(nano_config(STATISTICS))
    actions = rng.uniform(table.low_A, table.high_A, (50, 8, 7))
    ids = table.encode(actions)
    assert ids.shape == (50, 56)
    half_bin_A = np.where(table.mask_A, (table.high_A - table.low_A) / 2, 1) / 255
    assert (np.abs(table.decode(ids) - actions) <= half_bin_A + 1e-12).all()


def test_ids_end_with_the_unpadded_vocabulary():
    table = ActionTokens(nano_config(STATISTICS, pad_to_multiple_of=64))
    assert table.vocabulary == 512 + 256 - 64
    assert table.token_ids(np.array([-1.0, 1.0])).tolist() == [table.vocabulary - 1, table.vocabulary - 256]


def test_the_gripper_is_not_unnormalised():
    table = ActionTokens(nano_config(STATISTICS))
    open_gripper = table.decode(np.full(56, table.vocabulary - 256))[:, -1]
    assert open_gripper == pytest.approx(np.full(8, 0.99607843))


def test_a_dimension_of_no_extent_decodes_to_its_value():
    still = {"only": {"action": {"q01": [0.3] * 7, "q99": [0.3] * 7, "mask": [True] * 7}}}
    table = ActionTokens(nano_config(still, state_dim=0))
    ids = table.encode(np.full((8, 7), 0.3))
    assert table.decode(ids) == pytest.approx(np.full((8, 7), 0.3))


def test_statistics_are_found_by_name_or_by_the_name_without_no_ops():
    config = nano_config({"a_no_noops": STATISTICS["nano"], "b": STATISTICS["nano"]})
    assert statistics_key(config, "a") == "a_no_noops"
    assert statistics_key(config, "b") == "b"
    with pytest.raises(UnknownStatistics, match=r"must be one of \['a_no_noops', 'b'\], got 'c'"):
        statistics_key(config, "c")
    with pytest.raises(UnknownStatistics, match="name one of"):
        statistics_key(config, None)
    assert statistics_key(replace(config, norm_stats=STATISTICS), None) == "nano"
