"""Inputs that shards are made of: each is cut into slices that worker processes read alone.

json       a LLaVA-style list                          (the one kind that is loaded whole)
jsonl      a record a line, streamed
parquet    files with image bytes, as datasets on the Hugging Face hub have them
webdataset tars of jpg/png/.. beside json/txt
"""

from megatron_croc.data.prepare.inputs.base import InputFormat, InputRecord, InputSlice, RecordInput
from megatron_croc.data.prepare.inputs.choose import FORMATS, open_input

__all__ = ["FORMATS", "InputFormat", "InputRecord", "InputSlice", "RecordInput", "open_input"]
