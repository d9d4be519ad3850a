import pytest

import slope_fx
from slope_fx.planning.patterns import Pattern, PatternRules


@pytest.mark.parametrize("text", ["2:4", "1:2", "7:8", "15:16", "1:16"])
def test_pattern_round_trip(text):
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["5:4", "4:4", "0:4", "2:3", "2:3x", "2:32", "-2:4", "2", "", " 2:4", 2, None, ("2", 4)]
)
def test_bad_patterns_name_the_argument_and_what_is_allowed(text):
    with pytest.raises(slope_fx.errors.ArgumentError, match=r"sparsity=.*allowed is \"N:M\""):
        Pattern.parse(text)


@pytest.mark.parametrize("numbers", [(4, 4), (0, 4), (2, 3), (2, 32), (2.0, 4), (True, 2)])
def test_patterns_made_by_hand_are_checked_too(numbers):
    with pytest.raises(slope_fx.errors.ArgumentError, match="allowed is"):
        Pattern(*numbers)


def test_first_match_wins_and_none_is_dense():
    rules = PatternRules({"h.0.*": None, "*.mlp.*": "2:8", "*": "2:4"})
    assert rules.select("h.0.mlp.c_fc") == (None, "sparsity['h.0.*'] is None")
    assert rules.select("h.1.mlp.c_fc")[0] == Pattern(2, 8)
    assert rules.unmatched() == ["*"]
    assert rules.select("h.1.attn.c_proj")[0] == Pattern(2, 4)
    assert rules.unmatched() == []


def test_names_without_a_rule_stay_dense():
    assert PatternRules({"a.*": "2:4"}).select("b.c") == (
        None,
        "no key of sparsity matches its name",
    )


@pytest.mark.parametrize("mapping", [{}, {"*": "9:4"}, {3: "2:4"}])
def test_bad_mappings(mapping):
    with pytest.raises(slope_fx.errors.ArgumentError, match="sparsity"):
        PatternRules(mapping)
