"""Build one Batch from slots of the plan; a pure function, so any thread may run it.

    slot -> shards.read -> tokenise -> expand -----+
                 |                                 +--> collate -> Batch, bad samples
                 +-------> image bytes -> decode --+

A bad sample is replaced by a placeholder in its slot and returned beside the batch.
"""

import itertools
import math
import threading
import time
from collections.abc import Sequence

from torch import Tensor

from megatron_croc.config.data import DataConfig
from megatron_croc.config.fp8 import fp8_gathered_unit
from megatron_croc.config.model import CrocModelConfig, MaskType
from megatron_croc.config.parallel import ParallelConfig
from megatron_croc.config.run import RunConfig
from megatron_croc.config.training import TrainingConfig
from megatron_croc.data.bad_samples import BadSampleError
from megatron_croc.data.batch import Batch
from megatron_croc.data.order.row_plan import Slot
from megatron_croc.data.sample.collate import (
    ReadySample,
    check_answer,
    collate,
    expand_sample,
    measure_extent,
    placeholder_sample,
)
from megatron_croc.data.sample.decode import DecoderName, ImageDecoder, resolve_decoder
from megatron_croc.data.sample.image_header import ImageError
from megatron_croc.data.sample.image_transform import ImageTransform
from megatron_croc.data.sample.tokenization import (
    TokenizedSample,
    build_tokenizer,
    check_tokenizer,
    tokenize_conversation,
)
from megatron_croc.data.store.shards import RawSample, ShardedDataset
from megatron_croc.data.store.storage_cache import build_cache
from megatron_croc.data.truncation import Cut, TruncationLog
from megatron_croc.errors import DataError
from megatron_croc.log import get_logger
from megatron_croc.parallel.device import current_device

READ_ATTEMPTS = 4
"""Number of attempts to read a sample when the file system fails."""

FIRST_RETRY_SECONDS = 0.2
"""Pause before the second attempt; each later pause is twice as long."""

logger = get_logger(__name__)


def pack_multiple(parallel: ParallelConfig, training: TrainingConfig) -> int:
    """Compute the number that the length of a pack must be divisible by.

    Context parallelism cuts a pack into 2 * CP chunks (two per rank, for balance); sequence
    parallelism cuts each rank's part into TP pieces; fp8 matrix products need a multiple of 16
    rows or more on every rank.
    """
    cp = parallel.context_parallel_size
    tp = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    cut = math.lcm(tp * cp, 2 * cp if cp > 1 else 1)
    if training.fp8_format is None:
        return cut
    return math.lcm(cut, tp * cp * fp8_gathered_unit(training, parallel))


class BatchBuilder:
    """Reads, tokenises, decodes and packs samples. Safe to share between threads."""

    def __init__(
        self,
        *,
        data: DataConfig,
        model: CrocModelConfig,
        reconstructs: bool,
        folders: Sequence[str],
        seed: int,
        pad_to_multiple_of: int,
    ) -> None:
        """Open the folders of shards and the tokenizer.

        Args:
            data: tokenizer, template, image handling and cache.
            model: vocabulary, image size, visual tokens, mask and replace ratio.
            reconstructs: True in the stage that replaces and reconstructs visual tokens.
            folders: folders of shards; slots number their samples one folder after the other.
            seed: of the sets of replaced tokens.
            pad_to_multiple_of: lengths of packs are padded to a multiple of it.

        Raises:
            DataError: data or tokenizer missing, damaged or unfit for the model.
        """
        vision = model.vision_tower
        self._data = data
        self._vision = vision
        self._seed = seed
        self._pad_to_multiple_of = pad_to_multiple_of
        self._mask_type: MaskType = model.attention_mask_type
        self._replace_ratio = model.prompt_pool.replace_ratio if reconstructs else None
        cache = build_cache(data.data_cache_dir, data.data_cache_gb)
        self._dataset = ShardedDataset(folders, cache=cache, roots=data.data_roots)
        self._tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
        check_tokenizer(
            self._tokenizer, data.conversation_template, model.language_model.vocab_size
        )
        self._truncation = TruncationLog(data.seq_length)
        self._transform = ImageTransform.build(vision, data.image_aspect_ratio)
        self._decoder_name: DecoderName = resolve_decoder(data.image_decoder)
        self._device = current_device()  # other threads do not inherit the current device
        self._per_thread = threading.local()

    @property
    def num_samples(self) -> int:
        """Number of samples in all folders."""
        return len(self._dataset)

    def build(self, slots: Sequence[Slot]) -> tuple[Batch, list[BadSampleError]]:
        """Build the batch of some samples; also return the errors of unusable samples.

        Raises:
            OSError: every attempt to read failed.
            DataError: a shard is damaged, or the lengths used for packing are wrong.
        """
        bad: list[BadSampleError] = []
        cuts: list[Cut] = []
        prepared: list[tuple[TokenizedSample, list[bytes]]] = []
        for slot in slots:
            try:
                prepared.append(self._prepare(slot, cuts))
            except BadSampleError as error:
                bad.append(error)
                prepared.append((placeholder_sample(error.sample_id), []))
            except Exception:
                logger.error("sample number %d of data_path ended the loader", slot.index)
                raise

        # Decode all images of the batch in one call: DALI decodes them in parallel.
        decoded = iter(self._decoder.decode([data for _, images in prepared for data in images]))
        samples: list[ReadySample] = []
        for (tokens, images), slot in zip(prepared, slots, strict=True):
            results = [next(decoded) for _ in images]
            errors = [result for result in results if isinstance(result, ImageError)]
            pixels = [result for result in results if isinstance(result, Tensor)]
            if errors:
                bad.append(BadSampleError(tokens.sample_id, "image", str(errors[0])))
                tokens, pixels = placeholder_sample(tokens.sample_id), []
            samples.append(ReadySample(tokens=tokens, epoch=slot.epoch, pixel_values=pixels))
        size = self._vision.img_size
        batch = collate(
            samples,
            num_visual_tokens=self._vision.num_visual_tokens,
            mask_type=self._mask_type,
            pad_to_multiple_of=self._pad_to_multiple_of,
            seed=self._seed,
            replace_ratio=self._replace_ratio,
            image_shape=(3, size, size),
            cuts=cuts,
        )
        return batch, bad

    def _prepare(self, slot: Slot, cuts: list[Cut]) -> tuple[TokenizedSample, list[bytes]]:
        """Read, tokenise and cut a sample; a sample that is too long is added to `cuts`."""
        raw = self._read(slot.index)
        tokens = tokenize_conversation(
            self._tokenizer,
            self._data.conversation_template,
            raw.conversations,
            num_images=len(raw.image_bytes),
            sample_id=raw.sample_id,
        )
        num_visual_tokens, seq_length = self._vision.num_visual_tokens, self._data.seq_length
        extent = measure_extent(tokens, num_visual_tokens=num_visual_tokens)
        self._truncation.add(raw.sample_id.rpartition("/")[0], extent)
        if extent.length > seq_length:
            cuts.append(Cut.of(raw.sample_id, extent, seq_length))
        expanded = expand_sample(tokens, num_visual_tokens=num_visual_tokens, seq_length=seq_length)
        check_answer(raw.sample_id, extent, seq_length=seq_length)
        if slot.planned_tokens is not None and len(expanded.input_ids) > slot.planned_tokens:
            raise DataError(
                f"sample {raw.sample_id} has {len(expanded.input_ids)} tokens, its pack was "
                f"planned for {slot.planned_tokens}: the lengths of its dataset folder are not "
                "those of its shards; run croc data lengths again"
            )
        return expanded, raw.image_bytes

    def _read(self, index: int) -> RawSample:
        """Read a sample; retry after an OSError, but not after a BadSampleError."""
        for attempt in itertools.count(1):
            try:
                return self._dataset.read(index)
            except OSError as error:
                if attempt == READ_ATTEMPTS:
                    raise OSError(
                        error.errno, f"sample number {index}: {attempt} reads failed: {error}"
                    ) from error
                logger.warning("reading sample number %d failed, trying again: %s", index, error)
            time.sleep(FIRST_RETRY_SECONDS * 2 ** (attempt - 1))
        raise AssertionError("the loop above ends by return or raise")

    @property
    def _decoder(self) -> ImageDecoder:
        """Decoder of this thread; threads must not share a DALI pipeline."""
        if not hasattr(self._per_thread, "decoder"):
            self._per_thread.decoder = ImageDecoder(
                self._transform, self._decoder_name, self._device
            )
        return self._per_thread.decoder


def build_batch_builder(
    run: RunConfig, folders: Sequence[str], *, pad_to_multiple_of: int | None = None
) -> BatchBuilder:
    """Open folders of shards and the tokenizer of a run.

    Args:
        run: the run.
        folders: folders of shards.
        pad_to_multiple_of: lengths of packs are padded to a multiple of it; None: as its layout
            needs.

    Raises:
        DataError: data or tokenizer missing, damaged or unfit for the model.
    """
    return BatchBuilder(
        data=run.data,
        model=run.model,
        reconstructs=run.reconstructs,
        folders=folders,
        seed=run.training.seed,
        pad_to_multiple_of=pad_to_multiple_of or pack_multiple(run.parallel, run.training),
    )
