"""The thresholds of all gates. Those marked "judgement" follow from no theory; docs list them."""
