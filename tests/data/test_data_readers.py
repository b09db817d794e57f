"""Readers: every row is read once, in order, or is named; nothing disappears between file and examples."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from im_lightning.data.loading import Rejected, iter_rows, load_examples, write_rows
from im_lightning.errors import DataError, RequestError

ROWS = [{"instruction": f"Say {i}.", "input": "" if i % 2 else "né\u2028e", "output": "x" * i} for i in range(7)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


CONTENTS = {
    "pool.jsonl": LINES,
    "pool.jsonl.gz": LINES,
    "pool.jsonl.zst": LINES,
    "pool.JSONL": LINES.replace(b"\n", b"\r\n\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.rstrip(),
    "pool.json": json.dumps(ROWS).encode(),
    "pool.json.gz": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "pool.json.zst": json.dumps(ROWS, indent="\t").encode(),
    "bom.json": b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode() + b"\n\n",
    "lines.json": LINES,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_all_kinds_of_files_hold_the_same_rows(tmp_path: Path, name: str):
    """A pool must not change by being compressed or converted."""
    path = write(tmp_path / name, CONTENTS[name])
    assert [row.raw for row in iter_rows(path)] == ROWS
    examples = load_examples(str(path))
    assert [e.id for e in examples] == [e.id for e in load_examples(ROWS)]
    assert {e.source for e in examples} == {name.split(".")[0]}


def test_parquet_holds_the_same_rows(tmp_path: Path):
    """Columnar files fill the fields of other formats with nulls; those must not count as fields."""
    path = tmp_path / "pool.parquet"
    pq.write_table(pa.table({"messages": pa.nulls(7), **{k: [r[k] for r in ROWS] for k in ROWS[0]}}), path)
    assert [e.id for e in load_examples(path)] == [e.id for e in load_examples(ROWS)]
    assert [row.place for row in iter_rows(path)][2] == f"{path}:3"
    turns = [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]]
    pq.write_table(pa.table({"conversations": turns}), path)
    assert load_examples(path)[0].response == "b"


def test_small_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows, escapes and numbers that straddle a read must come out whole."""
    monkeypatch.setattr("im_lightning.data.file_io._CHUNK", 3)
    rows = [{**row, "score": 12.5 + i, "nested": [{"a": [1, True, None]}]} for i, row in enumerate(ROWS)]
    for indent in (None, 1):
        path = write(tmp_path / "pool.json", json.dumps(rows, indent=indent, ensure_ascii=indent is None).encode())
        read = list(iter_rows(path))
        assert [row.raw for row in read] == rows
        if indent:
            text = path.read_text(encoding="utf-8").split("\n")
            assert all(text[int(row.place.rsplit(":")[-1]) - 1].strip() == "{" for row in read)
    assert len(load_examples(write(tmp_path / "pool.jsonl", LINES))) == 7


def test_gzip_members_and_zstandard_frames_in_a_row_are_all_read(tmp_path: Path):
    """Concatenated archives are ordinary; reading only the first part would lose rows without a word."""
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(LINES) + gzip.compress(LINES) + b"\0" * 40)
    (tmp_path / "two.jsonl.zst").write_bytes(zstandard.compress(LINES) + zstandard.compress(LINES))
    assert len(load_examples(tmp_path / "two.jsonl.gz")) == len(load_examples(tmp_path / "two.jsonl.zst")) == 14


def test_folders_and_lists(tmp_path: Path):
    """A folder is its data files in order of name; manifests, hidden files and rejected rows are not data."""
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.jsonl", LINES)
    write(tmp_path / "a.json.gz", json.dumps(ROWS[:2]).encode())
    write(tmp_path / "sub" / "c.jsonl.zst", LINES)
    for name, text in [(".hidden.jsonl", "x"), ("b.rejected.jsonl", '{"raw": 1}'), ("notes.txt", "x")]:
        (tmp_path / name).write_text(text)
    (tmp_path / "MANIFEST.json").write_text('{"files": [{"file": "b.jsonl"}]}')
    assert [e.source for e in load_examples(tmp_path)] == ["a"] * 2 + ["b"] * 7 + ["c"] * 7
    listed = load_examples([tmp_path / "b.jsonl", str(tmp_path / "a.json.gz")])
    assert [e.source for e in listed] == ["b"] * 7 + ["a"] * 2


def test_a_linked_folder_is_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows are neither read twice, where it links into the folder, nor missing in silence, where it does not."""
    for name in ("pool", "elsewhere"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{name}.jsonl", LINES)
    more = tmp_path / "pool" / "more"
    more.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert {e.source for e in load_examples(tmp_path / "pool")} == {"pool"}
    assert f"{more}: left out, it is a link to a folder (name it beside the folder, too)" in capsys.readouterr().err
    assert {e.source for e in load_examples([tmp_path / "pool", more])} == {"pool", "elsewhere"}


def test_a_folder_beneath_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python walks past it, and the pool would be smaller by its rows."""
    write(tmp_path / "a.jsonl", LINES)
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "b.jsonl", LINES)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "sub")
    with pytest.raises(RequestError, match=r"sub: the folder cannot be read\. Fix: check its permissions"):
        load_examples(tmp_path)


def test_places_count_blank_lines(tmp_path: Path):
    """The line in a message must be the line in the editor."""
    path = write(tmp_path / "pool.jsonl", b"\n" + LINES.replace(b"\n", b"\n\n"))
    assert [row.place for row in iter_rows(path)][:2] == [f"{path}:2", f"{path}:4"]


def test_what_json_tolerates_is_tolerated(tmp_path: Path):
    """Duplicate keys, NaN and escaped lone surrogates are read as Python's json reads them."""
    line = b'{"instruction": "a", "output": "b", "output": "\\ud800c", "score": NaN, "n": -Infinity}\n'
    for name, content in [("x.jsonl", line), ("x.json", b"[" + line + b"]")]:
        example = load_examples(write(tmp_path / name, content))[0]
        assert example.response == "\ud800c"
        assert len(example.id) == 32


BAD_LINES = {
    b"[1, 2]": "the row is not an object but a list",
    b'{"instruction": "a"}': "no response: none of the fields output",
    b'{"instruction": "a", "output": 3}': "its field 'output' is not a string but a number",
    b'{"instruction": "a", "output": "\xff"}': "broken UTF-8 at byte 33 of the line",
    b'{"instruction": "a", "outp': "truncated JSON (Unterminated string starting at",
    b'{"instruction": "a"': "truncated JSON (Expecting ',' delimiter",
    b'{"instruction": "a" "output": "b"}': "not valid JSON (Expecting ',' delimiter at character 21)",
    b"[" * 100_000: "not readable JSON (nested too deeply)",
    b'{"n": ' + b"9" * 5000 + b"}": "not readable JSON (Exceeds the limit",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: bad[:24].decode("ascii", "replace"))
def test_a_bad_line_stops_or_is_set_aside(tmp_path: Path, bad: bytes):
    """One bad row among many: the message finds it; with quarantine the others are not held up."""
    lines = LINES.splitlines(keepends=True)
    path = write(tmp_path / "pool.jsonl.gz", b"".join([*lines[:3], bad + b"\n", *lines[3:]]))
    with pytest.raises(DataError) as caught:
        load_examples(path)
    said = str(caught.value)
    assert said.startswith(f"{path}:4: ") and BAD_LINES[bad] in said
    remedy = "mend the row, or set bad rows aside with --on-bad-row quarantine (a fit or recipe: data.on_bad_row)."
    assert said.endswith(f"Fix: {remedy}")
    rejected: list[Rejected] = []
    assert [e.id for e in load_examples(path, on_bad_row="quarantine", rejected=rejected)] == [
        e.id for e in load_examples(ROWS)
    ]
    assert [(r.file, r.line) for r in rejected] == [(str(path), 4)]
    assert BAD_LINES[bad] in rejected[0].cause
    write_rows(tmp_path / "out.rejected.jsonl", rejected)
    kept = json.loads((tmp_path / "out.rejected.jsonl").read_text())
    assert set(kept) == {"file", "line", "cause", "raw"} and kept["raw"]


def test_bad_rows_of_a_list_and_of_parquet(tmp_path: Path):
    """Rows without a text line are named by their number."""
    with pytest.raises(DataError, match=r"^rows:2: no response"):
        load_examples([ROWS[0], {"instruction": "a"}])
    with pytest.raises(DataError, match=r"^rows:2: the row is not an object but a number"):
        load_examples([ROWS[0], 3])
    path = tmp_path / "pool.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": ["c", None]}), path)
    with pytest.raises(DataError, match=r"pool.parquet:2: no response"):
        load_examples(path)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_truncated_array_gives_its_whole_rows(tmp_path: Path, indent: int | None, suffix: str):
    """An interrupted download: what is there can be used, and what is missing is said, with its line."""
    text = json.dumps(ROWS, indent=indent)
    cut = text[: text.index("Say 5") + 3]
    path = write(tmp_path / f"pool.json{suffix}", cut.encode())
    rejected: list[Rejected] = []
    assert len(load_examples(path, on_bad_row="quarantine", rejected=rejected)) == 5
    (torn,) = rejected
    assert torn.line == (1 if indent is None else 27) and torn.cause.startswith("truncated JSON")
    assert torn.raw.startswith("{") and torn.raw.endswith("Say")
    with pytest.raises(DataError, match=rf":{torn.line}: truncated JSON"):
        load_examples(path)


def test_an_array_cut_between_rows_is_still_truncated(tmp_path: Path):
    """Cut after a comma, every row parses; that the end is missing must be said all the same."""
    path = write(tmp_path / "pool.json", json.dumps(ROWS[:3])[:-1].encode() + b",\n")
    with pytest.raises(DataError, match=r"pool.json:2: truncated JSON: the file ends before the array does"):
        load_examples(path)
    rejected: list[Rejected] = []
    assert len(load_examples(path, on_bad_row="quarantine", rejected=rejected)) == 3 and len(rejected) == 1


@pytest.mark.parametrize("chunk", [5, 1 << 18])
@pytest.mark.parametrize("indent", [1, 4, "lines"])
def test_one_broken_element_costs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent):
    """A missing comma in the middle of a large array must not cost the half behind it."""
    monkeypatch.setattr("im_lightning.data.file_io._CHUNK", chunk)
    text = "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]" if indent == "lines" else json.dumps(ROWS, indent=indent)
    path = write(tmp_path / "pool.json", text.replace('"Say 3.",', '"Say 3."').encode())
    rejected: list[Rejected] = []
    examples = load_examples(path, on_bad_row="quarantine", rejected=rejected)
    assert [e.id for e in examples] == [e.id for e in load_examples(ROWS[:3] + ROWS[4:])]
    assert [r.line for r in rejected] == [5 if indent == "lines" else 17] and "Say 3." in rejected[0].raw


def test_an_array_on_one_line_is_lost_from_the_broken_element_on(tmp_path: Path):
    """Where the next row starts cannot be known; that the rest is lost must be said."""
    path = write(tmp_path / "pool.json", json.dumps(ROWS).replace('"Say 3.",', '"Say 3."').encode())
    rejected: list[Rejected] = []
    assert len(load_examples(path, on_bad_row="quarantine", rejected=rejected)) == 3
    assert rejected[0].cause.endswith("the rest of the array, from here on, is lost") and "Say 6" in rejected[0].raw


def test_broken_bytes_and_leftovers_in_arrays(tmp_path: Path):
    """Bytes that are not UTF-8 must neither be replaced silently nor end the reading."""
    content = json.dumps(ROWS[:3]).encode().replace(b"Say 1", b"Say \xff") + b'{"instruction": "x", "output": "y"}'
    path = write(tmp_path / "pool.json", content)
    rejected: list[Rejected] = []
    assert len(load_examples(path, on_bad_row="quarantine", rejected=rejected)) == 2
    assert [r.cause for r in rejected] == ["broken UTF-8 in this row", "text after the end of the array"]
    assert "Say \\xff" in rejected[0].raw


def test_missing_commas_are_not_passed_over(tmp_path: Path):
    """Where a comma is missing, a row may be missing with it."""
    path = write(tmp_path / "pool.json", b"[" + b"\n".join(json.dumps(row).encode() for row in ROWS[:2]) + b"]")
    with pytest.raises(DataError, match=r"pool.json:2: not valid JSON \(0 commas before this row instead of 1\)"):
        load_examples(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_torn_and_foreign_archives(tmp_path: Path, suffix: str):
    """A cut-off archive must not read as a shorter pool; one that is no archive says so."""
    rows = [{"instruction": f"{i * 7919 % 10007}", "output": f"{i * 104729 % 99991}"} for i in range(60_000)]
    whole = write(tmp_path / f"pool.jsonl{suffix}", "".join(json.dumps(row) + "\n" for row in rows).encode())
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(DataError, match=r"stream breaks off here .*rows after it are lost"):
        load_examples(whole)
    rejected: list[Rejected] = []
    read = load_examples(whole, on_bad_row="quarantine", rejected=rejected)
    assert 1000 < len(read) < 60_000 and read[-1].id == load_examples([rows[len(read) - 1]])[0].id
    assert rejected[0].line == len(read) + 1
    for wrong in (b"plain text", b"", content[:6]):
        whole.write_bytes(wrong)
        with pytest.raises(DataError, match=rf"pool.jsonl{suffix}: is not a readable (gzip|Zstandard) file .* Fix:"):
            load_examples(whole, on_bad_row="quarantine")


def test_torn_parquet(tmp_path: Path):
    """Arrow's own message names neither the file nor a remedy."""
    (tmp_path / "pool.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"pool.parquet: is not a readable Parquet file .* Fix: make the file anew"):
        load_examples(tmp_path / "pool.parquet")


def test_parquet_that_breaks_off_in_the_middle(tmp_path: Path):
    """What could be read is kept; that there was more is said."""
    path = tmp_path / "pool.parquet"
    texts = [str(i * 104729 % 99991) for i in range(8192)]
    pq.write_table(pa.table({"prompt": texts, "response": texts}), path, row_group_size=1024, use_dictionary=False)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = b"\xff" * 4000
    path.write_bytes(content)
    rejected: list[Rejected] = []
    read = load_examples(path, on_bad_row="quarantine", rejected=rejected)
    assert 1024 <= len(read) < 8192 and read[-1].response == texts[len(read) - 1]
    assert rejected[-1].line == len(read) + 1 and "the Parquet file breaks off here" in rejected[-1].cause
    with pytest.raises(DataError, match=rf"pool.parquet:{len(read) + 1}: the Parquet file breaks off here"):
        load_examples(path)


@pytest.mark.parametrize(
    ("name", "cause"), [("a.jsonl", "cannot be read: No such file"), ("a.parquet", "there is no such")]
)
def test_files_that_vanish(tmp_path: Path, name: str, cause: str):
    """A file removed while others are read is named."""
    path = write(tmp_path / name, LINES)
    rows = iter_rows(path)
    path.unlink()
    with pytest.raises(RequestError, match=rf"{name}: {cause}.* Fix: check the name"):
        next(rows)


def test_json_objects_that_are_no_rows(tmp_path: Path):
    """A pretty-printed object, an export under a key: said as what it is, not as a syntax error in line 2."""
    path = tmp_path / "pool.json"
    path.write_text(json.dumps({"data": ROWS}, indent=1))
    with pytest.raises(
        DataError, match=r"pool.json:1: no response: its fields are those of no known format \(it has data\)"
    ):
        load_examples(path)
    path.write_text(json.dumps(ROWS[0], indent=1))
    assert len(load_examples(path)) == 1
    path.write_text("instruction,output\na,b\n")
    with pytest.raises(DataError, match=r"pool.json:1: not valid JSON"):
        load_examples(path)


def test_nothing_to_read(tmp_path: Path):
    """An empty pool is an error here, not a division by zero three floors up."""
    empty = write(tmp_path / "empty.jsonl", b"\n\n")
    for data, name in [(empty, "empty.jsonl"), ([], "rows"), (write(tmp_path / "empty.json", b"[]"), "empty.json")]:
        with pytest.raises(DataError, match=rf"{name}: it holds no rows. Fix:"):
            load_examples(data)
    bad = write(tmp_path / "bad.jsonl", b"1\n2\n")
    with pytest.raises(DataError, match=r"none of its 2 rows can be used; the first: .*bad.jsonl:1: the row is not"):
        load_examples(bad, on_bad_row="quarantine")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("missing.jsonl", "there is no such file or folder"),
        ("org/missing.jsonl", "there is no such file or folder"),
        ("org/missing.jsonl:train", "there is no such file or folder"),
        ("org/pool.csv", "there is no such file or folder"),
        ("./org/pool", "there is no such file or folder"),
        ("../pool", "there is no such file or folder"),
        ("/org/pool", "there is no such file or folder"),
        ("here/pool", "there is no such file or folder"),
        ("a/b/c", "there is no such file or folder"),
        ("pool", "there is no such file or folder"),
        ("  ", "there is no such file or folder"),
        ("notes.txt", "its kind cannot be told from its name"),
        ("here", "the folder has no data files"),
    ],
)
def test_names_that_cannot_be_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cause: str):
    """A mistyped path must not become a download attempt and an error about the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("im_lightning.data.loading.load_hub", lambda *_: pytest.fail("took a path for a hub id"))
    (tmp_path / "here").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RequestError, match=rf"{cause}.* Fix: "):
        load_examples(name)


def test_wrong_arguments():
    """Mistakes in the call are told as such."""
    with pytest.raises(RequestError, match=r"data: is a single row. Fix: pass a path"):
        load_examples({"instruction": "a", "output": "b"})
    with pytest.raises(RequestError, match=r"data: is of type int"):
        load_examples(3)
    with pytest.raises(RequestError, match=r"data: mixes paths with a dict"):
        load_examples(["pool.jsonl", {}])
    with pytest.raises(RequestError, match=r"format 'csv': there is no such format"):
        load_examples(ROWS, format="csv")
    with pytest.raises(RequestError, match=r"on_bad_row 'skip': is not known. Fix: use one of error, quarantine"):
        load_examples(ROWS, on_bad_row="skip")


def test_hub_ids(monkeypatch: pytest.MonkeyPatch):
    """Splits are chosen, not guessed; without a network the message says so."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, split))
        whole = datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
        )
        if name == "org/two":
            whole["validation"] = whole.pop("train")
        return whole[split] if split else whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [e.id for e in load_examples("org/name")] == [e.id for e in load_examples(ROWS)]
    assert [row.place for row in iter_rows("org/name:test")] == ["org/name:test:1", "org/name:test:2"]
    assert load_examples("org/name")[0].source == "name"
    assert [row.place for row in iter_rows("org/name/en:test")] == ["org/name/en:test:1", "org/name/en:test:2"]
    assert asked[:2] == [("org/name", None), ("org/name", "test")]
    with pytest.raises(
        RequestError, match=r"org/two: it has several splits \(test, validation\).*name one: org/two:SPLIT"
    ):
        load_examples("org/two")

    def offline(name, config=None, split=None):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        RequestError,
        match=r"^org/name:x: there is no such file, and .*Couldn't reach the Hub\). Fix: check the name",
    ):
        load_examples("org/name:x")


@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.jsonl.gz", "out.jsonl.zst", "deep/out.jsonl"])
def test_written_rows_are_read_back(tmp_path: Path, name: str):
    """`select` writes rows in their own format: nothing may be lost on the way, not even odd characters."""
    rows = [*ROWS, {"instruction": "\ud800", "output": "\x00é", "tags": [1, {"a": None}]}]
    assert write_rows(tmp_path / name, rows) == 8
    assert [row.raw for row in iter_rows(tmp_path / name)] == rows
    first = (tmp_path / name).read_bytes()
    write_rows(tmp_path / name, rows)
    assert (tmp_path / name).read_bytes() == first
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_rows_are_written_as_json_only(tmp_path: Path):
    """JSON under the name of something else would not be found to be JSON by anyone."""
    with pytest.raises(RequestError, match=r"out.parquet: rows are written as JSON. Fix: end the name in .jsonl"):
        write_rows(tmp_path / "out.parquet", ROWS)


# tables of texts, and what pandas and datasets hand out


def test_csv_and_tsv_are_rows_of_texts(tmp_path: Path) -> None:
    """Lines inside quotation marks are part of a text, and "007" stays what it is."""
    (tmp_path / "a.csv").write_text(
        '\ufeffinstruction,input,output\n"Name a\nriver.",,"The ""Elbe"", \u2028yes"\nb,c,007\n'
    )
    (tmp_path / "b.tsv").write_text("question\tanswer\r\nWho?\tAda\r\n")
    with gzip.open(tmp_path / "c.csv.gz", "wt") as file:
        file.write("prompt,response\nHi,Hello\n")
    rows = load_examples([tmp_path / "a.csv", tmp_path / "b.tsv", tmp_path / "c.csv.gz"])
    assert [row.response for row in rows] == ['The "Elbe", \u2028yes', "007", "Ada", "Hello"]
    assert rows[0].instruction == "Name a\nriver." and [row.source for row in rows] == ["a", "a", "b", "c"]


def test_bad_rows_of_a_csv_have_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\n"Hi\nyou",Hello\nonly one\nWho?,Ada\nWhere?,"here')
    rejected: list[Rejected] = []
    rows = load_examples(path, on_bad_row="quarantine", rejected=rejected)
    assert [row.response for row in rows] == ["Hello", "Ada"]
    assert [(bad.line, bad.cause) for bad in rejected] == [
        (4, "it has 1 fields where the header has 2"),
        (6, "not a row of a CSV file (unexpected end of data); rows after it are lost"),
    ]
    path.write_text("prompt,prompt\na,b\n")
    with pytest.raises(DataError, match=r"a.csv:1: its header names a column twice \(prompt, prompt\). Fix"):
        load_examples(path)
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b'prompt\tresponse\nWhere?\t"here'))
    with pytest.raises(DataError, match=r"a\.tsv\.gz:2: not a row of a TSV file"):
        load_examples(tmp_path / "a.tsv.gz")


def test_a_byte_that_is_no_utf8_costs_its_row_of_a_csv_only(tmp_path: Path) -> None:
    """An export in Windows-1252 with one accent: the line is named, and no row around it is lost."""
    lines = [b"prompt,response", *(b'"Ask\n%d",Answer %d' % (k, k) for k in range(20_000))]
    lines[900] = lines[900].replace(b"Answer", b"Caf\xe9,")
    lines[902] = lines[902].replace(b"Answer", b"Caf\xe9")
    path = write(tmp_path / "a.csv", b"\r\n".join(lines))
    with pytest.raises(DataError, match=r"a.csv:1800: broken UTF-8 in this row; save the file as UTF-8 \(Excel: CSV"):
        load_examples(path)
    rejected: list[Rejected] = []
    rows = load_examples(path, on_bad_row="quarantine", rejected=rejected)
    assert [row.response for row in rows] == [f"Answer {k}" for k in range(20_000) if k not in (899, 901)]
    assert [(bad.line, bad.raw) for bad in rejected] == [
        (1800, "Ask\n899,Caf\\xe9, 899"),
        (1804, "Ask\n901,Caf\\xe9 901"),
    ]
    write(path, b"prompt,response\nHi,Caf\xc3")  # cut inside its last character
    with pytest.raises(DataError, match=r"none of its 1 rows can be used; the first: .*a.csv:2: broken UTF-8"):
        load_examples(path, on_bad_row="quarantine")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_header_that_is_no_utf8_is_said(encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt,réponse\nHi,Hello\n".encode(encoding))
    with pytest.raises(DataError, match=r"a.csv:1: its header is not UTF-8 \(.*\). Fix: save the file as UTF-8 \("):
        load_examples(path, on_bad_row="quarantine")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("row", ["Say {0},{1}", '"Say {0}","{1}"'])
def test_a_torn_table_ends_before_the_row_that_it_breaks_off_in(row: str, suffix: str, tmp_path: Path) -> None:
    """Half a response must not count as a whole one."""
    answers = [f"{k * 104729 % 99991} and {k * 7919 % 10007}" for k in range(20_000)]
    text = "\n".join(["prompt,response", *(row.format(k, answer) for k, answer in enumerate(answers))])
    path = write(tmp_path / f"a.csv{suffix}", text.encode())
    content = path.read_bytes()
    for cut in (0, 3):
        path.write_bytes(content[: len(content) * 3 // 4 - cut])
        rejected: list[Rejected] = []
        rows = load_examples(path, on_bad_row="quarantine", rejected=rejected)
        assert 1000 < len(rows) < 20_000 and [row.response for row in rows] == answers[: len(rows)]
        assert [bad.line for bad in rejected] == [len(rows) + 2] and "stream breaks off here" in rejected[0].cause


def test_rows_as_pandas_hands_them_out() -> None:
    """Missing text is NaN, lists are arrays, and a frame is its rows."""
    pandas, numpy = pytest.importorskip("pandas"), pytest.importorskip("numpy")
    turns = numpy.array([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], dtype=object)
    (one, other) = load_examples(
        [{"instruction": "Name a river.", "input": float("nan"), "output": "The Elbe."}, {"conversations": turns}]
    )
    assert one.id == load_examples([{"instruction": "Name a river.", "output": "The Elbe."}])[0].id
    assert other.response == "Hello"
    frame = pandas.DataFrame([{"instruction": "Name a river.", "input": None, "output": "The Elbe."}, {"output": "x"}])
    rejected: list[Rejected] = []
    assert [row.id for row in load_examples(frame, on_bad_row="quarantine", rejected=rejected)] == [one.id]
    assert [bad.line for bad in rejected] == [2]


def test_parquet_of_mixed_content_is_decoded(tmp_path: Path) -> None:
    """`datasets` writes a content that is a text here and a list of parts there as JSON texts: read as they stand, a
    row would be trained with quotation marks around every turn."""
    import datasets

    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": "Yo"},
            ]
        },
    ]
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "mixed.parquet")
    read = load_examples(tmp_path / "mixed.parquet")
    assert [row.id for row in read] == [row.id for row in load_examples(rows)]
    assert read[0].response == "Hello"


def test_an_object_of_parquet_or_datasets_has_its_own_fields_alone(tmp_path: Path) -> None:
    """Arrow gives all objects of a column the fields of any: every call would be trained with the arguments of all
    other tools, as nulls. A null that stands in JSON text was written."""
    import datasets

    def row(tool: str, **arguments: str) -> dict:
        call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        shape = {"type": "object", "properties": {name: {"type": "string"} for name in arguments}}
        tools = [{"type": "function", "function": {"name": tool, "parameters": shape}}]
        return {"messages": [{"role": "user", "content": "Go."}, answer], "tools": tools}

    rows = [row("weather", city="Oslo"), row("play", song="Morgenstimmung")]
    wanted = [example.id for example in load_examples(rows)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "calls.parquet")
    assert [example.id for example in load_examples(tmp_path / "calls.parquet")] == wanted
    dataset = datasets.Dataset.from_list(rows)
    assert dataset[0]["tools"][0]["function"]["parameters"]["properties"]["song"] is None
    for data in (dataset, dataset.to_iterable_dataset()):
        assert [example.id for example in load_examples(data)] == wanted
    with pytest.raises(DataError, match="the row is not an object but a list"):
        load_examples(dataset["messages"])
    texts = datasets.Features(
        {name: datasets.Value("string") for name in ("prompt", "response")} | {"tools": datasets.List(datasets.Json())}
    )
    tools = [{"name": "play", "default": None}]
    written = datasets.Dataset.from_dict({"prompt": ["Go."], "response": ["Yes."], "tools": [tools]}, features=texts)
    written.to_parquet(tmp_path / "texts.parquet")
    for data in (written, tmp_path / "texts.parquet"):
        assert [json.loads(example.tools) for example in load_examples(data)] == [tools]


def test_fields_that_are_not_used_are_said_once_per_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pool.jsonl"
    lines = [{"instruction": "a", "output": "b", "category": "qa"}, {"instruction": "c", "output": "d", "url": ""}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    load_examples(path)
    said = capsys.readouterr().err
    assert f"{path}: not used: category (50% of rows); --columns (columns=) names the fields that are" in said
    load_examples(path, columns={"prompt": "instruction", "response": "output", "context": "category"})
    assert "not used" not in capsys.readouterr().err


def test_a_row_in_memory_that_is_nested_too_deeply_is_a_bad_row() -> None:
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    rejected: list[Rejected] = []
    rows = [{"instruction": "a", "output": "b", "extra": deep}, {"instruction": "a", "output": "b"}]
    assert len(load_examples(rows, on_bad_row="quarantine", rejected=rejected)) == 1
    assert [(bad.line, bad.cause) for bad in rejected] == [(1, "it is nested too deeply")]


def test_each_of_several_answers_can_be_an_example():
    """References of one instruction: equal texts once, a plain answer as it is, names of one's own too."""
    rows = [
        {"question": "A colour?", "answers": ["red", "blue", "red"]},
        {"question": "Where?", "answers": {"text": ["here", "there"], "answer_start": [0, 4]}},
        {"question": "Why?", "answer": "So."},
    ]
    found = load_examples(rows, answer="all")
    assert [(e.prompt, e.response) for e in found] == [
        ("A colour?", "red"), ("A colour?", "blue"), ("Where?", "here"), ("Where?", "there"), ("Why?", "So."),
    ]  # fmt: skip
    assert len({e.prompt_id for e in found}) == 3
    mine = load_examples([{"q": "Hi", "refs": ["a", "b"]}], answer="all", columns="prompt=q,response=refs")
    assert [e.response for e in mine] == ["a", "b"]


def test_all_answers_are_those_of_the_field_that_is_read() -> None:
    """Two copies of one answer, where another field went first, would weigh double."""
    rows = [
        {"question": "Q", "answer": "A", "answers": ["A", "B"]},
        {"instruction": "I", "output": "x", "targets": ["y", "z"]},
    ]
    assert [e.response for e in load_examples(rows, answer="all")] == ["A", "x"]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert len(load_examples([{"messages": turns, "completions": ["a", "b"]}], answer="all")) == 1
    listed = [{"question": "Q", "answers": ["A", "B"], "origin": "web"}]
    found = load_examples(listed, answer="all", columns="source=origin")
    assert [(e.response, e.source) for e in found] == [("A", "web"), ("B", "web")]
    asked = [{"instruction": "Q", "refs": ["A", "B"], "answers": ["C", "D"]}]
    mine = load_examples(asked, answer="all", columns="instruction=instruction,response=refs")
    assert [e.response for e in mine] == ["A", "B"]
