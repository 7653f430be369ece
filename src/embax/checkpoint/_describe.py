"""Specs as they are kept in a checkpoint, and the comparison of those with the specs it is loaded for."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embax._specs import TableSpec
from embax._stacking.plan import feature_leaves
from embax.checkpoint._errors import CheckpointError


def _as_json(value: Any) -> Any:
    """A number, string or None as it is; a function, such as a schedule, as a tag that names it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return {"function" if callable(value) else "object": name}


def row_wise_names(optimizer: Mapping[str, Any]) -> list[str]:
    """Names of the slots of one value a row, from what a checkpoint says about an optimizer; the first ones said nothing."""
    return optimizer.get("row_wise_slots", [])


def describe_table(table: TableSpec) -> dict[str, Any]:
    """What a checkpoint says about a table."""
    optimizer = table.optimizer
    fields = {
        field.name: _as_json(getattr(optimizer, field.name)) for field in dataclasses.fields(optimizer) if field.repr
    }
    names = optimizer.slot_names
    row_wise = [name for name, one_value in zip(names, optimizer.row_wise_slots(), strict=True) if one_value]
    quantization = table.quantization_config
    return {
        "vocabulary_size": table.vocabulary_size,
        "embedding_dim": table.embedding_dim,
        "combiner": table.combiner,
        "quantization_config": None if quantization is None else dataclasses.asdict(quantization),
        "optimizer": {
            "class": type(optimizer).__name__,
            "slots": list(names),
            "row_wise_slots": row_wise,
            "fields": fields,
        },
    }


def describe_features(specs: Any, stored_names: Mapping[str, str]) -> list[dict[str, Any]]:
    """What a checkpoint says about features; `stored_names` maps the names of tables to those in the checkpoint."""
    return [
        {
            "name": feature.name,
            "table": stored_names[feature.table_spec.name],
            "input_shape": list(feature.input_shape),
            "output_shape": list(feature.output_shape),
        }
        for feature in feature_leaves(specs)
    ]


def _optimizer_text(optimizer: dict[str, Any]) -> str:
    row_wise = row_wise_names(optimizer)
    slots = [f"{slot}, one value a row" if slot in row_wise else slot for slot in optimizer["slots"]]
    return f"{optimizer['class']} (slots: {'; '.join(slots) or 'none'})"


def check_tables(path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Checks that the tables of a checkpoint are those of the specs, whatever their hyperparameters and placement.

    Raises:
        CheckpointError: names a table that differs, what is stored and what the specs say.
    """
    for name in asked:
        if name not in stored:
            raise CheckpointError(
                f"Checkpoint {path}: table {name!r} of the specs is not in it; it holds {sorted(stored)}. Load it "
                "with the specs that it was saved with."
            )
    for name in stored:
        if name not in asked:
            raise CheckpointError(
                f"Checkpoint {path} holds table {name!r}, which the specs do not have; they have {sorted(asked)}. "
                "Load it with the specs that it was saved with."
            )
    for name, table in asked.items():
        for field in ("vocabulary_size", "embedding_dim"):
            if stored[name][field] != table[field]:
                raise CheckpointError(
                    f"Checkpoint {path}: table {name!r} is stored with {field}={stored[name][field]}, and the specs "
                    f"say {table[field]}. Give its TableSpec {field}={stored[name][field]}."
                )
        before, now = stored[name]["optimizer"], table["optimizer"]
        if any(before[key] != now[key] for key in ("class", "slots")) or row_wise_names(before) != row_wise_names(now):
            raise CheckpointError(
                f"Checkpoint {path}: table {name!r} is stored with the optimizer {_optimizer_text(before)}, and the "
                f"specs say {_optimizer_text(now)}. Give its TableSpec an {before['class']}; its hyperparameters may "
                "differ."
            )
