"""Bad input through the command line, on one rank: one line that says what is wrong, exit code 1, and nothing lost."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import spoil
from tests.command_line import call, digests
from tests.small_data import run_toml, write_click_log
from trainer.config import DataConfig, TableConfig
from trainer.data import read_batches
from trainer.dataset import open_dataset
from trainer.errors import DataError
from trainer.rows import Cursor
from trainer.schema import resolve_columns

MIDDLE, LAST = "step-00000005", "step-00000010"
"""The only checkpoint of a run that fails on the last row of the first epoch."""

Spoiler = Callable[[Path], object]


# The run description


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.epoch=3", r"unknown key data.epoch; did you mean data.epochs\?"),
        ("data.epochs=two", "data.epochs is 'two', expected an integer"),
        ("data.streams=3", "global_batch_size is 64, expected a multiple of streams = 3, such as 63"),
        ("tables[1].dim=3", "dim is 3, expected 1 for a table of role 'linear'"),
        ("tables[7].rows=3", r"tables\[7\] does not exist; tables has entries 0 to 1"),
        ("tables[0].optimizer.lr=nan", "lr is nan, expected a number"),
        ("evaluation.metric=auk", r"evaluation.metric is 'auk'; did you mean auc\?"),
        ("model.kind=deepfmm", "unknown model kind 'deepfmm'; did you mean 'deepfm'"),
        ("model.hiden=[4]", "unknown option for model kind 'deepfm': 'hiden'; did you mean 'hidden'"),
        ("model.hidden=[0]", r"hidden\[0\]=0 must be a whole number"),
        ("model.dropout=2", "dropout=2 must be a number from 0"),
        ("model={kind='dnn', hidden=[4]}", "table 'fc' has role 'linear', which model.kind 'dnn' does not read"),
        ("output=", "output is empty, expected the name of a folder"),
        ("sharding.memory_gib=0.00001", "the tables need .* GiB .* lower its rows, use more ranks, or raise"),
        ("tables[0].optimizer.kind=adam", "'adam' does not exist in FBGEMM's CPU kernels; use 'adagrad', or"),
        ("dense_optimizer.lr=1e30", "NaN or infinite: training has diverged; .* a lower learning rate"),
        ("data.labels=['clck']", "data.labels: column 'clck' is not in .*; nearest are click"),
        ("data.dense=['q*']", r"data.dense: 'q\*' matches no column; nearest are"),
        ("data.dense=['click']", "'click' is the label column and cannot be an input as well"),
        ("data.user=d0", "user column 'd0' is float, expected an integer or a string per row"),
    ],
)
def test_a_wrong_description_is_one_line(click_log: Path, tmp_path: Path, override: str, message: str) -> None:
    outcome = call("train", click_log / "run.toml", "--set", f"output={tmp_path}/run", "--set", override)
    outcome.complains_of(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run.toml: cannot be read: No such file or directory; name an existing TOML file"),
        (b"\xff\xfe", "run.toml: cannot be read: 'utf-8' codec"),
        (b"seed = [1,\n", "run.toml: is not TOML: "),
        (b"a = " + b"[" * 5000, "run.toml: is not TOML: maximum recursion depth"),
        (b"", "missing key data"),
    ],
)
def test_a_description_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.toml").write_bytes(content)
    call("train", tmp_path / "run.toml").complains_of(message)


# The data


def _cut_short(directory: Path) -> None:
    path = directory / "train" / spoil.LAST
    path.write_bytes(path.read_bytes()[:-100])


def _break_footer(directory: Path) -> None:
    path = directory / "train" / spoil.LAST
    content = path.read_bytes()
    path.write_bytes(content[:-200] + b"\xff" * 192 + content[-8:])


def _dangle(directory: Path) -> None:
    (directory / "train" / "part-002.parquet").symlink_to(directory / "gone")


def _empty_all(directory: Path) -> None:
    for path in (directory / "train").iterdir():
        spoil.change(path, lambda table: table.slice(0, 0))


def _last(column: str, values: Callable[[int], pa.Array]) -> Spoiler:
    """Replaces a column of the last training file."""

    def spoiler(directory: Path) -> None:
        path = directory / "train" / spoil.LAST
        spoil.set_column(path, column, values(pq.read_metadata(path).num_rows))

    return spoiler


@pytest.mark.parametrize(
    ("spoiler", "message"),
    [
        (lambda d: shutil.rmtree(d / "train"), r"data.train: .*/train/\*.parquet matches no file; name existing"),
        (lambda d: (d / "train" / "x.parquet").mkdir(), "x.parquet is a folder; name its files"),
        (lambda d: (d / "train" / "x.parquet").touch(), "x.parquet cannot be read as Parquet: .*size is 0 bytes"),
        (lambda d: (d / "train" / "x.parquet").write_text("id,click\n1,0\n" * 9), "x.parquet cannot be read as"),
        (_dangle, "part-002.parquet cannot be read as Parquet: .*No such file"),
        (_cut_short, f"{spoil.LAST} cannot be read as Parquet: .*; write it anew or leave it out"),
        (_break_footer, f"{spoil.LAST} cannot be read as Parquet: "),
        (_empty_all, "data.train: 2 files have no rows; name files with at least one"),
        (
            lambda d: spoil.change(d / "train" / spoil.LAST, lambda table: table.drop_columns(["f3"])),
            f"column 'f3' is in .*part-000.parquet but not once in .*{spoil.LAST}",
        ),
        (_last("f3", lambda n: pa.array(["x"] * n)), "column 'f3' is int64 in .* and string in .*same type"),
        (_last("f3", lambda n: pa.array([0.5] * n)), "column 'f3' is int64 in .* and double in "),
        (
            lambda d: spoil.change(d / "validation" / "part-000.parquet", lambda table: table.drop_columns(["click"])),
            "column 'click' is in .* but not once in .*/validation/",
        ),
    ],
)
def test_data_that_cannot_be_opened_are_one_line(tmp_path: Path, spoiler: Spoiler, message: str) -> None:
    write_click_log(tmp_path)
    spoiler(tmp_path)
    call("train", run_toml(tmp_path)).complains_of(message)


@pytest.mark.parametrize(
    ("spoiler", "message"),
    [
        (
            lambda d: spoil.cast(d, "f3", pa.float64()),
            "sparse column 'f3' is double, expected integers, strings or lists",
        ),
        (lambda d: spoil.cast(d, "d0", pa.string()), "dense column 'd0' is string, expected a float"),
        (lambda d: spoil.cast(d, "click", pa.string()), "label column 'click' is string, expected"),
    ],
)
def test_columns_of_a_type_that_is_of_no_use_are_one_line(tmp_path: Path, spoiler: Spoiler, message: str) -> None:
    write_click_log(tmp_path)
    spoiler(tmp_path)
    call("train", run_toml(tmp_path)).complains_of(message)


def _value(column: str, value: object, kind: pa.DataType | None = None) -> Spoiler:
    """Sets the last value of the last training file, after a change of the column's type in all files."""

    def spoiler(directory: Path) -> None:
        if kind is not None:
            spoil.cast(directory, column, kind)
        spoil.set_value(directory / "train" / spoil.LAST, column, -1, value)

    return spoiler


def _page_header(directory: Path) -> None:
    path = directory / "train" / spoil.LAST
    chunk = pq.read_metadata(path).row_group(3).column(0)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + 12] = b"\xff" * 12
    path.write_bytes(content)


def _small_ids(value: int) -> Spoiler:
    """Makes f0 a row number in all files, but for the last row of training."""

    def spoiler(directory: Path) -> None:
        for path in directory.glob("*/*.parquet"):
            spoil.set_column(path, "f0", pa.array(n % 300 for n in range(pq.read_metadata(path).num_rows)))
        spoil.set_value(directory / "train" / spoil.LAST, "f0", -1, value)

    return spoiler


@pytest.mark.parametrize(
    ("spoiler", "message"),
    [
        (lambda d: spoil.damage_page(d / "train" / spoil.LAST, 3, "d0"), "row group 3 cannot be read: .*CRC checksum"),
        (_page_header, f"{spoil.LAST}: row group 3 cannot be read: .*; write the file anew"),
        (_value("click", 2), f"{spoil.LAST} row 319: label column 'click' is 2, expected 0 or 1"),
        (_value("click", None), f"{spoil.LAST} row 319: label column 'click' is null"),
        (_value("d0", math.nan), f"{spoil.LAST} row 319: column 'd0' is nan, expected a finite number; write a null"),
        (_value("d1", -math.inf), f"{spoil.LAST} row 319: column 'd1' is -inf, expected a finite number"),
        (_value("d0", None), f"{spoil.LAST} row 319: dense column 'd0' is null; give it a value with a rule"),
        (_value("d0", 1e300, pa.float64()), f"{spoil.LAST} row 319: dense column 'd0' is 1e\\+300, beyond float32"),
        (_value("f3", 2**63, pa.uint64()), f"{spoil.LAST} row 319: sparse column 'f3' has id 9223372036854775808"),
        (_value("user_id", None), f"{spoil.LAST} row 319: user column 'user_id' is null"),
        (_small_ids(300), f"{spoil.LAST} row 319, feature 'f0': id 300 is not a row of table .*rows 0 to 299; raise"),
        (_small_ids(-1), f"{spoil.LAST} row 319, feature 'f0': id -1 is not a row of table"),
    ],
)
def test_a_bad_value_in_mid_training_is_one_line_and_keeps_the_checkpoint(
    tmp_path: Path, spoiler: Spoiler, message: str
) -> None:
    write_click_log(tmp_path)
    spoiler(tmp_path)
    overrides: dict[str, Any] = {"data": {"shuffle": False}}
    if "feature 'f0'" in message:
        table = {"features": ["f0"], "ids": "identity", "rows": 300}
        linear = {"name": "fc", "role": "linear", "dim": 1, **table}
        overrides["tables"] = [{"name": "embedding", "dim": 15, **table}, linear]
    call("train", run_toml(tmp_path, **overrides)).complains_of(message)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [MIDDLE]
    assert digests(tmp_path / "run")


def test_a_run_goes_on_exactly_when_the_damaged_file_is_restored(tmp_path: Path) -> None:
    write_click_log(tmp_path)
    path = tmp_path / "train" / spoil.LAST
    before = spoil.damage_page(path, 3, "click")
    damaged = path.read_bytes()
    path.write_bytes(before)
    description = run_toml(tmp_path, data={"shuffle": False})
    assert call("train", description).code == 0
    expected = digests(tmp_path / "run")
    path.write_bytes(damaged)
    call("train", description, "--fresh", "--yes").complains_of("CRC checksum verification failed")
    path.write_bytes(before)
    assert "resumed at epoch 0 step 5" in call("train", description).errors
    assert digests(tmp_path / "run") == expected


def test_a_file_that_is_replaced_in_mid_training_is_one_line(tmp_path: Path) -> None:
    write_click_log(tmp_path)
    dataset = open_dataset([f"{tmp_path}/train/*.parquet"], "data.train")
    config = DataConfig(train=("unused",), global_batch_size=64, streams=4)
    columns = resolve_columns(config, [TableConfig(name="t", features=("f0", "f1"))], dataset)
    spoil.change(tmp_path / "train" / spoil.LAST, lambda table: table.drop_columns(["f1"]))
    batches = read_batches(
        dataset, columns, config, seed=0, rank=0, world_size=1, start=Cursor(0, 0), epochs=1, shuffle=True
    )
    with pytest.raises(DataError, match=f"{spoil.LAST} has changed since it was opened; start the command again"):
        list(batches)


def test_validation_rows_of_one_class_are_one_line(tmp_path: Path) -> None:
    write_click_log(tmp_path)
    path = tmp_path / "validation" / "part-000.parquet"
    spoil.set_column(path, "click", pa.array([0] * pq.read_metadata(path).num_rows, pa.int8()))
    call("train", run_toml(tmp_path)).complains_of("need both classes, got 0 clicks in 160 rows")
    assert digests(tmp_path / "run" / "checkpoints" / MIDDLE)
    assert digests(tmp_path / "run" / "checkpoints" / LAST)  # nothing of what was trained is lost


def test_any_flipped_bit_of_a_data_file_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    write_click_log(tmp_path, rows=80, files=1, row_group_size=25)
    path = tmp_path / "train" / "part-000.parquet"
    whole, generator = path.read_bytes(), random.Random(1)
    footer = int.from_bytes(whole[-8:-4], "little")
    places = [generator.randrange(len(whole) - footer - 8, len(whole)) for _ in range(150)]
    places += [generator.randrange(len(whole)) for _ in range(50)]
    refused = []
    for place in places:
        path.write_bytes(whole)
        spoil.flip(path, place, generator.randrange(8))
        try:
            assert _rows_read(path) == 80
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert not [message for message in refused if "\n" in message]


def _rows_read(path: Path) -> int:
    dataset = open_dataset([str(path)], "data.train")
    config = DataConfig(train=("unused",), dense=("d0", "d1"), global_batch_size=8, streams=4)
    columns = resolve_columns(config, [TableConfig(name="t", features=("f*", "m0"))], dataset)
    batches = read_batches(
        dataset, columns, config, seed=0, rank=0, world_size=1, start=Cursor(0, 0), epochs=1, shuffle=True
    )
    return sum(batch.num_rows for batch in batches)
