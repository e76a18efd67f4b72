from __future__ import annotations

import pytest
from pydantic import Field, ValidationError, model_validator

from mmicl_core.config.base import Config, explain, fingerprint


class Colours(Config):
    """Settings of a test."""

    reds: int = Field(default=1, ge=0)
    """How many reds."""

    blues: int = 2
    """How many blues."""

    @model_validator(mode="after")
    def _fewer_reds(self):
        if self.reds > self.blues:
            raise ValueError(f"reds ({self.reds}) is above blues ({self.blues}): swap them")
        return self


def sentences(**settings) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Colours.model_validate(settings)
    return str(explain(caught.value, "a.yaml")).splitlines()


def test_settings_cannot_change_after_loading():
    with pytest.raises(ValidationError, match="frozen"):
        Colours().reds = 3


def test_wrong_value_is_explained_with_file_field_and_value():
    (sentence,) = sentences(reds="many")
    assert sentence.startswith("a.yaml: reds: ")
    assert "integer" in sentence
    assert sentence.endswith("(found 'many')")


def test_unknown_key_is_explained_with_where_to_look():
    (sentence,) = sentences(greens=1)
    assert sentence == "a.yaml: greens is not a setting; `mmicl config schema` lists them all"


def test_disagreeing_fields_are_explained_with_both_values():
    (sentence,) = sentences(reds=5, blues=4)
    assert sentence == "a.yaml: the run: reds (5) is above blues (4): swap them"


def test_every_wrong_setting_gets_its_own_sentence():
    assert len(sentences(reds=-1, blues="x", greens=0)) == 3


def test_fingerprint_depends_on_values_and_not_on_how_they_were_given():
    assert fingerprint(Colours(), "x") == fingerprint(Colours(reds=1, blues=2), "x")
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


@pytest.mark.parametrize("other", [(Colours(reds=0), "x"), (Colours(), "y"), (Colours(),)])
def test_fingerprint_changes_with_any_part(other):
    assert fingerprint(*other) != fingerprint(Colours(), "x")


def test_docstrings_of_settings_reach_the_schema():
    assert Colours.model_json_schema()["properties"]["reds"]["description"] == "How many reds."
