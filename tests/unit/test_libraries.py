"""Unknown versions are logged, with the interfaces assumed."""

import pytest

from megatron_croc import libraries


@pytest.fixture
def warned(monkeypatch):
    """Message of name_unknown_version for an installed version."""

    libraries.name_unknown_version.cache_clear()

    def warn(found: str | None) -> list[str]:
        said = []

        def version(_):
            if found is None:
                raise libraries.PackageNotFoundError
            return found

        monkeypatch.setattr(libraries, "version", version)
        monkeypatch.setattr(
            libraries,
            "log_on_rank_zero",
            lambda _, level, message, *args: said.append(message % args),
        )
        libraries.name_unknown_version("transformer-engine")
        return said

    yield warn
    libraries.name_unknown_version.cache_clear()


@pytest.mark.parametrize("found", ["2.8", "2.8.0+5f3a1b2", "2.14.1", "2.20.2"])
def test_a_known_version_is_not_worth_a_word(warned, found):
    assert warned(found) == []


@pytest.mark.parametrize(
    ("found", "named"),
    [("2.7.9", "2.7.9"), ("2.21.0", "2.21.0"), ("3.0", "3.0"), (None, "without a version")],
)
def test_an_unknown_version_is_named_with_what_is_assumed(warned, found, named):
    assert warned(found) == [
        f"transformer-engine {named} is none of the known versions (2.8 to 2.20): the names of its "
        "layers' parameters and the state of its FusedAdam are assumed to be those of 2.20"
    ]
