"""What the exit code of a rank, a stage and a command means; schedulers and scripts rely on these numbers."""

DONE = 0
FAILED = 1
USER_ERROR = 2
"""The user's input is wrong; the message says what, where, and what to do."""
GO_ON = 75
"""Saved, and wants to be run again (EX_TEMPFAIL of sysexits.h)."""
