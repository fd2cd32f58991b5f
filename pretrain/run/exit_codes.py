"""Exit codes of ranks, stages and commands. Schedulers and scripts rely on these numbers."""

DONE = 0
FAILED = 1
# The user's input is wrong; the message says what, where, and what to do.
USER_ERROR = 2
# A checkpoint is saved and the stage must be run again (EX_TEMPFAIL of sysexits.h).
RUN_AGAIN = 75
