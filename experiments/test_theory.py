"""The checks of theory.py: by hand, with planted errors, and as the pages tell them."""
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from experiments import theory

ROOT = Path(__file__).resolve().parent.parent
RIGHT = {name: getattr(theory, name) for name in ("lemma1", "flow", "bounds")}
PLANTED = {
    "λ for nλ": (theory.check_lemma1, "lemma1", lambda problem, t: RIGHT["lemma1"](
        replace(problem, lam=problem.lam / len(problem.y)), t)),
    "2τ for τ": (theory.check_flow, "flow", lambda problem, w, tau: RIGHT["flow"](
        problem, w, 2 * tau)),
    "ψ for the repaired bound": (theory.check_repair, "bounds", lambda problem: SimpleNamespace(
        **{**vars(found := RIGHT["bounds"](problem)), "repaired": found.psi})),
}


@pytest.mark.parametrize("slip", PLANTED)
def test_a_planted_error_is_found(slip, monkeypatch):
    check, name, wrong = PLANTED[slip]
    theory.measure(check, 12)
    monkeypatch.setattr(theory, name, wrong)
    with pytest.raises(AssertionError, match="it is off by|exceeds the repaired bound"):
        theory.measure(check, 12)


def test_lemma_1_and_the_flow_by_hand():
    """Two examples, two outputs, orthogonal features of lengths 2 and 1; λ = ½, so nλ = 1."""
    W, Phi = np.array([[3.0, 5, 7], [1, 2, 4]]), np.array([[2.0, 0], [0, 1], [0, 0]])
    problem = theory.Problem(Phi, np.array([[4.0, 6], [1, 3]]), W.ravel(), W.ravel(), 0.5, 1.5)
    # a round: 4/(4 + 1) and 1/(1 + 1) of the first two columns, and none of the third
    once, twice = W * [0.8, 0.5, 0], W * [0.64, 0.25, 0]
    for t, by_hand in enumerate((W, once, twice)):
        np.testing.assert_allclose(theory.lemma1(problem, t), by_hand.ravel(), atol=1e-12)
    left, goal = np.exp([-6, -1.5, 0]), np.array([[2.0, 1, 0], [3, 3, 0]])  # σ²T; y_j = σ_j W_j
    tuned = theory.flow(problem, once.ravel(), 1.5).reshape(2, 3)
    np.testing.assert_allclose(tuned, goal * (1 - left) + once * left, atol=1e-12)


def test_the_counterexample_by_hand():
    """One feature that counts: all is scalar, so that nothing of theory.py is needed."""
    left, rounds = np.exp(-1.1), 0.5 ** np.arange(7)
    printed = np.sqrt((1 - left) ** 2 + (rounds * left) ** 2)
    page = (ROOT / "THEORY.md").read_text(encoding="utf-8")
    for y in (1.0, -1.0):
        found, distances = theory.bounds(theory.tiny(y)), abs(y * (1 - left) + rounds * left)
        np.testing.assert_allclose([found.psi, found.distance], [printed, distances], atol=1e-12)
        for values in (printed, distances):
            assert "| " + " | ".join(f"{value:.4f}" for value in values[:4]) + " |" in page


def test_every_check_holds_and_the_pages_give_what_it_measures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    theory.main()  # the first claim that fails raises
    assert np.asarray(Image.open("results/theory.png").convert("L")).std() > 20  # not blank
    made, committed, told = (path.read_text(encoding="utf-8") for path in (
        Path("results/theory.md"), ROOT / "results/theory.md", ROOT / "THEORY.md"))
    counts = [re.findall(r" (\d{2,})(?:;| \|)", page) for page in (made, committed)]
    assert counts[0] == counts[1] and set(counts[0]) == set(re.findall(r"\*\*(\d+)\*\*", told))
    names = {name for name in vars(theory) if name.startswith("check_")}
    assert set(re.findall(r"`theory\.(\w+)`", told)) == names == {f.__name__ for f in theory.CHECKS}
