"""What the server of tests/support/commands.py imports before it forks: the command line and the merge, no torch."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress

gc.disable()

import rich.console  # noqa: E402
import rich.live  # noqa: E402
import rich.progress  # noqa: E402, F401
import tqdm.auto  # noqa: E402, F401

with suppress(ImportError):  # what huggingface_hub imports
    import filelock  # noqa: F401
    import httpx2  # noqa: F401

import launch.cli.app  # noqa: E402
import launch.local  # noqa: E402
import launch.run  # noqa: E402
import launch.stage_state  # noqa: E402, F401
import pretrain.merge  # noqa: E402
import pretrain.merge.sweeps.scored_sweep  # noqa: E402
import pretrain.merge.sweeps.soup  # noqa: E402
import pretrain.merge.verify.check_output  # noqa: E402
import pretrain.merge_stage  # noqa: E402, F401

assert not {"torch", "huggingface_hub"} & sys.modules.keys()
gc.freeze()
gc.enable()
