"""The command line of `prepare` and `init`: options and what is done with them. Imports nothing heavy at the top."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import ConfigError, OutputError
from trainer.location import local

TABLE_KINDS = ("criteo", "avazu", "csv", "libsvm", "parquet")
"""What `prepare` knows besides data sets with a way of their own."""

PREPARE = """
The plan of the columns is printed before anything is written: a name, a kind and how cells are written, guessed from
the first 10,000 rows. --column NAME=KIND overrides it; kinds: label, dense, sparse, sequence, user, timestamp, weight,
drop; forms, such as sparse:string: integer, string, hex (sparse), number, integer (dense), seconds, datetime, hour
(timestamp). OUT appears whole or not at all, with statistics.json of every split; the same command goes on where a run
was interrupted. gzip and zstd are known by their content. A row is a line.
"""


def add_prepare_options(prepare: argparse.ArgumentParser) -> None:
    """Options of the kinds in TABLE_KINDS."""
    prepare.epilog = PREPARE
    add = prepare.add_argument_group("options of " + ", ".join(TABLE_KINDS)).add_argument
    add("--column", action="append", default=[], metavar="NAME=KIND", help="what a column is; may be given often")
    add("--delimiter", default=",", help="between the cells of csv (default %(default)s); \\t for a tab")
    add("--separator", default="|", help="between the ids of a sequence (default %(default)s)")
    add(
        "--strings", choices=("hash", "keep"), default="hash", help="what becomes of string ids: their XXH3-64, or stay"
    )
    add(
        "--vocabulary",
        metavar="min_count=N",
        help="number ids by frequency in train; those seen less than N times are 0",
    )
    add("--split", choices=("chance", "order", "time"), help="how rows are split (default chance; criteo: order)")
    add("--fractions", type=float, nargs=3, metavar="F", default=(0.8, 0.1, 0.1), help="of train, validation, test")
    add("--seed", type=int, default=0, help="of the split by chance (default %(default)s)")
    add("--validation", type=local, action="append", default=[], metavar="FILE", help="then IN are train; often")
    add("--test", type=local, action="append", default=[], metavar="FILE", help="the same for test")
    add(
        "--bad-rows", choices=("error", "skip"), default="error", help="what a malformed row does (default %(default)s)"
    )
    add("--threads", type=int, default=0, help="that read and convert; default: the cores")


def prepare(arguments: argparse.Namespace) -> str:
    """Prepare a data set of any kind; what was written, in words."""
    if arguments.kind in TABLE_KINDS:
        return _prepare_table(arguments)
    from trainer import behaviors, census, frappe
    from trainer.prepare import describe

    convert = {"beauty": behaviors.prepare, "census": census.prepare, "frappe": frappe.prepare}[arguments.kind]
    return describe(convert(arguments.inputs, arguments.output, overwrite=arguments.overwrite))


def _prepare_table(arguments: argparse.Namespace) -> str:
    columns, min_count = _columns(arguments.column), _min_count(arguments.vocabulary)
    from trainer.prepare_tables import Request
    from trainer.prepare_tables import prepare_table as run

    prepared = run(
        Request(
            kind=arguments.kind,
            inputs=tuple(arguments.inputs),
            output=arguments.output,
            validation=tuple(arguments.validation),
            test=tuple(arguments.test),
            columns=columns,
            delimiter="\t" if arguments.delimiter == "\\t" else arguments.delimiter,
            separator=arguments.separator,
            keep_strings=arguments.strings == "keep",
            vocabulary=min_count,
            split=arguments.split or ("order" if arguments.kind == "criteo" else "chance"),
            fractions=tuple(arguments.fractions),
            seed=arguments.seed,
            skip_bad=arguments.bad_rows == "skip",
            overwrite=arguments.overwrite,
            threads=arguments.threads,
        ),
        show=lambda text: sys.stderr.write(text + "\n"),
    )
    return prepared.describe()


def _columns(words: Sequence[str]) -> dict[str, str]:
    """Name to kind, of words ``NAME=KIND``."""
    columns = {}
    for word in words:
        name, equals, kind = word.rpartition("=")
        if not equals or not name:
            raise ConfigError(f"--column is {word!r}, expected NAME=KIND, such as site=sparse")
        columns[name] = kind
    return columns


def _min_count(word: str | None) -> int | None:
    if word is None:
        return None
    number = word.removeprefix("min_count=")
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"--vocabulary is {word!r}, expected min_count=N with N of 1 or more")
    return int(number)


def add_init_options(init: argparse.ArgumentParser) -> None:
    """Options of `init`."""
    init.add_argument("data", nargs="+", metavar="DATA", help="a prepared folder, or Parquet files and patterns")
    init.add_argument("--output", type=local, default=Path("run.toml"), help="the file to write (default %(default)s)")
    init.add_argument("--label", metavar="COLUMN", help="the column of 0 and 1; default: guessed")
    init.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def init(arguments: argparse.Namespace) -> str:
    """Write a run description for some data; what was guessed, in words."""
    out: Path = arguments.output
    if os.path.lexists(out) and not arguments.overwrite:
        raise OutputError(f"{out} exists; name another file with --output or pass --overwrite")
    from trainer.proposal import propose

    proposal = propose(arguments.data, arguments.label)
    try:
        with tempfile.NamedTemporaryFile("w", dir=out.parent, delete=False, encoding="utf-8") as file:
            file.write(proposal.text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}; name another file") from error
    return f"{out}: {proposal.summary}; train it with: python -m trainer train {out}"
