"""Shares hold at every prefix, and a bad blend file is refused by entry and key."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_croc.data.order.blend import Blend, Source, read_blend
from megatron_croc.data.store.shard_writer import ShardWriter, write_manifest
from megatron_croc.errors import DataError

weights = st.lists(
    st.fractions(min_value=Fraction(1, 1000), max_value=1000, max_denominator=1000),
    min_size=1,
    max_size=9,
)


def blend_of(*shares) -> Blend:
    sources = [
        Source(name=str(i), folders=(str(i),), num_samples=10, weight=Fraction(share))
        for i, share in enumerate(shares)
    ]
    return Blend(sources=tuple(sources), epoch_length=100)


def check_prefixes(shares, drawn):
    counts = np.cumsum(drawn[:, None] == np.arange(len(shares)), axis=0)
    for source, share in enumerate(shares):
        exact = share / sum(shares)
        for n, count in enumerate(counts[:, source].tolist(), start=1):
            assert abs(count - exact * n) < 1


@settings(deadline=None, max_examples=50)
@given(shares=weights)
def test_within_one_sample_of_its_share_at_every_prefix(shares):
    drawn = blend_of(*shares).draw([0] * len(shares), 200)
    check_prefixes([Fraction(share) for share in shares], drawn)


def test_many_equal_sources_beside_a_large_one():
    """Weights for which taking the source that lags most is off by more than one sample."""
    shares = [Fraction(1, 2)] + [Fraction(1, 200)] * 100
    check_prefixes(shares, blend_of(*shares).draw([0] * 101, 500))


@settings(deadline=None, max_examples=50)
@given(shares=weights, cuts=st.lists(st.integers(0, 40), max_size=6))
def test_goes_on_from_the_counts_alone(shares, cuts):
    blend = blend_of(*shares)
    whole = blend.draw([0] * len(shares), sum(cuts) + 5)
    counts = np.zeros(len(shares), dtype=np.int64)
    pieces = []
    for number in [*cuts, 5]:
        pieces.append(blend.draw(counts.tolist(), number))
        counts += np.bincount(pieces[-1], minlength=len(shares))
    assert np.array_equal(np.concatenate(pieces), whole)


def test_far_into_a_run():
    shares = [Fraction("0.37"), Fraction("0.63")]
    n = 10**12
    counts = [int(share * n) for share in shares]
    drawn = blend_of(*shares).draw(counts, 300)
    for k in range(300):
        first = counts[0] + int((drawn[: k + 1] == 0).sum())
        assert abs(first - shares[0] * (n + k + 1)) < 1


@pytest.fixture
def folders(tmp_path):
    for name, size in {"captions": 6, "chat": 4}.items():
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name, 0) as writer:
            for _ in range(size):
                writer.add({"conversations": []}, [])
        write_manifest(tmp_path / name, [writer.info])
    return tmp_path


def written(folder, text):
    (folder / "blend.yaml").write_text(text)
    return [str(folder / "blend.yaml")]


def test_folders_alone_are_one_source(folders):
    blend = read_blend([str(folders / "captions"), str(folders / "chat")])
    assert [(s.name, s.num_samples, s.weight) for s in blend.sources] == [("captions+chat", 10, 1)]
    assert blend.epoch_length == 10


def test_weights(folders):
    text = "- {path: captions, weight: 0.1}\n- {path: [chat], weight: 3, name: talk}\n"
    blend = read_blend(written(folders, text))
    assert [s.name for s in blend.sources] == ["captions", "talk"]
    assert [s.weight for s in blend.sources] == [Fraction(1, 10), 3]
    assert blend.folders == (str(folders / "captions"), str(folders / "chat"))
    assert blend.epoch_length == 10


def test_epochs_are_passes_over_each_source(folders):
    text = "- {path: captions, epochs: 2}\n- {path: chat, epochs: 0.5}\n"
    blend = read_blend(written(folders, text))
    assert blend.epoch_length == 14
    assert np.bincount(blend.draw([0, 0], 14)).tolist() == [12, 2]


def test_part_of_a_sample_counts_as_one_in_the_length_of_an_epoch(folders):
    text = "- {path: captions, epochs: 1}\n- {path: chat, epochs: 0.3}\n"
    blend = read_blend(written(folders, text))
    assert blend.epoch_length == 8  # 6 + 1.2
    assert np.bincount(blend.draw([0, 0], 8)).tolist() == [7, 1]
    text = "- {path: captions, weight: 0.3}\n- {path: chat, weight: 0.3}\n"
    assert read_blend(written(folders, text)).epoch_length == 10  # weights change no length


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be a list"),
        ("path: captions", "must be a list"),
        ("- captions", "entry 1 must be"),
        ("[", "cannot be read"),
        ("- {path: captions, wieght: 1}", "entry 1 has the unknown key 'wieght'; did you mean wei"),
        ("- {weight: 1}", "entry 1: path must name a folder"),
        ("- {path: captions}", "entry 1 .captions. needs a weight or epochs"),
        ("- {path: captions, weight: 1, epochs: 1}", "and not both"),
        ("- {path: captions, weight: -1}", "weight must be a positive number, got -1"),
        ("- {path: captions, weight: .nan}", "must be a positive number, got nan"),
        ("- {path: captions, weight: .inf}", "must be a positive number, got inf"),
        ("- {path: captions, weight: true}", "must be a positive number, got True"),
        ("- {path: captions, weight: 1, name: 3}", "name must be a text"),
        ("- {path: nowhere, weight: 1}", "nowhere is missing"),
        ("- {path: captions, weight: 1}\n- {path: captions, weight: 1}", "called 'captions'"),
        ("- {path: captions, weight: 1}\n- {path: chat, epochs: 1}", "entry 1 has no epochs"),
        ("- !!python/object/apply:os.system [ls]", "cannot be read"),
    ],
)
def test_faults_name_entry_and_key(folders, text, says):
    with pytest.raises(DataError, match=says):
        read_blend(written(folders, text))


def test_a_blend_stands_alone(folders):
    with pytest.raises(DataError, match="a blend must be the only path"):
        read_blend([*written(folders, ""), str(folders / "chat")])
    with pytest.raises(DataError, match="data_path is empty"):
        read_blend([])
    with pytest.raises(DataError, match="cannot be read"):
        read_blend([str(folders / "none.yaml")])


def test_digest_is_of_content_and_order(make_dataset, tmp_path):
    other = {0: ([{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], [])}
    a, b = make_dataset(6, name="a"), make_dataset(6, name="b", records=other)
    moved = make_dataset(6, name="moved")
    digests = [read_blend(p).sources[0].digest for p in ((a,), (b,), (moved,), (a, b), (b, a))]
    assert digests[0] == digests[2]
    assert len(set(digests)) == 4
