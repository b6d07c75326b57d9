"""Section 4 and Appendix A in numbers: what of the theory holds, what does not, what repairs it.

    python experiments/theory.py                          # every check, 27 s on one CPU core
    python experiments/theory.py --problems 2000 --seed 1

The theory takes a linear model f(x, w) = Wφ(x) with w = vec[Wᵀ], lets t rounds of self-distillation
be t ridge regressions on the last model's outputs, and fine-tuning a gradient flow of length T.
Lemma 1 solves the former, the proof of Theorem 1 the latter; ζ and ψ of Theorems 1 and 2 follow.
Texts of the paper on the web lost roots, bars and minus signs; the formulas here are restored.
THEORY.md derives them and names the check of each claim. The first claim that fails raises an
AssertionError; results/theory.md, .json and .png are written when all have passed.

Letters: n examples, d features, p outputs; r the rank of I_p ⊗ Φ; t rounds; τ ≤ T; i ≤ r.
"""
import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from scipy.integrate import solve_ivp

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import repeat

ROUNDS = range(7)  # t = 0 is further pre-training alone
KINDS = ("full rank", "rank-deficient", "more examples than features")
# Two ways to one number differ by rounding, 1e-16 times a few powers of ten: the formulas divide by
# σ_i, which falls to 0.01 in a few of the draws. A misread formula is off by a tenth or more.
ROUNDING = 1e-9
INTEGRATION = 1e-8  # solve_ivp keeps each of its steps, some tens, to 1e-12


# ----------------------------------------------------------------------------- the model


class Problem(NamedTuple):
    """One instance of section 4. Of w_init only the length matters to the largest distance."""

    Phi: ndarray  # [d, n], column j is φ(x_j)
    y: ndarray  # [n, p]
    w00: ndarray  # [dp] = vec[Wᵀ], the rows of W one after another: the teacher of round 1
    rho: float  # ‖w_init‖
    lam: float  # λ, the ridge of each round
    T: float  # how long fine-tuning takes


def draw(generator: Generator, kind: str = KINDS[0], sizes: tuple | None = None) -> Problem:
    """A random problem of a kind, or of full rank with the sizes (d, n, p)."""
    n, p = generator.integers(1 if kind == KINDS[0] else 2, 6), generator.integers(1, 4)
    d = n + generator.integers(1, 5)
    d, n, p = sizes or ((n, d, p) if kind == KINDS[2] else (d, n, p))
    Phi = generator.standard_normal((d, n))
    if kind == KINDS[1]:
        Phi = Phi[:, :-1] @ generator.standard_normal((n - 1, n))
    # σ_1 near 1: were it 3, e^(-σ²T) would be too small for any formula around it to matter.
    Phi *= generator.uniform(0.7, 1.6) / np.linalg.norm(Phi, 2)
    return Problem(Phi, generator.standard_normal((n, p)), generator.standard_normal(d * p),
                   rho=generator.uniform(0, 2), lam=10 ** generator.uniform(-2, -0.5),
                   T=generator.uniform(1, 2))  # section 4 asks for T > 1


def spectrum(problem: Problem) -> tuple[ndarray, ndarray, ndarray]:
    """u_i [dp, r], σ_i [r] and v_i [np, r] of I_p ⊗ Φ = U Σ Vᵀ, without those of σ_i = 0."""
    p = problem.y.shape[1]
    U, sigma, Vt = np.linalg.svd(np.kron(np.eye(p), problem.Phi), full_matrices=False)
    r = (sigma > 1e-10 * sigma[0]).sum()  # rounding leaves 1e-16 where a zero should be
    return U[:, :r], sigma[:r], Vt[:r].T


# ----------------------------------------------------------------------------- Lemma 1, equation 5


def alpha(sigma: ndarray, n: int, lam: float, t: int) -> ndarray:
    """α_{i,t} = (1/σ_i)·(1/(1 + nλ/σ_i²))^t (Lemma 1, restored)."""
    return 1 / sigma * (1 / (1 + n * lam / sigma**2)) ** t


def coefficients(problem: Problem, t: int) -> ndarray:
    """c_i(t) = α_{i,t}·ỹ_i, the part of w_{t,0} along u_i, with ỹ = Vᵀ vec[f_0] (Lemma 1)."""
    _, sigma, V = spectrum(problem)
    W = problem.w00.reshape(problem.y.shape[1], -1)  # [p, d]
    y_tilde = V.T @ (W @ problem.Phi).ravel()  # of vec[f_0]: n outputs of unit 1, n of unit 2, ...
    return alpha(sigma, problem.Phi.shape[1], problem.lam, t) * y_tilde


def unseen(problem: Problem) -> ndarray:
    """(I - ŨŨᵀ) w_{0,0}, the part of the teacher that none of the data shows (Lemma 1's v)."""
    U, _, _ = spectrum(problem)
    return problem.w00 - U @ (U.T @ problem.w00)


def lemma1(problem: Problem, t: int) -> ndarray:
    """w_{t,0} = Σ c_i(t) u_i + 1{t=0} (I - ŨŨᵀ) w_{0,0} (Lemma 1)."""
    return spectrum(problem)[0] @ coefficients(problem, t) + (t == 0) * unseen(problem)


def ridge_rounds(problem: Problem, t: int) -> ndarray:
    """w_{t,0} by t least-squares solutions of section 4's L_t(w), with neither SVD nor vec."""
    d, n = problem.Phi.shape
    W = problem.w00.reshape(-1, d)  # [p, d]
    # (1/n)‖Φᵀ Wᵀ - f‖² + λ‖Wᵀ‖² is one sum of squares, of these rows.
    Q, R = np.linalg.qr(np.vstack([problem.Phi.T / n**0.5, problem.lam**0.5 * np.eye(d)]))
    for _ in range(t):
        f = problem.Phi.T @ W.T  # [n, p], the last model's outputs
        W = np.linalg.solve(R, Q[:n].T @ f / n**0.5).T
    return W.ravel()


def targets(problem: Problem) -> ndarray:
    """q_i, with Y = Zv and v = Σ q_i u_i: where fine-tuning tends along u_i (App. A.1)."""
    _, sigma, V = spectrum(problem)
    return V.T @ problem.y.T.ravel() / sigma


def decay(problem: Problem, tau: float) -> ndarray:
    """e^(-σ_i²τ), what fine-tuning for τ leaves of the start along u_i."""
    return np.exp(-(spectrum(problem)[1] ** 2) * tau)


def flow(problem: Problem, w: ndarray, tau: float) -> ndarray:
    """w_{t,τ} from w = w_{t,0}: c_i becomes q_i (1 - e^(-σ_i²τ)) + c_i e^(-σ_i²τ) (App. A.1)."""
    U, _, _ = spectrum(problem)
    c, e = U.T @ w, decay(problem, tau)
    return w + U @ (targets(problem) * (1 - e) + c * e - c)


def integrate(problem: Problem, w: ndarray, tau: float) -> ndarray:
    """The same by stepping along dW/dτ = -∇L(W), L(W) = ½ Σ ‖Wφ(x_j) - y_j‖² (section 4)."""
    def slope(_, w: ndarray) -> ndarray:
        W = w.reshape(problem.y.shape[1], -1)  # [p, d]
        return ((problem.y.T - W @ problem.Phi) @ problem.Phi.T).ravel()

    return solve_ivp(slope, (0, tau), w, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]


# ----------------------------------------------------------------------------- Theorems 1 and 2


def parts(problem: Problem, t: int) -> tuple[float, float, float]:
    """G_1, ψ_1(t) and 1{t=0}B, which are squared lengths (Theorem 2, App. A.2)."""
    q, c, e = targets(problem), coefficients(problem, t), decay(problem, problem.T)
    return (q**2 * (1 - e) ** 2).sum(), (c**2 * e**2).sum(), (t == 0) * (unseen(problem) ** 2).sum()


def cross(problem: Problem, t: int) -> float:
    """2 Σ q_i c_i (1 - e_i) e_i with e_i = e^(-σ_i²T): the term that both proofs leave out."""
    q, c, e = targets(problem), coefficients(problem, t), decay(problem, problem.T)
    return 2 * (q * c * (1 - e) * e).sum()


def zeta(problem: Problem, t: int) -> float:
    """ζ_t(s) = √(G_1 + ψ_1(t) + 1{t=0}B), meant to bound ‖w_{t,T}‖ (App. A.1)."""
    return sum(parts(problem, t)) ** 0.5


def psi(problem: Problem, t: int) -> float:
    """ψ(t) = √(G_1 + ψ_1(t) + 1{t=0}B) + G_2 with G_2 = ‖w_init‖ (Theorem 2)."""
    return sum(parts(problem, t)) ** 0.5 + problem.rho


def repaired(problem: Problem, t: int) -> float:
    """√G_1 + √(ψ_1(t) + 1{t=0}B) + G_2: the triangle inequality needs no cross term."""
    G1, psi1, tail = parts(problem, t)
    return G1**0.5 + (psi1 + tail) ** 0.5 + problem.rho


def true_distance(problem: Problem, t: int) -> float:
    """The largest ‖w_init - w_{t,T}‖ over ‖w_init‖ = ρ, which Theorem 2's (1) and (2) call ψ(t)."""
    return np.linalg.norm(flow(problem, lemma1(problem, t), problem.T)) + problem.rho


# ----------------------------------------------------------------------------- the checks


def require(holds: bool, claim: str) -> None:
    """AssertionError unless it holds. python -O would drop an assert."""
    if not holds:
        raise AssertionError(f"this does not hold: {claim}")


def curve(formula: Callable, problem: Problem) -> ndarray:
    """formula(problem, t) for every t of ROUNDS."""
    return np.array([formula(problem, t) for t in ROUNDS])


def falls(values: ndarray) -> bool:
    """Strictly decreasing, the first drop the largest."""
    drops = -np.diff(values)
    return bool((drops > 0).all() and (drops[0] > drops[1:]).all())


def grows(values: ndarray) -> bool:
    """Somewhere increasing, by more than rounding."""
    return bool((np.diff(values) > ROUNDING).any())


def gap(a: ndarray | float, b: ndarray | float) -> float:
    """The largest difference of any two entries."""
    return float(np.abs(np.subtract(a, b)).max())


def aligned(problem: Problem) -> Problem:
    """The same with labels of q_i c_i ≥ 0: they agree in sign with the teacher along every u_i."""
    _, sigma, V = spectrum(problem)
    q = np.abs(targets(problem)) * np.sign(coefficients(problem, 0))
    return problem._replace(y=(V @ (sigma * q)).reshape(problem.y.T.shape).T)


def tiny(y: float, w00: tuple[float, float] = (1, 0), rho: float = 0.0) -> Problem:
    """The smallest counterexample: d = 2, n = p = 1, σ = λ = 1, T = 1.1, w_{0,0} = e_1."""
    return Problem(np.array([[1.0], [0.0]]), np.array([[y]]), np.array(w00), rho, 1.0, 1.1)


def check_lemma1(generator: Generator, problems: int) -> dict:
    """Lemma 1's w_{t,0} solves the t ridge regressions, whatever the rank of Φ"""
    worst = 0.0
    for number in range(problems):
        problem = draw(generator, KINDS[number % 3])
        for t in ROUNDS:
            worst = max(worst, gap(lemma1(problem, t), ridge_rounds(problem, t)))
    require(worst < ROUNDING, f"Lemma 1 is the ridge solution; it is off by {worst:.1e}")
    return {"largest error": worst}


def check_flow(generator: Generator, problems: int) -> dict:
    """the closed form of w_{t,τ} is the integral of the fine-tuning flow, whatever the rank of Φ"""
    worst = 0.0
    for number in range(problems):
        problem = draw(generator, KINDS[number % 3])
        w, tau = ridge_rounds(problem, number % 4), problem.T * generator.uniform(0.1, 1)
        worst = max(worst, gap(flow(problem, w, tau), integrate(problem, w, tau)))
    require(worst < INTEGRATION, f"w_{{t,τ}} is the integral; it is off by {worst:.1e}")
    return {"largest error": worst}


def check_psi(generator: Generator, problems: int) -> dict:
    """ψ falls every round, most in the first; its square lacks one term; B is gone after round 1"""
    worst = 0.0
    for _ in range(problems):
        problem = draw(generator)
        without_B = problem._replace(w00=problem.w00 - unseen(problem))
        require(falls(curve(psi, problem)) and falls(curve(psi, without_B)),
                "ψ falls every round, most in the first, with B and without")
        require((np.diff(curve(parts, problem)[:, 1]) < 0).all(), "ψ_1 is strictly decreasing")
        Q, _ = np.linalg.qr(problem.Phi)  # [d, n], spans what the data show
        for t in ROUNDS:
            w = flow(problem, ridge_rounds(problem, t), problem.T)
            W = w.reshape(-1, len(Q))  # [p, d]
            worst = max(worst, gap(((W - W @ Q @ Q.T) ** 2).sum(), parts(problem, t)[2]))
            # Only a root makes ψ - G_2 a length, and only the cross term makes it that of w_{t,T}.
            square = (psi(problem, t) - problem.rho) ** 2
            worst = max(worst, gap(square + cross(problem, t), (w**2).sum()))
    require(worst < ROUNDING, f"B and ψ's square are as derived; they are off by {worst:.1e}")
    return {"largest error": worst}


def check_flaw(generator: Generator, problems: int) -> dict:
    """the largest distance is not ψ: that of y or of -y exceeds ψ at every t, and it may grow"""
    above, grown, excess = 0, 0, 0.0
    for _ in range(problems):
        problem = draw(generator)
        printed, distances = curve(psi, problem), curve(true_distance, problem)
        other = curve(true_distance, problem._replace(y=-problem.y))  # the cross term changes sign
        above += bool((distances > printed + ROUNDING).any())
        grown += grows(distances)
        excess = max(excess, (distances - printed).max())
        for t in ROUNDS:
            require((distances[t] > printed[t]) != (other[t] > printed[t])
                    or abs(cross(problem, t)) < ROUNDING, "one of y and -y exceeds ψ")
            w = flow(problem, ridge_rounds(problem, t), problem.T)
            opposite, anywhere = (problem.rho * a / np.linalg.norm(a)
                                  for a in (-w, generator.standard_normal(w.shape)))
            require(gap(np.linalg.norm(opposite - w), distances[t]) < ROUNDING
                    and np.linalg.norm(anywhere - w) < distances[t] + ROUNDING,
                    "the w_init opposite to w_{t,T} is the farthest")
    require(above > 0 and grown > 0, "some distances exceed ψ, and some grow")
    return {"exceed ψ": above, "not monotone": grown, "largest excess": float(excess)}


def check_repair(generator: Generator, problems: int) -> dict:
    """the repaired bound holds and falls as ψ was to; for aligned labels the distance falls, too"""
    above, looseness = 0, 0.0
    for _ in range(problems):
        problem = draw(generator)
        bound, friendly = curve(repaired, problem), aligned(problem)
        require(falls(bound), "the repaired bound falls every round, most in the first")
        require(falls(curve(true_distance, friendly)), "aligned labels: so does the distance")
        for case in (problem, problem._replace(y=-problem.y), friendly):
            above += bool((curve(true_distance, case) > bound + ROUNDING).any())
        looseness = max(looseness, ((bound - problem.rho) / curve(zeta, problem)).max())
    require(above == 0, f"no distance exceeds the repaired bound; {above} do")
    require(looseness < 2**0.5 + ROUNDING, "√a + √b ≤ √2·√(a + b)")
    return {"exceed the repaired bound": above, "repaired/printed, at most": float(looseness)}


def check_zeta(generator: Generator, problems: int) -> dict:
    """over sets of 5 data sets ζ(t) = max ζ_t(s) falls, but max ‖w_{t,T}‖ exceeds it or grows"""
    above, grown = 0, 0
    for _ in range(problems):
        # ρ = 0 takes G_2 from ψ's functions: what is left is ‖w_{t,T}‖ and its bounds.
        members = [draw(generator, sizes=(4, 2, 1))._replace(rho=0.0, lam=0.1, T=1.1)
                   for _ in range(5)]
        norms, printed, bound, crossing = (
            np.array([curve(formula, member) for member in members])  # [5, rounds]
            for formula in (true_distance, zeta, repaired, cross))
        require(gap(printed**2 + crossing, norms**2) < ROUNDING, "ζ_t(s)² lacks the cross term")
        require((np.diff(printed.max(0)) < 0).all(), "ζ(t) is strictly decreasing")
        require((norms <= bound + ROUNDING).all() and (np.diff(bound.max(0)) < 0).all(),
                "the repaired ζ bounds every norm and is strictly decreasing")
        above += bool((norms.max(0) > printed.max(0) + ROUNDING).any())
        grown += grows(norms.max(0))
    require(above > 0 and grown > 0, "some largest norms exceed ζ(t), and some grow")
    return {"exceed ζ": above, "not monotone": grown}


def check_counterexample(generator: Generator, problems: int) -> dict:
    """d = 2, n = p = 1: y = 1 exceeds ψ and reaches the repaired bound, y = -1 grows"""
    plus, minus = (curve(true_distance, tiny(y)) for y in (1.0, -1.0))
    printed = curve(psi, tiny(1.0))
    require(gap(plus[0], 1) < ROUNDING and gap(printed[0], 0.7456) < 5e-5, "y = 1: 1.0 > 0.7456")
    require(gap(minus[:3], [0.334, 0.501, 0.584]) < 5e-4 and (np.diff(minus) > 0).all(),
            "y = -1: the distance grows 0.334, 0.501, 0.584")
    require(gap(printed, curve(psi, tiny(-1.0))) == 0 and falls(printed), "ψ has no sign and falls")
    require(gap(plus, curve(repaired, tiny(1.0))) < ROUNDING, "the repaired bound is reached")
    return {"ψ": printed[:4].tolist(), "distance for y = 1": plus[:4].tolist(),
            "for y = -1": minus[:4].tolist()}


def check_remarks(generator: Generator, problems: int) -> dict:
    """w_{0,0} orthogonal to the data: one drop; endless rounds: w = 0; a supremum may not fall"""
    for _ in range(problems):
        problem = draw(generator)
        orthogonal = problem._replace(w00=unseen(problem))
        for formula in (psi, true_distance, repaired):
            values = curve(formula, orthogonal)
            require(values[0] > values[1] + ROUNDING and np.ptp(values[1:]) < ROUNDING,
                    "w_{0,0} orthogonal to the data: one drop, then a constant")
        require(np.linalg.norm(lemma1(problem, 20_000)) < ROUNDING, "the rounds tend to w = 0")
    # y = 1 - 1/k and w_{0,0} = e_1/k: every ζ_t(s_k) falls with t, yet stays below 1 - e^(-T) and
    # within 1/k of it, so that the supremum over all k is the same for each t.
    limit = 1 - np.exp(-1.1)
    for k in (1, 10, 100, 1000, 10_000):
        values = curve(zeta, tiny(1 - 1 / k, (1 / k, 0)))
        require((np.diff(values[:4]) < 0).all(), "ζ_t(s_k) falls")
        require((values < limit).all() and (values > limit - 1 / k).all(), "its supremum is fixed")
    return {"that supremum": limit}


CHECKS = (check_lemma1, check_flow, check_psi, check_flaw, check_repair, check_zeta,
          check_counterexample, check_remarks)


# ----------------------------------------------------------------------------- the program


def draw_figure(path: Path) -> None:
    """ψ's parts; then ψ, the largest distance and the repaired bound for both signs of y."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    cases = [tiny(y, (1, 0.5), rho=0.5) for y in (1.0, -1.0)]
    below = np.zeros(len(ROUNDS))
    names = ("G₁: of the labels", "ψ₁(t): of the teacher, seen in the data",
             "1{t=0}B: of the teacher, not seen")
    for name, height in zip(names, curve(parts, cases[0]).T):
        axes[0].bar(ROUNDS, height, bottom=below, label=name)
        below = below + height
    axes[0].set(title="the three parts under ψ's root", ylabel="squared length (no unit)",
                ylim=(0, 1))
    lines = ((repaired, "repaired bound", "C2^--"), (psi, "ψ as printed", "C0o-"),
             (true_distance, "true largest distance", "C3s-"))
    titles = ("label y = 1: ψ is exceeded", "label y = −1: the distance grows")
    for axis, case, title in zip(axes[1:], cases, titles):
        for formula, name, style in lines:
            axis.plot(ROUNDS, curve(formula, case), style, label=name,
                      markersize=9 if formula is repaired else 5)  # seen where it is reached
        axis.axhline(case.rho, color="grey", linestyle=":", label="G₂ = ‖w_init‖")
        axis.set(title=title, ylabel="‖w_init − w‖ after fine-tuning (no unit)", ylim=(0, 2))
    for axis in axes:
        axis.set_xlabel("rounds of self-distillation, t")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def shown(measured: dict) -> str:
    """What a check measured, in one line."""
    def text(value: float | list) -> str:
        return ", ".join(map(text, value)) if isinstance(value, list) else f"{value:.4g}"
    return "; ".join(f"{name} {text(value)}" for name, value in measured.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=400,
                        help="random problems a check; in fewer than 30 no bound may be exceeded")
    parser.add_argument("--seed", type=int, default=0, help="of the random problems")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args()
    results = {}
    for number, check in enumerate(CHECKS):
        # Each check has its own generator, so that none depends on what another draws.
        measured = check(np.random.default_rng([args.seed, number]), args.problems)
        size = 1 if check is check_counterexample else args.problems
        results[check.__name__] = {"claim": check.__doc__, "n": size, "measured": measured}
        print(f"{check.__name__}: {check.__doc__}\n    n = {size}; {shown(measured)}", flush=True)
    about = (f"`{shlex.join(['python', 'experiments/theory.py', *sys.argv[1:]])}`\n\nn random "
             f"problems a check (d ≤ 9, n ≤ 9, p ≤ 3), seed {args.seed}, t = 0 … {ROUNDS[-1]}, "
             f"float64. {repeat.machine()}.")
    rows = [f"| `{name}` | {found['claim']} | {found['n']} | {shown(found['measured'])} |"
            for name, found in results.items()]
    text = "\n".join(["# theory", "", about, "", "![bounds against rounds](theory.png)", "",
                      "Drawn: d = 2, n = p = σ = λ = 1, T = 1.1, w_00 = (1, ½), ‖w_init‖ = ½. "
                      "Derivations: [THEORY.md](../THEORY.md).", "",
                      "| check | what holds | n | measured |", "|---|---|---|---|", *rows, ""])
    args.out.mkdir(parents=True, exist_ok=True)
    draw_figure(args.out / "theory.png")
    (args.out / "theory.md").write_text(text, encoding="utf-8")
    record = json.dumps({"about": about, "results": results}, indent=1, ensure_ascii=False) + "\n"
    (args.out / "theory.json").write_text(record, encoding="utf-8")
    print(f"\nevery check passed; wrote theory.md, theory.json and theory.png to {args.out}")


if __name__ == "__main__":
    main()
