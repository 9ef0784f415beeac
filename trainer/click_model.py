"""The known model behind the sample data: a click log whose every row is a pure function of (seed, row, time).

Output: Arrow record batches. Knows nothing of files. All randomness is a 64-bit hash of (seed, column, row) and every
effect one of (seed, field, id), so rows can be made in any order, in any number of pieces, on any number of threads,
and the click probability of a row can be computed again from its visible columns alone.

Shapes: N rows, L places of a list.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]

START_MS = 1_704_067_200_000
"""Time of the first row: 2024-01-01T00:00:00Z."""
SPAN_MS = 30 * 24 * 3600 * 1000
"""The log covers thirty days, whatever its number of rows."""

CLICK_RATE = 0.25
CONVERSION_RATE = 0.2
"""Mean probability that a click converts, over all rows; among the clicks it differs a little."""
BEST_AUC = 0.84
"""What scoring by the generating probability reaches, up to chance; the spread of the logits is set by it."""
SHARES = {"linear": 0.46, "interaction": 0.5, "numeric": 0.015, "lists": 0.015, "items": 0.01}
"""Each component's share of the click logit's variance (the components are nearly independent of each other)."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PILOT_ROWS = 16_384


def mix64(words: U64) -> U64:
    """The splitmix64 finalizer, a bijection of 64-bit words (Steele, Lea and Flood, OOPSLA 2014, figure 17).

    >>> hex(mix64(np.array([0x9E3779B97F4A7C15], np.uint64))[0])
    '0xe220a8397b1dcdaf'
    """
    mixed = words ^ (words >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def salt(seed: int, column: str, purpose: str) -> np.uint64:
    """The 64-bit word that separates one use of the hash from all others: BLAKE2b of its name."""
    digest = hashlib.blake2b(f"{seed}/{column}/{purpose}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def uniform(words: U64) -> F64:
    """The words' upper 53 bits as numbers in [0, 1)."""
    return np.asarray((words >> np.uint64(11)) * 2.0**-53, np.float64)


def latent(words: U64) -> F64:
    """Each word's four 16-bit parts as coordinates, uniform in [-1, 1): float64 [N, 4]."""
    parts = words.astype("<u8", copy=False).view("<i2").reshape(*words.shape, 4)
    return np.asarray(parts * 2.0**-15, np.float64)


def bell(words: U64) -> F64:
    """A nearly normal number of mean 0 and variance 1 from each word: the sum of its four uniform parts.

    The sum is exact (multiples of 2**-15), so the order in which BLAS takes the parts does not show.
    """
    return np.asarray((latent(words) @ np.ones(4)) * np.sqrt(0.75), np.float64)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The ids of one id space: Zipf-distributed over ``ids`` ranks, of which all but the head are renewed in time.

    A rank below ``head`` means the same id for the whole log. Behind it, each rank turns to a new id ``renewals``
    times in the course of the log, each at its own moments, so that every file has ids that none before it had.
    """

    name: str
    ids: int
    exponent: float = 1.1
    renewals: float = 0.0
    head: int = 64

    def draw(self, seed: int, words: U64, time: F64) -> U64:
        """The ids that the uniform 64-bit ``words`` choose at ``time`` (0 is the log's start, 1 its end)."""
        ranks = self._ranks(uniform(words))
        if self.renewals:
            phase = uniform(mix64(ranks * _GOLDEN + salt(seed, self.name, "renewal")))
            generation = np.floor(self.renewals * time + phase).astype(np.int64).view(np.uint64)
            ranks += np.where(ranks < self.head, np.uint64(0), generation * np.uint64(self.ids))
        return mix64(ranks * _GOLDEN + salt(seed, self.name, "id"))

    def _ranks(self, quantiles: F64) -> U64:
        """Ranks 0, 1, ... of probability proportional to the integral of x^-exponent over [rank + 1, rank + 2]."""
        power = 1.0 - self.exponent
        ranks = (1.0 + quantiles * ((self.ids + 1.0) ** power - 1.0)) ** (1.0 / power) - 1.0
        return np.minimum(ranks, self.ids - 1.0).astype(np.uint64)

    def weights(self, seed: int, ids: U64, purpose: str = "weight") -> F64:
        """The weight of each id, nearly normal, in the linear part that ``purpose`` names."""
        return bell(mix64(ids ^ salt(seed, self.name, purpose)))

    def vectors(self, seed: int, ids: U64) -> F64:
        """The latent vector of each id: float64 [..., 4]."""
        return latent(mix64(ids ^ salt(seed, self.name, "vector"))) + LATENT_MEAN


def _field(index: int) -> Vocabulary:
    """Field ``index`` of 47: 4 ids in f00, 7 in f20, 88 in f31, 2,103 in f37, 12.6 million in f46.

    Only few fields have a long tail, and little of their mass is in it: ids seen once teach noise.
    """
    ids = round(4 * 10 ** (6.5 * (index / 46) ** 4))
    return Vocabulary(f"f{index:02d}", ids) if ids <= 100 else Vocabulary(f"f{index:02d}", ids, 1.5, 2.0)


FIELDS = tuple(_field(index) for index in range(47))
INTERACTING = FIELDS[:16:2]
"""Fields of few ids (4 to 5), so that every pair of ids is seen often."""
LATENT_MEAN = 0.3
"""Away from 0, which moves a part of the interaction into what a linear model can learn."""
CONVERTING = FIELDS[:12]
USERS = Vocabulary("user_id", 500_000, exponent=0.8)
ITEMS = Vocabulary("item_id", 20_000, exponent=1.05, renewals=2.0)
LISTS = (Vocabulary("m00", 40), Vocabulary("m01", 20_000, renewals=2.0))
LIST_LENGTH = 5
HISTORY_LENGTH = 20
NO_HISTORY = 16
"""One user in so many is not logged in: the history is null."""


@dataclass(frozen=True, slots=True)
class Numeric:
    """A numeric column: exp of a normal number, as its Arrow type rounds it; ``signed`` keeps the normal number."""

    name: str
    type: pa.DataType
    spread: float
    nulls: float = 0.0
    signed: bool = False

    def draw(self, seed: int, rows: U64) -> tuple[pa.Array, F64]:
        """The column for these row numbers, and its values as float64 with NaN for null."""
        values = self.spread * bell(mix64(rows * _GOLDEN + salt(seed, self.name, "value")))
        values = values if self.signed else np.exp(values)
        values = values.astype(self.type.to_pandas_dtype())
        quantiles = uniform(mix64(rows * _GOLDEN + salt(seed, self.name, "null")))
        missing = quantiles < self.nulls
        return pa.array(values, self.type, mask=missing), np.where(missing, np.nan, values.astype(np.float64))


NUMERICS = (
    *(Numeric(f"d{i:02d}", pa.float32(), 1.0) for i in range(4)),
    *(Numeric(f"d{i:02d}", pa.float64(), 3.0, signed=True) for i in range(4, 6)),
    *(Numeric(f"d{i:02d}", pa.int32(), 1.5) for i in range(6, 9)),
    Numeric("d09", pa.int64(), 4.0),
    Numeric("d10", pa.float32(), 1.0, nulls=0.1),
    Numeric("d11", pa.float32(), 2.0, nulls=0.4),
    Numeric("d12", pa.int32(), 1.5, nulls=0.25),
)


def numeric_effect(values: Sequence[F64]) -> F64:
    """Sum over the numeric columns of tanh(sign(x) log(1 + |x|)), with alternating sign; a null adds nothing."""
    total = np.zeros(len(values[0]))
    for index, column in enumerate(values):
        effect = np.tanh(np.copysign(np.log1p(np.abs(column)), column))
        total += np.where(np.isnan(column), 0.0, effect) * (-1.0) ** index
    return total


def interaction(vectors: Sequence[F64]) -> F64:
    """Sum of pairwise dot products, the interaction of a factorization machine (Rendle, ICDM 2010, lemma 3.1)."""
    total = np.sum(vectors, axis=0)
    squares = np.sum([vector * vector for vector in vectors], axis=0)
    return 0.5 * (total * total - squares).sum(axis=1)


@dataclass(frozen=True, slots=True)
class _Lists:
    """A list column before Arrow: ids uint64 [N, L], of which ``kept`` bool [N, L]; ``null`` bool [N]."""

    ids: U64
    kept: npt.NDArray[np.bool_]
    null: npt.NDArray[np.bool_]

    def mean(self, values: F64) -> F64:
        """The mean over each row's kept places of ``values`` [N, L, ...]; 0 where there are none."""
        kept = self.kept.reshape(*self.kept.shape, *[1] * (values.ndim - 2))
        counts = np.maximum(kept.sum(axis=1), 1)
        return np.asarray((values * kept).sum(axis=1) / counts)

    def column(self) -> pa.Array:
        """The rows as list<int64>."""
        offsets = np.zeros(len(self.ids) + 1, np.int32)
        np.cumsum(self.kept.sum(axis=1), out=offsets[1:])
        values = self.ids.view(np.int64)[self.kept]
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=pa.array(self.null))


def _draw_list(vocabulary: Vocabulary, seed: int, rows: U64, time: F64) -> _Lists:
    """A multi-valued field: zero to five ids, one row in sixteen null."""
    words = mix64(rows * _GOLDEN + salt(seed, vocabulary.name, "length"))
    null = words >> np.uint64(60) == 0
    lengths = np.where(null, 0, (words % np.uint64(LIST_LENGTH + 1)).astype(np.int64))
    places: U64 = np.add.outer(rows * np.uint64(LIST_LENGTH), np.arange(LIST_LENGTH, dtype=np.uint64))
    draws = mix64(places * _GOLDEN + salt(seed, vocabulary.name, "draw"))
    ids = vocabulary.draw(seed, draws, np.broadcast_to(time[:, None], draws.shape))
    return _Lists(ids, np.arange(LIST_LENGTH) < lengths[:, None], null)


def _draw_history(seed: int, users: U64, time: F64) -> _Lists:
    """The last items of each row's user at that time, oldest first.

    A user has one endless sequence of items, a function of the user and the place in it, and moves along it at a
    steady pace of up to 40 items in the course of the log: two rows of one user show windows of the same sequence.
    """
    words = mix64(users ^ salt(seed, "history", "user"))
    null = words % np.uint64(NO_HISTORY) == 0
    pace = 1.0 + np.floor(40.0 * uniform(words))
    joined = 1.0 - 2.0 * uniform(mix64(words))  # half of the users had a history when the log began
    seen = np.maximum(np.floor(pace * (time - joined)), 0.0).astype(np.int64)
    lengths = np.where(null, 0, np.minimum(seen, HISTORY_LENGTH))
    places = (seen - lengths)[:, None] + np.arange(HISTORY_LENGTH)
    draws = mix64(users[:, None] + places.astype(np.uint64) * _GOLDEN + salt(seed, "history", "draw"))
    then = joined[:, None] + places / pace[:, None]
    return _Lists(ITEMS.draw(seed, draws, then), np.arange(HISTORY_LENGTH) < lengths[:, None], null)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Visible columns and, computed from them, the components of the logits before scaling."""

    columns: dict[str, pa.Array]
    components: dict[str, F64]
    conversion: F64


def _draw_rows(seed: int, rows: U64, time: F64) -> _Rows:
    """Everything about these rows but their labels."""

    def draw(vocabulary: Vocabulary) -> U64:
        words = mix64(rows * _GOLDEN + salt(seed, vocabulary.name, "draw"))
        return vocabulary.draw(seed, words, time)

    users, items = draw(USERS), draw(ITEMS)
    columns = {"user_id": _int64(users), "item_id": _int64(items)}
    linear = np.zeros(len(rows))
    conversion = np.zeros(len(rows))
    vectors = []
    for index, field in enumerate(FIELDS):
        ids = draw(field)
        columns[field.name] = _int64(ids)
        linear += np.exp(-index / 12) * field.weights(seed, ids)
        if field in INTERACTING:
            vectors.append(field.vectors(seed, ids))
        if field in CONVERTING:
            conversion += field.weights(seed, ids, "conversion")
    numerics = [numeric.draw(seed, rows) for numeric in NUMERICS]
    columns |= {numeric.name: column for numeric, (column, _) in zip(NUMERICS, numerics, strict=True)}
    lists = np.zeros(len(rows))
    for vocabulary in LISTS:
        drawn = _draw_list(vocabulary, seed, rows, time)
        columns[vocabulary.name] = drawn.column()
        lists += drawn.mean(vocabulary.weights(seed, drawn.ids))
    history = _draw_history(seed, users, time)
    columns["history"] = history.column()
    interest = history.mean(ITEMS.vectors(seed, history.ids))
    liking = 2.0 * (ITEMS.vectors(seed, items) * interest).sum(axis=1)
    components = {
        "linear": linear,
        "interaction": interaction(vectors),
        "numeric": numeric_effect([values for _, values in numerics]),
        "lists": lists,
        "items": ITEMS.weights(seed, items) + liking,
    }
    return _Rows(columns, components, conversion)


def _int64(words: U64) -> pa.Array:
    return pa.array(words.view(np.int64))


def _weighted(components: dict[str, F64], scales: dict[str, float]) -> F64:
    return np.sum([scales[name] * components[name] for name in SHARES], axis=0)


def _sigmoid(logits: F64) -> F64:
    return 0.5 * (1.0 + np.tanh(0.5 * logits))


def _bisect(rises: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where the rising function ``rises`` crosses ``target`` between ``low`` and ``high``."""
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rises(middle) < target else (low, middle)
    return low


def _bias(logits: F64, rate: float) -> float:
    """What to add to ``logits`` for the mean of their sigmoids to be ``rate``."""
    return _bisect(lambda bias: float(_sigmoid(logits + bias).mean()), rate, -50.0, 50.0)


def expected_auc(probabilities: F64) -> float:
    """The AUC to expect of rows whose labels are drawn with these probabilities and which are ranked by them.

    >>> round(expected_auc(np.array([0.25, 0.75])), 3)
    0.9
    """
    ranked = np.sort(probabilities)
    below = np.cumsum(1.0 - ranked) - (1.0 - ranked)
    pairs = ranked.sum() * (1.0 - ranked).sum() - (ranked * (1.0 - ranked)).sum()
    return float((ranked * below).sum() / pairs)


def _spread(logits: F64) -> float:
    """What to multiply ``logits`` by for the best possible AUC at the click rate to be ``BEST_AUC``."""

    def best(spread: float) -> float:
        return expected_auc(_sigmoid(spread * logits + _bias(spread * logits, CLICK_RATE)))

    return _bisect(best, BEST_AUC, 0.0, 10.0)


@dataclass(frozen=True, slots=True)
class ClickModel:
    """The model of one seed: what the hash leaves open are the scales and biases, set on rows outside the log."""

    seed: int
    scales: dict[str, float]
    bias: float
    conversion_scale: float
    conversion_bias: float

    @classmethod
    def of_seed(cls, seed: int) -> "ClickModel":
        """The model that has the rates, the best AUC and the shares that the constants above say."""
        numbers = np.arange(_PILOT_ROWS, dtype=np.uint64)
        rows = _draw_rows(seed, numbers + np.uint64(1 << 62), numbers / _PILOT_ROWS)
        scales = {name: float(np.sqrt(SHARES[name]) / rows.components[name].std()) for name in SHARES}
        spread = _spread(_weighted(rows.components, scales))
        scales = {name: spread * scale for name, scale in scales.items()}
        conversion_scale = 1.0 / float(rows.conversion.std())
        return cls(
            seed,
            scales,
            _bias(_weighted(rows.components, scales), CLICK_RATE),
            conversion_scale,
            _bias(conversion_scale * rows.conversion, CONVERSION_RATE),
        )

    def rows(self, first: int, last: int, total: int) -> pa.RecordBatch:
        """Rows ``first`` (included) to ``last`` (not included) of the log of ``total`` rows.

        ``probability`` is that of a click, ``conversion_probability`` that of a conversion, which needs a click.
        """
        numbers = np.arange(first, last, dtype=np.uint64)
        time = numbers / float(total)
        rows = _draw_rows(self.seed, numbers, time)
        click = _sigmoid(self.bias + _weighted(rows.components, self.scales))
        after_click = _sigmoid(self.conversion_bias + self.conversion_scale * rows.conversion)
        clicked = self._happens("click", numbers, click)
        converted = clicked & self._happens("conversion", numbers, after_click)
        stamps = START_MS + (time * SPAN_MS).astype(np.int64)
        return pa.RecordBatch.from_pydict(
            {
                "click": pa.array(clicked.astype(np.int8)),
                "conversion": pa.array(converted.astype(np.int8)),
                "timestamp": pa.array(stamps).cast(pa.timestamp("ms", tz="UTC")),
                **rows.columns,
                "probability": pa.array(click),
                "conversion_probability": pa.array(click * after_click),
            }
        )

    def _happens(self, label: str, numbers: U64, probability: F64) -> npt.NDArray[np.bool_]:
        return uniform(mix64(numbers * _GOLDEN + salt(self.seed, label, "draw"))) < probability
