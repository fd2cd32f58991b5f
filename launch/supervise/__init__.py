"""Child processes of a launcher: stage_runner.py runs the stages in order, rank_group.py supervises the ranks."""
