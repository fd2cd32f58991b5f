"""What a source is, for a person: shards, samples, members, the first captions, and what is wrong with it."""

from __future__ import annotations

import io
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_pipeline import storage
from data_pipeline.decode import IMAGE_EXTENSIONS, image_member
from data_pipeline.errors import UserError
from data_pipeline.formats import refinedweb
from data_pipeline.index import ShardReader
from data_pipeline.manifest import Manifest, open_source, read_stats, stats_url, wrong_count
from data_pipeline.tar import Sample, member_table

LONGEST = 200  # characters of a caption or document that are shown


def describe(path: str, examine: int = 16, first: int = 5) -> dict[str, Any]:
    """A plain, JSON-able dict about a source of tars, or about a folder of RefinedWeb parquet files.

    Members are counted in `examine` shards spread over the source. What is wrong with a shard stands in
    "problems" instead of being raised; only a path where nothing is raises UserError.
    """
    try:
        urls = storage.list_shards(path)
    except UserError:
        if not storage.is_pattern(path) and _parquet_files(path):
            return _describe_documents(path, first)
        raise
    sizes = storage.sizes(urls)
    problems = [f"{url} does not exist" for url in urls if url not in sizes]
    if len(problems) == len(urls):
        raise UserError(f"{path} does not exist")
    there = [url for url in urls if url in sizes]
    manifest: Manifest | None = None
    try:
        manifest = open_source(path, path)
    except UserError as error:
        if not problems:
            problems.append(str(error).removeprefix(f"source {path!r}: "))
    chosen = there[:: -(-len(there) // examine)]
    tables = _examine(chosen, problems)
    samples = [sample for table in tables.values() for sample in table]
    members = Counter(extension for sample in samples for extension in sample.members)
    problems += _missing_members(samples, members)
    return {
        "path": path,
        "kind": _kind(members, there, chosen),
        "shards": len(urls),
        "samples": manifest.samples if manifest else None,
        "bytes": sum(sizes.values()),
        "counted_by": manifest.counted_by if manifest else None,
        "fingerprint": manifest.fingerprint if manifest else None,
        "tokenizer": manifest.tokenizer if manifest else None,
        "examined": {"shards": len(chosen), "samples": len(samples)},
        "members": dict(sorted(members.items())),
        "first": _first(manifest, tables, chosen, first),
        "problems": list(dict.fromkeys(problems)),
    }


def _examine(urls: Sequence[str], problems: list[str]) -> dict[str, list[Sample]]:
    """Member tables of the shards that can be read; the others, and counts that are wrong, become problems."""
    try:
        stats = read_stats(urls)
    except UserError as error:
        problems.append(str(error))
        stats = {}
    tables = {}
    for url in urls:
        try:
            tables[url] = member_table(url)
        except UserError as error:
            problems.append(str(error))
            continue
        if url in stats and stats[url]["successes"] != len(tables[url]):
            problems.append(str(wrong_count(url, stats[url]["successes"], len(tables[url]), stats_url(url))))
        if stats and url not in stats:
            problems.append(
                f"{url} has no {stats_url(url).rpartition('/')[2]}, others have: was its writer stopped?"
            )
        if not tables[url]:
            problems.append(f"{url} holds no samples")
    return tables


def _missing_members(samples: Sequence[Sample], members: Counter[str]) -> list[str]:
    """Samples that cannot be served: no image among images, no caption among captions."""
    if "npy" in members:
        lacking = [sample for sample in samples if "npy" not in sample.members]
        return [_lacking(lacking, samples, "no npy member")] if lacking else []
    found = []
    without_image = [sample for sample in samples if image_member(sample.members) is None]
    if without_image:
        names = "/".join(IMAGE_EXTENSIONS)
        found.append(_lacking(without_image, samples, f"no image member ({names})"))
    without_caption = [sample for sample in samples if not sample.members.keys() & {"txt", "json"}]
    if without_caption:
        found.append(_lacking(without_caption, samples, "no caption (txt, or caption in json)"))
    return found


def _lacking(lacking: Sequence[Sample], samples: Sequence[Sample], what: str) -> str:
    return f"{len(lacking)} of {len(samples)} samples examined have {what}; the first is {lacking[0].key}"


def _kind(members: Counter[str], there: Sequence[str], chosen: Sequence[str]) -> str:
    if "npy" in members:
        return "packed text"
    if image_member(members) is None:
        return "tars without images"
    written = storage.exists(stats_url(there[0])) and storage.exists(
        there[0].removesuffix(".tar") + ".parquet"
    )
    return "img2dataset" if written else "webdataset tars"


def _first(
    manifest: Manifest | None, tables: dict[str, list[Sample]], chosen: Sequence[str], number: int
) -> list[dict[str, Any]]:
    """Key and caption (or the beginning of the packed row) of the first samples that can be read."""
    shown = []
    if manifest is not None and chosen and tables.get(chosen[0]):
        reader = ShardReader(manifest)
        try:
            for index in range(min(number, int(manifest.counts[0]))):
                shown.append(_summary(*reader.read(0, index)))
        except (UserError, OSError):
            pass  # said among the problems
        finally:
            reader.close()
    return shown


def _summary(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "key": key,
        "members": {name: len(data) for name, data in sorted(members.items())},
    }
    about = _json(members.get("json", b"{}"))
    if "npy" in members:
        summary["tokens"] = _tokens(members["npy"])
        documents = about.get("documents")
        summary["caption"] = (
            ", ".join(str(d.get("url", "")) for d in documents) if isinstance(documents, list) else ""
        )
    elif "txt" in members:
        summary["caption"] = members["txt"].decode("utf-8", "replace")[:LONGEST]
    else:
        summary["caption"] = str(about.get("caption", ""))[:LONGEST]
    return summary


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _tokens(data: bytes) -> str:
    import numpy as np

    try:
        row = np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError:
        return "not an array"
    return f"{row.dtype} {list(row.shape)}"


def _parquet_files(path: str) -> list[str]:
    try:
        return list(storage.sizes(refinedweb.list_files(path)))
    except UserError:
        return []


def _describe_documents(path: str, first: int) -> dict[str, Any]:
    import pyarrow.parquet as parquet

    files = refinedweb.list_files(path)
    rows: int | None = 0
    columns: list[str] = []
    problems: list[str] = []
    for file in files:
        try:
            with refinedweb.reading(file) as opened:
                metadata = parquet.ParquetFile(opened)
                rows = None if rows is None else rows + metadata.metadata.num_rows
                columns = metadata.schema_arrow.names
        except UserError as error:
            rows = None
            problems.append(str(error))
    shown: list[dict[str, Any]] = []
    try:
        for url, text in refinedweb.documents(path, rows=max(first, 1)):
            if len(shown) == first:
                break
            shown.append({"key": url, "caption": " ".join(text.split())[:LONGEST]})
    except UserError as error:
        problems.append(str(error))
    return {
        "path": path,
        "kind": "RefinedWeb documents",
        "shards": len(files),
        "samples": rows,
        "bytes": sum(storage.sizes(files).values()),
        "counted_by": "parquet",
        "columns": columns,
        "first": shown,
        "problems": list(dict.fromkeys(problems)),
    }


COUNTED_BY = {
    "manifest": "the index",
    "stats": "the _stats.json beside each tar",
    "tar": "the headers of the tars (slow; dromos data index makes it instant)",
    "parquet": "the parquet files",
}


def render(about: dict[str, Any], width: int = 100) -> list[tuple[str, str]]:
    """`describe`'s dict as lines of at most `width` characters, each "title", "plain" or "wrong".

    No library lays them out: loading one would take longer than all the rest of `dromos data show`.
    """
    lines = [("title", about["path"])]
    facts = _facts(about)
    column = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        lines += [("plain", line) for line in _hanging(name, value, column, width)]
    if about["first"]:
        what = "text" if about.get("columns") or _is_packed(about) else "caption"
        column = min(max(len(_clean(sample["key"])) for sample in about["first"]), width // 2) + 2
        column = max(column, len("sample") + 2)
        lines += [("plain", ""), ("plain", "sample".ljust(column) + what)]
        for sample in about["first"]:
            lines += [("plain", line) for line in _hanging(sample["key"], sample["caption"], column, width)]
    return lines + [("wrong", f"wrong: {problem}") for problem in about["problems"]]


def _hanging(name: str, value: str, column: int, width: int) -> list[str]:
    """The value wrapped in a column of its own, behind the name; a long name has a line to itself."""
    name, room = _clean(name), max(width - column, 20)
    wrapped = textwrap.wrap(_clean(value), room, break_on_hyphens=False) or [""]
    if len(name) + 2 > column:
        return [name, *(" " * column + line for line in wrapped)]
    return [name.ljust(column) + wrapped[0], *(" " * column + line for line in wrapped[1:])]


def _clean(text: str) -> str:
    """What a caption or key may not do: move the cursor, colour the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _is_packed(about: dict[str, Any]) -> bool:
    return about["kind"] == "packed text"


def _facts(about: dict[str, Any]) -> list[tuple[str, str]]:
    samples = about["samples"]
    facts = [
        ("kind", about["kind"]),
        ("shards", f"{about['shards']:,}"),
        ("samples", "unknown" if samples is None else f"{samples:,}"),
        ("size", _readable(about["bytes"])),
    ]
    if about["counted_by"]:
        facts.append(("counted by", COUNTED_BY[about["counted_by"]]))
    if "members" in about:
        examined = about["examined"]
        listed = ", ".join(f"{name} {count:,}" for name, count in about["members"].items())
        facts.append(
            ("members", f"{listed or 'none'} (in {examined['shards']:,} of {about['shards']:,} shards)")
        )
    if about.get("columns"):
        facts.append(("columns", ", ".join(about["columns"])))
    facts += [(name, about[name]) for name in ("tokenizer", "fingerprint") if about.get(name)]
    return facts


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
