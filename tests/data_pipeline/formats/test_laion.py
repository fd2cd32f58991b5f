"""Tables of image URLs and captions, in the published schemas and in the schemas that their copies have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data_pipeline.errors import UserError
from data_pipeline.formats import laion
from data_pipeline.formats.laion import Pair, read_pairs
from data_pipeline.formats.records import BadRecord

URLS = ["http://a/1.jpg", "http://a/2.jpg", None]
TEXTS = ["a red dot", "", None]

# Published schemas: column -> (Arrow type, the values of three rows).
LAION_400M = {
    "SAMPLE_ID": (pa.int64(), [7, 8, 9]),
    "URL": (pa.string(), URLS),
    "TEXT": (pa.string(), TEXTS),
    "HEIGHT": (pa.int64(), [480, None, 1]),
    "WIDTH": (pa.int64(), [640, 0, 1]),
    "LICENSE": (pa.string(), ["?", None, "CC-BY"]),
    "NSFW": (pa.string(), ["UNLIKELY", "UNSURE", None]),
    "similarity": (pa.float64(), [0.31, None, 0.4]),
}
LAION_2B = {
    "URL": (pa.string(), URLS),
    "TEXT": (pa.string(), TEXTS),
    "WIDTH": (pa.int32(), [640, None, 3]),
    "HEIGHT": (pa.int32(), [480, None, 3]),
    "similarity": (pa.float64(), [0.31, None, 0.4]),
    "hash": (pa.int64(), [-(2**63), None, 4]),
    "punsafe": (pa.float32(), [0.25, None, 0.5]),
    "pwatermark": (pa.float32(), [0.5, None, 0.5]),
}
LAION_COCO = {
    "URL": (pa.string(), URLS),
    "TEXT": (pa.string(), TEXTS),
    "top_caption": (pa.string(), ["b", None, "x"]),
    "all_captions": (pa.list_(pa.string()), [["a", "b", "c", "a", " "], None, ["x"]]),
    "all_similarities": (pa.list_(pa.float64()), [[0.2, 0.1, 0.3, 0.05, 0.9], None, [0.5]]),
    "similarity": (pa.float64(), [0.3, 0.3, 0.3]),
    "hash": (pa.int64(), [1, 2, 3]),
    "punsafe": (pa.float32(), [0.0, 0.0, 0.0]),
    "pwatermark": (pa.float32(), [0.0, 0.0, 0.0]),
}
COYO = {
    "id": (pa.int64(), [1, 2, 3]),
    "url": (pa.string(), URLS),
    "text": (pa.string(), TEXTS),
    "width": (pa.int64(), [640, None, 3]),
    "height": (pa.int64(), [480, None, 3]),
    "image_phash": (pa.string(), ["a1b2", None, "ff"]),
    "text_length": (pa.int64(), [1, 2, 3]),
    "clip_similarity_vitb32": (pa.float64(), [0.2, 0.2, 0.2]),
    "clip_similarity_vitl14": (pa.float64(), [0.31, None, 0.2]),
    "nsfw_score_opennsfw2": (pa.float64(), [0.25, None, 0.2]),
    "nsfw_score_gantman": (pa.float64(), [0.9, 0.9, 0.9]),
    "watermark_score": (pa.float64(), [0.5, None, 0.2]),
    "aesthetic_score_laion_v2": (pa.float64(), [5.5, None, 4.0]),
}
DATACOMP = {
    "uid": (pa.string(), ["00" * 16, "0f" * 16, "ff" * 16]),
    "url": (pa.string(), URLS),
    "text": (pa.string(), TEXTS),
    "original_width": (pa.int64(), [640, None, 3]),
    "original_height": (pa.int64(), [480, None, 3]),
    "clip_b32_similarity_score": (pa.float64(), [0.2, 0.2, 0.2]),
    "clip_l14_similarity_score": (pa.float64(), [0.31, None, 0.2]),
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "laion-400m": LAION_400M,
    "laion-2b": LAION_2B,
    "laion-2b-multi": LAION_2B | {"LANGUAGE": (pa.string(), ["de", None, "xx"])},
    "laion-2b-unjoined": {
        k: LAION_400M[k] for k in ("URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "similarity")
    },
    "laion-coco": LAION_COCO,
    "coyo": COYO,
    "datacomp": DATACOMP,
    "pairs": {"url": (pa.string(), URLS), "caption": (pa.string(), TEXTS)},
}


def write(path: Path, schema: dict[str, Any], **options: Any) -> str:
    table = pa.table([pa.array(values, kind) for kind, values in schema.values()], names=list(schema))
    parquet.write_table(table, path, **options)
    return str(path)


def as_copy(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a copy that pandas wrote: names in lower case, sizes as floats, large strings."""
    changed = {}
    for name, (kind, values) in schema.items():
        if pa.types.is_integer(kind) and name.lower() not in ("hash", "sample_id", "id"):
            kind, values = pa.float64(), [math.nan if value is None else float(value) for value in values]
        elif kind == pa.string():
            kind = pa.large_string()
        changed[name.lower()] = (kind, values)
    return changed


@pytest.mark.parametrize("copied", [False, True], ids=["published", "copied"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_known_and_read(name: str, copied: bool, tmp_path: Path) -> None:
    schema = as_copy(SCHEMAS[name]) if copied else SCHEMAS[name]
    assert laion.identify(list(schema)) == name
    first, second, third = read_pairs(write(tmp_path / "a.parquet", schema))
    assert isinstance(first, Pair)
    assert isinstance(second, Pair)
    assert third == BadRecord(str(tmp_path / "a.parquet"), "row 2", "missing url")
    assert (first.url, second.url) == ("http://a/1.jpg", "http://a/2.jpg")
    if name != "laion-coco":
        assert (first.captions, second.captions) == (("a red dot",), ())
        assert (first.scores, first.alt_text) == ((None,), None)
    sized = {"width", "original_width"} & {column.lower() for column in schema}
    assert (first.width, first.height) == ((640, 480) if sized else (None, None))
    assert second.width is second.height is None
    if name not in ("pairs", "laion-coco"):
        assert first.similarity == pytest.approx(0.31)
        assert second.similarity is None
    if name in ("laion-2b", "laion-2b-multi", "coyo"):
        assert (first.punsafe, first.pwatermark) == (0.25, 0.5)
        assert second.punsafe is second.pwatermark is second.aesthetic is None


def test_what_each_schema_has_of_its_own(tmp_path: Path) -> None:
    def first(name: str) -> Pair:
        pair = next(iter(read_pairs(write(tmp_path / f"{name}.parquet", SCHEMAS[name]))))
        assert isinstance(pair, Pair)
        return pair

    assert (first("laion-400m").nsfw, first("laion-400m").license, first("laion-400m").id) == (
        "UNLIKELY",
        "?",
        "7",
    )
    assert first("laion-2b").hash == -(2**63)
    assert first("laion-2b-multi").language == "de"
    assert (first("coyo").hash, first("coyo").aesthetic) == ("a1b2", 5.5)
    assert first("datacomp").id == "00" * 16
    assert first("laion-2b").nsfw is None
    with_md5 = LAION_2B | {"md5": (pa.string(), ["0cc175b9", None, ""])}
    pair = next(iter(read_pairs(write(tmp_path / "md5.parquet", with_md5))))
    assert isinstance(pair, Pair)
    assert (pair.md5, laion.identify(list(with_md5))) == ("0cc175b9", "laion-2b")


def test_generated_captions_come_by_similarity_after_the_top_one(tmp_path: Path) -> None:
    first, second, _ = read_pairs(write(tmp_path / "a.parquet", LAION_COCO))
    assert isinstance(first, Pair)
    assert isinstance(second, Pair)
    assert first.captions == ("b", "c", "a")
    assert first.scores == (0.1, 0.3, 0.2)
    assert first.alt_text == "a red dot"
    assert (second.captions, second.alt_text) == ((), None)
    without = {k: v for k, v in LAION_COCO.items() if k != "TEXT"}
    (first, *_) = read_pairs(write(tmp_path / "b.parquet", without))
    assert isinstance(first, Pair)
    assert (first.captions[0], first.alt_text) == ("b", None)


def test_rows_come_in_order_whatever_the_layout(tmp_path: Path) -> None:
    truth = [f"http://a/{n}" for n in range(57)]
    for number, (start, stop) in enumerate([(0, 20), (20, 20), (20, 57)]):
        part = truth[start:stop]
        schema = {
            "extra": (pa.int64(), list(range(len(part)))),
            "TEXT": (pa.string(), part),
            "URL": (pa.string(), part),
        }
        write(tmp_path / f"part-{number}.parquet", schema, row_group_size=8, compression="snappy")
    for rows in (1, 7, 1024):
        assert [pair.url for pair in read_pairs(str(tmp_path), rows) if isinstance(pair, Pair)] == truth


def test_two_columns_that_differ_in_case_are_one_meaning(tmp_path: Path) -> None:
    schema = {"URL": (pa.string(), ["u"]), "url": (pa.string(), ["v"]), "TEXT": (pa.string(), ["t"])}
    (pair,) = read_pairs(write(tmp_path / "a.parquet", schema))
    assert isinstance(pair, Pair)
    assert pair.url == "u"


def test_text_that_is_not_utf8_is_a_bad_record(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe", None], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    parquet.write_table(pa.table({"URL": ["a", "b", "c"], "TEXT": text}), tmp_path / "a.parquet")
    first, second, third = read_pairs(str(tmp_path / "a.parquet"))
    assert isinstance(first, Pair)
    assert first.captions == ("good",)
    assert isinstance(second, BadRecord)
    assert (second.reason, second.place) == ("not UTF-8", "row 1")
    assert isinstance(third, Pair)
    assert third.captions == ()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"link": (pa.string(), ["a"]), "TEXT": (pa.string(), ["t"])},
            r"no column url or image_url or img_url, only link",
        ),
        (
            {"URLS": (pa.string(), ["a"]), "TEXT": (pa.string(), ["t"])},
            r"perhaps 'URLS' is the url; rename it to url",
        ),
        (
            {"URL": (pa.string(), ["a"]), "txt": (pa.string(), ["t"])},
            r"perhaps 'txt' is the caption; rename it to text",
        ),
        (
            {"URL": (pa.int64(), [1]), "TEXT": (pa.string(), ["t"])},
            r"column URL has type int64, the url should be strings",
        ),
        (
            {"URL": (pa.string(), ["a"]), "TEXT": (pa.binary(), [b"t"])},
            r"column TEXT has type binary, the caption",
        ),
    ],
)
def test_what_cannot_be_read_is_named_with_what_was_meant(
    schema: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.parquet", schema)
    with pytest.raises(UserError, match=message) as error:
        list(read_pairs(path))
    assert path in str(error.value)


def test_a_column_of_another_type_that_can_be_done_without_is_left_out(tmp_path: Path) -> None:
    schema = LAION_2B | {
        "WIDTH": (pa.string(), ["640", "1", "1"]),
        "punsafe": (pa.list_(pa.int8()), [[1], None, [2]]),
    }
    first, *_ = read_pairs(write(tmp_path / "a.parquet", schema))
    assert isinstance(first, Pair)
    assert (first.width, first.height, first.punsafe) == (None, 480, None)


@pytest.mark.parametrize("keep", [0, 3, 4, 50, -10, -60])
def test_a_file_that_is_cut_off_is_named(keep: int, tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.parquet", LAION_2B))
    path.write_bytes(path.read_bytes()[:keep])
    message = r"is not a parquet file, or cut off" if keep else r"is empty \(0 bytes\)"
    with pytest.raises(UserError, match=rf"a\.parquet {message}"):
        list(read_pairs(str(path)))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    schema = pa.schema({"URL": pa.string(), "TEXT": pa.string()})
    with parquet.ParquetWriter(tmp_path / "a.parquet", schema, compression=None) as writer:
        for group in range(40):
            texts = [f"{group} {n} " + "x" * 500 for n in range(2000)]
            writer.write_table(pa.table({"URL": texts, "TEXT": texts}))
    pool = pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    for number, pair in enumerate(read_pairs(str(tmp_path / "a.parquet"), rows=256)):
        assert isinstance(pair, Pair)
        if number % 1000 == 0:
            most = max(most, pool.bytes_allocated() - before)
    assert number == 79_999
    assert most < 12_000_000 < (tmp_path / "a.parquet").stat().st_size // 6
