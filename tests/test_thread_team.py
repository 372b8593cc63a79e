"""The thread team: every piece once, barriers between phases, no hang when threads exceed cores."""

import pytest

from gptx import _core


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("pieces", [1, 2, 13, 64])
def test_every_piece_runs_once_in_every_phase(threads, pieces):
    rounds = 200
    counts = _core.testing.team_counts(threads, pieces, rounds)
    assert counts == [2 * rounds] * pieces
