"""A sample of campaign.py: runs on two processes end without an abort."""

from campaign import end_runs


def test_runs_on_two_processes_end(tmp_path):
    assert end_runs(5, tmp_path) == {"ended": 5}
