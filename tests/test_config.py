"""Settings: precedence, and messages that say what to write instead."""

from pathlib import Path

import pytest

from bestroute.config import ConfigInvalid, Provider, Settings


def write(directory: Path, text: str) -> Path:
    file = directory / "bestroute.toml"
    file.write_text(text)
    return file


def test_flags_win_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(
        tmp_path, '[server]\nlisten = "file:1"\nmax_responses = 3\n[engine]\nthreads = 1\n'
    )
    monkeypatch.setenv("BESTROUTE_SERVER__LISTEN", "environment:2")
    monkeypatch.setenv("BESTROUTE_ENGINE__THREADS", "2")

    settings = Settings.load(file, {"engine": {"threads": 3}})

    assert settings.engine.threads == 3
    assert settings.server.listen == "environment:2"
    assert settings.server.max_responses == 3
    assert settings.batching == Settings().batching


def test_nothing_given_is_the_defaults() -> None:
    assert Settings.load() == Settings()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[server]\nlistn = "x"', '"server.listn" is not a setting; did you mean "listen"?'),
        ("[sever]", '"sever" is not a setting; did you mean "server"?'),
        ("[server]\nmax_responses = 0", "server.max_responses = 0: input should be greater"),
        ('[engine]\nprovider = "gpu"', "engine.provider = 'gpu': input should be 'cpu', 'cuda'"),
        (
            '[providers.a]\nbase_url = "http://x/v1"\nsample = 1',
            '"providers.a.sample" is not a setting; did you mean "samples"?',
        ),
        (
            '[models."m"]\nprovider = "a"\n[models."m".price]\ninput = 1',
            '"models.m.price.input" is not a setting; known: input_usd_per_mtok',
        ),
        ('[models."m"]\nprovider = "a"', 'there is no provider "a"; none is defined'),
        (
            '[providers.local]\nbase_url = "http://x/v1"\n[models."m"]\nprovider = "locl"',
            'there is no provider "locl"; did you mean "local"?',
        ),
        (
            '[providers.a]\nbase_url = "http://x/v1"\napi_key_env = "A"\napi_key_file = "b"',
            "set api_key_env or api_key_file, not both",
        ),
        ("[server", "is not a readable TOML file"),
        ("[server]\ndrain_delay = nan", "server.drain_delay"),
    ],
)
def test_a_fault_says_what_to_write_instead(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigInvalid) as fault:
        Settings.load(write(tmp_path, text))

    assert complaint in str(fault.value)


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid) as fault:
        Settings.load(write(tmp_path, "[server]\na = 1\nb = 2\n"))

    assert len(str(fault.value).splitlines()) == 2


def test_a_missing_file_says_where_to_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"does not exist; start from examples/bestroute\.toml"):
        Settings.load(tmp_path / "none.toml")


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_file_is_no_way_to_the_defaults(tmp_path: Path, text: str) -> None:
    """It is what a full disk leaves of settings."""
    with pytest.raises(ConfigInvalid, match=r"is empty; leave --config away"):
        Settings.load(write(tmp_path, text))


def test_a_wrong_variable_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESTROUTE_SERVER__LISTN", "x")

    with pytest.raises(ConfigInvalid, match=r'"server.listn" is not a setting'):
        Settings.load()


def test_keys_come_from_the_environment_or_a_file_and_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    monkeypatch.setenv("SOME_KEY", "s3cret")
    url = "http://localhost/v1"

    for provider in (
        Provider(base_url=url, api_key_env="SOME_KEY"),
        Provider(base_url=url, api_key_file=tmp_path / "key"),
    ):
        key = provider.api_key()
        assert key is not None
        assert key.get_secret_value() == "s3cret"
        assert "s3cret" not in repr((provider, key))
    assert Provider(base_url=url).api_key() is None


@pytest.mark.parametrize("content", [None, ""])
def test_a_missing_key_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "key").write_text(content)

    with pytest.raises(ConfigInvalid, match="NO_SUCH_KEY"):
        Provider(base_url="http://x/v1", api_key_env="NO_SUCH_KEY").api_key()
    with pytest.raises(ConfigInvalid, match="api_key_file"):
        Provider(base_url="http://x/v1", api_key_file=tmp_path / "key").api_key()
