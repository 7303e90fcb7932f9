"""Signatures: what they cover, what is refused, and that anybody could check them by hand."""

from __future__ import annotations

import base64
import hashlib
import json
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from graftory.adapter import Parent
from graftory.errors import CorruptAdapterError, SignatureError
from graftory.hub import Hub
from graftory.hub.depot import Depot
from graftory.hub.keys import PrivateKey, PublicKey, create_key, load_private_key, load_public_key
from graftory.hub.records import Record
from graftory.hub.signing import PREFIX, check_signature, make_statement, seal, sign, verify_signed
from graftory.schema import canonical
from tests.hub_samples import bottleneck, lora

SECRET = "one correct horse"


@dataclass(frozen=True)
class Family:
    """`top` was composed of `mid`, which was merged from `low`; all in one hub, `top` signed."""

    depot: Depot
    key: PrivateKey
    top: Record
    mid: Record
    low: Record

    @property
    def signature(self) -> Path:
        return self.depot.folder / "signatures" / "team" / "top" / "1" / f"{self.key.public.id}.json"

    def record_path(self, record: Record) -> Path:
        return self.depot.records.path(record.name, record.version)

    def check(self) -> None:
        verify_signed(self.depot, self.top.ref, [self.key.public])


@pytest.fixture
def family(tmp_path: Path) -> Family:
    hub = Hub.create(tmp_path / "hub")
    low = hub.record(hub.put("low", bottleneck(1)))
    mid = hub.record(hub.put("mid", lora(2, (Parent("low@1", low.digest, "merged", 1.0),))))
    top = hub.record(hub.put("team/top", lora(3, (Parent("mid@1", mid.digest, "composed"),))))
    key = new_key(tmp_path)
    depot = Depot(hub.root)
    signed = sign(depot, "team/top", key)
    assert (signed.new, signed.ancestors, signed.missing) == (True, 2, ())
    return Family(depot, key, top, mid, low)


def new_key(folder: Path, name: str = "key") -> PrivateKey:
    create_key(folder / name)
    return load_private_key(folder / name)


def flip(path: Path, position: int = -2) -> None:
    """Change one bit of one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_the_raw_signature_is_that_of_rfc_8032() -> None:
    """Section 7.1, tests 1 to 3: seed, public key, message, signature."""
    vectors = [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        ),
        (
            "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
            "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
        ),
    ]
    for seed, public, message, signature in vectors:
        key = PrivateKey(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed)))
        assert key.public.raw.hex() == public
        assert key.sign(bytes.fromhex(message)).hex() == signature
        assert PublicKey(bytes.fromhex(public)).verifies(bytes.fromhex(signature), bytes.fromhex(message))
        assert not key.public.verifies(bytes.fromhex(signature), bytes.fromhex(message) + b"x")


def test_a_signed_family_is_right_and_signing_again_changes_nothing(family: Family) -> None:
    before = family.signature.read_bytes()
    checked = verify_signed(family.depot, "team/top", [family.key.public])
    assert (checked.ref, checked.ancestors, checked.missing) == ("team/top@1", 2, ())
    assert checked.key == family.key.public.id
    again = sign(family.depot, "team/top@1", family.key)
    assert not again.new
    assert family.signature.read_bytes() == before


def test_anybody_can_check_by_hand_what_the_documentation_says(family: Family, tmp_path: Path) -> None:
    """json, hashlib, base64 and cryptography alone, following docs/signing.md."""
    root = tmp_path / "hub"
    pem = (tmp_path / "key.pub").read_bytes()
    sealed = json.loads(next((root / ".hub/signatures/team/top/1").glob("*.json")).read_bytes())
    statement = sealed["statement"]
    message = json.dumps(statement, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    key: Any = load_pem_public_key(pem)
    key.verify(base64.b64decode(sealed["signature"]), b"graftory-signature-v1\n" + message)
    der = base64.b64decode("".join(pem.decode().splitlines()[1:-1]))
    assert statement["key"] == hashlib.sha256(der).hexdigest()
    assert (statement["format"], statement["schema"]) == ("graftory-signature", 1)
    everybody = [{"ref": "team/top@1", **statement}, *statement["ancestors"]]
    assert sorted(item["ref"] for item in everybody) == ["low@1", "mid@1", "team/top@1"]
    hashed = 0
    for item in everybody:
        name, _, version = item["ref"].partition("@")
        source = (root / f".hub/records/{name}/{version}.json").read_bytes()
        assert hashlib.sha256(source).hexdigest() == item["record"]
        record = json.loads(source)
        content = {"files": record["files"], "spec": record["spec"]}
        plain = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert f"sha256:{hashlib.sha256(plain).hexdigest()}" == item["digest"] == record["digest"]
        assert record["files"] == item["files"]
        for file in item["files"]:
            data = (root / ".hub/blobs/sha256" / file["sha256"][:2] / file["sha256"]).read_bytes()
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (file["sha256"], file["size"])
            hashed += 1
    assert hashed == 5


@pytest.mark.parametrize("who", ["top", "mid", "low"])
@pytest.mark.parametrize("position", [0, 100, -1])
def test_a_changed_byte_in_a_file_of_anyone_in_the_family_is_found(family: Family, who: str, position: int) -> None:
    record: Record = getattr(family, who)
    for entry in record.files:
        path = family.depot.blobs.path(entry.sha256)
        flip(path, position)
        with pytest.raises(CorruptAdapterError, match=f"@1 {entry.path}: "):
            family.check()
        flip(path, position)
        family.check()


@pytest.mark.parametrize("who", ["top", "mid", "low"])
def test_every_changed_byte_in_a_record_of_anyone_in_the_family_is_found(family: Family, who: str) -> None:
    path = family.record_path(getattr(family, who))
    size = path.stat().st_size
    for position in range(0, size, max(1, size // 150)):
        flip(path, position)
        with pytest.raises((CorruptAdapterError, SignatureError)):
            family.check()
        flip(path, position)
    family.check()


@pytest.mark.parametrize("who", ["top", "mid", "low"])
def test_a_record_whose_digest_still_fits_is_found_too(family: Family, who: str) -> None:
    """The time is in no digest; the record stays a good one, but is not the signed one."""
    record: Record = getattr(family, who)
    path = family.record_path(record)
    path.write_bytes(path.read_bytes().replace(record.created.encode(), b"2001-01-01T00:00:00+00:00"))
    assert family.depot.records.read(record.name, record.version).digest == record.digest
    with pytest.raises(SignatureError, match="team/top@1: "):
        family.check()


def test_another_good_adapter_in_the_place_of_an_ancestor_is_found(family: Family) -> None:
    forged = Record.new("low", 1, replace(family.low.spec, licence="none"), family.low.files, family.low.tensors)
    family.record_path(family.low).write_bytes(forged.source)
    with pytest.raises(SignatureError, match="ancestor low@1 is not the one that was signed"):
        family.check()


def test_every_changed_byte_of_the_signature_file_is_found(family: Family) -> None:
    for position in range(family.signature.stat().st_size):
        flip(family.signature, position)
        with pytest.raises(SignatureError):
            family.check()
        flip(family.signature, position)
    family.check()


Change = Callable[[dict[str, Any]], object]


def edited(data: bytes, change: Change) -> bytes:
    sealed = json.loads(data)
    change(sealed)
    return canonical(sealed) + b"\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("statement"),
        lambda s: s.pop("signature"),
        lambda s: s.update(signature="*" * 88),
        lambda s: s.update(signature=s["signature"].rstrip("=")),
        lambda s: s.update(signature=s["signature"][:40]),
        lambda s: s.update(signature=" " + s["signature"]),
        lambda s: s.update(signature="é"),
        lambda s: s.update(signature=7),
        lambda s: s.update(signature=None),
        lambda s: s.update(signature=[s["signature"]]),
        lambda s: s.update(extra=1),
        lambda s: s.update(statement=[]),
        lambda s: s["statement"].update(version=2),
        lambda s: s["statement"].update(signed="2001-01-01T00:00:00+00:00"),
        lambda s: s["statement"].update(ancestors=[]),
        lambda s: s["statement"]["files"][0].update(size=1),
        lambda s: s["statement"]["ancestors"][0].update(record=None),
    ],
)
def test_a_changed_statement_or_signature_is_refused(family: Family, change: Change) -> None:
    family.signature.write_bytes(edited(family.signature.read_bytes(), change))
    with pytest.raises(SignatureError, match=r"team/top@1: .*do not use it"):
        family.check()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"{" * 5000,
        b'{"signature":"","signature":""}',
        b'{"signature":"","statement":"\\ud800"}',
        b'{"signature":"","statement":NaN}',
        b'{"signature":"","statement":' + b"9" * 5000 + b"}",
        b" " * ((1 << 20) + 1),
    ],
    ids=range(11),
)
def test_what_is_no_signature_file_is_refused(family: Family, data: bytes) -> None:
    family.signature.write_bytes(data)
    with pytest.raises(SignatureError, match="its signature file is damaged"):
        family.check()


def test_other_bytes_of_the_same_statement_are_refused(family: Family) -> None:
    family.signature.write_bytes(json.dumps(json.loads(family.signature.read_bytes()), indent=1).encode())
    with pytest.raises(SignatureError, match="not written as it must be"):
        family.check()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"schema": 2},
        {"key": "0" * 64},
        {"name": "low"},
        {"version": 7},
        {"digest": "sha256:" + "0" * 64},
        {"record": "0" * 64},
        {"files": ()},
        {"ancestors": ()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_false_statement_is_refused_even_when_it_is_signed(family: Family, change: dict[str, Any]) -> None:
    honest = make_statement(family.depot, family.top, family.key.public.id)
    family.signature.write_bytes(seal(honest, family.key))
    family.check()
    family.signature.write_bytes(seal(replace(honest, **change), family.key))
    with pytest.raises(SignatureError, match="team/top@1: "):
        family.check()


@pytest.mark.parametrize("ref", ["../../low@1", "low", "low@0", "LOW@1", "low@1\n"])
def test_a_signed_statement_cannot_name_a_path(family: Family, ref: str) -> None:
    honest = make_statement(family.depot, family.top, family.key.public.id)
    ancestors = tuple(replace(item, ref=ref) for item in honest.ancestors)
    family.signature.write_bytes(seal(replace(honest, ancestors=ancestors), family.key))
    with pytest.raises(SignatureError, match="team/top@1: "):
        family.check()


def test_a_signature_for_another_version_or_name_is_refused(family: Family) -> None:
    hub = Hub.open(family.depot.root)
    second = hub.record(hub.put("team/top", lora(4)))
    twin = hub.record(hub.put("twin", hub.get("team/top@1")))
    assert twin.digest == family.top.digest
    for record in (second, twin):
        data = family.signature.read_bytes()
        family.depot.signatures.add(record.name, record.version, family.key.public.id, data)
        with pytest.raises(SignatureError, match=r"the signature is over team/top@1"):
            check_signature(family.depot, record, [family.key.public])


def test_another_key_does_not_count(family: Family, tmp_path: Path) -> None:
    other = new_key(tmp_path, "other")
    with pytest.raises(SignatureError, match="signatures of 1 other keys"):
        verify_signed(family.depot, "team/top", [other.public])
    with pytest.raises(SignatureError, match="it is not signed"):
        verify_signed(family.depot, "mid", [family.key.public])
    statement = make_statement(family.depot, family.top, family.key.public.id)
    family.signature.write_bytes(seal(statement, other))
    with pytest.raises(SignatureError, match="not of key"):
        verify_signed(family.depot, "team/top", [other.public, family.key.public])


def test_one_of_several_keys_is_enough_and_strangers_do_no_harm(family: Family, tmp_path: Path) -> None:
    other = new_key(tmp_path, "other")
    family.depot.signatures.add("team/top", 1, "f" * 64, b"rubbish")
    checked = verify_signed(family.depot, "team/top", [other.public, family.key.public])
    assert checked.key == family.key.public.id
    assert sign(family.depot, "team/top", other).new
    assert verify_signed(family.depot, "team/top", [other.public]).key == other.public.id


def test_a_missing_ancestor_is_named_and_one_that_is_needed_must_be_there(family: Family, tmp_path: Path) -> None:
    family.record_path(family.low).unlink()
    checked = verify_signed(family.depot, "team/top", [family.key.public])
    assert (checked.ancestors, checked.missing) == (1, ("low@1",))
    family.record_path(family.mid).unlink()
    with pytest.raises(SignatureError, match="mid@1, which it is composed of, is not here"):
        family.check()
    with pytest.raises(SignatureError, match="mid@1, which it is composed of, is not here"):
        sign(family.depot, "team/top", new_key(tmp_path, "other"))
    assert set(family.depot.signatures.of("team/top", 1)) == {family.key.public.id}


def test_what_was_signed_without_an_ancestor_stays_right_when_it_arrives(family: Family, tmp_path: Path) -> None:
    path, other = family.record_path(family.low), new_key(tmp_path, "other")
    data = path.read_bytes()
    path.unlink()
    assert sign(family.depot, "team/top", other).missing == ("low@1",)
    path.write_bytes(data)
    checked = verify_signed(family.depot, "team/top", [other.public])
    assert (checked.ancestors, checked.missing) == (2, ())
    flip(family.depot.blobs.path(family.low.files[0].sha256))
    with pytest.raises(CorruptAdapterError, match="low@1"):
        verify_signed(family.depot, "team/top", [other.public])


def test_nobody_signs_what_is_broken(family: Family, tmp_path: Path) -> None:
    other = new_key(tmp_path, "other")
    flip(family.depot.blobs.path(family.low.files[0].sha256))
    with pytest.raises(CorruptAdapterError, match="low@1"):
        sign(family.depot, "team/top", other)
    assert other.public.id not in family.depot.signatures.of("team/top", 1)


def test_a_signature_travels(family: Family, tmp_path: Path) -> None:
    address = (tmp_path / "remote").as_uri()
    Hub.open(family.depot.root).push("team/top@1", address)
    third = Hub.create(tmp_path / "third")
    third.pull(f"{address}/team/top@1")
    checked = verify_signed(Depot(third.root), "team/top", [family.key.public])
    assert (checked.ancestors, checked.missing) == (1, ("low@1",))


def test_the_private_key_is_for_its_owner_alone_and_never_overwritten(tmp_path: Path) -> None:
    key = create_key(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"key", "key.pub"}
    with pytest.raises(SignatureError, match="is there already"):
        create_key(tmp_path / "key")
    (tmp_path / "key").unlink()
    with pytest.raises(SignatureError, match=r"key\.pub: is there already"):
        create_key(tmp_path / "key")
    assert [path.name for path in tmp_path.iterdir()] == ["key.pub"]
    (tmp_path / "key").write_bytes(before["key"])
    assert load_private_key(tmp_path / "key").public == key == load_public_key(tmp_path / "key.pub")
    assert before["key"].decode()[30:50] not in repr(load_private_key(tmp_path / "key"))


def test_a_passphrase_encrypts_the_private_key(tmp_path: Path) -> None:
    key = create_key(tmp_path / "key", SECRET.encode())
    assert load_private_key(tmp_path / "key", SECRET.encode()).public == key
    with pytest.raises(TypeError):
        load_pem_private_key((tmp_path / "key").read_bytes(), None)
    for passphrase in (None, b"", b"wrong"):
        with pytest.raises(SignatureError, match="passphrase") as caught:
            load_private_key(tmp_path / "key", passphrase)
        assert "wrong" not in str(caught.value).replace("wrong passphrase", "")
    create_key(tmp_path / "plain")
    assert load_private_key(tmp_path / "plain", b"not needed").public


@pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for load in (load_public_key, load_private_key):
        with pytest.raises(SignatureError, match="file: not a p"):
            load(path)


def test_other_wrong_keys_are_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    create_key(tmp_path / "key")
    with pytest.raises(SignatureError, match=r"is a private key; give the public one, key\.pub"):
        load_public_key(tmp_path / "key")
    with pytest.raises(SignatureError, match="not a private key"):
        load_private_key(tmp_path / "key.pub")
    with pytest.raises(SignatureError, match="no key to read"):
        load_public_key(tmp_path / "none.pub")
    (tmp_path / "giant").write_bytes(b"x" * (1 << 17))
    with pytest.raises(SignatureError, match="larger than any key"):
        load_public_key(tmp_path / "giant")
    other = X25519PrivateKey.generate()
    pkcs8 = other.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    spki = other.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "x").write_bytes(pkcs8)
    (tmp_path / "x.pub").write_bytes(spki)
    with pytest.raises(SignatureError, match="of another kind"):
        load_private_key(tmp_path / "x")
    with pytest.raises(SignatureError, match="of another kind"):
        load_public_key(tmp_path / "x.pub")


def test_the_prefix_keeps_signatures_apart(family: Family) -> None:
    sealed = json.loads(family.signature.read_bytes())
    signature, message = base64.b64decode(sealed["signature"]), canonical(sealed["statement"])
    assert family.key.public.verifies(signature, PREFIX + message)
    assert not family.key.public.verifies(signature, message)
