"""Views show exactly the samples of training."""

import numpy as np
import pytest
from PIL import Image

from megatron_croc.data import sample_view
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.errors import DataError
from tests.unit.data.small_samples import conversation


def test_shown_tokens_are_the_conversation(make_dataset, make_run):
    run = make_run(make_dataset(6))
    for view in sample_view.view_samples(run, ["1", "set/000000-000002", "3"]):
        text = "".join(piece.text for piece in view.pieces if piece.kind == "label")
        plain = text.replace(" ", "").replace("\u00b7", "")
        assert plain.startswith(f"athing{view.number}<")  # then the end of the answer
        assert plain.endswith(">")
        num_images = (1, 1, 0, 2)[view.number % 4]
        assert sum(piece.kind == "image" for piece in view.pieces) == num_images
        assert len(view.images) == num_images
        assert view.fault is None
        question = conversation(view.number, 0)[0]["value"]
        shown = "".join(piece.text for piece in view.pieces if piece.kind == "text")
        assert question.replace(" ", "") in shown.replace(" ", "").replace("\u00b7", "")


def test_page_and_terminal(make_dataset, make_run, tmp_path):
    bad = ([{"from": "gpt", "value": "<b>"}], [])
    run = make_run(make_dataset(4, records={1: bad}))
    views = sample_view.view_samples(run, ["0", "1"])
    page = sample_view.write_page(views, tmp_path / "out").read_text()
    assert page.count("<section>") == 2
    assert "set/000000-000001: message 0 is from gpt" in page
    image = np.asarray(Image.open(tmp_path / "out" / "sample-0-image-0.png"))
    assert image.shape == (run.model.vision_tower.img_size,) * 2 + (3,)
    assert (image == np.asarray(views[0].images[0])).all()
    coloured, plain = (sample_view.as_text(views[0], colour=c) for c in (True, False))
    assert sample_view.GREEN in coloured
    assert "\033" not in plain
    assert "message 0 is from gpt" in sample_view.as_text(views[1], colour=False)


def test_mask_shows_both_directions(make_dataset, make_run):
    (view,) = sample_view.view_samples(make_run(make_dataset(1)), ["0"])
    colours = {tuple(c) for c in np.asarray(view.mask).reshape(-1, 3).tolist()}
    assert colours == {sample_view.HIDDEN, sample_view.CAUSAL, sample_view.BOTH_WAYS}


def test_unknown_samples_are_refused(make_dataset, make_run):
    run = make_run(make_dataset(6))
    dataset = ShardedDataset(run.data.data_path)
    assert [dataset.index_of(dataset.read(i).sample_id) for i in range(6)] == list(range(6))
    for sample in ("6", "set/000001-000001", "other/000000-000000", "x"):
        with pytest.raises(DataError, match=r"is not (in data_path|there)"):
            sample_view.view_samples(run, [sample])
