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
            "JUBAKO_FAMILY_URLS": "sd=http://one:3000,sdxl=http://two:3000/x=y",
        }
    )
    assert settings.families == ("sd", "sdxl")
    assert settings.family_urls == {"sd": "http://one:3000", "sdxl": "http://two:3000/x=y"}


def test_an_empty_variable_means_the_default() -> None:
    assert load_settings({"JUBAKO_TIMEOUT": "", "JUBAKO_CATALOG": ""}) == load_settings({})


@pytest.mark.parametrize(
    ("variable", "value"),
    [("JUBAKO_TIMEOUT", "soon"), ("JUBAKO_TIMEOUT", "0"), ("JUBAKO_BATCHING", "never")],
)
def test_a_bad_value_names_its_variable(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{variable}: "):
        load_settings({variable: value})
