"""Which places of ``embeddings_BFD`` a part of a model reads, from the names of tables and features.

Shapes: B rows, F fields, D dim.
"""

from collections.abc import Sequence

from torch import Tensor

from models import options
from models.model import Field


def places_of_tables(option: str, tables: Sequence[str], fields: Sequence[Field]) -> list[int]:
    """The places of all fields of ``tables``, in order.

    Raises:
        ValueError: ``tables`` is no list of names, or there is no such table; the message names ``option``.

    >>> places_of_tables("deep_tables", ["b"], [Field("a", "item"), Field("b", "item"), Field("b", "user")])
    [1, 2]
    """
    options.names(option, tables, dict.fromkeys(field.table for field in fields))
    return [place for place, field in enumerate(fields) if field.table in tables]


def places_of(option: str, features: Sequence[str], fields: Sequence[Field], among: Sequence[int]) -> list[int]:
    """The places of ``features``, in the order of the fields, of those in ``among``.

    Raises:
        ValueError: ``features`` is no list of names, or there is no such feature; the message names ``option``.

    >>> places_of("gate1", ["user"], [Field("a", "item"), Field("a", "user")], [0, 1])
    [1]
    """
    named = {place: fields[place].feature for place in among if place < len(fields)}
    options.names(option, features, dict.fromkeys(named.values()))
    return [place for place, feature in named.items() if feature in features]


def take(embeddings_BFD: Tensor, places: Sequence[int] | None) -> Tensor:
    """The fields at ``places``, [B, len(places), D]; all where it is None, and a view where they are neighbours."""
    if places is None:
        return embeddings_BFD
    begin = places[0] if places else 0
    if [*places] == [*range(begin, begin + len(places))]:
        return embeddings_BFD[:, begin : begin + len(places)]
    return embeddings_BFD[:, [*places]]
