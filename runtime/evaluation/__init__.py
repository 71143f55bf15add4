"""How well a target predicts given text; used by export and calibration."""
