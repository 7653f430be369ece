"""The optimizers that are fused into the backward pass, one file each."""

from embax.optimizers._base import OptimizerSpec as OptimizerSpec
from embax.optimizers.adagrad import AdagradOptimizerSpec as AdagradOptimizerSpec
from embax.optimizers.adagrad import AdagradSlotVariables as AdagradSlotVariables
from embax.optimizers.adagrad_momentum import AdagradMomentumOptimizerSpec as AdagradMomentumOptimizerSpec
from embax.optimizers.adagrad_momentum import AdagradMomentumSlotVariables as AdagradMomentumSlotVariables
from embax.optimizers.adam import AdamOptimizerSpec as AdamOptimizerSpec
from embax.optimizers.adam import AdamSlotVariables as AdamSlotVariables
from embax.optimizers.custom import CustomOptimizerSpec as CustomOptimizerSpec
from embax.optimizers.f2a import F2AOptimizerSpec as F2AOptimizerSpec
from embax.optimizers.f2a import F2ASlotVariables as F2ASlotVariables
from embax.optimizers.ftrl import FTRLOptimizerSpec as FTRLOptimizerSpec
from embax.optimizers.ftrl import FTRLSlotVariables as FTRLSlotVariables
from embax.optimizers.laprop import LaPropOptimizerSpec as LaPropOptimizerSpec
from embax.optimizers.laprop import LaPropSlotVariables as LaPropSlotVariables
from embax.optimizers.row_wise_adagrad import RowWiseAdagradOptimizerSpec as RowWiseAdagradOptimizerSpec
from embax.optimizers.row_wise_adagrad import RowWiseAdagradSlotVariables as RowWiseAdagradSlotVariables
from embax.optimizers.row_wise_adam import RowWiseAdamOptimizerSpec as RowWiseAdamOptimizerSpec
from embax.optimizers.sgd import SGDOptimizerSpec as SGDOptimizerSpec
from embax.optimizers.sgd import SGDSlotVariables as SGDSlotVariables
