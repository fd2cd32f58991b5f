"""Exit codes of ranks, stages and commands. Schedulers and scripts rely on these numbers."""

DONE = 0
FAILED = 1
# The user's input is wrong; the message says what, where, and what to do. Earlier stages and checkpoints may have
# been written before the error.
USER_ERROR = 2
# Stopped before the end; run the same command again to resume (EX_TEMPFAIL of sysexits.h). A training stage has saved
# a checkpoint, unless it was stopped before its first step.
RUN_AGAIN = 75
