"""The command `cosa-ray`: parse, call one function, print. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Annotated, Any, cast

import typer

from cosa_ray import __version__
from cosa_ray.cli import config, data, jobs, submit
from cosa_ray.cli.ablate import ablate
from cosa_ray.cli.compare import compare
from cosa_ray.cli.demo import demo
from cosa_ray.cli.evaluate import evaluate
from cosa_ray.cli.import_release import import_release
from cosa_ray.cli.predict import predict, pseudo_labels
from cosa_ray.cli.promote import promote
from cosa_ray.cli.register import register
from cosa_ray.cli.status import status
from cosa_ray.cli.train import train
from cosa_ray.cli.tune import tune
from cosa_ray.cli.ui import ui
from cosa_ray.config.credentials import redacted
from cosa_ray.errors import RunFailed, UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="CoSA, semantic segmentation from image-level labels, at scale: train, sweep, compare. Add --verbose to any "
    "command for the traceback of an error.",
)
app.command()(demo)
app.add_typer(data.app, name="data")
app.command()(train)
app.command()(tune)
app.command()(status)
app.command()(promote)
app.command()(ablate)
app.command()(evaluate)
app.command()(compare)
app.command()(predict)
app.command()(pseudo_labels)
app.command()(register)
app.command()(import_release)
app.add_typer(submit.app, name="submit")
app.add_typer(jobs.app, name="jobs")
app.add_typer(config.app, name="config")
app.command()(ui)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"cosa-ray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# What typer raises for a command line it does not take; the class behind it has no public name in every version.
_FlagError = cast("type[Exception]", typer.BadParameter.__mro__[2])


def _explain(error: Any) -> int:
    """Say what is wrong with a command line in one sentence, or show the help of a bare command; the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        if text := error.format_message():
            print(text, file=sys.stderr)
        return 2
    command = error.ctx.command_path if getattr(error, "ctx", None) else "cosa-ray"
    sentence = " ".join(error.format_message().split()).rstrip(".")
    print(f"cosa-ray: {sentence[:1].lower()}{sentence[1:]}; see {command} --help.", file=sys.stderr)
    return 2


class _WithoutSecrets(logging.Formatter):
    """Lines of the log as they are shown: libraries write whole addresses into theirs."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _show_traceback(error: BaseException) -> None:
    print(redacted("".join(traceback.format_exception(error))), file=sys.stderr, end="")


def main(words: list[str] | None = None) -> None:
    """Run the command line. Exit code 0: done; 2: the user's mistake; 1: a failure; 130: interrupted."""
    words = list(sys.argv[1:] if words is None else words)
    verbose = "--verbose" in words
    # Taken out here, so that it may stand anywhere.
    words = [word for word in words if word != "--verbose"]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_WithoutSecrets("%(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    try:
        code = app(words, prog_name="cosa-ray", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except _FlagError as error:
        sys.exit(_explain(error))
    except typer.Abort:
        sys.exit(130)
    except (UserError, RunFailed) as error:
        if verbose:
            _show_traceback(error)
        else:
            print(f"cosa-ray: {redacted(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if verbose:
            _show_traceback(error)
        else:
            print(f"cosa-ray: {type(error).__name__}: {redacted(str(error))} (--verbose shows where)", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
