"""Which parts of a value are secrets, and which only look like one."""

import pytest

from hyperscale.config.secrets import is_masked, with_quoted_credentials, without_credentials


@pytest.mark.parametrize(
    ("secret", "shown"),
    [
        ("postgresql://someone:hunter2@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("postgresql://user:p@ss/word@host/db", "postgresql://***@host/db"),
        ("postgresql://user:12/34@host/db", "postgresql://***@host/db"),
        ("mysql+pymysql://user:p?#s@host/db", "mysql+pymysql://***@host/db"),
        ("http://user:pass/word@host:5000", "http://***@host:5000"),
        ("https://token-alone@host/path", "https://***@host/path"),
        ("http://host/api?token=abc&run=1", "http://host/api?token=***&run=1"),
        ("postgresql://host/db?user=me&password=a@b", "postgresql://host/db?user=me&password=***"),
        ("https://host/file?X-Amz-Signature=abc&part=1", "https://host/file?X-Amz-Signature=***&part=1"),
        ("no answer from 'http://a:b/c@h:1/x' (http://a:b@h)", "no answer from 'http://***@h:1/x' (http://***@h)"),
        ("postgresql://user:${PASSWORD}word@host/db", "postgresql://***@host/db"),
    ],
)
def test_the_secrets_of_a_uri_are_masked(secret: str, shown: str) -> None:
    assert without_credentials(secret) == shown
    assert without_credentials(shown) == shown
    assert is_masked(shown)


@pytest.mark.parametrize(
    "text",
    [
        "user@host",
        "s3://bucket/runs@2026/demo",
        "hdfs://namenode:8020/user@corp/runs",
        "http://[::1]:5000/path@v2",
        "abfs://container@account.dfs.core.windows.net/runs",
        "sqlite:////data/a@b/mlflow.db",
        "http://host:5000/?max_tokens=5",
        "postgresql://mlflow:${MLFLOW_PASSWORD}@db/mlflow",
        "postgresql://${LOGIN}@db/mlflow",
    ],
)
def test_text_that_only_looks_like_a_secret_is_unchanged(text: str) -> None:
    assert without_credentials(text) == text
    assert not is_masked(text)


def test_nested_values_and_secret_keys_are_masked() -> None:
    recipe = {
        "tracking": {"places": ["http://a:b@h", "user@host", 3, ("http://c:d@h",)], "api_key": "k", "password": None},
        "storage": {"aws_secret": "k", "db_password": "${DB_PASSWORD}", "max_new_tokens": 8, "pad_token": "x"},
    }
    assert without_credentials(recipe) == {
        "tracking": {"places": ["http://***@h", "user@host", 3, ["http://***@h"]], "api_key": "***", "password": None},
        "storage": {"aws_secret": "***", "db_password": "${DB_PASSWORD}", "max_new_tokens": 8, "pad_token": "x"},
    }


@pytest.mark.parametrize(
    ("uri", "quoted"),
    [
        ("http://user:p@ss/w0rd@host:5000", "http://user:p%40ss%2Fw0rd@host:5000"),
        ("http://user:p%40ss%2Fw0rd@host:5000", "http://user:p%40ss%2Fw0rd@host:5000"),
        ("postgresql://user:a#b?c@host/db?user=x", "postgresql://user:a%23b%3Fc@host/db?user=x"),
        ("http://host:5000/path@v2", "http://host:5000/path@v2"),
        ("sqlite:////data/a@b/mlflow.db", "sqlite:////data/a@b/mlflow.db"),
    ],
)
def test_clients_find_the_host_after_any_password(uri: str, quoted: str) -> None:
    assert with_quoted_credentials(uri) == quoted
