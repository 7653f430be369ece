"""Constants of the packed format."""

from embax._preprocess.buffers import PADDING_VALUE as PADDING_VALUE
