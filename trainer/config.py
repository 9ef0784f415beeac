"""The run description: TOML in, frozen typed values out; every mistake is one line that names the key.

Knows nothing of files of data, devices or ranks: what can only be checked against those is checked where they are met.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.boundary import CheckpointConfig, EvaluationConfig, ReportConfig
from trainer.guard import PreemptionConfig, WatchdogConfig
from trainer.location import refuse_secrets
from trainer.recipe import (
    CrossConfig,
    DenseOptimizerConfig,
    InitConfig,
    LossConfig,
    PrecisionConfig,
    SparseOptimizerConfig,
    require,
)

ShardingType = Literal[
    "data_parallel",
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
]

LARGEST_BATCH = 1 << 24
"""Rows of a step over all ranks: what is made of them must be numbered in 32 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """One logical table, shared by all its features."""

    name: str
    """Public for life: the parameter is ``embedding.NAME.weight``, or ``linear.NAME.weight`` for role linear."""

    features: tuple[str, ...]
    """Sparse columns that share this table; glob patterns, each sorted by name."""

    role: Literal["embedding", "linear"] = "embedding"
    """``embedding`` feeds the model's [B, F, D]; ``linear`` is the 1-wide first-order term."""

    dim: int = 16
    """Columns of a row as the model sees them; any width (the kernels' multiple of 4 is taken care of)."""

    ids: Literal["identity", "hashed", "exact"] = "hashed"
    """``identity``: the id is the row number. ``hashed``: any int64 id, fixed rows, collisions accepted and said so.
    ``exact``: any int64 id, no collisions; a new id gets the next free row, and the table grows."""

    rows: int = 1_000_000
    """Rows over all ranks to begin with; ``hashed`` tables stay there."""

    max_rows: int = 0
    """Rows over all ranks at which growth stops and ``evict`` begins. 0: ``exact`` tables grow while memory lasts, and
    ``identity`` tables stay at ``rows``."""

    growth_factor: float = 2.0
    """What the capacity is multiplied by when the table is full; more where one batch needs more."""

    admit_after: int = 1
    """Sightings of an id before it gets a row; until then it trains the table's shared cold row (``exact``)."""

    admission: Literal["exact", "sketch"] = "exact"
    """How sightings are counted: each id by itself, or in a sketch of fixed memory that never counts too few."""

    sketch_width: int = 1 << 20
    """Counters in each of the four rows of the sketch, per rank; 4 bytes each."""

    evict: Literal["none", "lru", "lfu"] = "none"
    """What happens when the table is full and may not grow: stop with a saved checkpoint and an error, or take the rows
    of the ids seen least recently, or least often (``exact``)."""

    evict_fraction: float = 0.05
    """Part of a full table's rows that one eviction frees; evictions wait for the batches in flight."""

    expire_after: int = 0
    """Age, in ``expire_unit``, at which ids that are no longer seen lose their rows, once per segment; 0 never."""

    expire_unit: Literal["steps", "seconds"] = "steps"
    """``seconds`` are those of the column ``data.timestamp``."""

    pooling: Literal["sum", "mean"] = "sum"
    """How the rows of a multi-valued feature become one."""

    sequences: tuple[str, ...] = ()
    """Features of this table that the model gets unpooled, in their order; glob patterns. See docs/sequences.md."""

    max_length: int = 0
    """Ids that a row keeps of each feature at most, the last ones; what is left out is counted. 0: any number."""

    optimizer: SparseOptimizerConfig = field(default_factory=SparseOptimizerConfig)
    """Applied in backward; tables of equal features, ids, rows and element-wise optimizer share one physical table."""

    init: InitConfig | None = None
    """First value of a row; by default uniform within 0.01 for embeddings and zeros for linear tables."""

    sharding: tuple[ShardingType, ...] = ()
    """Sharding types that the planner may choose from; empty leaves it every one but data_parallel."""

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), f"name is {self.name!r}, expected letters, digits and underscores")
        require(bool(self.features), "features is empty, expected at least one column or pattern")
        for name in ("dim", "rows", "admit_after", "sketch_width"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, expected 1 or more")
        for name, most in (("dim", 1 << 16), ("rows", 1 << 40), ("max_rows", 1 << 40), ("sketch_width", 1 << 30)):
            value = getattr(self, name)
            require(value < most, f"{name} is {value}, expected fewer than 2**{most.bit_length() - 1}")
        require(
            self.max_rows == 0 or self.max_rows >= self.rows,
            f"max_rows is {self.max_rows}, expected 0 or at least rows = {self.rows}",
        )
        require(1 < self.growth_factor < math.inf, f"growth_factor is {self.growth_factor}, expected above 1")
        require(0 < self.evict_fraction <= 1, f"evict_fraction is {self.evict_fraction}, expected above 0, at most 1")
        for name in ("expire_after", "max_length"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.ids != "exact":
            for name, off in (("admit_after", 1), ("evict", "none"), ("expire_after", 0)):
                value = getattr(self, name)
                require(value == off, f"{name} is {value!r}, which needs ids = 'exact'; ids is {self.ids!r}")
        require(self.ids != "hashed" or not self.max_rows, "max_rows is set, but a table of ids = 'hashed' never grows")
        if self.role == "linear":
            require(self.dim == 1, f"dim is {self.dim}, expected 1 for a table of role 'linear'")
            require(not self.sequences, "sequences is set, but a table of role 'linear' pools all its features")
        if "data_parallel" in self.sharding:
            require(
                len(self.sharding) == 1,
                "sharding mixes data_parallel with other types; name data_parallel alone: its optimizer is another",
            )
            require(
                self.optimizer.kind != "rowwise_adagrad",
                "optimizer.kind is 'rowwise_adagrad', which data_parallel tables do not have; use 'adagrad'",
            )
        if self.optimizer.kind == "rowwise_adagrad" and self.sharding:
            require(
                not set(self.sharding) <= {"column_wise", "table_column_wise", "grid_shard"},
                f"sharding {list(self.sharding)} splits rows, and rowwise_adagrad needs them whole; "
                "use optimizer.kind = 'adagrad' or add 'row_wise' or 'table_wise'",
            )

    @property
    def pooled(self) -> tuple[str, ...]:
        """The features that are no sequences."""
        return tuple(feature for feature in self.features if feature not in self.sequences)

    @property
    def key(self) -> str:
        """Public parameter name: the key in checkpoints, logs and digests."""
        return f"{self.role}.{self.name}.weight"

    @property
    def initial(self) -> InitConfig:
        """What new rows start from, with the role's default filled in."""
        return self.init or (InitConfig() if self.role == "embedding" else InitConfig(kind="zeros"))


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformConfig:
    """What happens to dense columns between the file and the model."""

    columns: tuple[str, ...]
    """Glob patterns over dense columns; the first rule that matches a column is the one used."""

    kind: Literal["none", "log1p", "standardize", "clip"] = "none"
    """``log1p``: sign(x) log(1 + |x|). ``standardize``: (x - mean) / std. ``clip``: into [low, high]."""

    mean: float | None = None
    """For ``standardize``; measured on the training files when absent."""

    std: float | None = None
    """For ``standardize``; measured on the training files when absent."""

    low: float | None = None
    """Lower bound of ``clip``."""

    high: float | None = None
    """Upper bound of ``clip``."""

    null: float | None = None
    """What a null becomes, after the transform; without it a null is an error."""

    def __post_init__(self) -> None:
        require(bool(self.columns), "columns is empty, expected at least one pattern")
        if self.kind == "clip":
            require(
                self.low is not None and self.high is not None and self.low <= self.high,
                f"low is {self.low} and high is {self.high}, expected low <= high for kind 'clip'",
            )
        for name in ("mean", "std", "null"):
            value = getattr(self, name)
            require(value is None or math.isfinite(value), f"{name} is {value}, expected a finite number")
        require((self.mean is None) == (self.std is None), "mean and std belong together; give both or neither")
        require(self.std is None or self.std > 0, f"std is {self.std}, expected above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which rows are read, and in which order."""

    train: tuple[str, ...]
    """Parquet files to train on; glob patterns."""

    validation: tuple[str, ...] = ()
    """Parquet files scored during training; early stopping and the best checkpoint go by them."""

    test: tuple[str, ...] = ()
    """Parquet files scored once at the end, with the best checkpoint."""

    labels: tuple[str, ...] = ("click",)
    """Columns of 0 and 1, one for each task of the model."""

    missing_labels: Literal["error", "mask"] = "error"
    """What a null label is: an error, or nothing in the loss and metrics of its task."""

    weight: str = ""
    """Column of finite weights, 0 or more, that rows have in loss and metrics; empty: all weigh 1."""

    dense: tuple[str, ...] = ()
    """Glob patterns over numeric columns."""

    transforms: tuple[TransformConfig, ...] = ()
    """Rules for dense columns; a column that no rule matches is taken as it is, and a null in it is an error."""

    crosses: tuple[CrossConfig, ...] = ()
    """Features made of others, for tables to name; of lists every combination of a row's ids."""

    timestamp: str = ""
    """Integer (seconds) or timestamp column: the clock of ``expire_unit = "seconds"``; empty for none."""

    user: str = ""
    """Integer or string column that groups rows for GAUC; empty for none."""

    probability: str = ""
    """Column with the generating probability of made data; reported beside the test metrics as the best possible."""

    global_batch_size: int = 4096
    """Rows per step over all ranks; each rank takes an equal part."""

    streams: int = 8
    """Equal spans that an epoch is cut into; a multiple of every world size that the run will see."""

    epochs: int = 1
    """Times that every row is trained on."""

    shuffle: bool = True
    """Permute row groups, and rows inside them, anew each epoch."""

    prefetch_batches: int = 4
    """Batches that are decoded and mapped ahead of the training thread."""

    def __post_init__(self) -> None:
        require(bool(self.train), "train is empty, expected at least one file or pattern")
        for name in ("train", "validation", "test"):
            for pattern in getattr(self, name):
                refuse_secrets(pattern, name)
        require(bool(self.labels), "labels is empty, expected at least one column of 0 and 1")
        require(len(set(self.labels)) == len(self.labels), f"labels is {list(self.labels)}, expected each column once")
        names = [cross.name for cross in self.crosses]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"crosses: two have the name {', '.join(twice)}; rename one")
        require(1 <= self.streams <= 1 << 16, f"streams is {self.streams}, expected 1 to 2**16")
        require(self.epochs >= 1, f"epochs is {self.epochs}, expected 1 or more")
        require(self.prefetch_batches >= 1, f"prefetch_batches is {self.prefetch_batches}, expected 1 or more")
        require(
            self.global_batch_size <= LARGEST_BATCH,
            f"global_batch_size is {self.global_batch_size}, expected at most {LARGEST_BATCH}",
        )
        nearest = max(1, round(self.global_batch_size / self.streams)) * self.streams
        require(
            self.global_batch_size > 0 and self.global_batch_size % self.streams == 0,
            f"global_batch_size is {self.global_batch_size}, expected a multiple of streams = {self.streams}, "
            f"such as {nearest}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardingConfig:
    """What the planner may count on."""

    memory_gib: float = 0.0
    """Memory for tables per rank; 0 takes an equal part of what the host or device has."""

    pack: bool = True
    """Put tables that allow it side by side in one physical table; changes no result and no name."""

    host_kernels: bool = True
    """On the CPU, look up and update by this project's kernels; false leaves both to FBGEMM. Equal to rounding."""

    kernels: tuple[Literal["fused", "fused_uvm_caching", "fused_uvm"], ...] = ()
    """FBGEMM kernels that the planner may choose from: tables in device memory, or on the host with a cache there, or
    without. Empty: the first two on CUDA. The CPU has the first only."""

    quantized_communication: Literal["none", "fp16", "bf16"] = "none"
    """What rows and their gradients are rounded to on their way between ranks; sums and tables stay float32."""

    def __post_init__(self) -> None:
        require(0 <= self.memory_gib < math.inf, f"memory_gib is {self.memory_gib}, expected 0 or more")
        twice = len(set(self.kernels)) < len(self.kernels)
        require(not twice, f"kernels is {list(self.kernels)}, expected each kernel once")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run's result, and where it goes."""

    data: DataConfig
    tables: tuple[TableConfig, ...]
    model: dict[str, Any]
    """``kind`` and that model's options; see ``models.MODELS``."""

    seed: int = 0
    """Decides the order of rows, first values and dropout."""

    output: str = "runs/default"
    """Folder of checkpoints, metrics and plan; a run whose folder exists resumes from it."""

    max_steps: int = 0
    """Steps after which training ends; 0 goes to the end of the epochs."""

    segment_steps: int = 100
    """Steps between safe points: report, grow tables, checkpoint, evaluate."""

    loss: LossConfig = field(default_factory=LossConfig)
    dense_optimizer: DenseOptimizerConfig = field(default_factory=DenseOptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    rename: dict[str, str] = field(default_factory=dict)
    """Old name -> public name, for ``import``: what a state dict calls otherwise. Changes nothing else."""

    def __post_init__(self) -> None:
        require(bool(self.output), "output is empty, expected the name of a folder")
        refuse_secrets(self.output, "output")
        require(bool(self.tables), "tables is empty, expected at least one [[tables]] section")
        require(self.max_steps >= 0, f"max_steps is {self.max_steps}, expected 0 or more")
        require(self.segment_steps >= 1, f"segment_steps is {self.segment_steps}, expected 1 or more")
        require(-(1 << 63) <= self.seed < 1 << 63, f"seed is {self.seed}, expected a 64-bit integer")
        require(isinstance(self.model.get("kind"), str), "model.kind is missing, expected the name of a model")
        names = [table.key for table in self.tables]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"tables: two tables have the public name {', '.join(twice)}; rename one")
        dims = {table.dim for table in self.tables if table.role == "embedding"}
        require(
            len(dims) <= 1,
            f"tables: role 'embedding' has dims {sorted(dims)}; one [B, F, D] needs the same dim in all of them",
        )
        for number, table in enumerate(self.tables):
            require(
                not table.expire_after or table.expire_unit == "steps" or bool(self.data.timestamp),
                f"tables[{number}].expire_unit is 'seconds', which needs data.timestamp, the column of times",
            )
        require(
            self.evaluation.metric != "gauc" or bool(self.data.user),
            "evaluation.metric is 'gauc', which needs data.user, the column of users",
        )
        if self.evaluation.patience:
            require(bool(self.data.validation), "evaluation.patience needs data.validation to be scored")
        labels, task = self.data.labels, self.evaluation.task
        self.loss.check_labels(labels)
        require(
            not task or task in labels,
            f"evaluation.task is {task!r}, expected one of data.labels: {', '.join(labels)}",
        )
        longest = sorted({table.max_length for table in self.tables if table.sequences})
        require(
            len(longest) <= 1,
            f"tables: those with sequences, which are read side by side, have max_length {longest}; give all the same",
        )


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The run description as plain TOML/JSON data, every default filled in and absent values left out."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            return {name: plain(item) for name, item in pairs if item is not None}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return value

    result: dict[str, Any] = plain(config)
    return result
