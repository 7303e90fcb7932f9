"""Rows out of files of every format, and the errors that a wrong file gives."""

import csv
import hashlib
import json
from pathlib import Path

import pytest

from graftory.adapter import TaskInfo
from graftory.data import DataSource, Rows, TaskFile, load_rows
from graftory.errors import DataError

RECORDS = [
    {"sentence": "good, really", "other": "x", "class": "pos", "score": 4.5},
    {"sentence": "bad", "other": "y", "class": "neg", "score": 1.0},
    {"sentence": "None", "other": "z", "class": "pos", "score": 3.25},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it read below this folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def write(folder: Path, suffix: str, records: list[dict[str, object]]) -> str:
    import datasets

    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    elif suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def classification(data: DataSource, labels: tuple[str, ...] = ()) -> TaskFile:
    return TaskFile(name="mine", kind="classification", data=data, text="sentence", label="class", labels=labels)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    source = DataSource(train=write(tmp_path, suffix, RECORDS))
    rows = load_rows(classification(source), "train")
    assert rows == Rows("train", ("good, really", "bad", "None"), (1, 0, 1), ("neg", "pos"))


def test_pairs_and_numbers(tmp_path: Path) -> None:
    source = DataSource(train=write(tmp_path, ".jsonl", RECORDS))
    task = TaskFile(name="mine", kind="regression", data=source, text="sentence", pair="other", label="score")
    rows = load_rows(task, "train")
    assert rows.texts == (("good, really", "x"), ("bad", "y"), ("None", "z"))
    assert rows.targets == (4.5, 1.0, 3.25)
    assert rows.info(task) == TaskInfo("mine", "regression")


def test_text_targets(tmp_path: Path) -> None:
    source = DataSource(test=write(tmp_path, ".csv", RECORDS))
    task = TaskFile(name="mine", kind="causal_lm", data=source, text="sentence", target="other", template="Q {text}")
    rows = load_rows(task, "test")
    assert rows.targets == ("x", "y", "z")
    assert rows.info(task).template == "Q {text}"


def test_labels_of_the_test_split_are_those_of_the_training_split(tmp_path: Path) -> None:
    train = write(tmp_path, ".csv", RECORDS)
    test = write(tmp_path, ".jsonl", RECORDS[:1])
    assert load_rows(classification(DataSource(train=train, test=test)), "test").targets == (1,)


def test_named_labels_may_stand_in_the_data_as_numbers(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"sentence": "a", "class": 1}, {"sentence": "b", "class": 0}]
    task = classification(DataSource(train=write(tmp_path, ".csv", records)), ("neg", "pos"))
    assert load_rows(task, "train").targets == (1, 0)


def test_limit_is_seeded_nested_and_in_order(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"sentence": f"{i:03}", "class": i % 2} for i in range(200)]
    task = classification(DataSource(train=write(tmp_path, ".csv", records)))
    small, large = load_rows(task, "train", limit=20), load_rows(task, "train", limit=50)
    assert small.texts == load_rows(task, "train", limit=20).texts
    assert small.texts != load_rows(task, "train", limit=20, seed=1).texts
    assert set(small.texts) < set(large.texts)
    assert list(large.texts) == sorted(large.texts)
    assert small.labels == ("0", "1")


def test_holdout_divides_one_file(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"sentence": f"text {i}", "class": i % 2} for i in range(300)]
    task = classification(DataSource(train=write(tmp_path, ".csv", records), holdout=0.3))
    train, test = load_rows(task, "train"), load_rows(task, "test")
    assert {*train.texts, *test.texts} == {f"text {i}" for i in range(300)}
    assert len(train) + len(test) == 300
    assert 60 < len(test) < 120


def test_hash_is_over_the_canonical_rows() -> None:
    rows = Rows("train", (("a", "é"), ("b", "c")), (1, 0), ("n", "p"))
    text = '{"labels":["n","p"],"targets":[1,0],"texts":[["a","é"],["b","c"]]}'
    assert rows.hash == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"sentence": "a", "klass": "pos"}, r"has no column 'class'; it has sentence, klass; name one of these"),
        ({"sentence": None, "class": "pos"}, r"row 1 of train has no text"),
        ({"sentence": "a", "class": None}, r"row 1 of train has None in column 'class', wanted one of its labels"),
        (
            {"sentence": "a", "class": "maybe"},
            r"row 1 of train has 'maybe' in column 'class', wanted one of its labels",
        ),
    ],
)
def test_wrong_rows(tmp_path: Path, record: dict[str, object], message: str) -> None:
    source = DataSource(train=write(tmp_path, ".jsonl", [record]))
    with pytest.raises(DataError, match=message):
        load_rows(classification(source, ("neg", "pos")), "train")


def test_wrong_number(tmp_path: Path) -> None:
    source = DataSource(train=write(tmp_path, ".jsonl", [{"text": "a", "score": "high"}]))
    with pytest.raises(DataError, match=r"has 'high' in column 'score', wanted a number"):
        load_rows(TaskFile(name="mine", kind="regression", data=source, label="score"), "train")


def test_wrong_files(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"not parquet")
    cases = {
        str(broken): r"cannot read 'broken\.parquet' \(.*\); check the id",
        str(tmp_path / "none.csv"): r"no data file .*none\.csv'; paths are relative to the task's YAML",
        str(tmp_path / "rows.xlsx"): r"cannot read 'rows\.xlsx'; wanted \.csv, \.tsv",
    }
    for file, message in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            load_rows(classification(DataSource(train=file)), "train")
        assert "\n" not in str(caught.value)


def test_missing_split_and_limit(tmp_path: Path) -> None:
    task = classification(DataSource(train=write(tmp_path, ".csv", RECORDS)))
    with pytest.raises(DataError, match=r"has no 'test' split; it has train; add data\.test, or data\.holdout: 0\.2"):
        load_rows(task, "test")
    with pytest.raises(DataError, match="limit: got 0, wanted 1 or more"):
        load_rows(task, "train", limit=0)


def test_a_hub_data_set_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    task = classification(DataSource(dataset="graftory-tests/does-not-exist"))
    with pytest.raises(DataError, match=r"cannot read 'graftory-tests/does-not-exist'.*and the network"):
        load_rows(task, "train")


def test_class_labels_of_a_data_set_become_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "class": datasets.ClassLabel(names=["zeta", "alpha"])}
    )
    table = datasets.Dataset.from_dict({"sentence": ["a", "b"], "class": [0, 1]}, features=features)
    asked: dict[str, object] = {}

    def load(path: str, **arguments: object) -> object:
        asked.update(arguments, path=path)
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = DataSource(dataset="org/name", config="c", revision="main", train="training")
    assert load_rows(classification(source), "train") == Rows("train", ("a", "b"), (1, 0), ("alpha", "zeta"))
    assert asked == {"path": "org/name", "name": "c", "revision": "main", "split": "training"}


def test_the_words_of_a_text_task_are_checked_and_may_be_numbers(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"sentence": "a", "class": "1"}, {"sentence": "b", "class": "no"}]
    source = DataSource(train=write(tmp_path, ".jsonl", records))
    task = TaskFile(name="mine", kind="causal_lm", data=source, text="sentence", target="class", labels=("no", "yes"))
    rows = load_rows(task, "train")
    assert rows.targets == ("yes", "no")
    assert rows.labels == ()  # there is no head whose outputs they would name
    source = DataSource(train=write(tmp_path, ".jsonl", [{"sentence": "a", "class": "maybe"}]))
    with pytest.raises(DataError, match="row 1 of train has 'maybe' in column 'class', wanted one of its labels"):
        load_rows(
            TaskFile(name="mine", kind="causal_lm", data=source, text="sentence", target="class", labels=("a", "b")),
            "train",
        )


def test_the_first_rows_of_a_shuffle_are_those_that_are_drawn() -> None:
    rows = Rows("train", tuple("abcdefgh"), tuple(range(8)), ())
    shuffled = rows.shuffled(3)
    assert sorted(zip(shuffled.texts, shuffled.targets, strict=True)) == list(zip("abcdefgh", range(8), strict=True))
    assert shuffled.texts != rows.texts
    assert rows.shuffled(4).texts != shuffled.texts
    for count in range(1, 9):
        assert set(shuffled.texts[:count]) == set(rows.subsample(count, 3).texts)
