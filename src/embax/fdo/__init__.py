"""Feedback-directed optimization: statistics of packed batches that are kept, and that the next run takes its limits from."""

from embax.fdo._client import FDOClient as FDOClient
from embax.fdo._csv import CSVFileFDOClient as CSVFileFDOClient
from embax.fdo._npz import NPZFileFDOClient as NPZFileFDOClient
