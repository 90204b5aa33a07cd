"""The errors of the package, one small tree.

    SpryngError
    ├── SettingsError              an argument of instrument() or a SPRYNG_ variable cannot be used
    │   └── MissingExtraError      the optional dependency that it needs is not installed
    ├── NotInstrumentedError       track_usage() or flush() before instrument()
    ├── MissingKeyError            no customer's key, where one is required
    ├── UsageError                 a usage that cannot be: negative, no integer, a total that does not add up
    ├── ApiError                   a message sent to the Track Usage API that cannot be taken
    ├── QueryError                 a report that cannot be made: an unknown --by, an impossible date or zone
    └── StoreError                 the destination does not take messages; they wait in the journal
        ├── StoreBusyError         locked by another process for too long
        ├── StoreNotOursError      corrupt, or somebody else's file
        └── SchemaTooNewError      written by a newer spryng_instrument than this one

None of them is ever raised into an OpenAI call, except MissingKeyError when on_missing_key="raise" asked for it,
and then before the request is sent.
"""


class SpryngError(Exception):
    """The base of every error of this package."""


class SettingsError(SpryngError, ValueError):
    """An argument of instrument(), or its environment variable, cannot be used."""


class MissingExtraError(SettingsError):
    """An optional dependency is not installed. The message holds the pip line that installs it."""

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs the extra [{extra}]: pip install 'spryng-instrument[{extra}]'")


class NotInstrumentedError(SpryngError, RuntimeError):
    """Something was to be recorded before instrument() said where to."""


class MissingKeyError(SpryngError, ValueError):
    """A call has no customer's key and on_missing_key="raise", or track_usage() was given none."""


class UsageError(SpryngError, ValueError):
    """A usage handed to track_usage() cannot be true. The message names the field and its value."""


class ApiError(SpryngError, ValueError):
    """A message that was sent to the server cannot be taken. The text names the field, its value and what is wrong."""

    def __init__(self, field: str, value: object, problem: str) -> None:
        self.field = field
        shown = "" if value is None else f"={value!r:.100}"
        super().__init__(f"{field}{shown} {problem}")


class QueryError(SpryngError, ValueError):
    """A report was asked for that cannot be made. The message names the value and what is allowed."""


class StoreError(SpryngError):
    """The destination does not take messages now. Nothing is lost: they wait in the journal."""

    def __init__(self, text: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s
        """For how long the destination asked to be left alone. None: it did not."""


class StoreBusyError(StoreError):
    """Another process held the destination locked for too long."""


class StoreNotOursError(StoreError):
    """The destination is corrupt, or a file that something else made."""


class SchemaTooNewError(StoreError):
    """The ledger was written by a newer version of this package."""
