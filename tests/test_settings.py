"""Settings come from the environment and are refused by the variable's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from jubako.settings import SettingsError, load_settings


def test_nothing_set_gives_the_defaults() -> None:
    settings = load_settings({})
    assert settings.home == Path.home() / ".jubako"
    assert (settings.families, settings.family_urls, settings.default_model) == ((), {}, None)


def test_lists_and_pairs_are_separated_by_commas() -> None:
    settings = load_settings(
        {
            "JUBAKO_FAMILIES": "sd, sdxl",
            "JUBAKO_FAMILY_URLS": "sd=http://one:3000, sdxl=http://two:3000|https://three",
        }
    )
    assert settings.families == ("sd", "sdxl")
    assert settings.family_urls == {
        "sd": ("http://one:3000",),
        "sdxl": ("http://two:3000", "https://three"),
    }


def test_an_empty_variable_means_the_default() -> None:
    assert load_settings({"JUBAKO_TIMEOUT": "", "JUBAKO_CATALOG": ""}) == load_settings({})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("auto", "auto"),
        ("20GB", 20 * 10**9),
        ("8GiB", 8 * 2**30),
        ("1.5 gb", 1_500_000_000),
        ("12Gi", 12 * 2**30),
        ("700M", 700_000_000),
        ("123456", 123456),
        ("5B", 5),
    ],
)
def test_a_memory_budget_is_given_as_people_write_sizes(text: str, size: object) -> None:
    assert load_settings({"JUBAKO_MEMORY_BUDGET": text}).memory_budget == size


@pytest.mark.parametrize("text", ["a lot", "-5GB", "20 parsecs", "5iB", "GB"])
def test_what_is_no_size_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^JUBAKO_MEMORY_BUDGET: .*is no size; write auto, .*20GB, 8GiB"):
        load_settings({"JUBAKO_MEMORY_BUDGET": text})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JUBAKO_FAMILY_URLS", "sd=one:3000"),
        ("JUBAKO_FAMILY_URLS", "sd=http://one:3000|"),
        ("JUBAKO_TIMEOUT", "soon"),
        ("JUBAKO_TIMEOUT", "0"),
        ("JUBAKO_BATCHING", "never"),
        ("JUBAKO_MEMORY_BUDGET", "0"),
    ],
)
def test_a_bad_value_names_its_variable(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{variable}: "):
        load_settings({variable: value})
