"""img2dataset's output as one story: rows of the parquet, successes, failures by reason, samples in the tars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_pipeline.errors import UserError
from data_pipeline.formats.img2dataset_output import Outcome, Sums, odd_key, read_outcomes
from data_pipeline.show.source_report import Bad, Survey, share
from data_pipeline.sources.tar import Sample

REASONS = 8


def join(found: Survey, tables: Mapping[str, Sequence[Sample]], tabled: Mapping[str, str]) -> None:
    """Set the tars that were examined beside their parquet files; what does not agree is a problem."""
    sums, bad = Sums(), Bad()
    in_tars = 0
    for tar, table in tabled.items():
        wanted = _successes(table, sums, bad, found)
        sums.shards += wanted is not None
        if wanted is None or tar not in tables:
            continue
        keys = [sample.key for sample in tables[tar]]
        in_tars += len(keys)
        _compare(found, tar, table, wanted, keys)
    without = [tar for tar in tables if tar not in tabled]
    if without:
        found.notes.append(f"{share(len(without), len(tables))} tars examined have no parquet: {without[0]}")
    found.about["rows"] = {
        "shards": sums.shards,
        "rows": sums.rows,
        "successes": sums.successes,
        "failures": dict(sums.failures.most_common(REASONS)),
        "other_failures": sum(count for _, count in sums.failures.most_common()[REASONS:]),
        "in_tars": in_tars,
    }
    if bad.counts:
        found.problems.append(
            f"{share(sum(bad.counts.values()), sums.rows)} rows of the parquet files cannot be used: "
            + ", ".join(f"{reason} {count:,}" for reason, count in bad.counts.most_common())
        )
        found.about["bad"] = bad.examples


def _successes(table: str, sums: Sums, bad: Bad, found: Survey) -> set[str] | None:
    """Keys of the rows whose picture should be in the tar; None if the parquet cannot be read."""
    wanted: set[str] = set()
    try:
        for outcome in read_outcomes(table, rows=4096):
            sums.add(outcome)
            if not isinstance(outcome, Outcome):
                bad.add(outcome)
            elif outcome.succeeded:
                wanted.add(outcome.key)
    except UserError as error:
        found.problems.append(str(error))
        return None
    return wanted


def _compare(found: Survey, tar: str, table: str, wanted: set[str], keys: Sequence[str]) -> None:
    held = set(keys)
    lost, extra = sorted(wanted - held), sorted(held - wanted)
    if lost:
        found.problems.append(
            f"{table} calls {len(wanted):,} rows a success, {len(lost):,} of them are not in {tar}; the first is "
            f"{lost[0]}. The tar is cut off or of another run: make the shard again"
        )
    if extra:
        found.problems.append(
            f"{tar} holds {len(extra):,} samples that {table} does not call a success; the first is {extra[0]}. "
            "The two are of different runs: make the shard again"
        )
    stem = tar.rpartition("/")[2].removesuffix(".tar")
    odd = odd_key(stem, keys)
    if odd is not None:
        found.notes.append(f"{tar}: {odd}; was the tar renamed?")
