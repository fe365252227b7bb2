"""The thresholds of all gates. Those marked "judgement" follow from no theory; docs list them."""

DRIFT_P = 0.01
"""Judgement: below this p-value (Kolmogorov-Smirnov, tokens a text) texts to be judged are of other
lengths than those that calibrated. Texts of one source are refused once in a hundred times."""
