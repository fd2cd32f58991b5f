"""A source of tars: shards, members, captions, and what img2dataset's parquet and statistics say beside them."""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.show import beside_tars
from data_pipeline.show.source_report import SourceReport, clip, share, spread
from data_pipeline.sources.manifest import Manifest, open_source, read_stats, stats_url, wrong_count
from data_pipeline.sources.tar import IMAGE_EXTENSIONS, Sample, image_member, member_table

# A tar in an object store is fetched whole to be looked into.
EXAMINE_REMOTE = 2


def look(found: SourceReport, path: str, examine: int, first: int) -> None:
    """Fill in what is known of the tars; members are counted in `examine` of them. Raises UserError if there is
    none."""
    about, urls = found.about, list(found.form.files)
    sizes = storage.sizes(urls)
    missing = [url for url in urls if url not in sizes]
    if len(missing) == len(urls):
        raise UserError(f"{path} does not exist")
    found.problems.extend(f"{url} does not exist" for url in missing)
    there = [url for url in urls if url in sizes]
    manifest = None if missing else _open(path, found)
    chosen = spread(there, min(examine, EXAMINE_REMOTE) if storage.is_remote(path) else examine)
    tables = found.tables = _tables(chosen, found)
    samples = [sample for table in tables.values() for sample in table]
    members = Counter(extension for sample in samples for extension in sample.members)
    found.problems.extend(_lacking_members(samples, members))
    tabled = {url: table_url(url) for url in chosen if storage.exists(table_url(url))}
    about["kind"] = _kind(members, chosen, tabled)
    about["format"] = about["kind"].replace(" ", "-")
    about["bytes"] = sum(sizes.values())
    about["samples"] = manifest.samples if manifest else None
    about["counted_by"] = manifest.counted_by if manifest else None
    about["fingerprint"] = manifest.fingerprint if manifest else None
    about["tokenizer"] = manifest.tokenizer if manifest else None
    about["examined"] = {"shards": len(chosen), "samples": len(samples)}
    about["members"] = dict(sorted(members.items()))
    beside_tars.look(found, storage.root_of(path), manifest)
    if about["kind"] == "img2dataset":
        from data_pipeline.show.beside_tars import join

        join(found, tables, tabled)
    _repeated_keys(found, tables)
    about["first"] = [
        summary(sample.key, read_members(url, sample))
        for url, table in list(tables.items())[:1]
        for sample in table[:first]
    ]


def table_url(tar: str) -> str:
    """The parquet of all rows that img2dataset writes beside a tar."""
    return tar.removesuffix(".tar") + ".parquet"


def read_members(url: str, sample: Sample) -> dict[str, bytes]:
    """Extension -> content of one sample, by one read: its members are neighbours."""
    if not sample.members:
        return {}
    start = min(offset for offset, _ in sample.members.values())
    stop = max(offset + length for offset, length in sample.members.values())
    span = storage.read_range(url, start, stop - start)
    return {
        extension: span[offset - start : offset - start + length]
        for extension, (offset, length) in sample.members.items()
    }


def _open(path: str, found: SourceReport) -> Manifest | None:
    """The source as training opens it; what that warns of is a note."""
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            manifest = open_source(path, path)
    except UserError as error:
        found.problems.append(str(error).removeprefix(f"source {path!r}: "))
        return None
    found.notes.extend(str(warning.message) for warning in warned)
    return manifest


def _tables(urls: Sequence[str], found: SourceReport) -> dict[str, list[Sample]]:
    """Member tables of the shards that can be read; the others, and counts that are wrong, become problems."""
    problems = found.problems
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
            if not any(problem.startswith(str(error)) for problem in problems):  # said when it was counted
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


def _lacking_members(samples: Sequence[Sample], members: Counter[str]) -> list[str]:
    """Samples that cannot be served: no image among images, no caption among captions."""
    if "npy" in members:
        lacking = [sample for sample in samples if "npy" not in sample.members]
        return [_lacking(lacking, samples, "no npy member")] if lacking else []
    sentences = []
    without_image = [sample for sample in samples if image_member(sample.members) is None]
    if without_image:
        names = "/".join(IMAGE_EXTENSIONS)
        sentences.append(_lacking(without_image, samples, f"no image member ({names})"))
    without_caption = [sample for sample in samples if not sample.members.keys() & {"txt", "json"}]
    if without_caption:
        sentences.append(_lacking(without_caption, samples, "no caption (txt, or caption in json)"))
    return sentences


def _lacking(lacking: Sequence[Sample], samples: Sequence[Sample], what: str) -> str:
    return f"{len(lacking)} of {len(samples)} samples examined have {what}; the first is {lacking[0].key}"


def _kind(members: Counter[str], chosen: Sequence[str], tabled: dict[str, str]) -> str:
    if "npy" in members:
        return "packed text"
    if image_member(members) is None:
        return "tars without images"
    written = tabled and any(storage.exists(stats_url(url)) for url in chosen)
    return "img2dataset" if written else "webdataset tars"


def _repeated_keys(found: SourceReport, tables: dict[str, list[Sample]]) -> None:
    """Keys that stand in two shards: two runs of img2dataset in one source number from 0 both."""
    seen: dict[str, str] = {}
    repeated: list[tuple[str, str, str]] = []
    for url, table in tables.items():
        for sample in table:
            if sample.key in seen:
                repeated.append((sample.key, seen[sample.key], url))
            seen.setdefault(sample.key, url)
    if repeated:
        key, one, two = repeated[0]
        found.notes.append(
            f"{share(len(repeated), sum(map(len, tables.values())))} samples examined have the key of another: "
            f"{key} stands in {one} and {two}. Samples are told apart by shard and place, so they train; tools "
            "that go by the key alone will mix them up"
            if one != two
            else f"{one} holds two samples of the key {key}, not side by side: members of a sample must be adjacent"
        )


def summary(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    """Key, sizes of the members and the caption, or the beginning of a packed row."""
    found: dict[str, Any] = {
        "key": key,
        "members": {name: len(data) for name, data in sorted(members.items())},
    }
    about = metadata(members)
    if "npy" in members:
        found["tokens"] = _tokens(members["npy"])
        documents = about.get("documents")
        listed = documents if isinstance(documents, list) else []
        found["caption"] = ", ".join(str(d.get("url", "")) for d in listed if isinstance(d, dict))
    else:
        found["caption"] = clip(caption(members) or "")
    return found


def caption(members: dict[str, bytes]) -> str | None:
    """The txt member, else the caption (or the first of several) in the json member; None where there is none."""
    if "txt" in members:
        return members["txt"].decode("utf-8", "replace")
    told = metadata(members).get("caption")
    told = next((one for one in told if isinstance(one, str)), None) if isinstance(told, list) else told
    return told if isinstance(told, str) else None


def metadata(members: dict[str, bytes]) -> dict[str, Any]:
    """The json member, empty if there is none or it is no object."""
    try:
        value = json.loads(members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _tokens(data: bytes) -> str:
    import numpy as np

    try:
        row = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError):
        return "not an array"
    return f"{row.dtype} {list(row.shape)}"
