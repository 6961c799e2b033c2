"""Calibration, importance and evaluation of a model."""
