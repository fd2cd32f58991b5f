"""A picklable tokenizer that crashes, kills or hangs any other process at captions that contain such a word."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field

from data_pipeline.transforms.tokenizers import Tokenizer


@dataclass
class Deadly:
    """Encodes like `inner` in the process that made it; elsewhere it obeys `crash`, `kill` and `hang` in a caption."""

    inner: Tokenizer
    home: int = field(default_factory=os.getpid)

    def encode(self, text: str) -> list[int]:
        if os.getpid() != self.home:
            if "crash" in text:
                os.kill(os.getpid(), signal.SIGSEGV)
            if "kill" in text:
                os.kill(os.getpid(), signal.SIGKILL)
            if any(word in text for word in ("crash", "kill", "hang")):
                time.sleep(600)  # also until the signal has ended the process
        return self.inner.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    @property
    def start_id(self) -> int:
        return self.inner.start_id

    @property
    def end_id(self) -> int:
        return self.inner.end_id

    @property
    def pad_id(self) -> int:
        return self.inner.pad_id

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint
