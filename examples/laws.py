"""Closed forms for isotropic unit keys and independent unit values of width d, in expectation."""

from __future__ import annotations


def gated_error(pairs: int, d: int, alpha: float) -> float:
    """Return the mean of E‖Sᵀk_i − v_i‖² over N pairs, written with decay and no error term.

    With m later writes the pair has amplitude αᵐ, and every other pair adds its own α²ᵐ / d:
    (1 − αᵐ)² + Σ_{j≠i} α^(2 m_j) / d. For α = 1 that is (N − 1) / d.
    """
    energy = sum(alpha ** (2 * m) for m in range(pairs))
    errors = [(1 - alpha**m) ** 2 + (energy - alpha ** (2 * m)) / d for m in range(pairs)]
    return sum(errors) / pairs


def delta_error(pairs: int, d: int, alpha: float, beta: float) -> float:
    """Return the mean of E‖Sᵀk_i − v_i‖² over N pairs, written by the (gated) delta rule.

    It is 1 − 2 c + n with c = E⟨v_i, Sᵀk_i⟩ and n = E‖Sᵀk_i‖², where F = E‖S‖². A write with the
    key k' = s k_i + √(1 − s²) u, u ⊥ k_i, E s² = 1/d, E s⁴ = 3/(d (d + 2)), changes them to

        c ← α (1 − β/d) c
        n ← α² n E(1 − β s²)² + β²/d + α² β² E[s² (1 − s²)] (F − n) / (d − 1)
        F ← α² F (1 − (2β − β²)/d) + β²

    and the pair's own write sets c = β, n = (1 − β)² α² F/d + β². Exact, not an approximation.
    """
    s2, s4 = 1 / d, 3 / (d * (d + 2))
    keep = alpha**2 * (1 - 2 * beta * s2 + beta**2 * s4)
    mix = alpha**2 * beta**2 * (s2 - s4) / (d - 1)
    energies = [0.0]
    for _ in range(pairs):
        energies.append(alpha**2 * energies[-1] * (1 - (2 * beta - beta**2) / d) + beta**2)
    total = 0.0
    for i in range(pairs):
        c, n = beta, ((1 - beta) * alpha) ** 2 * energies[i] / d + beta**2
        for energy in energies[i + 1 : pairs]:
            c *= alpha * (1 - beta / d)
            n = keep * n + beta**2 / d + mix * (energy - n)
        total += 1 - 2 * c + n
    return total / pairs


def overwritten_error(
    keys: int, again: int, alpha: float, has_error_term: bool
) -> tuple[float, float]:
    """Return E‖Sᵀk − v‖² of the keys written again and of those left alone, orthonormal, β = 1.

    Decay leaves αᵐ of a value after m later writes. Without the error term the old value stays
    underneath the new one; with it the old one is gone. Keys 0 ... again − 1 are written again.
    """
    written = []
    for i in range(again):
        under = 0.0 if has_error_term else alpha ** (keys + again - 1 - i)
        written.append((1 - alpha ** (again - 1 - i)) ** 2 + under**2)
    kept = [(1 - alpha ** (keys - 1 - i + again)) ** 2 for i in range(again, keys)]
    return sum(written) / len(written), sum(kept) / len(kept)
