"""absl flags from the config's fields, and the exit codes of every program."""

import dataclasses
import functools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TextIO

import jax
from absl import app, flags, logging

from experiments import help
from experiments.recipes import RECIPES
from ssa_jax.errors import ConfigError, DataError, NotFiniteError
from ssa_jax.export import ExportError
from ssa_jax.networks.factorize import LeftDense
from ssa_jax.parallel import processes
from ssa_jax.parallel.interrupt import Terminated
from ssa_jax.runs.config import Config
from ssa_jax.runs.workdir import WorkdirError
from ssa_jax.training.checkpoint import CheckpointError
from ssa_jax.transforms.selection import NothingToActOn

EXIT_USAGE = 2
EXIT_NOT_FINITE = 3
EXIT_INTERRUPTED = 130


class _Path(flags.ArgumentParser[str]):
    """A path, whose ``~`` no shell expands behind an equals sign."""

    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)


def define_path(name: str, help: str) -> None:
    """Defines a flag that takes a path, by default None."""
    flags.DEFINE(_Path(), name, None, help)


def define(defaults: Mapping[str, Any]) -> None:
    """Defines one absl flag a config field, with the field's default (or the one in `defaults`)."""
    for field in dataclasses.fields(Config):
        default = defaults.get(field.name, field.default)
        text = field.metadata["help"]
        if isinstance(field.default, bool):
            flags.DEFINE_boolean(field.name, default, text)
        elif field.type in (int, int | None):
            flags.DEFINE_integer(field.name, default, text)
        elif isinstance(field.default, float):
            flags.DEFINE_float(field.name, default, text)
        else:
            # Choices are checked with the rest of the config, in the same words.
            choices = field.metadata.get("choices")
            flags.DEFINE_string(field.name, default, text + (f" {choices}" if choices else ""))


def chosen(name: str, known: Collection[str], usual: Sequence[str]) -> Sequence[str]:
    """The names that a flag lists, or the usual ones where it lists none.

    Raises:
      ConfigError: one that is not known, or one twice.
    """
    names = flags.FLAGS[name].value or usual
    if len(set(names)) < len(names) or not set(names) <= set(known):
        raise ConfigError(f"--{name} must be among {', '.join(known)}, got {','.join(names)}")
    return names


def config_from_flags() -> Config:
    """The config of the parsed flags, validated."""
    values: dict[str, Any] = {f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(Config)}
    config = Config(**values)
    check_recipe(config.recipe)
    config.validate()
    return config


def check_recipe(name: str) -> None:
    """Raises ConfigError unless there is a recipe of that name."""
    if name not in (known := ("none", *RECIPES)):
        raise ConfigError(f"--recipe must be one of {', '.join(known)}, got {name}")


def use_recipe() -> None:
    """Makes the settings of the recipe the defaults of their flags; those that are given stay."""
    # An unknown name is told with all that is wrong in a config.
    if "recipe" in flags.FLAGS and (recipe := RECIPES.get(flags.FLAGS.recipe)):
        for name, value in recipe.settings.items():
            flags.FLAGS.set_default(name, value)


def _parse(argv: list[str], arguments: bool) -> list[str]:
    if any(argument in help.ASKED for argument in argv[1:]):
        print(help.text(sys.modules["__main__"].__doc__ or ""))
        raise SystemExit(0)
    try:
        rest = flags.FLAGS(argv)
        use_recipe()
    except flags.Error as e:
        _fail(str(e), EXIT_USAGE)
    if len(rest) > 1 and not arguments:
        _fail(f"unexpected argument {rest[1]!r}; flags start with --", EXIT_USAGE)
    return rest


def _fail(message: str, code: int) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    if processes.several():
        processes.leave(code)
    raise SystemExit(code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of the library as one line; of others with the place that it comes from."""
    if category in (LeftDense, NothingToActOn):
        text = f"note: {message}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


def run_program(main: Callable[..., Any], *, arguments: bool = False) -> None:
    """Parses the flags and runs main; an error a user can mend becomes one line and a code.

    With `arguments` main takes the list of those that are no flags, else there may be none.

    Exit codes: 2 for wrong flags, data, workdir, checkpoint or export; 3 for a loss that is not
    finite; 4 where another process of the run is gone; 130 after Ctrl-C; 0 after SIGTERM, whose
    sender wants the program gone in good order.
    """

    def guarded(argv: list[str]) -> None:
        warnings.showwarning = _show_warning
        try:
            main(argv[1:]) if arguments else main()
        except (ConfigError, DataError, WorkdirError, ExportError) as e:
            _fail(str(e), EXIT_USAGE)
        except CheckpointError as e:
            processes.hear_of_others()
            _fail(str(e), EXIT_USAGE)
        except OSError as e:
            _fail(
                f"cannot write results: {e}; the newest checkpoint is kept, go on with --resume",
                EXIT_USAGE,
            )
        except NotFiniteError as e:
            _fail(str(e), EXIT_NOT_FINITE)
        except jax.errors.JaxRuntimeError as e:
            if not processes.several():
                raise
            _fail(f"{processes.LOST} ({str(e).splitlines()[0][:200]})", processes.EXIT_LOST)
        except Terminated as e:
            print(e)
        except KeyboardInterrupt as e:
            _fail(str(e) or "interrupted", EXIT_INTERRUPTED)
        except Exception:
            if not processes.several():
                raise
            # The others should not have to wait for this one to wait for them.
            traceback.print_exc()
            processes.leave(1)

    # Shells start background jobs with the signal ignored, and a job runner's SIGINT should stop
    # a run as well as Ctrl-C does.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Orbax and TFDS tell every step they take, and every thread's traceback of an error that we
    # tell in a line; a run's own lines would drown.
    logging.set_verbosity(logging.FATAL)
    app.run(guarded, flags_parser=functools.partial(_parse, arguments=arguments))
