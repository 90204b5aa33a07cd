"""The errors of the package, one small tree.

    SpryngError
    ├── SettingsError              an argument of instrument() or a SPRYNG_ variable cannot be used
    │   └── MissingExtraError      the optional dependency that it needs is not installed
    ├── NotInstrumentedError       track_usage() or flush() before instrument()
    ├── MissingKeyError            no customer's key, where one is required
    ├── BudgetExceeded             a hard budget has no room for a call
    ├── UsageError                 a usage that cannot be: negative, no integer, a total that does not add up
    ├── ApiError                   a message sent to the Track Usage API that cannot be taken
    ├── QueryError                 a report that cannot be made: an unknown --by, an impossible date or zone
    ├── PlanError                  a rate plan that cannot be, or a file of plans that is not there
    ├── BillError                  a bill that cannot be closed, or a correction that cannot be made
    ├── OrganizationError          OpenAI does not tell its own usage and costs, to reconcile with
    └── StoreError                 the destination does not take messages; they wait in the journal
        ├── StoreBusyError         locked by another process for too long
        ├── StoreNotOursError      corrupt, or somebody else's file
        └── SchemaTooNewError      written by a newer spryng_instrument than this one

None of them is ever raised into an OpenAI call, except MissingKeyError when on_missing_key="raise" asked for it and
BudgetExceeded when a budget with hard = true did, and then before the request is sent.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from spryng_instrument.spending import BudgetReached


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


class BudgetExceeded(SpryngError):
    """A hard budget has no room for a call, which was not sent. *reached* has the figures."""

    def __init__(self, reached: BudgetReached) -> None:
        super().__init__(reached)
        self.reached = reached

    def __str__(self) -> str:
        return f"{self.reached}. The call was not sent."


class Refusal(Exception):
    """Not of the tree, and never seen outside: carries what a call is to raise past what keeps our own bugs from it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class UsageError(SpryngError, ValueError):
    """A usage handed to track_usage() cannot be true. The message names the field and its value."""


class ApiError(SpryngError, ValueError):
    """A message that was sent to the server cannot be taken. The text names the field, its value and what is wrong."""

    def __init__(self, field: str, value: object, problem: str) -> None:
        self.field = field
        shown = "" if value is None else f"={value!r:.100}"
        super().__init__(f"{field}{shown} {problem}")


class NewerError(ApiError):
    """A message has a field that this version does not know. To leave that out would make another message of it."""


class QueryError(SpryngError, ValueError):
    """A report was asked for that cannot be made. The message names the value and what is allowed."""


class PlanError(SpryngError, ValueError):
    """A rate plan cannot be, or its file is not there. The message names the file, the place and the value."""


class BillError(SpryngError):
    """A bill cannot be closed, or a correction cannot be made. Nothing was changed."""


class OrganizationError(SpryngError):
    """OpenAI's own usage and costs cannot be had. The message says what it answered and what to do."""


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
