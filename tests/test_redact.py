"""`redact`: no secret comes through, and nothing else is touched."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftory.hub.redact import HIDDEN, redact

SECRET = "CANARYcanary0123456789"


@pytest.mark.parametrize(
    "text",
    [
        f"401 for token hf_{SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"authorization: basic {SECRET}==",
        f"https://user:{SECRET}@host/repo",
        f"https://{SECRET}@host/repo",
        f"GET https://host/key?X-Amz-Signature={SECRET}&X-Amz-Date=1",
        f"GET https://host/key?a=b&X-Amz-Credential={SECRET}%2F2026",
        f"https://host/blob?sv=1&sig={SECRET}",
        f"https://host/blob?token={SECRET}'",
    ],
)
def test_what_looks_like_a_secret_goes(text: str) -> None:
    assert SECRET not in redact(text)
    assert HIDDEN in redact(text)
    assert redact(redact(text)) == redact(text)


def test_an_access_key_goes() -> None:
    assert redact("key AKIAABCDEFGHIJKLMNOP is unknown") == "key *** is unknown"


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY"])
def test_the_secrets_of_the_environment_go(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "plain words")
    assert redact("it said: plain words!") == "it said: ***!"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "404: https://host/org/repo/resolve/main/adapter_config.json",
        "the basic idea",
        "bearer of news",
        "hf://org/repo@1",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redact(text) == text


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text(), st.text())
def test_wherever_it_stands(before: str, after: str) -> None:
    assert SECRET not in redact(f"{before} hf_{SECRET} {after}")
