"""Random headers, JSON, names, logs and configurations: readers give a value or a typed error, never anything else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from graftory.adapter import AdapterRef, check_name
from graftory.errors import GraftoryError, InvalidNameError
from graftory.hub import strict_json
from graftory.hub.aliases import AliasMove, AliasStore
from graftory.hub.codecs.peft_config import read_config
from graftory.hub.index import read_index
from graftory.hub.named import check_address
from graftory.hub.records import record_from_bytes
from graftory.hub.redact import redact
from graftory.hub.remotes.addresses import open_remote
from graftory.hub.safetensors_header import ITEM_BYTES, read_header

quick = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
WORDS = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=6)
PATHS = st.lists(WORDS, min_size=1, max_size=3).map(".".join).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)


def tolerant(act: Callable[[], Any]) -> Any:
    """What `act` gives; None if it refuses in one line of our own."""
    try:
        return act()
    except GraftoryError as error:
        said = str(error)
    assert len(said) < 2000
    said.encode()
    return None


@quick
@given(st.dictionaries(PATHS, st.tuples(st.sampled_from(list(TYPES)), SHAPES), min_size=1, max_size=5), st.booleans())
def test_what_safetensors_writes_is_read_as_it_reads_it(kinds: dict[str, Any], metadata: bool) -> None:
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in kinds.items()}
    data = save(tensors, {"format": "pt"} if metadata else None)
    found = {entry.name: (entry.dtype, entry.shape, entry.end - entry.begin) for entry in read_header(data, "x")}
    assert found == {name: (TYPES[value.dtype], tuple(value.shape), value.nbytes) for name, value in tensors.items()}


@quick
@given(st.data())
def test_what_is_read_of_a_damaged_file_is_what_safetensors_reads(data: st.DataObject) -> None:
    """A file that we accept is one that the library accepts, with the same tensors in the same places."""
    whole = save({"a.b": torch.arange(6.0).reshape(2, 3), "c": torch.ones(4, dtype=torch.float16)})
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "remove"]))
        if kind == "set":
            damaged[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        else:
            del damaged[at : None if kind == "cut" else at + 1]
        if not damaged:
            break
    check_against_library(bytes(damaged))


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_BYTES, "F31", "f32", ""]) | VALUES,
        "shape": SHAPES | st.lists(st.integers(-2, 2**64), max_size=9) | VALUES,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | VALUES,
    }
)


@quick
@given(
    st.dictionaries(PATHS | st.text(max_size=8), ENTRIES | VALUES, max_size=4),
    st.binary(max_size=64),
    st.integers(-9, 9),
)
def test_any_header(header: dict[str, Any], body: bytes, lie: int) -> None:
    text = json.dumps(header).encode()
    check_against_library(struct.pack("<Q", max(0, len(text) + (lie if abs(lie) == 9 else 0))) + text + body)


@quick
@given(st.dictionaries(PATHS, SHAPES, min_size=1, max_size=4), st.integers(-2, 2))
def test_headers_that_nearly_fit(shapes: dict[str, list[int]], off: int) -> None:
    """Offsets that follow one another, the last of them wrong by a little."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(max(0, end + off))
    assert (check_against_library(data) is not None) == (off == 0 or (end == 0 and off < 0))


def check_against_library(data: bytes) -> object:
    entries = tolerant(lambda: read_header(data, "x"))
    if entries is None:
        return None
    try:
        theirs = load(data)
    except (SafetensorError, KeyError) as error:
        if {entry.dtype for entry in entries} <= set(TYPES.values()):
            raise AssertionError(f"accepted, but the library says {error}") from None
        return entries  # a type that this reader of torch tensors does not know
    assert {entry.name: entry.shape for entry in entries} == {
        name: tuple(value.shape) for name, value in theirs.items()
    }
    for entry in entries:
        stored = theirs[entry.name].contiguous().view(-1).view(torch.uint8) if theirs[entry.name].numel() else None
        if stored is not None:
            assert data[entry.begin : entry.end] == stored.numpy().tobytes()
    return entries


@quick
@given(VALUES)
def test_json_that_is_accepted_means_what_json_says(value: Any) -> None:
    text = json.dumps(value)
    found = tolerant(lambda: (strict_json.loads(text.encode(), "x"),))
    if found is not None:
        assert json.dumps(found[0]) == text
        assert "NaN" not in text or isinstance(value, str | dict | list)


@quick
@given(
    st.text(st.sampled_from('{}[]",:\\ue0x19-.tfn \n\x00é'), max_size=60)
    | st.binary(max_size=60).map(lambda b: b.decode("latin1"))
)
def test_any_text_as_json(text: str) -> None:
    found = tolerant(lambda: (strict_json.loads(text.encode(), "x"),))
    if found is not None:
        assert found[0] == json.loads(text)


LETTERS = st.sampled_from("abzAZ09._-/@:~%\\ \n\0é\u202e*?") | st.characters()
NAMES = st.text(LETTERS, max_size=12) | st.text(st.sampled_from("ab.-_/09"), max_size=10)


@quick
@given(NAMES)
def test_a_name_that_is_accepted_is_a_path_below_its_folder(name: str) -> None:
    try:
        check_name(name)
    except InvalidNameError:
        return
    home = Path("/hub/records")
    path = home / name / "1.json"
    assert path.resolve().is_relative_to(home.resolve())
    assert name.isascii()
    assert name == name.lower().strip()
    assert len(path.relative_to(home).parts) == name.count("/") + 2 <= 3


@quick
@given(NAMES | st.builds("{}{}{}".format, NAMES, st.sampled_from("@:"), NAMES | st.integers().map(str)))
def test_a_reference_is_what_it_prints(text: str) -> None:
    ref = tolerant(lambda: AdapterRef.parse(text))
    if ref is not None:
        assert AdapterRef.parse(str(ref)) == ref
        assert str(ref) == text


SCHEMES = st.sampled_from(["file://", "hf://", "s3://", "gs://", "memory://", "x://", "://", ""])


@quick
@example("file://\ud800")
@example("file:///\x1b[2J")
@given(st.builds("{}{}".format, SCHEMES, st.text(LETTERS, max_size=20)))
def test_addresses(address: str) -> None:
    """None is asked over the network: they are only looked at."""
    tolerant(lambda: check_address(address))
    if address.startswith(("file://", "x://", "://")):
        tolerant(lambda: open_remote(address))
    assert redact(redact(address)) == redact(address)


LOG = st.dictionaries(st.sampled_from(["alias", "at", "version", "x"]), VALUES | WORDS | st.integers(0, 3), max_size=4)


@quick
@given(lines=st.lists(LOG | VALUES, max_size=3), tail=st.binary(max_size=5))
def test_logs_of_aliases(lines: list[Any], tail: bytes, tmp_path: Path) -> None:
    store = AliasStore(tmp_path)
    store.append("trec", AliasMove("prod", 1, ""))
    path = next(tmp_path.rglob("trec.jsonl"))
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + tail)
    found = tolerant(lambda: store.current("trec"))
    for alias, version in (found or {}).items():
        AdapterRef("trec", alias=alias)
        AdapterRef("trec", version=version)


GOOD_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}
KEYS = st.sampled_from(
    ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "task_type", "bias"]
)


@quick
@given(st.dictionaries(KEYS | st.text(max_size=6), VALUES, max_size=4))
def test_configurations_of_peft(changes: dict[str, Any]) -> None:
    found = tolerant(lambda: read_config(GOOD_CONFIG | changes, "adapter_config.json"))
    if found is not None and not changes:
        assert found.rank == 4


@quick
@given(data=st.data())
def test_records_and_indexes_with_changed_values(
    data: st.DataObject, good: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """Any value anywhere replaced by any other."""
    which = data.draw(st.integers(0, 1))
    value = json.loads(good[which])
    holder: Any = value
    while True:
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))))
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            holder[key] = data.draw(VALUES)
            break
        holder = inner
    text = json.dumps(value).encode()
    if which:
        (tmp_path / "registry.json").write_bytes(text)
        tolerant(lambda: read_index(tmp_path / "registry.json"))
    else:
        found = tolerant(lambda: record_from_bytes(text, "record"))
        if found is not None:
            assert found.digest == json.loads(good[0])["digest"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A record and an index."""
    from graftory.hub import Hub
    from tests.hub_samples import lora

    hub = Hub.create(tmp_path_factory.mktemp("good"))
    hub.put("trec", lora())
    return (hub.root / ".hub/records/trec/1.json").read_bytes(), (hub.root / "registry.json").read_bytes()
