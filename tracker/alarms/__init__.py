"""How often does an alarm cry wolf? What thresholds are calibrated on, and what many signals at once are worth."""
