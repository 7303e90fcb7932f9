"""The stand-in of the Hugging Face Hub against the plain client: a wrong stand-in would prove nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.loopback_hub import loopback_hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's own


@pytest.fixture(autouse=True)
def no_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)


def test_what_the_client_writes_it_reads_again(tmp_path: Path) -> None:
    with loopback_hub(token="hf_right") as server:
        api = HfApi(endpoint=server.url, token="hf_right")
        api.create_repo("me/a", private=True)
        api.create_repo("me/a", private=True, exist_ok=True)
        head = api.list_repo_refs("me/a").branches[0].target_commit
        adds = [CommitOperationAdd("a.json", b"{}"), CommitOperationAdd("b.safetensors", b"weights")]
        first = api.create_commit("me/a", adds, commit_message="one", parent_commit=head).oid
        api.create_tag("me/a", tag="v1", revision=first)
        api.create_commit("me/a", [CommitOperationDelete("a.json")], commit_message="two")
        assert set(api.list_repo_files("me/a", revision="v1")) == {".gitattributes", "a.json", "b.safetensors"}
        assert set(api.list_repo_files("me/a")) == {".gitattributes", "b.safetensors"}
        path = api.hf_hub_download("me/a", "b.safetensors", revision="v1", cache_dir=tmp_path)
        assert Path(path).read_bytes() == b"weights"
        assert api.model_info("me/a").private


def test_it_refuses_what_the_hub_refuses() -> None:
    with loopback_hub(token="hf_right") as server:
        api = HfApi(endpoint=server.url, token="hf_right")
        api.create_repo("me/a")
        head = api.list_repo_refs("me/a").branches[0].target_commit
        api.create_commit("me/a", [CommitOperationAdd("a", b"1")], commit_message="one", parent_commit=head)
        with pytest.raises(HfHubHTTPError) as stale:
            api.create_commit("me/a", [CommitOperationAdd("a", b"2")], commit_message="two", parent_commit=head)
        assert stale.value.response.status_code == 412
        api.create_tag("me/a", tag="v1")
        with pytest.raises(HfHubHTTPError) as taken:
            api.create_tag("me/a", tag="v1")
        assert taken.value.response.status_code == 409
        with pytest.raises(RevisionNotFoundError):
            api.model_info("me/a", revision="nowhere")
        with pytest.raises(EntryNotFoundError):
            api.hf_hub_download("me/a", "nothing")
        with pytest.raises(RepositoryNotFoundError):
            api.list_repo_refs("me/b")
        with pytest.raises(HfHubHTTPError):
            HfApi(endpoint=server.url, token="hf_wrong").create_repo("me/c")
