"""The readers of the sample files, on files written here."""

from pathlib import Path

from graftory.data import readers


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "file"
    path.write_bytes(text.encode(encoding))
    return path


def test_csv_keeps_quoted_commas_encoding_and_the_chosen_source(tmp_path: Path) -> None:
    path = write(tmp_path, 'v1,v2,source\nham,"one, café",x\nspam,two,y\nspam,three,x\n', "latin-1")
    columns = {"text": "v2", "label": "v1"}
    names = {"ham": "fine", "spam": "junk"}
    rows = readers.read_csv(path, columns=columns, names=names, keep=("source", "x"), encoding="latin-1")
    assert list(rows) == [{"text": "one, café", "label": "fine"}, {"text": "three", "label": "junk"}]


def test_jsonl_leaves_out_rows_without_a_label(tmp_path: Path) -> None:
    path = write(tmp_path, '{"q": "a", "label": true}\n{"q": "b"}\n{"q": "c", "label": false}\n')
    rows = readers.read_jsonl(path, columns={"text": "q", "label": "label"}, names={"True": "yes", "False": "no"})
    assert list(rows) == [{"text": "a", "label": "yes"}, {"text": "c", "label": "no"}]


def test_json_lists(tmp_path: Path) -> None:
    rows = readers.read_json_lists(write(tmp_path, '["a", "b", "neutral"]\n'), columns=("text", "pair", "label"))
    assert list(rows) == [{"text": "a", "pair": "b", "label": "neutral"}]


def test_tab_skips_three_header_lines_and_empty_texts(tmp_path: Path) -> None:
    long = "word " * 40_000
    path = write(tmp_path, f"Category\tText\nd\tstring\nclass\t\nsci.med\t{long}\nsci.space\t\n")
    assert list(readers.read_tab(path)) == [{"label": "sci.med", "text": long}]


def test_similarity_does_not_read_quotes(tmp_path: Path) -> None:
    path = write(tmp_path, 'a\tb\tc\td\t3.800\t"Open\tNever closed\n')
    assert list(readers.read_similarity(path)) == [{"label": 3.8, "text": '"Open', "pair": "Never closed"}]


def test_valence_is_the_sign_and_drops_neutral_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "id\tsentiment\ttext\r\n1\t2.5\tgood\r\n2\t0\tmeh\r\n3\t-1\tbad\r\n")
    assert list(readers.read_valence(path)) == [
        {"label": "positive", "text": "good"},
        {"label": "negative", "text": "bad"},
    ]
