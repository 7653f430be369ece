"""Specs of tables, features and optimizers."""

import abc
import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from embax import optimizers
from embax._specs import DEFAULT_ACTIVATION_MEM_BYTES_LIMIT as DEFAULT_ACTIVATION_MEM_BYTES_LIMIT
from embax._specs import FeatureIdTransformation as FeatureIdTransformation
from embax._specs import QuantizationConfig as QuantizationConfig
from embax._specs import TableSettingInStack as TableSettingInStack
from embax._specs import refuse_after_placement
from embax.compat._learning_rate import as_reference, learning_rate_at
from embax.optimizers import AdagradMomentumSlotVariables as AdagradMomentumSlotVariables
from embax.optimizers import AdagradSlotVariables as AdagradSlotVariables
from embax.optimizers import AdamSlotVariables as AdamSlotVariables
from embax.optimizers import F2ASlotVariables as F2ASlotVariables
from embax.optimizers import FTRLSlotVariables as FTRLSlotVariables
from embax.optimizers import LaPropSlotVariables as LaPropSlotVariables
from embax.optimizers import SGDSlotVariables as SGDSlotVariables

LearningRate: TypeAlias = float | Callable[..., Any]
HyperParameterType: TypeAlias = Callable[[], jax.Array] | float
CallableTableInitializer: TypeAlias = Callable[..., jax.Array]

_PRIMITIVES = "embax.compat.sparsecore.lib.core.primitives"


class CallablePlaceholder:
    """Stands for a function that only its tag is known of. Equal and hashed by the tag.

    Raises:
        RuntimeError: it is called.
    """

    def __init__(self, tag: str):
        self.tag = tag

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises a RuntimeError."""
        raise RuntimeError(
            f"CallablePlaceholder {self.tag!r} was called; it only stands for a function that could not be stored. Replace it "
            "with that function."
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CallablePlaceholder) and self.tag == other.tag

    def __hash__(self) -> int:
        return hash((CallablePlaceholder, self.tag))

    def __repr__(self) -> str:
        return f"CallablePlaceholder({self.tag!r})"


@dataclasses.dataclass(frozen=True)
class OptimizerSpec(abc.ABC):
    """An optimizer: hyperparameters, slots and, by `as_embax`, the row rule. Equal by type and fields.

    Args:
        learning_rate: a number, a function of no argument, or of the step.
    """

    learning_rate: LearningRate

    _float_params: ClassVar[tuple[str, ...]] = ()
    _bool_params: ClassVar[tuple[str, ...]] = ()
    _of_embax: ClassVar[type[optimizers.OptimizerSpec]]
    _primitive: ClassVar[str]

    def __post_init__(self) -> None:
        if isinstance(self.learning_rate, (np.ndarray, np.generic, jax.Array)) and np.ndim(self.learning_rate) == 0:
            object.__setattr__(self, "learning_rate", float(self.learning_rate))  # Arrays have no hash.

    def as_embax(self) -> optimizers.OptimizerSpec:
        """The optimizer that runs.

        Raises:
            ValueError: a field is not what the optimizer allows.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return as_reference(self._of_embax)(**fields)

    def get_learning_rate(self, step: int | jax.Array | None = None) -> jax.Array:
        """The learning rate as a float32 scalar.

        Args:
            step: the number of the step, traced or not; needed where the learning rate is a function of it.

        Raises:
            ValueError: the step is needed and None, or the learning rate needs more arguments.
        """
        return learning_rate_at(type(self).__name__, self.learning_rate, step)

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """The scalars that the primitive takes behind the gradient, the learning rate first."""
        return (self.get_learning_rate(step),)

    def slot_variables_initializers(self) -> Any:
        """The initializers of the slots, in a NamedTuple."""
        return self.as_embax().slot_variables_initializers()

    def slot_variables_count(self) -> int:
        """The number of slots."""
        return len(self.slot_variables_initializers())

    def get_optimizer_primitive(self) -> Any:
        """The primitive of `lib.core.primitives` that updates a table."""
        module = importlib.import_module(f"{_PRIMITIVES}.{self._primitive}")
        return getattr(module, f"tpu_{self._primitive}_primitive")

    @abc.abstractmethod
    def short_name(self) -> str:
        """A short lower case name."""

    def get_float_params(self) -> dict[str, float]:
        """The fields that are numbers, but for the learning rate."""
        return {name: getattr(self, name) for name in self._float_params}

    def get_bool_params(self) -> dict[str, bool]:
        """The fields that are bools."""
        return {name: getattr(self, name) for name in self._bool_params}

    @classmethod
    def from_float_and_bool_params(
        cls, float_params: Mapping[str, float], bool_params: Mapping[str, bool], learning_rate: LearningRate
    ) -> "OptimizerSpec":
        """A spec of this class from what `get_float_params` and `get_bool_params` return; what is missing has its default."""
        return cls(learning_rate=learning_rate, **dict(float_params), **dict(bool_params))


@dataclasses.dataclass(frozen=True)
class CustomOptimizerSpec(OptimizerSpec):
    """An optimizer with a row rule of the user: a function, or StableHLO text, which has precedence.

    See `embax.CustomOptimizerSpec`. One without a rule can be made, but updates no table.
    """

    learning_rate: LearningRate = 0.001
    custom_computation_fn: Callable[..., Any] | None = None
    stablehlo: str | bytes | None = None
    slot_variable_initializers_tuple: Sequence[CallableTableInitializer] = ()
    short_name_str: str = "custom"

    _of_embax: ClassVar = optimizers.CustomOptimizerSpec
    _primitive: ClassVar = "sparse_dense_matmul_optimizer_grad"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.slot_variable_initializers_tuple, list):
            object.__setattr__(self, "slot_variable_initializers_tuple", tuple(self.slot_variable_initializers_tuple))

    def slot_variables_initializers(self) -> Any:  # noqa: D102
        return self.slot_variable_initializers_tuple

    def short_name(self) -> str:  # noqa: D102
        return self.short_name_str

    @classmethod
    def lower_to_stablehlo(
        cls,
        custom_computation_fn: Callable[..., Any],
        embedding_dim: int = 1,
        num_slot_variables: int = 0,
        num_hyperparameters: int = 1,
        min_value: float | None = None,
        max_value: float | None = None,
    ) -> str:
        """See `embax.CustomOptimizerSpec.lower_to_stablehlo`."""
        return optimizers.CustomOptimizerSpec.lower_to_stablehlo(
            custom_computation_fn, embedding_dim, num_slot_variables, num_hyperparameters, min_value, max_value
        )

    @classmethod
    def wrap_stablehlo_with_limits(
        cls,
        stablehlo: str | bytes,
        embedding_dim: int,
        num_slot_variables: int,
        num_hyperparameters: int,
        min_value: float | None = None,
        max_value: float | None = None,
    ) -> str:
        """See `embax.CustomOptimizerSpec.wrap_stablehlo_with_limits`."""
        return optimizers.CustomOptimizerSpec.wrap_stablehlo_with_limits(
            stablehlo, embedding_dim, num_slot_variables, num_hyperparameters, min_value, max_value
        )


@dataclasses.dataclass(frozen=True)
class SGDOptimizerSpec(OptimizerSpec):
    """See `embax.SGDOptimizerSpec`."""

    learning_rate: LearningRate = 0.001

    _of_embax: ClassVar = optimizers.SGDOptimizerSpec
    _primitive: ClassVar = "sparse_dense_matmul_grad_with_sgd"

    def short_name(self) -> str:  # noqa: D102
        return "sgd"


@dataclasses.dataclass(frozen=True)
class AdagradOptimizerSpec(OptimizerSpec):
    """See `embax.AdagradOptimizerSpec`."""

    learning_rate: LearningRate = 0.001
    initial_accumulator_value: float = 0.1

    _float_params: ClassVar = ("initial_accumulator_value",)
    _of_embax: ClassVar = optimizers.AdagradOptimizerSpec
    _primitive: ClassVar = "sparse_dense_matmul_grad_with_adagrad"

    def short_name(self) -> str:  # noqa: D102
        return "adagrad"


@dataclasses.dataclass(frozen=True)
class AdamOptimizerSpec(OptimizerSpec):
    """See `embax.AdamOptimizerSpec`. Without a step it is at step 0."""

    learning_rate: LearningRate = 0.001
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8

    _float_params: ClassVar = ("beta_1", "beta_2", "epsilon")
    _of_embax: ClassVar = optimizers.AdamOptimizerSpec
    _primitive: ClassVar = "sparse_dense_matmul_grad_with_adam"

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """`alpha_t`, `beta_1`, `beta_2` and `epsilon_t`."""
        return self.as_embax().get_hyperparameters(step)

    def short_name(self) -> str:  # noqa: D102
        return "adam"


@dataclasses.dataclass(frozen=True)
class AdagradMomentumOptimizerSpec(OptimizerSpec):
    """See `embax.AdagradMomentumOptimizerSpec`."""

    learning_rate: LearningRate = 0.001
    momentum: float = 0.9
    beta2: float = 1.0
    epsilon: float = 1e-10
    exponent: float = 2.0
    use_nesterov: bool = False
    initial_accumulator_value: float = 0.1
    initial_momentum_value: float = 0.0

    _float_params: ClassVar = (
        *("momentum", "beta2", "epsilon", "exponent"),
        *("initial_accumulator_value", "initial_momentum_value"),
    )
    _bool_params: ClassVar = ("use_nesterov",)
    _of_embax: ClassVar = optimizers.AdagradMomentumOptimizerSpec
    _primitive: ClassVar = "sparse_dense_matmul_grad_with_adagrad_momentum"

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """The learning rate, `momentum`, `beta2`, `epsilon`, `exponent` and, as a bool, `use_nesterov`."""
        *scalars, _ = self.as_embax().get_hyperparameters(step)
        return *scalars, jnp.bool_(self.use_nesterov)

    def short_name(self) -> str:  # noqa: D102
        return "adagrad_momentum"


@dataclasses.dataclass(frozen=True)
class FTRLOptimizerSpec(OptimizerSpec):
    """See `embax.FTRLOptimizerSpec`."""

    learning_rate: LearningRate = 0.01
    learning_rate_power: float = -0.5
    l1_regularization_strength: float = 0.0
    l2_regularization_strength: float = 0.0
    beta: float = 0.0
    initial_accumulator_value: float = 0.1
    initial_linear_value: float = 0.0
    multiply_linear_by_learning_rate: bool = False

    _float_params: ClassVar = (
        *("learning_rate_power", "l1_regularization_strength", "l2_regularization_strength", "beta"),
        *("initial_accumulator_value", "initial_linear_value"),
    )
    _bool_params: ClassVar = ("multiply_linear_by_learning_rate",)
    _of_embax: ClassVar = optimizers.FTRLOptimizerSpec
    _primitive: ClassVar = "sparse_dense_matmul_grad_with_ftrl"

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """The learning rate, its power, `l1`, `l2` and `beta`."""
        return self.as_embax().get_hyperparameters(step)[:5]

    def short_name(self) -> str:  # noqa: D102
        return "ftrl"


@dataclasses.dataclass(frozen=True)
class LaPropOptimizerSpec(OptimizerSpec):
    """See `embax.LaPropOptimizerSpec`. `rms_clip_threshold` must be None."""

    learning_rate: LearningRate = 0.001
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-30
    rms_clip_threshold: float | None = None
    initial_slot_value: float = 0.0

    _float_params: ClassVar = ("b1", "b2", "eps", "initial_slot_value")
    _of_embax: ClassVar = optimizers.LaPropOptimizerSpec
    _primitive: ClassVar = "sparse_dense_matmul_grad_with_laprop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rms_clip_threshold is not None:
            self.as_embax()  # Says why not.

    def get_decay_rate(self, step: int | jax.Array | None = None) -> jax.Array:
        """The decay of `nu` at `step` as a float32 scalar; `b2` without a step."""
        optimizer: Any = self.as_embax()
        return optimizer.get_decay_rate(step)

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """The learning rate, `b1`, the decay and `eps`."""
        return self.as_embax().get_hyperparameters(step)

    def short_name(self) -> str:  # noqa: D102
        return "laprop"


@dataclasses.dataclass(frozen=True)
class F2AOptimizerSpec(OptimizerSpec):
    """See `embax.F2AOptimizerSpec`. Without a step it is at step 0."""

    learning_rate: LearningRate = 0.01
    rho: float = 0.5
    initial_accumulator_value: float = 0.1
    initial_local_step_value: float = 0.0
    l1_regularization_strength: float = 0.0
    l2_regularization_strength: float = 0.0
    max_lr_multiplier: float = 1e6

    _float_params: ClassVar = (
        *("rho", "initial_accumulator_value", "initial_local_step_value"),
        *("l1_regularization_strength", "l2_regularization_strength", "max_lr_multiplier"),
    )
    _of_embax: ClassVar = optimizers.F2AOptimizerSpec
    _primitive: ClassVar = "sparse_dense_matmul_grad_with_f2a"

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """The learning rate, `rho`, `l1`, `l2`, `max_lr_multiplier` and the step."""
        return self.as_embax().get_hyperparameters(step)

    def short_name(self) -> str:  # noqa: D102
        return "f2a"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedTableSpec:
    """Tables that are stored as one array. A pytree of its fields.

    The fields are those of `embax.StackedTableSpec`, without the devices that the tables are placed for: every function of
    `lib.nn.embedding` is told these.
    """

    stack_name: str
    stack_vocab_size: int
    stack_embedding_dim: int
    optimizer: OptimizerSpec
    combiner: str
    total_sample_count: int
    max_ids_per_partition: int = 256
    max_unique_ids_per_partition: int = 256
    activation_mem_bytes_limit: int = DEFAULT_ACTIVATION_MEM_BYTES_LIMIT
    suggested_coo_buffer_size_per_device: int | None = None
    quantization_config: QuantizationConfig | None = None

    def replace(self, **changes: Any) -> "StackedTableSpec":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(eq=True, unsafe_hash=True, kw_only=True)
class TableSpec:
    """Specifies one embedding table; see `embax.TableSpec`. Equal and hashed by all its fields, the placement included."""

    name: str
    vocabulary_size: int
    embedding_dim: int
    initializer: CallableTableInitializer
    optimizer: OptimizerSpec
    combiner: str
    max_ids_per_partition: int = 256
    max_unique_ids_per_partition: int = 256
    suggested_coo_buffer_size_per_device: int | None = None
    quantization_config: QuantizationConfig | None = None
    _initialized: bool = dataclasses.field(default=False, init=False, repr=False, compare=False)
    _stacked_table_spec: StackedTableSpec | None = None
    _setting_in_stack: TableSettingInStack | None = None

    def __post_init__(self) -> None:
        self._initialized = True

    def __setattr__(self, field: str, value: Any) -> None:
        refuse_after_placement(self, self.__dict__.get("_stacked_table_spec") is not None, field, value)
        super().__setattr__(field, value)

    @property
    def setting_in_stack(self) -> TableSettingInStack:
        """The place of this table in its stack; before stacking, alone and without padding."""
        if self._setting_in_stack is None:
            return TableSettingInStack(self.name, self.vocabulary_size, self.embedding_dim)
        return self._setting_in_stack

    @property
    def stacked_table_spec(self) -> StackedTableSpec:
        """The stack that this table belongs to.

        Raises:
            AssertionError: the table has not been stacked yet.
        """
        if self._stacked_table_spec is None:
            raise AssertionError(
                f"Table {self.name} is not stacked: call embedding.prepare_feature_specs_for_training, or stack it."
            )
        return self._stacked_table_spec

    def is_stacked(self) -> bool:
        """Whether the table has been placed in a stack."""
        return self._stacked_table_spec is not None


@dataclasses.dataclass(eq=True, kw_only=True)
class FeatureSpec:
    """Specifies one embedding feature; see `embax.FeatureSpec`. Equal and hashed by all its fields."""

    name: str
    table_spec: TableSpec
    input_shape: Sequence[int]
    output_shape: Sequence[int]
    _id_transformation: FeatureIdTransformation | None = None

    def __hash__(self) -> int:
        shapes = tuple(self.input_shape), tuple(self.output_shape)  # Which may be lists.
        return hash((self.name, self.table_spec, shapes, self._id_transformation))

    @property
    def id_transformation(self) -> FeatureIdTransformation:
        """Where stacking put this feature.

        Raises:
            AssertionError: it has not been placed yet.
        """
        if self._id_transformation is None:
            raise AssertionError(
                f"Feature {self.name} is not placed: call embedding.prepare_feature_specs_for_training, or stack its table."
            )
        return self._id_transformation
