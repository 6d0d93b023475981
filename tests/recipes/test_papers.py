"""The recipes of papers: names, short forms, and what is written once."""

import pytest

from contralto.recipes import papers


def test_every_paper_has_a_key_of_its_own_and_is_found_by_it_and_by_its_number():
    recipes = papers.paper_recipes()
    assert len({recipe.key for recipe in recipes.values()}) == len(recipes) > 60
    for arxiv, recipe in recipes.items():
        assert papers.find(recipe.key) is papers.find(arxiv) is papers.find(f"arxiv:{arxiv}") is recipe


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"there is no recipe 'simp' \(did you mean 'simpo'\?\): give the name"):
        papers.find("simp")


def test_an_evaluation_follows_the_training_and_reads_what_it_made():
    fields = papers.expanded({"align": "dpo", "hub": "contralto align dpo --output_dir mine\n"})
    assert fields["hub"].splitlines()[1].startswith("contralto eval --tasks ")
    assert "pretrained=mine " in fields["hub"]
    assert "evaluate" not in fields


def test_two_papers_cannot_have_a_key(monkeypatch, tmp_path):
    for name in [*papers.PARTS, "files"]:
        (tmp_path / f"{name}.yaml").write_text("[]")
    entry = {"claim": "C.", "models": "M.", "name": "Same"}
    (tmp_path / "data.yaml").write_text(str([{**entry, "arxiv": "0001.00001"}, {**entry, "arxiv": "0001.00002"}]))
    monkeypatch.setattr(papers, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"data\.yaml: 0001\.00001 and 0001\.00002 are both called same"):
        papers.paper_recipes.__wrapped__()
