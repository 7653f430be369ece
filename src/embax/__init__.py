"""Large sharded embedding tables for JAX, on CPU, GPU and TPU."""

from embax._matmul import apply_gradients as apply_gradients
from embax._matmul import lookup as lookup
from embax._matmul import read_rows as read_rows
from embax._ops.backend import use_backend as use_backend
from embax._preprocess.buffers import PreprocessedInput as PreprocessedInput
from embax._preprocess.inputs import Ragged as Ragged
from embax._preprocess.pack import preprocess as preprocess
from embax._preprocess.stats import PackStats as PackStats
from embax._specs import FeatureIdTransformation as FeatureIdTransformation
from embax._specs import FeatureSpec as FeatureSpec
from embax._specs import QuantizationConfig as QuantizationConfig
from embax._specs import StackedTableSpec as StackedTableSpec
from embax._specs import TableSettingInStack as TableSettingInStack
from embax._specs import TableSpec as TableSpec
from embax._stacking.stack import get_stacked_table_specs as get_stacked_table_specs
from embax._stacking.stack import get_table_specs as get_table_specs
from embax._stacking.stack import prepare_feature_specs_for_training as prepare_feature_specs_for_training
from embax._variables import EmbeddingVariables as EmbeddingVariables
from embax._variables import init_embedding_variables as init_embedding_variables
from embax._version import __version__ as __version__
from embax.optimizers import AdagradOptimizerSpec as AdagradOptimizerSpec
from embax.optimizers import AdagradSlotVariables as AdagradSlotVariables
from embax.optimizers import OptimizerSpec as OptimizerSpec
from embax.optimizers import SGDOptimizerSpec as SGDOptimizerSpec
from embax.optimizers import SGDSlotVariables as SGDSlotVariables
