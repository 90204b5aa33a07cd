"""Put on PYTHONPATH by `spryng run`: instruments a Python process when it first imports openai, and not before.

Every Python that the command starts runs this, also one of another version or without this package: it imports nothing
that is not there already, lets nothing escape, and leaves the sitecustomize that it hides as if it were not here.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _OpenAIFinder:
    """Finds `openai` as everybody else does, and instruments it as soon as it is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> "Any":
        if name != "openai":
            return None
        from importlib.util import find_spec

        _forget(self)  # also ends the recursion of find_spec
        spec = find_spec(name)
        loader: Any = getattr(spec, "loader", None)
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            sys.meta_path.insert(0, self)  # not installed here, or not yet
            return spec

        def exec_module(module: "Any") -> None:
            loader.__dict__.pop("exec_module", None)
            try:
                execute(module)
            except BaseException:
                sys.meta_path.insert(0, self)  # it may be imported again
                raise
            _instrument()

        try:
            loader.exec_module = exec_module
        except AttributeError:
            _say("the loader of openai cannot be watched")
        return spec


def _instrument() -> None:
    try:
        import spryng_instrument

        spryng_instrument.instrument()
    except ModuleNotFoundError as exc:
        _say(f"{exc}; install spryng-instrument where {sys.executable} finds it")
    except Exception as exc:
        _say(str(exc) or repr(exc))


def _say(problem: str) -> None:
    import os

    if sys.stderr is not None:
        sys.stderr.write(f"spryng run: OpenAI calls of process {os.getpid()} are not recorded: {problem}\n")


def _forget(finder: object) -> None:
    sys.meta_path[:] = [other for other in sys.meta_path if other is not finder]


def _run_hidden() -> None:
    """Run the sitecustomize that ours comes before, as Python would have."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = __file__.rpartition("/")[0]
    sys.path[:] = [folder for folder in sys.path if folder.rstrip("/") != here]
    spec = PathFinder.find_spec("sitecustomize")
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if "openai" in sys.modules:
    _instrument()
else:
    sys.meta_path.insert(0, _OpenAIFinder())
_run_hidden()
