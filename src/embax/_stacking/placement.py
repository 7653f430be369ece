"""Where tables and features come to lie: computed and checked on copies of the specs, then written to the specs at once."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from embax._checks import INT32_MAX, next_multiple, positive_int
from embax._specs import (
    FeatureIdTransformation,
    FeatureSpec,
    StackedTableSpec,
    TableSettingInStack,
    TableSpec,
    note_change,
)
from embax._stacking.plan import any_features, feature_leaves, sample_count
from embax._topology import num_sparsecores_per_device

SUBLANES = 8
"""Rows of tables on a SparseCore, columns, and entries of partitions are padded to multiples of this."""

MAX_SPARSECORES = 2**16
"""SparseCores of all devices together: a packed batch has a row pointer for each pair of a local and any SparseCore."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """What tables are placed for."""

    num_devices: int
    sparsecores_per_device: int

    @classmethod
    def checked(
        cls,
        caller: str,
        tables: Mapping[str, TableSpec],
        global_device_count: int | None,
        num_sc_per_device: int | None,
    ) -> "Topology":
        """From the arguments of a public function.

        None means the count of the tables that are placed already; if none is, one device, and its own SparseCores.

        Raises:
            ValueError: a count is not positive, or is not that of the tables that are placed already; these were placed for
                different topologies; or there are too many SparseCores.
        """
        given = {"global_device_count": global_device_count, "num_sc_per_device": num_sc_per_device}
        asked = [count if count is None else positive_int(caller, name, count) for name, count in given.items()]
        placed: dict[tuple[int, int], str] = {}
        for name, table in tables.items():
            if table.is_stacked():
                stack = table.stacked_table_spec
                placed.setdefault((stack.num_devices, stack.num_sparsecores_per_device), name)
        if len(placed) > 1:
            examples = ", ".join(f"table {name!r} for {counts}" for counts, name in placed.items())
            raise ValueError(
                f"{caller}: the tables were placed for different (devices, SparseCores a device): {examples}; make new specs, "
                "and place all of them for one."
            )
        if placed:
            ((counts, name),) = placed.items()
            wanted = tuple(old if new is None else new for new, old in zip(asked, counts, strict=True))
            if wanted != counts:
                raise ValueError(
                    f"{caller}: table {name!r} was placed for (devices, SparseCores a device) {counts} and is now asked for on "
                    f"{wanted}; leave global_device_count and num_sc_per_device out to keep {counts}, or make new specs for "
                    "another topology."
                )
            return cls(*counts)
        devices, sparsecores = asked
        topology = cls(
            1 if devices is None else devices, num_sparsecores_per_device() if sparsecores is None else sparsecores
        )
        if topology.num_sparsecores > MAX_SPARSECORES:
            raise ValueError(
                f"{caller}: global_device_count={topology.num_devices} devices of "
                f"num_sc_per_device={topology.sparsecores_per_device} SparseCores are {topology.num_sparsecores} SparseCores, "
                f"above the limit of {MAX_SPARSECORES} in all; lower one of the two."
            )
        return topology

    @property
    def num_sparsecores(self) -> int:
        """SparseCores of all devices."""
        return self.num_devices * self.sparsecores_per_device

    def padded_rows(self, table: TableSpec) -> int:
        """Rows of a table in a stack, all SparseCores together."""
        return next_multiple(table.vocabulary_size, SUBLANES * self.num_sparsecores)


def padded_dim(table: TableSpec) -> int:
    """Columns of a table in a stack of its own."""
    return next_multiple(table.embedding_dim, SUBLANES)


def features_of(leaves: Iterable[FeatureSpec], tables: Iterable[TableSpec]) -> list[FeatureSpec]:
    """The features, among some, that look up in these tables."""
    names = {table.name for table in tables}
    return [leaf for leaf in leaves if leaf.table_spec.name in names]


def copied_features(specs: Any) -> list[FeatureSpec]:
    """Copies of the features of a tree over copies of their tables, to be placed without touching the originals.

    Fields may be set until a spec is placed, so those of specs that are not placed are checked and normalized again, in the
    copies. Placed ones stay as they are to the object: packers are kept by the identity of fields.

    Raises:
        ValueError: as the constructors of the specs; a leaf is no feature; or two have one name.
    """
    tables: dict[int, TableSpec] = {}
    copies = []
    for leaf in any_features(specs):
        feature, table = copy.copy(leaf), leaf.table_spec
        if isinstance(table, TableSpec):
            if id(table) not in tables:
                tables[id(table)] = copy.copy(table)
                if not table.is_stacked():
                    tables[id(table)].__post_init__()
            vars(feature)["table_spec"] = tables[id(table)]
        if leaf._id_transformation is None:
            feature.__post_init__()
        copies.append(feature)
    return feature_leaves(copies)


def commit(specs: Any, copies: Sequence[FeatureSpec]) -> None:
    """Writes what `copies`, of `copied_features(specs)`, hold by now to the specs themselves."""
    for leaf, copied in zip(any_features(specs), copies, strict=True):
        vars(leaf.table_spec).update(vars(copied.table_spec))
        vars(leaf).update(vars(copied) | {"table_spec": leaf.table_spec})
    note_change()


def place(
    name: str,
    tables: Sequence[TableSpec],
    features: Sequence[FeatureSpec],
    topology: Topology,
    rotation: int,
    **limits: Any,
) -> None:
    """Makes one stack of `tables`, whose samples are those of `features` in the order given; fills the specs in place."""
    first, num_sparsecores = tables[0], topology.num_sparsecores
    rows = sum(map(topology.padded_rows, tables))
    if rows > INT32_MAX:
        raise ValueError(
            f"Stack {name!r}: {sum(table.vocabulary_size for table in tables)} rows are {rows} when padded for "
            f"{topology.num_devices} devices of {topology.sparsecores_per_device} SparseCores, above the limit of {INT32_MAX}; "
            "split the table, or stack fewer tables."
        )
    stack = StackedTableSpec(
        stack_name=name,
        stack_vocab_size=rows,
        stack_embedding_dim=max(map(padded_dim, tables)),
        optimizer=first.optimizer,
        combiner=first.combiner,
        total_sample_count=sum(map(sample_count, features)),
        quantization_config=first.quantization_config,
        num_devices=topology.num_devices,
        num_sparsecores_per_device=topology.sparsecores_per_device,
        **limits,
    )
    settings, row_offset = {}, 0
    for number, table in enumerate(tables):
        settings[table.name] = TableSettingInStack(
            stack_name=name,
            padded_vocab_size=topology.padded_rows(table),
            padded_embedding_dim=stack.stack_embedding_dim,
            row_offset_in_shard=row_offset // num_sparsecores,
            shard_rotation=number * rotation % num_sparsecores,
        )
        row_offset += topology.padded_rows(table)
    sample_offset = 0
    for feature in features:
        setting = settings[feature.table_spec.name]
        feature.table_spec._setting_in_stack = setting
        feature.table_spec._stacked_table_spec = stack
        feature._id_transformation = FeatureIdTransformation(
            row_offset=sample_offset,
            col_offset=setting.row_offset_in_shard * num_sparsecores,
            col_shift=setting.shard_rotation,
        )
        sample_offset += sample_count(feature)
