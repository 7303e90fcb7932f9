"""`redact`: no secret comes through, and nothing else is touched."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftory.hub.redact import HIDDEN, hide_shapes, redact

SECRET = "CANARYcanary0123456789"
SIGNED = f"eyJhbGciOiJIUzI1NiJ9.eyJ{SECRET}.{SECRET}"
PEM = f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n{SECRET}\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize(
    "text",
    [
        f"401 for token hf_{SECRET}",
        f"401 for token%3Dhf_{SECRET}%26",
        f"hf_oauth_{SIGNED}",
        f"hf_jwt_{SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"authorization: basic {SECRET}==",
        f"{{'authorization': 'Bearer {SECRET}'}}",
        f'"Authorization": "{SECRET}", "x": 1',
        f"Authorization: AWS4-HMAC-SHA256 Credential={SECRET}/us, SignedHeaders=host, Signature={SECRET}",
        f"sent Bearer {SECRET}",
        f"cookie {SIGNED} is old",
        f"https://user:{SECRET}@host/repo",
        f"https://{SECRET}@host/repo",
        f"https://user:{SECRET}@{SECRET}@host/repo",
        f"s3://KEY:SEC/{SECRET}@bucket/prefix",
        f"GET https://host/key?X-Amz-Signature={SECRET}&X-Amz-Date=1",
        f"GET https://host/key?a=b&X-Amz-Credential={SECRET}%2F2026",
        f"GET https://host/key?a=b&X-Amz-Security-Token={SECRET}",
        f"x-amz-security-token: {SECRET}",
        f"https://host/key?X-Goog-Signature={SECRET}",
        f"https://host/blob?sv=1&sig={SECRET}",
        f"https://host/blob?a&amp;sig={SECRET}",
        f"https://host/blob?token={SECRET}'",
        f"https://host/blob?access_token={SECRET}",
        f"AccountName=a;AccountKey={SECRET}==;EndpointSuffix=x",
        f"the key {PEM} is wrong",
    ],
)
def test_what_looks_like_a_secret_goes(text: str) -> None:
    assert SECRET not in redact(text)
    assert HIDDEN in redact(text)
    assert redact(redact(text)) == redact(text)


def test_what_stands_around_it_stays() -> None:
    assert redact("key AKIAABCDEFGHIJKLMNOP is unknown") == "key *** is unknown"
    assert (
        redact(f"GET https://u:{SECRET}@host/a?sig={SECRET}&v=1 is 403") == "GET https://***@host/a?sig=***&v=1 is 403"
    )
    assert redact(f"before {PEM} after") == "before *** after"


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AZURE_STORAGE_KEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_SAS_TOKEN",
        "GOOGLE_API_KEY",
    ],
)
def test_the_secrets_of_the_environment_go(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "plain/words+here")
    assert redact("it said: plain/words+here!") == "it said: ***!"
    assert redact("?k=plain%2Fwords%2Bhere&v=1") == "?k=***&v=1"
    assert hide_shapes("it said: plain/words+here!") == "it said: plain/words+here!"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "short"),
        ("HF_TOKEN_PATH", "/home/me/.cache/token"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/home/me/.aws/credentials"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json"),
        ("TOKENIZERS_PARALLELISM", "whatever it is"),
    ],
)
def test_what_only_has_the_name_of_one_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"cannot read {value}") == f"cannot read {value}"


@pytest.mark.parametrize(
    "text",
    [
        "404: https://host/org/repo/resolve/main/adapter_config.json",
        "the basic idea",
        "bearer of news",
        "basic understanding",
        "hf://org/repo@1",
        "http://127.0.0.1:8080/api/models/org/repo@3",
        "hf_hub_download() got an unexpected keyword; see hf_raise_for_status",
        "pad_token=0, eos_token_id=2; tokens=12",
        "s3://bucket/prefix/name@1",
        "file:///srv/hub/org/name@sha256:0123456789abcdef",
        "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redact(text) == text


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text(), st.text())
def test_wherever_it_stands(before: str, after: str) -> None:
    assert SECRET not in redact(f"{before} hf_{SECRET} {after}")


PIECES = st.sampled_from(
    [
        *[
            "hf_",
            "Bearer",
            "Basic",
            "authorization",
            ":",
            "=",
            "://",
            "@",
            "/",
            "?",
            "&",
            ";",
            "sig=",
            "token=",
            "X-Amz-Signature=",
            "x",
            "AKIA",
            "eyJ",
            "'",
            '"',
            "*",
            "***",
        ],
        *f"hf_{SECRET} AKIAABCDEFGHIJKLMNOP {SIGNED} {SECRET} 80 -----BEGIN -----END accountkey= # < -".split(),
        *(" ", "\n", " PRIVATE KEY-----"),
    ]
)


@settings(max_examples=1500, derandomize=True, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_twice_is_once(text: str) -> None:
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "piece",
    ["hf_", "Bearer ", "Basic  ", "authorization:", "authorization", "://", "://a:", "://a:b://", "eyJ", "eyJ-", "sig=",
     "&sig=", "-----BEGIN PRIVATE KEY-----", "AKIA", "x-amz-signature", "Bearer aaaaaaaaaa", "&token", "a", " ", "@"],
)  # fmt: skip
def test_time_is_linear(piece: str) -> None:
    """A megabyte of what begins like a secret takes about ten times as long as a tenth of it."""
    seconds = []
    for size in (100_000, 1_000_000):
        text = piece * (size // len(piece))
        start = time.process_time()
        redact(text)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 40 * max(seconds[0], 0.01)


def test_a_token_of_letters_and_one_with_stars_go(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redact(f"sent Bearer {'abcdefgh' * 3}, got 401") == "sent Bearer ***, got 401"
    monkeypatch.setenv("HF_TOKEN", "p*ss*word")
    assert redact("p*ss*word is wrong") == "*** is wrong"
