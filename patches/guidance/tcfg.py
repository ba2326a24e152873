"""Tangential Damping Classifier-free Guidance (Kwon et al. 2025, arXiv 2503.18137)."""

from dataclasses import dataclass

from ..shared.steering import Term, number, steer


@dataclass(frozen=True)
class TCFG(Term):
    """The negative keeps only what lies along the direction that both predictions share (the paper's equation 8):

        A = [eps_u; eps_c], 2 x N per item;  v = its first right singular vector;  eps_u' = <eps_u, v> v.

    v is a combination p eps_u + q eps_c, where (p, q) is the first unit eigenvector of A A^T, so that
    eps_u' = p (p eps_u + q eps_c): three dot products instead of an SVD. A factor common to both changes nothing, so
    x - D takes the place of eps, and on flow models that of the velocity.

    strength: share of the way from eps_u to eps_u'.
    """

    strength: float = 1.0
    node = "SteerTCFG"
    rank = -1  # APG and others reshape what it leaves
    exclusive = True

    def check(self):
        number("strength", self.strength, high=1.0)

    @property
    def off(self):
        return super().off or self.strength == 0.0

    def reshape(self, difference, positive, call, weight):
        eps_c = call.x - positive
        eps_u = eps_c + difference
        return difference.lerp(damped(eps_u, eps_c, difference) - eps_c, self.strength * weight)


def damped(eps_u, eps_c, d):
    """eps_u' of eps_u = eps_c + d, all [B, ...].

    (p, q) = (cos t, sin t) with tan 2t = 2 <u, c> / (|u|^2 - |c|^2). That is well defined where u and c are nearly
    parallel, however small d is; where they are orthogonal and of one length any v is as good, and u stays.
    """
    along, across = dot(d, eps_u + eps_c), 2 * dot(eps_u, eps_c)  # |u|^2 - |c|^2 without cancellation
    r = along.hypot(across)
    r, along = r.where(r > 0, 1.0), along.where(r > 0, 1.0)
    return (1 + along / r) / 2 * eps_u + across / r / 2 * eps_c


def dot(a, b):
    """Inner product over all non-batch dimensions, [B, 1, ...]."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdim=True)


def apply(model, strength, schedule):
    return steer(model, TCFG(schedule, strength))
