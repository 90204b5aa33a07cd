"""What the programmer got wrong is said at start-up, with the value and what to do."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import spryng_instrument
from spryng_instrument.errors import NotInstrumentedError, SettingsError
from spryng_instrument.settings import TABLE, Settings, differences, env_name, resolve, without_secrets


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"destination": "mysql://x/y"}, "destination='mysql://x/y': unknown destination scheme 'mysql'"),
        ({"destination": "usage.db"}, "unknown destination scheme 'usage.db'"),
        ({"destination": ""}, "must be a string that is not empty"),
        ({"destination": 7}, "not int"),
        ({"destination": "sqlite://usage.db"}, "three slashes or four: sqlite:///usage.db"),
        ({"destination": "sqlite:///"}, "name a file"),
        ({"destination": "sqlite:///:memory:"}, "a ledger in memory would be lost"),
        ({"destination": "sqlite:///a.db?mode=ro"}, "takes no parameters; remove '?mode=ro'"),
        ({"destination": "https:///path"}, "name the host, as in https://usage.example.com"),
        ({"destination": "https://h:port/"}, "Port could not be cast"),
        ({"destination": "clickhouse://"}, "name the host, as in clickhouse://user:password@host:8123/database"),
        ({"destination": "https://key@h/"}, "put no key into the URL"),
        ({"destination": "https://h/#x"}, "remove '#x'"),
        ({"destination": "redis://me:secret@h/"}, "destination='redis://me:***@h/': unknown destination scheme"),
        ({"api_key": ""}, "api_key='': must be a string that is not empty"),
        ({"journal": ""}, "journal='': must be a string"),
        ({"default_key": ""}, "default_key=''"),
        ({"on_missing_key": "explode"}, "must be one of 'warn', 'ignore', 'raise'"),
        ({"capture_query": "yes"}, "capture_query='yes': must be True or False"),
        ({"include_usage_hosts": "api.example.com"}, "must be a sequence of host names"),
        ({"include_usage_hosts": ["https://x/y"]}, "'https://x/y' is no host name"),
        ({"beat_s": -1}, "beat_s=-1: must be seconds between 0 and 3600"),
        ({"exit_timeout_s": "2"}, "must be seconds"),
        ({"memory_limit": 1.5}, "must be a whole number"),
        ({"budgets": ""}, "budgets='': must be a string"),
        ({"on_budget": "explode"}, "must be one of 'raise', 'warn', or a plain function"),
        ({"tenant": "x"}, "no setting 'tenant'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_impossible_setting_is_refused(arguments: dict[str, Any], said: str) -> None:
    """Each argument that cannot be used raises, and names itself, its value and what is allowed."""
    with pytest.raises(SettingsError) as error:
        resolve(arguments, {})
    assert said in str(error.value)


def test_on_budget_is_a_plain_function() -> None:
    """A coroutine function would be called and never awaited: it is refused."""

    async def never(reached: object) -> None: ...

    assert resolve({"on_budget": print}, {}).on_budget is print
    with pytest.raises(SettingsError, match="or a plain function"):
        resolve({"on_budget": never}, {})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("capture_query", "1", True),
        ("capture_query", "off", False),
        ("include_usage_hosts", "a.example, B.example:8000", ("a.example", "b.example:8000")),
        ("beat_s", "0.5", 0.5),
        ("memory_limit", "10", 10),
        ("default_key", "acme", "acme"),
        ("on_missing_key", "raise", "raise"),
        ("budgets", "/etc/budgets.toml", "/etc/budgets.toml"),
        ("on_budget", "warn", "warn"),
    ],
)
def test_every_setting_is_an_environment_variable(name: str, text: str, value: Any) -> None:
    """SPRYNG_<NAME> sets what no argument sets."""
    assert getattr(resolve({}, {env_name(name): text}), name) == value


@pytest.mark.parametrize(("name", "text"), [("capture_query", "perhaps"), ("beat_s", "soon"), ("memory_limit", "x")])
def test_an_impossible_variable_is_refused(name: str, text: str) -> None:
    """The error names the variable, not an argument that nobody gave."""
    with pytest.raises(SettingsError, match=f"{env_name(name)}={text!r}"):
        resolve({}, {env_name(name): text})


def test_the_argument_wins() -> None:
    """An argument wins over its variable, and that over the default."""
    environ = {"SPRYNG_DEFAULT_KEY": "from-env", "SPRYNG_BEAT_S": "1"}
    settings = resolve({"default_key": "from-argument"}, environ)
    assert (settings.default_key, settings.beat_s, settings.exit_timeout_s) == ("from-argument", 1.0, 2.0)


def test_paths_stay_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative ledger is found from where instrument() ran, whatever folder the application goes to later."""
    monkeypatch.chdir(tmp_path)
    settings = resolve({}, {})
    assert settings.destination == f"sqlite:///{tmp_path}/.spryng/usage.db"
    assert settings.journal == f"{tmp_path}/.spryng/usage.db.journal"
    assert resolve({"destination": settings.destination}, {}).destination == settings.destination


def test_each_destination_has_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for one destination is never delivered to another; a new password finds what waits."""
    monkeypatch.chdir(tmp_path)

    def journal(url: str) -> str:
        return resolve({"destination": url}, {}).journal

    old, new = journal("postgresql://me:old@db/usage"), journal("postgres://me:new@db/usage?sslmode=require")
    assert old == new
    assert old.startswith(f"{tmp_path}/.spryng/db-")
    assert old.endswith(".journal")
    urls = ["postgresql://db/usage", "postgresql://db/other", "https://db/usage", "https://db:8443/usage"]
    assert len({journal(url) for url in urls}) == 4


def test_no_secret_is_shown() -> None:
    """Neither the log of a second instrument() nor a setting's text has a password or a key in it."""
    one = resolve({"destination": "postgresql://me:secret@db/usage?password=secret", "api_key": "secret"}, {})
    other = resolve({"destination": "postgresql://me:other@db/usage2", "api_key": "another"}, {})
    said = " ".join(differences(one, other))
    assert "secret" not in said
    assert "other" not in said.replace("another", "")
    assert "postgresql://me@db/usage" in said
    assert "(hidden) (kept)" in said
    assert "secret" not in without_secrets(one.destination)


def test_one_table_of_settings() -> None:
    """instrument()'s arguments, the table and the fields of Settings are the same names, in one order."""
    assert list(inspect.signature(spryng_instrument.instrument).parameters) == list(TABLE)
    assert list(Settings.__dataclass_fields__) == list(TABLE)


def test_a_journal_that_cannot_be_written(tmp_path: Path) -> None:
    """instrument() raises for it, names the folder, and leaves the SDK alone."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"journal='.*file/journal' cannot be written: .*SPRYNG_JOURNAL"):
        spryng_instrument.instrument(destination=f"sqlite:///{tmp_path}/u.db", journal=tmp_path / "file" / "journal")


def test_instrument_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second call changes nothing and says nothing; with other arguments it says which, and keeps the first."""
    url = f"sqlite:///{tmp_path}/u.db"
    spryng_instrument.instrument(destination=url, default_key="acme")
    spryng_instrument.instrument()
    spryng_instrument.instrument(destination=url)
    assert not caplog.records
    spryng_instrument.instrument(default_key="other", beat_s=3)
    [record] = caplog.records
    assert "default_key: 'acme' (kept), not 'other'" in record.message
    assert "beat_s: 0.5 (kept), not 3.0" in record.message
    assert "destination" not in record.message
    assert spryng_instrument.track_usage(usage={"input_tokens": 1})
    spryng_instrument.uninstrument()
    with pytest.raises(NotInstrumentedError, match="before instrument"):
        spryng_instrument.track_usage(key="acme")
