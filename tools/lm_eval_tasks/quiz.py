"""Which questions of the quiz each task keeps: those for reporting, of its tier, that have wrong choices."""

from functools import partial


def keep(rows, tier: str):
    return rows.filter(lambda row: row["tier"] == tier and row.get("split") != "dev" and bool(row["choices"]))


tier_a, tier_b, tier_c, tier_d = (partial(keep, tier=tier) for tier in "ABCD")
