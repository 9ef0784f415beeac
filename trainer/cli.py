"""The command line: parse, load, join, run. A user's mistake prints one line; a bug prints a traceback.

Imports no torch at the top, so that ``--help`` is there at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from trainer import data_commands, view_cli
from trainer.ending import DONE, INTERRUPTED, MISTAKE, RESTART, how_to_go_on, leave, note_for_launcher
from trainer.errors import UserError
from trainer.location import local, locate, without_secrets
from trainer.serving_commands import add_serving
from trainer.world import LostLinkError, is_first_of_job

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 (argparse's only name)

_EPILOG = """
exit codes: 0 done, 1 a mistake of the user (one line says which), 75 stopped in a state to restart from,
130 interrupted

start with:
  python -m trainer sample-data data/sample --rows 1000000
  python -m trainer train launch/runs/deepfm.toml
  torchrun --nproc-per-node 2 -m trainer train launch/runs/deepfm.toml --set output=runs/two
"""


def parser() -> argparse.ArgumentParser:
    """The parser of every command; ``command`` and ``handler`` are set in what it returns."""
    top = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Trains click-through-rate and ranking models on sharded embedding tables.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_sweep(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_inspect(commands)
    _add_import(commands)
    _add_export(commands)
    add_serving(lambda name, what, handler: _command(commands, name, what, handler))
    _add_sample_data(commands)
    _add_prepare(commands)
    what = "write a run description for Parquet files or a prepared folder"
    data_commands.add_init_options(_command(commands, "init", what, _init))
    plan = _command(commands, "plan", view_cli.PLAN, view_cli.run_plan)
    view_cli.add_plan_arguments(plan)
    _add_set(plan)
    view_cli.add_report_arguments(_command(commands, "report", view_cli.REPORT, view_cli.run_report))
    doctor = _command(commands, "doctor", "say what is installed and whether it fits together", _doctor)
    doctor.epilog = "Exit code 1 if something must be mended; the fix is printed."
    return top


def _command(
    commands: Commands, name: str, what: str, handler: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    added.set_defaults(handler=handler)
    return added


def _add_train(commands: Commands) -> None:
    train = _command(commands, "train", "train from a run description; an existing output is resumed", _train)
    train.add_argument("config", type=local, metavar="RUN.toml", help="the run description")
    _add_set(train)
    view_cli.add_diagnostics(train)
    train.add_argument(
        "--continue-from",
        type=locate,
        metavar="CHECKPOINT",
        help="begin with the state of another run's checkpoint, or its newest good one, and train it on new data",
    )
    train.add_argument(
        "--fresh", action="store_true", help="start anew instead of resuming; with --yes, delete what is there"
    )
    train.add_argument(
        "--yes", action="store_true", help="confirm that --fresh may delete the run in the output folder"
    )


_SWEEP = """
Every run is a process of `train`, in DIR/NAME. The same command goes on where it was stopped: finished runs are not
trained again, unless their description has changed (their data are taken to be the same). DIR gets sweep.png,
sweep.json and logs/. Settings are chosen by the validation metric that the run goes by, evaluation.metric.

examples:
  which optimizer, and which learning rates? first for the tables, then for the model beside the best of these
    python -m trainer sweep RUN.toml --optimizers
  two learning rates with two optimizers of all tables, three seeds each: 12 runs, of which 2 train at once
    python -m trainer sweep RUN.toml --over dense_optimizer.lr=1e-3,3e-3 \\
        --over 'tables[*].optimizer.kind=adagrad,rowwise_adagrad' --seeds 3 --jobs 2
  wider layers with more dropout: 2 runs, on the first 1,000 steps
    python -m trainer sweep RUN.toml --zip --over 'model.hidden=[64,32],[400,400]' --over model.dropout=0,0.5 \\
        --set max_steps=1000
"""


def _add_sweep(commands: Commands) -> None:
    what = "train a run under several settings, such as optimizers, and say which is best by validation"
    sweep = _command(commands, "sweep", what, _sweep)
    sweep.epilog, sweep.formatter_class = _SWEEP, argparse.RawDescriptionHelpFormatter
    sweep.add_argument("config", type=local, metavar="RUN.toml", help="the run description")
    tried = sweep.add_mutually_exclusive_group(required=True)
    tried.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="values of a key to try; may be given often: all values of one with all of the other",
    )
    tried.add_argument(
        "--optimizers", action="store_true", help="try optimizers and learning rates, some 16 runs with each seed"
    )
    pairing = sweep.add_mutually_exclusive_group()
    pairing.add_argument("--zip", action="store_true", help="first values together, second values together, and so on")
    pairing.add_argument("--product", action="store_false", dest="zip", help="all with all (default)")
    _add_set(sweep)
    sweep.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each setting, seed, seed + 1, ...")
    sweep.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks of each run, by torchrun")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, which share the cores")
    sweep.add_argument("--output", type=local, metavar="DIR", help="default: the run's output with -sweep after it")


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key, such as data.epochs=2 or tables[0].rows=5000000 (tables[*]: of all); may be given often",
    )


def _add_evaluate(commands: Commands) -> None:
    evaluate = _command(
        commands, "evaluate", "score a checkpoint on data: every row once, on any number of ranks", _evaluate
    )
    evaluate.add_argument(
        "path", type=locate, metavar="PATH", help="a checkpoint, or a run's output (its newest good one)"
    )
    evaluate.add_argument(
        "--data",
        action="append",
        metavar="GLOB",
        help="Parquet files to score; may be given often; default: the run's test files, else its validation files",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")


_PREDICT = """
OUT.parquet has a row for each row of the data, in the order of the files (sorted by path) and of their rows: the
columns kept, with the input's values, then `probability` (float32) of a click. It appears whole, or not at all. The
data need the run's features and dense columns, and no label. Ids that the checkpoint does not know read the cold row,
as in `evaluate`.
"""


def _add_predict(commands: Commands) -> None:
    what = "write a checkpoint's prediction for every row of data, on any number of ranks"
    predict = _command(commands, "predict", what, _predict)
    predict.epilog = _PREDICT
    predict.add_argument(
        "path", type=locate, metavar="CHECKPOINT", help="a checkpoint, or a run's output (its newest good one)"
    )
    predict.add_argument("out", type=local, metavar="OUT.parquet", help="the file to write")
    predict.add_argument(
        "--data", action="append", required=True, metavar="GLOB", help="Parquet files to score; may be given often"
    )
    predict.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="COLUMN",
        help="a column to copy from the data, such as a key or the label, or a pattern; may be given often",
    )
    predict.add_argument(
        "--batch-size", type=int, metavar="ROWS", help="rows per step over all ranks; default: as the run was trained"
    )
    predict.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def _add_inspect(commands: Commands) -> None:
    inspect = _command(commands, "inspect", "show what a checkpoint holds", _inspect)
    inspect.add_argument(
        "path", type=locate, metavar="PATH", help="a checkpoint, or a run's output (its newest good one)"
    )
    what = inspect.add_mutually_exclusive_group()
    what.add_argument("--json", **_form("json"), help="print one JSON object")
    what.add_argument(
        "--digest",
        **_form("digest"),
        help="print 'name digest' of every parameter and optimizer state; does not depend on sharding or world size",
    )
    what.add_argument("--verify", **_form("verify"), help="read every file and compare it with its checksum")


_IMPORT = """
Names are those that `inspect` prints; [rename] in the run description maps others to them. Shapes must match, but a
table may have more rows in the run. Row i of a table is that of id i (identity, exact; NAME.ids beside NAME gives an
exact table other ids) or of bucket i (hashed, where the numbers of rows must be equal). All other rows have their
initial values, moments are zero. `train RUN.toml` goes on from the checkpoint, which has step 0.
"""

_EXPORT = """
Dense parameters and buffers go by their names. An identity or hashed table is [rows, dim], row i being that of id or
bucket i; an identity table's ids that were never seen have their initial values. An exact table NAME is [rows in use,
dim] in ascending order of the ids, which are in NAME.ids, int64 [rows in use]. Not exported: moments, what is known
of ids without a row, and the cold row that those share. OUT.pt is replaced if it exists.
"""


def _add_import(commands: Commands) -> None:
    import_ = _command(commands, "import", "start a run from a plain PyTorch state dict: write its checkpoint", _import)
    import_.epilog = _IMPORT
    import_.add_argument("path", type=local, metavar="MODEL.pt", help="what torch.save(model.state_dict(), ...) wrote")
    import_.add_argument("--config", type=local, required=True, metavar="RUN.toml", help="the run description")
    _add_set(import_)
    import_.add_argument(
        "--partial", action="store_true", help="names that the file lacks keep their initial values, and are listed"
    )


def _add_export(commands: Commands) -> None:
    what = "write a checkpoint's weights as a plain state dict, readable with torch alone"
    export = _command(commands, "export-state-dict", what, _export)
    export.epilog = _EXPORT
    export.add_argument(
        "path", type=locate, metavar="CHECKPOINT", help="a checkpoint, or a run's output (its newest good one)"
    )
    export.add_argument("out", type=local, metavar="OUT.pt", help="the file to write")


def _form(name: str) -> dict[str, Any]:
    return {"dest": "form", "action": "store_const", "const": name, "default": "text"}


def _add_sample_data(commands: Commands) -> None:
    sample = _command(commands, "sample-data", "write a click log from a known model as Parquet files", _sample_data)
    sample.add_argument("directory", type=local, metavar="DIR", help="gets train/, validation/ and test/")
    sample.add_argument("--rows", type=int, default=1_000_000, help="rows in all files together (default %(default)s)")
    sample.add_argument("--seed", type=int, default=0, help="decides every value (default %(default)s)")
    sample.add_argument("--overwrite", action="store_true", help="replace the files that are there")


def _add_prepare(commands: Commands) -> None:
    prepare = _command(commands, "prepare", "convert a data set to Parquet files", _prepare)
    kinds = (*data_commands.TABLE_KINDS, "beauty", "census", "frappe")
    prepare.add_argument("kind", choices=kinds, help="the format of the input")
    prepare.add_argument("inputs", type=local, nargs="+", metavar="IN", help="files, plain, gzip or zstd")
    prepare.add_argument("output", type=local, metavar="OUT", help="gets train/, validation/ and test/")
    prepare.add_argument("--overwrite", action="store_true", help="replace the files that are there")
    data_commands.add_prepare_options(prepare)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    try:
        arguments = parser().parse_args(argv)
        code = arguments.handler(arguments)
    except UserError as error:
        code = _complain(error)
    except LostLinkError as error:
        sys.stdout.flush()
        leave(f"{error}; {how_to_go_on()}")
    except KeyboardInterrupt:
        if is_first_of_job():
            sys.stderr.write("interrupted; what had been saved is whole\n")
        code = INTERRUPTED
    sys.stdout.flush()
    raise SystemExit(code)


def _complain(error: UserError) -> int:
    """One line, once per job: every rank raises the same. TorchElastic shows its error file as the cause."""
    line = without_secrets(f"error: {' '.join(str(error).split())}")
    if is_first_of_job():
        sys.stderr.write(line + "\n")
    note_for_launcher(line)
    return MISTAKE


def _train(arguments: argparse.Namespace) -> int:
    from trainer.description import load

    config = load(arguments.config, arguments.overrides)
    from trainer import commands

    finished = commands.train(
        config, fresh=arguments.fresh, confirmed=arguments.yes, continue_from=arguments.continue_from
    )
    return DONE if finished else RESTART


def _sweep(arguments: argparse.Namespace) -> int:
    from trainer.grid import configs_of, settings_over

    shared, overs = tuple(arguments.overrides), tuple(arguments.over)
    configs_of(arguments.config, shared, settings_over(overs, pairs=arguments.zip))
    from trainer.sweep import Sweep, sweep

    asked = Sweep(
        config=arguments.config,
        shared=shared,
        overs=overs,
        pairs=arguments.zip,
        seeds=arguments.seeds,
        ranks=arguments.ranks,
        jobs=arguments.jobs,
        output=arguments.output,
    )
    _print(sweep(asked))
    return DONE


def _evaluate(arguments: argparse.Namespace) -> int:
    from trainer import commands

    _print(commands.evaluate(arguments.path, arguments.data, as_json=arguments.json))
    return DONE


def _predict(arguments: argparse.Namespace) -> int:
    from trainer import commands

    report = commands.predict(
        arguments.path,
        arguments.out,
        arguments.data,
        keep=arguments.keep,
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
    )
    _print(report)
    return DONE


def _inspect(arguments: argparse.Namespace) -> int:
    from trainer import inspection

    _print(inspection.inspect(arguments.path, arguments.form))
    return DONE


def _import(arguments: argparse.Namespace) -> int:
    from trainer.description import load

    config = load(arguments.config, arguments.overrides)
    from trainer import commands

    _print(commands.import_state_dict(arguments.path, config, partial=arguments.partial))
    return DONE


def _export(arguments: argparse.Namespace) -> int:
    from trainer import commands

    _print(commands.export_state_dict(arguments.path, arguments.out))
    return DONE


def _sample_data(arguments: argparse.Namespace) -> int:
    from trainer.sample_data import describe, write_sample_data

    report = write_sample_data(arguments.directory, arguments.rows, arguments.seed, overwrite=arguments.overwrite)
    _print(describe(report))
    return DONE


def _prepare(arguments: argparse.Namespace) -> int:
    _print(data_commands.prepare(arguments))
    return DONE


def _init(arguments: argparse.Namespace) -> int:
    _print(data_commands.init(arguments))
    return DONE


def _doctor(arguments: argparse.Namespace) -> int:
    from trainer import doctor

    return doctor.run()


def _print(text: str) -> None:
    if text:
        sys.stdout.write(text.rstrip("\n") + "\n")
