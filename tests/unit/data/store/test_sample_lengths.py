"""Tables of lengths are found by tokenizer and template; a missing or damaged one is refused."""

from pathlib import Path

import numpy as np
import pytest

from megatron_croc.data.sample.tokenization import build_tokenizer
from megatron_croc.data.store.manifest import read_manifest, verify_shards
from megatron_croc.data.store.sample_lengths import SampleLengths
from megatron_croc.errors import DataError
from tests.unit.data.small_samples import measure_lengths

SPM = "SentencePieceTokenizer"


def test_several_tokenizers_and_templates_live_side_by_side(
    make_dataset, tokenizer_model, tmp_path
):
    folder = make_dataset(6)
    measure_lengths(folder, tokenizer_model, "v1")
    measure_lengths(folder, tokenizer_model, "plain")
    measure_lengths(folder, tokenizer_model, "v1")  # again: replaces its own
    assert [i.conversation_template for i in read_manifest(folder).lengths] == ["plain", "v1"]
    other = tmp_path / "other" / "tokenizer.model"
    other.parent.mkdir()
    other.write_bytes(Path(tokenizer_model).read_bytes())
    SampleLengths([folder], build_tokenizer(SPM, str(other)), "v1")  # the content counts
    with pytest.raises(DataError, match=r"has no sample lengths .*it has tokenizer.model with pl"):
        SampleLengths([folder], build_tokenizer(SPM, str(other), legacy=False), "v1")
    with pytest.raises(DataError, match=r"data lengths .*set --tokenizer-model .* qwen_1_5"):
        SampleLengths([folder], build_tokenizer(SPM, str(other)), "qwen_1_5")
    with pytest.raises(DataError, match="none at all"):
        SampleLengths([make_dataset(2, name="new")], build_tokenizer(SPM, str(other)), "v1")


def test_damaged_tables_are_refused(make_dataset, tokenizer_model):
    folder = make_dataset(6)
    measure_lengths(folder, tokenizer_model)
    tokenizer = build_tokenizer(SPM, tokenizer_model)
    verify_shards(folder)
    (table,) = Path(folder).glob("lengths-*.npy")
    whole = np.load(table)
    np.save(table, whole[1:])
    with pytest.raises(DataError, match="not one row for each of the 6 samples"):
        SampleLengths([folder], tokenizer, "v1")
    with pytest.raises(DataError, match=r"lengths-.* is not the file that was written"):
        verify_shards(folder)
    table.write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        SampleLengths([folder], tokenizer, "v1")
