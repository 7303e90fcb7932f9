"""The tables of sample tasks and models."""

import hashlib
import re
from collections import Counter

import pytest

from graftory.data import METRICS_OF_KIND, SAMPLE_MODELS, SAMPLE_TASKS, load_rows, load_task
from graftory.data.catalogue import by_row, in_test_part
from graftory.data.wheels import cache_folder
from graftory.errors import ConfigError, DataError

SMALL = ("trec", "trec-fine", "disaster", "rotten-tomatoes", "sms")
"""Their wheels are needed by other tests too; the others are read only if the cache has them."""
ROWS = {
    "trec": (5452, 500, 6),
    "trec-fine": (5452, 500, 47),
    "disaster": (7613, None, 2),
    "rotten-tomatoes": (8530, None, 2),
    "sms": (5572, None, 2),
    "banking77": (3080, None, 77),
    "20newsgroups": (11293, 7528, 20),
    "snli": (3000, None, 3),
    "stsb": (5749, 1379, 0),
    "boolq": (12697, None, 2),
    "valence-tweets": (4196, None, 2),
    "valence-amazon": (3610, None, 2),
    "valence-nyt": (4946, None, 2),
    "valence-movie": (10568, None, 2),
    "gsm8k": (7473, 1319, 0),
}
"""Rows as published: train and test, or all of them and None where the split is ours; labels."""


def test_every_row_of_the_tables_is_consistent() -> None:
    assert set(ROWS) == set(SAMPLE_TASKS)
    for name, task in SAMPLE_TASKS.items():
        assert set(task.files.values()) <= set(task.wheel.members), name
        assert (list(task.files) == ["all"]) == (task.split_of is not None), name
        assert task.metric in METRICS_OF_KIND[task.kind], name
        assert task.terms, name
    wheels = [task.wheel for task in SAMPLE_TASKS.values()] + [model.wheel for model in SAMPLE_MODELS.values()]
    for wheel in wheels:
        assert re.fullmatch("[0-9a-f]{64}", wheel.sha256), wheel.name


@pytest.mark.real
@pytest.mark.parametrize("name", SAMPLE_TASKS)
def test_rows_are_those_published(name: str) -> None:
    wheel = SAMPLE_TASKS[name].wheel
    folder = cache_folder() / "wheels" / f"{wheel.name}-{wheel.version}"
    if name not in SMALL and not (folder / wheel.members[0]).exists():
        pytest.skip(f"{wheel.requirement} is not in the cache")
    task = load_task(f"wheel:{name}")
    train, test = load_rows(task, "train"), load_rows(task, "test")
    first, second, labels = ROWS[name]
    if second is None:
        assert len(train) + len(test) == first
        assert 0.17 < len(test) / first < 0.24
        assert not set(train.texts) & set(test.texts)
    else:
        assert (len(train), len(test)) == (first, second)
    assert len(train.labels) == labels
    assert train.labels == test.labels
    if labels:
        assert set(train.targets) == set(range(labels))


@pytest.mark.real
def test_trec_has_its_published_classes() -> None:
    rows = load_rows(load_task("wheel:trec"), "test")
    counts = Counter(rows.labels[int(target)] for target in rows.targets)
    assert counts == {"description": 138, "number": 113, "entity": 94, "location": 81, "human": 65, "abbreviation": 9}


def test_hash_split_is_the_first_eight_bytes_of_sha256() -> None:
    texts = [f"text {number}" for number in range(2000)]
    expected = [text for text in texts if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < 0.2]
    assert [text for text in texts if in_test_part(text)] == expected
    assert 350 < len(expected) < 450


def test_row_split() -> None:
    assert [by_row(2)(row, {}) for row in range(4)] == ["train", "train", "test", "test"]


def test_unknown_sample_and_split() -> None:
    with pytest.raises(ConfigError, match=r"no sample task 'wheel:nope'; there are wheel:trec, "):
        load_task("wheel:nope")
    with pytest.raises(DataError, match="has no split 'validation'; it has train, test"):
        SAMPLE_TASKS["trec"].records("validation")
