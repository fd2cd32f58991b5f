"""What the server of tests/support/forks.py imports before it forks."""

from __future__ import annotations

import gc

gc.disable()

import open_clip  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401  # imported by the first optimizer
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import pretrain.train.session  # noqa: E402, F401
from pretrain.distributed.engine import import_deepspeed  # noqa: E402

import_deepspeed()
# A collection in a forked process would touch, and so copy, every page of what was imported here.
gc.freeze()
gc.enable()
