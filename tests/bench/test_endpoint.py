import pytest

from ossquant.bench.endpoint import find_endpoint, is_url
from ossquant.errors import UsageError


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1",
     "http://127.0.0.1:8000/v1/chat/completions"],
)  # fmt: skip
def test_the_base_is_found(url: str) -> None:
    """However much of the path is given, requests go to the same place."""
    endpoint = find_endpoint(url)
    assert (endpoint.base, endpoint.root) == ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000")
    assert endpoint.is_local
    assert endpoint.port == 8000


def test_a_path_before_v1_stays() -> None:
    """A server behind a prefix keeps it; ports follow the scheme."""
    endpoint = find_endpoint("https://models.example/gpt/v1")
    assert (endpoint.base, endpoint.port, endpoint.is_local) == ("https://models.example/gpt/v1", 443, False)


@pytest.mark.parametrize(
    "url", ["ftp://host", "http://", "http://host:99999", "http://[::1", "http://host?x=1", "http://user:secret@host"]
)
def test_other_urls_are_refused(url: str) -> None:
    """What is no URL of a server is a UsageError, and a password is not repeated."""
    with pytest.raises(UsageError) as caught:
        find_endpoint(url)
    assert "secret" not in str(caught.value)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is sent, and stands in no text of the endpoint; a variable without one is an error that names it."""
    monkeypatch.setenv("BENCH_KEY", "sk-secret")
    endpoint = find_endpoint("http://127.0.0.1:1", "BENCH_KEY")
    assert endpoint.headers["Authorization"] == "Bearer sk-secret"
    assert "secret" not in repr(endpoint)
    with pytest.raises(UsageError, match="BENCH_KEY_AWAY holds no key"):
        find_endpoint("http://127.0.0.1:1", "BENCH_KEY_AWAY")
    monkeypatch.setenv("BENCH_KEY", "two\nlines")
    with pytest.raises(UsageError) as caught:
        find_endpoint("http://127.0.0.1:1", "BENCH_KEY")
    assert "lines" not in str(caught.value)


def test_targets_with_a_scheme_are_urls() -> None:
    """A hub id and a folder are none."""
    assert is_url("http://127.0.0.1:8000")
    assert not is_url("openai/gpt-oss-20b")
    assert not is_url("./folder")
