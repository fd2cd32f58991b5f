"""A folder of weights, local or remote: its entries, and which files hold the tensors.

Security of symbolic links: a link to a weight file is followed anywhere, because only numbers come out of it
(safetensors, or pickles that run no code). Companion files, however, are copied into outputs, which people publish; a
link in a downloaded folder (config.json -> ~/.docker/config.json) must not copy a private file. A link to a companion
may therefore point outside the folder only into (a) a folder from which a linked weight file was opened, or (b) a
content store of the repository that holds the folder (git-annex, DVC, the Hugging Face cache).
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage import object_store
from data_pipeline.storage.files import is_remote, join, local_path
from pretrain.weights.byte_file import BlockCache, ByteFile, RemoteFile, open_file

MAX_JSON = 256 << 20
BLOBS = "blobs"  # the Hugging Face cache keeps files here; its snapshots link to them
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
CONTENT_STORES = (".git/annex/objects", ".dvc/cache")
HASH_FOLDER = re.compile(r"[0-9a-f]{2}")  # a folder of a content-addressed store, such as DVC's files/md5/3f
# First bytes of a pointer file -> error text.
POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer; fetch the file itself with git lfs pull",
    b"/annex/objects/": "a git-annex pointer; fetch the file itself with git annex get",
}
FROZEN = "frozen.safetensors"
INDEX = ".index.json"
SINGLE_FILES = (
    "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
NOT_MODEL_WEIGHTS = (
    FROZEN,
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "rng_state*.pth",
)
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)")
MAX_FOLDERS_SCANNED, MAX_FOLDERS_SUGGESTED = 100, 3  # when a folder without weights is named
# File pattern of an unsupported format -> error text.
UNSUPPORTED = {
    "*.gguf": "GGUF, which llama.cpp uses for quantised weights; name the safetensors files it was converted from",
    "model_index.json": "a diffusers pipeline; name one of its parts, such as unet or transformer",
    "*.h5": "TensorFlow weights; save them as safetensors with transformers",
    "*.msgpack": "Flax weights; save them as safetensors with transformers",
    "consolidated.*.model-diff.pth": "differences to a base model; LLaMA2-Accessory adds them to it when it loads both",
    "*.distcp": "parts of a torch.distributed.checkpoint without its file .metadata; copy that file too",
    "consolidated.*.pth": "Meta's tensor-parallel shards; convert them with transformers first",
}


class Folder:
    """The files directly in a folder.

    url:     path or s3:// URL without a trailing slash.
    names:   file names, sorted.
    folders: names of the subfolders, sorted.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/") or "/"
        self.remote = is_remote(self.url)
        self.names: list[str] = []
        self.folders: list[str] = []
        found = _remote_entries(self.url) if self.remote else _local_entries(self.url)
        for name, is_folder in sorted(found.items()):
            (self.folders if is_folder else self.names).append(name)
        self._blocks: BlockCache | None = None
        self._linked: set[Path] = set()  # folders outside this one that hold opened weights

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def matching(self, *patterns: str) -> list[str]:
        """File names that match one of the shell patterns, sorted."""
        return [n for n in self.names if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)]

    def path(self, name: str) -> str:
        """Path or URL of a companion file. Raises UserError for a broken link and for a link to a place outside
        the folder that the module docstring does not allow."""
        url = join(self.url, name)
        if self._is_link(name):
            link = Path(local_path(url))
            _check_target_exists(link)
            if not self._may_follow(link):
                raise UserError(
                    f"{link}: links to {link.resolve()}, outside {self.url} and not beside its weights; replace "
                    "the link by a copy (cp -L)"
                )
        return url

    def open(self, name: str) -> ByteFile:
        """Open a weight file; links are followed anywhere (see the module docstring)."""
        if self.remote and self._blocks is None:
            self._blocks = BlockCache(len(self.matching(*WEIGHT_PATTERNS)))
        url = join(self.url, name)
        file = refuse_pointer(self._open_checked(name, self._blocks))
        if self._is_link(name):
            self._linked.add(Path(local_path(url)).resolve().parent)
        return file

    def _open_checked(self, name: str, blocks: BlockCache | None = None) -> ByteFile:
        url = join(self.url, name)
        if self._is_link(name):
            _check_target_exists(Path(local_path(url)))
        return open_file(url, blocks)

    def _is_link(self, name: str) -> bool:
        return not self.remote and os.path.islink(local_path(join(self.url, name)))

    def _may_follow(self, link: Path) -> bool:
        target, home = link.resolve(), Path(local_path(self.url)).resolve()
        cache = home.parent.parent  # models--org--name/snapshots/REVISION
        if target.is_relative_to(home) or (
            home.parent.name == "snapshots" and target.parent == cache / BLOBS
        ):
            return True
        if any(
            target.is_relative_to(above / store)
            for above in (home, *home.parents)
            for store in CONTENT_STORES
        ):
            return True
        return any(
            target.parent == other
            or (
                target.parent.parent == other.parent
                and HASH_FOLDER.fullmatch(target.parent.name)
                and HASH_FOLDER.fullmatch(other.name)
            )
            for other in self._linked
        )

    def subfolder(self, name: str) -> Folder:
        return Folder(join(self.url, name))

    def bytes(self, name: str, limit: int = MAX_JSON, follow: bool = False) -> bytes:
        """Content of a small file. `follow`: also follow links out of the folder; for files that are never copied."""
        if self.remote:
            file: ByteFile = RemoteFile(self.path(name), BlockCache(1))
        else:
            file = self._open_checked(name) if follow else open_file(self.path(name))
        if file.size > limit:
            raise UserError(
                f"{file.name}: has {file.size:,} bytes, too large for a file of this kind (at most {limit:,})"
            )
        return refuse_pointer(file).peek(0, file.size)

    def json(self, name: str, follow: bool = False) -> Any:
        return parse_json(self.bytes(name, follow=follow), join(self.url, name))


def parse_json(raw: bytes, where: str) -> Any:
    """Parse JSON; raises UserError with the file `where`."""
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{where}: not valid JSON: {error or type(error).__name__}; download or write it again"
        ) from None


def _local_entries(url: str) -> dict[str, bool]:
    path = local_path(url)
    try:
        with os.scandir(path) as entries:
            return {entry.name: entry.is_dir() for entry in entries}
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _remote_entries(url: str) -> dict[str, bool]:
    def call(store: Any) -> list[dict[str, Any]]:
        return store.ls(url, detail=True)

    try:
        entries = object_store.with_retries(url, call)
    except FileNotFoundError:
        raise UserError(f"{url}: not found") from None
    found = {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] == "directory" for entry in entries}
    found.pop("", None)
    return found


def refuse_pointer(file: ByteFile) -> ByteFile:
    """Return `file`; raises UserError for a pointer (Git LFS, git-annex) whose real file was not fetched."""
    start = file.peek(0, min(file.size, 64))
    for mark, what in POINTERS.items():
        if start.startswith(mark):
            raise UserError(f"{file.name}: {what}")
    return file


def _check_target_exists(link: Path) -> None:
    if not link.exists():
        raise UserError(
            f"{link}: a broken link to {os.readlink(link)}; fetch the file (git annex get, dvc pull) or mount its "
            "store"
        )


def weight_files(folder: Folder, address: str) -> tuple[dict[str, set[str]], list[str]]:
    """Return weight file -> tensor names in its index (empty without an index), and notes.

    If the folder holds several copies, the choice is that of transformers: one file before shards, safetensors before
    pickles. Raises UserError for a malformed index, for one that names missing files or files outside the folder, and
    for a folder whose weight files are ambiguous.
    """
    for name in SINGLE_FILES:
        index = f"{name}{INDEX}"
        if name in folder:
            files = {name: set[str]()}
            try:
                shards = _by_index(folder, index) if index in folder else files
            except UserError:  # it was left from an earlier, sharded copy
                shards = {}
            note = f"{folder.url}: reads {name}, as transformers does, not the shards of {index}"
            return files, [] if shards.keys() == files.keys() else [note]
        if index in folder:
            return _by_index(folder, index), []
    for suffix in (".safetensors", ".bin"):
        indexes = folder.matching(f"*{suffix}{INDEX}")
        if len(indexes) == 1:
            return _by_index(folder, indexes[0]), []
    not_weights = {*folder.matching(*NOT_MODEL_WEIGHTS), *ADAPTERS}
    for pattern in WEIGHT_PATTERNS:
        found = [name for name in folder.matching(pattern) if name not in not_weights]
        if len(found) == 1 and SHARD_NAME.fullmatch(found[0]) is None:
            return {found[0]: set()}, []
        if found and not folder.matching("consolidated.*.pth"):
            return _parts(folder, address, found), []
    raise UserError(_no_weights_message(folder, address))


def _parts(folder: Folder, address: str, found: list[str]) -> dict[str, set[str]]:
    """Shards numbered i-of-N without an index. Raises UserError unless all N exist."""
    parts = [SHARD_NAME.fullmatch(name) for name in found]
    kinds = {(part["stem"], part["count"], part["suffix"]) if part else None for part in parts}
    if kinds == {None} or len(kinds) > 1:
        raise UserError(
            f"{address}: {folder.url} holds {len(found)} {found[0][found[0].rfind('.') :]} files and no index; "
            "name one file, or RUN/STAGE"
        )
    numbers = {int(part["number"]) for part in parts if part}
    count = int(parts[0]["count"]) if parts[0] else 0
    missing = sorted(set(range(1, count + 1)) - numbers) if count < 1 << 16 else [0]
    if missing:
        raise UserError(
            f"{address}: {folder.url} holds {len(found)} of {count} shards; number {missing[0]} is missing; "
            "download the folder again"
        )
    return {name: set() for name in found}


def _no_weights_message(folder: Folder, address: str) -> str:
    if not folder.names and not folder.folders:
        return f"{address}: no safetensors file and no checkpoint: {folder.url} is empty"
    if adapters := [name for name in ADAPTERS if name in folder]:
        return (
            f"{address}: an adapter ({adapters[0]}), not a model; first merge it into its base model "
            "(peft: merge_and_unload), then name the result"
        )
    for pattern, what in UNSUPPORTED.items():
        if found := folder.matching(pattern):
            return f"{address}: no safetensors file and no checkpoint in {folder.url}; {found[0]}: {what}"
    near = ", ".join(_weight_folders_below(folder))
    advice = f"weights were found in {near}" if near else "name one file, or RUN/STAGE"
    return f"{address}: no safetensors file and no checkpoint in {folder.url}; {advice}"


def _weight_folders_below(folder: Folder) -> list[str]:
    """Some subfolders that hold weights: checkpoints of a Trainer, or snapshots in the Hub's cache."""
    if folder.remote:
        return []
    found = []
    for name in folder.folders[:MAX_FOLDERS_SCANNED]:
        try:
            inner = folder.subfolder(name)
            deeper = (
                [inner.subfolder(subfolder) for subfolder in inner.folders[:MAX_FOLDERS_SCANNED]]
                if name == "snapshots"
                else [inner]
            )
        except UserError:  # unreadable folder
            continue
        found += [subfolder.url for subfolder in deeper if subfolder.matching(*WEIGHT_PATTERNS, "*.distcp")]
    return found[-MAX_FOLDERS_SUGGESTED:]


def _by_index(folder: Folder, index: str) -> dict[str, set[str]]:
    content = folder.json(index, follow=True)
    where = f"{folder.url}/{index}"
    placed: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{where}: not an index of weight files (no weight_map); download the folder again")
    files: dict[str, set[str]] = {}
    for tensor, name in placed.items():
        if not isinstance(name, str) or not name or "/" in name or "\\" in name or name in (".", ".."):
            raise UserError(f"{where}: names {str(name)[:100]!r}, which is not a file of this folder")
        if name not in folder:
            raise UserError(f"{where}: names {name[:100]!r}, which does not exist; download the folder again")
        if not name.endswith((".safetensors", ".bin", ".pt", ".pth")):
            raise UserError(f"{where}: names {name[:100]!r}, which is not a weight file")
        files.setdefault(name, set()).add(tensor)
    return dict(sorted(files.items()))
