"""Section 4 and Appendix A in numbers: what of the theory holds, what does not, what repairs it.

    python -m experiments.theory  # every check on 400 random problems, 5 s on one CPU core

The theory takes a linear model f(x, w) = Wφ(x) with w = vec[Wᵀ], lets t rounds of self-distillation
be t ridge regressions on the last model's outputs, and fine-tuning a gradient flow of length T.
THEORY.md derives the formulas and names the check of each claim. The first claim that fails raises
an AssertionError; results/theory.md and .png are written when all have passed.

Letters: n examples, d features, p outputs; r the rank of I_p ⊗ Φ; t rounds; τ ≤ T; i ≤ r.
"""
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy import ndarray
from numpy.linalg import norm
from numpy.random import Generator
from scipy.integrate import solve_ivp

from experiments import pages, runs

PROBLEMS = 400  # of each check
ROUNDS = range(7)  # t = 0 is further pre-training alone
KINDS = ("full rank", "rank-deficient", "more examples than features")
# Two ways to one number differ by rounding, 1e-16 times a few powers of ten, as the formulas divide
# by σ_i, down to 0.01; solve_ivp keeps its steps to 1e-12. A misread formula is off by a tenth.
ROUNDING = 1e-9

# ----------------------------------------------------------------------------- the model


@dataclass
class Problem:
    """One instance of section 4, with u_i, σ_i, v_i and q_i for i ≤ r."""

    Phi: ndarray  # [d, n], column j is φ(x_j)
    y: ndarray  # [n, p]
    w00: ndarray  # [dp] = vec[Wᵀ], the rows of W one after another: the teacher of round 1
    w_init: ndarray  # [dp]
    lam: float  # λ, the ridge of each round
    T: float  # how long fine-tuning takes

    def __post_init__(self) -> None:
        A = np.kron(np.eye(self.y.shape[1]), self.Phi)  # I_p ⊗ Φ = U Σ Vᵀ
        U, sigma, Vt = np.linalg.svd(A, full_matrices=False)
        r = (sigma > 1e-10 * sigma[0]).sum()  # rounding leaves 1e-16 where a zero should be
        self.U, self.sigma, self.V = U[:, :r], sigma[:r], Vt[:r].T  # [dp, r], [r], [np, r]
        # Y = Zv and v = Σ q_i u_i: where fine-tuning tends along u_i (App. A.1)
        self.q = self.V.T @ self.y.T.ravel() / self.sigma

    def outputs(self, w: ndarray) -> ndarray:
        """f(x_j, w) of all examples, [n, p]."""
        return self.Phi.T @ w.reshape(self.y.shape[1], -1).T

    def unseen(self, w: ndarray) -> ndarray:
        """P_r w = (I - ŨŨᵀ) w, the part of weights that none of the data shows."""
        return w - self.U @ (self.U.T @ w)


def draw(generator: Generator, kind: str = KINDS[0], sizes: tuple | None = None) -> Problem:
    """A random problem of a kind, or of full rank with the sizes (d, n, p)."""
    n, p = generator.integers(1 if kind == KINDS[0] else 2, 6), generator.integers(1, 4)
    d = n + generator.integers(1, 5)
    d, n, p = sizes or ((n, d, p) if kind == KINDS[2] else (d, n, p))
    Phi = generator.standard_normal((d, n))
    if kind == KINDS[1]:
        Phi = Phi[:, :-1] @ generator.standard_normal((n - 1, n))
    # σ_1 near 1: were it 3, e^(-σ²T) would be too small for any formula around it to matter.
    Phi *= generator.uniform(0.7, 1.6) / norm(Phi, 2)
    y, w00, w_init = (generator.standard_normal(shape) for shape in ((n, p), d * p, d * p))
    return Problem(Phi, y, w00, w_init * generator.uniform(0, 2) / norm(w_init),
                   lam=10 ** generator.uniform(-2, -0.5), T=generator.uniform(1, 2))  # §4: T > 1


def tiny(y: float, w00: tuple = (1, 0), w_init: tuple = (0, 0)) -> Problem:
    """The smallest counterexample: d = 2, n = p = 1, σ = λ = 1, T = 1.1, w_{0,0} = e_1."""
    return Problem(np.array([[1.0], [0.0]]), np.array([[y]]), np.array(w00), np.array(w_init),
                   lam=1.0, T=1.1)


def lemma1(problem: Problem, t: int) -> ndarray:
    """w_{t,0} = Σ α_{i,t} ỹ_i u_i + 1{t=0} P_r w_{0,0}, α_{i,t} = (1/σ_i)·(1/(1 + nλ/σ_i²))^t."""
    sigma, n = problem.sigma, len(problem.y)
    alpha = 1 / sigma * (1 / (1 + n * problem.lam / sigma**2)) ** t
    y_tilde = problem.V.T @ problem.outputs(problem.w00).T.ravel()  # ỹ = Vᵀ vec[f_0]
    return problem.U @ (alpha * y_tilde) + (t == 0) * problem.unseen(problem.w00)


def ridge_rounds(problem: Problem, t: int) -> ndarray:
    """The same by t least-squares solutions of section 4's L_t(w), without an SVD."""
    d, n = problem.Phi.shape
    # (1/n)‖Φᵀ Wᵀ - f‖² + λ‖Wᵀ‖² is one sum of squares, of these rows.
    Q, R = np.linalg.qr(np.vstack([problem.Phi.T / n**0.5, problem.lam**0.5 * np.eye(d)]))
    w = problem.w00
    for _ in range(t):
        w = np.linalg.solve(R, Q[:n].T @ problem.outputs(w) / n**0.5).T.ravel()
    return w


def flow(problem: Problem, w: ndarray, tau: float) -> ndarray:
    """w_{t,τ} from w = w_{t,0}: c_i becomes q_i (1 - e^(-σ_i²τ)) + c_i e^(-σ_i²τ) (App. A.1)."""
    gone = 1 - np.exp(-(problem.sigma**2) * tau)
    return w + problem.U @ ((problem.q - problem.U.T @ w) * gone)


def algorithm1(problem: Problem, t: int, s: float = np.inf) -> ndarray:
    """w_{t,0} in Algorithm 1's form: a round flows from w_init for a time s, and has no ridge."""
    w = problem.w00
    for _ in range(t):
        w = flow(replace(problem, y=problem.outputs(w)), problem.w_init, s)
    return w


def bounds(problem: Problem) -> SimpleNamespace:
    """What Theorems 1 and 2 speak of at every t of ROUNDS, and what repairs them (App. A)."""
    q, e, G2 = problem.q, np.exp(-(problem.sigma**2) * problem.T), norm(problem.w_init)
    w = np.array([lemma1(problem, t) for t in ROUNDS])  # [rounds, dp]
    c = w @ problem.U  # [rounds, r]
    G1, psi1 = ((q * (1 - e)) ** 2).sum(), ((c * e) ** 2).sum(1)
    B = (problem.unseen(w.T) ** 2).sum(0)  # [rounds] 1{t=0} B
    zeta = (G1 + psi1 + B) ** 0.5
    return SimpleNamespace(
        zeta=zeta,  # ζ_t(s), meant to bound ‖w_{t,T}‖
        psi=zeta + G2,  # ψ(t), meant to be the largest ‖w_init - w_{t,T}‖ of all w_init this long
        cross=2 * (q * c * (1 - e) * e).sum(1),  # what both proofs leave out
        repaired=G1**0.5 + (psi1 + B) ** 0.5 + G2,  # the triangle inequality
        distance=norm([flow(problem, one, problem.T) for one in w], axis=1) + G2)  # that largest


# ----------------------------------------------------------------------------- the checks
# A check looks at one random problem and tells what it found: a size, or whether something is so.


def falls(values: ndarray) -> bool:
    """Strictly decreasing, the first drop the largest."""
    drops = -np.diff(values)
    return (drops > 0).all() and (drops[0] > drops[1:]).all()


def exceeds(a: ndarray, b: ndarray) -> bool:
    """Somewhere larger, by more than rounding."""
    return (a > b + ROUNDING).any()


def equal(what: str, *pairs: tuple[ndarray, ndarray]) -> dict:
    """What to tell of pairs that must be equal: their largest difference."""
    error = max(np.abs(np.subtract(*pair)).max() for pair in pairs)
    assert error < ROUNDING, f"{what}; it is off by {error:.1e}"
    return {"largest error": error}


def check_lemma1(generator: Generator, number: int) -> dict:
    """Lemma 1's w_{t,0} solves the t ridge regressions, whatever the rank of Φ, and tends to 0"""
    problem = draw(generator, KINDS[number % 3])
    assert norm(lemma1(problem, 20_000)) < ROUNDING, "the rounds tend to w = 0"
    return equal("Lemma 1 is the ridge solution", *(
        (lemma1(problem, t), ridge_rounds(problem, t)) for t in ROUNDS))


def check_flow(generator: Generator, number: int) -> dict:
    """the closed form of w_{t,τ} is the integral of the fine-tuning flow, whatever the rank of Φ"""
    problem = draw(generator, KINDS[number % 3])
    w, tau = ridge_rounds(problem, number % 4), problem.T * generator.uniform(0.1, 1)

    def slope(_, w: ndarray) -> ndarray:  # -∇L(w), L(w) = ½ Σ ‖f(x_j, w) - y_j‖² (section 4)
        return (problem.Phi @ (problem.y - problem.outputs(w))).T.ravel()

    stepped = solve_ivp(slope, (0, tau), w, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    return equal("w_{t,τ} is the integral", (flow(problem, w, tau), stepped))


def check_theorem2(generator: Generator, number: int) -> dict:
    """ψ falls, most in round 1; the distance of y or of -y exceeds it, by a term, and may grow"""
    problem = draw(generator)
    unseen, G2 = problem.unseen(problem.w00), norm(problem.w_init)
    found, seen, once = (bounds(replace(problem, w00=w00))
                         for w00 in (problem.w00, problem.w00 - unseen, unseen))
    assert falls(found.psi) and falls(seen.psi), "ψ falls, most in round 1, with B and without"
    for values in (once.psi, once.distance, once.repaired):
        assert falls(values[:2]) and np.ptp(values[1:]) < ROUNDING, "w_{0,0} ⟂ Φ: one drop"
    other = bounds(replace(problem, y=-problem.y))  # the cross term changes sign
    one = (found.distance > found.psi) != (other.distance > found.psi)
    assert (one | (abs(found.cross) < ROUNDING)).all(), "one of y and -y exceeds ψ"
    tuned = np.array([flow(problem, ridge_rounds(problem, t), problem.T) for t in ROUNDS])
    lengths = norm(tuned, axis=1)
    far = norm(tuned + tuned * G2 / lengths[:, None], axis=1)  # w_init opposite to w_{t,T}
    # Only a root makes ψ - G_2 a length, and only the cross term makes it that of w_{t,T}.
    square = (found.psi - G2) ** 2 + found.cross
    return {"exceed ψ": exceeds(found.distance, found.psi),
            "not monotone": exceeds(found.distance[1:], found.distance[:-1]),
            "largest excess": (found.distance - found.psi).max(),
            **equal("ψ's square lacks the cross term, B goes, the farthest w_init is opposite",
                    (square, lengths**2), (problem.unseen(tuned[1:].T), 0), (found.distance, far))}


def check_repair(generator: Generator, number: int) -> dict:
    """the repaired bound holds and falls as ψ was to; for aligned labels the distance falls, too"""
    problem = draw(generator)
    q = np.abs(problem.q) * np.sign(problem.U.T @ problem.w00)  # so that q_i c_i(0) ≥ 0
    aligned = (problem.V @ (problem.sigma * q)).reshape(problem.y.T.shape).T  # [n, p]
    found = [bounds(replace(problem, y=y)) for y in (problem.y, -problem.y, aligned)]
    for one in found:
        assert falls(one.repaired), "the repaired bound falls every round, most in the first"
        assert not exceeds(one.distance, one.repaired), "no distance exceeds the repaired bound"
    assert falls(found[2].distance), "aligned labels: the distance falls, most in the first round"
    looseness = ((found[0].repaired - norm(problem.w_init)) / found[0].zeta).max()
    assert looseness < 2**0.5 + ROUNDING, "√a + √b ≤ √2·√(a + b)"
    return {"repaired/printed, at most": looseness}


def check_zeta(generator: Generator, number: int) -> dict:
    """over sets of 5 data sets ζ(t) = max ζ_t(s) falls, but max ‖w_{t,T}‖ exceeds it or grows"""
    # w_init = 0 takes G_2 from the bounds: what is left is ‖w_{t,T}‖ and what is to bound it.
    drawn = [draw(generator, sizes=(4, 2, 1)) for _ in range(5)]
    members = [bounds(replace(one, w_init=np.zeros(4), lam=0.1, T=1.1)) for one in drawn]
    zeta, repaired, norms = (np.max([getattr(one, name) for one in members], 0)
                             for name in ("zeta", "repaired", "distance"))  # [rounds]
    assert (np.diff([zeta, repaired]) < 0).all(), "ζ and the repaired ζ are strictly decreasing"
    assert not exceeds(norms, repaired), "the repaired ζ bounds every norm"
    return {"exceed ζ": exceeds(norms, zeta), "not monotone": exceeds(norms[1:], norms[:-1])}


def check_theorem1(generator: Generator, number: int) -> dict:
    """its steps hold with c = 2√(2M), E‖φ‖² ≤ R², P(s ∉ S) ≤ δ/2; E‖φ‖ ≤ R is not enough"""
    problem, W = draw(generator, sizes=(4, 3, 2)), generator.standard_normal((5, 2, 4))  # 5 models
    signs = np.array([*itertools.product((-1, 1), repeat=6)]).reshape(-1, 2, 3)  # [64, p, n] all
    f = W @ problem.Phi  # [5, p, n]
    losses = ((f - problem.y.T) ** 2).sum(1)  # [5, n]
    c, longest = 2 * (2 * losses.max()) ** 0.5, norm(W, axis=(1, 2)).max()
    steps = ((signs[:, 0] @ losses.T).max(1).mean(),  # E sup Σ ξ_i ℓ_i
             c * np.einsum("spn,wpn->sw", signs, f).max(1).mean(),  # E sup Σ ξ_ik W_k φ(x_i)
             c * longest * norm(signs @ problem.Phi.T, axis=(1, 2)).mean(),  # E ‖h‖
             c * longest * (2 * (problem.Phi**2).sum()) ** 0.5)  # √(p Σ ‖φ(x_i)‖²)
    assert (np.diff(steps) > -ROUNDING).all(), "each of the steps is an upper bound"
    # p = 1, ‖φ‖ = 1/rare with this probability, else 0: E‖φ‖ = 1, E‖φ‖² = 1/rare
    n, rare, delta = 4, 0.01 / (1 + number), generator.uniform(0, 1)
    hits = np.array([*itertools.product((-1, 0, 1), repeat=n)])  # [81, n] ξ_i where φ(x_i) ≠ 0
    length = np.where(hits == 0, 1 - rare, rare / 2).prod(1) @ abs(hits.sum(1)) / rare  # E ‖h‖
    assert n**0.5 < length <= (n / rare) ** 0.5, "E‖h‖ ≤ √n R for E‖φ‖² ≤ R², not for E‖φ‖ ≤ R"
    deviation = (np.log(2 / delta) / (2 * n)) ** 0.5  # the last term over M; McDiarmid on one side:
    return {"E‖h‖/(√n E‖φ‖), to": length / n**0.5,
            **equal("it fails with δ/2", (np.exp(-2 * n * deviation**2), delta / 2))}


def check_w_init(generator: Generator, number: int) -> dict:
    """w_{0,0} = w_init + δ, ‖δ‖ = 0.3 ‖w_init‖: dropping B mostly moves away from w_init"""
    problem = draw(generator)
    w_init, delta, found = problem.w00, generator.standard_normal(problem.w00.shape), {}
    for name, step in (("farther", delta), ("with a seen δ", delta - problem.unseen(delta))):
        case = replace(problem, w00=w_init + step * 0.3 * norm(w_init) / norm(step))
        before, after = (flow(case, lemma1(case, t), case.T) - w_init for t in (0, 1))
        found[name] = norm(after) > norm(before)
        found |= equal("round 1 turns P_r δ into -P_r w_init",
                       (case.unseen(before), case.unseen(case.w00 - w_init)),
                       (case.unseen(after), -case.unseen(w_init)))
    return found


def check_algorithm1(generator: Generator, number: int) -> dict:
    """from w_init, without λ‖w‖²: the distance falls once, by what the teacher learnt off D_u"""
    problem = draw(generator, KINDS[number % 3])
    w_init, delta = problem.w_init, problem.w00 - problem.w_init
    least = np.linalg.lstsq(problem.Phi.T, problem.outputs(delta), rcond=1e-10)[0]  # [d, p]
    tuned = [flow(problem, algorithm1(problem, t), problem.T) - w_init for t in ROUNDS]
    square, s = (np.array(tuned) ** 2).sum(1), generator.uniform(0.5, 5)
    early = [algorithm1(problem, t, s) - w_init for t in ROUNDS[1:]]
    shrunk = [(1 - np.exp(-(problem.sigma**2) * s)) ** t * (delta @ problem.U) for t in ROUNDS[1:]]
    return equal("a round is w_init + ŨŨᵀδ, the distance falls once, an early stop shrinks ŨŨᵀδ",
                 (algorithm1(problem, 1), w_init + least.T.ravel()),
                 (square[1:], square[0] - (problem.unseen(delta) ** 2).sum()),
                 (early, shrunk @ problem.U.T))


def check_counterexample(generator: Generator, number: int) -> dict:
    """d = 2, n = p = 1: y = 1 exceeds ψ, y = -1 grows, against Remark 1; a supremum may not fall"""
    plus, minus = bounds(tiny(1.0)), bounds(tiny(-1.0))
    assert exceeds(plus.distance, plus.psi), "y = 1 exceeds ψ"
    assert (np.diff(minus.distance) > 0).all(), "y = -1 grows"
    assert (plus.psi == minus.psi).all() and falls(plus.psi), "ψ has no sign and falls"
    equal("the repaired bound is reached", (plus.distance, plus.repaired))
    teachers = np.array([norm(lemma1(tiny(-1.0), t) - (1, 0)) for t in ROUNDS])  # from e_1 = w_init
    assert (np.diff(teachers) > 0).all(), "Remark 1: the teachers w_{t,0} move away from w_init"
    k, limit = 1 + number, 1 - np.exp(-1.1)
    values = bounds(tiny(1 - 1 / k, (1 / k, 0))).zeta
    assert (np.diff(values[:4]) < 0).all(), "ζ_t(s_k) falls"
    assert (values < limit).all() and (values > limit - 1 / k).all(), "its supremum is the limit"
    return {"ψ": plus.psi[:4], "distance for y = 1": plus.distance[:4],
            "for y = -1": minus.distance[:4], "of the teachers": teachers[:4]}


CHECKS = (check_lemma1, check_flow, check_theorem2, check_repair, check_zeta, check_theorem1,
          check_w_init, check_algorithm1, check_counterexample)


def measure(check: Callable, problems: int) -> dict:
    """A check over random problems: the largest sizes; how often, but once at least, it was so."""
    generator = np.random.default_rng([0, CHECKS.index(check)])  # none depends on another's
    found, measured = [check(generator, number) for number in range(problems)], {}
    for name in found[0]:
        values = np.array([one[name] for one in found])  # [problems, ...]
        measured[name] = (values.sum(0) if values.dtype == bool else values.max(0)).tolist()
        assert values.dtype != bool or values.any(), f"{check.__name__}: never {name}"
    return measured


# ----------------------------------------------------------------------------- the program


def main() -> None:
    lines, panels, path = [], {}, Path("results", "theory.md")
    for check in CHECKS:
        told = [f"{name} {np.array2string(np.array(value), precision=4, separator=', ')}"
                for name, value in measure(check, PROBLEMS).items()]
        lines.append([f"`{check.__name__}`", check.__doc__, "; ".join(told)])
        print(*lines[-1], flush=True)
    for y, title in ((1.0, "y = 1: ψ is exceeded"), (-1.0, "y = −1: it grows from round 1")):
        found = bounds(tiny(y, (1, 0.5), (0.5, 0)))
        series = {"repaired bound": found.repaired, "ψ as printed": found.psi,
                  "true largest distance": found.distance}
        panels[title] = {name: (ROUNDS, values, None) for name, values in series.items()}
    pages.plot(path.with_suffix(".png"), "", "round t", "‖w_init − w‖ after fine-tuning", panels)
    about = (f"`python -m experiments.theory`: {PROBLEMS} random problems a check (d ≤ 9, n ≤ 9, "
             f"p ≤ 3), t = 0 … {ROUNDS[-1]}, float64; the largest sizes, and how often something "
             f"was so. {runs.machine()}. Derivations: [THEORY.md](../THEORY.md).")
    table = pages.grid(["check", "what holds", "measured"], lines)
    path.write_text("\n".join(["# theory", "", about, "", *table, ""]), encoding="utf-8")
    print(f"every check passed; wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
