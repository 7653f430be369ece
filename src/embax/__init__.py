"""Large sharded embedding tables for JAX, on CPU, GPU and TPU."""

from embax._specs import FeatureIdTransformation as FeatureIdTransformation
from embax._specs import FeatureSpec as FeatureSpec
from embax._specs import QuantizationConfig as QuantizationConfig
from embax._specs import StackedTableSpec as StackedTableSpec
from embax._specs import TableSettingInStack as TableSettingInStack
from embax._specs import TableSpec as TableSpec
from embax._stacking.stack import get_stacked_table_specs as get_stacked_table_specs
from embax._stacking.stack import get_table_specs as get_table_specs
from embax._stacking.stack import prepare_feature_specs_for_training as prepare_feature_specs_for_training
from embax._version import __version__ as __version__
from embax.optimizers import AdagradOptimizerSpec as AdagradOptimizerSpec
from embax.optimizers import AdagradSlotVariables as AdagradSlotVariables
from embax.optimizers import OptimizerSpec as OptimizerSpec
from embax.optimizers import SGDOptimizerSpec as SGDOptimizerSpec
from embax.optimizers import SGDSlotVariables as SGDSlotVariables
