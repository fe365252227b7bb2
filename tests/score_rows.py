"""Lines of scores.jsonl with known scores, for the tests of what is made of them."""

import numpy as np

SECRET = "the quick brown fox must never be quoted"


def make_rows(n=60, attacks=("sama", "loss"), labelled=True, shift=1.0, seed=0):
    """`n` members, then `n` non-members; the first attack is shifted, the others are noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(2 * n):
        member = int(i < n)
        scores = {a: float(rng.normal(shift * member * (a == attacks[0]))) for a in attacks}
        rows.append(
            {
                "id": f"secret-id-{i}",
                "label": member if labelled else None,
                "n_tokens": 40,
                "truncated": i % 10 == 0,
                "status": "ok",
                "scores": scores,
                "passes": dict.fromkeys(attacks, 16),
                "text": SECRET,
            }
        )
    return rows
