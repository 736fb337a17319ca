"""A short run of the search for random programs on which the two libraries differ."""

import pytest

from .search import search


@pytest.mark.slow
def test_made_up_programs_run_alike():
    programs, refused = search(300, derandomize=True)
    assert programs == 300
    assert refused < 300, "most of what is made up must be run, not refused"
